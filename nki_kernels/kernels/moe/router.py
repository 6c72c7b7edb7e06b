"""Routing of tokens to experts: logits on PE, selection on Vector, counts on PE again.

Tokens lie on partitions, experts along the free axis, so that a row of logits is searched by
max8, nc_find_index8 and nc_match_replace8, eight experts a round. Vector limits: about ten passes
over the logits and ten short instructions per 128 tokens; the loads of x^T run a block ahead.

Equal values: nc_find_index8 gives the j-th of equal columns the j-th occurrence, and
nc_match_replace8 removes as many occurrences from the front, so the lower expert comes first in
every round and across rounds.
"""

from __future__ import annotations

from dataclasses import dataclass

import nki
import nki.isa as nisa
import nki.language as nl

from nki_kernels.kernels.moe.tokens import load_weight, spans, transposed_tokens

#: What max8 and its relatives handle at once.
_WIDTH = 8

#: Removed, and padding. Every real value is clamped to the finite ones, which are above it.
_NEVER = float("-inf")
_LARGEST = 3.4028234663852886e38


@dataclass(frozen=True)
class RouterConfig(nl.NKIObject):
    """Tuning of the router. No field changes a result.

    Attributes:
        block: tiles of 128 tokens whose x^T is loaded together; the next block is on its way.
        transpose: "dma" (2-byte types) or "pe".
        hwdge: load through the hardware descriptor engine (gen3 and later).
    """

    block: int
    transpose: str
    hwdge: bool


@dataclass(frozen=True)
class Routing(nl.NKIObject):
    """How experts are chosen and weighted; see `nki_kernels.ops.router`."""

    top_k: int
    score: str
    score_first: bool
    renormalize: bool
    scale: float
    groups: int
    top_groups: int
    group_score: str


@nki.jit
def router(x, weight, bias, selection_bias, routing, config):
    """Choose top_k experts for each token.

    logits = x @ weight + bias; the formulas of selection and weights are in
    `nki_kernels.ops.router`.

    Dimensions:
        T, H >= 1; E to 1024; top_k to 32 and to E.

    Args:
        x: [T, H] HBM, bfloat16 | float16 | float32.
        weight: [H, E] HBM, dtype of x.
        bias: [E] HBM, dtype of x, or None.
        selection_bias: [E] HBM, float32, or None.
        routing: Routing.
        config: RouterConfig.

    Returns:
        indices [T, top_k] int32, weights [T, top_k] float32, counts [E] int32.
    Data flow: x^T by DMA (or PE) -> logits in PSUM -> SBUF -> chosen, removed -> HBM.
    """
    tokens, experts = x.shape[0], weight.shape[1]
    shape = (tokens, routing.top_k)
    indices = nl.ndarray(shape, dtype=nl.int32, buffer=nl.shared_hbm)
    weights = nl.ndarray(shape, dtype=nl.float32, buffer=nl.shared_hbm)
    counts = nl.ndarray((experts,), dtype=nl.int32, buffer=nl.shared_hbm)
    rows = min(tokens, nl.tile_size.pmax)
    shared = {
        "weight": load_weight(weight, config),
        "bias": _broadcast(bias, rows),
        "selection_bias": _broadcast(selection_bias, rows),
    }
    ones = nl.ndarray((rows, 1), dtype=nl.bfloat16, buffer=nl.sbuf)
    nisa.memset(dst=ones, value=1.0)
    # One group from the first tile to the last, in banks of its own.
    cuts = spans(experts, nl.tile_size.gemm_moving_fmax)
    totals = [nl.ndarray((1, b - a), dtype=nl.float32, buffer=nl.psum) for a, b in cuts]
    plan = _plan(indices, weights, config)
    loaded = []
    pending = None
    products = _products(x, loaded, plan, 0, shared, config)
    for at in range(len(plan)):
        # PE is a tile ahead, or it would wait for Vector to choose before it counts.
        banks = products
        if at + 1 < len(plan):
            products = _products(x, loaded, plan, at + 1, shared, config)
        logits = _logits(banks, shared, experts)
        found, chosen, taken = _select(logits, experts, shared, routing)
        _count(totals, cuts, taken, ones, at == 0)
        # Weights a tile late: Vector selects while Scalar forms the exponentials.
        _finish(pending, experts, routing)
        pending = (logits, found, chosen, plan[at]["outputs"])
    _finish(pending, experts, routing)
    as_integers = nl.ndarray((1, experts), dtype=nl.int32, buffer=nl.sbuf)
    for number in range(len(cuts)):
        left, right = cuts[number]
        nisa.tensor_copy(dst=as_integers[:, left:right], src=totals[number])
    nisa.dma_copy(dst=counts.reshape((1, experts)), src=as_integers)
    return indices, weights, counts


