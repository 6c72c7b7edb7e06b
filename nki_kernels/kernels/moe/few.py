"""Experts of a mixture for at most a tile of tokens: the stream of weights limits.

Only experts that somebody chose leave HBM. Each of them sees all tokens, and is added to those that
chose it: PE's time for one token is that for a tile (Qwen3: 16 us of 26 us of weights), and no row
has to be gathered or scattered. The sum is copied where the token chose, instead of adding 0 times
what a token would have got: that may be infinite. The active experts are listed on chip; device
loops run bodies of several, so that one body's barrier is paid by many weights. A single token has
K experts at most: they need neither list nor loop, and the first weights leave after 3 us.

Weights come in rows as long as PSUM is wide, up to 4 KiB (gate and up of Qwen3 in one row of 3).
"""

from __future__ import annotations

import nki.isa as nisa
import nki.language as nl

from nki_kernels.kernels.moe.blocks import run_blocks
from nki_kernels.kernels.moe.loops import entries_at, plan_loops
from nki_kernels.kernels.moe.schedule import list_active
from nki_kernels.kernels.moe.tokens import queue, spans, turn_columns


def experts_of_few(y, x, indices, scores, weights, form, config):
    """y[t] = sum_k scores[t, k] * expert(x[t]), T at most a tile; see `experts`.

    Rows are not rounded between down and the sum over choices.
    """
    tokens, width = x.shape
    choices, count = indices.shape[1], weights["down"].shape[0]
    ids = _tile((tokens, choices), nl.int32)
    nisa.dma_copy(dst=ids, src=indices)
    given = _tile((tokens, choices))
    nisa.dma_copy(dst=given, src=scores)
    rows = _tile((tokens, width), x.dtype)
    nisa.dma_copy(dst=rows, src=x, dge_mode=queue(config))
    named, factors = _factors(ids, given, count)
    turned = turn_columns([[rows[:, a:b]] for a, b in spans(width, nl.tile_size.pmax)])
    total = nl.ndarray((tokens, 1, width), dtype=nl.float32, buffer=nl.sbuf)
    nisa.memset(dst=total, value=0.0)
    chosen = _tile((tokens, count), nl.uint8)
    nisa.tensor_scalar(dst=chosen, data=named, op0=nl.greater, operand0=0.0)
    data = {"turned": turned, "total": total, "factors": factors, "chosen": chosen}
    if tokens == 1:
        blocks = []
        experts = _known(ids, count)
        for choice in range(choices):
            # A choice has its own score: the same expert may be named twice.
            here = slice(choice, choice + 1)
            inside = _present(ids[:, here], count)
            blocks.append(_block(experts[:, here], given[:, here], inside, data))
        run_blocks(blocks, weights, form, config)
    else:
        spare = max([len(body) for body in config.bodies])
        lists = {1: list_active(named, spare)}
        for loop in plan_loops(lists, config):
            body = _body(loop, lists[1]["list"], data, weights, form, config)
            nl.fori_loop(0, loop["trips"], body)
    result = _tile((tokens, width), y.dtype)
    nisa.tensor_copy(dst=result, src=total[:, 0, :])
    nisa.dma_copy(dst=y, src=result)


def _tile(shape, dtype=nl.float32):
    return nl.ndarray(shape, dtype=dtype, buffer=nl.sbuf)


def _factors(ids, scores, count):
    """Return, per token and expert, how often it is named (bfloat16) and the sum of its scores."""
    tokens, choices = ids.shape
    numbers, wanted = _tile((tokens, count)), _tile((tokens, choices))
    nisa.iota(dst=numbers, pattern=[[1, count]])
    nisa.tensor_copy(dst=wanted, src=ids)
    named, factors = _tile((tokens, count), nl.bfloat16), _tile((tokens, count))
    for choice in range(choices):
        here = slice(choice, choice + 1)
        ones = named if choice == 0 else _tile((tokens, count), nl.bfloat16)
        nisa.tensor_scalar(dst=ones, data=numbers, op0=nl.equal, operand0=wanted[:, here])
        if choice == 0:
            nisa.tensor_scalar(dst=factors, data=ones, op0=nl.multiply, operand0=scores[:, here])
            continue
        nisa.tensor_tensor(dst=named, data1=named, data2=ones, op=nl.add, engine=nisa.engine.gpsimd)
        nisa.scalar_tensor_tensor(
            dst=factors,
            data=ones,
            op0=nl.multiply,
            operand0=scores[:, here],
            op1=nl.add,
            operand1=factors,
        )
    return named, factors


def _known(ids, count):
    """Return ids brought to those of experts."""
    result = _tile(ids.shape, nl.int32)
    nisa.tensor_scalar(
        dst=result,
        data=ids,
        op0=nl.maximum,
        operand0=0,
        op1=nl.minimum,
        operand1=count - 1,
    )
    return result


def _present(number, count):
    """Return whether a choice [1, 1] is an expert's number, uint8."""
    below, inside = _tile((1, 1)), _tile((1, 1), nl.uint8)
    nisa.tensor_scalar(dst=below, data=number, op0=nl.less, operand0=float(count))
    nisa.scalar_tensor_tensor(
        dst=inside,
        data=number,
        op0=nl.greater_equal,
        operand0=0.0,
        op1=nl.multiply,
        operand1=below,
    )
    return inside


def _body(loop, row, data, weights, form, config):
    """Return the body of a device loop: the next experts of the list."""
    at, count = loop["at"][1], len(loop["body"])

    def work(index):
        entries = entries_at(row, at, count)
        nisa.tensor_scalar(dst=at, data=at, op0=nl.add, operand0=2 * count)
        blocks = []
        for number in range(count):
            expert = entries[:, 2 * number : 2 * number + 1]
            factor, chosen = _pick(data["factors"], expert), _pick(data["chosen"], expert)
            blocks.append(_block(expert, factor, chosen, data))
        run_blocks(blocks, weights, form, config)

    return work


def _pick(table, expert):
    """Return the column of an expert whose number is known at run time, [T, 1]."""
    tokens, experts = table.shape
    column = _tile((tokens, 1), table.dtype)
    source = table.ap(pattern=[[experts, tokens], [1, 1]], scalar_offset=expert, indirect_dim=1)
    nisa.tensor_copy(dst=column, src=source)
    return column


def _block(expert, factor, chosen, data):
    """Return a block for `run_blocks`: all tokens, added to the total of those that chose it."""
    total = data["total"]

    def result(span):
        return total[:, :, span[0] : span[1]]

    def evict(place, tile, sums):
        more = _tile(sums.shape)
        nisa.scalar_tensor_tensor(
            dst=more, data=sums, op0=nl.multiply, operand0=factor, op1=nl.add, operand1=place
        )
        # A step of 0 repeats a token's bit for each of its columns.
        rows, columns = sums.shape
        bits = chosen.ap(pattern=[[1, rows], [0, columns]])
        nisa.tensor_copy_predicated(dst=place, src=more, predicate=bits)

    def store(span, tile):
        return None

    return {
        "size": 1,
        "rows": [total.shape[0]],
        "expert": expert,
        "held": None,
        "turned": data["turned"],
        "result": result,
        "evict": evict,
        "store": store,
    }
