"""Gradients of root-mean-square normalization over the last axis."""

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
from nki_kernels.kernels.norm.moments import reciprocal_root, root_constants, shifted_squares
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

#: Steps between the stages: the row sums are ready when Vector and GpSimd are, and chunks of 4096
#: columns are worth more than room for one more (model: 395 against 436 us at [4096, 4096]).
_SLACK = 0


@dataclass(frozen=True)
class RmsNormBackwardConfig(nl.NKIObject):
    """Tuning of rms_norm_backward. No field changes the mathematics.

    Attributes:
        chunk: columns per load, instruction and store, in whole blocks of the column sums.
        pool: leading columns of each chunk whose products GpSimd forms. Rests on GpSimd's assumed
            rate: 0 keeps it out.
        ahead: chunks loaded before they are needed.
        overlap: start a row tile before the one before it is through.
        hwdge: load through the hardware descriptor engine (gen3 and later).
    """

    chunk: int
    pool: int
    ahead: int
    overlap: bool
    hwdge: bool


@nki.jit
def rms_norm_backward(dy, x, weight, eps, out_dtype, config):
    """Gradients of y[n, h] = x[n, h] * r[n] * weight[h], r[n] = 1 / sqrt(mean_h(x[n, :]^2) + eps).

    dx[n, h] = r[n] * dy[n, h] * weight[h] - x[n, h] * r[n]^2 * m[n]
    m[n] = r[n] * mean_h(dy[n, :] * weight * x[n, :])
    dweight[h] = sum_n(dy[n, h] * x[n, h] * r[n])

    Dimensions:
        N: rows, any. H: row length, bounded by SBUF (the operator's limit).

    Args:
        dy: [N, H] HBM, bfloat16 | float16 | float32.
        x: [N, H] HBM, dtype of dy.
        weight: [H] HBM, dtype of dy, or None for ones.
        eps: added to the mean square.
        out_dtype: dtype of the results.
        config: RmsNormBackwardConfig.

    Returns:
        dx [N, H] and dweight [H] HBM, out_dtype; everything is float32 until the one rounding.

    Data flow: HBM -> SBUF [P, H] -> Scalar (r), Vector and GpSimd (dy * x, times weight) -> PE
        (dweight) and Scalar (m) -> Vector (dx) -> HBM.
    Limits: Vector and GpSimd together: four two-input passes, each 1.04 ns per column and row tile
        on Vector and, for the two that GpSimd can run, 1.67 there. Balanced that is 2.57 ns, where
        DMA needs 2.09, Scalar 1.67 and PE 1.67 (float32 weights). With what instructions cost
        beside their columns Vector and GpSimd are busy 11.3 and 11.0 us per [128, 4096], which with
        25 us of start, first and last row tile is 72 % of the DMA roofline at [4096, 4096]. The
        config reaches 67 (408 us).
    """
    rows, size = x.shape
    dx = nl.ndarray((rows, size), dtype=out_dtype, buffer=nl.shared_hbm)
    dweight = nl.ndarray((size,), dtype=out_dtype, buffer=nl.shared_hbm)
    cuts = spans(0, size, whole_blocks(config.chunk))
    tiles = [{"rows": span, "x": [], "dy": []} for span in row_spans(rows)]
    (sums,) = column_sums(size, 1, nl.sbuf)
    epsilon = root_constants(eps)
    scale = None
    ready = None
    offsets = backward_offsets(len(cuts), _SLACK, config.ahead)
    for step in pipeline(len(tiles), len(cuts), offsets, config.overlap):
        load_stages(step, tiles, x, dy, cuts, config)
        if scale is None and "load_dy" in step:
            # Behind what is needed first.
            scale = broadcast_rows(weight, min(rows, nl.tile_size.pmax), config)
        ready = store_ready(ready, config)
        if "measure" in step:
            index, chunk = step["measure"]
            _measure(tiles[index], chunk, cuts, size, epsilon)
        if "multiply" in step:
            index, chunk = step["multiply"]
            _multiply(tiles[index], chunk, cuts, scale, config)
        if "write" in step:
            index, chunk = step["write"]
            ready = _write(dx, tiles[index], chunk, cuts, scale)
            if chunk == len(cuts) - 1:
                collect(sums, tiles[index]["sums"], size, index == 0)
    store_ready(ready, config)
    store_column_sums(dweight, sums)
    return dx, dweight


def _measure(tile, chunk, cuts, size, epsilon):
    """Sum the squares of one chunk; behind the last one, r = 1 / sqrt(mean(x^2) + eps)."""
    columns = tile["x"][chunk]
    rows = columns.shape[0]
    if chunk == 0:
        tile["squares"] = nl.ndarray((rows, len(cuts)), dtype=nl.float32, buffer=nl.sbuf)
    accumulate_chunk(nl.square, columns, tile["squares"][:, chunk : chunk + 1], True)
    if chunk == len(cuts) - 1:
        tile["shifted"] = shifted_squares(add_up(tile["squares"]), 1.0 / size, epsilon)


def _multiply(tile, chunk, cuts, scale, config):
    """Sum one chunk of dy * x * r along the columns, and dy * x * weight along the rows."""
    left, right = cuts[chunk]
    columns = tile["x"][chunk]
    rows = columns.shape[0]
    terms = multiply_shared(tile["dy"][chunk], columns, config)
    if chunk == 0:
        # Behind GpSimd's share, which would wait for it.
        tile["factor"] = reciprocal_root(tile["shifted"])
        (tile["sums"],) = column_sums(cuts[-1][1], 1, nl.psum)
        tile["inner"] = nl.ndarray((rows, len(cuts)), dtype=nl.float32, buffer=nl.sbuf)
    sum_columns(tile["sums"], terms, left, tile["factor"])
    weighted = terms
    if scale is not None:
        weighted = multiply_shared(terms, scale[0:rows, left:right], config)
    accumulate_chunk(nl.copy, weighted, tile["inner"][:, chunk : chunk + 1], True)


def _write(dx, tile, chunk, cuts, scale):
    """Form one chunk of dx; return where it belongs, and the chunk."""
    (start, stop), (left, right) = tile["rows"], cuts[chunk]
    dy, x, factor = tile["dy"][chunk], tile["x"][chunk], tile["factor"]
    if chunk == 0:
        # -r^3 * inner / size, from the left: r^3 alone may overflow.
        slope = nl.ndarray(factor.shape, dtype=nl.float32, buffer=nl.sbuf)
        multiply_columns(slope, add_up(tile["inner"]), -1.0 / dx.shape[1], factor)
        multiply_columns(slope, slope, factor, factor)
        tile["slope"] = slope
    scaled = nl.ndarray(x.shape, dtype=nl.float32, buffer=nl.sbuf)
    if scale is None:
        nisa.activation(dst=scaled, op=nl.copy, data=dy, scale=factor)
    else:
        nisa.scalar_tensor_tensor(
            dst=scaled,
            data=dy,
            op0=nl.multiply,
            operand0=factor,
            op1=nl.multiply,
            operand1=scale[0 : stop - start, left:right],
        )
    result = nl.ndarray(x.shape, dtype=dx.dtype, buffer=nl.sbuf)
    nisa.scalar_tensor_tensor(
        dst=result,
        data=x,
        op0=nl.multiply,
        operand0=tile["slope"],
        op1=nl.add,
        operand1=scaled,
    )
    return dx[start:stop, left:right], result
