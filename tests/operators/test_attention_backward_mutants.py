"""Kernels of the gradients of attention with one mistake each, which the comparison must reject."""

from __future__ import annotations

import nki.isa as nisa
import numpy as np
import pytest

from tests.operators.attention_gradients import check, compare, operands, run


def last(monkeypatch, name, change, count):
    """Change the last of `count` calls of an instruction."""
    real, seen = getattr(nisa, name), []

    def faulty(*args, **kwargs):
        seen.append(name)
        return change(real, *args, **kwargs) if len(seen) == count else real(*args, **kwargs)

    monkeypatch.setattr(nisa, name, faulty)


def drop_a_bound(monkeypatch, counts):
    last(monkeypatch, "affine_select", lambda real, *_, **__: None, counts["affine_select"])


def shift_a_bound(monkeypatch, counts):
    def shifted(real, *args, offset, **kwargs):
        return real(*args, offset=offset + 1, **kwargs)

    last(monkeypatch, "affine_select", shifted, counts["affine_select"])


def forget_a_row_in_a_sum(monkeypatch, counts):
    def shorter(real, dst, stationary, moving, **kwargs):
        rows = stationary.shape[0] - 1
        return real(dst=dst, stationary=stationary[:rows], moving=moving[:rows], **kwargs)

    last(monkeypatch, "nc_matmul", shorter, counts["nc_matmul"])


def overwrite_a_sum(monkeypatch, counts):
    real, seen = nisa.nc_matmul, []

    def lone(*args, accumulate, **kwargs):
        seen.extend([1] * accumulate)
        # A sum of dk or dv, or of dq over two tiles of keys: any of the later ones.
        return real(*args, accumulate=accumulate and len(seen) != 6, **kwargs)

    monkeypatch.setattr(nisa, "nc_matmul", lone)


def forget_delta(monkeypatch, counts):
    def plain(real, *args, operand0, **kwargs):
        return real(*args, operand0=0.0, **kwargs)

    # The last one adds up dq.
    last(monkeypatch, "scalar_tensor_tensor", plain, counts["scalar_tensor_tensor"] - 1)


def scale_dq_twice(monkeypatch, counts):
    def twice(real, *args, operand0, **kwargs):
        return real(*args, operand0=operand0 * operand0, **kwargs)

    last(monkeypatch, "scalar_tensor_tensor", twice, counts["scalar_tensor_tensor"])


def forget_the_scale_of_dk(monkeypatch, counts):
    def unscaled(real, *args, scale=1.0, **kwargs):
        return real(*args, **kwargs)

    # The last activation is the eviction of dk, with a scale.
    last(monkeypatch, "activation", unscaled, counts["activation"])


MUTANTS = (
    drop_a_bound, shift_a_bound, forget_a_row_in_a_sum, overwrite_a_sum, forget_delta,
    scale_dq_twice, forget_the_scale_of_dk,
)  # fmt: skip


@pytest.mark.parametrize("mutant", MUTANTS)
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_a_mistake_is_rejected(mutant, dtype, monkeypatch):
    options = {"causal": True, "scale": 0.5}
    inputs = operands(1, 1, 1, 32, 32, 8, dtype, 0, options)
    right = check(inputs, options)
    opcodes = [event.opcode for event in right.trace]
    mutant(monkeypatch, {name: opcodes.count(name) for name in set(opcodes)})
    wrong = run(inputs, options)
    with pytest.raises(AssertionError, match="worst at"):
        compare(wrong.result, inputs, options, case=mutant.__name__)


@pytest.mark.parametrize("name", ["dsinks", "dbias"])
def test_a_gradient_of_another_sign_is_rejected(name):
    extras = (np.ones(2, np.float32), None, np.ones((1, 1, 9, 11), np.float32))
    inputs = operands(1, 2, 1, 9, 11, 8, "float32", 0, {}, extras)
    results = list(check(inputs, {}, extras).result)
    at = 3 if name == "dsinks" else 4
    results[at] = -results[at]
    with pytest.raises(AssertionError, match=f"{name} .*worst at"):
        compare(results, inputs, {}, extras)
