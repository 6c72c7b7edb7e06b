"""Layer normalization over the last axis."""

from __future__ import annotations

from dataclasses import dataclass

import nki
import nki.isa as nisa
import nki.language as nl

from nki_kernels.kernels.norm.moments import (
    measure_moments,
    merge_moments,
    moment_places,
    moments_tile,
    reciprocal_root,
    root_constants,
)
from nki_kernels.kernels.norm.rows import broadcast_columns, row_spans, spans
from nki_kernels.kernels.norm.steps import load_pieces, pipeline, store_ready

#: Tiles of partial statistics in use at once: those being filled and those being merged.
_TURNS = 2


@dataclass(frozen=True)
class LayerNormConfig(nl.NKIObject):
    """Tuning of layer_norm: which engine takes which columns. No field changes the mathematics.

    Counts of columns are upper bounds: a chunk that has fewer gives what it has.

    Attributes:
        vector_stats: leading columns of each chunk whose statistics Vector computes (bn_stats); the
            rest go to Scalar in two passes, the second centred on the mean of the first.
        pool_shift: leading columns of each chunk scaled on Scalar and shifted by the bias on GpSimd
            instead of both on Vector. Rests on GpSimd's assumed rate: 0 keeps it out.
        pool_scale: columns after those whose scaling GpSimd does as well.
        chunk: columns per load, instruction and store.
        piece: columns per load of the first row tile, and per instruction and store of the last,
            where nothing else hides the work.
        ahead: chunks loaded before they are needed.
        overlap: start a row tile before the one before it is through.
        hwdge: load through the hardware descriptor engine (gen3 and later).
    """

    vector_stats: int
    pool_shift: int
    pool_scale: int
    chunk: int
    piece: int
    ahead: int
    overlap: bool
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
    Data flow: HBM -> SBUF [P, chunk] -> Scalar and Vector (statistics) -> GpSimd (rstd) -> Vector
        ((x - mean) * weight) -> Vector, or Scalar and GpSimd (* rstd + bias) -> HBM.
    Limits: Vector, Scalar and GpSimd together, in bfloat16 (model, ns per column of a row tile):
        Vector 1.04 for (x - mean) * weight, 1.24 per column of bn_stats and 1.04 per column scaled
        and shifted; Scalar 1.67 per column of statistics (two passes), 0.83 scaled; GpSimd 1.67
        shifted, 3.33 scaled and shifted. No share of columns takes all three below 1.62, where DMA
        needs 1.39: with instruction overheads (0.1 us each, eight of Vector's) 7.2 us per
        [128, 4096], 230 us for 32 of them, and 25 for start, first load, last row tile and end:
        71 % of the DMA roofline. The config reaches 69 (264 us), 69.5 at 16384 columns, 69 at 2880.
        bfloat16 steps would be faster and round thrice; sums on PE mix rows, NaN included.
    Instructions: 10 per chunk and row tile, 3 more per row tile.
    """
    y = nl.ndarray(x.shape, dtype=out_dtype, buffer=nl.shared_hbm)
    _normalise(y, None, (x,), weight, bias, eps, config)
    return y


@nki.jit
def add_layer_norm(x, residual, weight, bias, eps, out_dtype, config):
    """total = x + residual, rounded; y = layer_norm(total), as `layer_norm` computes it.

    The sum is on chip once: a kernel of its own would store it and load it again. Per [128, 4096]
    bf16 tile DMA takes 11.4 us, Vector 9.5, Scalar 7.3, GpSimd 6.9.

    Args:
        x: [N, H] HBM, bfloat16 | float16 | float32.
        residual: [N, H] HBM, dtype of x.
        weight: [H] HBM, dtype of x, or None.
        bias: likewise.
        eps: added to the variance.
        out_dtype: dtype of the results.
        config: LayerNormConfig.

    Returns:
        total [N, H] and y [N, H] HBM, out_dtype.
    """
    total = nl.ndarray(x.shape, dtype=out_dtype, buffer=nl.shared_hbm)
    y = nl.ndarray(x.shape, dtype=out_dtype, buffer=nl.shared_hbm)
    _normalise(y, total, (x, residual), weight, bias, eps, config)
    return total, y


def _normalise(y, total, sources, weight, bias, eps, config):
    """Write the sum of the sources to `total`, if there is one, and its rows, normalised, to y."""
    rows, size = y.shape
    cuts = spans(0, size, config.chunk)
    tiles = [{"rows": span, "x": [], "residual": []} for span in row_spans(rows)]
    epsilon = root_constants(eps)
    places = moment_places(cuts, config.vector_stats)
    # Nothing precedes the first rows: Vector is free to take half of their statistics.
    halves = moment_places(cuts, max(config.vector_stats, (config.chunk + 1) // 2))
    first = moments_tile(halves)
    turns = [moments_tile(places) for _ in range(min(_TURNS, len(tiles) - 1))]
    vectors = [_parameter(weight, rows), _parameter(bias, rows)]
    first_write = min(1, len(tiles) - 1) if config.overlap else 0
    ready = []
    # The statistics of a chunk go beside the rest of the row tile before.
    offsets = {"load": 0, "measure": config.ahead, "write": config.ahead + len(cuts)}
    for step in pipeline(len(tiles), len(cuts), offsets, config.overlap):
        if "load" in step:
            index, chunk = step["load"]
            width = config.piece if index == 0 else config.chunk
            span = tiles[index]["rows"]
            for number in range(len(sources)):
                tile = load_pieces(sources[number], span, cuts[chunk], width, config)
                tiles[index]["x" if number == 0 else "residual"].append(tile)
            if index == first_write:
                # Behind what the statistics of the first rows, and of the second, need.
                broadcast_columns(vectors[0], weight, cuts[chunk], config)
                broadcast_columns(vectors[1], bias, cuts[chunk], config)
        for waiting in ready:
            store_ready(waiting, config)
        ready = []
        if "measure" in step:
            index, chunk = step["measure"]
            if total is not None:
                ready.append(_add(total, tiles[index], chunk, cuts[chunk]))
            stats = first if index == 0 else turns[(index - 1) % _TURNS]
            tiles[index]["stats"] = stats[0 : tiles[index]["x"][chunk].shape[0], :]
            place = halves[chunk] if index == 0 else places[chunk]
            measure_moments(tiles[index]["x"][chunk], place, tiles[index]["stats"])
        if "write" in step:
            index, chunk = step["write"]
            ready += _write(y, tiles[index], chunk, cuts[chunk], vectors, config)
        if "measure" in step and step["measure"][1] == len(cuts) - 1:
            # Behind the row tile before: Vector would wait for Scalar's share.
            tile = tiles[step["measure"][0]]
            tile["mean"], shifted = merge_moments(tile["stats"], epsilon)
            tile["factor"] = reciprocal_root(shifted)
    for waiting in ready:
        store_ready(waiting, config)


def _add(total, tile, chunk, cut):
    """Add a chunk of the residual to that of x; return (where the sum belongs, the sum)."""
    (start, stop), (left, right) = tile["rows"], cut
    added = nl.ndarray((stop - start, right - left), dtype=total.dtype, buffer=nl.sbuf)
    nisa.tensor_tensor(dst=added, data1=tile["x"][chunk], data2=tile["residual"][chunk], op=nl.add)
    tile["x"][chunk], tile["residual"][chunk] = added, None
    return total[start:stop, left:right], added


def _parameter(vector, rows):
    """Return a tile for `vector` [H] on as many partitions as the first row tile has, or None."""
    if vector is None:
        return None
    count = min(rows, nl.tile_size.pmax)
    return nl.ndarray((count, vector.shape[0]), dtype=vector.dtype, buffer=nl.sbuf)


def _write(y, tile, chunk, cut, vectors, config):
    """Normalise one chunk; return [(where it belongs, the chunk)], in pieces of the last rows."""
    start, stop = tile["rows"]
    scale, shift = vectors
    columns = tile["x"][chunk]
    tile["x"][chunk] = None
    ready = []
    width = config.piece if stop == y.shape[0] else config.chunk
    for left, right in spans(cut[0], cut[1], width):
        scale_columns = None if scale is None else scale[0 : stop - start, left:right]
        shift_columns = None if shift is None else shift[0 : stop - start, left:right]
        result = nl.ndarray((stop - start, right - left), dtype=y.dtype, buffer=nl.sbuf)
        piece = columns[:, left - cut[0] : right - cut[0]]
        _apply(result, piece, tile, scale_columns, shift_columns, config)
        ready.append((y[start:stop, left:right], result))
    return ready


def _apply(result, columns, tile, scale, shift, config):
    """result = (columns - mean) * factor * scale + shift, float32 until the one rounding."""
    mean, factor = tile["mean"], tile["factor"]
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
    _scale_and_shift(result, middle, factor, shift, config)


def _scale_and_shift(result, middle, factor, shift, config):
    """result = middle * factor + shift: the leading columns by Scalar and GpSimd, then GpSimd."""
    size = middle.shape[1]
    # A last chunk or a piece that is shorter is shared out like the others.
    part = size / max(size, config.chunk)
    by_scalar = min(size, int(config.pool_shift * part))
    by_pool = min(size, int((config.pool_shift + config.pool_scale) * part))
    if by_pool > 0:
        scaled = nl.ndarray((middle.shape[0], by_pool), dtype=nl.float32, buffer=nl.sbuf)
        if by_scalar > 0:
            nisa.activation(
                dst=scaled[:, 0:by_scalar], op=nl.copy, data=middle[:, 0:by_scalar], scale=factor
            )
        if by_scalar < by_pool:
            # GpSimd has no vector operand: it reads the factor with a step of 0.
            wide = factor.broadcast(1, by_pool - by_scalar)
            nisa.tensor_tensor(
                dst=scaled[:, by_scalar:by_pool],
                data1=middle[:, by_scalar:by_pool],
                data2=wide,
                op=nl.multiply,
                engine=nisa.engine.gpsimd,
            )
    if by_pool < size:
        nisa.scalar_tensor_tensor(
            dst=result[:, by_pool:size],
            data=middle[:, by_pool:size],
            op0=nl.multiply,
            operand0=factor,
            op1=nl.add,
            operand1=shift[:, by_pool:size],
        )
    if by_pool > 0:
        nisa.tensor_tensor(
            dst=result[:, 0:by_pool],
            data1=scaled,
            data2=shift[:, 0:by_pool],
            op=nl.add,
            engine=nisa.engine.gpsimd,
        )


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
