"""Kernels of attention with one mistake each, which the comparison must reject; invariances."""

from __future__ import annotations

import nki.isa as nisa
import nki.language as nl
import numpy as np
import pytest

from tests.operators.attentions import check, compare, operands, run

DTYPE = "bfloat16"


def last(monkeypatch, name, change, count):
    """Change the last of `count` calls of an instruction."""
    real, seen = getattr(nisa, name), []

    def faulty(*args, **kwargs):
        seen.append(name)
        return change(real, *args, **kwargs) if len(seen) == count else real(*args, **kwargs)

    monkeypatch.setattr(nisa, name, faulty)


def drop_a_mask(monkeypatch, counts):
    last(monkeypatch, "affine_select", lambda real, *_, **__: None, counts["affine_select"])


def shift_a_mask(monkeypatch, counts):
    def shifted(real, *args, offset, **kwargs):
        return real(*args, offset=offset + 1, **kwargs)

    last(monkeypatch, "affine_select", shifted, counts["affine_select"])


def scale_scores_twice(monkeypatch, counts):
    def scaled(real, *args, scale=1.0, **kwargs):
        return real(*args, scale=scale * scale, **kwargs)

    # The last activation is the logarithm.
    last(monkeypatch, "activation", scaled, counts["activation"] - 1)


def forget_a_sum(monkeypatch, counts):
    def shorter(real, dst, stationary, moving, **kwargs):
        rows = stationary.shape[0] - 1
        return real(dst=dst, stationary=stationary[:rows], moving=moving[:rows], **kwargs)

    # The last matmul adds up the verdict.
    last(monkeypatch, "nc_matmul", shorter, counts["nc_matmul"] - 1)


@pytest.mark.parametrize(
    "mutant", [drop_a_mask, shift_a_mask, scale_scores_twice, forget_a_sum],
    ids=lambda f: f.__name__,
)  # fmt: skip
def test_a_mutated_kernel_is_rejected(mutant, monkeypatch):
    inputs = operands(1, 1, 1, 16, 16, 8, DTYPE)
    options = {"causal": True}
    right = check(inputs, options, "right")
    opcodes = [event.opcode for event in right.trace]
    mutant(monkeypatch, {name: opcodes.count(name) for name in set(opcodes)})
    wrong = run(inputs, options)
    with pytest.raises(AssertionError, match="worst at"):
        compare(wrong.result, inputs, options, mutant.__name__)


def test_a_verdict_that_is_ignored_is_rejected(monkeypatch):
    inputs = operands(1, 1, 1, 16, 16, 8, DTYPE)
    options = {"scale": 300.0}
    check(inputs, options, "right")
    monkeypatch.setattr(nl, "fori_loop", lambda *_, **__: None)
    wrong = run(inputs, options)
    with pytest.raises(AssertionError, match="worst at"):
        compare(wrong.result, inputs, options, "ignored")


@pytest.mark.parametrize("seed", range(3))
def test_keys_permuted_with_their_mask_change_nothing(seed):
    q, k, v = operands(1, 2, 1, 9, 21, 8, "float32", seed)
    rng = np.random.default_rng(seed)
    mask = (rng.random((1, 1, 9, 21)) < 0.5).astype(np.uint8)
    order = rng.permutation(21)
    moved = [np.ascontiguousarray(x[:, :, order]) for x in (k, v)]
    found = run((q, *moved, None, np.ascontiguousarray(mask[..., order]), None), {})
    compare(found.result, (q, k, v, None, mask, None), {}, "permuted")


@pytest.mark.parametrize("constant", [-64.0, 8.0, 4096.0])
def test_a_constant_on_all_scores_moves_only_lse(constant):
    inputs = operands(1, 2, 1, 9, 21, 8, "float32")
    bias = np.full((1, 1, 9, 21), constant, np.float32)
    with_bias = (*inputs, None, None, bias)
    out, lse = check(with_bias, {}, "constant").result
    plain = run(inputs, {}).result
    # In units of the result's last place: the scores lose what the constant's exponent takes.
    room = np.spacing(np.float32(abs(constant) + 8)) * 8
    assert np.abs(out - plain[0]).max() <= room * np.abs(inputs[2]).max()
    assert np.abs(lse - constant - plain[1]).max() <= room
