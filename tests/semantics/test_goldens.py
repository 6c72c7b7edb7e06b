"""The NumPy equivalents that AWS's pages and the old ``nki/test`` examples state, on their sizes.

Written anew for the calls of today; each test says which example it stands for. What rounds nowhere
is compared with ``==``, the rest within computed bounds.
"""

from __future__ import annotations

from typing import Any

import ml_dtypes
import nki.isa as nisa
import nki.language as nl
import numpy as np
import pytest

from nki_kernels.machine.errors import OutOfBounds
from tests.embedded.harness import HBM, sb, tile, values
from tests.tolerance import assert_close

F32 = np.float32
FP32_MIN = float(np.finfo(F32).min)


def rand(seed: int, *shape: int, scale: float = 100) -> Any:
    """What the examples draw: uniform float32."""
    return (np.random.default_rng(seed).random(shape) * scale).astype(F32)


def run(call: Any, *arrays: Any, target: str = "trn2") -> Any:
    return values(call, *arrays, target=target)


def one(
    name: str, shape: tuple[int, ...], *arrays: Any, dtype: Any = nl.float32, **more: Any
) -> Any:
    """dst of one call; the arrays become the tiles named by `more`'s Ellipses, in order."""
    named = [k for k, v in more.items() if v is ...]

    def call(*given: Any) -> Any:
        dst = sb(*shape, dtype=dtype)
        tiles = {k: tile(x) for k, x in zip(named, given, strict=True)}
        getattr(nisa, name)(dst=dst, **{**more, **tiles})
        return dst

    return run(call, *arrays)


# -- nki/test: elementwise -------------------------------------------------------------------------


def test_activation() -> None:
    """exp(a) within its roundings, square(2 b + c) to bfloat16 exactly."""
    a, b, c = rand(0, 128, 1024) / 2, rand(1, 128, 512), rand(2, 128, 1)
    got = one("activation", (128, 1024), a, op=nl.exp, data=...)
    want = np.exp(a.astype(np.float64))
    # NumPy's float32 exp is good to a few ulp; nothing else rounds.
    assert_close(got, want, want, op="activation", case="exp", roundings=1, chain=4)

    def call(x: Any, y: Any) -> Any:
        dst = sb(128, 512, dtype=nl.bfloat16)
        nisa.activation(dst=dst, op=nl.square, data=tile(x), bias=tile(y), scale=2.0)
        return dst

    assert np.array_equal(run(call, b, c), np.square(b * 2 + c).astype(ml_dtypes.bfloat16))


def test_memset() -> None:
    assert np.array_equal(one("memset", (128, 128), value=0.2), np.full((128, 128), 0.2, F32))


def test_reciprocal() -> None:
    x = rand(0, 128, 512)
    assert np.array_equal(one("reciprocal", (128, 512), x, data=...), np.reciprocal(x))


def test_tensor_copy() -> None:
    x = rand(0, 8, 8)
    got = one("tensor_copy", (8, 8), x, src=..., engine=nisa.engine.vector)
    assert np.array_equal(got, x)


def test_tensor_scalar() -> None:
    a, e, f = rand(0, 128, 512), rand(1, 64, 1024), rand(2, 64, 1)
    less = {"data": ..., "op0": nl.subtract, "operand0": 1.0}
    assert np.array_equal(one("tensor_scalar", a.shape, a, **less), a - 1)
    assert np.array_equal(one("tensor_scalar", a.shape, a, **less, reverse0=True), 1 - a)
    got = one(
        "tensor_scalar", e.shape, e, f, data=..., op0=nl.multiply, operand0=..., op1=nl.add,
        operand1=2.5,
    )  # fmt: skip
    assert np.array_equal(got, e * f + F32(2.5))


def test_tensor_tensor() -> None:
    a, b = rand(0, 128, 512), rand(1, 128, 512)
    got = one("tensor_tensor", a.shape, a, b, data1=..., data2=..., op=nl.add)
    assert np.array_equal(got, np.add(a, b))


