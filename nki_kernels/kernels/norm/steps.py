"""The pipeline of the backward kernels: row tiles pass its stages chunk by chunk.

At one step of time each stage works at one chunk of another row tile: the engines always have
something of each other's to do, and of the row tiles that are in the making only the chunks between
the first and the last stage that needs them lie in SBUF.
"""

from __future__ import annotations

import nki.isa as nisa
import nki.language as nl


def pipeline(tiles, chunks, slack, config):
    """Return the steps: per step, {stage: (row tile, chunk)} of the stages that have work.

    A stage sees the chunks of a row tile in order. "multiply" begins when "measure" is through with
    the row tile, and "write" when "multiply" is, with `slack` steps between them for the sums to
    arrive. Loads run `config.ahead` chunks before their use. Without `config.overlap` a row tile is
    through before the next one begins, for rows of which SBUF holds no second one.
    """
    multiply = chunks + slack + config.ahead
    offsets = {
        "load_x": 0,
        "measure": config.ahead,
        "load_dy": multiply - config.ahead,
        "multiply": multiply,
        "write": multiply + chunks + slack,
    }
    period = chunks if config.overlap else offsets["write"] + chunks
    steps = []
    for time in range((tiles - 1) * period + offsets["write"] + chunks):
        step = {}
        for stage in offsets:
            at = time - offsets[stage]
            tile, chunk = at // period, at % period
            if 0 <= tile < tiles and chunk < chunks:
                step[stage] = (tile, chunk)
        steps.append(step)
    return steps


def load_chunk(source, rows, columns, config):
    """Return source[rows, columns] in SBUF."""
    (start, stop), (left, right) = rows, columns
    mode = nisa.dge_mode.hwdge if config.hwdge else nisa.dge_mode.unknown
    tile = nl.ndarray((stop - start, right - left), dtype=source.dtype, buffer=nl.sbuf)
    nisa.dma_copy(dst=tile, src=source[start:stop, left:right], dge_mode=mode)
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
