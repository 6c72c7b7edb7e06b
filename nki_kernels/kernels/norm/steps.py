"""A pipeline over row tiles: they pass its stages chunk by chunk.

At one step of time each stage works at one chunk of another row tile: the engines always have
something of each other's to do, and of the row tiles that are in the making only the chunks between
the first and the last stage that needs them lie in SBUF.
"""

from __future__ import annotations

import nki.isa as nisa
import nki.language as nl

from nki_kernels.kernels.norm.rows import spans


def pipeline(tiles, chunks, offsets, overlap):
    """Return the steps: per step, {stage: (row tile, chunk)} of the stages that have work.

    A stage sees the chunks of a row tile in order, `offsets[stage]` steps after the first stage;
    the last stage of `offsets` is the last one through. Without `overlap` a row tile is through
    before the next one begins, for rows of which SBUF holds no second one.
    """
    last = max(offsets.values())
    period = chunks if overlap else last + chunks
    steps = []
    for time in range((tiles - 1) * period + last + chunks):
        step = {}
        for stage in offsets:
            at = time - offsets[stage]
            tile, chunk = at // period, at % period
            if 0 <= tile < tiles and chunk < chunks:
                step[stage] = (tile, chunk)
        steps.append(step)
    return steps


def backward_offsets(chunks, slack, ahead):
    """Return the stages of a gradient kernel for `pipeline`.

    "multiply" begins when "measure" is through with the row tile, and "write" when "multiply" is,
    with `slack` steps between them for the sums to arrive. Loads run `ahead` chunks before their
    use.
    """
    multiply = chunks + slack + ahead
    return {
        "load_x": 0,
        "measure": ahead,
        "load_dy": multiply - ahead,
        "multiply": multiply,
        "write": multiply + chunks + slack,
    }


def load_chunk(source, rows, columns, config):
    """Return source[rows, columns] in SBUF."""
    return load_pieces(source, rows, columns, columns[1] - columns[0], config)


def load_stages(step, tiles, x, dy, cuts, config):
    """Issue the loads of one step of a gradient kernel."""
    for stage, source, name in (("load_x", x, "x"), ("load_dy", dy, "dy")):
        if stage in step:
            tile, chunk = tiles[step[stage][0]], step[stage][1]
            tile[name].append(load_chunk(source, tile["rows"], cuts[chunk], config))


def load_pieces(source, rows, columns, width, config):
    """Return source[rows, columns] in SBUF, loaded in pieces of `width`, the last one first.

    What reads a piece starts while the others are on their way; the statistics of the last columns
    take longest.
    """
    (start, stop), (left, right) = rows, columns
    mode = nisa.dge_mode.hwdge if config.hwdge else nisa.dge_mode.unknown
    tile = nl.ndarray((stop - start, right - left), dtype=source.dtype, buffer=nl.sbuf)
    cuts = spans(left, right, width)
    for number in range(len(cuts)):
        first, last = cuts[len(cuts) - 1 - number]
        nisa.dma_copy(
            dst=tile[:, first - left : last - left],
            src=source[start:stop, first:last],
            dge_mode=mode,
        )
    return tile


def store_ready(ready, config):
    """Store (destination, chunk) of the step before, if there is one; return None.

    A step late: in one queue with the loads, a store that waits for its chunk holds them back.
    GpSimd's queue has one of its own for stores, but writing descriptors costs GpSimd 0.6 us each.
    """
    if ready is not None:
        mode = nisa.dge_mode.hwdge if config.hwdge else nisa.dge_mode.unknown
        nisa.dma_copy(dst=ready[0], src=ready[1], dge_mode=mode)


def multiply_shared(data1, data2, config):
    """Return data1 * data2 in float32: the leading `config.pool` columns by GpSimd, else Vector."""
    size = data1.shape[1]
    result = nl.ndarray(data1.shape, dtype=nl.float32, buffer=nl.sbuf)
    by_pool = min(config.pool, size)
    for left, right, engine in (
        (0, by_pool, nisa.engine.gpsimd),
        (by_pool, size, nisa.engine.vector),
    ):
        if left < right:
            nisa.tensor_tensor(
                dst=result[:, left:right],
                data1=data1[:, left:right],
                data2=data2[:, left:right],
                op=nl.multiply,
                engine=engine,
            )
    return result


def add_up(columns):
    """Return the sum of each row of a narrow float32 tile, [rows, 1]."""
    if columns.shape[1] == 1:
        return columns
    total = nl.ndarray((columns.shape[0], 1), dtype=nl.float32, buffer=nl.sbuf)
    nisa.tensor_reduce(dst=total, op=nl.add, data=columns, axis=1)
    return total


def multiply_columns(result, data, by, column):
    """result = data * by * column, all [rows, 1]; `by` may be a number.

    A form that has no fast mode: that would wait for GpSimd, which shares Vector's port.
    """
    nisa.scalar_tensor_tensor(
        dst=result, data=data, op0=nl.multiply, operand0=by, op1=nl.multiply, operand1=column
    )
