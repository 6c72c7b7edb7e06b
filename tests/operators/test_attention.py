"""The whole test pattern of an operator, for attention."""

from __future__ import annotations

import dataclasses

import nki.language as nl
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from nki_kernels import ops
from nki_kernels.hardware import spec_for
from nki_kernels.kernels.attention.plan import groups_of, runs_of
from nki_kernels.machine.errors import ConfigError, DtypeError, OptionError, ShapeError
from nki_kernels.machine.tensor import Abstract
from nki_kernels.operators.attention import ATTENTION, CAUSAL_ATTENTION, MASKED_ATTENTION
from reference.attention import attention as reference
from tests.operators.attentions import DTYPES, check, compare, operands, repaired, run
from tests.strategies.matrices import extents, seeds

TOY = spec_for("toy")

sizes = {
    "b": st.integers(1, 2),
    "g": st.integers(1, 2),
    "group": st.integers(1, 3),
    "m": extents(TOY.moving_fmax, 2 * TOY.moving_fmax + 3),
    "n": extents(TOY.partitions, 4 * TOY.partitions + 3),
    "d": st.sampled_from([1, 5, 8, 15]),
    "dtype": st.sampled_from(list(DTYPES)),
    "seed": seeds(),
}

patterns = st.fixed_dictionaries(
    {},
    optional={
        "causal": st.booleans(),
        "align": st.sampled_from(["top-left", "bottom-right"]),
        "window": st.integers(1, 40),
        "scale": st.sampled_from([0.1, 1.0, -0.5]),
        "softcap": st.sampled_from([1.5, 30.0]),
    },
)


# -- properties ------------------------------------------------------------------------------------


@given(options=patterns, **sizes)
def test_any_shape_and_pattern_matches_the_reference(b, g, group, m, n, d, dtype, seed, options):
    inputs = operands(b, g * group, g, m, n, d, dtype, seed)
    check(inputs, options, f"{options}")


@given(options=patterns, sink=st.sampled_from([-3.0, 0.0, 5.0, 200.0]), **sizes)
def test_sinks_match_the_reference(b, g, group, m, n, d, dtype, seed, options, sink):
    inputs = operands(b, g * group, g, m, n, d, dtype, seed)
    sinks = (np.arange(g * group) + sink).astype(np.float32)
    check((*inputs, sinks), options, f"{options}")


@given(options=patterns, which=st.sampled_from(["mask", "bias", "both"]), **sizes)
def test_masks_and_biases_match_the_reference(b, g, group, m, n, d, dtype, seed, options, which):
    h = g * group
    inputs = operands(b, h, g, m, n, d, dtype, seed)
    rng = np.random.default_rng(seed)
    mask = bias = None
    if which != "bias":
        mask = (rng.random((b, 1, m, n)) < 0.6).astype(np.uint8)
    if which != "mask":
        bias = rng.standard_normal((1, h, m, n)).astype(DTYPES[dtype])
    check((*inputs, None, mask, bias), options, f"{options} {which}")


