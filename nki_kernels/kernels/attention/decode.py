"""Attention of a few new queries over a KV cache."""

from __future__ import annotations

import nki
import nki.isa as nisa
import nki.language as nl

from nki_kernels.kernels.attention.decode_scores import Scores, form_of
from nki_kernels.kernels.attention.decode_steps import (
    Constants,
    Logarithms,
    Rows,
    fitted,
    load_queries,
    mode_of,
    place_of,
    positions_of,
    rows_of,
    spans,
)


@nki.jit
def attention_decode(q, k, v, lengths, sinks, k_scale, v_scale, rule, config):
    """softmax(scale * q k^T) v over the first lengths[b] keys of each sequence.

    Query t of T stands at position lengths[b] - T + t and attends the keys up to its own, `window`
    of them at most. A sink is one more score of its head, without a value.

    Dimensions:
        B: sequences. H, G: query and KV heads, G divides H, H / G at most P. T: new queries; as
        many as make P rows of a KV head share a pass over the cache. S: keys of the cache.
        D, E: depths of keys and values.

    Args:
        q: [B, H, T, D] HBM, bfloat16 | float16 | float32.
        k: [B, G, S, D] HBM, dtype of q; or fp8 beside 2-byte queries.
        v: [B, G, S, E] HBM, dtype of k.
        lengths: [B] HBM int32, 0 .. S. Keys beyond are masked, but must be finite.
        sinks: [H] HBM float32, or None.
        k_scale: [G] HBM float32, factors of fp8 keys by head, or None.
        v_scale: likewise of the values.
        rule: DecodeRule.
        config: DecodeConfig.

    Returns:
        [B, H, T, E] HBM, dtype of q, rounded once, and the log of the sum of exponentials
        [B, H, T] float32. A row that attends nothing is 0, and -inf.

    Data flow: HBM -> SBUF [P, heads, n, D] -> PE (keys transposed) -> PSUM -> SBUF -> PE (scores,
        keys on partitions) -> Vector (mask, maximum) -> Scalar (exp) -> PE (values) -> HBM.
    Limits: DMA, which reads the cache once: 11.4 us for 8192 keys of depth 128 of one head, while
        PE needs 7.8 for transposes (57 ns per 128 keys), scores and values (32 ns each). What comes
        late is hidden by the next step: its keys are transposed and its scores formed between the
        parts of the softmax of this one, so that PE, which is in order, never waits for Vector. Of
        8 x 8192 keys, 32/8 heads, that leaves 757 us, 96.4 % of 368 GB/s (779 with the softmax in
        one piece); with steps of half the keys it was 910 us, of half the heads 917 (model,
        unvalidated): the small instructions of a softmax are latency.
    fp8: DMA takes 5.7 us, PE 5.9 with a transpose for two keys at once (see `decode_scores`), and
        the evictions 2.1 of Vector instead of 4.3: 476 us, 1.59 times as fast. Transposed key by
        key it was 722 us.
    """
    config = fitted(config, k.shape[1], rows_of(q, k), None)
    cache = Contiguous(k, v, config)
    target = outputs(q, cache.depth)
    decode(q, cache, lengths, sinks, (k_scale, v_scale), target, rule, config)
    return target


#: What is formed of a step's scores before the second, third and fourth part of the softmax of the
#: step before: PE has that to do while Vector and Scalar do theirs.
_PARTS = (0.2, 0.4, 0.8)


