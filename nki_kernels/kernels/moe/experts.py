"""Experts of a mixture in one kernel: sort, gather, up, activation, down, combine.

Of up to a tile of tokens see `few`.

The unit of work is a block: up to `most` row tiles of one expert, whose number and first row tile
lie in SBUF, so that one program serves any load. Classes of blocks (1, 2, ... row tiles) differ in
code; how many of each there are is known at run time only. Device loops run bodies of several
blocks, such as one heavy and two light ones: PE's time for the heavy one covers what the weights of
the light ones take to arrive, and a loop's barrier (6.5 us) is paid once per body. Loops over
single blocks finish what the bodies leave.

Why not static blocks: without a loop the program must provide for T * K / B + E blocks, each with
its weights (Qwen3: 384 blocks of 128 rows, 26 us of weights each, 9.8 ms of DMA for 3.9 ms of
work). With a loop an expert's weights arrive once per 512 rows, and one expert that takes all
tokens costs less than balanced ones.

Rows are gathered from x by the sorted order (one descriptor a row, GpSimd prepares them), so that
no permuted copy of x exists; results go to sorted rows in HBM, and GpSimd's gathers of `combine`
limit the end: T * K descriptors of 16 ns.

Budget (model, trn2, 4096 tokens; us), Qwen3-30B-A3B with a load of Zipf 1.1, ideal 3934: schedule
274 (Vector 183, PE 92), loops 6260 (PE 5520 of it: padding to row tiles, turning rows and features;
DMA 4950 at its peak, the weights of each block and rows in and out), combine 645 (GpSimd's
descriptors 635, Vector 558). 45,628 instructions run. Mixtral, ideal 36,720: loops 42,100, PE
42,000, 222,015 instructions; its tails of a few rows each take the time of their weights, 1 ms.
All tokens to K experts take what even loads take (1.00 to 1.01): the blocks are the same.

Measured on the way, Qwen3: rows of a body's first block loaded inside it 7.93 ms, carried over from
the body before 7.66; a store per row tile 7.63, per wave 7.40 (stores to run-time addresses of one
tensor wait for each other); one-hot rows a tile ahead of PE and in bfloat16 7.19.
"""

from __future__ import annotations

from dataclasses import dataclass

import nki
import nki.isa as nisa
import nki.language as nl

from nki_kernels.kernels.moe.blocks import run_blocks
from nki_kernels.kernels.moe.combine import add_rows
from nki_kernels.kernels.moe.few import experts_of_few
from nki_kernels.kernels.moe.loops import entries_at, plan_loops
from nki_kernels.kernels.moe.schedule import list_blocks, order_tokens, sort_choices


@dataclass(frozen=True)
class ExpertForm(nl.NKIObject):
    """What an expert computes, apart from its weights.

    Attributes:
        activation: "silu", "gelu", "gelu_tanh" or "relu".
        gated: hidden = activation(gate) * up; else activation(up).
        interleaved: gate and up alternate along the columns; else gate comes first.
        limit: clamp of GPT-OSS, hidden = g * sigmoid(alpha * g) * (u + 1); None for the others.
        alpha: see limit.
    """

    activation: str
    gated: bool
    interleaved: bool
    limit: float | None
    alpha: float


@dataclass(frozen=True)
class ExpertsConfig(nl.NKIObject):
    """Tuning of the experts. No field changes a result.

    Attributes:
        dtype: of x and of the hidden features.
        itemsize: its bytes.
        most: row tiles of a full block.
        bodies: classes of the blocks of each device loop, in order; the last `most` loops run
            single blocks of every class.
        banks: banks of PSUM for accumulators.
        tail: slices at the end of a wave that run accumulator by accumulator.
        carry: the rows of a body's first block arrive during the body before it.
        flight: bytes per partition of weights on their way or at work, by the largest class of a
            body: small blocks leave room for more.
        ahead: gathers of `combine` on their way.
        hwdge: weights go through the hardware descriptor engine (gen3 and later).
    """

    dtype: str
    itemsize: int
    most: int
    bodies: tuple[tuple[int, ...], ...]
    banks: int
    tail: int
    carry: bool
    flight: tuple[int, ...]
    ahead: int
    hwdge: bool


