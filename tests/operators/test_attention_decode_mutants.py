"""Mutated pieces of the decode kernel, which the comparison must reject; and its counts."""

from __future__ import annotations

from collections import Counter

import ml_dtypes
import nki.isa as nisa
import nki.language as nl
import numpy as np
import pytest

from nki_kernels.kernels.attention import decode_scores, decode_steps
from nki_kernels.machine.tensor import Abstract
from nki_kernels.machine.trace import DmaWork
from nki_kernels.operators.attention_decode import DECODES, DecodeConfig, attention_decode
from tests.operators.test_attention_decode import DTYPES, compare, in_pages, operands

CONFIG = DecodeConfig(heads=2, tokens=1, ahead=1, lag=1, scalar=4, hwdge=True)
OPTIONS = {"window": 7, "softcap": 3.0, "scale": 0.7}


def inputs_of(dtype):
    """Three blocks, the last ragged; lengths inside of each, and two queries."""
    q, k, v, _ = operands(3, 3, 4, 2, 2, 20, 5, 4, dtype)
    return q, k, v, np.array([20, 13, 5], np.int32)


def instruction(name, change):
    def install(patch):
        real = getattr(nisa, name)
        patch.setattr(nisa, name, lambda **k: change(real, **k))

    return install


def one_more_key(patch):
    """Let each query see the key behind its own."""
    real = decode_steps.Constants.__init__

    def longer(self, lengths, queries, config):
        real(self, lengths, queries, config)
        nisa.tensor_scalar(dst=self.steps, data=self.steps, op0=nl.add, operand0=1.0)

    patch.setattr(decode_steps.Constants, "__init__", longer)


def no_window(patch):
    real = decode_steps.Constants.mask
    patch.setattr(
        decode_steps.Constants, "mask", lambda self, b, q, p, window: real(self, b, q, p, 0)
    )


def window_off_by_one(patch):
    real = decode_steps.Constants.mask
    patch.setattr(
        decode_steps.Constants,
        "mask",
        lambda self, b, q, p, window: real(self, b, q, p, window + 1),
    )


def forget_the_factor(patch):
    """Merge blocks without rescaling what came before."""
    real = decode_steps.Rows._all

    def unscaled(self, op, new, old):
        if op is nl.subtract:
            return real(self, op, new, new)
        return real(self, op, new, old)

    patch.setattr(decode_steps.Rows, "_all", unscaled)


def cap_forgotten(real, **k):
    if k["op"] == nl.tanh:
        k["op"] = nl.copy
    return real(**k)


def base_two(real, **k):
    if k["op"] == nl.exp:
        k["scale"] = 0.6931472
    return real(**k)


def odd_elements_twice(patch):
    """Multiply fp8 keys of even columns with the queries of odd ones."""
    real = decode_scores.Pairs._spread
    patch.setattr(
        decode_scores.Pairs, "_spread", lambda self, t, cut, parity: real(self, t, cut, 1)
    )


def odd_elements_forgotten(patch):
    real = decode_scores.Pairs.terms
    patch.setattr(decode_scores.Pairs, "terms", lambda self, *a: real(self, *a)[:1])


@pytest.mark.parametrize("mutate", [odd_elements_twice, odd_elements_forgotten])
def test_a_mutant_of_fp8_pairs_is_rejected(mutate, monkeypatch):
    q, k, v, _ = operands(3, 2, 4, 2, 1, 20, 4, 4, "bfloat16")
    k, v = (x.astype(ml_dtypes.float8_e4m3) for x in (k, v))
    inputs = (q, k, v, np.array([20, 13], np.int32))
    compare(attention_decode(*inputs, target="toy"), inputs, "right")
    mutate(monkeypatch)
    got = attention_decode(*inputs, target="toy")
    with pytest.raises(AssertionError):
        compare(got, inputs, mutate.__name__)


