"""Kernels of the validation, in the current API: what their measured originals do, written anew."""

from __future__ import annotations

from typing import Any

import nki
import nki.isa as nisa
import nki.language as nl


def _tile(rows: int, columns: int, dtype: Any = nl.float32) -> Any:
    return nl.ndarray((rows, columns), dtype=dtype, buffer=nl.sbuf)


def _bank(rows: int, columns: int) -> Any:
    return nl.ndarray((rows, columns), dtype=nl.float32, buffer=nl.psum)


def _load(source: Any) -> Any:
    """Load an HBM block into a tile of its own."""
    tile = _tile(source.shape[0], source.shape[1], source.dtype)
    nisa.dma_copy(dst=tile, src=source)
    return tile


def _block(tensor: Any, row: int, rows: int, column: int, columns: int) -> Any:
    """Return block (row, column) of a grid of rows x columns blocks."""
    return tensor[row * rows : (row + 1) * rows, column * columns : (column + 1) * columns]


def _evict(out: Any, psum: Any) -> None:
    tile = _tile(psum.shape[0], psum.shape[1], out.dtype)
    nisa.tensor_copy(tile, psum)
    nisa.dma_copy(dst=out, src=tile)


# -- C.1: the kernel-optimization tutorial; lhs_t [K, M], rhs [K, N], float32 ----------------------

_P, _N = 128, 512


