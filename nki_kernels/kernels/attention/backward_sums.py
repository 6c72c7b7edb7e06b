"""Sums of the gradients of attention: of keys and values in PSUM, of queries in SBUF."""

from __future__ import annotations

import nki.isa as nisa
import nki.language as nl

from nki_kernels.kernels.attention.backward_loads import copy, flip
from nki_kernels.kernels.attention.backward_plan import idle_keys, idle_rows
from nki_kernels.kernels.attention.plan import spans


class BackwardSums:
    """Multiplies p and ds, and stores what is complete.

    dV and dK of a block stand transposed, [depth, key], so that each is one sum in one bank and
    one matmul per step and slice of the depth; they are turned once per block. dQ of a step stands
    as it is stored, and Vector adds it to the sum of its tile.
    """

    def __init__(self, arrays, rule, out_dtype, by_dma, config):
        q, k, v = arrays
        self.rule, self.by_dma, self.config = rule, by_dma, config
        self.rows, self.keys = q.shape[2], k.shape[2]
        self.dq = nl.ndarray(q.shape, dtype=out_dtype, buffer=nl.shared_hbm)
        self.dk = nl.ndarray(k.shape, dtype=out_dtype, buffer=nl.shared_hbm)
        self.dv = nl.ndarray(v.shape, dtype=out_dtype, buffer=nl.shared_hbm)
        self.partial = {}
        self.unstored = []
        self.sub = nl.tile_size.gemm_stationary_fmax

    def add_dv(self, step):
        """Add a step's share of dV."""
        self._add(step, step["tile"]["chunk"]["do"], step["p"], "dv", self.dv, 1.0)

    def add_dk(self, step):
        """Add a step's share of dK."""
        self._add(step, step["tile"]["chunk"]["q"], step["ds"], "dk", self.dk, self.rule.scale)

    def _add(self, step, rows, weights, name, target, scale):
        """block[name][d, key] += sum over the tile's rows of rows[row, d] * weights[row, key]."""
        tile, block = step["tile"], step["block"]
        first, depth = block["columns"][0], target.shape[3]
        if step["first"]:
            self._open(block, name, target)
        size = tile["rows"][1] - tile["rows"][0]
        some = rows[:size, tile["start"] // nl.tile_size.pmax, :]
        left, right = step["columns"]
        for number, (start, stop) in enumerate(spans(depth, self.sub)):
            nisa.nc_matmul(
                dst=block[name][number][:, left - first : right - first],
                stationary=some[:, start:stop],
                moving=weights,
                accumulate=not step["first"],
            )
        if step["last"]:
            self._close(block, name, target, scale)

    def _open(self, block, name, target):
        """Take banks for a block's sum; fetch the sum of earlier segments."""
        width = block["columns"][1] - block["columns"][0]
        block[name], block[name + " before"] = [], []
        for start, stop in spans(target.shape[3], self.sub):
            sums = nl.ndarray((stop - start, width), dtype=nl.float32, buffer=nl.psum)
            block[name].append(sums)
            if not block["begins"]:
                before = nl.ndarray(sums.shape, dtype=nl.float32, buffer=nl.sbuf)
                copy(before, self._kept(block, name, target, start, stop), self.config)
                block[name + " before"].append(before)

    def _kept(self, block, name, target, start, stop):
        """Return where the sum of a slice of the depth waits for the next segment, float32."""
        if name not in self.partial:
            batch, heads, keys, depth = target.shape
            self.partial[name] = nl.ndarray(
                (batch, heads, depth, keys), dtype=nl.float32, buffer=nl.private_hbm
            )
        b, g = block["segment"]["kv"]
        first = block["keys"][0]
        left, right = first + block["columns"][0], first + block["columns"][1]
        return self.partial[name][b, g, start:stop, left:right]

    def _close(self, block, name, target, scale):
        """Empty the banks of a block's sum; turn and store it if this is its last segment."""
        totals = []
        dtype = target.dtype if block["ends"] else nl.float32
        for number, (start, stop) in enumerate(spans(target.shape[3], self.sub)):
            sums = block[name][number]
            total = nl.ndarray(sums.shape, dtype=dtype, buffer=nl.sbuf)
            if block["begins"]:
                nisa.activation(dst=total, op=nl.copy, data=sums, scale=scale)
            else:
                _scale_and_add(total, sums, scale, block[name + " before"][number])
            if not block["ends"]:
                copy(self._kept(block, name, target, start, stop), total, self.config)
            totals.append(total)
        block[name] = None
        if block["ends"]:
            self.unstored.append((block, target, totals))

    def flush(self):
        """Turn and store the blocks that were complete a step ago: PE would wait for them."""
        for block, target, totals in self.unstored:
            (b, g), depth, pmax = block["segment"]["kv"], target.shape[3], nl.tile_size.pmax
            width = block["columns"][1] - block["columns"][0]
            shape = (min(pmax, width), -(-width // pmax), depth)
            result = nl.ndarray(shape, dtype=target.dtype, buffer=nl.sbuf)
            for number, (start, stop) in enumerate(spans(depth, self.sub)):
                flip(result[:, :, start:stop], totals[number], self.by_dma, nisa.engine.vector)
            first = block["keys"][0] + block["columns"][0]
            self._store(target[b, g, first : first + width, :], result)
        self.unstored = []

    def _store(self, target, tile):
        """Store [key in tile, tile, depth] as rows [key, depth]."""
        (count, depth), pmax = target.shape, nl.tile_size.pmax
        whole = count // pmax
        if whole:
            rows = target[: whole * pmax, :].reshape((whole, pmax, depth))
            copy(rows.permute((1, 0, 2)), tile[:, :whole, :], self.config)
        if count > whole * pmax:
            copy(target[whole * pmax :, :], tile[: count - whole * pmax, whole, :], self.config)

    def add_dq(self, step):
        """Add a step's share of dQ; store it with the last."""
        tile, block, scale = step["tile"], step["block"], self.rule.scale
        size, depth = tile["rows"][1] - tile["rows"][0], self.dq.shape[3]
        share = nl.ndarray((size, depth), dtype=nl.float32, buffer=nl.psum)
        (left, right), pmax = step["columns"], nl.tile_size.pmax
        for number, (first, last) in enumerate(spans(right - left, pmax)):
            nisa.nc_matmul(
                dst=share,
                stationary=step["ds_t"][: last - first, number, :],
                moving=block["tiles"]["k"][: last - first, left // pmax + number, :],
                accumulate=number > 0,
            )
        total = self._room(step, size, depth)
        if step["opens"]:
            nisa.activation(dst=total, op=nl.copy, data=share, scale=scale)
        else:
            _scale_and_add(total, share, scale, tile["dq"])
        tile["dq"] = total
        if step["closes"]:
            self._finish(tile)

    def _room(self, step, size, depth):
        """Return where the sum of a tile goes; the last one goes to the result of its chunk."""
        if not step["closes"]:
            return nl.ndarray((size, depth), dtype=nl.float32, buffer=nl.sbuf)
        tile, chunk, sub = step["tile"], step["tile"]["chunk"], self.sub
        if chunk["dq"] is None:
            shape = (min(sub, chunk["rows"]), -(-chunk["rows"] // sub), depth)
            chunk["dq"] = nl.ndarray(shape, dtype=self.dq.dtype, buffer=nl.sbuf)
        return chunk["dq"][:size, tile["start"] // sub, :]

    def _finish(self, tile):
        """Store the result of a chunk if all its tiles are complete: each DMA costs its queue."""
        chunk = tile["chunk"]
        chunk["open"] -= 1
        if chunk["open"] == 0:
            b, first = tile["segment"]["kv"][0], chunk["tiles"][0]["rows"][0]
            target = self.dq[b, tile["head"], first : first + chunk["rows"], :]
            self._store(target, chunk["dq"])
            chunk["dq"] = None

    def close(self):
        """Store what is left, and zeros for rows and keys that have no step."""
        self.flush()
        pmax, dtype = nl.tile_size.pmax, self.dq.dtype
        rows = idle_rows(self.rows, self.keys, self.rule)
        keys = idle_keys(self.rows, self.keys, self.rule, self.config.keys)
        for target, idle in ((self.dq, rows), (self.dk, keys), (self.dv, keys)):
            if not idle:
                continue
            zeros = nl.ndarray((pmax, target.shape[3]), dtype=dtype, buffer=nl.sbuf)
            nisa.memset(dst=zeros, value=0.0)
            for b in range(target.shape[0]):
                for h in range(target.shape[1]):
                    for start, stop in idle:
                        for first, last in spans(stop - start, pmax):
                            part = target[b, h, start + first : start + last, :]
                            copy(part, zeros[: last - first], self.config)


def _scale_and_add(dst, psum, scale, before):
    """dst = psum * scale + before."""
    nisa.scalar_tensor_tensor(
        dst=dst, data=psum, op0=nl.multiply, operand0=scale, op1=nl.add, operand1=before
    )
