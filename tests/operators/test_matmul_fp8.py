"""The whole test pattern for matmul_fp8."""

from __future__ import annotations

import dataclasses
from collections import Counter

import ml_dtypes
import nki.isa as nisa
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from nki_kernels import ops
from nki_kernels.hardware import spec_for
from nki_kernels.machine.errors import ConfigError, DtypeError, OptionError, ShapeError
from nki_kernels.machine.tensor import Abstract
from nki_kernels.machine.trace import DmaWork, PeWork
from nki_kernels.operators import OPERATORS
from nki_kernels.operators.shapes import cases
from reference.matmul import matmul as reference
from tests.operators.test_matmul import CONFIGS
from tests.strategies.matrices import extents, normal, seeds, small_integers
from tests.tolerance import assert_close

OPS = [OPERATORS["matmul_fp8"], OPERATORS["matmul_fp8_nt"]]
TOY, TRN2 = spec_for("toy"), spec_for("trn2")
DTYPES = {"float8_e4m3": ml_dtypes.float8_e4m3, "float8_e5m2": ml_dtypes.float8_e5m2}
parametrize_op = pytest.mark.parametrize("op", OPS, ids=lambda op: op.name)

sizes = {
    "m": extents(TOY.stationary_fmax, 2 * TOY.stationary_fmax + 3),
    "n": extents(TOY.moving_fmax, 2 * TOY.moving_fmax + 3),
    "pairs": extents(TOY.partitions, 3 * TOY.partitions + 3),
}


def operands(op, m, n, k, dtype, seed=0, make=normal):
    shapes = op.input_shapes({"M": m, "N": n, "K": k})
    return tuple(make(seed + at, shape, DTYPES[dtype]) for at, shape in enumerate(shapes))


def run(op, a, b, **keywords):
    return ops.matmul_fp8(a, b, transpose_b=op is OPS[1], **keywords)


def compare(got, op, a, b, target, case, scale=1.0):
    ref = reference(a, b, transpose_b=op is OPS[1])
    chain = op.chain(op.axes(a.shape, b.shape), spec_for(target))
    keywords = {"op": op.name, "roundings": op.roundings, "chain": chain}
    assert_close(got, scale * ref.value, abs(scale) * ref.magnitude, case=case, **keywords)


@parametrize_op
def test_named_cases_match_the_reference(op):
    for case in cases(op.name):
        config = op.configure(case.axes, "float8_e4m3", TRN2)
        cut = [min(size, 530 + size % 100) for size in case.axes.values()]
        a, b = operands(op, *cut, "float8_e4m3")
        compare(run(op, a, b, config=config, target="trn2"), op, a, b, "trn2", case.name)


@parametrize_op
@given(
    dtype=st.sampled_from(list(DTYPES)),
    seed=seeds(),
    scale=st.sampled_from([1.0, 0.25, -3.7]),
    out_dtype=st.sampled_from([None, "float16", "float32"]),
    **sizes,
)
def test_any_shape_matches_the_reference(op, m, n, pairs, dtype, seed, scale, out_dtype):
    a, b = operands(op, m, n, 2 * pairs, dtype, seed)
    got = run(op, a, b, scale=scale, out_dtype=out_dtype, target="toy")
    assert got.dtype == np.dtype(out_dtype or ml_dtypes.bfloat16)
    compare(got, op, a, b, "toy", f"{m}x{n}x{2 * pairs}", scale)


@parametrize_op
@pytest.mark.parametrize("target", ["trn2", "trn3"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(1, 1, 2), (130, 515, 254), (127, 511, 258), (3, 700, 1000)])
def test_every_generation_matches_the_reference(op, target, dtype, shape):
    a, b = operands(op, *shape, dtype)
    compare(run(op, a, b, target=target), op, a, b, target, "ragged")


@parametrize_op
@given(dtype=st.sampled_from(list(DTYPES)), seed=seeds(), **sizes)
def test_small_integers_are_exact(op, m, n, pairs, dtype, seed):
    make = lambda *where: small_integers(*where, most=4)  # noqa: E731
    a, b = operands(op, m, n, 2 * pairs, dtype, seed, make)
    got = run(op, a, b, scale=2.0, out_dtype="float32", target="toy")
    assert (got == 2 * reference(a, b, transpose_b=op is OPS[1]).value).all()


@parametrize_op
@pytest.mark.parametrize("dtype", DTYPES)
def test_no_config_changes_a_result(op, dtype):
    make = lambda *where: small_integers(*where, most=3)  # noqa: E731
    a, b = operands(op, 21, 37, 46, dtype, 4, make)
    want = run(op, a, b, target="toy").tobytes()
    for config in CONFIGS:
        if config.transpose == "dma":
            assert run(op, a, b, config=config, target="toy").tobytes() == want


