"""What follows the products of the attention kernel: division by row sums, logarithms, the test."""

from __future__ import annotations

import nki.isa as nisa
import nki.language as nl

from nki_kernels.kernels.attention.plan import idle_rows, spans

#: Row sums inside are taken as they are; the logarithm of Scalar reaches to 2^64. Terms below
#: 2^-126 are lost to subnormals: 2^-66 of the least sum.
LEAST, MOST = 2.0**-60, 2.0**60

_MINUS_INFINITY = float("-inf")


class Sums:
    """Finishes output tiles, and keeps their sums until a section of heads is complete.

    A section takes its logarithms at once: each change of function costs Scalar 1.3 us. Column c of
    a section belongs to output tile c of its heads.
    """

    def __init__(self, q, k, extras, results, rule, config):
        self.batch, self.heads = q.shape[0], q.shape[1]
        (self.out, self.lse), self.config = results, config
        self.slopes = extras["slopes"]
        self.sub = nl.tile_size.gemm_stationary_fmax
        self.tiles = spans(q.shape[2], self.sub)
        #: Per output tile: rows at its start and end that attend nothing.
        self.idle = [idle_rows(tile, k.shape[2], rule) for tile in self.tiles]
        #: Whole heads per section.
        self.size = max(1, min(self.batch * self.heads, config.section // len(self.tiles)))
        self.sinks = _broadcast(extras["sinks"], self.sub, config)
        self.bad = nl.ndarray((self.sub, 1), dtype=nl.float32, buffer=nl.sbuf)
        nisa.memset(dst=self.bad, value=0.0, engine=nisa.engine.gpsimd)
        self.section = None
        self.sums = None
        self.checks = None
        self.joined = None
        # A window keeps GpSimd busy with masks, and its blocks take less time than a DMA's issue.
        self.shared = rule.left is None
        # Tests of sequences and biases take all of Vector.
        self.busy = extras["segments"] is not None or extras["bias"] is not None
        self.masked = extras["mask"] is not None
        self.some = None
        self.together = 1 if rule.left is None else config.join
        self.turn = 0

    def finish(self, o, step, depth, some):
        """Divide the output tiles of a block by their row sums, store them, keep the sums.

        `some`, [queries, output tiles] or None, is -1 where a mask hides all keys, else 0.
        """
        b, h = step["q"]
        number = b * self.heads + h
        if self.section is None:
            self._begin(number)
        (start, stop), sub = step["block"], self.sub
        first = start // sub
        count = -(-(stop - start) // sub)
        rows = min(sub, stop - start)
        live = [not self._dead(first + n) for n in range(count)]
        even = (stop - start) == count * rows and sum(live) == count
        column = (number - self.section) * len(self.tiles) + first
        if some is not None:
            target = self.some[: some.shape[0], column : column + some.shape[1]]
            nisa.tensor_copy(dst=target, src=some)
        if even and rows == sub:
            self._join(o, number * self.out.shape[2] + start, column, count)
            return
        for n in range(count):
            if live[n]:
                left, right = self.tiles[first + n]
                rows = right - left
                copy = nl.ndarray((rows, 1, depth + 1), dtype=nl.float32, buffer=nl.sbuf)
                self._evict(o[:rows, n : n + 1, :], copy, column + n)
                result = self._divide(copy, column + n)
                _copy(self.out[b, h, left:right, :], result.squeeze_dim(1), self.config)

    def close(self, number):
        """Take the logarithms if head `number` is the last of its section."""
        if self.section is None:
            self._begin(number)
        if number == self.batch * self.heads - 1 or number == self.section + self.size - 1:
            self._store_joined()
            self._close(number - self.section + 1)
            self.section = None

    def verdict(self):
        """Return a register: 1 if a row left the range, else 0."""
        one = nl.ndarray((self.sub, 1), dtype=nl.float32, buffer=nl.sbuf)
        nisa.memset(dst=one, value=1.0)
        total = nl.ndarray((1, 1), dtype=nl.float32, buffer=nl.psum)
        nisa.nc_matmul(dst=total, stationary=self.bad, moving=one, accumulate=False)
        flag = nl.ndarray((1, 1), dtype=nl.int32, buffer=nl.sbuf)
        nisa.tensor_scalar(dst=flag, data=total, op0=nl.minimum, operand0=1.0)
        register = nisa.register_alloc()
        nisa.register_load(register, flag)
        return register

    def _dead(self, tile):
        """Tell whether no query of an output tile attends any key."""
        before, after = self.idle[tile]
        return before + after >= self.tiles[tile][1] - self.tiles[tile][0]

    def _begin(self, number):
        self.section = number
        columns = self.size * len(self.tiles)
        self.sums = nl.ndarray((self.sub, columns), dtype=nl.float32, buffer=nl.sbuf)
        self.checks = nl.ndarray((self.sub, columns), dtype=nl.float32, buffer=nl.sbuf)
        # Rows that no tile fills must pass the test.
        nisa.memset(dst=self.sums, value=1.0, engine=nisa.engine.gpsimd)
        nisa.memset(dst=self.checks, value=0.0, engine=nisa.engine.gpsimd)
        if self.masked:
            self.some = nl.ndarray((self.sub, columns), dtype=nl.float32, buffer=nl.sbuf)
            nisa.memset(dst=self.some, value=0.0, engine=nisa.engine.gpsimd)

    def _join(self, o, row, column, count):
        """Take whole output tiles, the first at `row` of all rows; store when enough are there."""
        depth, room = self.out.shape[3], self.together * o.shape[1]
        joined = self.joined
        if joined is not None and joined["row"] + joined["count"] * self.sub != row:
            self._store_joined()
        if self.joined is None:
            copy = nl.ndarray((self.sub, room, depth + 1), dtype=nl.float32, buffer=nl.sbuf)
            self.joined = {"copy": copy, "row": row, "column": column, "count": 0}
        joined = self.joined
        first = joined["count"]
        joined["count"] += count
        self._evict(o[:, :count, :], joined["copy"][:, first : first + count, :], column)
        if joined["count"] + o.shape[1] > room:
            self._store_joined()

    def _store_joined(self):
        """Divide and store the output tiles that wait."""
        if self.joined is None:
            return
        joined, depth = self.joined, self.out.shape[3]
        self.joined = None
        row, count = joined["row"], joined["count"]
        result = self._divide(joined["copy"][:, :count, :], joined["column"])
        flat = self.out.reshape((self.batch * self.heads * self.out.shape[2], depth))
        target = flat[row : row + count * self.sub, :].reshape((count, self.sub, depth))
        _copy(target.permute((1, 0, 2)), result, self.config)

    def _evict(self, o, copy, column):
        """Copy output tiles and their sums from PSUM, and keep the sum over everything.

        PE waits for these banks, so Vector empties them all at once; dividing straight from PSUM,
        tile by tile, freed the last one 1 us later (2425 against 2243 us at Llama's shape). The
        sum is finite only if every element is: the test for overflow is free.
        """
        nisa.tensor_scalar_reduce(
            dst=copy,
            data=o[:, :, : copy.shape[2]],
            op0=nl.multiply,
            operand0=1.0,
            reduce_op=nl.add,
            reduce_res=self.checks[: o.shape[0], column : column + 1],
        )

    def _divide(self, copy, column):
        """Return copy / its last column, which is kept from `column` on, sinks added.

        The division can take its time, half of it on GpSimd, whose two-input rate is assumed.
        """
        rows, count, depth = copy.shape[0], copy.shape[1], copy.shape[2] - 1
        sums = self.sums[:rows, column : column + count]
        # Both bounds keep the logarithm defined; a row that meets one fails the test or is idle.
        for left, right, head in self._heads(column, count):
            nisa.tensor_scalar(
                dst=sums[:, left:right],
                data=copy[:, left:right, depth],
                op0=nl.add,
                operand0=0.0 if head is None else self.sinks[:rows, head : head + 1],
                op1=nl.maximum,
                operand1=LEAST / 2,
            )
        factor = nl.ndarray((rows, count), dtype=nl.float32, buffer=nl.sbuf)
        nisa.reciprocal(dst=factor, data=sums)
        result = nl.ndarray((rows, count, depth), dtype=self.out.dtype, buffer=nl.sbuf)
        gpsimd = self.shared and (self.turn % 2 or self.busy)
        self.turn += 1
        nisa.tensor_tensor(
            dst=result,
            data1=copy[:, :, :depth],
            data2=factor.expand_dim(2).broadcast(2, depth),
            op=nl.multiply,
            engine=nisa.engine.gpsimd if gpsimd else nisa.engine.vector,
        )
        return result

    def _heads(self, column, count):
        """Cut `count` output tiles where the sink changes: (first, stop, head) each."""
        if self.sinks is None:
            return [(0, count, None)]
        cuts, per_head, left = [], len(self.tiles), 0
        while left < count:
            number, tile = divmod(self.section * per_head + column + left, per_head)
            right = min(count, left + per_head - tile)
            cuts.append((left, right, number % self.heads))
            left = right
        return cuts

    def _close(self, heads):
        """Test a section, store its logarithms and the zeros of what attends nothing."""
        used = heads * len(self.tiles)
        sums = self.sums[:, :used]
        for column in range(used):
            self._settle(column, 1.0, sums)
        if self.masked and self.sinks is None:
            # A row without keys has the sum 1 for now.
            some = self.some[:, :used]
            nisa.tensor_tensor(dst=sums, data1=sums, data2=some, op=nl.subtract)
        self._test(sums, self.checks[:, :used])
        nisa.tensor_scalar(dst=sums, data=sums, op0=nl.minimum, operand0=2 * MOST)
        nisa.activation(dst=sums, op=nl.log, data=sums)
        if self.slopes is not None:
            for number in range(heads):
                columns = sums[:, number * len(self.tiles) : (number + 1) * len(self.tiles)]
                self.slopes.correct(columns, (self.section + number) % self.heads)
        if self.masked and self.sinks is None:
            # No immediate is infinite, but ten times the largest is.
            nisa.tensor_scalar(
                dst=some, data=some, op0=nl.multiply, operand0=3.0e38, op1=nl.multiply,
                operand1=10.0,
            )  # fmt: skip
            nisa.tensor_tensor(dst=sums, data1=sums, data2=some, op=nl.add)
        for column in range(used):
            self._settle(column, _MINUS_INFINITY, sums)
        self._store_sums(sums)
        self._store_zeros(heads)

    def _settle(self, column, value, sums):
        """Give rows that attend nothing `value`; with a sink they have a sum."""
        tile = column % len(self.tiles)
        before, after = self.idle[tile]
        if self.sinks is not None:
            if self._dead(tile) and value == 1.0:
                head = (self.section + column // len(self.tiles)) % self.heads
                source = self.sinks[:, head : head + 1]
                nisa.tensor_copy(dst=sums[:, column : column + 1], src=source)
            return
        size = self.tiles[tile][1] - self.tiles[tile][0]
        one = sums[:, column : column + 1]
        if before:
            _keep(one, value, -before, 1)
        if after:
            _keep(one, value, size - after - 1, -1)

    def _test(self, sums, checks):
        """Add to `bad` where a sum left the range or a result is not finite."""
        for data, op0, operand0, reduce_op, compare, bound in (
            (sums, nl.add, 0.0, nl.minimum, nl.less, LEAST),
            (sums, nl.add, 0.0, nl.maximum, nl.greater, MOST),
            (checks, nl.multiply, 0.0, nl.add, nl.not_equal, 0.0),
        ):
            scratch = nl.ndarray(data.shape, dtype=nl.float32, buffer=nl.sbuf)
            worst = nl.ndarray((self.sub, 1), dtype=nl.float32, buffer=nl.sbuf)
            nisa.tensor_scalar_reduce(
                dst=scratch,
                data=data,
                op0=op0,
                operand0=operand0,
                reduce_op=reduce_op,
                reduce_res=worst,
            )
            nisa.tensor_scalar(dst=worst, data=worst, op0=compare, operand0=bound)
            nisa.tensor_tensor(dst=self.bad, data1=self.bad, data2=worst, op=nl.add)

    def _store_sums(self, sums):
        """Store the columns of a section as rows of lse: transposed, 512 bytes a row."""
        rows, per_head = self.lse.shape[2], len(self.tiles)
        whole = rows % self.sub == 0
        for left, right in spans(sums.shape[1], self.sub):
            flipped = nl.ndarray((right - left, self.sub), dtype=nl.float32, buffer=nl.psum)
            nisa.nc_transpose(dst=flipped, data=sums[:, left:right], engine=nisa.engine.tensor)
            lines = nl.ndarray((right - left, self.sub), dtype=nl.float32, buffer=nl.sbuf)
            nisa.tensor_copy(dst=lines, src=flipped)
            start = self.section * per_head + left
            if whole:
                target = self.lse.reshape((self.batch * self.heads * per_head, self.sub))
                _copy(target[start : start + right - left, :], lines, self.config)
                continue
            line = 0
            while line < right - left:
                number, tile = divmod(start + line, per_head)
                # The rest of the head's whole tiles at once; its last tile is shorter.
                count = max(1, min(right - left - line, per_head - 1 - tile))
                first, last = self.tiles[tile][0], self.tiles[tile + count - 1][1]
                shape = (count, (last - first) // count)
                target = self.lse[number // self.heads, number % self.heads, first:last]
                source = lines[line : line + count, : shape[1]]
                _copy(target.reshape(shape), source, self.config)
                line += count

    def _store_zeros(self, heads):
        """Store the zeros of output tiles no query of which attends a key."""
        dead = [n for n in range(len(self.tiles)) if self._dead(n)]
        if not dead:
            return
        zeros = nl.ndarray((self.sub, self.out.shape[3]), dtype=self.out.dtype, buffer=nl.sbuf)
        nisa.memset(dst=zeros, value=0.0)
        for number in range(self.section, self.section + heads):
            for tile in dead:
                first, last = self.tiles[tile]
                target = self.out[number // self.heads, number % self.heads, first:last, :]
                _copy(target, zeros[: last - first], self.config)


def _keep(column, value, offset, sign):
    """Replace by `value` the rows p where offset + sign * p < 0."""
    nisa.affine_select(
        dst=column,
        pattern=[[0, 1]],
        channel_multiplier=sign,
        on_true_tile=column,
        on_false_value=value,
        cmp_op=nl.greater_equal,
        offset=offset,
    )


def _broadcast(sinks, rows, config):
    """Return exp(sinks) on every partition, [rows, H], or None."""
    if sinks is None:
        return None
    count = sinks.shape[0]
    tile = nl.ndarray((rows, count), dtype=nl.float32, buffer=nl.sbuf)
    _copy(tile, sinks.ap(pattern=[[0, rows], [1, count]]), config)
    nisa.activation(dst=tile, op=nl.exp, data=tile)
    return tile


def _copy(dst, src, config):
    mode = nisa.dge_mode.hwdge if config.hwdge else nisa.dge_mode.unknown
    nisa.dma_copy(dst=dst, src=src, dge_mode=mode)
