"""Layer normalization over the last axis."""

from __future__ import annotations

from dataclasses import dataclass

import nki
import nki.isa as nisa
import nki.language as nl

from nki_kernels.kernels.norm.moments import (
    merge_moments,
    moments_tile,
    partial_moments,
    reciprocal_root,
    root_constants,
)
from nki_kernels.kernels.norm.rows import (
    broadcast_rows,
    in_step,
    row_spans,
    spans,
    take_rows,
)

#: Tiles of partial statistics in use at once: those being filled and those being merged.
_TURNS = 2


@dataclass(frozen=True)
class LayerNormConfig(nl.NKIObject):
    """Tuning of layer_norm: which engine takes which columns. No field changes the mathematics.

    Counts of columns are upper bounds: a row that has fewer gives what it has.

    Attributes:
        vector_stats: leading columns whose statistics Vector computes (bn_stats); the rest go to
            Scalar in two passes, the second centred on the mean of the first.
        pool_shift: leading columns scaled on Scalar and shifted by the bias on GpSimd instead of
            both on Vector. Rests on GpSimd's assumed rate: 0 keeps it out.
        pool_scale: columns after those whose scaling GpSimd does as well.
        chunk: columns per instruction and store.
        piece: columns per load, and per instruction and store of the last row tile, whose work
            nothing follows that could hide it.
        ahead: row tiles loaded before they are needed.
        lag: row tiles between the statistics and the rest, 0 or 1. With 1 each engine always has
            the other's finished tile to work on; it holds one more row tile in SBUF.
        hwdge: load through the hardware descriptor engine (gen3 and later).
    """

    vector_stats: int
    pool_shift: int
    pool_scale: int
    chunk: int
    piece: int
    ahead: int
    lag: int
    hwdge: bool


@nki.jit
def layer_norm(x, weight, bias, eps, out_dtype, config):
    """y[n, h] = (x[n, h] - mean[n]) / sqrt(var[n] + eps) * weight[h] + bias[h], rounded once.

    mean and var are those of the row: mean_h(x[n, :]), mean_h((x[n, :] - mean[n])^2).

    Dimensions:
        N: rows, any. H: row length, bounded by SBUF (the operator's limit).

    Args:
        x: [N, H] HBM, bfloat16 | float16 | float32.
        weight: [H] HBM, dtype of x, or None.
        bias: likewise.
        eps: added to the variance.
        out_dtype: dtype of the result.
        config: LayerNormConfig.

    Returns:
        [N, H] HBM, out_dtype. Statistics are float32 and centred: no difference of large squares.
    Data flow: HBM -> SBUF [P, H] -> Scalar and Vector (statistics) -> Vector ((x - mean) * weight)
        -> Vector, or Scalar and GpSimd (* rstd + bias) -> HBM.
    Limits: Vector, Scalar and GpSimd together. A pass over a [128, 4096] tile takes Vector 4.4 us
        in float32 and Scalar 3.5, DMA needs 5.7 us for all of it, and there are two passes of
        statistics (one for bn_stats) and two of scaling. The config shares them out.
    """
    rows, size = x.shape
    y = nl.ndarray((rows, size), dtype=out_dtype, buffer=nl.shared_hbm)
    row_tiles = row_spans(rows)
    epsilon = root_constants(eps)
    tiles = []
    scale = None
    shift = None
    waiting = []
    stats = []
    for index in range(len(row_tiles)):
        start, stop = row_tiles[index]
        (tile,) = take_rows((x,), tiles, row_tiles, index, config)
        if index == 0:
            # After the first rows: their statistics need neither.
            scale = broadcast_rows(weight, stop - start, config)
            shift = broadcast_rows(bias, stop - start, config)
        # Nothing precedes the first rows, so Vector is free to take all their statistics.
        by_vector = size if index == 0 else min(config.vector_stats, size)
        if index <= _TURNS:
            stats.append(moments_tile(size, by_vector))
        # The first rows have a tile of their own, the others take turns.
        turn = index if index <= _TURNS else 1 + (index - 1) % _TURNS
        partial = stats[turn][0 : stop - start, :]
        partial_moments(tile, partial, by_vector, config)
        if config.lag > 0 and index > 0:
            _write_rows(y, waiting.pop(0), scale, shift, config)
        mean, shifted = merge_moments(partial, epsilon)
        waiting.append((row_tiles[index], tile, mean, reciprocal_root(shifted)))
        if config.lag == 0:
            _write_rows(y, waiting.pop(0), scale, shift, config)
    for rows_left in waiting:
        _write_rows(y, rows_left, scale, shift, config)
    return y


