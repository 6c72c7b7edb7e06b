"""Combine: the weighted sum of each token's rows, back in the order of the tokens.

Rows are gathered one descriptor each, a choice of 128 tokens per DMA; Vector multiplies and adds in
float32. A slot outside the rows is skipped by the DMA and leaves the zeros that were there before.
"""

from __future__ import annotations

import nki
import nki.isa as nisa
import nki.language as nl

from nki_kernels.kernels.moe.tokens import spans


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
    tokens, choices = slots.shape
    y = nl.ndarray((tokens, rows.shape[1]), dtype=out_dtype, buffer=nl.shared_hbm)
    parts = spans(tokens, nl.tile_size.pmax)
    work = [(tile, choice) for tile in range(len(parts)) for choice in range(choices)]
    tables = []
    gathered = []
    total = None
    for at in range(len(work)):
        while len(gathered) < min(len(work), at + 1 + config.ahead):
            tile, choice = work[len(gathered)]
            if choice == 0:
                tables.append(_tables(slots, weights, parts[tile]))
            gathered.append(_gather(rows, tables[tile][0], choice))
        tile, choice = work[at]
        source = gathered[at]
        gathered[at] = None
        last = choice == choices - 1
        result = nl.ndarray(source.shape, dtype=out_dtype if last else nl.float32, buffer=nl.sbuf)
        _add(result, source, tables[tile][1], choice, total)
        total = result
        if last:
            start, stop = parts[tile]
            nisa.dma_copy(dst=y[start:stop, :], src=result)
    return y


def _tables(slots, weights, part):
    """Return slots and weights of a tile of tokens in SBUF."""
    start, stop = part
    choices = slots.shape[1]
    places = nl.ndarray((stop - start, choices), dtype=nl.int32, buffer=nl.sbuf)
    nisa.dma_copy(dst=places, src=slots[start:stop, :])
    if weights is None:
        return places, None
    factors = nl.ndarray((stop - start, choices), dtype=nl.float32, buffer=nl.sbuf)
    nisa.dma_copy(dst=factors, src=weights[start:stop, :])
    return places, factors


def _gather(rows, places, choice):
    """Return the rows of one choice of each token; zeros where its slot is no row."""
    count, size = places.shape[0], rows.shape[1]
    found = nl.ndarray((count, size), dtype=rows.dtype, buffer=nl.sbuf)
    nisa.memset(dst=found, value=0.0, engine=nisa.engine.gpsimd)
    source = rows.ap(
        pattern=[[size, count], [1, size]], vector_offset=places[:, choice : choice + 1]
    )
    nisa.dma_copy(dst=found, src=source, oob_mode=nisa.oob_mode.skip)
    return found


def _add(result, source, factors, choice, total):
    """result = source * factor, plus `total` if there is one before it."""
    factor = 1.0 if factors is None else factors[:, choice : choice + 1]
    if choice == 0:
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
