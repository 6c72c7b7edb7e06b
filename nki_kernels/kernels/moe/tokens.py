"""Pieces shared by the kernels of the mixture of experts: spans, x^T, weights, constants."""

from __future__ import annotations

import nki.isa as nisa
import nki.language as nl


def spans(extent, size):
    """Return (start, stop) of pieces of `size`; the last may be shorter."""
    return [(start, min(start + size, extent)) for start in range(0, extent, size)]


def queue(config):
    """Return the descriptor mode of plain loads."""
    return nisa.dge_mode.hwdge if config.hwdge else nisa.dge_mode.unknown


def token_views(tensor):
    """Return (HBM view, rows, columns on chip) of tokens on partitions, tile after tile.

    All whole tiles make one view, [partition, tile, choice]; a shorter last tile another.
    """
    tokens, choices = tensor.shape
    pmax = nl.tile_size.pmax
    whole = tokens // pmax
    views = []
    if whole > 0:
        pattern = [[choices, pmax], [pmax * choices, whole], [1, choices]]
        views.append((tensor.ap(pattern=pattern), pmax, (0, whole * choices)))
    if tokens % pmax:
        rest = tensor[whole * pmax : tokens, :]
        views.append((rest, tokens % pmax, (whole * choices, (whole + 1) * choices)))
    return views


def load_weight(weight, config):
    """Return weight [H, E] in SBUF, one tile per slice of the contraction."""
    tiles = []
    for start, stop in spans(weight.shape[0], nl.tile_size.pmax):
        tile = nl.ndarray((stop - start, weight.shape[1]), dtype=weight.dtype, buffer=nl.sbuf)
        nisa.dma_copy(dst=tile, src=weight[start:stop, :], dge_mode=queue(config))
        tiles.append(tile)
    return tiles


def transposed_tokens(x, block, config):
    """Return x[block]^T, one tile [slice of H, tokens] per slice of the contraction."""
    start, stop = block
    slices = spans(x.shape[1], nl.tile_size.pmax)
    tiles = [
        nl.ndarray((right - left, stop - start), dtype=x.dtype, buffer=nl.sbuf)
        for left, right in slices
    ]
    if config.transpose == "dma":
        for number in range(len(slices)):
            left, right = slices[number]
            nisa.dma_transpose(dst=tiles[number], src=x[start:stop, left:right])
        return tiles
    for first, last in spans(stop - start, nl.tile_size.pmax):
        rows = nl.ndarray((last - first, x.shape[1]), dtype=x.dtype, buffer=nl.sbuf)
        nisa.dma_copy(dst=rows, src=x[start + first : start + last, :], dge_mode=queue(config))
        for number in range(len(slices)):
            left, right = slices[number]
            turn(tiles[number][:, first:last], rows[:, left:right])
    return tiles


def turn(result, rows):
    """result = rows^T, on PE through PSUM."""
    # gen2 transposes through a matmul, whose result is float32.
    gen2 = nisa.get_nc_version() == nisa.nc_version.gen2
    psum = nl.ndarray(result.shape, dtype=nl.float32 if gen2 else rows.dtype, buffer=nl.psum)
    nisa.nc_transpose(dst=psum, data=rows, engine=nisa.engine.tensor)
    nisa.tensor_copy(dst=result, src=psum, engine=nisa.engine.vector)


def turn_slices(rows):
    """Return rows^T [H, rows], one view per slice of H, in SBUF; PE fills a bank per eviction."""
    count, size = rows.shape
    pmax = nl.tile_size.pmax
    slices = spans(size, pmax)
    result = nl.ndarray((min(size, pmax), len(slices) * count), dtype=rows.dtype, buffer=nl.sbuf)
    gen2 = nisa.get_nc_version() == nisa.nc_version.gen2
    dtype = nl.float32 if gen2 else rows.dtype
    narrow = dtype not in (nl.float32, "float32")
    per_bank = max(1, nl.tile_size.psum_fmax * (2 if narrow else 1) // count)
    whole = size // pmax
    for first, last in spans(whole, per_bank):
        bank = nl.ndarray((pmax, (last - first) * count), dtype=dtype, buffer=nl.psum)
        for number in range(first, last):
            at = (number - first) * count
            left, right = slices[number]
            nisa.nc_transpose(
                dst=bank[:, at : at + count], data=rows[:, left:right], engine=nisa.engine.tensor
            )
        nisa.tensor_copy(
            dst=result[:, first * count : last * count], src=bank, engine=nisa.engine.vector
        )
    if size > whole * pmax:
        turn(result[0 : size - whole * pmax, whole * count :], rows[:, whole * pmax :])
    return [
        result[0 : slices[number][1] - slices[number][0], number * count : (number + 1) * count]
        for number in range(len(slices))
    ]


def turn_columns(columns):
    """Turn slices of rows, on PE; Vector empties a bank of several at once.

    Args:
        columns: for each slice its views [rows, size], of equal size; only the last may be smaller.

    Returns:
        [size, all rows] in SBUF for each slice.
    """
    if len(columns) == 0:
        return []
    size, dtype = columns[0][0].shape[1], columns[0][0].dtype
    width = sum([view.shape[0] for view in columns[0]])
    # gen2 transposes through a matmul, whose result is float32.
    gen2 = nisa.get_nc_version() == nisa.nc_version.gen2
    wide = gen2 or dtype in (nl.float32, "float32")
    per_bank = max(1, nl.tile_size.psum_fmax * (1 if wide else 2) // width)
    results = []
    whole = len(columns) if columns[-1][0].shape[1] == size else len(columns) - 1
    groups = spans(whole, per_bank)
    if whole < len(columns):
        groups.append((whole, len(columns)))
    for first, last in groups:
        shape = (columns[first][0].shape[1], (last - first) * width)
        bank = nl.ndarray(shape, dtype=nl.float32 if wide else dtype, buffer=nl.psum)
        at = 0
        for number in range(first, last):
            for view in columns[number]:
                place = bank[:, at : at + view.shape[0]]
                nisa.nc_transpose(dst=place, data=view, engine=nisa.engine.tensor)
                at += view.shape[0]
        turned = nl.ndarray(shape, dtype=dtype, buffer=nl.sbuf)
        nisa.tensor_copy(dst=turned, src=bank, engine=nisa.engine.vector)
        for number in range(last - first):
            results.append(turned[:, number * width : (number + 1) * width])
    return results