def test_pairs_of_fp8_keys_halve_the_transposes():
    q, k, v, lengths = operands(0, 1, 2, 1, 1, 32, 8, 4, "bfloat16")
    config = DecodeConfig(heads=1, tokens=4, ahead=0, lag=0, scalar=0, hwdge=True)
    counts = []
    for quantized in (False, True):
        inputs = [q, k, v, lengths, None]
        if quantized:
            cache = [x.astype(ml_dtypes.float8_e4m3) for x in (k, v)]
            inputs = [q, *cache, lengths, None, *[np.ones(1, np.float32)] * 2]
        run = DECODES[False, quantized].launch(inputs, {}, config=config, target="toy")
        counts.append(Counter(event.opcode for event in run.trace))
    # Four key tiles; the maxima, the queries and the output. Then two; queries of two tokens,
    # even and odd.
    assert [c["nc_transpose"] for c in counts] == [4 + 3, 2 + 2 + 4]
    assert [c["nc_matmul"] for c in counts] == [4 + 4 + 2, 4 + 4 + 2]


MUTANTS = {
    "one more key": one_more_key,
    "no window": no_window,
    "window off by one": window_off_by_one,
    "forgotten factor": forget_the_factor,
    "no cap": instruction("activation", cap_forgotten),
    "base two": instruction("activation", base_two),
}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", MUTANTS)
def test_a_mutant_is_rejected(name, dtype, monkeypatch):
    inputs = inputs_of(dtype)
    compare(attention_decode(*inputs, config=CONFIG, target="toy", **OPTIONS), inputs, "right",
            **OPTIONS)  # fmt: skip
    MUTANTS[name](monkeypatch)
    got = attention_decode(*inputs, config=CONFIG, target="toy", **OPTIONS)
    with pytest.raises(AssertionError):
        compare(got, inputs, name, **OPTIONS)


@pytest.mark.parametrize(("s", "blocks"), [(7, 1), (8, 1), (16, 1), (19, 2), (32, 2)])
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_work_on_the_tensor_engine_is_the_formula(s, blocks, dtype):
    """Per key tile a transpose, a product of scores and one of values; per block two sums."""
    b, h, g, d = 2, 4, 2, 5
    q, k, v, lengths = operands(0, b, h, g, 1, s, d, 4, dtype)
    config = DecodeConfig(heads=2, tokens=2, ahead=0, lag=0, scalar=0, hwdge=True)
    run = DECODES[False, False].launch((q, k, v, lengths, None), {}, config=config, target="toy")
    counts = Counter(event.opcode for event in run.trace)
    tiles = -(-s // 8)
    assert counts["nc_matmul"] == b * (2 * g * tiles + 2 * blocks)
    # The keys; per block the maxima; per sequence the queries and the output.
    assert counts["nc_transpose"] == b * (g * tiles + blocks + 1 + 1)
    moved = [event.work for event in run.trace if isinstance(event.work, DmaWork)]
    size = k.dtype.itemsize
    read = b * g * s * (d + 4) * size + b * h * d * size + 8 * b * 4
    assert sum(work.hbm_read_bytes for work in moved) == read
    assert sum(work.hbm_write_bytes for work in moved) == b * h * (4 * size + 4)


@pytest.mark.parametrize("paged", [False, True])
def test_shapes_alone_take_the_time_of_values(paged):
    q, k, v, lengths = operands(0, 2, 4, 2, 1, 20, 5, 4, "bfloat16")
    inputs = [q, k, v, lengths, None]
    if paged:
        k, v, table = in_pages(k, v, 4, 0)
        inputs = [q, k, v, table, lengths, None]
    abstract = [Abstract(x.shape, "bfloat16") for x in (q, k, v)]
    op = DECODES[paged, False]
    want = op.launch(inputs, {}, target="toy").time().total_ns
    assert op.launch([*abstract, *inputs[3:]], {}, target="toy").time().total_ns == want
