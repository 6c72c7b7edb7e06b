"""Blocks of rows through one expert each: up, activation, down, with weights that stream.

A block is a few tiles of rows, turned (x^T is stationary), and the number of its expert in SBUF.
Weights move: a slice of the contraction, as many columns as all banks of PSUM take, in rows of some
KiB. They flow through one queue, in the order of use, `flight` bytes ahead, across the blocks of a
body: while a heavy block works, the weights of light ones behind it arrive.

PE goes from one product to the next without waiting: the last slices of a wave run accumulator by
accumulator, so that evictions hide under those that follow; the hidden features of a wave are
turned after the next wave, and the rows of the next block before those of this block's last wave.
"""

from __future__ import annotations

import nki.isa as nisa
import nki.language as nl

from nki_kernels.kernels.matmul.epilogue import activation_of
from nki_kernels.kernels.moe.tokens import queue, spans, turn_columns


def run_blocks(blocks, weights, form, config, after=None):
    """Run blocks one after another.

    Args:
        blocks: dicts; "size": row tiles; "rows": rows of each; "expert": [1, 1] int32 in SBUF;
            "load": called with tiles or None, loads the row tiles [rows, H] into these or new ones
            and returns them; "held": those that are there, or None; "turned": x^T, one view per
            slice of H, or None; "result": called with a span of columns, returns the tile
            [rows, size, columns] for it; "evict": called with (a part of that, row tile, float32
            sums in PSUM or SBUF) for each of a span; "store": with (span, tile) at its end.
        weights: {"up": [E, H, F], "down": [E, I, H], "up_bias": [E, F] or None,
            "down_bias": [E, H] or None}, F = 2 I for gated forms.
        form: ExpertForm.
        config: ExpertsConfig.
        after: called when the rows of all blocks are on their way, or None.
    """
    steps = []
    for number in range(len(blocks)):
        steps += _steps(blocks[number], number, weights, form, config)
    loaded = [None] * len(steps)
    largest = max([block["size"] for block in blocks])
    ahead = {"next": 0, "bytes": 0, "most": config.flight[largest - 1]}
    state = {"groups": [], "late": [], "pending": [], "turned": [], "bias": None}
    if blocks[0]["held"] is None:
        _start(blocks, 0, after)
    _turn(blocks[0], 0, 1)
    _start(blocks, 1, after)
    for at in range(len(steps)):
        _load_ahead(steps, loaded, at, ahead, blocks, weights, form, config)
        step = steps[at]
        block = blocks[step["block"]]
        if step["first"]:
            state["groups"] = _accumulators(block, step, form)
            state["pending"] = []
            if step["phase"] == "down":
                state["result"] = block["result"](step["span"])
        turned = block["turned"] if step["phase"] == "up" else state["turned"]
        if step["first"]:
            state["bias"] = loaded[at]["bias"]
        pair = {"weights": loaded[at]["weights"], "turned": turned[step["index"]]}
        if step["in_tail"]:
            state["pending"].append(pair)
        else:
            for group in state["groups"]:
                for sums in group:
                    _multiply(sums, pair)
        if step["last"]:
            _finish_wave(blocks, step, state, form, config, after)
        loaded[at] = None
        ahead["bytes"] -= step["bytes"]


def _start(blocks, number, after):
    """Start the loads of a block's rows; behind the last block, those of the next body."""
    if number < len(blocks):
        if blocks[number]["turned"] is None:
            blocks[number]["held"] = blocks[number]["load"](None)
    elif number == len(blocks) and after is not None:
        after()


