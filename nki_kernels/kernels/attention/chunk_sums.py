"""What follows the products of `chunked`: sums over sections, division, logarithms, the test."""

from __future__ import annotations

import nki.isa as nisa
import nki.language as nl

from nki_kernels.kernels.attention.decode import load_vector
from nki_kernels.kernels.attention.decode_steps import mode_of
from nki_kernels.kernels.attention.sums import LEAST, MOST

_LOWEST = -3e38


class ChunkSums:
    """Adds the products of the sections of a KV head; finishes them; keeps what went wrong.

    A query stands on partition p of output tile c: t = 128 c + p. Sections simply add: no shift
    differs between them.
    """

    def __init__(self, q, k, sinks, target, constants, config):
        self.out, self.lse = target
        self.constants, self.config = constants, config
        self.group = q.shape[1] // k.shape[1]
        self.sub = nl.tile_size.gemm_stationary_fmax
        self.sinks = load_vector(sinks, config)
        if sinks is not None:
            nisa.activation(dst=self.sinks, op=nl.exp, data=self.sinks)
        self.bad = nl.ndarray((self.sub, 1), dtype=nl.float32, buffer=nl.sbuf)
        nisa.memset(dst=self.bad, value=0.0, engine=nisa.engine.gpsimd)
        self.column = nl.ndarray((self.sub, 1), dtype=nl.float32, buffer=nl.sbuf)
        nisa.iota(dst=self.column, pattern=[[0, 1]], offset=0, channel_multiplier=1)
        self.total = None
        self.pending = []

    def add(self, o, group):
        """Add the output tiles of one query head and section."""
        self._store_logarithms()
        size, depth = group["span"][1] - group["span"][0], self.out.shape[3] + 1
        if group["fresh"] and group["r"] == 0:
            shape = (self.sub, self.group, -(-size // self.sub), depth)
            self.total = nl.ndarray(shape, dtype=nl.float32, buffer=nl.sbuf)
        for rows, first, last in self._pieces(size):
            target = self.total[:rows, group["r"], first:last, :]
            source = o[:rows, first:last, :depth]
            if group["fresh"]:
                nisa.tensor_copy(dst=target, src=source)
            else:
                nisa.tensor_tensor(dst=target, data1=target, data2=source, op=nl.add)

    def finish(self, group):
        """Divide the sums of a KV head's queries, and store them and their logarithms."""
        start, stop = group["span"]
        for rows, first, last in self._pieces(stop - start):
            total = self.total[:rows, :, first:last, :]
            self._finish(group, total, start + first * self.sub)
        self.total = None

    def verdict(self):
        """Return a register: 1 if a row left the range, else 0."""
        self._store_logarithms()
        one = nl.ndarray((self.sub, 1), dtype=nl.float32, buffer=nl.sbuf)
        nisa.memset(dst=one, value=1.0)
        total = nl.ndarray((1, 1), dtype=nl.float32, buffer=nl.psum)
        nisa.nc_matmul(dst=total, stationary=self.bad, moving=one, accumulate=False)
        flag = nl.ndarray((1, 1), dtype=nl.int32, buffer=nl.sbuf)
        nisa.tensor_scalar(dst=flag, data=total, op0=nl.minimum, operand0=1.0)
        register = nisa.register_alloc()
        nisa.register_load(register, flag)
        return register

    def _pieces(self, size):
        """Return (rows, first, last) of output tiles of equal height."""
        full, rest = size // self.sub, size % self.sub
        pieces = [(self.sub, 0, full)] if full > 0 else []
        return [*pieces, (rest, full, full + 1)] if rest > 0 else pieces

    def _finish(self, group, total, query):
        """Finish rows [rows, heads, tiles, E + 1] of the queries from `query` on."""
        rows, heads, tiles, depth = total.shape
        nothing = self._nothing(group["b"], query, rows, tiles)
        sums = nl.ndarray((rows, heads, tiles), dtype=nl.float32, buffer=nl.sbuf)
        for r in range(heads):
            head = group["g"] * heads + r
            last = total[:, r, :, depth - 1]
            if self.sinks is None:
                nisa.tensor_tensor(dst=sums[:, r, :], data1=last, data2=nothing, op=nl.add)
            else:
                sink = self.sinks[:rows, head : head + 1]
                nisa.tensor_scalar(dst=sums[:, r, :], data=last, op0=nl.add, operand0=sink)
        self._test(total, sums)
        factor = nl.ndarray(sums.shape, dtype=nl.float32, buffer=nl.sbuf)
        nisa.tensor_scalar(dst=factor, data=sums, op0=nl.maximum, operand0=LEAST)
        nisa.reciprocal(dst=factor, data=factor)
        shape = (rows, heads, tiles, depth - 1)
        result = nl.ndarray(shape, dtype=self.out.dtype, buffer=nl.sbuf)
        wide = factor.expand_dim(3).broadcast(3, depth - 1)
        nisa.tensor_tensor(
            dst=result, data1=total[:, :, :, : depth - 1], data2=wide, op=nl.multiply,
            engine=nisa.engine.gpsimd,
        )  # fmt: skip
        place = (group["b"], group["g"] * heads, query)
        self._store(self.out, result, place)
        self.pending.append((sums, nothing, place))

    def _nothing(self, batch, query, rows, tiles):
        """Return 1 for the queries that attend no key, else 0: [rows, tiles]."""
        ends = nl.ndarray((rows, tiles), dtype=nl.float32, buffer=nl.sbuf)
        first = query + 1 - self.lse.shape[2]
        for c in range(tiles):
            nisa.tensor_scalar(
                dst=ends[:, c : c + 1], data=self.column[:rows, :], op0=nl.add,
                operand0=float(first + c * self.sub), op1=nl.add,
                operand1=self.constants.lengths[:rows, batch : batch + 1],
            )  # fmt: skip
        nisa.tensor_scalar(dst=ends, data=ends, op0=nl.less_equal, operand0=0.0)
        return ends

    def _test(self, total, sums):
        """Add to `bad` where a sum left the range or a product is not finite."""
        rows = sums.shape[0]
        flat = sums.flatten_dims(1, 2)
        for data, op, compare, bound in (
            (flat, nl.minimum, nl.less, LEAST),
            (flat, nl.maximum, nl.greater, MOST),
            (total, nl.add, nl.not_equal, 0.0),
        ):
            worst = nl.ndarray((rows, 1), dtype=nl.float32, buffer=nl.sbuf)
            axes = (1, 2, 3) if op == nl.add else 1
            nisa.tensor_reduce(dst=worst, op=op, data=data, axis=axes)
            if op == nl.add:
                # 0 for a finite number; NaN else, which equals nothing.
                nisa.tensor_scalar(dst=worst, data=worst, op0=nl.multiply, operand0=0.0)
            nisa.tensor_scalar(dst=worst, data=worst, op0=compare, operand0=bound)
            target = self.bad[:rows, :]
            nisa.tensor_tensor(dst=target, data1=target, data2=worst, op=nl.add)

    def _store_logarithms(self):
        """Take and store the logarithms of what was finished before; Scalar waits for nothing."""
        for sums, nothing, place in self.pending:
            rows, heads, tiles = sums.shape
            logs = nl.ndarray((rows, heads, tiles, 1), dtype=nl.float32, buffer=nl.sbuf)
            flat = logs.squeeze_dim(3)
            # Sums outside of what log takes are computed anew.
            nisa.tensor_scalar(
                dst=flat, data=sums, op0=nl.maximum, operand0=LEAST, op1=nl.minimum, operand1=MOST
            )
            nisa.activation(dst=flat, op=nl.log, data=flat)
            if self.sinks is None:
                # Twice -3e38 is -inf, and 0 leaves the others as they are.
                nisa.tensor_scalar(dst=nothing, data=nothing, op0=nl.multiply, operand0=_LOWEST)
                wide = nothing.expand_dim(1).broadcast(1, heads)
                for _ in range(2):
                    nisa.tensor_tensor(dst=flat, data1=flat, data2=wide, op=nl.add)
            self._store(self.lse, logs, place)
        self.pending = []

    def _store(self, target, source, place):
        """Store [rows, heads, tiles, each] at (sequence, first head, first query)."""
        rows, heads, tiles, each = source.shape
        b, head, query = place
        total = self.lse.shape[2]
        first = (b * self.lse.shape[1] + head) * total + query
        pattern = [[each, rows], [total * each, heads], [self.sub * each, tiles], [1, each]]
        view = target.ap(pattern=pattern, offset=first * each)
        nisa.dma_copy(dst=view, src=source, dge_mode=mode_of(self.config))
