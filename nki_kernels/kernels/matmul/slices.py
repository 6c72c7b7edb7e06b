"""Pieces of every matrix product: spans, slices of an operand with the contraction on partitions.

An operand is stored `flipped` when its contraction runs along rows, A [M, K] and B [N, K]: its
slices must be transposed on the way in. The others, A [K, M] and B [K, N], are loaded as they are.
"""

from __future__ import annotations

import nki.isa as nisa
import nki.language as nl


def spans(extent, size):
    """Cut 0 .. extent - 1 into pieces (start, stop) of `size`; the last may be shorter."""
    return [(start, min(start + size, extent)) for start in range(0, extent, size)]


def matrix(x, batch):
    """Return matrix `batch` of x [B, rows, columns], or x itself when it has no batch axis."""
    return x if len(x.shape) == 2 else x[batch]


def in_passes(arrays, rows, each, work):
    """Call work({name: part}) for the rows of some arrays, many of them by a device loop.

    More rows than two passes of `each` are walked by the loop, whose body is written once, and what
    it leaves stands behind it; two passes are written out, for a loop empties the engines at the
    end of each, which costs 20 us. An `each` of 0 writes everything out.

    Args:
        arrays: {name: (tensor in HBM, the axis of its rows: 0 or 1)}, or None for an absent one.
        rows: extent of that axis.
        each: rows of a pass.
        work: function of the parts, by name.
    """
    given = {name: entry for name, entry in arrays.items() if entry is not None}
    absent = {name: None for name in arrays if name not in given}
    start = 0
    if 0 < 2 * each < rows:
        passes = rows // each
        start = passes * each
        many = {}
        for name, (whole, axis) in given.items():
            part = _rows(whole, axis, 0, start)
            many[name] = (part.reshape_dim(axis, (passes, each)), axis)

        def body(index):
            work({name: part.select(axis, index) for name, (part, axis) in many.items()} | absent)

        nl.fori_loop(0, passes, body)
    if start < rows:
        rest = {name: _rows(x, axis, start, rows) for name, (x, axis) in given.items()}
        work(rest | absent)


def _rows(x, axis, start, stop):
    return x[start:stop] if axis == 0 else x[:, start:stop]


def mode_of(config):
    """Return the descriptor engine of plain copies."""
    return nisa.dge_mode.hwdge if config.hwdge else nisa.dge_mode.unknown


def load_slice(x, k, columns, flipped, config):
    """Start to load x[k, columns] ([columns, k] when flipped).

    Returns:
        {"tile": [k, columns] or None, "rows": the row tiles PE has yet to transpose}.
    """
    (k_start, k_stop), (start, stop) = k, columns
    if flipped and config.transpose == "pe":
        rows = []
        for left, right in spans(stop - start, nl.tile_size.gemm_stationary_fmax):
            tile = nl.ndarray((right - left, k_stop - k_start), dtype=x.dtype, buffer=nl.sbuf)
            source = x[start + left : start + right, k_start:k_stop]
            nisa.dma_copy(dst=tile, src=source, dge_mode=mode_of(config))
            rows.append(tile)
        return {"tile": None, "rows": rows}
    tile = nl.ndarray((k_stop - k_start, stop - start), dtype=x.dtype, buffer=nl.sbuf)
    if flipped:
        nisa.dma_transpose(dst=tile, src=x[start:stop, k_start:k_stop])
    else:
        source = x[k_start:k_stop, start:stop]
        nisa.dma_copy(dst=tile, src=source, dge_mode=mode_of(config))
    return {"tile": tile, "rows": []}


def load_pairs(x, k, columns, flipped, config):
    """Start to load x[k, columns] of 1-byte elements for double row: `load_slice`'s result.

    The tile is a view [pairs, 2, columns]: partition i holds rows 2 i and 2 i + 1 of the slice. A
    DMA transposes elements of 2 bytes, and the two of a pair are one such element of a flipped
    operand.
    """
    (k_start, k_stop), (start, stop) = k, columns
    pairs, width = (k_stop - k_start) // 2, stop - start
    if flipped:
        both = nl.ndarray((pairs, width), dtype=nl.uint16, buffer=nl.sbuf)
        source = x.view(nl.uint16)[start:stop, k_start // 2 : k_stop // 2]
        nisa.dma_transpose(dst=both, src=source)
        tile = both.view(x.dtype).reshape_dim(1, (width, 2)).permute((0, 2, 1))
    else:
        tile = nl.ndarray((pairs, 2, width), dtype=x.dtype, buffer=nl.sbuf)
        source = x[k_start:k_stop, start:stop].reshape_dim(0, (pairs, 2))
        nisa.dma_copy(dst=tile, src=source, dge_mode=mode_of(config))
    return {"tile": tile, "rows": []}


def ready_slice(found):
    """Return the tile of `load_slice`, transposed by PE a bank at a time where no DMA did."""
    if found["tile"] is not None:
        return found["tile"]
    rows = found["rows"]
    dtype, k_size = rows[0].dtype, rows[0].shape[1]
    # gen2 transposes through a matmul, whose result is float32.
    psum_dtype = nl.float32 if nisa.get_nc_version() == nisa.nc_version.gen2 else dtype
    width = sum([tile.shape[0] for tile in rows])
    result = nl.ndarray((k_size, width), dtype=dtype, buffer=nl.sbuf)
    per_bank = nl.tile_size.gemm_moving_fmax // nl.tile_size.gemm_stationary_fmax
    at = 0
    for first, last in spans(len(rows), per_bank):
        group = rows[first:last]
        size = sum([tile.shape[0] for tile in group])
        flipped = nl.ndarray((k_size, size), dtype=psum_dtype, buffer=nl.psum)
        start = 0
        for tile in group:
            stop = start + tile.shape[0]
            nisa.nc_transpose(dst=flipped[:, start:stop], data=tile, engine=nisa.engine.tensor)
            start = stop
        destination = result[:, at : at + size]
        nisa.tensor_copy(dst=destination, src=flipped, engine=nisa.engine.vector)
        at += size
    found["tile"] = result
    return result