@nki.jit
def matmul_tiled(lhs_t: Any, rhs: Any) -> Any:
    """V01a: every tile is loaded for every product."""
    (k_size, m_size), n_size = lhs_t.shape, rhs.shape[1]
    out = nl.ndarray((m_size, n_size), dtype=lhs_t.dtype, buffer=nl.shared_hbm)
    for m in range(m_size // _P):
        for n in range(n_size // _N):
            psum = _bank(_P, _N)
            for k in range(k_size // _P):
                left = _load(_block(lhs_t, k, _P, m, _P))
                right = _load(_block(rhs, k, _P, n, _N))
                nisa.nc_matmul(psum, left, right, accumulate=k > 0)
            _evict(_block(out, m, _P, n, _N), psum)
    return out


@nki.jit
def matmul_hoisted(lhs_t: Any, rhs: Any) -> Any:
    """V01b: a column of lhs_t tiles stays while all of rhs passes, a column at a time."""
    (k_size, m_size), n_size = lhs_t.shape, rhs.shape[1]
    out = nl.ndarray((m_size, n_size), dtype=lhs_t.dtype, buffer=nl.shared_hbm)
    inner = range(k_size // _P)
    for m in range(m_size // _P):
        left = [_load(_block(lhs_t, k, _P, m, _P)) for k in inner]
        for n in range(n_size // _N):
            right = [_load(_block(rhs, k, _P, n, _N)) for k in inner]
            psum = _bank(_P, _N)
            for k in inner:
                nisa.nc_matmul(psum, left[k], right[k], accumulate=k > 0)
            _evict(_block(out, m, _P, n, _N), psum)
    return out


@nki.jit
def matmul_blocked(lhs_t: Any, rhs: Any) -> Any:
    """V01d: blocks of 2048 x 1024 x 1024, partial sums added up in SBUF."""
    (k_size, m_size), n_size = lhs_t.shape, rhs.shape[1]
    in_m, in_n, in_k = 16, 2, 8
    out = nl.ndarray((m_size, n_size), dtype=lhs_t.dtype, buffer=nl.shared_hbm)
    blocks = range(m_size // (in_m * _P))
    for n in range(n_size // (in_n * _N)):
        sums = {}
        for m in range(m_size // _P):
            for column in range(in_n):
                sums[m, column] = _tile(_P, _N)
                nisa.memset(dst=sums[m, column], value=0.0)
        for k in range(k_size // (in_k * _P)):
            rows = range(k * in_k, (k + 1) * in_k)
            right = [_load(_block(rhs, row, _P, n, in_n * _N)) for row in rows]
            for block in blocks:
                left = [_load(_block(lhs_t, row, _P, block, in_m * _P)) for row in rows]
                for column in range(in_n):
                    for m in range(in_m):
                        psum = _bank(_P, _N)
                        for i in range(in_k):
                            weights = _block(left[i], 0, _P, m, _P)
                            moving = _block(right[i], 0, _P, column, _N)
                            nisa.nc_matmul(psum, weights, moving, accumulate=i > 0)
                        total = sums[block * in_m + m, column]
                        nisa.tensor_tensor(total, total, psum, nl.add)
        for m in range(m_size // _P):
            packed = _tile(_P, in_n * _N, lhs_t.dtype)
            for column in range(in_n):
                nisa.tensor_copy(_block(packed, 0, _P, column, _N), sums[m, column])
            nisa.dma_copy(dst=_block(out, m, _P, n, in_n * _N), src=packed)
    return out


# -- C.3: V11 to V13 -------------------------------------------------------------------------------


@nki.jit
def maxpool(x: Any, rows: int) -> Any:
    """V11: 3 x 3 maximum, stride 1: three shifted loads, four maxima and a store per row tile.

    Two slots of three halo rows, as the original; the next tile loads while this one computes.
    """
    height, width = x.shape
    high, wide = height - 2, width - 2
    out = nl.ndarray((high, wide), dtype=x.dtype, buffer=nl.shared_hbm)
    slots = [[_tile(128, width) for _ in range(3)] for _ in range(2)]
    first, second = _tile(128, width), _tile(128, width)
    starts = list(range(0, high, rows))

    def load(index: int) -> None:
        start, stop = starts[index], min(starts[index] + rows, high)
        for halo in range(3):
            target = slots[index % 2][halo][0 : stop - start, :]
            nisa.dma_copy(dst=target, src=x[start + halo : stop + halo, :])

    load(0)
    for index in range(len(starts)):
        if index + 1 < len(starts):
            load(index + 1)
        start, stop = starts[index], min(starts[index] + rows, high)
        a, b, c = (tile[0 : stop - start, :] for tile in slots[index % 2])
        u, v = first[0 : stop - start, :], second[0 : stop - start, :]
        nisa.tensor_tensor(u, a, b, nl.maximum)
        nisa.tensor_tensor(v, u, c, nl.maximum)
        nisa.tensor_tensor(a[:, 0:wide], v[:, 0:wide], v[:, 1 : wide + 1], nl.maximum)
        nisa.tensor_tensor(b[:, 0:wide], a[:, 0:wide], v[:, 2 : wide + 2], nl.maximum)
        nisa.dma_copy(dst=out[start:stop, :], src=b[:, 0:wide])
    return out


@nki.jit
def gemm(lhs_t: Any, rhs: Any, depth: int) -> Any:
    """V12, V13: a GEMM of 128-tiles whose weights pass through a pool of `depth` slots.

    rhs stays in SBUF; one store. As many matmuls and DMAs as the original has.
    """
    (k_size, m_size), n_size = lhs_t.shape, rhs.shape[1]
    steps, columns = range(k_size // _P), range(n_size // _P)
    out = nl.ndarray((m_size, n_size), dtype=lhs_t.dtype, buffer=nl.shared_hbm)
    pool = [_tile(_P, _P, lhs_t.dtype) for _ in range(depth)]
    right = {(k, n): _load(_block(rhs, k, _P, n, _P)) for k in steps for n in columns}
    result = nl.ndarray((_P, m_size // _P, n_size), dtype=lhs_t.dtype, buffer=nl.sbuf)
    used = 0
    for m in range(m_size // _P):
        banks = [_bank(_P, _P) for _ in columns]
        for k in steps:
            weights = pool[used % depth]
            used += 1
            nisa.dma_copy(dst=weights, src=_block(lhs_t, k, _P, m, _P))
            for n in columns:
                nisa.nc_matmul(banks[n], weights, right[k, n], accumulate=k > 0)
        for n in columns:
            nisa.tensor_copy(result[:, m, n * _P : (n + 1) * _P], banks[n])
    nisa.dma_copy(dst=out.reshape((m_size // _P, _P, n_size)).permute((1, 0, 2)), src=result)
    return out


# -- C.5: vector addition --------------------------------------------------------------------------


@nki.jit
def add_tiled(a: Any, b: Any, rows: int) -> Any:
    """V22a, b: chunks of `rows` elements, one per partition."""
    out = nl.ndarray(a.shape, dtype=a.dtype, buffer=nl.shared_hbm)
    for start in range(0, a.shape[0], rows):
        left, right = _load(a[start : start + rows, :]), _load(b[start : start + rows, :])
        nisa.tensor_scalar(left, left, nl.add, right)
        nisa.dma_copy(dst=out[start : start + rows, :], src=left)
    return out


@nki.jit
def add_streamed(a: Any, b: Any, columns: int) -> Any:
    """V22c to f: [128, columns] tiles of vectors shaped [128, n / 128]."""
    out = nl.ndarray(a.shape, dtype=a.dtype, buffer=nl.shared_hbm)
    for start in range(0, a.shape[1], columns):
        here = slice(start, start + columns)
        left, right = _load(a[:, here]), _load(b[:, here])
        total = _tile(a.shape[0], columns)
        nisa.tensor_tensor(total, left, right, nl.add)
        nisa.dma_copy(dst=out[:, here], src=total)
    return out


# -- DMA -------------------------------------------------------------------------------------------


@nki.jit
def exponential(x: Any, mode: Any) -> Any:
    """V06: load, exponential, store."""
    rows, columns = x.shape
    tile, result = (_tile(rows, columns, x.dtype) for _ in range(2))
    nisa.dma_copy(dst=tile, src=x, dge_mode=mode)
    nisa.activation(result, nl.exp, tile)
    out = nl.ndarray(x.shape, dtype=x.dtype, buffer=nl.shared_hbm)
    nisa.dma_copy(dst=out, src=result, dge_mode=mode)
    return out


@nki.jit
def loads(x: Any) -> None:
    """V07: independent loads of [128, row] blocks, back to back."""
    for block in range(x.shape[0]):
        _load(x[block])