def _plan(indices, weights, config):
    """Return one entry per tile: its block of tokens, its columns of x^T, where results go."""
    plan = []
    blocks = spans(indices.shape[0], config.block * nl.tile_size.pmax)
    for number in range(len(blocks)):
        start, stop = blocks[number]
        tiles = _tiles(stop - start)
        outputs = {
            "dst": (indices[start:stop, :], weights[start:stop, :]),
            "tiles": len(tiles),
            "done": [],
        }
        for columns in tiles:
            plan.append({"block": number, "blocks": blocks, "columns": columns, "outputs": outputs})
    return plan


def _tiles(tokens):
    """Return the columns of x^T that make each tile of tokens, as slices.

    Tiles take turns where they are equally long, so that the results of one partition are
    neighbours in HBM: rows of 4 * top_k bytes cost more than their bandwidth.
    """
    pmax = nl.tile_size.pmax
    count = -(-tokens // pmax)
    if tokens % count == 0:
        return [slice(first, tokens, count) for first in range(count)]
    return [slice(left, right) for left, right in spans(tokens, pmax)]


def _store(dst, tiles):
    """dst [tokens, k] = the tiles [rows, k] of `_tiles`."""
    tokens, k = dst.shape
    count = len(tiles)
    if tokens % count == 0:
        joined = nl.ndarray((tokens // count, count, k), dtype=dst.dtype, buffer=nl.sbuf)
        for number in range(count):
            nisa.tensor_copy(dst=joined[:, number, :], src=tiles[number], engine=nisa.engine.gpsimd)
        nisa.dma_copy(dst=dst.reshape((tokens // count, count, k)), src=joined)
        return
    parts = spans(tokens, nl.tile_size.pmax)
    for number in range(count):
        left, right = parts[number]
        same = nl.ndarray((right - left, k), dtype=dst.dtype, buffer=nl.sbuf)
        nisa.tensor_copy(dst=same, src=tiles[number], engine=nisa.engine.gpsimd)
        nisa.dma_copy(dst=dst[left:right, :], src=same)


def _broadcast(vector, rows):
    if vector is None:
        return None
    size = vector.shape[0]
    tile = nl.ndarray((rows, size), dtype=vector.dtype, buffer=nl.sbuf)
    nisa.dma_copy(dst=tile, src=vector.ap(pattern=[[0, rows], [1, size]]))
    return tile


def _row(rows, columns, dtype=nl.float32):
    return nl.ndarray((rows, columns), dtype=dtype, buffer=nl.sbuf)


def _products(x, loaded, plan, at, shared, config):
    """Start x @ weight of a tile, and the loads of the block after its own; return the banks."""
    tile = plan[at]
    block, blocks = tile["block"], tile["blocks"]
    while len(loaded) < min(len(blocks), block + 2):
        loaded.append(transposed_tokens(x, blocks[len(loaded)], config))
    slices = [piece[:, tile["columns"]] for piece in loaded[block]]
    banks = []
    for start, stop in spans(shared["weight"][0].shape[1], nl.tile_size.gemm_moving_fmax):
        psum = nl.ndarray((slices[0].shape[1], stop - start), dtype=nl.float32, buffer=nl.psum)
        for number in range(len(slices)):
            nisa.nc_matmul(
                dst=psum,
                stationary=slices[number],
                moving=shared["weight"][number][:, start:stop],
                accumulate=number > 0,
            )
        banks.append((start, stop, psum))
    if at + 1 == len(plan) or plan[at + 1]["block"] != block:
        loaded[block] = None
    return banks


def _logits(banks, shared, experts):
    """Return [tokens, E] float32 logits, finite: NaN and -inf are the lowest number."""
    rows = banks[0][2].shape[0]
    raw = _row(rows, experts)
    for start, stop, psum in banks:
        if shared["bias"] is None:
            nisa.tensor_copy(dst=raw[:, start:stop], src=psum)
        else:
            bias = shared["bias"][0:rows, start:stop]
            nisa.tensor_tensor(dst=raw[:, start:stop], data1=psum, data2=bias, op=nl.add)
    _clamp(raw)
    # NaN equals nothing, not itself either; nothing could find or remove it.
    number = _row(rows, experts, nl.uint8)
    nisa.tensor_tensor(dst=number, data1=raw, data2=raw, op=nl.equal)
    logits = _row(rows, experts)
    nisa.memset(dst=logits, value=-_LARGEST)
    nisa.tensor_copy_predicated(dst=logits, src=raw, predicate=number)
    return logits


def _clamp(values):
    """Bring infinities to the largest finite numbers, in place."""
    nisa.tensor_scalar(
        dst=values,
        data=values,
        op0=nl.minimum,
        operand0=_LARGEST,
        op1=nl.maximum,
        operand1=-_LARGEST,
    )


def _select(logits, experts, shared, routing):
    """Return (indices [rows, k], logits of the chosen [rows, k], who was taken [rows, E]).

    Softmax and sigmoid keep the order of the logits, so scores are formed only where something is
    added to them.
    """
    rows = logits.shape[0]
    by_logit = shared["selection_bias"] is None
    ranked = logits
    if routing.score_first and not (by_logit and _one_per_group(routing)):
        ranked = _scores(logits, routing)
    if shared["selection_bias"] is not None:
        biased = _row(rows, experts)
        bias = shared["selection_bias"][0:rows, :]
        nisa.tensor_tensor(dst=biased, data1=ranked, data2=bias, op=nl.add)
        _clamp(biased)
        ranked = biased
    eligible = _eligible(ranked, experts, routing)
    padded = _row(rows, max(experts, _WIDTH))
    if experts < _WIDTH:
        nisa.memset(dst=padded[:, experts:], value=_NEVER)
    found, values = _remove_top(padded, eligible, experts, routing.top_k)
    taken = _row(rows, experts, nl.bfloat16)
    nisa.tensor_tensor(
        dst=taken, data1=eligible[:, 0:experts], data2=padded[:, 0:experts], op=nl.not_equal
    )
    found = found[:, 0 : routing.top_k]
    if ranked is logits:
        return found, values, taken
    chosen = _row(rows, routing.top_k)
    nisa.nc_n_gather(dst=chosen, data=logits, indices=found)
    return found, chosen, taken


def _one_per_group(routing):
    """Tell whether groups, if any, are ranked by one expert, whose order scores do not change."""
    return routing.top_groups == routing.groups or routing.group_score == "max"


def _scores(logits, routing):
    """Return the score of every expert."""
    scores = _row(*logits.shape)
    if routing.score == "sigmoid":
        nisa.activation(dst=scores, op=nl.sigmoid, data=logits)
        return scores
    total = _exponentials(scores, logits, _negated_maximum(logits))
    inverse = _row(logits.shape[0], 1)
    nisa.reciprocal(dst=inverse, data=total)
    nisa.tensor_scalar(dst=scores, data=scores, op0=nl.multiply, operand0=inverse)
    return scores


def _negated_maximum(values):
    result = _row(values.shape[0], 1)
    nisa.tensor_reduce(dst=result, op=nl.maximum, data=values, axis=1, negate=True)
    return result


def _exponentials(result, values, shift):
    """result = exp(values + shift); return the row sums [rows, 1]."""
    total = _row(values.shape[0], 1)
    nisa.activation(
        dst=result,
        op=nl.exp,
        data=values,
        bias=shift,
        reduce_op=nl.add,
        reduce_res=total,
        reduce_cmd=nisa.reduce_cmd.reset_reduce,
    )
    return total


def _remove_top(work, values, columns, count):
    """Find the `count` largest of values[:, :columns]; work = values without them.

    Returns their positions (uint32) and values, in whole rounds of eight columns. `work` may be
    wider than `columns`; what is beyond is padding.
    """
    rows, rounds = work.shape[0], -(-count // _WIDTH)
    found = _row(rows, rounds * _WIDTH, nl.uint32)
    best = _row(rows, rounds * _WIDTH)
    nisa.tensor_copy(dst=work[:, 0:columns], src=values)
    for number in range(rounds):
        left, right = number * _WIDTH, (number + 1) * _WIDTH
        eight = best[:, left:right]
        nisa.max8(dst=eight, src=work)
        nisa.nc_find_index8(dst=found[:, left:right], data=work, vals=eight)
        if right > count:
            # Fewer than eight are wanted: the others match what is removed already, or nothing.
            nisa.memset(dst=best[:, count:right], value=_NEVER)
        nisa.nc_match_replace8(dst=work, data=work, vals=eight, imm=_NEVER)
    return found, best[:, 0:count]


def _eligible(ranked, experts, routing):
    """Return the values of experts in the best groups, and never for those of others."""
    if routing.top_groups == routing.groups:
        return ranked
    rows, groups = ranked.shape[0], routing.groups
    size = experts // groups
    grouped = ranked.reshape((rows, groups, size))
    best = _row(rows, groups)
    if routing.group_score == "max":
        nisa.tensor_reduce(dst=best, op=nl.maximum, data=grouped, axis=2)
    else:
        _sum_of_two(best, grouped)
    padded = _row(rows, max(groups, _WIDTH))
    if groups < _WIDTH:
        nisa.memset(dst=padded[:, groups:], value=_NEVER)
    _remove_top(padded, best, groups, routing.top_groups)
    taken = _row(rows, groups, nl.uint8)
    nisa.tensor_tensor(dst=taken, data1=best, data2=padded[:, 0:groups], op=nl.not_equal)
    eligible = _row(rows, experts)
    nisa.memset(dst=eligible, value=_NEVER)
    # The predicate's step of 0 repeats a group's bit for each of its experts.
    nisa.tensor_copy_predicated(
        dst=eligible.reshape((rows, groups, size)),
        src=grouped,
        predicate=taken.ap(pattern=[[groups, rows], [1, groups], [0, size]]),
    )
    return eligible


def _sum_of_two(best, grouped):
    """best[g] = sum of the two largest of group g."""
    rows, groups, size = grouped.shape
    largest = nl.ndarray((rows, groups, _WIDTH), dtype=nl.float32, buffer=nl.sbuf)
    for group in range(groups):
        source = grouped[:, group, :]
        if size < _WIDTH:
            padded = _row(rows, _WIDTH)
            nisa.memset(dst=padded, value=_NEVER)
            nisa.tensor_copy(dst=padded[:, 0:size], src=source)
            source = padded
        nisa.max8(dst=largest[:, group, :], src=source)
    nisa.tensor_reduce(dst=best, op=nl.add, data=largest[:, :, 0:2], axis=2)
    _clamp(best)


def _weights(logits, chosen, experts, routing):
    """Return the weights [rows, k] of the chosen experts, given their logits."""
    rows = logits.shape[0]
    values, total = _row(rows, routing.top_k), None
    if routing.score == "sigmoid":
        nisa.activation(dst=values, op=nl.sigmoid, data=chosen)
        if routing.renormalize:
            total = _row(rows, 1)
            nisa.tensor_reduce(dst=total, op=nl.add, data=values, axis=1)
    elif routing.score_first and not routing.renormalize:
        shift = _negated_maximum(logits)
        total = _exponentials(_row(rows, experts), logits, shift)
        nisa.activation(dst=values, op=nl.exp, data=chosen, bias=shift)
    else:
        # Of a softmax over all, made to sum to 1 again, only the chosen remain.
        total = _exponentials(values, chosen, _negated_maximum(chosen))
    result = _row(rows, routing.top_k)
    factor = 1.0
    if total is not None:
        factor = _row(rows, 1)
        nisa.reciprocal(dst=factor, data=total)
    nisa.tensor_scalar(
        dst=result,
        data=values,
        op0=nl.multiply,
        operand0=factor,
        op1=nl.multiply,
        operand1=routing.scale,
    )
    return result


def _count(totals, cuts, taken, ones, first):
    """totals[e] += sum over tokens of taken[token, e]; `first` overwrites."""
    for number in range(len(cuts)):
        left, right = cuts[number]
        nisa.nc_matmul(
            dst=totals[number],
            stationary=ones[0 : taken.shape[0], :],
            moving=taken[:, left:right],
            accumulate=not first,
        )


def _finish(pending, experts, routing):
    """Form the weights of a selected tile, and store its block when that was the last of it."""
    if pending is None:
        return
    logits, found, chosen, outputs = pending
    outputs["done"].append((found, _weights(logits, chosen, experts, routing)))
    if len(outputs["done"]) == outputs["tiles"]:
        for which in range(2):
            _store(outputs["dst"][which], [done[which] for done in outputs["done"]])
