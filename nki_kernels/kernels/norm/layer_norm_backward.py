"""Gradients of layer normalization over the last axis.

Limits: Vector, Scalar and GpSimd together, in bfloat16 (model, ns per column of a row tile): Vector
1.04 each for s * dy and for dx, 1.24 per column of bn_stats; Scalar 0.83 each for two row sums and
s's part of dx, 1.67 per column of statistics; GpSimd 1.67 each for the two products with the
weight, or Vector 1.04 each. Balanced 3.0, where DMA needs 2.09. With what instructions cost beside
their columns Vector, Scalar and GpSimd are busy 15.0, 15.3 and 13.5 us per [128, 4096]: evenly
shared 14.6, which with 25 us of start, first and last row tile is 55 % of the DMA roofline at
[4096, 4096]. The config reaches 52 (527 us). Row sums on PE would need s and dy with columns on
partitions; dx on PE mixes rows.
"""

from __future__ import annotations

from dataclasses import dataclass

import nki
import nki.isa as nisa
import nki.language as nl

from nki_kernels.kernels.norm.column_sums import (
    collect,
    column_sums,
    store_column_sums,
    sum_columns,
    whole_blocks,
)
from nki_kernels.kernels.norm.moments import (
    measure_moments,
    merge_moments,
    moment_places,
    moments_tile,
    reciprocal_root,
    root_constants,
)
from nki_kernels.kernels.norm.rows import (
    accumulate_chunk,
    broadcast_rows,
    row_spans,
    spans,
)
from nki_kernels.kernels.norm.steps import (
    add_up,
    backward_offsets,
    load_stages,
    multiply_columns,
    multiply_shared,
    pipeline,
    store_ready,
)

#: Steps between the stages. Without one, statistics, products, row sums and dx of neighbouring row
#: tiles are one chain through all engines.
_SLACK = 1

#: Tiles of partial statistics in use at once: those being filled, those waiting for the slack, and
#: those being merged.
_TURNS = 2 + _SLACK


@dataclass(frozen=True)
class LayerNormBackwardConfig(nl.NKIObject):
    """Tuning of layer_norm_backward. No field changes the mathematics.

    Attributes:
        chunk: columns per load, instruction and store, in whole blocks of the column sums.
        pool: leading columns of each chunk whose products with the weight GpSimd forms. Rests on
            GpSimd's assumed rate: 0 keeps it out.
        vector_stats: leading columns of each chunk whose statistics Vector computes (bn_stats); the
            rest go to Scalar in two passes, the second centred on the mean of the first.
        ahead: chunks loaded before they are needed.
        overlap: start a row tile before the one before it is through.
        hwdge: load through the hardware descriptor engine (gen3 and later).
    """

    chunk: int
    pool: int
    vector_stats: int
    ahead: int
    overlap: bool
    hwdge: bool


@nki.jit
def layer_norm_backward(dy, x, weight, eps, out_dtype, config):
    """Gradients of y = s * r * weight + bias, s = x - mean_h(x), r = 1 / sqrt(mean_h(s^2) + eps).

    g[n, h] = dy[n, h] * weight[h]
    dx[n, h] = r[n] * (g[n, h] - mean_h(g[n, :]) - s[n, h] * r[n]^2 * mean_h(g[n, :] * s[n, :]))
    dweight[h] = sum_n(dy[n, h] * s[n, h] * r[n]);  dbias[h] = sum_n(dy[n, h])

    Dimensions:
        N: rows, any. H: row length, bounded by SBUF (the operator's limit).

    Args:
        dy: [N, H] HBM, bfloat16 | float16 | float32.
        x: [N, H] HBM, dtype of dy.
        weight: [H] HBM, dtype of dy, or None for ones.
        eps: added to the variance.
        out_dtype: dtype of the results.
        config: LayerNormBackwardConfig.

    Returns:
        dx [N, H], dweight [H] and dbias [H] HBM, out_dtype; everything is float32 until the one
        rounding, and centred before it is multiplied.

    Data flow: HBM -> SBUF [P, H] -> Scalar and Vector (statistics) -> Vector (s * dy), GpSimd
        (products with the weight) -> PE (dweight, dbias) and Scalar (row sums, s's part of dx)
        -> Vector (dx) -> HBM.
    """
    rows, size = x.shape
    dx = nl.ndarray((rows, size), dtype=out_dtype, buffer=nl.shared_hbm)
    dweight = nl.ndarray((size,), dtype=out_dtype, buffer=nl.shared_hbm)
    dbias = nl.ndarray((size,), dtype=out_dtype, buffer=nl.shared_hbm)
    cuts = spans(0, size, whole_blocks(config.chunk))
    tiles = [{"rows": span, "x": [], "dy": [], "g": []} for span in row_spans(rows)]
    epsilon = root_constants(eps)
    ones = nl.ndarray((nl.tile_size.pmax, 1), dtype=dy.dtype, buffer=nl.sbuf)
    nisa.memset(dst=ones, value=1.0)
    for_weight, for_bias = column_sums(size, 2, nl.sbuf)
    places = moment_places(cuts, config.vector_stats)
    turns = [moments_tile(places) for _ in range(_TURNS)]
    scale = None
    ready = None
    offsets = backward_offsets(len(cuts), _SLACK, config.ahead)
    for step in pipeline(len(tiles), len(cuts), offsets, config.overlap):
        load_stages(step, tiles, x, dy, cuts, config)
        if scale is None and "load_dy" in step:
            # Behind what is needed first.
            scale = broadcast_rows(weight, min(rows, nl.tile_size.pmax), config)
        ready = store_ready(ready, config)
        line = None
        if "write" in step:
            # Before what waits for other engines.
            index, chunk = step["write"]
            line = _line(tiles[index], chunk, size)
        if "measure" in step:
            index, chunk = step["measure"]
            tile = tiles[index]
            tile["stats"] = turns[index % _TURNS][0 : tile["x"][chunk].shape[0], :]
            measure_moments(tile["x"][chunk], places[chunk], tile["stats"])
        if "multiply" in step:
            index, chunk = step["multiply"]
            if chunk == 0:
                # Only now: Vector would wait for Scalar's share of the statistics.
                tile = tiles[index]
                tile["mean"], tile["shifted"] = merge_moments(tile["stats"], epsilon)
            _multiply(tiles[index], chunk, cuts, scale, ones, config)
        if "write" in step:
            index, chunk = step["write"]
            ready = _write(dx, tiles[index], chunk, cuts, line)
            if chunk == len(cuts) - 1:
                collect(for_weight, tiles[index]["for_weight"], size, index == 0)
                collect(for_bias, tiles[index]["for_bias"], size, index == 0)
    store_ready(ready, config)
    store_column_sums(dweight, for_weight)
    store_column_sums(dbias, for_bias)
    return dx, dweight, dbias