@nki.jit
def experts(x, indices, scores, up, down, up_bias, down_bias, form, out_dtype, config):
    """Apply to each token the experts it chose: y[t] = sum_k scores[t, k] * expert(x[t]).

    Dimensions:
        T, H, I, E, K >= 1.

    Args:
        x: [T, H] HBM, bfloat16 | float16 | float32.
        indices: [T, K] HBM, int32; below 0 or from E on: absent.
        scores: [T, K] HBM, float32.
        up: [E, H, F] HBM, dtype of x; F = 2 I with gate and up, or I.
        down: [E, I, H] HBM, dtype of x.
        up_bias: [E, F] HBM, dtype of x, or None.
        down_bias: [E, H] HBM, dtype of x, or None.
        form: ExpertForm.
        out_dtype: dtype of the result.
        config: ExpertsConfig.

    Returns:
        [T, H] HBM, out_dtype. Sums are float32; hidden features and the row of each choice are
        rounded to the dtype of x, the result once.
    Data flow: indices -> places, order, blocks; x by order -> SBUF -> PE (turned) -> up in PSUM ->
        hidden -> PE (turned) -> down in PSUM -> sorted rows in HBM -> by places -> y.
    """
    tokens, choices = indices.shape
    count, width = up.shape[0], x.shape[1]
    y = nl.ndarray((tokens, width), dtype=out_dtype, buffer=nl.shared_hbm)
    weights = {"up": up, "down": down, "up_bias": up_bias, "down_bias": down_bias}
    if tokens <= nl.tile_size.pmax:
        experts_of_few(y, x, indices, scores, weights, form, config)
        return y
    found = sort_choices(indices, count)
    order = order_tokens(found["places"], choices, found["size"])
    spare = max([len(body) for body in config.bodies])
    lists = list_blocks(found, tokens * choices, config.most, spare)
    rows = nl.ndarray(
        (found["size"], nl.tile_size.pmax, width), dtype=x.dtype, buffer=nl.private_hbm
    )
    _run_loops(lists, {"x": x, "order": order, "rows": rows}, weights, form, config)
    places = nl.ndarray(found["places"].shape, dtype=nl.int32, buffer=nl.sbuf)
    nisa.tensor_copy(dst=places, src=found["places"])
    flat = rows.reshape((found["size"] * nl.tile_size.pmax, width))
    add_rows(y, flat, places, scores, config)
    return y


def _run_loops(lists, data, weights, form, config):
    """Run every block once: body after body, as often as its classes suffice for.

    The rows of the first block of the next loop arrive while a loop runs.
    """
    loops = plan_loops(lists, config)
    heads = [_head(loops[0], lists, data, config)]
    for number in range(len(loops)):
        if number + 1 < len(loops):
            heads.append(_head(loops[number + 1], lists, data, config))
        loop = loops[number]
        body = _body(loop, heads[number], lists, data, weights, form, config)
        heads[number] = None
        nl.fori_loop(0, loop["trips"], body)


def _head(loop, lists, data, config):
    """Start to load the rows of the first block of a loop; None where rows are not carried."""
    if not config.carry:
        return None
    size = loop["body"][0]
    entry = entries_at(lists[size]["list"], loop["at"][size], 1)
    return _block(size, entry, data, None)["load"](None)


def _body(loop, held, lists, data, weights, form, config):
    """Return the body of a device loop: the next blocks of its classes."""
    at, body = loop["at"], loop["body"]

    def work(index):
        entries = {}
        for size in sorted(set(body)):
            count = body.count(size)
            entries[size] = entries_at(lists[size]["list"], at[size], count)
            nisa.tensor_scalar(dst=at[size], data=at[size], op0=nl.add, operand0=2 * count)
        used = dict.fromkeys(entries, 0)
        blocks = []
        for size in body:
            number = used[size]
            used[size] += 1
            entry = entries[size][:, 2 * number : 2 * number + 2]
            blocks.append(_block(size, entry, data, held if len(blocks) == 0 else None))

        def carry():
            following = entries_at(lists[body[0]]["list"], at[body[0]], 1)
            _block(body[0], following, data, None)["load"](held)

        run_blocks(blocks, weights, form, config, None if held is None else carry)

    return work


def _block(size, entry, data, held):
    """Return a block for `run_blocks`: rows of x by the order, results to the sorted rows."""
    x, order, rows = data["x"], data["order"], data["rows"]
    pmax, width = nl.tile_size.pmax, x.shape[1]
    expert, first = entry[:, 0:1], entry[:, 1:2]
    scalar = nisa.get_nc_version() != nisa.nc_version.gen2

    def load(into):
        tokens = nl.ndarray((pmax, size), dtype=nl.int32, buffer=nl.sbuf)
        source = order.ap(
            pattern=[[order.shape[1], pmax], [1, size]], scalar_offset=first, indirect_dim=1
        )
        nisa.tensor_copy(dst=tokens, src=source)
        if into is None:
            into = [nl.ndarray((pmax, width), dtype=x.dtype, buffer=nl.sbuf) for _ in range(size)]
        for tile in range(size):
            token = tokens[:, tile : tile + 1]
            row = x.ap(pattern=[[width, pmax], [1, width]], vector_offset=token)
            nisa.dma_copy(dst=into[tile], src=row)
        return into

    def result(span):
        shape = (pmax, size, span[1] - span[0])
        return nl.ndarray(shape, dtype=x.dtype, buffer=nl.sbuf)

    def evict(place, tile, sums):
        # Scalar empties every other bank beside Vector.
        engine = nisa.engine.scalar if scalar and tile % 2 == 0 else nisa.engine.vector
        nisa.tensor_copy(dst=place, src=sums, engine=engine)

    def store(span, tile):
        # All row tiles at once: stores to run-time addresses of one tensor wait for each other.
        target = rows.ap(
            pattern=[[width, pmax], [pmax * width, size], [1, span[1] - span[0]]],
            offset=span[0],
            scalar_offset=first,
            indirect_dim=0,
        )
        # Not behind the weights in Sync's queue, which would wait for this block's end.
        if scalar:
            hwdge, engine = nisa.dge_mode.hwdge, nisa.engine.scalar
            nisa.dma_copy(dst=target, src=tile, dge_mode=hwdge, engine=engine)
        else:
            nisa.dma_copy(dst=target, src=tile)

    return {
        "size": size,
        "rows": [pmax] * size,
        "expert": expert,
        "held": held,
        "turned": None,
        "load": load,
        "result": result,
        "evict": evict,
        "store": store,
    }
