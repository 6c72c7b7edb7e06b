"""Root-mean-square normalization over the last axis."""

from __future__ import annotations

from dataclasses import dataclass

import nki
import nki.isa as nisa
import nki.language as nl

from nki_kernels.kernels.norm.moments import reciprocal_rms, root_constants
from nki_kernels.kernels.norm.rows import (
    add_rows,
    row_spans,
    spans,
    take_rows,
    weight_rows,
)
from nki_kernels.kernels.norm.short_rows import rms_norm_short_rows


@dataclass(frozen=True)
class RmsNormConfig(nl.NKIObject):
    """Tuning of rms_norm. No field changes the mathematics.

    Attributes:
        chunk: columns per instruction and store.
        piece: columns per load and sum of the first row tile, and per instruction and store of the
            last, where nothing else hides the work.
        ahead: row tiles loaded before they are needed.
        together: short rows that share a partition; 0 for one row on each, cut into chunks.
        scalar: of these, rows that Scalar multiplies by their factor, a row per instruction.
        pool: of these, rows that GpSimd multiplies by the weight. Rests on GpSimd's assumed rate.
        hwdge: load through the hardware descriptor engine (gen3 and later).
    """

    chunk: int
    piece: int
    ahead: int
    together: int
    scalar: int
    pool: int
    hwdge: bool


@nki.jit
def rms_norm(x, weight, eps, out_dtype, config):
    """y[n, h] = x[n, h] / sqrt(mean_h(x[n, :]^2) + eps) * weight[h], rounded once.

    Dimensions:
        N: rows, any. H: row length, bounded by SBUF (the operator's limit).

    Args:
        x: [N, H] HBM, bfloat16 | float16 | float32.
        weight: [H] HBM, dtype of x, or None.
        eps: added to the mean square.
        out_dtype: dtype of the result.
        config: RmsNormConfig.

    Returns:
        [N, H] HBM, out_dtype. Statistics are float32.

    Data flow: HBM -> SBUF [P, H] -> Scalar (square, sum) -> GpSimd (rsqrt) -> Vector (scale,
        weight) -> HBM.
    Limits: DMA. Per [128, 4096] bf16 tile it takes 5.7 us, Scalar 3.9, Vector 4.4. Of short rows
        Vector and GpSimd (1.7 ns per column, DMA 1.4): sums along a row no longer come for free.
    """
    y = nl.ndarray(x.shape, dtype=out_dtype, buffer=nl.shared_hbm)
    _normalise(y, None, (x,), weight, eps, None, config)
    return y


@nki.jit
def add_rms_norm(x, residual, weight, eps, out_dtype, config):
    """total = x + residual, rounded; y = rms_norm(total), as `rms_norm` computes it.

    The sum is on chip once: a kernel of its own would store it and load it again. Per [128, 4096]
    bf16 tile DMA takes 11.4 us, Scalar 3.9, Vector 6.6.

    Args:
        x: [N, H] HBM, bfloat16 | float16 | float32.
        residual: [N, H] HBM, dtype of x.
        weight: [H] HBM, dtype of x, or None.
        eps: added to the mean square.
        out_dtype: dtype of the results.
        config: RmsNormConfig.

    Returns:
        total [N, H] and y [N, H] HBM, out_dtype.
    """
    total = nl.ndarray(x.shape, dtype=out_dtype, buffer=nl.shared_hbm)
    y = nl.ndarray(x.shape, dtype=out_dtype, buffer=nl.shared_hbm)
    _normalise(y, total, (x, residual), weight, eps, None, config)
    return total, y


@nki.jit
def rms_norm_cast(x, weight, eps, out_dtype, cast, config):
    """rms_norm as published models cast it.

    "llama": y = round(x / rms) * weight, rounded to the dtype of x before the weight and after it.
    "gemma": y = x / rms * (1 + weight), the sum in float32, rounded once.

    Args:
        x: [N, H] HBM, bfloat16 | float16 | float32.
        weight: [H] HBM, dtype of x.
        eps: added to the mean square.
        out_dtype: dtype of the result.
        cast: "llama" | "gemma".
        config: RmsNormConfig.

    Returns:
        [N, H] HBM, out_dtype.
    """
    y = nl.ndarray(x.shape, dtype=out_dtype, buffer=nl.shared_hbm)
    _normalise(y, None, (x,), weight, eps, cast, config)
    return y


def _normalise(y, total, sources, weight, eps, cast, config):
    """Write the sum of the sources to `total`, if there is one, and its rows, normalised, to y."""
    rows, size = y.shape
    row_tiles = row_spans(rows)
    epsilon = root_constants(eps)
    if config.together > 0:
        rms_norm_short_rows(y, total, sources, weight, epsilon, cast, config)
        return
    tiles = []
    scale = None
    for index in range(len(row_tiles)):
        start, stop = row_tiles[index]
        found = take_rows(sources, tiles, row_tiles, index, config)
        tile = found[0]
        if total is not None:
            tile = add_rows(total[start:stop, :], found, config)
        if index == 0:
            # After the first rows: their statistics do not need it.
            scale = weight_rows(weight, stop - start, cast, config.piece, config)
        # The first rows come in pieces.
        factor = reciprocal_rms(tile, epsilon, config.piece if index == 0 else config.chunk)
        width = config.piece if stop == rows else config.chunk
        for left, right in spans(0, size, width):
            result = nl.ndarray((stop - start, right - left), dtype=y.dtype, buffer=nl.sbuf)
            columns = None if scale is None else scale[0 : stop - start, left:right]
            _scale(result, tile[:, left:right], factor, columns, cast)
            # Behind no load, the faster queue.
            mode = nisa.dge_mode.hwdge if config.hwdge and stop == rows else nisa.dge_mode.unknown
            nisa.dma_copy(dst=y[start:stop, left:right], src=result, dge_mode=mode)


def _scale(result, columns, factor, scale, cast):
    """result = columns * factor * scale, for "llama" rounded between the two."""
    if scale is None:
        nisa.tensor_scalar(dst=result, data=columns, op0=nl.multiply, operand0=factor)
        return
    if cast == "llama":
        narrow = nl.ndarray(columns.shape, dtype=columns.dtype, buffer=nl.sbuf)
        nisa.tensor_scalar(dst=narrow, data=columns, op0=nl.multiply, operand0=factor)
        nisa.tensor_tensor(dst=result, data1=narrow, data2=scale, op=nl.multiply)
        return
    nisa.scalar_tensor_tensor(
        dst=result,
        data=columns,
        op0=nl.multiply,
        operand0=factor,
        op1=nl.multiply,
        operand1=scale,
    )