def test_tensor_copy_predicated() -> None:
    a, b = rand(0, 128, 512, scale=2), rand(1, 128, 512)
    chosen = np.less_equal(a, 0.8)

    def call(x: Any, y: Any, p: Any) -> Any:
        dst = tile(y)
        nisa.tensor_copy_predicated(dst=dst, src=tile(x), predicate=tile(p))
        return dst

    got = run(call, a, b, chosen.astype(np.uint8))
    assert np.array_equal(got, np.where(chosen, a, b))


# -- nki/test: reductions --------------------------------------------------------------------------


def test_tensor_reduce() -> None:
    a = rand(0, 128, 512)
    got = one("tensor_reduce", (128, 1), a, op=nl.add, data=..., axis=(1,))
    want = a.astype(np.float64).sum(axis=1, keepdims=True)
    assert_close(got, want, want, op="tensor_reduce", case="example", roundings=1, chain=512)


def test_tensor_partition_reduce() -> None:
    a = rand(0, 128, 32, 4)
    got = one("tensor_partition_reduce", (1, 32, 4), a, op=nl.add, data=...)
    want = a.astype(np.float64).sum(axis=0, keepdims=True)
    assert_close(got, want, want, op="partition_reduce", case="example", roundings=1, chain=128)


@pytest.mark.parametrize("columns", [128, 1024])
def test_bn_stats_bn_aggr(columns: int) -> None:
    """Mean and variance of a row, in chunks of at most bn_stats_fmax."""
    a = rand(0, 128, columns)

    def call(x: Any) -> Any:
        data, width = tile(x), min(columns, nl.tile_size.bn_stats_fmax)
        chunks = columns // width
        stats, moments = sb(128, 6 * chunks), sb(128, 2)
        for i in range(chunks):
            part = data[:, i * width : (i + 1) * width]
            nisa.bn_stats(dst=stats[:, 6 * i : 6 * i + 6], data=part)
        nisa.bn_aggr(dst=moments, data=stats)
        return moments

    got = run(call, a)
    exact = a.astype(np.float64)
    mean, variance = exact.mean(axis=1), exact.var(axis=1)
    # A term passes through the sum of its half and a few combining steps.
    assert_close(
        got[:, 0], mean, np.abs(exact).mean(axis=1), op="bn_aggr", case="mean", roundings=2,
        chain=columns,
    )  # fmt: skip
    assert_close(
        got[:, 1], variance, 4 * (exact**2).mean(axis=1), op="bn_aggr", case="variance",
        roundings=2, chain=columns,
    )  # fmt: skip


def test_tensor_tensor_scan() -> None:
    """a[i] * r[i - 1] + b[i] in two chained halves; exact in float32, step by step."""
    a, b = rand(0, 128, 1024, scale=1), rand(1, 128, 1024, scale=1)

    def call(x: Any, y: Any) -> Any:
        first, second, dst = tile(x), tile(y), sb(128, 1024)
        for start, initial in ((0, 0.0), (512, dst[:, 511:512])):
            half = slice(start, start + 512)
            nisa.tensor_tensor_scan(
                dst=dst[:, half], data0=first[:, half], data1=second[:, half], initial=initial,
                op0=nl.multiply, op1=nl.add,
            )  # fmt: skip
        return dst

    want = np.zeros_like(a)
    state = np.zeros(128, F32)
    for i in range(1024):
        state = a[:, i] * state + b[:, i]
        want[:, i] = state
    assert np.array_equal(run(call, a, b), want)


ONES = np.ones((128, 64), F32)


@pytest.mark.parametrize(
    ("op1", "imm0", "imm1", "want"),
    [
        (nl.add, 0.0, None, np.add.accumulate(ONES, axis=1)),
        (nl.multiply, 0.0, None, np.multiply.accumulate(ONES, axis=1)),
        (nl.add, 1.0, None, np.add.accumulate(ONES + 1, axis=1)),
        (nl.maximum, 1.0, None, np.maximum.accumulate(ONES + 1, axis=1)),
        (nl.add, 1.0, 1.0, np.add.accumulate(ONES + 1, axis=1) + 1),
        (nl.multiply, 1.0, 0.0, np.zeros_like(ONES)),
        (nl.minimum, 1.0, 0.0, np.zeros_like(ONES)),
    ],
)
def test_tensor_scalar_cumulative(op1: Any, imm0: float, imm1: float | None, want: Any) -> None:
    load = {} if imm1 is None else {"imm1": imm1, "reduce_cmd": nisa.reduce_cmd.load_reduce}
    got = one(
        "tensor_scalar_cumulative", ONES.shape, ONES, src=..., op0=nl.add, op1=op1, imm0=imm0,
        **load,
    )  # fmt: skip
    assert np.array_equal(got, want)


