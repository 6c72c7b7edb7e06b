"""Combine: the weighted sum of each token's rows, back in the order of the tokens.

Rows are gathered one descriptor each, a choice of 128 tokens per DMA; Vector multiplies and adds in
float32. A slot outside the rows is skipped by the DMA and leaves the zeros that were there before.
"""

from __future__ import annotations

import nki
import nki.isa as nisa
import nki.language as nl

from nki_kernels.kernels.moe.tokens import queue, spans, token_views


@nki.jit
def combine(rows, slots, weights, out_dtype, config):
    """Add up each token's rows, weighted.

    y[t] = sum over k of weights[t, k] * rows[slots[t, k]], without k whose slot is no row

    Dimensions:
        S, T, H, K >= 1.

    Args:
        rows: [S, H] HBM, bfloat16 | float16 | float32.
        slots: [T, K] HBM, int32; below 0 or from S on: absent.
        weights: [T, K] HBM, float32, or None for ones.
        out_dtype: dtype of the result.
        config: DispatchConfig.

    Returns:
        [T, H] HBM, out_dtype, rounded once.
    Data flow: HBM rows -> SBUF by slot -> weighted sums on Vector -> HBM.
    """
    y = nl.ndarray((slots.shape[0], rows.shape[1]), dtype=out_dtype, buffer=nl.shared_hbm)
    places = token_columns(slots, nl.int32)
    add_rows(y, rows, places, weights, config)
    return y


def token_columns(tensor, dtype):
    """Return a tensor [T, K] in SBUF, [pmax, tiles * K]: token tile * pmax + p on partition p."""
    tokens, choices = tensor.shape
    pmax = nl.tile_size.pmax
    tile = nl.ndarray((pmax, -(-tokens // pmax) * choices), dtype=dtype, buffer=nl.sbuf)
    for view, count, (left, right) in token_views(tensor):
        nisa.dma_copy(dst=tile[0:count, left:right], src=view)
    return tile


def add_rows(y, rows, places, weights, config):
    """y[t] = sum over k of weights[t, k] * rows[places of t, k]; `places` as `token_columns`."""
    tokens = y.shape[0]
    factors = None if weights is None else token_columns(weights, nl.float32)
    parts = spans(tokens, nl.tile_size.pmax)
    choices = places.shape[1] // len(parts)
    zeros = None
    if nisa.get_nc_version() != nisa.nc_version.gen2:
        zeros = nl.ndarray((nl.tile_size.pmax, rows.shape[1]), dtype=rows.dtype, buffer=nl.sbuf)
        nisa.memset(dst=zeros, value=0.0)
    work = [(tile, choice) for tile in range(len(parts)) for choice in range(choices)]
    gathered = []
    total = None
    for at in range(len(work)):
        while len(gathered) < min(len(work), at + 1 + config.ahead):
            tile, choice = work[len(gathered)]
            start, stop = parts[tile]
            column = tile * choices + choice
            gathered.append(_gather(rows, places[0 : stop - start, column : column + 1], zeros))
        tile, choice = work[at]
        source = gathered[at]
        gathered[at] = None
        last = choice == choices - 1
        result = nl.ndarray(source.shape, dtype=y.dtype if last else nl.float32, buffer=nl.sbuf)
        column = tile * choices + choice
        factor = 1.0 if factors is None else factors[0 : source.shape[0], column : column + 1]
        _add(result, source, factor, None if choice == 0 else total)
        total = result
        if last:
            start, stop = parts[tile]
            nisa.dma_copy(dst=y[start:stop, :], src=result, dge_mode=queue(config))


def _gather(rows, places, zeros):
    """Return the rows at the places of one choice of each token; zeros where a place is no row.

    Scalar brings the zeros: it has nothing else to do, and GpSimd's queue of gathers limits.
    """
    count, size = places.shape[0], rows.shape[1]
    found = nl.ndarray((count, size), dtype=rows.dtype, buffer=nl.sbuf)
    if zeros is None:
        nisa.memset(dst=found, value=0.0, engine=nisa.engine.vector)
    else:
        nisa.tensor_copy(dst=found, src=zeros[0:count, :], engine=nisa.engine.scalar)
    source = rows.ap(pattern=[[size, count], [1, size]], vector_offset=places)
    nisa.dma_copy(dst=found, src=source, oob_mode=nisa.oob_mode.skip)
    return found


def _add(result, source, factor, total):
    """result = source * factor, plus `total` if there is one before it."""
    if total is None:
        nisa.tensor_scalar(dst=result, data=source, op0=nl.multiply, operand0=factor)
        return
    nisa.scalar_tensor_tensor(
        dst=result,
        data=source,
        op0=nl.multiply,
        operand0=factor,
        op1=nl.add,
        operand1=total,
    )