@given(
    causal=st.booleans(), power=st.integers(1, 14), kind=st.sampled_from(
        ["huge key", "equal keys", "alternating", "first", "last", "low"]
    ), **sizes,
)  # fmt: skip
def test_scores_of_any_size_match_the_reference(
    b, g, group, m, n, d, dtype, seed, causal, power, kind
):
    q, k, v = operands(b, g * group, g, m, n, d, dtype, seed)
    amount = 2.0**power
    q[...] = np.abs(q) + 1
    k[...] = np.sign(k) * 0.5
    if kind == "huge key":
        k[:, :, n // 2] = amount / 64
    elif kind == "equal keys":
        k[...] = amount
    elif kind == "alternating":
        k[...] = (np.where(np.arange(n) % 2, 1.0, -1.0) * amount)[:, None]
    elif kind == "low":
        k[...] = -amount
    else:
        k[:, :, 0 if kind == "first" else -1] = amount
    check((q, k, v), {"causal": causal}, kind)


@pytest.mark.parametrize("target", ["trn1", "trn2", "trn3", "toy"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("strength", [1, 300])
def test_every_generation_matches_the_reference(target, dtype, strength):
    spec = spec_for(target)
    inputs = operands(1, 2, 1, spec.moving_fmax + 5, spec.partitions * 2 + 3, 15, dtype)
    launched = check(inputs, {"causal": True, "scale": 0.25 * strength}, target, target)
    assert repaired(launched) == (strength > 1)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("m", [127, 513, 640])
@pytest.mark.parametrize("n", [127, 129, 512])
@pytest.mark.parametrize("d", [64, 200])
def test_sizes_around_the_real_tiles_match_the_reference(m, n, d, causal, dtype):
    check(operands(1, 1, 1, m, n, d, dtype), {"causal": causal}, "tiles", "trn2")


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("d", "e"), [(512, 512), (64, 512), (512, 64)])
@pytest.mark.parametrize("strength", [1, 300])
def test_rows_longer_than_a_bank_match_the_reference(d, e, strength, dtype):
    """A row of 512 and its sum take two banks, on both paths."""
    inputs = operands(1, 1, 1, 300, 270, d, dtype, e=e)
    options = {"causal": True, "scale": d**-0.5 * strength}
    assert repaired(check(inputs, options, "long rows", "trn2")) == (strength > 1)


@given(e=st.sampled_from([1, 3, 14, 15, 16, 17, 30, 31]), options=patterns, m=sizes["m"])
def test_any_head_size_of_v_matches_the_reference(e, options, m):
    check(operands(1, 2, 1, m, 21, 5, "bfloat16", e=e), options, f"{e} {options}")


@given(**sizes)
def test_later_keys_change_no_earlier_row(b, g, group, m, n, d, dtype, seed):
    q, k, v = operands(b, g * group, g, m, n, d, dtype, seed)
    whole = run((q, k, v), {"causal": True}).result
    cut = max(1, n // 2)
    k[:, :, cut:], v[:, :, cut:] = 7, -3
    other = run((q, k, v), {"causal": True}).result
    for one, two in zip(whole, other, strict=True):
        assert one[:, :, :cut].tobytes() == two[:, :, :cut].tobytes()


@given(options=patterns, **sizes)
def test_heads_and_batches_are_independent(b, g, group, m, n, d, dtype, seed, options):
    q, k, v = operands(b, g * group, g, m, n, d, dtype, seed)
    whole = run((q, k, v), options).result
    at = g * group - 1
    one = run(
        tuple(np.ascontiguousarray(x) for x in (q[-1:, at:], k[-1:, -1:], v[-1:, -1:])), options
    ).result
    for some, all_ in zip(one, whole, strict=True):
        assert some[0, 0].tobytes() == all_[-1, at].tobytes()


@given(**sizes)
def test_a_window_of_all_keys_is_causal(b, g, group, m, n, d, dtype, seed):
    inputs = operands(b, g * group, g, m, n, d, dtype, seed)
    causal = run(inputs, {"causal": True}).result
    window = run(inputs, {"causal": True, "window": max(m, n)}).result
    assert [x.tobytes() for x in causal] == [x.tobytes() for x in window]


@given(cut=st.floats(0, 1), **sizes)
def test_parts_of_the_keys_merge_through_lse(b, g, group, m, n, d, dtype, seed, cut):
    q, k, v = operands(b, g * group, g, m, n + 1, d, dtype, seed)
    at = 1 + int(cut * (n - 1))
    parts = [
        run((q, np.ascontiguousarray(k[:, :, s]), np.ascontiguousarray(v[:, :, s])),
            {"out_dtype": "float32"}).result
        for s in (slice(0, at), slice(at, None))
    ]  # fmt: skip
    lse = np.logaddexp(*(part[1].astype(np.float64) for part in parts))
    merged = sum(part[0] * np.exp(part[1].astype(np.float64) - lse)[..., None] for part in parts)
    want = reference(q, k, v)
    # Both parts keep the bound of the whole, and so does their weighted mean; a weight is off by
    # as much as its lse.
    allowed = 4 * (want[0].magnitude + np.abs(v.astype(np.float64)).max() * (
        want[1].magnitude[..., None] + 8
    )) * 2.0**-24  # fmt: skip
    assert (np.abs(merged - want[0].value) <= allowed).all()


def test_rows_that_attend_nothing_are_zero():
    inputs = operands(1, 2, 1, 40, 9, 8, "float32")
    options = {"causal": True, "align": "bottom-right"}
    out, lse = run(inputs, options).result
    assert (out[:, :, :31] == 0).all()
    assert (lse[:, :, :31] == -np.inf).all()
    assert np.isfinite(lse[:, :, 31:]).all()
    compare((out, lse), inputs, options, "idle")


def test_masked_rows_are_zero():
    inputs = operands(1, 1, 1, 9, 17, 8, "bfloat16")
    mask = np.ones((1, 1, 9, 17), np.uint8)
    mask[:, :, 3] = 0
    out, lse = run((*inputs, None, mask, None), {}).result
    assert (out[:, :, 3] == 0).all()
    assert lse[0, 0, 3] == -np.inf


# -- what runs -------------------------------------------------------------------------------------


def test_tiles_that_are_masked_cost_nothing():
    n = 8 * TOY.moving_fmax
    inputs = operands(1, 1, 1, n, n, 8, "bfloat16")

    def macs(options):
        works = [e.work for e in run(inputs, options).trace if e.opcode == "nc_matmul"]
        return sum(work.macs for work in works)

    full, causal = macs({}), macs({"causal": True})
    window = macs({"causal": True, "window": TOY.partitions})
    assert causal < 0.6 * full
    assert window < 0.2 * full


@pytest.mark.parametrize("heads", [1, 8])
def test_a_narrow_window_is_one_group_a_block(heads):
    """Both bounds of a band cost two selects; no piece of the band stands alone."""
    q = Abstract((1, heads, 10240, 64), "bfloat16")
    launched = run((q, q, q), {"causal": True, "window": 128}, "trn2")
    opcodes = [event.opcode for event in launched.trace]
    blocks = heads * 10240 // 512
    # The logarithms of a section are one more.
    assert opcodes.count("activation") - blocks == -(-heads // 6)
    assert opcodes.count("affine_select") == 2 * blocks
    assert opcodes.count("nc_matmul") == heads * (5 * 20 + 8 * 20 - 2) + 1


def test_runs_of_equal_distance():
    assert runs_of([0, 256, 512, 768]) == [(0, 256, 4)]
    assert runs_of([640, 128]) == [(128, 512, 2)]
    assert runs_of([0, 1, 2, 9, 10]) == [(0, 1, 3), (9, 1, 2)]
    assert runs_of([7]) == [(7, 1, 1)]
    assert runs_of([]) == []


@given(
    widths=st.lists(st.integers(1, spec_for("trn2").moving_fmax), min_size=1, max_size=9),
    banks=st.integers(1, 3),
)
def test_groups_hold_every_column_once(widths, banks):
    sub, width = nl.tile_size.gemm_stationary_fmax, nl.tile_size.gemm_moving_fmax
    pieces = [{"keys": (n, n + 1), "columns": (0, size)} for n, size in enumerate(widths)]
    found = {n: [] for n in range(len(widths))}
    for group in groups_of(pieces, width, banks):
        places = sorted((p["at"], p["columns"]) for p in group["pieces"])
        assert group["used"] <= banks * width
        at = 0
        for start, (left, right) in places:
            assert start == at
            assert start // width == (start + right - left - 1) // width
            assert left % sub == 0
            at += right - left
        assert at == group["used"]
        for piece in group["pieces"]:
            found[piece["keys"][0]] += range(*piece["columns"])
    assert {n: sorted(columns) for n, columns in found.items()} == {
        n: list(range(size)) for n, size in enumerate(widths)
    }


def test_large_results_take_the_second_path():
    q, k, v = operands(1, 1, 1, 9, 17, 8, "float32")
    v *= 1e38
    launched = check((q, k, v), {}, "large v")
    assert repaired(launched)


def test_ordinary_scores_do_not():
    assert not repaired(check(operands(1, 1, 1, 40, 40, 8, "bfloat16"), {}, "ordinary"))


def test_shapes_alone_run_the_usual_path():
    inputs = operands(1, 2, 1, 40, 40, 8, "bfloat16")
    shapes = [Abstract(x.shape, "bfloat16") for x in inputs]
    usual = [e.opcode for e in run(inputs, {"causal": True}).trace]
    assert [e.opcode for e in run(shapes, {"causal": True}).trace] == usual


def configs():
    base = ATTENTION.configure(
        {"B": 1, "H": 1, "G": 1, "M": 40, "N": 40, "D": 5, "E": 5}, "bfloat16", TOY
    )
    for changes in (
        {}, {"lag": 0}, {"lag": 3}, {"ahead": 0}, {"chunk": 1}, {"chunk": 3},
        {"resident": False, "chunk": 2}, {"fill": False}, {"section": 1}, {"section": 100},
        {"hwdge": False}, {"banks": 2, "lag": 0}, {"whole": 1}, {"whole": 2}, {"join": 1},
        {"join": 3}, {"batch": 1}, {"batch": 3},
    ):  # fmt: skip
        yield dataclasses.replace(base, **changes)


@pytest.mark.parametrize("config", list(configs()), ids=repr)
def test_no_config_changes_the_mathematics(config):
    inputs = operands(2, 4, 2, 40, 37, 5, "bfloat16")
    for options in (
        {"causal": True},
        {"causal": True, "window": 5},
        {"window": 3},
        {"softcap": 4.0},
    ):
        check(inputs, options, repr(config), config=config)


# -- illegal calls ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"scale": np.nan}, "scale is nan; a finite number or None"),
        ({"softcap": 0.0}, "softcap is 0.0; a finite number above 0"),
        ({"window": 0}, "window is 0; an int of at least 1"),
        ({"align": "left"}, "align is 'left'; allowed are top-left, bottom-right"),
    ],
)
def test_an_illegal_option_says_why(options, text):
    with pytest.raises(OptionError) as caught:
        run(operands(1, 1, 1, 4, 4, 4, "float32"), options)
    assert text in str(caught.value)


@pytest.mark.parametrize(
    ("h", "g", "d", "e", "text"),
    [
        (3, 2, 4, 4, "3 query heads share 2 key heads"),
        (1, 1, 4, 32, "the head size of v is 32; at most 31 on toy; split v along its last axis"),
        (1, 1, 513, 4, "the head size of q and k is 513; at most 512"),
    ],
)
def test_an_illegal_shape_says_why(h, g, d, e, text):
    with pytest.raises(ShapeError) as caught:
        run(operands(1, h, g, 4, 4, d, "float32", e=e), {})
    assert text in str(caught.value)


def test_a_mask_of_other_sizes_or_dtype_says_why():
    inputs = operands(3, 4, 1, 5, 6, 4, "float32")
    with pytest.raises(ShapeError, match=r"mask has 2 along B; allowed are 1 and 3; broadcast it"):
        run((*inputs, None, np.ones((2, 1, 5, 6), np.uint8), None), {})
    with pytest.raises(DtypeError, match="mask has dtype float32; it must be uint8"):
        run((*inputs, None, np.ones((1, 1, 5, 6), np.float32), None), {})


@pytest.mark.parametrize(
    ("changes", "target", "text"),
    [
        ({"banks": 0}, "trn2", "config.banks is 0; it must be an int of at least 1"),
        ({"lag": -1}, "trn2", "config.lag is -1; it must be an int of at least 0"),
        ({"banks": 5}, "trn2", "config.banks is 5; trn2 has 4 PSUM banks beside"),
        ({"whole": 5}, "trn2", "config.whole is 5; trn2 has 4 PSUM banks beside"),
        ({"join": 0}, "trn2", "config.join is 0; it must be an int of at least 1"),
        ({"hwdge": True}, "trn1", "config.hwdge needs gen3; trn1 is gen2"),
    ],
)
def test_a_config_that_cannot_run_says_why(changes, target, text):
    inputs = operands(1, 1, 1, 4, 4, 4, "float32")
    config = ATTENTION.configure(ATTENTION.axes(*(x.shape for x in inputs)), "float32", TOY)
    config = dataclasses.replace(config, **{"hwdge": False, **changes})
    with pytest.raises(ConfigError) as caught:
        run(inputs, {}, target, config)
    assert text in str(caught.value)


def test_a_config_is_an_attention_config():
    with pytest.raises(ConfigError, match=r"config is 3; an AttentionConfig is needed"):
        run(operands(1, 1, 1, 4, 4, 4, "float32"), {}, config=3)


@given(
    m=st.integers(1, 70000), n=st.integers(1, 70000), d=st.integers(1, 512), e=st.integers(1, 512)
)
@pytest.mark.parametrize("target", ["trn1", "trn2", "trn3"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_chosen_config_has_no_problems(dtype, target, m, n, d, e):
    axes = {"B": 1, "H": 1, "G": 1, "M": m, "N": n, "D": d, "E": e}
    config = ATTENTION.configure(axes, dtype, spec_for(target))
    assert ATTENTION.config_problems(config, dtype, spec_for(target)) == ()


def test_causal_is_the_default_of_one_operator():
    inputs = operands(1, 1, 1, 20, 20, 8, "float32")
    causal = CAUSAL_ATTENTION.launch(inputs, {}, target="toy").result
    compare(causal, inputs, {"causal": True}, "causal")
    axes = CAUSAL_ATTENTION.axes(*(x.shape for x in inputs))
    assert 2 * CAUSAL_ATTENTION.flops(axes) == ATTENTION.flops(axes)
    assert MASKED_ATTENTION.flops(axes) == 4 * 20 * 20 * 8


def test_the_public_call_chooses_the_operator():
    inputs = operands(1, 2, 1, 20, 24, 8, "float32")
    options = {"causal": True, "align": "bottom-right", "window": 9, "softcap": 3.0, "scale": 0.5}
    compare(ops.attention(*inputs, **options, target="toy"), inputs, options, "ops")
    compare(ops.attention(*inputs, target="toy"), inputs, {}, "ops")
    mask = np.random.default_rng(0).random((1, 1, 20, 24)) < 0.5
    found = ops.attention(*inputs, mask=mask, target="toy")
    compare(found, (*inputs, None, mask, None), {}, "ops")


def test_a_mask_is_bool():
    inputs = operands(1, 1, 1, 4, 4, 4, "float32")
    with pytest.raises(DtypeError, match="mask has dtype float32; it must be bool, True to attend"):
        ops.attention(*inputs, mask=np.ones((1, 1, 4, 4), np.float32))