class Contiguous:
    """K and V of one sequence after the other: [B, G, S, D].

    Without V the first `depth` columns of K are the values.
    """

    def __init__(self, k, v, config, depth=None):
        self.k, self.v, self.config = k, v, config
        self.heads, self.depth = k.shape[1], v.shape[3] if depth is None else depth
        self.positions = {}

    def blocks(self):
        """Return (start, partitions, keys per partition, rest) of each block of keys.

        The rest are the last keys, fewer than partitions: one each, in a column of their own.
        """
        pmax, size = nl.tile_size.pmax, self.k.shape[2]
        found = []
        for start, stop in spans(size, pmax * self.config.tokens):
            each, rest = (stop - start) // pmax, (stop - start) % pmax
            found.append((start, pmax if each > 0 else rest, each, rest))
        return found

    def load(self, batch, heads, block):
        """Start to load a block of some heads; returns (keys, values) [rows, heads, n, depth]."""
        keys = self._load(self.k, batch, heads, block)
        if self.v is None:
            return keys, keys[:, :, :, 0 : self.depth]
        return keys, self._load(self.v, batch, heads, block)

    def _load(self, source, batch, heads, block):
        start, rows, each, rest = block
        size, depth = source.shape[2], source.shape[3]
        columns = each + (1 if rest > 0 else 0)
        shape = (rows, heads[1] - heads[0], columns, depth)
        tile = nl.ndarray(shape, dtype=source.dtype, buffer=nl.sbuf)
        if 0 < rest < rows:
            # Masked, but multiplied: they must be finite.
            nisa.memset(dst=tile[:, :, each, :], value=0.0, engine=nisa.engine.gpsimd)
        for head in range(heads[0], heads[1]):
            at = ((batch * source.shape[1] + head) * size + start) * depth
            if each > 0:
                view = source.ap(pattern=[[each * depth, rows], [1, each * depth]], offset=at)
                target = tile[:, head - heads[0], 0:each, :].flatten_dims(1, 2)
                nisa.dma_copy(dst=target, src=view, dge_mode=mode_of(self.config))
            if rest > 0:
                at += rows * each * depth
                view = source.ap(pattern=[[depth, rest], [1, depth]], offset=at)
                target = tile[0:rest, head - heads[0], each, :]
                nisa.dma_copy(dst=target, src=view, dge_mode=mode_of(self.config))
        return tile

    def key_positions(self, block):
        """Return the positions of the keys of a block, [rows, n] float32."""
        start, rows, each, rest = block
        if start not in self.positions:
            tail = start + rows * each if rest > 0 else None
            self.positions[start] = positions_of(rows, each, start, tail)
        return self.positions[start]


def outputs(q, depth):
    """Return (out, lse) for queries [B, H, T, D] and values of a depth, in HBM."""
    out = nl.ndarray((*q.shape[:3], depth), dtype=q.dtype, buffer=nl.shared_hbm)
    return out, nl.ndarray(q.shape[:3], dtype=nl.float32, buffer=nl.shared_hbm)


