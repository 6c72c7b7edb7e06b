"""Steps of attention decode: scores, softmax and values of one block of keys, and their merge.

Scores stand transposed, keys on partitions, so that the probabilities need no transposes. Every
statistic of a row (maximum, sum, factors) stands in one column on *all* partitions: it is brought
there by a product with ones, and then scales scores and outputs, both transposed, without
broadcasts. A column is a row of the output; a step has those of some KV heads side by side:
column (h * rows_per_head + r).

A block gives partition p keys p * n .. p * n + n - 1 (any order will do, if K and V share it):
descriptors are long, and a page of a paged cache is a partition.
"""

from __future__ import annotations

from dataclasses import dataclass

import nki.isa as nisa
import nki.language as nl

#: Added to masked scores: far below any score, and not so far that sums of it overflow.
MASKED = -(2.0**100)

#: The least maximum of a row: scores that are all masked lie so far below it that their
#: exponentials are 0.
_FLOOR = MASKED / 2

#: What log takes; the sum of a row that attends anything is about 1 at least.
_LEAST = 2.0**-64

_LOWEST = -3e38


@dataclass(frozen=True)
class DecodeRule(nl.NKIObject):
    """Which keys a query attends, and how a score is made of a product.

    Attributes:
        scale: factor of q·k.
        window: keys attended, counted back from the query's own; 0 is no limit.
        softcap: scores become softcap * tanh(score / softcap); 0 is off.
    """

    scale: float
    window: int
    softcap: float


@dataclass(frozen=True)
class DecodeConfig(nl.NKIObject):
    """Tuning of attention_decode. No field changes the mathematics.

    Attributes:
        heads: KV heads at most that share a softmax and the fixed costs of its instructions.
        tokens: keys of a head at most that a partition holds: n of the block layout.
        ahead: steps whose K and V are loaded early.
        lag: groups of keys transposed before the scores of an earlier group are formed.
        scalar: of 8 evictions of transposed keys, how many Scalar takes.
        hwdge: copies go through the hardware descriptor engine (gen3 and later).
    """

    heads: int
    tokens: int
    ahead: int
    lag: int
    scalar: int
    hwdge: bool


def spans(extent, size):
    """Cut 0 .. extent - 1 into (start, stop) of `size`; the last may be shorter."""
    return [(start, min(start + size, extent)) for start in range(0, extent, size)]


