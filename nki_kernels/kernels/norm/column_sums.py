"""Sums over rows, for the gradients of the parameters: products with a column, on PE.

Block j of the columns (as many as PE has stationary columns) is the stationary operand and sums to
column j of one PSUM tile per row tile; Vector adds these up, a narrow tile per row tile. A bank of
PSUM holds one group that is being accumulated, so none goes on from one row tile to the next. As
the moving operand the terms would fill all of PSUM from 4096 columns on.
"""

from __future__ import annotations

import nki.isa as nisa
import nki.language as nl

from nki_kernels.kernels.norm.rows import spans


def column_sums(size, count, buffer):
    """Return `count` float32 tiles [block, blocks] for sums of `size` columns, not yet written.

    They share a tile, and hence one bank of PSUM.
    """
    block = nl.tile_size.gemm_stationary_fmax
    blocks = -(-size // block)
    tile = nl.ndarray((block, count * blocks), dtype=nl.float32, buffer=buffer)
    return [tile[:, left:right] for left, right in spans(0, count * blocks, blocks)]


def whole_blocks(columns):
    """Return `columns` rounded up to whole blocks: chunks must not cut one."""
    block = nl.tile_size.gemm_stationary_fmax
    return -(-columns // block) * block


def sum_columns(sums, terms, at, factor):
    """sums[h] = sum over rows of terms[row, h] * factor[row], in PSUM.

    `terms` [rows, columns] are those of the columns from `at` on, at the start of a block; `factor`
    is [rows, 1], of the same dtype class as `terms` (both float32, or neither).
    """
    block = sums.shape[0]
    for left, right in spans(0, terms.shape[1], block):
        column = (at + left) // block
        nisa.nc_matmul(
            dst=sums[0 : right - left, column : column + 1],
            stationary=terms[:, left:right],
            moving=factor,
            accumulate=False,
        )


def collect(total, sums, size, first):
    """total += sums, those of one row tile; `first` overwrites."""
    block = sums.shape[0]
    whole, rest = size // block, size % block
    parts = []
    if whole > 0:
        parts.append((slice(0, block), slice(0, whole)))
    if rest > 0:
        parts.append((slice(0, rest), slice(whole, whole + 1)))
    for rows, columns in parts:
        target, terms = total[rows, columns], sums[rows, columns]
        if first:
            nisa.tensor_copy(dst=target, src=terms)
        else:
            nisa.tensor_tensor(dst=target, data1=target, data2=terms, op=nl.add)


def store_column_sums(dst, sums):
    """Round the sums once and store them to `dst` [H]."""
    block, size = sums.shape[0], dst.shape[0]
    whole = size // block
    # Turned, so that a partition holds neighbours: 2-byte descriptors cost more than the turn.
    for start, stop in spans(0, whole, nl.tile_size.pmax):
        turned = nl.ndarray((stop - start, block), dtype=nl.float32, buffer=nl.psum)
        nisa.nc_transpose(dst=turned, data=sums[:, start:stop], engine=nisa.engine.tensor)
        rounded = nl.ndarray((stop - start, block), dtype=dst.dtype, buffer=nl.sbuf)
        nisa.tensor_copy(dst=rounded, src=turned)
        pattern = [[block, stop - start], [1, block]]
        nisa.dma_copy(dst=dst.ap(pattern=pattern, offset=start * block), src=rounded)
    rest = size - whole * block
    if rest > 0:
        rounded = nl.ndarray((rest, 1), dtype=dst.dtype, buffer=nl.sbuf)
        nisa.tensor_copy(dst=rounded, src=sums[0:rest, whole : whole + 1])
        pattern = [[1, rest], [1, 1]]
        nisa.dma_copy(dst=dst.ap(pattern=pattern, offset=whole * block), src=rounded)
