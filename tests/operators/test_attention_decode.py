"""The test pattern of attention_decode, contiguous and paged: properties, edges, illegal calls."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import reference.decode
from nki_kernels.hardware import spec_for
from nki_kernels.machine.errors import ConfigError, OptionError, ShapeError
from nki_kernels.operators.attention_decode import (
    DECODES,
    DecodeConfig,
    attention_decode,
)
from tests.operators.test_contract import Symbol
from tests.strategies.matrices import extents, normal, seeds, small_integers
from tests.tolerance import assert_close

DTYPES = {"bfloat16": ml_dtypes.bfloat16, "float16": np.float16, "float32": np.float32}
TOY = spec_for("toy")
ATTENTION_DECODE, ATTENTION_DECODE_PAGED = DECODES[False, False], DECODES[True, False]
TRUTH = st.booleans()
types = st.sampled_from(list(DTYPES))


def operands(seed, b, h, g, t, s, d, e, dtype="float32", make=normal):
    """Return (q, k, v, lengths): lengths anywhere in 0 .. S."""
    host = DTYPES[dtype]
    shapes = [(b, h, t, d), (b, g, s, d), (b, g, s, e)]
    arrays = [make(seed + i, shape, host) for i, shape in enumerate(shapes)]
    lengths = np.random.default_rng(seed).integers(0, s + 1, b).astype(np.int32)
    return (*arrays, lengths)


def in_pages(k, v, page, seed, spare=2):
    """Return (pages of k, pages of v, table) of shuffled pages that hold the same keys."""
    b, g, s, _ = k.shape
    width = s // page
    order = np.random.default_rng(seed).permutation(b * width + spare)
    table = order[: b * width].reshape(b, width).astype(np.int32)
    found = []
    for x in (k, v):
        pages = normal(seed, (b * width + spare, g, page, x.shape[3]), x.dtype)
        cut = x.reshape(b, g, width, page, x.shape[3]).transpose(0, 2, 1, 3, 4)
        pages[table] = cut
        found.append(pages)
    return (*found, table)


def compare(got, inputs, case, target="toy", sinks=None, **options):
    refs = reference.decode.attention_decode(
        *inputs, sinks, depth=spec_for(target).partitions, **options
    )
    for name, result, ref in zip(("out", "lse"), got, refs, strict=True):
        assert_close(
            result, ref.value, ref.magnitude, op=name, case=case,
            roundings=ATTENTION_DECODE.roundings, chain=ATTENTION_DECODE.chain({}, TOY),
        )  # fmt: skip


sizes = {
    "b": st.integers(1, 3),
    "g": st.integers(1, 3),
    "group": st.integers(1, 3),
    "t": st.integers(1, 2),
    "s": extents(TOY.partitions, 4 * TOY.partitions + 3),
    "d": st.integers(1, TOY.partitions + 2),
    "e": st.integers(1, TOY.partitions + 2),
}
choices = {
    "window": st.one_of(st.none(), st.integers(1, 12)),
    "softcap": st.one_of(st.none(), st.sampled_from([0.5, 3.0])),
    "scale": st.one_of(st.none(), st.sampled_from([-0.5, 0.0, 2.0])),
}


@given(dtype=types, seed=seeds(), sink=TRUTH, **choices, **sizes)
def test_any_shape_matches_the_reference(
    b, g, group, t, s, d, e, dtype, seed, sink, window, softcap, scale
):
    inputs = operands(seed, b, g * group, g, t, s, d, e, dtype)
    sinks = normal(seed + 9, (g * group,), np.float32) if sink else None
    options = {"window": window, "softcap": softcap, "scale": scale}
    got = attention_decode(*inputs, sinks=sinks, target="toy", **options)
    compare(got, inputs, f"{b}x{g}x{group}x{t}x{s}x{d}x{e}", sinks=sinks, **options)


@given(dtype=types, seed=seeds(), page=st.sampled_from([1, 2, 4]), width=st.integers(1, 10),
       window=choices["window"], b=sizes["b"], g=sizes["g"], group=sizes["group"], t=sizes["t"],
       d=st.integers(1, TOY.partitions))  # fmt: skip
def test_shuffled_pages_match_the_reference(dtype, seed, page, width, window, b, g, group, t, d):
    inputs = operands(seed, b, g * group, g, t, page * width, d, 3, dtype)
    q, k, v, lengths = inputs
    k_pages, v_pages, table = in_pages(k, v, page, seed)
    # What is behind the last key names no page.
    table[np.arange(width)[None, :] * page >= lengths[:, None]] = -7
    got = attention_decode(q, k_pages, v_pages, lengths, table=table, window=window, target="toy")
    compare(got, inputs, f"{b}x{g}x{group}x{t}x{page}x{width}x{d}", window=window)


@given(dtype=types, seed=seeds(), g=st.integers(1, 2), group=st.integers(1, 5),
       t=st.integers(3, 20), width=st.integers(1, 9), window=choices["window"], sink=TRUTH,
       quantized=TRUTH)  # fmt: skip
def test_a_chunk_of_a_prompt_matches_the_reference(
    dtype, seed, g, group, t, width, window, sink, quantized
):
    """More queries than share a pass over the cache; some sequences are shorter than the chunk."""
    quantized &= dtype != "float32"
    q, k, v, lengths = operands(seed, 2, g * group, g, t, 4 * width, 4, 3, dtype)
    if quantized:
        k, v = (x.astype(ml_dtypes.float8_e4m3) for x in (k, v))
    sinks = normal(seed + 9, (g * group,), np.float32) if sink else None
    *pages, table = in_pages(k, v, 4, seed)
    options = {"window": window}
    got = attention_decode(q, *pages, lengths, table=table, sinks=sinks, target="toy", **options)
    compare(got, (q, k, v, lengths), f"{g}x{group}x{t}x{width}", sinks=sinks, **options)


@pytest.mark.parametrize("target", ["trn1", "trn2", "trn3"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("h", "g", "t", "s", "d"),
    [(8, 2, 1, 700, 128), (4, 4, 2, 129, 64), (16, 1, 8, 300, 256), (5, 5, 1, 100, 96)],
)
def test_real_sizes_match_the_reference(h, g, t, s, d, dtype, target):
    inputs = operands(1, 2, h, g, t, s, d, d, dtype)
    got = attention_decode(*inputs, target=target)
    compare(got, inputs, f"{h}x{g}x{t}x{s}x{d}", target)


@pytest.mark.parametrize("target", ["trn1", "trn2"])
@pytest.mark.parametrize(("page", "width"), [(16, 33), (32, 5), (64, 6), (128, 3)])
def test_real_pages_match_the_reference(page, width, target):
    inputs = operands(2, 2, 8, 2, 1, page * width, 128, 128, "bfloat16")
    q, k, v, lengths = inputs
    *pages, table = in_pages(k, v, page, 3)
    got = attention_decode(q, *pages, lengths, table=table, target=target)
    compare(got, inputs, f"{page}x{width}", target)


@given(dtype=st.sampled_from(["bfloat16", "float16"]), seed=seeds(), paged=TRUTH,
       softcap=choices["softcap"], width=st.integers(1, 9), group=sizes["group"], t=sizes["t"],
       d=sizes["d"])  # fmt: skip
def test_an_fp8_cache_is_its_values_times_its_scales(
    dtype, seed, paged, softcap, width, group, t, d
):
    q, k, v, lengths = operands(seed, 2, 2 * group, 2, t, 4 * width, d, 3, dtype)
    k, v = (x.astype(ml_dtypes.float8_e4m3) for x in (k, v))
    k_scale, v_scale = (
        np.ldexp(1.0, np.random.default_rng(seed + i).integers(-3, 4, 2)).astype(np.float32)
        for i in range(2)
    )
    # Powers of 2: the reference's own keys and values are exact.
    whole = [x.astype(np.float64) * y[None, :, None, None] for x, y in ((k, k_scale), (v, v_scale))]
    stored = in_pages(k, v, 4, seed) if paged else (k, v, None)
    got = attention_decode(
        q, *stored[:2], lengths, table=stored[2], k_scale=k_scale, v_scale=v_scale,
        softcap=softcap, target="toy",
    )  # fmt: skip
    compare(got, (q, *whole, lengths), f"{width}x{group}x{t}x{d}", softcap=softcap)


@pytest.mark.parametrize(
    ("target", "d"),
    [("trn1", 128), ("trn3", 128), *(("trn2", d) for d in (32, 64, 96, 101, 128, 192, 256))],
)
def test_an_fp8_cache_of_real_size(target, d):
    q, k, v, lengths = operands(7, 2, 8, 2, 1, 400, d, d, "bfloat16")
    k, v = (x.astype(ml_dtypes.float8_e4m3) for x in (k, v))
    got = attention_decode(q, k, v, lengths, target=target)
    compare(got, (q, k, v, lengths), f"fp8 {d}", target)


def test_every_finite_fp8_value_survives_the_transpose():
    """Among them bytes whose pair is a subnormal or a NaN of the 16-bit type it moves as."""
    bits = np.arange(256, dtype=np.uint8).view(ml_dtypes.float8_e4m3)
    bits = bits[np.isfinite(bits.astype(np.float32))]
    k = np.stack([np.tile(bits, 2), np.repeat(bits, 2)], axis=1).reshape(1, 1, -1, 2)
    v = np.zeros((1, 1, k.shape[2], 1), ml_dtypes.float8_e4m3)
    for column in range(2):
        q = np.zeros((1, 1, 1, 2), ml_dtypes.bfloat16)
        q[..., column] = 1
        for key in range(0, k.shape[2], 37):
            one, zero = (np.ascontiguousarray(x[:, :, key : key + 1]) for x in (k, v))
            length = np.array([1], np.int32)
            _, lse = attention_decode(q, one, zero, length, scale=1.0, target="toy")
            assert lse[0, 0, 0] == np.float32(k[0, 0, key, column])


@given(dtype=types, seed=seeds(), paged=TRUTH, heads=st.integers(1, 3), tokens=st.integers(1, 3),
       ahead=st.integers(0, 1), lag=st.integers(0, 2), scalar=st.integers(0, 9),
       hwdge=TRUTH)  # fmt: skip
def test_no_config_changes_the_mathematics(
    dtype, seed, paged, heads, tokens, ahead, lag, scalar, hwdge
):
    inputs = operands(seed, 2, 4, 2, 1, 20, 5, 4, dtype)
    q, k, v, lengths = inputs
    table = None
    if paged:
        k, v, table = in_pages(k, v, 4, seed)
    config = DecodeConfig(heads, tokens, ahead, lag, scalar, hwdge)
    got = attention_decode(q, k, v, lengths, table=table, config=config, target="toy")
    compare(got, inputs, repr(config))


# -- meaning ---------------------------------------------------------------------------------------


@given(seed=seeds(), dtype=types, s=sizes["s"])
def test_a_sequence_alone_is_its_part_of_the_batch(seed, dtype, s):
    q, k, v, lengths = operands(seed, 3, 4, 2, 1, s, 5, 4, dtype)
    whole = attention_decode(q, k, v, lengths, target="toy")
    for b in range(3):
        one = slice(b, b + 1)
        alone = attention_decode(q[one], k[one], v[one], lengths[one], target="toy")
        assert alone[0].tobytes() == whole[0][one].tobytes()
        assert alone[1].tobytes() == whole[1][one].tobytes()


@given(seed=seeds(), s=sizes["s"], t=sizes["t"])
def test_what_lies_behind_a_length_is_inert(seed, s, t):
    q, k, v, lengths = operands(seed, 2, 4, 2, t, s, 5, 4)
    want = attention_decode(q, k, v, lengths, target="toy")
    for b, length in enumerate(lengths):
        k[b, :, length:] = 1e4
        v[b, :, length:] = -3e38
    got = attention_decode(q, k, v, lengths, target="toy")
    # By value: 0 times a negative value is -0.
    assert (got[0] == want[0]).all()
    assert got[1].tobytes() == want[1].tobytes()


@given(seed=seeds(), s=sizes["s"])
def test_a_window_as_long_as_the_cache_is_none(seed, s):
    inputs = operands(seed, 2, 4, 2, 2, s, 5, 4)
    want = attention_decode(*inputs, target="toy")
    got = attention_decode(*inputs, window=s, target="toy")
    assert got[0].tobytes() == want[0].tobytes()


@given(seed=seeds(), cut=st.integers(1, 20))
def test_two_parts_merge_by_their_lse(seed, cut):
    q, k, v, _ = operands(seed, 1, 4, 2, 1, 21, 5, 4)
    inputs = (q, k, v, np.array([21], np.int32))
    parts = []
    for part in (slice(0, cut), slice(cut, 21)):
        keys, values = (np.ascontiguousarray(x[:, :, part]) for x in (k, v))
        length = np.array([keys.shape[2]], np.int32)
        parts.append(attention_decode(q, keys, values, length, target="toy"))
    whole = np.logaddexp(parts[0][1], parts[1][1])
    out = sum(o * np.exp(lse - whole)[..., None] for o, lse in parts)
    # Each part has its own bound; both count once more in the merge.
    compare_twice((out.astype(np.float32), whole), inputs)


def compare_twice(got, inputs):
    refs = reference.decode.attention_decode(*inputs, depth=TOY.partitions)
    for name, result, ref in zip(("out", "lse"), got, refs, strict=True):
        assert_close(result, ref.value, ref.magnitude, op=name, case="merged", roundings=4, chain=6)


@given(seed=seeds(), length=st.integers(0, 30), t=st.integers(1, 2), window=choices["window"])
def test_equal_scores_average_integers_exactly(seed, length, t, window):
    """Zero queries give all keys one weight; sums of small integers are exact."""
    q, k, v, _ = operands(seed, 1, 2, 1, t, 30, 4, 3, "float32",
                          lambda *where: small_integers(*where, most=20))  # fmt: skip
    out, lse = attention_decode(
        np.zeros_like(q), k, v, np.array([length], np.int32), window=window, target="toy"
    )
    for row in range(t):
        stop = max(0, length - t + 1 + row)
        start = max(0, stop - (window or 30))
        if start == stop:
            assert (out[0, :, row] == 0).all()
            assert (lse[0, :, row] == -np.inf).all()
            continue
        total = v[0, 0, start:stop].sum(axis=0, dtype=np.float32)
        factor = np.float32(1) / np.float32(stop - start)
        assert (out[0, :, row] == total * factor).all()


ADVERSARIAL = {
    "one huge key": lambda k: k.__setitem__((..., 5, slice(None)), 100.0),
    "equal keys": lambda k: k.__setitem__(..., 1.0),
    "alternating": lambda k: k.__setitem__((..., slice(0, None, 2), slice(None)), -100.0),
    "first": lambda k: k.__setitem__((..., 0, slice(None)), 50.0),
    "last": lambda k: k.__setitem__((..., -1, slice(None)), 50.0),
    "all far below": lambda k: k.__setitem__(..., -2500.0),
    "all far above": lambda k: k.__setitem__(..., 2500.0),
}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", ADVERSARIAL)
def test_hard_scores_stay_within_the_bound(name, dtype):
    q, k, v, _ = operands(4, 2, 4, 2, 1, 37, 4, 4, dtype)
    q[...] = 1.0
    ADVERSARIAL[name](k)
    inputs = (q, k, v, np.array([37, 20], np.int32))
    got = attention_decode(*inputs, scale=1.0, target="toy")
    assert np.isfinite(got[0].astype(np.float64)).all()
    compare(got, inputs, name, scale=1.0)


def test_a_sink_alone_takes_everything():
    q, k, v, _ = operands(5, 1, 4, 2, 2, 9, 4, 3)
    sinks = normal(6, (4,), np.float32)
    out, lse = attention_decode(q, k, v, np.array([0], np.int32), sinks=sinks, target="toy")
    assert (out == 0).all()
    assert (lse == sinks[None, :, None]).all()


# -- the contract ----------------------------------------------------------------------------------


def test_the_contract_never_looks_at_a_size():
    b, h, g, t, s, d, e = (Symbol(letter) for letter in "BHGTSDE")
    shapes = ((b, h, t, d), (b, g, s, d), (b, g, s, e), (b,), None)
    out, lse = ATTENTION_DECODE.output_shapes(*shapes)
    assert all(got is want for got, want in zip(out, (b, h, t, e), strict=True))
    assert all(got is want for got, want in zip(lse, (b, h, t), strict=True))


def plain(h=4, g=2, t=1, s=8, d=4):
    return operands(0, 2, h, g, t, s, d, 3)


def pages(page=4, width=2, table=None):
    q, k, v, lengths = plain(s=page * width)
    *cut, found = in_pages(k, v, page, 0)
    lengths[:] = page * width
    return (q, *cut, lengths), {"table": found if table is None else table}


CONFIG = DecodeConfig(1, 1, 0, 0, 0, True)
ILLEGAL = {
    "heads": (plain(h=3), {}, ShapeError, "3 query heads share 2 key heads; the first must be a m"),
    "rows": (
        plain(h=18), {}, ShapeError,
        "9 query heads share a key head; at most 8 on toy; attend with some of the query heads at",
    ),
    "long": ((*plain()[:3], np.array([9, 0], np.int32)), {}, OptionError,
             "lengths has 9; allowed are 0 to 8, the keys of the cache; cut it"),
    "negative": ((*plain()[:3], np.array([2, -1], np.int32)), {}, OptionError, "lengths has -1;"),
    "scale": (plain(), {"scale": float("inf")}, OptionError, "scale is inf; a finite number or N"),
    "softcap": (plain(), {"softcap": 0}, OptionError, "softcap is 0; a finite number above 0 or"),
    "window": (plain(), {"window": 0}, OptionError, "window is 0; an int of at least 1 or None"),
    "config": (plain(), {"config": 3}, ConfigError, "config is a int; a DecodeConfig is needed"),
    "fields": (plain(), {"config": DecodeConfig(0, 1, 0, 0, 0, True)}, ConfigError,
               "config.heads is 0; an int from 1 on is needed; raise it"),
    "descriptors": (plain(), {"config": CONFIG, "target": "trn1"}, ConfigError,
                    "config.hwdge is True; trn1 has no hardware descriptor engine; set it False"),
    "scales": (plain(), {"k_scale": np.ones(2, np.float32)}, OptionError,
               "k_scale or v_scale is given and k has dtype float32; scales belong to a float8_e"),
    "no page": (*pages(table=np.array([[0, 1], [2, 6]], np.int32)), OptionError,
                "table has page 6 before the end of its sequence; the cache has pages 0 to 5"),
    "page of three": (*pages(page=3), ShapeError, "a page has 3 keys; a power of 2 is needed"),
    "too deep": (operands(0, 1, 1, 1, 1, 8, 900, 1), {}, ShapeError,
                 "a step of one key head takes"),
}  # fmt: skip


@pytest.mark.parametrize("name", ILLEGAL)
def test_an_illegal_call_says_why(name):
    inputs, keywords, error, text = ILLEGAL[name]
    with pytest.raises(error) as caught:
        attention_decode(*inputs, **{"target": "toy", **keywords})
    assert text in str(caught.value)


def test_sizes_that_float32_cannot_count():
    axes = {"B": 1, "H": 1, "G": 1, "T": 1, "D": 8, "E": 8}
    spec = spec_for("trn2")
    (reason,) = ATTENTION_DECODE.limits({**axes, "S": 2**24 + 1}, "bfloat16", spec)
    assert reason.startswith("the cache has 16777217 keys per sequence; at most 16777216 are c")
    paged = {**axes, "W": 8, "P": 16, "N": 2**20 + 1}
    (reason,) = ATTENTION_DECODE_PAGED.limits(paged, "bfloat16", spec)
    assert "the cache has 1048577 pages of 1 heads; at most 16777216 parts, here 16777232" in reason
