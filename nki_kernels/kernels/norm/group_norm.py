"""Group normalization: statistics over groups of channels, scaled channel by channel."""

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
from nki_kernels.kernels.norm.rows import row_spans, spans
from nki_kernels.kernels.norm.steps import pipeline, store_ready

#: Tiles of partial statistics in use at once: those being filled and those being merged.
_TURNS = 2


@dataclass(frozen=True)
class GroupNormConfig(nl.NKIObject):
    """Tuning of group_norm. No field changes the mathematics.

    Attributes:
        chunk: elements of a group per load, instruction and store.
        vector_stats: leading elements of each chunk whose statistics Vector computes (bn_stats);
            the rest go to Scalar in two passes, the second centred on the mean of the first.
        ahead: chunks loaded before they are needed.
        overlap: start a tile of groups before the one before it is through.
        hwdge: load through the hardware descriptor engine (gen3 and later).
    """

    chunk: int
    vector_stats: int
    ahead: int
    overlap: bool
    hwdge: bool


@nki.jit
def group_norm(x, weight, bias, groups, eps, out_dtype, config):
    """y[n, c, s] = (x[n, c, s] - mean) / sqrt(var + eps) * weight[c] + bias[c], rounded once.

    mean and var are those of x[n, :, :] over the channels of c's group and all s.

    Dimensions:
        N: batch. C: channels, `groups` times as many as a group has. S: positions.

    Args:
        x: [N, C, S] HBM, bfloat16 | float16 | float32.
        weight: [C] HBM, dtype of x, or None.
        bias: likewise.
        groups: how many groups the channels form.
        eps: added to the variance.
        out_dtype: dtype of the result.
        config: GroupNormConfig.

    Returns:
        [N, C, S] HBM, out_dtype. Statistics are float32 and centred.

    Data flow: a group, contiguous in HBM, to a partition -> Scalar and Vector (statistics) ->
        GpSimd (rstd) -> Vector (x * (rstd * weight) + (bias - mean * rstd * weight), numbers per
        partition) -> HBM.
    Limits: DMA, 1.39 ns per column of 128 groups in bfloat16; Vector and Scalar 0.9 with half of
        the statistics each. Fewer than 128 groups leave partitions empty, and 16 DMA engines too.
    """
    batch, channels, positions = x.shape
    y = nl.ndarray(x.shape, dtype=out_dtype, buffer=nl.shared_hbm)
    size = channels // groups * positions
    cuts = spans(0, size, config.chunk)
    tiles = [{"rows": span, "x": []} for span in row_spans(batch * groups)]
    epsilon = root_constants(eps)
    places = moment_places(cuts, config.vector_stats)
    turns = [moments_tile(places) for _ in range(min(_TURNS, len(tiles)))]
    parameters = {}
    ready = None
    offsets = {"load": 0, "measure": config.ahead, "write": config.ahead + len(cuts)}
    for step in pipeline(len(tiles), len(cuts), offsets, config.overlap):
        if "load" in step:
            index, chunk = step["load"]
            tiles[index]["x"].append(_load(x, tiles[index]["rows"], cuts[chunk], size, config))
        ready = store_ready(ready, config)
        if "measure" in step:
            index, chunk = step["measure"]
            columns = tiles[index]["x"][chunk]
            tiles[index]["stats"] = turns[index % _TURNS][0 : columns.shape[0], :]
            measure_moments(columns, places[chunk], tiles[index]["stats"])
        if "write" in step:
            index, chunk = step["write"]
            ready = _write(y, tiles[index], chunk, cuts[chunk], size, positions)
        if "measure" in step and step["measure"][1] == len(cuts) - 1:
            # Behind the tile before: Vector would wait for Scalar's share.
            tile = tiles[step["measure"][0]]
            mean, shifted = merge_moments(tile["stats"], epsilon)
            vectors = _parameters(parameters, weight, bias, groups, channels, tile["rows"], config)
            tile["line"] = _line(mean, reciprocal_root(shifted), vectors)
    store_ready(ready, config)
    return y


