"""Pieces shared by the normalizations: rows on partitions, parameters broadcast over them."""

from __future__ import annotations

import nki.isa as nisa
import nki.language as nl


def row_spans(rows):
    """Return (start, stop) of each tile of rows; the last may be shorter."""
    return spans(0, rows, nl.tile_size.pmax)


def spans(start, stop, size):
    """Cut start .. stop - 1 into pieces of `size`; the last may be shorter."""
    return [(at, min(at + size, stop)) for at in range(start, stop, size)]


def in_step(shares):
    """Return (left, right, engine) of all shares [(spans, engine)], in step with each other.

    With all of one engine's columns before the next one's, the tiles in flight would all wait for
    the slowest engine. Of cuts at one moment the share named first comes first.
    """
    cuts = []
    for share, engine in shares:
        for number in range(len(share)):
            cuts.append(((number + 0.5) / len(share), len(cuts), share[number], engine))
    cuts.sort()
    return [(left, right, engine) for _, _, (left, right), engine in cuts]


def accumulate_rows(op, columns, chunk, total, scale=1.0, bias=None):
    """total[p] = sum over h of op(columns[p, h] * scale + bias[p]), on Scalar, float32.

    The accumulator of Scalar spans the chunks; only the last call reads it out.
    """
    cuts = spans(0, columns.shape[1], chunk)
    for number in range(len(cuts)):
        start, stop = cuts[number]
        result = total if number == len(cuts) - 1 else None
        accumulate_chunk(op, columns[:, start:stop], result, number == 0, scale, bias)


def accumulate_chunk(op, columns, total, first, scale=1.0, bias=None):
    """Add the row sums of op(columns * scale + bias) to Scalar's accumulator, cleared if `first`.

    `total` [rows, 1] receives the accumulator unless it is None. The activated values themselves
    go to a bfloat16 scratch tile: nobody reads them.
    """
    scratch = nl.ndarray(columns.shape, dtype=nl.bfloat16, buffer=nl.sbuf)
    nisa.activation(
        dst=scratch,
        op=op,
        data=columns,
        scale=scale,
        bias=bias,
        reduce_op=nl.add,
        reduce_res=total,
        reduce_cmd=nisa.reduce_cmd.reset_reduce if first else nisa.reduce_cmd.reduce,
    )


def take_rows(sources, tiles, row_tiles, index, config):
    """Return row tile `index` of each source, having issued the loads of the next `ahead` as well.

    `tiles` holds what is loaded so far; call in order of `index`. With a load queue of their own
    (hardware descriptors) loads run ahead by themselves, as far as SBUF has room; behind a store
    in one queue they must be issued before it.
    """
    while len(tiles) < min(index + 1 + config.ahead, len(row_tiles)):
        start, stop = row_tiles[len(tiles)]
        tiles.append([load_rows(source, start, stop, config) for source in sources])
    found = tiles[index]
    tiles[index] = None
    return found


def add_rows(total, rows, config):
    """Store the sum of two tiles [rows, H] to `total`, and return it, rounded to its dtype."""
    first, second = rows
    tile = nl.ndarray(first.shape, dtype=total.dtype, buffer=nl.sbuf)
    for left, right in spans(0, first.shape[1], config.chunk):
        nisa.tensor_tensor(
            dst=tile[:, left:right],
            data1=first[:, left:right],
            data2=second[:, left:right],
            op=nl.add,
        )
        nisa.dma_copy(dst=total[:, left:right], src=tile[:, left:right])
    return tile


def load_rows(x, start, stop, config):
    """Return rows start .. stop - 1 of x [N, H] in SBUF, the first of all piece by piece.

    What reads the first piece starts while the others are on their way. Later rows are loaded ahead
    and lose nothing by it, while each load costs its queue 0.6 us.
    """
    mode = nisa.dge_mode.hwdge if config.hwdge else nisa.dge_mode.unknown
    size = x.shape[1]
    tile = nl.ndarray((stop - start, size), dtype=x.dtype, buffer=nl.sbuf)
    for left, right in spans(0, size, config.piece if start == 0 else size):
        nisa.dma_copy(dst=tile[:, left:right], src=x[start:stop, left:right], dge_mode=mode)
    return tile


def broadcast_rows(vector, rows, config, width=None):
    """Return a [rows, H] tile whose every partition holds `vector` [H], or None for None.

    In pieces of `width` columns, so that the first can be used while the others are on their way.
    """
    if vector is None:
        return None
    size = vector.shape[0]
    tile = nl.ndarray((rows, size), dtype=vector.dtype, buffer=nl.sbuf)
    for cut in spans(0, size, width or size):
        broadcast_columns(tile, vector, cut, config)
    return tile


def weight_rows(weight, rows, cast, width, config):
    """Return the weight on `rows` partitions, for "gemma" 1 more and in float32; None for None."""
    tile = broadcast_rows(weight, rows, config, width)
    if cast != "gemma":
        return tile
    one_more = nl.ndarray(tile.shape, dtype=nl.float32, buffer=nl.sbuf)
    nisa.tensor_scalar(dst=one_more, data=tile, op0=nl.add, operand0=1.0)
    return one_more


def broadcast_columns(tile, vector, cut, config):
    """Copy columns `cut` of `vector` [H], unless it is None, to each partition of `tile` [rows, H].

    One DMA with a step of 0 over the rows. PE could do it from one row (a contraction over K = 1),
    but the eviction from PSUM costs Vector and Scalar more than the DMA costs the queue.
    """
    if vector is not None:
        left, right = cut
        mode = nisa.dge_mode.hwdge if config.hwdge else nisa.dge_mode.unknown
        pattern = [[0, tile.shape[0]], [1, right - left]]
        source = vector.ap(pattern=pattern, offset=left)
        nisa.dma_copy(dst=tile[:, left:right], src=source, dge_mode=mode)
