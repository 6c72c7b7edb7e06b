"""Root-mean-square normalization of short rows, several to a partition.

A row of 128 on each partition leaves every instruction with more fixed cost than work. Side by side
on a partition they share loads, instructions and stores; what is one number per row becomes a
narrow tile [P, rows], read with a step of 0 along the row.
"""

from __future__ import annotations

import nki.isa as nisa
import nki.language as nl

from nki_kernels.kernels.norm.moments import reciprocal_root, shifted_squares
from nki_kernels.kernels.norm.rows import weight_rows


def short_spans(rows, together):
    """Return (start, partitions, rows per partition) of tiles that cover `rows` rows."""
    partitions = nl.tile_size.pmax
    spans = []
    start = 0
    while start < rows:
        left = rows - start
        # As few to a partition as fill the partitions, and what is left over one by one.
        each = min(together, -(-left // partitions))
        count = min(partitions, left // each)
        spans.append((start, count, each))
        start += count * each
    return spans


def rms_norm_short_rows(y, total, sources, weight, epsilon, cast, config):
    """Write the rows of the sum of the sources, normalised and times `weight` [H], to y.

    The sum itself goes to `total`, if there is one. `weight` may be None; `cast` "llama" rounds to
    the dtype of the rows before it. The statistics of a tile go before the rest of the one before:
    Vector never waits for a root.
    """
    spans = short_spans(y.shape[0], config.together)
    tiles = []
    scale = None
    waiting = None
    for index in range(len(spans)):
        # Ahead of the stores that wait in the same queue.
        while len(tiles) < min(index + 2, len(spans)):
            span = spans[len(tiles)]
            tiles.append([_load(source, span, config) for source in sources])
        if index == 0:
            # Behind the first rows: their statistics do not need it.
            most = max(count for _, count, _ in spans)
            scale = weight_rows(weight, most, cast, y.shape[1], config)
        tile = tiles[index][0]
        if total is not None:
            tile = _add(total, spans[index], tiles[index])
        tiles[index] = None
        factor = _factor(tile, epsilon)
        if waiting is not None:
            _write(y, waiting, scale, cast, config)
        waiting = (spans[index], tile, factor)
    _write(y, waiting, scale, cast, config)


def _add(total, span, tiles):
    """Store the sum of two tiles to the rows `span` of `total`, and return it."""
    tile = nl.ndarray(tiles[0].shape, dtype=total.dtype, buffer=nl.sbuf)
    nisa.tensor_tensor(dst=tile, data1=tiles[0], data2=tiles[1], op=nl.add)
    nisa.dma_copy(dst=_rows(total, span), src=tile)
    return tile


def _load(x, span, config):
    """Return the rows of `span` in SBUF, [partitions, rows per partition, H]."""
    _, count, each = span
    tile = nl.ndarray((count, each, x.shape[1]), dtype=x.dtype, buffer=nl.sbuf)
    mode = nisa.dge_mode.hwdge if config.hwdge else nisa.dge_mode.unknown
    nisa.dma_copy(dst=tile, src=_rows(x, span), dge_mode=mode)
    return tile


def _factor(tile, epsilon):
    """Return 1 / sqrt(mean(x^2) + eps) of each row, [partitions, rows per partition]."""
    count, each, size = tile.shape
    squares = nl.ndarray(tile.shape, dtype=nl.float32, buffer=nl.sbuf)
    nisa.activation(dst=squares, op=nl.square, data=tile)
    sums = nl.ndarray((count, each), dtype=nl.float32, buffer=nl.sbuf)
    nisa.tensor_reduce(dst=sums, op=nl.add, data=squares, axis=2)
    return reciprocal_root(shifted_squares(sums, 1.0 / size, epsilon))


def _rows(array, span):
    """Return a tile's rows of `array` [N, H] as [partitions, rows per partition, H]."""
    start, count, each = span
    size = array.shape[1]
    pattern = [[each * size, count], [size, each], [1, size]]
    return array.ap(pattern=pattern, offset=start * size)


def _write(y, waiting, scale, cast, config):
    """Multiply a tile by its factors and by the weight, and store it."""
    span, tile, factor = waiting
    _, count, each = span
    size = tile.shape[2]
    result = nl.ndarray(tile.shape, dtype=y.dtype, buffer=nl.sbuf)
    scaled = result
    if scale is not None:
        middle = tile.dtype if cast == "llama" else nl.float32
        scaled = nl.ndarray(tile.shape, dtype=middle, buffer=nl.sbuf)
    by_vector = each - each * config.scalar // config.together
    if by_vector > 0:
        wide = factor[:, 0:by_vector].expand_dim(2).broadcast(2, size)
        nisa.tensor_tensor(
            dst=scaled[:, 0:by_vector, :], data1=tile[:, 0:by_vector, :], data2=wide, op=nl.multiply
        )
    for row in range(by_vector, each):
        nisa.activation(
            dst=scaled[:, row, :], op=nl.copy, data=tile[:, row, :], scale=factor[:, row : row + 1]
        )
    if scale is not None:
        by_pool = each * config.pool // config.together
        for left, right, engine in (
            (0, by_pool, nisa.engine.gpsimd),
            (by_pool, each, nisa.engine.vector),
        ):
            if left < right:
                weight = scale[0:count, :].expand_dim(1).broadcast(1, right - left)
                nisa.tensor_tensor(
                    dst=result[:, left:right, :],
                    data1=scaled[:, left:right, :],
                    data2=weight,
                    op=nl.multiply,
                    engine=engine,
                )
    # Behind no load, the faster queue.
    last = span[0] + count * each == y.shape[0]
    mode = nisa.dge_mode.hwdge if config.hwdge and last else nisa.dge_mode.unknown
    nisa.dma_copy(dst=_rows(y, span), src=result, dge_mode=mode)
