"""The test pattern of mla_decode, contiguous and paged."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import reference.decode
from nki_kernels.hardware import spec_for
from nki_kernels.machine.errors import OptionError, ShapeError
from nki_kernels.operators.attention_decode import attention_decode
from nki_kernels.operators.mla import MLA_DECODES, mla_decode
from tests.operators.test_attention_decode import DTYPES, in_pages
from tests.strategies.matrices import normal, seeds
from tests.tolerance import assert_close

TOY = spec_for("toy")


def operands(seed, b, h, t, s, d, dtype="float32"):
    q, cache = (normal(seed + i, shape, DTYPES[dtype]) for i, shape in
                enumerate([(b, h, t, d), (b, s, d)]))  # fmt: skip
    return q, cache, np.random.default_rng(seed).integers(0, s + 1, b).astype(np.int32)


def compare(got, inputs, case, size, target="toy", **options):
    depth = spec_for(target).partitions
    refs = reference.decode.mla_decode(*inputs, size, depth=depth, **options)
    op = MLA_DECODES[False]
    for name, result, ref in zip(("out", "lse"), got, refs, strict=True):
        assert_close(
            result, ref.value, ref.magnitude, op=name, case=case,
            roundings=op.roundings, chain=op.chain({}, TOY),
        )  # fmt: skip


@given(dtype=st.sampled_from(list(DTYPES)), seed=seeds(), h=st.integers(1, TOY.partitions),
       t=st.integers(1, 3), width=st.integers(1, 9), d=st.integers(1, 20), data=st.data(),
       paged=st.booleans(), window=st.one_of(st.none(), st.integers(1, 12)))  # fmt: skip
def test_any_shape_matches_the_reference(dtype, seed, h, t, width, d, data, paged, window):
    size = data.draw(st.integers(1, d))
    q, cache, lengths = operands(seed, 2, h, t, 4 * width, d, dtype)
    stored, table = cache, None
    if paged:
        pages, _, table = in_pages(cache[:, None], cache[:, None], 4, seed)
        stored = np.ascontiguousarray(pages[:, 0])
    options = {"window": window, "scale": 0.3}
    got = mla_decode(q, stored, lengths, size, table=table, target="toy", **options)
    compare(got, (q, cache, lengths), f"{h}x{t}x{width}x{d}x{size}", size, **options)


@pytest.mark.parametrize("target", ["trn1", "trn2"])
def test_deepseek_matches_the_reference(target):
    inputs = operands(1, 1, 128, 1, 300, 576, "bfloat16")
    compare(mla_decode(*inputs, 512, target=target), inputs, "576/512", 512, target)


@given(seed=seeds(), s=st.integers(1, 40))
def test_it_is_attention_decode_of_one_key_head(seed, s):
    q, cache, lengths = operands(seed, 2, 4, 1, s, 6)
    keys = cache[:, None]
    got = mla_decode(q, cache, lengths, 5, target="toy")
    want = attention_decode(q, keys, np.ascontiguousarray(keys[..., :5]), lengths, target="toy")
    assert all(a.tobytes() == b.tobytes() for a, b in zip(got, want, strict=True))


def test_the_cache_is_read_once():
    q, cache, lengths = operands(0, 2, 4, 1, 32, 6)
    op = MLA_DECODES[False]
    run = op.launch([q, cache, lengths], {"value_size": 5}, target="toy")
    read = sum(getattr(event.work, "hbm_read_bytes", 0) for event in run.trace)
    assert read == cache.nbytes + q.nbytes + TOY.partitions * lengths.nbytes


ILLEGAL = {
    "too wide": (operands(0, 1, 2, 1, 8, 4), 5, ShapeError,
                 "value_size is 5 and rows of the cache have 4 columns; at most that many are val"),
    "no size": (operands(0, 1, 2, 1, 8, 4), 0, OptionError,
                "value_size is 0; an int of at least 1 is needed; pass 512"),
    "heads": (operands(0, 1, 9, 1, 8, 4), 4, ShapeError, "9 query heads share a key head; at most"),
    "long": ((*operands(0, 1, 2, 1, 8, 4)[:2], np.array([9], np.int32)), 4, OptionError,
             "lengths has 9; allowed are 0 to 8"),
}  # fmt: skip


@pytest.mark.parametrize("name", ILLEGAL)
def test_an_illegal_call_says_why(name):
    inputs, size, error, text = ILLEGAL[name]
    with pytest.raises(error) as caught:
        mla_decode(*inputs, size, target="toy")
    assert text in str(caught.value)
