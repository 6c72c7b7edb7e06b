"""Dispatch: where each (token, choice) stands when they are sorted by expert, and the rows there.

A stable sort by counting. Of each tile of tokens, M[token, e] is how often the token names expert
e; PE adds up M over the tokens before a token (a product with a strict triangle of ones, on top of
the sums of all earlier tiles, in one group of PSUM), and GpSimd picks each token's own experts from
that row. The place of an expert's first row is a scan over the counts, which the same group holds
when the last tile is through. Absent choices (an id below 0 or from E on) are an expert E of their
own: their rows come last, so that every row of the result is written once.

Moving the rows limits: DMA writes T * K rows, one descriptor each, which GpSimd prepares.
"""

from __future__ import annotations

from dataclasses import dataclass

import nki
import nki.isa as nisa
import nki.language as nl

from nki_kernels.kernels.moe.tokens import queue, spans, token_views


@dataclass(frozen=True)
class DispatchConfig(nl.NKIObject):
    """Tuning of dispatch and combine. No field changes a result.

    Attributes:
        ahead: tiles of rows loaded before they are needed.
        hwdge: load through the hardware descriptor engine (gen3 and later).
    """

    ahead: int
    hwdge: bool


@nki.jit
def dispatch(x, indices, experts, config):
    """Copy each token's row to its places in the order of the experts.

    rows[slots[t, k]] = x[t]; offsets[e] = how many choices name experts 0 .. e

    Dimensions:
        T, H, K, E >= 1; T * K < 2^24, which float32 counts exactly.

    Args:
        x: [T, H] HBM, bfloat16 | float16 | float32.
        indices: [T, K] HBM, int32; below 0 or from `experts` on: absent.
        experts: E.
        config: DispatchConfig.

    Returns:
        rows [T * K, H] of x's dtype, slots [T, K] int32 (T * K for absent ones), offsets [E] int32.
    Data flow: indices -> SBUF -> counts in PSUM -> slots in SBUF -> HBM; x -> SBUF -> rows.
    """
    tokens, choices = indices.shape
    total = tokens * choices
    rows = nl.ndarray((total, x.shape[1]), dtype=x.dtype, buffer=nl.shared_hbm)
    slots = nl.ndarray((tokens, choices), dtype=nl.int32, buffer=nl.shared_hbm)
    offsets = nl.ndarray((experts,), dtype=nl.int32, buffer=nl.shared_hbm)
    ids, valid = load_ids(indices, experts)
    parts = spans(tokens, nl.tile_size.pmax)
    places = nl.ndarray(ids["number"].shape, dtype=nl.float32, buffer=nl.sbuf)
    sums = rank(places, ids, parts, experts)
    ends = nl.ndarray(sums.shape, dtype=nl.float32, buffer=nl.sbuf)
    _add_first_places(places, ids, sums, ends)
    _store_offsets(offsets, ends)
    exact = nl.ndarray(places.shape, dtype=nl.int32, buffer=nl.sbuf)
    nisa.tensor_copy(dst=exact, src=places)
    _store_slots(slots, places, valid, total)
    _scatter(rows, x, exact, parts, choices, config)
    return rows, slots, offsets


def _tile(rows, columns, dtype=nl.float32):
    return nl.ndarray((rows, columns), dtype=dtype, buffer=nl.sbuf)


