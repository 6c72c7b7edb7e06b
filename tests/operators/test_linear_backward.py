"""The whole test pattern for linear_backward."""

from __future__ import annotations

from collections import Counter

import nki.isa as nisa
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from nki_kernels import ops
from nki_kernels.hardware import spec_for
from nki_kernels.kernels.matmul import kernel
from nki_kernels.machine.errors import ConfigError, ShapeError
from nki_kernels.machine.tensor import Abstract
from nki_kernels.machine.trace import PeWork
from nki_kernels.operators import OPERATORS
from nki_kernels.operators.shapes import cases
from reference.matmul import linear
from reference.matmul import linear_backward as reference
from tests.operators.test_matmul import DTYPES, toy_sizes
from tests.strategies.matrices import normal, seeds, small_integers, wide
from tests.tolerance import assert_close

BACKWARD = OPERATORS["linear_backward"]
TOY, TRN2 = spec_for("toy"), spec_for("trn2")


def operands(m, n, k, dtype, seed=0, make=normal):
    shapes = BACKWARD.input_shapes({"M": m, "N": n, "K": k})
    return tuple(make(seed + i, shape, DTYPES[dtype]) for i, shape in enumerate(shapes))


def compare(got, inputs, target, case):
    axes = BACKWARD.axes(*(x.shape for x in inputs))
    chain = BACKWARD.chain(axes, spec_for(target))
    for name, result, ref in zip(("dx", "dweight", "dbias"), got, reference(*inputs), strict=True):
        keywords = {"op": name, "roundings": BACKWARD.roundings, "chain": chain}
        assert_close(result, ref.value, ref.magnitude, case=case, **keywords)


def test_named_cases_match_the_reference():
    for case in cases("linear_backward"):
        config = BACKWARD.configure(case.axes, "bfloat16", TRN2)
        cut = [min(size, TRN2.moving_fmax + size % 100 + 7) for size in case.axes.values()]
        inputs = operands(*cut, "bfloat16")
        compare(ops.linear_backward(*inputs, config=config, target="trn2"), inputs, "trn2", "named")


@given(dtype=st.sampled_from(list(DTYPES)), seed=seeds(), uneven=st.booleans(), **toy_sizes)
def test_any_shape_matches_the_reference(m, n, k, dtype, seed, uneven):
    inputs = operands(m, n, k, dtype, seed, wide if uneven else normal)
    compare(ops.linear_backward(*inputs, target="toy"), inputs, "toy", f"{m}x{n}x{k}")