def test_tensor_scalar_cumulative_continues() -> None:
    def call(x: Any) -> Any:
        src, dst = tile(x), sb(128, 64)
        for command in (nisa.reduce_cmd.reset_reduce, nisa.reduce_cmd.reduce):
            nisa.tensor_scalar_cumulative(
                dst=dst, src=src, op0=nl.add, op1=nl.add, imm0=0.0, reduce_cmd=command
            )
        return dst

    assert np.array_equal(run(call, ONES), np.add.accumulate(ONES, axis=1) + 64)


# -- nki/test: matmul and transposes ---------------------------------------------------------------


def whole_numbers(seed: int, *shape: int) -> Any:
    """Integers whose products of this size are exact in float32."""
    return np.random.default_rng(seed).integers(-9, 10, shape).astype(F32)


def test_nc_matmul() -> None:
    a, b = whole_numbers(0, 256, 128), whole_numbers(1, 256, 512)

    def call(x: Any, y: Any) -> Any:
        dst = nl.ndarray((128, 512), nl.float32, buffer=nl.psum)
        for k in range(2):
            rows = nl.ds(128 * k, 128)
            nisa.nc_matmul(dst=dst, stationary=tile(x[rows, :]), moving=tile(y[rows, :]))
        return dst

    assert np.array_equal(run(call, a, b), a.T @ b)


def test_nc_matmul_in_tiles_of_the_array() -> None:
    g, h = whole_numbers(0, 64, 64), whole_numbers(1, 64, 512)

    def call(x: Any, y: Any) -> Any:
        out = []
        for start in (0, 64):
            dst = nl.ndarray((128, 512), nl.float32, buffer=nl.psum)[start : start + 64, :]
            nisa.nc_matmul(
                dst=dst, stationary=tile(x), moving=tile(y), tile_position=(0, start),
                tile_size=(64, 64),
            )  # fmt: skip
            out.append(dst)
        return tuple(out)

    for got in run(call, g, h):
        assert np.array_equal(got, g.T @ h)


def test_nc_matmul_double_row() -> None:
    a = np.ones((128, 2, 1), ml_dtypes.float8_e5m2)
    b = np.ones((128, 2, 512), ml_dtypes.float8_e5m2)

    def call(x: Any, y: Any) -> Any:
        dst = nl.ndarray((1, 512), nl.float32, buffer=nl.psum)
        nisa.nc_matmul(
            dst=dst, stationary=tile(x), moving=tile(y),
            perf_mode=nisa.matmul_perf_mode.double_row,
        )  # fmt: skip
        return dst

    want = np.einsum("kli,klj->ij", a.astype(F32), b.astype(F32))
    assert np.array_equal(run(call, a, b), want)


def test_nc_transpose() -> None:
    a, b = rand(0, 128, 64), rand(1, 32, 2)

    def call(x: Any, y: Any) -> Any:
        big, small = nl.ndarray((64, 128), nl.float32, buffer=nl.psum), sb(2, 32)
        nisa.nc_transpose(dst=big, data=tile(x))
        nisa.nc_transpose(dst=small, data=tile(y), engine=nisa.engine.vector)
        return big, small

    big, small = run(call, a, b)
    assert np.array_equal(big, a.T)
    assert np.array_equal(small, b.T)


@pytest.mark.parametrize("on_chip", [False, True])
@pytest.mark.parametrize("mode", [nisa.dge_mode.unknown, nisa.dge_mode.hwdge])
def test_dma_transpose(mode: Any, on_chip: bool) -> None:
    src = rand(0, 16, 128).astype(np.float16)

    def call(x: Any) -> Any:
        dst = sb(128, 16, dtype=nl.float16)
        nisa.dma_transpose(dst=dst, src=tile(x) if on_chip else x, dge_mode=mode)
        return dst

    assert np.array_equal(run(call, src), src.T)