def load_ids(indices, experts):
    """Return the expert of each choice, float32 and uint32, `experts` for absent ones; and 1 or 0.

    Rows beyond the last token are absent too: their places are behind all others.
    """
    tokens, choices = indices.shape
    pmax = nl.tile_size.pmax
    width = -(-tokens // pmax) * choices
    raw = _tile(pmax, width, nl.int32)
    if tokens % pmax:
        nisa.memset(dst=raw, value=experts)
    for view, rows, (left, right) in token_views(indices):
        nisa.dma_copy(dst=raw[0:rows, left:right], src=view)
    below, valid, number = _tile(pmax, width), _tile(pmax, width), _tile(pmax, width)
    nisa.tensor_scalar(dst=below, data=raw, op0=nl.less, operand0=float(experts))
    nisa.scalar_tensor_tensor(
        dst=valid,
        data=raw,
        op0=nl.greater_equal,
        operand0=0.0,
        op1=nl.multiply,
        operand1=below,
    )
    _valid_or(number, raw, valid, experts)
    index = _tile(pmax, width, nl.uint32)
    nisa.tensor_copy(dst=index, src=number)
    return {"number": number, "index": index, "choices": choices}, valid


def _valid_or(result, values, valid, other):
    """result = values where valid is 1, `other` where it is 0: (values - other) * valid + other."""
    nisa.scalar_tensor_tensor(
        dst=result,
        data=values,
        op0=nl.subtract,
        operand0=float(other),
        op1=nl.multiply,
        operand1=valid,
    )
    nisa.tensor_scalar(dst=result, data=result, op0=nl.add, operand0=float(other))


def _triangle(strict):
    """Return [from, to] of ones where from < to (`strict`), or its complement, bfloat16."""
    pmax = nl.tile_size.pmax
    ones, result = _tile(pmax, pmax, nl.bfloat16), _tile(pmax, pmax, nl.bfloat16)
    nisa.memset(dst=ones, value=1.0)
    sign = 1 if strict else -1
    nisa.affine_select(
        dst=result,
        pattern=[[sign, pmax]],
        channel_multiplier=-sign,
        offset=-1 if strict else 0,
        on_true_tile=ones,
        on_false_value=0.0,
        cmp_op=nl.greater_equal,
    )
    return result


def rank(places, ids, parts, experts):
    """places = how many choices of the same expert come before each; return all counts.

    The counts [pmax, experts + 1] are the same in every partition.
    """
    pmax, choices = nl.tile_size.pmax, ids["choices"]
    before, others = _triangle(True), _triangle(False)
    numbers = _tile(pmax, experts + 1)
    nisa.iota(dst=numbers, pattern=[[1, experts + 1]])
    cuts = spans(experts + 1, nl.tile_size.gemm_moving_fmax)
    banks = [nl.ndarray((pmax, b - a), dtype=nl.float32, buffer=nl.psum) for a, b in cuts]
    # Vector is a tile ahead of PE and GpSimd.
    ready = [_named(numbers, ids["number"][:, 0:choices])]
    for tile in range(len(parts)):
        columns = slice(tile * choices, (tile + 1) * choices)
        if tile + 1 < len(parts):
            following = slice((tile + 1) * choices, (tile + 2) * choices)
            ready.append(_named(numbers, ids["number"][:, following]))
        named = ready[tile]
        ready[tile] = None
        ranks = _tile(pmax, experts + 1)
        for number in range(len(cuts)):
            left, right = cuts[number]
            part = named[:, left:right]
            bank = banks[number]
            nisa.nc_matmul(dst=bank, stationary=before, moving=part, accumulate=tile > 0)
            nisa.tensor_copy(dst=ranks[:, left:right], src=bank, engine=nisa.engine.vector)
            nisa.nc_matmul(dst=bank, stationary=others, moving=part, accumulate=True)
        nisa.nc_n_gather(dst=places[:, columns], data=ranks, indices=ids["index"][:, columns])
    if choices > 1:
        _add_earlier(places, ids["number"], choices)
    counts = _tile(pmax, experts + 1)
    for number in range(len(cuts)):
        left, right = cuts[number]
        nisa.tensor_copy(dst=counts[:, left:right], src=banks[number])
    return counts


def _named(numbers, ids):
    """Return M[token, e] = how often ids[token, :] is e, bfloat16: counts to 256 are exact."""
    named = _tile(*numbers.shape, nl.bfloat16)
    first = ids[:, 0:1]
    nisa.tensor_scalar(dst=named, data=numbers, op0=nl.equal, operand0=first)
    for choice in range(1, ids.shape[1]):
        nisa.scalar_tensor_tensor(
            dst=named,
            data=numbers,
            op0=nl.equal,
            operand0=ids[:, choice : choice + 1],
            op1=nl.add,
            operand1=named,
        )
    return named


def _add_earlier(places, ids, choices):
    """places[token, k] += how many j < k name the same expert: absent choices, above all.

    A distance d = k - j at a time, for all tokens: [pmax, tiles, K - d] pairs.
    """
    pmax, width = places.shape
    tiles = width // choices
    for distance in range(1, choices):
        shape = (pmax, tiles, choices - distance)
        same = nl.ndarray(shape, dtype=nl.float32, buffer=nl.sbuf)
        pattern = [[width, pmax], [choices, tiles], [1, choices - distance]]
        later = ids.ap(pattern=pattern, offset=distance)
        nisa.tensor_tensor(dst=same, data1=ids.ap(pattern=pattern), data2=later, op=nl.equal)
        target = places.ap(pattern=pattern, offset=distance)
        nisa.tensor_tensor(dst=target, data1=target, data2=same, op=nl.add)


def _add_first_places(places, ids, counts, ends):
    """ends = running sum of counts; places += ends - counts of each choice's expert."""
    ones, firsts = _tile(*counts.shape), _tile(*counts.shape)
    nisa.memset(dst=ones, value=1.0)
    nisa.tensor_tensor_scan(
        dst=ends, data0=ones, data1=counts, initial=0.0, op0=nl.multiply, op1=nl.add
    )
    nisa.tensor_tensor(dst=firsts, data1=ends, data2=counts, op=nl.subtract)
    picked = _tile(*places.shape)
    nisa.nc_n_gather(dst=picked, data=firsts, indices=ids["index"])
    nisa.tensor_tensor(dst=places, data1=places, data2=picked, op=nl.add)


def _store_offsets(offsets, ends):
    experts = offsets.shape[0]
    exact = _tile(1, experts, nl.int32)
    nisa.tensor_copy(dst=exact, src=ends[0:1, 0:experts])
    nisa.dma_copy(dst=offsets.reshape((1, experts)), src=exact)


def _store_slots(slots, places, valid, total):
    """slots = places, `total` for absent choices: an index behind the rows, which readers skip."""
    kept, exact = _tile(*places.shape), _tile(*places.shape, nl.int32)
    _valid_or(kept, places, valid, total)
    nisa.tensor_copy(dst=exact, src=kept)
    for view, rows, (left, right) in token_views(slots):
        nisa.dma_copy(dst=view, src=exact[0:rows, left:right])


def _scatter(rows, x, places, parts, choices, config):
    """rows[places[token, k]] = x[token]."""
    size = x.shape[1]
    loaded = []
    for tile in range(len(parts)):
        while len(loaded) < min(len(parts), tile + 1 + config.ahead):
            start, stop = parts[len(loaded)]
            held = _tile(stop - start, size, x.dtype)
            nisa.dma_copy(dst=held, src=x[start:stop, :], dge_mode=queue(config))
            loaded.append(held)
        source = loaded[tile]
        loaded[tile] = None
        count = source.shape[0]
        for choice in range(choices):
            column = tile * choices + choice
            target = rows.ap(
                pattern=[[size, count], [1, size]],
                vector_offset=places[0:count, column : column + 1],
            )
            nisa.dma_copy(dst=target, src=source)