def _view(array, rows, cut, size):
    """Return elements `cut` of the groups `rows` of an array [N, C, S], [groups, elements]."""
    (start, stop), (left, right) = rows, cut
    pattern = [[size, stop - start], [1, right - left]]
    return array.ap(pattern=pattern, offset=start * size + left)


def _load(x, rows, cut, size, config):
    """Return elements `cut` of the groups `rows` in SBUF."""
    mode = nisa.dge_mode.hwdge if config.hwdge else nisa.dge_mode.unknown
    tile = nl.ndarray((rows[1] - rows[0], cut[1] - cut[0]), dtype=x.dtype, buffer=nl.sbuf)
    nisa.dma_copy(dst=tile, src=_view(x, rows, cut, size), dge_mode=mode)
    return tile


def _parameters(found, weight, bias, groups, channels, rows, config):
    """Return weight and bias of the groups `rows`, [rows, channels of a group] each or None.

    `found` remembers them by the first group: tiles of whole batches begin with the same one.
    """
    start, stop = rows
    key = (start % groups, stop - start)
    if key not in found:
        found[key] = [
            _group_rows(vector, groups, channels // groups, rows, config)
            for vector in (weight, bias)
        ]
    return found[key]


def _group_rows(vector, groups, each, rows, config):
    """Return the numbers of the groups `rows`, [rows, each]; groups repeat over the batch."""
    if vector is None:
        return None
    start, stop = rows
    mode = nisa.dge_mode.hwdge if config.hwdge else nisa.dge_mode.unknown
    tile = nl.ndarray((stop - start, each), dtype=vector.dtype, buffer=nl.sbuf)
    at = start
    while at < stop:
        group = at % groups
        count = min(groups - group, stop - at)
        source = vector.ap(pattern=[[each, count], [1, each]], offset=group * each)
        nisa.dma_copy(dst=tile[at - start : at - start + count, :], src=source, dge_mode=mode)
        at += count
    return tile


def _line(mean, factor, vectors):
    """Return slope and offset of y = slope * x + offset, [rows, channels of a group or 1] float32.

    slope = rstd * weight;  offset = bias - mean * slope
    """
    weight, bias = vectors
    known = weight if weight is not None else bias
    each = 1 if known is None else known.shape[1]
    slope = factor.broadcast(1, each)
    if weight is not None:
        slope = nl.ndarray(weight.shape, dtype=nl.float32, buffer=nl.sbuf)
        nisa.tensor_scalar(dst=slope, data=weight, op0=nl.multiply, operand0=factor)
    offset = nl.ndarray((mean.shape[0], each), dtype=nl.float32, buffer=nl.sbuf)
    if bias is None:
        nisa.tensor_scalar(
            dst=offset, data=slope, op0=nl.multiply, operand0=mean, op1=nl.multiply, operand1=-1.0
        )
    else:
        nisa.scalar_tensor_tensor(
            dst=offset,
            data=slope,
            op0=nl.multiply,
            operand0=mean,
            op1=nl.subtract,
            operand1=bias,
            reverse1=True,
        )
    return slope, offset


def _write(y, tile, chunk, cut, size, positions):
    """Form one chunk of y, channel by channel; return where it belongs, and the chunk."""
    slope, offset = tile["line"]
    columns = tile["x"][chunk]
    tile["x"][chunk] = None
    result = nl.ndarray(columns.shape, dtype=y.dtype, buffer=nl.sbuf)
    left, right = cut
    width = positions if offset.shape[1] > 1 else size
    for channel in range(left // width, -(-right // width)):
        start = max(left, channel * width) - left
        stop = min(right, (channel + 1) * width) - left
        nisa.tensor_scalar(
            dst=result[:, start:stop],
            data=columns[:, start:stop],
            op0=nl.multiply,
            operand0=slope[:, channel : channel + 1],
            op1=nl.add,
            operand1=offset[:, channel : channel + 1],
        )
    return _view(y, tile["rows"], cut, size), result
