"""Sequences packed one behind the other: which tokens share one, known only on chip."""

from __future__ import annotations

import nki.isa as nisa
import nki.language as nl


class Segments:
    """Where the sequence of each token starts and ends, and what that does to exponentials.

    A key j counts for the queries start(j) <= i < end(j). Keys stand on partitions, so the bounds
    are scalars of a partition, and one pass of Vector compares and multiplies: 633 ns for 512
    queries, which then limits (PE 445, Scalar 508). Queries behind the key need only the end
    tested, those before it only the start: two passes on the diagonal of bidirectional attention.
    """

    def __init__(self, boundaries, tokens, config):
        pmax = nl.tile_size.pmax
        self.tokens, self.tiles = tokens, -(-tokens // pmax)
        places = nl.ndarray((pmax, self.tiles), dtype=nl.float32, buffer=nl.sbuf)
        nisa.iota(dst=places, pattern=[[pmax, self.tiles]], channel_multiplier=1)
        cuts = _cuts(boundaries, config)
        self.starts = self._starts(places, cuts)
        self.ends = self._ends(places, cuts)
        width = nl.tile_size.gemm_moving_fmax
        self.columns = nl.ndarray((pmax, width), dtype=nl.float32, buffer=nl.sbuf)
        nisa.iota(dst=self.columns, pattern=[[1, width]])
        self.block = None
        self.near = None

    def apply(self, p, step):
        """Set p [keys, columns] to 0 where key and query belong to different sequences."""
        first = step["block"][0]
        if self.block != step["block"]:
            self.block = step["block"]
            self.near = (self._from(self.starts, first), self._from(self.ends, first))
        starts, ends = self.near
        for piece in step["group"]["pieces"]:
            (left, right), (key, stop) = piece["columns"], piece["keys"]
            part = p[:, piece["at"] : piece["at"] + right - left]
            tile = key // nl.tile_size.pmax
            if key < first + right - 1:
                self._keep(part, nl.less, ends[: p.shape[0], tile : tile + 1], left)
            if stop - 1 > first + left:
                self._keep(part, nl.greater_equal, starts[: p.shape[0], tile : tile + 1], left)

    def attend(self, queries, keys):
        """Return [queries, keys] float32: 1 where both belong to one sequence, else 0."""
        shape = (queries[1] - queries[0], keys[1] - keys[0])
        places = nl.ndarray(shape, dtype=nl.float32, buffer=nl.sbuf)
        nisa.iota(dst=places, pattern=[[1, shape[1]]], offset=keys[0])
        found = nl.ndarray(shape, dtype=nl.float32, buffer=nl.sbuf)
        tile = queries[0] // nl.tile_size.pmax
        start, end = (x[: shape[0], tile : tile + 1] for x in (self.starts, self.ends))
        nisa.tensor_scalar(dst=found, data=places, op0=nl.greater_equal, operand0=start)
        nisa.scalar_tensor_tensor(
            dst=found, data=places, op0=nl.less, operand0=end, op1=nl.multiply, operand1=found
        )
        return found

    def _keep(self, part, compare, bound, left):
        """part[k, q] = 0 unless q, a column of the block, compares with bound[k]."""
        nisa.scalar_tensor_tensor(
            dst=part,
            data=self.columns[: part.shape[0], left : left + part.shape[1]],
            op0=compare,
            operand0=bound,
            op1=nl.multiply,
            operand1=part,
        )

    def _from(self, bounds, first):
        """Return bounds counted from a block's first query."""
        near = nl.ndarray(bounds.shape, dtype=nl.float32, buffer=nl.sbuf)
        nisa.tensor_scalar(dst=near, data=bounds, op0=nl.subtract, operand0=float(first))
        return near

    def _starts(self, places, cuts):
        """Return the largest cut that is not behind a token; 0 without one."""
        found = nl.ndarray(places.shape, dtype=nl.float32, buffer=nl.sbuf)
        nisa.memset(dst=found, value=0.0)
        for number in range(cuts.shape[1]):
            cut = cuts[:, number : number + 1]
            passed = nl.ndarray(places.shape, dtype=nl.float32, buffer=nl.sbuf)
            nisa.tensor_scalar(
                dst=passed, data=places, op0=nl.greater_equal, operand0=cut, op1=nl.multiply,
                operand1=cut,
            )  # fmt: skip
            nisa.tensor_tensor(dst=found, data1=found, data2=passed, op=nl.maximum)
        return found

    def _ends(self, places, cuts):
        """Return the least cut behind a token; the number of tokens without one."""
        found = nl.ndarray(places.shape, dtype=nl.float32, buffer=nl.sbuf)
        nisa.memset(dst=found, value=float(self.tokens))
        for number in range(cuts.shape[1]):
            cut = cuts[:, number : number + 1]
            passed = nl.ndarray(places.shape, dtype=nl.float32, buffer=nl.sbuf)
            nisa.tensor_scalar(
                dst=passed, data=places, op0=nl.greater_equal, operand0=cut, op1=nl.multiply,
                operand1=float(self.tokens),
            )  # fmt: skip
            nisa.scalar_tensor_tensor(
                dst=found, data=passed, op0=nl.maximum, operand0=cut, op1=nl.minimum,
                operand1=found,
            )  # fmt: skip
        return found


def _cuts(boundaries, config):
    """Return the boundaries on every partition, float32 [partitions, count]."""
    pmax, count = nl.tile_size.pmax, boundaries.shape[0]
    mode = nisa.dge_mode.hwdge if config.hwdge else nisa.dge_mode.unknown
    whole = nl.ndarray((pmax, count), dtype=nl.int32, buffer=nl.sbuf)
    nisa.dma_copy(dst=whole, src=boundaries.ap(pattern=[[0, pmax], [1, count]]), dge_mode=mode)
    tile = nl.ndarray((pmax, count), dtype=nl.float32, buffer=nl.sbuf)
    nisa.tensor_copy(dst=tile, src=whole)
    return tile