def decode(q, cache, lengths, sinks, scales, target, rule, config):
    """Attend a cache, step by step of some heads and a block of keys; see attention_decode."""
    batches, heads, queries, _ = q.shape
    group = heads // cache.heads
    out, lse = target
    constants = Constants(lengths, queries, config)
    logarithms = Logarithms(lse, config)
    sink_rows = Sinks(sinks, config)
    factor = rule.scale / rule.softcap if rule.softcap > 0.0 else rule.scale
    key_factor, value_scale = load_vector(scales[0], config), load_vector(scales[1], config)
    factors = factor
    if key_factor is not None:
        nisa.tensor_scalar(dst=key_factor, data=key_factor, op0=nl.multiply, operand0=factor)
        factors = key_factor
    steps = _steps(batches, spans(queries, max(1, nl.tile_size.pmax // group)), cache, config)
    loaded = 0
    state = {}
    for number in range(len(steps) + 1):
        while loaded < len(steps) and loaded <= number + config.ahead:
            _load(steps[loaded], q, cache, config)
            loaded += 1
        scores = rows = None
        if number < len(steps):
            scores = _scores(steps[number], state, cache, constants, rule, group, factors)
        if number > 0:
            rows = _rows(steps[number - 1], state, sink_rows, group, cache)
            rows.peak(steps[number - 1]["scores"].scores)
        _run(scores, _PARTS[0])
        if rows is not None:
            rows.turn(constants)
        _run(scores, _PARTS[1])
        if rows is not None:
            rows.weigh(constants, q.dtype)
            steps[number - 1]["scores"] = None
        _run(scores, _PARTS[2])
        weights = None if rows is None else rows.add_up()
        _run(scores, 1.0)
        if number < len(steps):
            steps[number]["keys"] = None
        if number > 0:
            _values(
                steps[number - 1],
                weights,
                rows,
                group,
                constants,
                out,
                logarithms,
                value_scale,
                config,
            )
    logarithms.flush()


def load_vector(vector, config):
    """Return a float32 vector [n] on every partition, [P, n]; None for None."""
    if vector is None:
        return None
    pmax, size = nl.tile_size.pmax, vector.shape[0]
    tile = nl.ndarray((pmax, size), dtype=nl.float32, buffer=nl.sbuf)
    source = vector.ap(pattern=[[0, pmax], [1, size]])
    nisa.dma_copy(dst=tile, src=source, dge_mode=mode_of(config))
    return tile


class Sinks:
    """The sinks on every partition, once per query: [P, H * queries]; None without any."""

    def __init__(self, sinks, config):
        self.tile = load_vector(sinks, config)
        self.wide = {}

    def columns(self, heads, queries):
        """Return the columns of some heads (start, stop), for a number of queries."""
        if self.tile is None:
            return None
        if queries not in self.wide:
            pmax, total = self.tile.shape
            wide = nl.ndarray((pmax, total, queries), dtype=nl.float32, buffer=nl.sbuf)
            nisa.tensor_copy(dst=wide, src=self.tile.expand_dim(2).broadcast(2, queries))
            self.wide[queries] = wide.flatten_dims(1, 2)
        return self.wide[queries][:, heads[0] * queries : heads[1] * queries]


def _steps(batches, queries, cache, config):
    """One entry per sequence, part of its queries, block of keys and group of heads, in order."""
    steps = []
    blocks = cache.blocks()
    for batch in range(batches):
        for span in queries:
            for index in range(len(blocks)):
                for heads in spans(cache.heads, config.heads):
                    steps.append(
                        {
                            "batch": batch,
                            "span": span,
                            "block": blocks[index],
                            "heads": heads,
                            "first": index == 0,
                            "last": index == len(blocks) - 1,
                            "queries": None,
                        }
                    )
    return steps


def _load(step, q, cache, config):
    """Start the loads of a step; the queries with the first of theirs."""
    if step["first"] and step["heads"][0] == 0:
        step["queries"] = load_queries(q, step["batch"], step["span"], config)
    step["keys"], step["values"] = cache.load(step["batch"], step["heads"], step["block"])


def _prepare(step, state, cache, constants, rule, each):
    """What the steps of some queries, and of a block, share."""
    if step["queries"] is not None:
        state["form"] = form_of(step["queries"], step["keys"].dtype, each)
        step["queries"] = None
    if step["heads"][0] == 0:
        positions = cache.key_positions(step["block"])
        state["mask"] = constants.mask(step["batch"], step["span"], positions, rule.window)


def _scores(step, state, cache, constants, rule, group, factors):
    """Return the scores of a step, none of them formed; of `factors` those of its heads."""
    share = group, step["span"][1] - step["span"][0]
    _prepare(step, state, cache, constants, rule, share[0] * share[1])
    start, stop = step["heads"]
    if not isinstance(factors, float):
        factors = factors[:, start:stop]
    step["scores"] = Scores(
        step["keys"], state["form"], start * share[0] * share[1], share, state["mask"], factors,
        rule.softcap, cache.config,
    )  # fmt: skip
    return step["scores"]


def _run(scores, part):
    if scores is not None:
        scores.run(part)


def _rows(step, state, sinks, group, cache):
    """Return the statistics of the heads of a step; new ones for the first keys of its queries."""
    start, stop = step["heads"]
    queries = step["span"][1] - step["span"][0]
    if step["first"]:
        columns = sinks.columns((start * group, stop * group), queries)
        state[start] = Rows(columns, cache.depth, (stop - start) * group * queries)
    return state[start]


def _values(step, weights, rows, group, constants, out, logarithms, value_scale, config):
    start, stop = step["heads"]
    rows.add_values(weights, step["values"])
    rows.settle(constants)
    step["values"] = None
    if step["last"]:
        heads = (start * group, stop * group)
        place = place_of(out.shape, step["batch"], heads, step["span"])
        if value_scale is not None:
            value_scale = value_scale[:, start:stop]
        maximum, total = rows.finish(out, place, value_scale, config)
        logarithms.add(maximum, total, place)