def test_wrong_calls_say_why():
    a, b = operands(OPS[0], 3, 5, 4, "float8_e4m3")
    with pytest.raises(ShapeError, match=r"K is 3; double row contracts pairs of rows, K must be"):
        ops.matmul_fp8(np.ones((2, 3), a.dtype), np.ones((3, 2), a.dtype), target="toy")
    with pytest.raises(ShapeError, match=r"trn1 is gen2; double row needs gen3; cast to bfloat16"):
        ops.matmul_fp8(a, b, target="trn1")
    with pytest.raises(DtypeError, match=r"a has dtype float32; allowed are float8_e4m3, float8_e"):
        ops.matmul_fp8(a.astype(np.float32), b, target="toy")
    with pytest.raises(DtypeError, match=r"dtypes differ: a float8_e4m3, b float8_e5m2"):
        ops.matmul_fp8(a, b.astype(ml_dtypes.float8_e5m2), target="toy")
    with pytest.raises(DtypeError, match=r"out_dtype is float8_e4m3; allowed are bfloat16, float1"):
        ops.matmul_fp8(a, b, out_dtype="float8_e4m3", target="toy")
    with pytest.raises(OptionError, match=r"scale is nan; a number that float32 holds"):
        ops.matmul_fp8(a, b, scale=float("nan"), target="toy")
    config = dataclasses.replace(
        OPS[0].configure({"M": 3, "N": 5, "K": 4}, "", TOY), transpose="pe"
    )
    with pytest.raises(ConfigError, match=r"config.transpose is 'pe'; pairs of fp8 are transposed"):
        ops.matmul_fp8(a, b, config=config, target="toy")


@given(m=st.integers(1, 5000), n=st.integers(1, 5000), pairs=st.integers(1, 2500))
@parametrize_op
def test_a_chosen_config_has_no_problems_and_its_reduced_problem_is_legal(op, m, n, pairs):
    axes = {"M": m, "N": n, "K": 2 * pairs}
    config = op.configure(axes, "float8_e4m3", TRN2)
    assert op.config_problems(config, "float8_e4m3", TRN2) == ()
    small = op.reduced(axes, config, TRN2)
    assert op.limits(small, "float8_e4m3", TRN2) == ()
    assert all(1 <= small[letter] <= axes[letter] for letter in axes)


@parametrize_op
@pytest.mark.parametrize("shape", [(9, 17, 20), (40, 70, 46), (16, 32, 32)])
def test_work_instructions_and_bytes_are_exactly_the_formula(op, shape):
    m, n, k = shape
    a, b = operands(op, m, n, k, "float8_e4m3")
    config = op.configure({"M": m, "N": n, "K": k}, "float8_e4m3", TOY)
    trace = op.launch((a, b), {}, target="toy").trace
    tiles_m, tiles_n = -(-m // TOY.stationary_fmax), -(-n // TOY.moving_fmax)
    slices = -(-k // (2 * TOY.partitions))
    waves_m, waves_n = -(-tiles_m // config.wave_m), -(-tiles_n // config.wave_n)
    reads = 1 if config.hold_a else waves_n
    want = Counter(nc_matmul=tiles_m * tiles_n * slices, tensor_copy=tiles_m * tiles_n)
    want["dma_copy"] += tiles_m * waves_n
    want["dma_transpose"] += waves_m * slices * reads
    want["dma_transpose" if op is OPS[1] else "dma_copy"] += waves_m * waves_n * slices
    assert Counter(e.opcode for e in trace) == want
    passes = [e.work for e in trace if isinstance(e.work, PeWork)]
    assert all(work.double_row for work in passes)
    assert sum(2 * work.k * work.m * work.n for work in passes) == m * n * k
    moved = [e.work for e in trace if isinstance(e.work, DmaWork)]
    assert sum(work.hbm_read_bytes for work in moved) == m * k * reads + k * n * waves_m
    assert sum(work.hbm_write_bytes for work in moved) == 2 * m * n
    assert op.min_bytes({"M": m, "N": n, "K": k}, "float8_e4m3") == m * k + k * n + 2 * m * n


def test_values_change_no_event():
    inputs = operands(OPS[0], 21, 37, 30, "float8_e5m2")
    values = OPS[0].launch(inputs, {}, target="toy")
    shapes = OPS[0].launch([Abstract(x.shape, "float8_e5m2") for x in inputs], {}, target="toy")
    assert [(e.opcode, e.work) for e in shapes.trace] == [(e.opcode, e.work) for e in values.trace]


def only_the_first_rows(real, dst, stationary, moving, **keywords):
    keywords.pop("perf_mode")
    return real(dst, stationary[:, 0], moving[:, 0], **keywords)


@parametrize_op
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_kernel_that_takes_half_of_each_pair_is_rejected(op, dtype, monkeypatch):
    a, b = operands(op, 20, 40, 48, dtype)
    compare(run(op, a, b, target="toy"), op, a, b, "toy", "right")
    real = nisa.nc_matmul
    monkeypatch.setattr(
        nisa, "nc_matmul", lambda *args, **keywords: only_the_first_rows(real, *args, **keywords)
    )
    got = run(op, a, b, target="toy")
    with pytest.raises(AssertionError, match="worst at"):
        compare(got, op, a, b, "toy", "half")


@parametrize_op
def test_a_kernel_that_pairs_other_rows_is_rejected(op, monkeypatch):
    a, b = operands(op, 20, 40, 48, "float8_e4m3")
    real = nisa.dma_transpose

    def wrong(dst, src, **keywords):
        real(dst=dst, src=src, **keywords)
        # The first pair holds the values of the last one.
        return real(dst=dst[0:1], src=src[:, src.shape[1] - 1 :], **keywords)

    monkeypatch.setattr(nisa, "dma_transpose", wrong)
    got = run(op, a, b, target="toy")
    with pytest.raises(AssertionError, match="worst at"):
        compare(got, op, a, b, "toy", "pairs")