def test_dma_transpose_gathers() -> None:
    src = np.arange(64 * 4 * 128).astype(np.uint16).reshape(64, 4, 128)
    index = np.random.default_rng(0).permutation(64)[:32].astype(np.uint32).reshape(32, 1)

    def call(x: Any, i: Any) -> Any:
        dst = sb(128, 4, 32, dtype=nl.uint16)
        rows = x.ap([[512, 32], [128, 4], [1, 128]], vector_offset=tile(i))
        nisa.dma_transpose(dst=dst, src=rows, axes=(2, 1, 0))
        return dst

    want = np.transpose(src[index.reshape(32)], (2, 1, 0))
    assert np.array_equal(run(call, src, index), want)


# -- nki/test: DMA ---------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", [nisa.dge_mode.unknown, nisa.dge_mode.swdge, nisa.dge_mode.hwdge])
def test_dma_copy(mode: Any) -> None:
    src = rand(0, 256, 1)

    def call(x: Any) -> Any:
        dst = nl.ndarray(x.shape, x.dtype, buffer=HBM)
        nisa.dma_copy(dst=dst, src=x, dge_mode=mode)
        return dst

    assert np.array_equal(run(call, src), src)


def indirect(step: int, mode: Any, x: Any) -> Any:
    """Load the rows 0, step, 2 step ... of 128 into 64 rows that hold -1."""

    def call(x: Any) -> Any:
        index, dst = sb(64, 1, dtype=nl.int32), sb(64, 512)
        nisa.iota(dst=index, pattern=[[0, 1]], channel_multiplier=step)
        nisa.memset(dst=dst, value=-1.0)
        rows = x.ap([[512, 64], [1, 512]], vector_offset=index)
        nisa.dma_copy(dst=dst, src=rows, oob_mode=mode)
        return dst

    return run(call, x)


def test_indirect_load() -> None:
    a = rand(0, 128, 512)
    assert np.array_equal(indirect(2, nisa.oob_mode.error, a), a[::2])
    with pytest.raises(OutOfBounds):
        indirect(3, nisa.oob_mode.error, a)
    want = np.full((64, 512), -1, F32)
    want[:43] = a[::3]
    assert np.array_equal(indirect(3, nisa.oob_mode.skip, a), want)


def indirect_store(step: int, mode: Any, x: Any, *, adds: bool = False) -> Any:
    """Store 64 rows to the rows 0, step ... of 128 that hold -1 (1 when it adds)."""

    def call(x: Any) -> Any:
        index, fill = sb(64, 1, dtype=nl.int32), sb(128, 512)
        nisa.iota(dst=index, pattern=[[0, 1]], channel_multiplier=step)
        nisa.memset(dst=fill, value=1.0 if adds else -1.0)
        table = nl.ndarray((128, 512), nl.float32, buffer=HBM)
        nisa.dma_copy(dst=table, src=fill)
        rows = table.ap([[512, 64], [1, 512]], vector_offset=index)
        if adds:
            nisa.dma_compute(dst=rows, srcs=[tile(x), rows], reduce_op=nl.add)
        else:
            nisa.dma_copy(dst=rows, src=tile(x), oob_mode=mode)
        return table

    return run(call, x)


def test_indirect_store() -> None:
    a = rand(0, 64, 512)
    want = np.full((128, 512), -1, F32)
    want[::2] = a
    assert np.array_equal(indirect_store(2, nisa.oob_mode.error, a), want)
    with pytest.raises(OutOfBounds):
        indirect_store(3, nisa.oob_mode.error, a)
    want = np.full((128, 512), -1, F32)
    want[::3] = a[:43]
    assert np.array_equal(indirect_store(3, nisa.oob_mode.skip, a), want)


def test_indirect_store_that_adds() -> None:
    a = rand(0, 64, 512)
    want = np.ones((128, 512), F32)
    want[::2] += a
    assert np.array_equal(indirect_store(2, nisa.oob_mode.error, a, adds=True), want)
