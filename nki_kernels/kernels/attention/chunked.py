"""Attention of a chunk of a prompt over a paged KV cache: context before it, causal inside.

Scores stand transposed, keys on partitions and queries along the free axis, as in `forward`: their
exponentials, unshifted, are the stationary operand of the product with [V | 1], whose last column
sums them. Where each sequence ends is known at run time only, so every exponential meets a mask of
zeros and ones: one for a tile of keys, shared by all heads, made by Vector and applied at its
2-byte rate. A sum that left the range, or a masked exponential that overflowed, shows in the sums
afterwards; then a device loop of 0 or 1 turns runs `decode`, which is exact, over everything.

Budget per tile of 128 keys x 512 queries, D = 128 (useful: 427 ns): PE 445; Scalar 508 over two
banks; Vector 315 for the mask; GpSimd nothing. Keys are gathered by pages and transposed by DMA
inside SBUF. Masked tiles are computed as well: cut the table to the longest sequence.
"""

from __future__ import annotations

from dataclasses import dataclass

import nki
import nki.isa as nisa
import nki.language as nl

from nki_kernels.kernels.attention.chunk_sums import ChunkSums
from nki_kernels.kernels.attention.decode import decode
from nki_kernels.kernels.attention.decode_steps import (
    Constants,
    DecodeConfig,
    fitted,
    rows_of,
    spans,
)
from nki_kernels.kernels.attention.paged import Paged


@dataclass(frozen=True)
class ChunkConfig(nl.NKIObject):
    """Tuning of attention_chunked_prefill. No field changes the mathematics.

    Attributes:
        tokens: keys of a head at most that a partition holds: a descriptor of the gathers.
        blocks: blocks of P such runs whose products are summed in PSUM.
        banks: PSUM banks one exponential reads; 1 is safe, see `forward`.
        masks: masks of a tile of keys that are kept for all heads.
        lag: groups between a group's exponentials and its product with V.
        hwdge: plain copies go through the hardware descriptor engine (gen3 and later).
        exact: config of the second path.
    """

    tokens: int
    blocks: int
    banks: int
    masks: int
    lag: int
    hwdge: bool
    exact: DecodeConfig


@nki.jit
def attention_chunked_prefill(q, k, v, table, lengths, sinks, rule, config):
    """softmax(scale * q k^T) v over the first lengths[b] keys of each sequence; see `decode`.

    Query t of T stands at position lengths[b] - T + t and attends the keys up to its own.

    Dimensions:
        B: sequences. H, G: query and KV heads. T: queries of the chunk. N: pages. P: keys of a
        page, a power of 2. W: pages of a sequence at most. D, E: depths of keys and values.

    Args:
        q: [B, H, T, D] HBM, bfloat16 | float16 | float32.
        k: [N, G, P, D] HBM, dtype of q.
        v: [N, G, P, E] HBM, dtype of q.
        table: [B, W] HBM int32, as in attention_decode_paged.
        lengths: [B] HBM int32, those of the chunk included.
        sinks: [H] HBM float32, or None.
        rule: DecodeRule.
        config: ChunkConfig.

    Returns:
        [B, H, T, E] HBM, dtype of q, and the log of the sum of exponentials [B, H, T] float32.
    """
    out_shape = (*q.shape[:3], v.shape[3])
    out = nl.ndarray(out_shape, dtype=q.dtype, buffer=nl.shared_hbm)
    lse = nl.ndarray(q.shape[:3], dtype=nl.float32, buffer=nl.shared_hbm)
    wrong = _optimistic(q, k, v, table, lengths, sinks, out, lse, rule, config)

    def again(_):
        exact = fitted(config.exact, k.shape[1], rows_of(q, k), k.shape[2])
        cache = Paged(k, v, table, exact)
        decode(q, cache, lengths, sinks, (None, None), (out, lse), rule, exact)

    nl.fori_loop(0, wrong, again)
    return out, lse