def _write_rows(y, rows, scale, shift, config):
    """Normalise one row tile and store it, chunk by chunk."""
    (start, stop), tile, mean, factor = rows
    width = config.piece if stop == y.shape[0] else config.chunk
    size = tile.shape[1]
    by_scalar = min(config.pool_shift, size)
    by_pool = min(config.pool_shift + config.pool_scale, size)
    shares = [
        (spans(by_scalar, by_pool, width), nisa.engine.gpsimd),
        (spans(0, by_scalar, width), nisa.engine.scalar),
        (spans(by_pool, size, width), nisa.engine.vector),
    ]
    # In step with each other, GpSimd's first as the longest path: with all of one engine's columns
    # before the next one's, the tiles in flight would all wait for the slowest engine.
    # GpSimd's first, as the longest path.
    for left, right, scales in in_step(shares):
        scale_columns = None if scale is None else scale[0 : stop - start, left:right]
        shift_columns = None if shift is None else shift[0 : stop - start, left:right]
        result = nl.ndarray((stop - start, right - left), dtype=y.dtype, buffer=nl.sbuf)
        columns = tile[:, left:right]
        _apply(result, columns, mean, factor, scale_columns, shift_columns, scales)
        # Behind the loads, not on GpSimd's queue: a trigger there holds GpSimd's own work back.
        mode = nisa.dge_mode.hwdge if config.hwdge else nisa.dge_mode.unknown
        nisa.dma_copy(dst=y[start:stop, left:right], src=result, dge_mode=mode)


def _apply(result, columns, mean, factor, scale, shift, scales):
    """result = (columns - mean) * factor * scale + shift, float32 until the one rounding.

    `scales` is the engine that multiplies by `factor`; unless it is Vector, GpSimd adds `shift`.
    """
    if scale is None and shift is None:
        _standardise(result, columns, mean, factor)
        return
    middle = nl.ndarray(columns.shape, dtype=nl.float32, buffer=nl.sbuf)
    if scale is None:
        _standardise(middle, columns, mean, factor)
        nisa.tensor_tensor(dst=result, data1=middle, data2=shift, op=nl.add)
        return
    nisa.scalar_tensor_tensor(
        dst=middle, data=columns, op0=nl.subtract, operand0=mean, op1=nl.multiply, operand1=scale
    )
    if shift is None:
        nisa.tensor_scalar(dst=result, data=middle, op0=nl.multiply, operand0=factor)
        return
    if scales == nisa.engine.vector:
        nisa.scalar_tensor_tensor(
            dst=result, data=middle, op0=nl.multiply, operand0=factor, op1=nl.add, operand1=shift
        )
        return
    scaled = nl.ndarray(columns.shape, dtype=nl.float32, buffer=nl.sbuf)
    if scales == nisa.engine.scalar:
        nisa.activation(dst=scaled, op=nl.copy, data=middle, scale=factor)
    else:
        # GpSimd has no vector operand: it reads the factor with a step of 0.
        wide = factor.broadcast(1, columns.shape[1])
        nisa.tensor_tensor(
            dst=scaled, data1=middle, data2=wide, op=nl.multiply, engine=nisa.engine.gpsimd
        )
    nisa.tensor_tensor(dst=result, data1=scaled, data2=shift, op=nl.add, engine=nisa.engine.gpsimd)


def _standardise(result, columns, mean, factor):
    """result = (columns - mean) * factor."""
    nisa.tensor_scalar(
        dst=result,
        data=columns,
        op0=nl.subtract,
        operand0=mean,
        op1=nl.multiply,
        operand1=factor,
    )
