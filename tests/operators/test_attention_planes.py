"""Masks and biases on the fast path: exact, at no cost of safety, rows without keys included."""

from __future__ import annotations

import nki.isa as nisa
import nki.language as nl
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from nki_kernels.hardware import spec_for
from tests.operators.attentions import DTYPES, check, compare, operands, repaired, run
from tests.strategies.matrices import extents, seeds

TOY = spec_for("toy")


def planes(m, n, dtype, share, seed):
    rng = np.random.default_rng(seed)
    mask = (rng.random((1, 1, m, n)) < share).astype(np.uint8)
    return mask, rng.standard_normal((1, 2, m, n)).astype(DTYPES[dtype])


@given(
    m=extents(TOY.moving_fmax, 3 * TOY.moving_fmax + 3),
    n=extents(TOY.partitions, 6 * TOY.partitions + 3),
    share=st.sampled_from([0.0, 0.1, 0.9, 1.0]),
    which=st.sampled_from(["mask", "bias", "both"]),
    sink=st.booleans(),
    options=st.fixed_dictionaries(
        {},
        optional={
            "causal": st.booleans(),
            "align": st.just("bottom-right"),
            "window": st.integers(1, 30),
            "softcap": st.just(3.0),
            "scale": st.sampled_from([0.3, -0.3, 0.0, 1e-30, 100.0]),
        },
    ),
    dtype=st.sampled_from(list(DTYPES)),
    seed=seeds(),
)
def test_masks_and_biases_of_any_kind(m, n, share, which, sink, options, dtype, seed):
    inputs = operands(1, 2, 1, m, n, 8, dtype, seed)
    mask, bias = planes(m, n, dtype, share, seed)
    sinks = np.float32([0.5, -3]) if sink else None
    chosen = (mask if which != "bias" else None, bias if which != "mask" else None)
    check((*inputs, sinks, *chosen), options, f"{options} {which} {share}")


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("which", ["mask", "bias", "both"])
@pytest.mark.parametrize("causal", [False, True])
def test_real_tiles_take_the_fast_path(which, causal, dtype):
    m, n = 600, 1200
    inputs = operands(1, 1, 1, m, n, 64, dtype)
    mask, bias = planes(m, n, dtype, 0.5, 0)
    bias = bias[:, :1].copy()
    # Rows that a mask leaves nothing, at both ends and in the middle.
    mask[..., [0, 300, 599], :] = 0
    chosen = (mask if which != "bias" else None, bias if which != "mask" else None)
    launched = check((*inputs, None, *chosen), {"causal": causal}, which, "trn2")
    # Row 0 of a causal pattern has one key, which its mask may hide.
    hidden = which != "bias" and causal and not mask[0, 0, :2, 0].all()
    assert not repaired(launched) or hidden


def test_a_masked_score_counts_for_nothing_whatever_it_is():
    q, k, v = operands(1, 1, 1, 20, 24, 8, "float32")
    mask = np.ones((1, 1, 20, 24), np.uint8)
    mask[..., 7] = 0
    q[...] = np.abs(q) + 1
    k[:, :, 7], v[:, :, 7] = 1e15, 5
    launched = run((q, k, v, None, mask, None), {})
    assert not repaired(launched)
    compare(launched.result, (q, k, v, None, mask, None), {}, "masked")
    rest = [np.ascontiguousarray(np.delete(x, 7, axis=2)) for x in (k, v)]
    compare(launched.result, (q, *rest), {}, "without it")


@pytest.mark.parametrize("least", [-1e9, -1e4])
def test_a_bias_may_do_the_work_of_a_mask(least):
    inputs = operands(1, 1, 1, 20, 24, 8, "float32")
    bias = np.where(np.random.default_rng(0).random((1, 1, 20, 24)) < 0.5, 0, least)
    bias[..., 0] = 0
    check((*inputs, None, None, bias.astype(np.float32)), {}, "bias")
    # A row that is hidden whole attends all its keys alike, as the formula says.
    bias[:, :, 3] = least
    launched = check((*inputs, None, None, bias.astype(np.float32)), {}, "bias")
    assert repaired(launched)


def test_a_cap_with_a_mask_takes_the_exact_path():
    """What hides a score would be capped with it."""
    inputs = operands(1, 2, 1, 20, 24, 8, "float32")
    mask, bias = planes(20, 24, "float32", 0.5, 0)

    def accumulates(chosen):
        trace = check((*inputs, None, *chosen), {"softcap": 2.0}, "cap").trace
        return any(event.opcode == "nc_transpose" and event.seq < 60 for event in trace)

    assert accumulates((mask, None))
    assert not accumulates((None, bias))


@pytest.mark.parametrize("wrong", ["mask", "bias"])
def test_a_mutant_is_rejected(wrong, monkeypatch):
    inputs = operands(1, 2, 1, 20, 24, 8, "float32")
    mask, bias = planes(20, 24, "float32", 0.7, 0)
    whole = (*inputs, None, mask, bias)
    check(whole, {}, "right")
    name = "tensor_scalar_reduce" if wrong == "mask" else "scalar_tensor_tensor"
    real, seen = getattr(nisa, name), []

    def once(*args, **kwargs):
        if not seen and wrong == "mask":
            # Everybody attends.
            kwargs |= {"op0": nl.multiply, "operand0": 0.0}
        elif not seen:
            kwargs["operand0"] *= 2
        seen.append(1)
        return real(*args, **kwargs)

    monkeypatch.setattr(nisa, name, once)
    found = run(whole, {}).result
    with pytest.raises(AssertionError, match="worst at"):
        compare(found, whole, {}, wrong)
