"""8-bit floats end to end: bits in memory, casts at their ends, matmul, double row at full size."""

from __future__ import annotations

import itertools

import ml_dtypes
import nki.isa as nisa
import nki.language as nl
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from nki_kernels.machine.launch import launch
from tests.embedded.harness import back, ps, same, sb, tile, values

F32 = np.float32
HOST = {
    nl.float8_e4m3: ml_dtypes.float8_e4m3,
    nl.float8_e5m2: ml_dtypes.float8_e5m2,
    nl.float8_e4m3fn: ml_dtypes.float8_e4m3fn,
}
KINDS = tuple(HOST)
#: Largest finite number, and the largest float32 that rounds to it. Half way to the number after it
#: a tie goes to the even one: 256 and 65536 for the first two, the largest itself for e4m3fn.
LARGEST = {
    nl.float8_e4m3: (240, np.nextafter(F32(248), F32(0))),
    nl.float8_e5m2: (57344, np.nextafter(F32(61440), F32(0))),
    nl.float8_e4m3fn: (448, F32(464)),
}
seeds = st.integers(0, 2**20)
every = np.arange(256, dtype=np.uint8).reshape(2, 128)


@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_every_bit_pattern_survives_memory_and_copies(kind):
    def kernel(x):
        loaded = tile(x)
        moved, through = sb(2, 128, dtype=kind), ps(2, 128, dtype=kind)
        nisa.tensor_copy(through, loaded)
        nisa.tensor_copy(moved, through)
        return back(moved)

    found = launch(kernel, (every.view(HOST[kind]),), target="trn3").outputs[0]
    assert found.dtype == HOST[kind]
    assert np.array_equal(found.view(np.uint8), every)


@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_widening_is_exact(kind):
    x = every.view(HOST[kind])

    def call(y):
        wide, half = sb(2, 128), sb(2, 128, dtype=nl.bfloat16)
        nisa.tensor_copy(wide, tile(y))
        nisa.dma_copy(half, tile(y))
        return wide, half

    wide, half = values(call, x, target="trn3")
    same(wide, x.astype(F32))
    # 3 mantissa bits and 5 exponent bits are less than bfloat16 has.
    same(half, x.astype(F32).astype(ml_dtypes.bfloat16))


@pytest.mark.parametrize("kind", KINDS, ids=str)
@pytest.mark.parametrize("move", ["tensor_copy", "dma_copy", "activation"])
def test_the_largest_numbers(kind, move):
    """Overflow is infinity, as IEEE says; e4m3fn has none and gives NaN (undocumented)."""
    top, below = LARGEST[kind]
    past = np.nextafter(below, F32(np.inf))
    x = np.array([[top, below, past, -past, np.inf, -np.inf]], F32)

    def call(y):
        dst, src = sb(1, 6, dtype=kind), tile(y)
        if move == "activation":
            nisa.activation(dst, nl.copy, src)
        else:
            getattr(nisa, move)(dst, src)
        return dst

    over = np.nan if kind is nl.float8_e4m3fn else np.inf
    want = np.array([[top, top, over, -over, over, -over]])
    found = values(call, x, target="trn3").astype(np.float64)
    assert np.array_equal(found, want, equal_nan=True)


def small(seed, shape, kind):
    """Integers an 8-bit float of either kind holds exactly."""
    return np.random.default_rng(seed).integers(-4, 5, shape).astype(HOST[kind])


PAIRS = [p for p in itertools.product(KINDS, KINDS)
         if set(p) != {nl.float8_e4m3, nl.float8_e4m3fn}]  # fmt: skip


@given(k=st.integers(1, 6), m=st.integers(1, 4), n=st.integers(1, 5), kinds=st.sampled_from(PAIRS),
       double=st.booleans(), seed=seeds)  # fmt: skip
def test_formats_meet_in_a_matmul(k, m, n, kinds, double, seed):
    planes = (2,) if double else ()
    a, b = small(seed, (k, *planes, m), kinds[0]), small(seed + 1, (k, *planes, n), kinds[1])
    mode = nisa.matmul_perf_mode.double_row if double else nisa.matmul_perf_mode.none

    def call(x, y):
        acc = ps(m, n)
        nisa.nc_matmul(acc, tile(x), tile(y), perf_mode=mode)
        return acc

    want = [[sum(int(a[(i, *j, r)]) * int(b[(i, *j, c)])
                 for i in range(k) for j in (((0,), (1,)) if double else ((),)))
             for c in range(n)] for r in range(m)]  # fmt: skip
    same(values(call, a, b, target="trn3"), np.array(want, F32))


def test_double_row_contracts_256_rows_at_once():
    """C = A.T @ B over 256 rows: row k of both lies in partition k % 128, plane k // 128."""
    a, b = small(0, (256, 128), nl.float8_e4m3), small(1, (256, 512), nl.float8_e5m2)

    def kernel(x, y):
        left, right = (sb(128, 2, t.shape[1], dtype=t.dtype) for t in (x, y))
        for plane in range(2):
            rows = slice(128 * plane, 128 * (plane + 1))
            nisa.dma_copy(left[:, plane, :], x[rows])
            nisa.dma_copy(right[:, plane, :], y[rows])
        acc = ps(128, 512)
        nisa.nc_matmul(acc, left, right, perf_mode=nisa.matmul_perf_mode.double_row)
        return back(acc)

    done = launch(kernel, (a, b), target="trn2")
    same(done.outputs[0], (a.astype(int).T @ b.astype(int)).astype(F32))
    (found,) = [e.work for e in done.trace if e.opcode == "nc_matmul"]
    assert (found.k, found.m, found.n, found.double_row) == (128, 128, 512, True)
    assert found.macs == 256 * 128 * 512