def rows_of(q, k):
    """Return the rows of a KV head that share a pass over the cache: P at most, whole queries."""
    group = q.shape[1] // k.shape[1]
    return group * min(q.shape[2], max(1, nl.tile_size.pmax // group))


def fitted(config, kv_heads, each, page):
    """Return the config with what the sizes allow: `each` rows per KV head, `page` keys or None.

    Steps have heads of equal number; several of them take whole pages, one may take parts.
    """
    heads = min(config.heads, kv_heads, max(1, nl.tile_size.pmax // each))
    tokens = config.tokens
    if page is not None and tokens < page:
        heads = 1
        while page % tokens != 0:
            tokens -= 1
        tokens = max(tokens, page // nl.tile_size.pmax)
    while kv_heads % heads != 0:
        heads -= 1
    if page is not None:
        tokens = min(tokens, page)
    return DecodeConfig(heads, tokens, config.ahead, config.lag, config.scalar, config.hwdge)


def mode_of(config):
    """Return the descriptor engine of plain copies."""
    return nisa.dge_mode.hwdge if config.hwdge else nisa.dge_mode.unknown


def transposed_dtype(dtype):
    """Return what PE writes when it transposes: gen2 does so by a product, in float32."""
    return nl.float32 if nisa.get_nc_version() == nisa.nc_version.gen2 else dtype


def sizeof(dtype):
    """Return the bytes of an element of K and V: 4, 2, or 1 for fp8."""
    if dtype == nl.float32:
        return 4
    return 2 if dtype in (nl.bfloat16, nl.float16) else 1


class Constants:
    """What every step needs: ones, the identity, and where each query ends.

    Query t of sequence b attends the keys before position length - T + 1 + t. `lengths` [P, B] and
    `steps` [P, T], which is t + 1 - T, stand on every partition.
    """

    def __init__(self, lengths, queries, config):
        pmax = nl.tile_size.pmax
        self.ones = nl.ndarray((pmax, pmax), dtype=nl.float32, buffer=nl.sbuf)
        nisa.memset(dst=self.ones, value=1.0)
        self.short = None
        self.identity = nl.ndarray((pmax, pmax), dtype=nl.float32, buffer=nl.sbuf)
        nisa.affine_select(
            dst=self.identity, pattern=[[-1, pmax]], channel_multiplier=1,
            on_true_tile=self.ones, on_false_value=0.0, cmp_op=nl.equal,
        )  # fmt: skip
        batches = lengths.shape[0]
        raw = nl.ndarray((pmax, batches), dtype=nl.int32, buffer=nl.sbuf)
        source = lengths.ap(pattern=[[0, pmax], [1, batches]])
        nisa.dma_copy(dst=raw, src=source, dge_mode=mode_of(config))
        self.lengths = nl.ndarray((pmax, batches), dtype=nl.float32, buffer=nl.sbuf)
        nisa.tensor_copy(dst=self.lengths, src=raw)
        self.steps = nl.ndarray((pmax, queries), dtype=nl.float32, buffer=nl.sbuf)
        nisa.iota(dst=self.steps, pattern=[[1, queries]], offset=1 - queries)

    def ones_of(self, dtype):
        """Return ones [P, P] of a dtype."""
        if dtype == nl.float32:
            return self.ones
        if self.short is None:
            self.short = nl.ndarray(self.ones.shape, dtype=dtype, buffer=nl.sbuf)
            nisa.memset(dst=self.short, value=1.0)
        return self.short

    def mask(self, batch, queries, positions, window):
        """Return 0 where a query attends the key at `positions` [rows, n], else MASKED.

        The result is [rows, n, queries], of the queries `queries` (start, stop).
        """
        rows, count = positions.shape
        ends = self.ends(batch, queries, rows)
        if ends.shape[1] > 1:
            return self._plane(positions, ends, window)
        mask = nl.ndarray((rows, count, 1), dtype=nl.float32, buffer=nl.sbuf)
        nisa.tensor_scalar(
            dst=mask[:, :, 0], data=positions, op0=nl.greater_equal, operand0=ends,
            op1=nl.multiply, operand1=MASKED,
        )  # fmt: skip
        if window > 0:
            nisa.tensor_scalar(dst=ends, data=ends, op0=nl.subtract, operand0=float(window))
            early = nl.ndarray((rows, count), dtype=nl.float32, buffer=nl.sbuf)
            nisa.tensor_scalar(
                dst=early, data=positions, op0=nl.less, operand0=ends,
                op1=nl.multiply, operand1=MASKED,
            )  # fmt: skip
            nisa.tensor_tensor(dst=mask[:, :, 0], data1=mask[:, :, 0], data2=early, op=nl.minimum)
        return mask

    def ends(self, batch, queries, rows):
        """Return the first key position that each query does not attend, [rows, queries]."""
        start, stop = queries
        length = self.lengths[0:rows, batch : batch + 1]
        ends = nl.ndarray((rows, stop - start), dtype=nl.float32, buffer=nl.sbuf)
        steps = self.steps[0:rows, start:stop]
        nisa.tensor_scalar(dst=ends, data=steps, op0=nl.add, operand0=length)
        return ends

    def _plane(self, positions, ends, window):
        """Return the mask of several queries at once."""
        (rows, count), queries = positions.shape, ends.shape[1]
        mask = nl.ndarray((rows, count, queries), dtype=nl.float32, buffer=nl.sbuf)
        by_key = positions.expand_dim(2).broadcast(2, queries)
        by_query = ends.expand_dim(1).broadcast(1, count)
        nisa.tensor_tensor(dst=mask, data1=by_key, data2=by_query, op=nl.greater_equal)
        if window > 0:
            nisa.tensor_scalar(dst=ends, data=ends, op0=nl.subtract, operand0=float(window))
            early = nl.ndarray(mask.shape, dtype=nl.float32, buffer=nl.sbuf)
            nisa.tensor_tensor(dst=early, data1=by_key, data2=by_query, op=nl.less)
            nisa.tensor_tensor(dst=mask, data1=mask, data2=early, op=nl.maximum)
        nisa.tensor_scalar(dst=mask, data=mask, op0=nl.multiply, operand0=MASKED)
        return mask


def positions_of(rows, each, start, tail):
    """Return float32 key positions [rows, columns]: start + p * each + j, then `tail` + p."""
    columns = each + (0 if tail is None else 1)
    tile = nl.ndarray((rows, columns), dtype=nl.float32, buffer=nl.sbuf)
    if each > 0:
        nisa.iota(dst=tile[:, 0:each], pattern=[[1, each]], offset=start, channel_multiplier=each)
    if tail is not None:
        nisa.iota(dst=tile[:, each:columns], pattern=[[1, 1]], offset=tail, channel_multiplier=1)
    return tile


def load_queries(q, batch, queries, config):
    """Start to load the rows of all heads and some queries of a sequence.

    Returns tiles of at most P rows [h * queries + t, D], in order.
    """
    _, heads, total, depth = q.shape
    (start, stop), tiles = queries, []
    count = stop - start
    for first, last in spans(heads, max(1, nl.tile_size.pmax // count)):
        tile = nl.ndarray(((last - first) * count, depth), dtype=q.dtype, buffer=nl.sbuf)
        pattern = [[total * depth, last - first], [depth, count], [1, depth]]
        at = ((batch * heads + first) * total + start) * depth
        source = q.ap(pattern=pattern, offset=at)
        nisa.dma_copy(dst=tile, src=source, dge_mode=mode_of(config))
        tiles.append(tile)
    return tiles


class Rows:
    """Running maximum, sum and output of the rows of one sequence and some of its heads."""

    def __init__(self, sinks, depth, columns):
        self.depth, self.columns = depth, columns
        self.maximum = self.total = self.outputs = self.factor = None
        self.scores = self.highest = self.sums = self.weights = None
        if sinks is not None:
            self.maximum = sinks
            self.total = nl.ndarray(sinks.shape, dtype=nl.float32, buffer=nl.sbuf)
            nisa.memset(dst=self.total, value=1.0)

    def peak(self, scores):
        """Begin to take in scores [rows, heads, n, columns of a head]: their maxima by partition.

        The parts of a softmax, this one to `settle`, each begin with what needs no wait; other work
        goes between them.
        """
        self.scores = scores
        highest = nl.ndarray((scores.shape[0], self.columns), dtype=nl.float32, buffer=nl.sbuf)
        into = highest.reshape_dim(1, (scores.shape[1], scores.shape[3]))
        count = scores.shape[2]
        if 2 * scores.shape[3] >= nl.tile_size.pmax and count > 1:
            # A reduction steps over a row of scores each time, which costs Vector twice as much.
            scores = self._halved(scores, nl.maximum)
        nisa.tensor_reduce(dst=into, op=nl.maximum, data=scores.permute((0, 1, 3, 2)), axis=3)
        self.highest = highest

    def _halved(self, data, op):
        """Return data [rows, heads, n, columns] reduced to n = 1, half by half."""
        while data.shape[2] > 1:
            rows, heads, count, columns = data.shape
            half = (count + 1) // 2
            less = nl.ndarray((rows, heads, half, columns), dtype=nl.float32, buffer=nl.sbuf)
            left, right = data[:, :, 0 : count - half, :], data[:, :, half:count, :]
            nisa.tensor_tensor(dst=less[:, :, 0 : count - half, :], data1=left, data2=right, op=op)
            if count % 2 == 1:
                middle = data[:, :, half - 1, :]
                nisa.tensor_copy(dst=less[:, :, half - 1, :], src=middle)
            data = less
        return data

    def turn(self, constants):
        """Find the maximum over all keys, and place it on a diagonal [columns, columns]."""
        rows, columns = self.scores.shape[0], self.columns
        turned = nl.ndarray((columns, rows), dtype=nl.float32, buffer=nl.psum)
        nisa.nc_transpose(dst=turned, data=self.highest, engine=nisa.engine.tensor)
        column = nl.ndarray((columns, 1), dtype=nl.float32, buffer=nl.sbuf)
        nisa.tensor_reduce(dst=column, op=nl.maximum, data=turned, axis=1)
        self.highest = nl.ndarray((columns, columns), dtype=nl.float32, buffer=nl.sbuf)
        identity = constants.identity[0:columns, 0:columns]
        nisa.tensor_scalar(dst=self.highest, data=identity, op0=nl.multiply, operand0=column)

    def weigh(self, constants, dtype):
        """Form exp(scores - maximum)."""
        scores, old = self.scores, self.maximum
        rows, _, count, _ = scores.shape
        everywhere = nl.ndarray((nl.tile_size.pmax, self.columns), nl.float32, buffer=nl.psum)
        ones = constants.ones[0 : self.columns, :]
        nisa.nc_matmul(dst=everywhere, stationary=ones, moving=self.highest, accumulate=False)
        self.maximum = self._raised(everywhere, old)
        by_column = self.maximum[0:rows, :].reshape_dim(1, (scores.shape[1], scores.shape[3]))
        shift = by_column.expand_dim(2).broadcast(2, count)
        nisa.tensor_tensor(dst=scores, data1=scores, data2=shift, op=nl.subtract)
        self.weights = nl.ndarray(scores.shape, dtype=dtype, buffer=nl.sbuf)
        nisa.activation(dst=self.weights, op=nl.exp, data=scores)
        self.factor = None
        if old is not None:
            self.factor = self._all(nl.subtract, old, self.maximum)
            nisa.activation(dst=self.factor, op=nl.exp, data=self.factor)

    def add_up(self):
        """Sum the exponentials by partition; return them, [rows, heads, n, columns of a head].

        Where a head fills half of the array PE sums them in `settle`: it takes 58 ns for 128
        columns, Vector 133.
        """
        weights = self.weights
        rows, heads, _, each = weights.shape
        self.sums = weights
        self.scores = self.highest = self.weights = None
        if 2 * each >= nl.tile_size.pmax:
            return weights
        self.sums = nl.ndarray((rows, self.columns), dtype=nl.float32, buffer=nl.sbuf)
        into = self.sums.reshape_dim(1, (heads, each))
        nisa.tensor_reduce(dst=into, op=nl.add, data=weights.permute((0, 1, 3, 2)), axis=3)
        return weights

    def settle(self, constants):
        """Add the sums of all partitions to those of earlier keys."""
        total = nl.ndarray((nl.tile_size.pmax, self.columns), dtype=nl.float32, buffer=nl.psum)
        sums = self.sums
        if len(sums.shape) == 2:
            sums = sums.expand_dim(1).expand_dim(1)
        _, heads, count, each = sums.shape
        ones = constants.ones_of(sums.dtype)[0 : sums.shape[0], :]
        for head in range(heads):
            for j in range(count):
                nisa.nc_matmul(
                    dst=total[:, head * each : (head + 1) * each],
                    stationary=ones,
                    moving=sums[:, head, j, :],
                    accumulate=j > 0,
                )
        if self.factor is not None:
            self.total = self._all(nl.multiply, self.total, self.factor)
        self.total = self._all(nl.add, total, self.total)
        self.sums = None

    def _raised(self, new, old):
        """Return the maximum of new, old (unless None) and the floor."""
        result = nl.ndarray(new.shape, dtype=nl.float32, buffer=nl.sbuf)
        if old is None:
            nisa.tensor_scalar(dst=result, data=new, op0=nl.maximum, operand0=_FLOOR)
        else:
            nisa.scalar_tensor_tensor(
                dst=result, data=new, op0=nl.maximum, operand0=_FLOOR, op1=nl.maximum, operand1=old
            )
        return result

    def _all(self, op, new, old):
        """Return op(new, old) in a new tile; `new` itself when there is nothing old."""
        result = nl.ndarray(new.shape, dtype=nl.float32, buffer=nl.sbuf)
        if old is None:
            nisa.tensor_copy(dst=result, src=new)
        else:
            nisa.tensor_tensor(dst=result, data1=new, data2=old, op=op)
        return result

    def add_values(self, weights, values):
        """Add weights · values, values [rows, heads, n, Dv]; outputs are [Dv cut into P, columns].

        The values are stationary: outputs of all heads fill one narrow tile, transposed once at
        the end, and are scaled by the statistics as they stand.
        """
        _, heads, count, each = weights.shape
        outputs = []
        cuts = spans(self.depth, nl.tile_size.pmax)
        for number in range(len(cuts)):
            left, right = cuts[number]
            psum = nl.ndarray((right - left, self.columns), dtype=nl.float32, buffer=nl.psum)
            for head in range(heads):
                for j in range(count):
                    nisa.nc_matmul(
                        dst=psum[:, head * each : (head + 1) * each],
                        stationary=values[:, head, j, left:right],
                        moving=weights[:, head, j, :],
                        accumulate=j > 0,
                    )
            old = None
            if self.outputs is not None:
                factor = self.factor[0 : right - left, :]
                old = self._all(nl.multiply, self.outputs[number], factor)
            outputs.append(self._all(nl.add, psum, old))
        self.outputs = outputs

    def finish(self, target, place, value_scale, config):
        """Store outputs / total at a `place` of `target`; return (maximum, total) [1, ...].

        The outputs of a row whose every score is masked are 0. `value_scale` [P, heads] of fp8
        values, or None.
        """
        total = nl.ndarray(self.total.shape, dtype=nl.float32, buffer=nl.sbuf)
        nisa.tensor_scalar(dst=total, data=self.total, op0=nl.maximum, operand0=_LEAST)
        factor = nl.ndarray(total.shape, dtype=nl.float32, buffer=nl.sbuf)
        nisa.reciprocal(dst=factor, data=total)
        if value_scale is not None:
            heads = value_scale.shape[1]
            each = factor.reshape_dim(1, (heads, self.columns // heads))
            scale = value_scale.expand_dim(2).broadcast(2, each.shape[2])
            nisa.tensor_tensor(dst=each, data1=each, data2=scale, op=nl.multiply)
        cuts = spans(self.depth, nl.tile_size.pmax)
        result = nl.ndarray((self.columns, self.depth), dtype=target.dtype, buffer=nl.sbuf)
        for number in range(len(cuts)):
            left, right = cuts[number]
            scaled = self._all(nl.multiply, self.outputs[number], factor[0 : right - left, :])
            turned = nl.ndarray((self.columns, right - left), dtype=nl.float32, buffer=nl.psum)
            nisa.nc_transpose(dst=turned, data=scaled, engine=nisa.engine.tensor)
            nisa.tensor_copy(dst=result[:, left:right], src=turned)
        pattern, offset = place
        pattern = [[step * self.depth, count] for step, count in pattern]
        view = target.ap(pattern=[*pattern, [1, self.depth]], offset=offset * self.depth)
        nisa.dma_copy(dst=view, src=result, dge_mode=mode_of(config))
        return self.maximum[0:1, :], total[0:1, :]


def place_of(shape, batch, heads, queries):
    """Return (pattern, offset) of the rows of some heads and queries among [B, H, T]."""
    (first, last), (start, stop) = heads, queries
    offset = (batch * shape[1] + first) * shape[2] + start
    if stop - start == shape[2]:
        return [[1, (last - first) * shape[2]]], offset
    return [[shape[2], last - first], [1, stop - start]], offset


class Logarithms:
    """Collects maxima and sums of finished rows, and stores maximum + log(sum).

    Many rows at once: each change of function costs Scalar 1.3 us.
    """

    def __init__(self, target, config):
        self.target, self.config = target, config
        self.room = nl.tile_size.gemm_moving_fmax
        self.filled = 0
        self.places = []
        self.maximum = self.total = None

    def add(self, maximum, total, place):
        """Take in the rows of a place; see `place_of`."""
        count = maximum.shape[1]
        if self.filled + count > self.room:
            self.flush()
        if self.filled == 0:
            self.maximum = nl.ndarray((1, self.room), dtype=nl.float32, buffer=nl.sbuf)
            self.total = nl.ndarray((1, self.room), dtype=nl.float32, buffer=nl.sbuf)
        span = slice(self.filled, self.filled + count)
        nisa.tensor_copy(dst=self.maximum[:, span], src=maximum)
        nisa.tensor_copy(dst=self.total[:, span], src=total)
        pattern, offset = place
        before = self.places[-1] if self.places else None
        joins = before is not None and len(before[0]) == 1 and len(pattern) == 1
        if joins and before[1] + before[0][0][1] == offset:
            self.places[-1] = ([[1, before[0][0][1] + count]], before[1])
        else:
            self.places.append(place)
        self.filled += count

    def flush(self):
        """Store what is collected; -inf for rows that attend nothing."""
        if self.filled == 0:
            return
        maximum, total = self.maximum[:, 0 : self.filled], self.total[:, 0 : self.filled]
        nisa.activation(dst=total, op=nl.log, data=total)
        nisa.tensor_tensor(dst=total, data1=total, data2=maximum, op=nl.add)
        # Twice -3e38 is -inf; and 0 * -3e38 leaves the others as they are.
        lowest = nl.ndarray(maximum.shape, dtype=nl.float32, buffer=nl.sbuf)
        nisa.tensor_scalar(
            dst=lowest, data=maximum, op0=nl.less_equal, operand0=_FLOOR,
            op1=nl.multiply, operand1=_LOWEST,
        )  # fmt: skip
        for _ in range(2):
            nisa.tensor_tensor(dst=total, data1=total, data2=lowest, op=nl.add)
        at = 0
        for pattern, offset in self.places:
            count = pattern[0][1] * (pattern[1][1] if len(pattern) > 1 else 1)
            view = self.target.ap(pattern=[[count, 1], *pattern], offset=offset)
            nisa.dma_copy(dst=view, src=total[:, at : at + count], dge_mode=mode_of(self.config))
            at += count
        self.filled = 0
        self.places = []