def _optimistic(q, k, v, table, lengths, sinks, out, lse, rule, config):
    """Compute with unshifted exponentials; return a register: 1 if a row left the range."""
    paging = DecodeConfig(1, config.tokens, 0, 0, 0, config.hwdge)
    cache = Paged(k, v, table, paging)
    constants = Constants(lengths, q.shape[2], config)
    sums = ChunkSums(q, k, sinks, (out, lse), constants, config)
    groups = _groups(q, k, cache, config)
    for block in cache.blocks():
        cache.key_positions(block)  # before GpSimd waits for gathers
    state = {"cache": cache, "loads": {}, "masks": {}, "owner": None, "o": None}
    values = []
    for at in range(len(groups) + config.lag):
        if at < len(groups):
            group = groups[at]
            _load(q, state, group, config)
            if group["next"] is not None:
                _load(q, state, group["next"], config)
            values.append(_exponentials(group, state, constants, rule, config))
        if at >= config.lag:
            group = groups[at - config.lag]
            if group["first"]:
                sub, width = nl.tile_size.gemm_stationary_fmax, nl.tile_size.gemm_moving_fmax
                state["o"] = nl.ndarray((sub, width // sub, width), nl.float32, buffer=nl.psum)
            _multiply(state, group, values[at - config.lag])
            values[at - config.lag] = None
            if group["last"]:
                sums.add(state["o"], group)
                if group["done"]:
                    sums.finish(group)
                if group["drop"]:
                    state["loads"].pop(group["where"])
    return sums.verdict()


def _groups(q, k, cache, config):
    """Groups of key tiles that share an exponential, in the order of execution.

    Sequence, block of queries, KV head, section of keys, query head of its group, tiles.
    """
    batch, heads, total, _ = q.shape
    kv_heads, blocks, group = k.shape[1], cache.blocks(), heads // k.shape[1]
    sections = spans(len(blocks), config.blocks)
    items = []
    for b in range(batch):
        for span in spans(total, nl.tile_size.gemm_moving_fmax):
            for g in range(kv_heads):
                for section in sections:
                    items.append({"b": b, "span": span, "g": g, "section": section})
    found = []
    for number in range(len(items)):
        item = items[number]
        start, stop = item["section"]
        tiles = []
        for block in range(start, stop):
            for left, right in spans(config.tokens, config.banks):
                tiles.append((block, left, right))
        for r in range(group):
            for n in range(len(tiles)):
                found.append(
                    {
                        **item,
                        "r": r,
                        "tile": tiles[n],
                        "block": blocks[tiles[n][0]],
                        "first": n == 0,
                        "last": n == len(tiles) - 1,
                        "fresh": start == 0,
                        "done": stop == len(blocks) and n == len(tiles) - 1 and r == group - 1,
                        "drop": r == group - 1,
                        "where": _where(item),
                        "next": None,
                    }
                )
        if number + 1 < len(items):
            # The next section is loaded once this one is under way.
            found[-len(tiles) * group]["next"] = {**items[number + 1], "where": None}
            found[-len(tiles) * group]["next"]["where"] = _where(items[number + 1])
    return found


def _where(item):
    return item["b"], item["span"], item["g"], item["section"]


def _load(q, state, group, config):
    """Load the keys, transposed, the values and the queries of a section, unless they are here."""
    if group["where"] in state["loads"]:
        return
    cache = state["cache"]
    blocks = cache.blocks()
    (start, stop), b, g = group["section"], group["b"], group["g"]
    each = q.shape[1] // cache.heads
    queries = [_turned(q[b, g * each + r], group["span"]) for r in range(each)]
    keys, values = {}, {}
    for block in range(start, stop):
        keys[block], values[block] = cache.load_turned(b, g, blocks[block])
    state["loads"][group["where"]] = {"k": keys, "v": values, "q": queries}


def _turned(source, span):
    """Return rows `span` of source [T, D] transposed: one tile per slice of the depth."""
    tiles = []
    for left, right in spans(source.shape[1], nl.tile_size.pmax):
        tile = nl.ndarray((right - left, span[1] - span[0]), dtype=source.dtype, buffer=nl.sbuf)
        nisa.dma_transpose(dst=tile, src=source[span[0] : span[1], left:right])
        tiles.append(tile)
    return tiles


def _exponentials(group, state, constants, rule, config):
    """Return the masked exponentials of a group, [keys, tiles, queries]."""
    tiles = state["loads"][group["where"]]
    block, left, right = group["tile"]
    size, rows = group["span"][1] - group["span"][0], group["block"][1]
    shape = (rows, right - left, nl.tile_size.gemm_moving_fmax)
    s = nl.ndarray(shape, dtype=nl.float32, buffer=nl.psum)
    queries, keys = tiles["q"][group["r"]], tiles["k"][block]
    for j in range(left, right):
        for number in range(len(queries)):
            nisa.nc_matmul(
                dst=s[:, j - left, :size],
                stationary=keys[number][:, j, :],
                moving=queries[number],
                accumulate=number > 0,
            )
    scores, scale = s[:, :, :size], rule.scale
    dtype = nl.float32 if queries[0].dtype == nl.float32 else nl.bfloat16
    if rule.softcap > 0.0:
        capped = nl.ndarray((rows, right - left, size), dtype=nl.float32, buffer=nl.sbuf)
        nisa.activation(dst=capped, op=nl.tanh, data=scores, scale=rule.scale / rule.softcap)
        scores, scale = capped, rule.softcap
    p = nl.ndarray((rows, right - left, size), dtype=dtype, buffer=nl.sbuf)
    nisa.activation(dst=p, op=nl.exp, data=scores, scale=scale)
    mask = _mask(group, state, constants, rule, dtype, config)
    nisa.tensor_tensor(dst=p, data1=p, data2=mask, op=nl.multiply)
    return p


def _mask(group, state, constants, rule, dtype, config):
    """Return 1 where a query attends a key of the group's tiles, else 0: [keys, tiles, queries]."""
    owner = (group["b"], group["span"])
    if state["owner"] != owner:
        state["owner"], state["masks"] = owner, {}
    if group["tile"] in state["masks"]:
        return state["masks"][group["tile"]]
    _, left, right = group["tile"]
    rows = group["block"][1]
    positions = state["cache"].key_positions(group["block"])
    ends = constants.ends(group["b"], group["span"], rows)
    mask = nl.ndarray((rows, right - left, ends.shape[1]), dtype=dtype, buffer=nl.sbuf)
    for j in range(left, right):
        key, plane = positions[:, j : j + 1], mask[:, j - left, :]
        nisa.tensor_scalar(dst=plane, data=ends, op0=nl.greater, operand0=key)
        if rule.window > 0:
            last = nl.ndarray((rows, 1), dtype=nl.float32, buffer=nl.sbuf)
            nisa.tensor_scalar(dst=last, data=key, op0=nl.add, operand0=float(rule.window))
            nisa.scalar_tensor_tensor(
                dst=plane, data=ends, op0=nl.less_equal, operand0=last,
                op1=nl.multiply, operand1=plane,
            )  # fmt: skip
    if (len(state["masks"]) + 1) * config.banks <= config.masks:
        state["masks"][group["tile"]] = mask
    return mask


def _multiply(state, group, p):
    """Add a group's products with [V | 1] to the output tiles of its queries."""
    block, left, right = group["tile"]
    values = state["loads"][group["where"]]["v"][block]
    size, depth = p.shape[2], values.shape[2]
    columns = spans(size, nl.tile_size.gemm_stationary_fmax)
    for j in range(left, right):
        for c in range(len(columns)):
            start, stop = columns[c]
            nisa.nc_matmul(
                dst=state["o"][: stop - start, c, :depth],
                stationary=p[:, j - left, start:stop],
                moving=values[:, j, :],
                accumulate=not (group["first"] and j == left),
            )