@pytest.mark.parametrize("target", ["trn1", "trn2", "trn3"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("sizes", [(1, 1, 1), (130, 129, 5), (1100, 257, 130), (3, 513, 700)])
def test_every_generation_matches_the_reference(target, dtype, sizes):
    inputs = operands(*sizes, dtype)
    compare(ops.linear_backward(*inputs, target=target), inputs, target, "ragged")


@given(dtype=st.sampled_from(list(DTYPES)), seed=seeds(), **toy_sizes)
def test_small_integers_are_exact(m, n, k, dtype, seed):
    inputs = operands(m, n, k, dtype, seed, lambda *where: small_integers(*where, most=8))
    got = ops.linear_backward(*inputs, out_dtype="float32", target="toy")
    for result, ref in zip(got, reference(*inputs), strict=True):
        assert result.dtype == np.float32
        assert (result == ref.value).all()


def test_the_reference_is_the_gradient_by_finite_differences():
    rng = np.random.default_rng(3)
    x, weight, bias = rng.standard_normal((3, 4)), rng.standard_normal((5, 4)), np.zeros(5)
    dy, step = rng.standard_normal((3, 5)), 2.0**-20
    found = reference(dy, x, weight)
    for which, gradient in enumerate(found):
        inputs = [x, weight, bias]
        for index in np.ndindex(inputs[which].shape):
            moved = [v.copy() for v in inputs]
            moved[which][index] += step
            up = (linear(*moved).value * dy).sum()
            moved[which][index] -= 2 * step
            down = (linear(*moved).value * dy).sum()
            # The layer is linear in each operand: what remains is the rounding of the two sums.
            slack = 100 * 2.0**-52 * np.abs(dy).sum() * 100 / step
            assert abs((up - down) / (2 * step) - gradient.value[index]) < slack


def test_wrong_operands_and_configs_say_why():
    dy, x, weight = operands(2, 3, 4, "float32")
    with pytest.raises(ShapeError, match=r"M is 2 in dy \[M, N\] = \[2, 3\] but 1 in x \[M, K\]"):
        ops.linear_backward(dy, x[:1], weight, target="toy")
    with pytest.raises(ConfigError, match=r"config is 3; a LinearBackwardConfig is needed"):
        ops.linear_backward(dy, x, weight, config=3, target="toy")
    good = BACKWARD.configure({"M": 2, "N": 3, "K": 4}, "bfloat16", TOY)
    with pytest.raises(ConfigError, match=r"dx: config.transpose is 'dma' for 4-byte elements"):
        ops.linear_backward(dy, x, weight, config=good, target="toy")


@given(m=st.integers(1, 5000), n=st.integers(1, 5000), k=st.integers(1, 5000))
@pytest.mark.parametrize("target", ["trn1", "trn2", "toy"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_chosen_config_has_no_problems(dtype, target, m, n, k):
    axes, spec = {"M": m, "N": n, "K": k}, spec_for(target)
    config = BACKWARD.configure(axes, dtype, spec)
    assert BACKWARD.config_problems(config, dtype, spec) == ()
    small = BACKWARD.reduced(axes, config, spec)
    assert all(1 <= small[letter] <= axes[letter] for letter in axes)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("sizes", [(9, 17, 20), (40, 70, 45), (16, 32, 24)])
def test_counts_are_those_of_two_products_and_the_sums(dtype, sizes):
    m, n, k = sizes
    inputs = operands(*sizes, dtype)
    config = BACKWARD.configure({"M": m, "N": n, "K": k}, dtype, TOY)
    trace = BACKWARD.launch(inputs, {}, target="toy").trace
    dy, x, weight = inputs
    nn, tn = OPERATORS["matmul"], OPERATORS["matmul_tn"]
    want = Counter(
        e.opcode for e in nn.launch((dy, weight), {}, config=config.dx, target="toy").trace
    )
    want += Counter(
        e.opcode for e in tn.launch((dy, x), {}, config=config.dweight, target="toy").trace
    )
    waves = -(-m // (config.dx.wave_m * TOY.stationary_fmax))
    slices = -(-n // TOY.partitions)
    parts = (n >= TOY.partitions) + (n % TOY.partitions != 0)
    want["tensor_reduce"] += waves * slices
    want["tensor_tensor"] += (waves - 1) * slices
    want["tensor_copy"] += parts
    want["dma_copy"] += parts
    assert Counter(e.opcode for e in trace) == +want
    passes = [e.work for e in trace if isinstance(e.work, PeWork) and e.work.mode == "matmul"]
    axes = {"M": m, "N": n, "K": k}
    assert 2 * sum(work.macs for work in passes) == BACKWARD.flops(axes) == 4 * m * n * k


def test_values_change_no_event():
    inputs = operands(21, 37, 30, "bfloat16")
    values = BACKWARD.launch(inputs, {}, target="toy")
    shapes = BACKWARD.launch([Abstract(x.shape, "bfloat16") for x in inputs], {}, target="toy")
    assert [(e.opcode, e.work) for e in shapes.trace] == [(e.opcode, e.work) for e in values.trace]


def skip_the_second_wave(monkeypatch):
    real = kernel._add_columns

    def wrong(totals, a_slice, step):
        return real(totals, a_slice, step) if step["m"][0] == 0 else totals

    monkeypatch.setattr(kernel, "_add_columns", wrong)


def sum_one_column_less(monkeypatch):
    real = nisa.tensor_reduce
    monkeypatch.setattr(
        nisa,
        "tensor_reduce",
        lambda dst, op, data, axis: real(dst=dst, op=op, data=data[:, 1:], axis=axis),
    )


def swap_the_columns_of_the_sums(monkeypatch):
    real = kernel._store_columns

    def wrong(sums, totals, config):
        nisa.tensor_copy(dst=totals[:, 0:1], src=totals[:, 1:2])
        real(sums, totals, config)

    monkeypatch.setattr(kernel, "_store_columns", wrong)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "mutant",
    [skip_the_second_wave, sum_one_column_less, swap_the_columns_of_the_sums],
    ids=lambda f: f.__name__,
)
def test_a_mutated_kernel_is_rejected(mutant, dtype, monkeypatch):
    m = 2 * TOY.psum_banks * TOY.stationary_fmax
    inputs = operands(m, 2 * TOY.partitions, 24, dtype)
    compare(ops.linear_backward(*inputs, target="toy"), inputs, "toy", "right")
    mutant(monkeypatch)
    got = ops.linear_backward(*inputs, target="toy")
    with pytest.raises(AssertionError, match="worst at"):
        compare(got, inputs, "toy", mutant.__name__)