def _turn(block, part, parts):
    """Bring the hidden dimension of a block's rows onto partitions, one part of `parts` of it."""
    if block["held"] is None:
        return
    held = block["held"]
    cuts = spans(held[0].shape[1], nl.tile_size.pmax)
    share = -(-len(cuts) // parts)
    mine = cuts[part * share : (part + 1) * share]
    done = [] if part == 0 else block["turned"]
    block["turned"] = done + turn_columns([[tile[:, a:b] for tile in held] for a, b in mine])
    if part == parts - 1:
        block["held"] = None


def _steps(block, number, weights, form, config):
    """One entry per product, wave and slice of the contraction, in the order of execution."""
    pmax, bank = nl.tile_size.pmax, nl.tile_size.gemm_moving_fmax
    width, inner = weights["up"].shape[1], weights["down"].shape[1]
    fan = 2 if form.gated else 1
    # Interleaved columns of gate and up share a bank; else each has its own.
    piece, banks = (bank // 2, 1) if form.interleaved else (bank, fan)
    unit = min(pmax, piece)
    steps = []
    plan = [("up", inner, width, piece, banks, unit, fan), ("down", width, inner, bank, 1, 1, 1)]
    for phase, columns, contraction, piece, banks, unit, fan in plan:
        most = max(1, config.banks // (block["size"] * banks))
        waves = _even_spans(columns, piece, most, unit)
        slices = spans(contraction, pmax)
        for wave in range(len(waves)):
            left, right = waves[wave]
            for index in range(len(slices)):
                steps.append(
                    {
                        "phase": phase,
                        "block": number,
                        "span": (left, right),
                        "pieces": _even_spans(right - left, piece, 1, unit),
                        "slice": slices[index],
                        "index": index,
                        "bytes": fan * (right - left) * config.itemsize,
                        "first": index == 0,
                        "last": index == len(slices) - 1,
                        "in_tail": index >= len(slices) - config.tail,
                        "first_wave": wave == 0,
                        "last_wave": wave == len(waves) - 1,
                    }
                )
    return steps


def _even_spans(extent, piece, most, unit):
    """Cut 0 .. extent - 1 into equal spans, at most `most` pieces, whole units but for the end."""
    count = -(-extent // (piece * most))
    size = -(-extent // (count * unit)) * unit
    return spans(extent, min(size, piece * most))


def _load_ahead(steps, loaded, at, ahead, blocks, weights, form, config):
    """Start loads of weights, at least of this step, until "most" bytes are on their way."""
    while ahead["next"] < len(steps):
        step = steps[ahead["next"]]
        if ahead["next"] > at and ahead["bytes"] + step["bytes"] > ahead["most"]:
            return
        block = blocks[step["block"]]
        loaded[ahead["next"]] = _load(step, block, weights, form, config)
        ahead["bytes"] += step["bytes"]
        ahead["next"] += 1


def _load(step, block, weights, form, config):
    """Start to load a slice of an expert's weights, and at the first one of a wave its bias.

    Returns [slice, columns], gate's before up's; the bias, on every partition, likewise.
    """
    (start, stop), (left, right) = step["slice"], step["span"]
    columns, parts = right - left, 1
    if step["phase"] == "up" and form.gated:
        if form.interleaved:
            left, columns = 2 * left, 2 * columns
        else:
            parts = 2
    weight, bias = weights[step["phase"]], weights[step["phase"] + "_bias"]
    size = weight.shape[2]
    spots = [(weight, size, start * size + left, stop - start)]
    if bias is not None and step["first"]:
        spots.append((bias, 0, left, max(block["rows"])))
    tiles = []
    for source, step_of_rows, offset, rows in spots:
        tile = nl.ndarray((rows, parts * columns), dtype=source.dtype, buffer=nl.sbuf)
        view = source.ap(
            pattern=[[step_of_rows, rows], [size // 2, parts], [1, columns]],
            offset=offset,
            scalar_offset=block["expert"],
            indirect_dim=0,
        )
        target = tile.reshape((rows, parts, columns))
        nisa.dma_copy(dst=target, src=view, dge_mode=queue(config))
        tiles.append(tile)
    return {"weights": tiles[0], "bias": tiles[1] if len(tiles) > 1 else None}


def _accumulators(block, step, form):
    """Allocate the accumulators of a wave: a group per tile and piece, a bank for each of a group.

    "left" and "right" are columns of the slice of weights.
    """
    width = step["span"][1] - step["span"][0]
    groups = []
    for tile in range(block["size"]):
        for left, right in step["pieces"]:
            parts = [(left, right)]
            if step["phase"] == "up" and form.gated:
                if form.interleaved:
                    parts = [(2 * left, 2 * right)]
                else:
                    parts = [(left, right), (width + left, width + right)]
            group = []
            for start, stop in parts:
                shape = (block["rows"][tile], stop - start)
                psum = nl.ndarray(shape, dtype=nl.float32, buffer=nl.psum)
                sums = {"psum": psum, "tile": tile, "left": start, "right": stop, "begun": False}
                sums["first_row"] = sum(block["rows"][:tile])
                sums["columns"] = (step["span"][0] + left, step["span"][0] + right)
                group.append(sums)
            groups.append(group)
    return groups


def _multiply(sums, pair):
    """Add the product of a slice to an accumulator."""
    psum, first = sums["psum"], sums["first_row"]
    nisa.nc_matmul(
        dst=psum,
        stationary=pair["turned"][:, first : first + psum.shape[0]],
        moving=pair["weights"][:, sums["left"] : sums["right"]],
        accumulate=sums["begun"],
    )
    sums["begun"] = True


def _finish_wave(blocks, step, state, form, config, after):
    """Run the tail of a wave and evict it; then turn what is ready."""
    number = step["block"]
    block = blocks[number]
    emptied = []
    for group in state["groups"]:
        for sums in group:
            for pair in state["pending"]:
                _multiply(sums, pair)
        if step["phase"] == "up":
            emptied.append(_empty(group, state["bias"], form, config))
        else:
            left, right = group[0]["columns"]
            start = step["span"][0]
            place = state["result"][:, group[0]["tile"], left - start : right - start]
            block["evict"](place, group[0]["tile"], _with_bias(group[0], state["bias"]))
    if step["phase"] == "down":
        block["store"](step["span"], state["result"])
        return
    if step["first_wave"]:
        state["turned"] = []
    # One wave late: its evictions are through, and PE does not wait for them.
    state["turned"] += turn_columns(state["late"])
    pieces = [[] for _ in range(block["size"])]
    for number_of_group in range(len(emptied)):
        tile = state["groups"][number_of_group][0]["tile"]
        pieces[tile].append(_features(emptied[number_of_group], form, config))
    state["late"] = _columns(pieces)
    if step["last_wave"]:
        # The rows of the next block fill the time that evictions take before and after the turn.
        following = number + 1 < len(blocks)
        if following:
            _turn(blocks[number + 1], 0, 2)
        block["turned"] = []
        state["turned"] += turn_columns(state["late"])
        state["late"] = []
        if following:
            _turn(blocks[number + 1], 1, 2)
            _start(blocks, number + 2, after)


def _columns(pieces):
    """Cut the features of a wave, by row tile, into slices: for each, the views of all tiles."""
    columns = []
    for number in range(len(pieces[0])):
        for left, right in spans(pieces[0][number].shape[1], nl.tile_size.pmax):
            columns.append([tile[number][:, left:right] for tile in pieces])
    return columns


def _empty(group, bias, form, config):
    """Take a group of accumulators out of PSUM, in as few steps as possible.

    PE waits for the banks: what the clamped form takes beyond that is done while it fills them
    again. Returns [features], or [gate, up] of that form.
    """
    parts = [_with_bias(sums, bias) for sums in group]
    if form.limit is not None and bias is None:
        parts = [_copy(part) for part in parts]
    if form.interleaved:
        count = parts[0].shape[1]
        parts = [parts[0][:, 0:count:2], parts[0][:, 1:count:2]]
    if form.limit is not None:
        return parts
    result = nl.ndarray(parts[0].shape, dtype=config.dtype, buffer=nl.sbuf)
    function = activation_of(form.activation)
    if not form.gated:
        nisa.activation(dst=result, op=function, data=parts[0])
        return [result]
    active = nl.ndarray(parts[0].shape, dtype=nl.float32, buffer=nl.sbuf)
    nisa.activation(dst=active, op=function, data=parts[0])
    nisa.tensor_tensor(dst=result, data1=active, data2=parts[1], op=nl.multiply)
    return [result]


def _features(parts, form, config):
    """Return the hidden features of a group, rounded to the dtype of x."""
    if form.limit is None:
        return parts[0]
    result = nl.ndarray(parts[0].shape, dtype=config.dtype, buffer=nl.sbuf)
    _clamped(result, parts[0], parts[1], form)
    return result


def _copy(psum):
    result = nl.ndarray(psum.shape, dtype=nl.float32, buffer=nl.sbuf)
    nisa.tensor_copy(dst=result, src=psum, engine=nisa.engine.vector)
    return result


def _with_bias(sums, bias):
    """Return the sums of an accumulator: in PSUM, or in SBUF with the bias of its columns."""
    psum = sums["psum"]
    if bias is None:
        return psum
    total = nl.ndarray(psum.shape, dtype=nl.float32, buffer=nl.sbuf)
    addend = bias[0 : psum.shape[0], sums["left"] : sums["right"]]
    nisa.tensor_tensor(dst=total, data1=psum, data2=addend, op=nl.add)
    return total


def _clamped(result, gate, up, form):
    """result = g * sigmoid(alpha * g) * (u + 1), g = min(gate, limit), u = clip(up, +-limit)."""
    rows, count = result.shape
    low, power, high = [
        nl.ndarray((rows, count), dtype=nl.float32, buffer=nl.sbuf) for _ in range(3)
    ]
    nisa.tensor_scalar(dst=low, data=gate, op0=nl.minimum, operand0=form.limit)
    nisa.activation(dst=power, op=nl.sigmoid, data=low, scale=form.alpha)
    nisa.tensor_scalar(
        dst=high,
        data=up,
        op0=nl.minimum,
        operand0=form.limit,
        op1=nl.maximum,
        operand1=-form.limit,
    )
    nisa.tensor_tensor(dst=power, data1=low, data2=power, op=nl.multiply, engine=nisa.engine.gpsimd)
    nisa.scalar_tensor_tensor(
        dst=result, data=high, op0=nl.add, operand0=1.0, op1=nl.multiply, operand1=power
    )
