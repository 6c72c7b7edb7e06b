"""The schedule of a mixture: where each choice stands, whose rows a tile holds, which blocks run.

Rows are sorted by expert, and the rows of each expert begin at a whole row tile, so that a block
writes nothing of another expert's. A block is up to `most` row tiles of one expert: as many full
ones as it has, and a tail of its own class (1, 2, ... row tiles). Everything is computed on chip,
in float32 (exact below 2^24); nothing goes through the host, and no choice is dropped.
"""

from __future__ import annotations

import nki.isa as nisa
import nki.language as nl

from nki_kernels.kernels.moe.dispatch import load_ids, rank
from nki_kernels.kernels.moe.tokens import spans

#: Integers up to this are exact in bfloat16.
_EXACT = 256


def row_tiles(choices, experts):
    """Return how many row tiles `choices` rows of `experts` experts fill at most."""
    pmax = nl.tile_size.pmax
    return max(1, (choices + min(experts, choices) * (pmax - 1)) // pmax)


def sort_choices(indices, experts):
    """Sort the choices by expert.

    Args:
        indices: [T, K] HBM, int32; below 0 or from `experts` on: absent.
        experts: E.

    Returns:
        "places" [pmax, tiles * K] float32, the row of each choice, behind all rows for an absent
        one; "counts", "tiles", "firsts" [pmax, E] float32, alike in every partition: rows of each
        expert, its row tiles, and the first of these; "size", row tiles at most.
    """
    tokens, choices = indices.shape
    pmax = nl.tile_size.pmax
    ids, valid = load_ids(indices, experts)
    places = _tile(ids["number"].shape)
    counts = rank(places, ids, spans(tokens, pmax), experts)
    tiles = _tile(counts.shape)
    floor_division(tiles, counts, pmax, pmax - 1)
    size = row_tiles(tokens * choices, experts)
    ends, firsts = _tile(counts.shape), _tile(counts.shape)
    add_up(ends, tiles)
    nisa.tensor_tensor(dst=firsts, data1=ends, data2=tiles, op=nl.subtract)
    picked = _tile(places.shape)
    nisa.nc_n_gather(dst=picked, data=firsts, indices=ids["index"])
    _scale_add(places, picked, float(pmax), places)
    behind = float(size * pmax)
    # Absent ones: (place - behind) * 0 + behind.
    nisa.scalar_tensor_tensor(
        dst=places, data=places, op0=nl.subtract, operand0=behind, op1=nl.multiply, operand1=valid
    )
    nisa.tensor_scalar(dst=places, data=places, op0=nl.add, operand0=behind)
    real = slice(0, experts)
    return {
        "places": places,
        "counts": counts[:, real],
        "tiles": tiles[:, real],
        "firsts": firsts[:, real],
        "size": size,
    }


def order_tokens(places, choices, size):
    """Return [pmax, size] int32: the token whose row is row p of row tile n; token 0 for none.

    order[p, n] = sum over choices c of [lo(c) = p] * [hi(c) = n] * token(c), the inverse of the
    places, as products with one-hot rows on PE: scattering 4 bytes for each choice would cost
    GpSimd 16 ns each. A token is 128 * tile + partition, and each part is exact in bfloat16.
    """
    pmax = nl.tile_size.pmax
    tiles = places.shape[1] // choices
    # Row tiles count from the middle: bfloat16 is compared twice as fast.
    narrow = size <= 2 * _EXACT
    dtype, middle = (nl.bfloat16, size // 2) if narrow else (nl.float32, 0)
    scaled, high = _tile(places.shape), _tile(places.shape)
    low, number = _tile(places.shape, nl.bfloat16), _tile(places.shape, dtype)
    floor_division(high, places, pmax, 0)
    _scale_add(scaled, high, -float(pmax), places)
    nisa.tensor_copy(dst=low, src=scaled, engine=nisa.engine.gpsimd)
    nisa.tensor_scalar(dst=number, data=high, op0=nl.subtract, operand0=float(middle))
    partition = _tile((pmax, 1))
    nisa.iota(dst=partition, pattern=[[0, 1]], offset=1, channel_multiplier=1)
    rows, columns = _tile((pmax, pmax), nl.bfloat16), _tile((pmax, size), dtype)
    nisa.iota(dst=rows, pattern=[[1, pmax]])
    nisa.iota(dst=columns, pattern=[[1, size]], offset=-middle)
    cuts = spans(size, nl.tile_size.gemm_moving_fmax)
    banks = [nl.ndarray((pmax, b - a), dtype=nl.float32, buffer=nl.psum) for a, b in cuts]
    # Vector is a tile ahead of PE.
    ready = [_factors(0, choices, low, number, rows, columns, partition)]
    for tile in range(tiles):
        if tile + 1 < tiles:
            ready.append(_factors(tile + 1, choices, low, number, rows, columns, partition))
        parts, where = ready[tile]
        ready[tile] = None
        for choice in range(choices):
            for at in range(len(cuts)):
                left, right = cuts[at]
                for part in range(len(parts)):
                    nisa.nc_matmul(
                        dst=banks[at],
                        stationary=parts[part][:, choice, :],
                        moving=where[:, choice, left:right],
                        accumulate=tile > 0 or choice > 0 or part > 0,
                    )
    order = _tile((pmax, size), nl.int32)
    for at in range(len(cuts)):
        left, right = cuts[at]
        nisa.tensor_scalar(
            dst=order[:, left:right],
            data=banks[at],
            op0=nl.subtract,
            operand0=1.0,
            op1=nl.maximum,
            operand1=0.0,
        )
    return order


def _factors(tile, choices, low, number, rows, columns, partition):
    """Return the factors of a tile of tokens: rows times (p + 1) and times 128 * tile; columns."""
    ones = _one_hot(low, tile * choices, choices, rows)
    where = _one_hot(number, tile * choices, choices, columns)
    parts = [_tile(ones.shape, nl.bfloat16)]
    nisa.tensor_scalar(dst=parts[0], data=ones, op0=nl.multiply, operand0=partition)
    if tile > 0:
        # Scalar beside Vector, which forms the one-hot rows.
        parts.append(_tile(ones.shape, nl.bfloat16))
        scale = float(tile * nl.tile_size.pmax)
        nisa.activation(dst=parts[1], op=nl.copy, data=ones, scale=scale)
    return parts, where


def list_blocks(found, choices, most, spare):
    """Return, for each class of 1 .. `most` row tiles, its blocks and how many there are.

    Args:
        found: from `sort_choices`.
        choices: T * K.
        most: row tiles of a full block.
        spare: entries behind the last block, legal ones that may be read ahead.

    Returns:
        {class: {"list": [1, 2 * length] int32, (expert, first row tile) of each block;
        "total": [pmax, 1] float32}}.
    """
    pmax, experts = found["tiles"].shape
    full, tail, after = (_tile((pmax, experts)) for _ in range(3))
    floor_division(full, found["tiles"], most, 0)
    _scale_add(tail, full, -float(most), found["tiles"])
    _scale_add(after, full, float(most), found["firsts"])
    result = {}
    for size in range(1, most + 1):
        if size == most:
            length = choices // pmax // most + min(experts, choices)
            named, base = full, found["firsts"]
        else:
            length = min(experts, choices)
            named, base = _tile((pmax, experts)), after
            nisa.tensor_scalar(dst=named, data=tail, op0=nl.equal, operand0=float(size))
        result[size] = _list(named, base, size, length + spare, found["size"])
    return result


def list_active(named, spare):
    """Return the list of the experts that are named, as `list_blocks` returns one.

    Args:
        named: [T, E] bfloat16, how often a token names an expert.
        spare: see `list_blocks`.
    """
    tokens, experts = named.shape
    pmax = nl.tile_size.pmax
    ones, active = _tile((tokens, pmax), nl.bfloat16), _tile((pmax, experts))
    nisa.memset(dst=ones, value=1.0)
    for left, right in spans(experts, nl.tile_size.gemm_moving_fmax):
        bank = nl.ndarray((pmax, right - left), dtype=nl.float32, buffer=nl.psum)
        nisa.nc_matmul(dst=bank, stationary=ones, moving=named[:, left:right], accumulate=False)
        nisa.tensor_scalar(dst=active[:, left:right], data=bank, op0=nl.minimum, operand0=1.0)
    base = _tile((pmax, experts))
    nisa.memset(dst=base, value=0.0)
    return _list(active, base, 1, experts + spare, 1)


def _list(named, base, size, length, limit):
    """List the blocks of a class: expert e has named[e] of them, from row tile base[e] on.

    Block j belongs to the first expert whose running sum of blocks exceeds j: blocks lie on
    partitions, and the experts with sums up to j are counted along the free axis.
    """
    pmax, experts = named.shape
    ends, starts = _tile((pmax, experts)), _tile((pmax, experts))
    add_up(ends, named)
    # starts[e] + j * size is the first row tile of block j, if that is an expert's.
    nisa.tensor_tensor(dst=starts, data1=named, data2=ends, op=nl.subtract)
    _scale_add(starts, starts, float(size), base)
    columns = -(-length // pmax)
    scratch = nl.ndarray((columns * pmax, 2), dtype=nl.int32, buffer=nl.private_hbm)
    for column in range(columns):
        number, owner = _tile((pmax, 1)), _tile((pmax, 1))
        nisa.iota(dst=number, pattern=[[0, 1]], offset=column * pmax, channel_multiplier=1)
        before = _tile((pmax, experts))
        nisa.tensor_scalar(dst=before, data=ends, op0=nl.less_equal, operand0=number)
        nisa.tensor_reduce(dst=owner, op=nl.add, data=before, axis=1)
        index, first = _tile((pmax, 1), nl.uint32), _tile((pmax, 1))
        nisa.tensor_scalar(dst=index, data=owner, op0=nl.minimum, operand0=float(experts - 1))
        nisa.nc_n_gather(dst=first, data=starts, indices=index)
        _scale_add(first, number, float(size), first)
        entry = _tile((pmax, 2), nl.int32)
        nisa.tensor_copy(dst=entry[:, 0:1], src=index)
        nisa.tensor_scalar(
            dst=entry[:, 1:2],
            data=first,
            op0=nl.maximum,
            operand0=0.0,
            op1=nl.minimum,
            operand1=float(max(0, limit - size)),
        )
        nisa.dma_copy(dst=scratch[column * pmax : (column + 1) * pmax, :], src=entry)
    row = _tile((1, 2 * columns * pmax), nl.int32)
    nisa.dma_copy(dst=row, src=scratch.reshape((1, 2 * columns * pmax)))
    return {"list": row, "total": ends[:, experts - 1 : experts]}


def floor_division(result, values, divisor, more):
    """result = floor((values + more) / divisor), for whole numbers below 2^22, `more` < divisor.

    Rounding to the nearest integer at (v + more + 1/2) / divisor - 1/2 meets no tie.
    """
    whole = nl.ndarray(values.shape, dtype=nl.int32, buffer=nl.sbuf)
    nisa.tensor_scalar(
        dst=whole,
        data=values,
        op0=nl.multiply,
        operand0=1.0 / divisor,
        op1=nl.add,
        operand1=(more + 0.5) / divisor - 0.5,
    )
    nisa.tensor_copy(dst=result, src=whole)


def add_up(result, values):
    """result = running sum along the free axis."""
    ones = _tile(values.shape)
    nisa.memset(dst=ones, value=1.0)
    nisa.tensor_tensor_scan(
        dst=result, data0=ones, data1=values, initial=0.0, op0=nl.multiply, op1=nl.add
    )


def _tile(shape, dtype=nl.float32):
    return nl.ndarray(shape, dtype=dtype, buffer=nl.sbuf)


def _scale_add(result, data, factor, addend):
    """result = data * factor + addend."""
    nisa.scalar_tensor_tensor(
        dst=result,
        data=data,
        op0=nl.multiply,
        operand0=factor,
        op1=nl.add,
        operand1=addend,
    )


def _one_hot(values, start, choices, numbers):
    """Return [pmax, K, width] of ones where numbers[p, i] is values[p, start + k], bfloat16."""
    pmax, step = values.shape
    width = numbers.shape[1]
    result = _tile((pmax, choices, width), nl.bfloat16)
    row = values.ap(pattern=[[step, pmax], [1, choices], [0, width]], offset=start)
    all_numbers = numbers.ap(pattern=[[width, pmax], [0, choices], [1, width]])
    nisa.tensor_tensor(dst=result, data1=all_numbers, data2=row, op=nl.equal)
    return result