def _multiply(tile, chunk, cuts, scale, ones, config):
    """Sum one chunk along the columns, and g and g * (x - mean) along the rows."""
    left, right = cuts[chunk]
    columns, slope = tile["x"][chunk], tile["dy"][chunk]
    rows = columns.shape[0]
    terms = nl.ndarray(columns.shape, dtype=nl.float32, buffer=nl.sbuf)
    nisa.scalar_tensor_tensor(
        dst=terms,
        data=columns,
        op0=nl.subtract,
        operand0=tile["mean"],
        op1=nl.multiply,
        operand1=slope,
    )
    if chunk == 0:
        tile["for_weight"], tile["for_bias"] = column_sums(cuts[-1][1], 2, nl.psum)
        tile["sum_g"] = nl.ndarray((rows, len(cuts)), dtype=nl.float32, buffer=nl.sbuf)
        tile["sum_gs"] = nl.ndarray((rows, len(cuts)), dtype=nl.float32, buffer=nl.sbuf)
    weighted, slopes = terms, slope
    if scale is not None:
        slopes = multiply_shared(slope, scale[0:rows, left:right], config)
    if chunk == 0:
        # Behind a share of GpSimd's that needs no statistics.
        tile["factor"] = reciprocal_root(tile["shifted"])
    if scale is not None:
        weighted = multiply_shared(terms, scale[0:rows, left:right], config)
    sum_columns(tile["for_weight"], terms, left, tile["factor"])
    sum_columns(tile["for_bias"], slope, left, ones[0:rows, :])
    tile["dy"][chunk] = None
    tile["g"].append(slopes)
    accumulate_chunk(nl.copy, slopes, tile["sum_g"][:, chunk : chunk + 1], True)
    accumulate_chunk(nl.copy, weighted, tile["sum_gs"][:, chunk : chunk + 1], True)


def _line(tile, chunk, size):
    """Return the part of dx = r * g + slope * x + offset behind the first sign, in float32.

    slope = -r^3 * mean_h(g * s);  offset = -r * mean_h(g) - slope * mean
    """
    x, mean, factor = tile["x"][chunk], tile["mean"], tile["factor"]
    if chunk == 0:
        slope = nl.ndarray(factor.shape, dtype=nl.float32, buffer=nl.sbuf)
        offset = nl.ndarray(factor.shape, dtype=nl.float32, buffer=nl.sbuf)
        # From the left: r^3 alone may overflow.
        multiply_columns(slope, add_up(tile["sum_gs"]), -1.0 / size, factor)
        multiply_columns(slope, slope, factor, factor)
        multiply_columns(offset, add_up(tile["sum_g"]), -1.0 / size, factor)
        nisa.scalar_tensor_tensor(
            dst=offset,
            data=slope,
            op0=nl.multiply,
            operand0=mean,
            op1=nl.subtract,
            operand1=offset,
            reverse1=True,
        )
        tile["slope"], tile["offset"] = slope, offset
    line = nl.ndarray(x.shape, dtype=nl.float32, buffer=nl.sbuf)
    nisa.activation(dst=line, op=nl.copy, data=x, scale=tile["slope"], bias=tile["offset"])
    return line


def _write(dx, tile, chunk, cuts, line):
    """Form one chunk of dx; return where it belongs, and the chunk."""
    (start, stop), (left, right) = tile["rows"], cuts[chunk]
    result = nl.ndarray(line.shape, dtype=dx.dtype, buffer=nl.sbuf)
    nisa.scalar_tensor_tensor(
        dst=result,
        data=tile["g"][chunk],
        op0=nl.multiply,
        operand0=tile["factor"],
        op1=nl.add,
        operand1=line,
    )
    return dx[start:stop, left:right], result
