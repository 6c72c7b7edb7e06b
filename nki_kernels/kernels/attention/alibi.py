"""ALiBi, -slope * |position of query - position of key| added to a score, computed on chip."""

from __future__ import annotations

import nki.isa as nisa
import nki.language as nl

#: Largest exponent a query's distance from its reference may bring. The sums pass their test up to
#: e^41: what is left is room for the scores, and for as many keys as there may be.
_REACH = 30.0


def is_causal(rule):
    """Tell whether queries attend nothing behind their position, and no slope is negative."""
    return rule.right is not None and rule.right <= 0 and min(rule.slopes) >= 0


class Slopes:
    """Biases of the exponentials of causal attention: Scalar adds one per key for nothing.

    Keys stand on partitions, and softmax forgets what is added to all scores of a query, so that
    slope * (key - reference) serves, with one reference for a cell of queries; the logarithm of a
    sum is corrected by -slope * (query - reference). Steep slopes need small cells, lest the sums
    leave their range: of 512 queries up to a slope of 0.11, of 128 up to 0.46. One exponential per
    key tile and cell costs Scalar 591 ns for 512 queries, or 867 in cells of 128, against 508.
    """

    def __init__(self, rule, rows, keys):
        self.rule, self.rows, self.keys = rule, rows, keys
        self.distances = {}
        self.corrections = {}
        self.head = None
        self.table = None

    def cell(self, head):
        """Return the number of queries that share a reference."""
        size, least = nl.tile_size.gemm_moving_fmax, nl.tile_size.gemm_stationary_fmax // 4
        while size > least and self.rule.slopes[head] * size > 2 * _REACH:
            size //= 2
        return size

    def cells(self, head, columns):
        """Cut the columns of a block of queries where the reference changes."""
        size, (left, right) = self.cell(head), columns
        cuts = []
        while left < right:
            stop = min(right, left // size * size + size)
            cuts.append((left, stop))
            left = stop
        return cuts

    def bias(self, head, key, query, count):
        """Return slope * (key + p - reference) for p < count, [count, 1].

        Args:
            head: of the queries.
            key: first key of a tile.
            query: first query of the part of a cell.
            count: number of keys.
        """
        size = self.cell(head)
        if self.head != head:
            self.head = head
            steps = self._steps(size)
            self.table = nl.ndarray(steps.shape, dtype=nl.float32, buffer=nl.sbuf)
            slope = self.rule.slopes[head]
            nisa.tensor_scalar(dst=self.table, data=steps, op0=nl.multiply, operand0=slope)
        column = (key - query // size * size + self._lowest(size)) // self._step(size)
        return self.table[:count, column : column + 1]

    def correct(self, logarithms, head):
        """Subtract slope * (query - reference) from [query in tile, tiles of a head]."""
        size, shape = self.cell(head), logarithms.shape
        if size not in self.corrections:
            places = nl.ndarray(shape, dtype=nl.int32, buffer=nl.sbuf)
            nisa.iota(dst=places, pattern=[[shape[0], shape[1]]], channel_multiplier=1)
            # Sizes are powers of two.
            nisa.tensor_scalar(dst=places, data=places, op0=nl.bitwise_and, operand0=size - 1)
            found = nl.ndarray(shape, dtype=nl.float32, buffer=nl.sbuf)
            nisa.tensor_scalar(dst=found, data=places, op0=nl.subtract, operand0=size // 2)
            self.corrections[size] = found
        nisa.scalar_tensor_tensor(
            dst=logarithms,
            data=self.corrections[size],
            op0=nl.multiply,
            operand0=-self.rule.slopes[head],
            op1=nl.add,
            operand1=logarithms,
        )

    def _step(self, size):
        return min(size, nl.tile_size.pmax)

    def _lowest(self, size):
        """Return the most a cell's first query is ahead of a key tile."""
        return -(-self.rows // size) * size

    def _steps(self, size):
        """Return key + p - reference, one column per distance of key tile and cell, [keys, n]."""
        if size not in self.distances:
            step, lowest = self._step(size), self._lowest(size)
            # Causal: no key tile begins behind the positions of a cell, or of its output tile.
            whole = max(size, nl.tile_size.gemm_stationary_fmax)
            ahead = max(0, min(self.keys, whole + self.rule.offset))
            count = -(-(lowest + ahead) // step) + 1
            tile = nl.ndarray((nl.tile_size.pmax, count), dtype=nl.float32, buffer=nl.sbuf)
            nisa.iota(
                dst=tile,
                pattern=[[step, count]],
                offset=-lowest - self.rule.offset - size // 2,
                channel_multiplier=1,
            )
            self.distances[size] = tile
        return self.distances[size]


def add_distances(s, slope, query, key):
    """s[q, k] -= slope * |query + q - key - k|, where `query` is a position."""
    shape = s.shape
    distance = nl.ndarray(shape, dtype=nl.float32, buffer=nl.sbuf)
    nisa.iota(dst=distance, pattern=[[-1, shape[1]]], offset=query - key, channel_multiplier=1)
    size = nl.ndarray(shape, dtype=nl.float32, buffer=nl.sbuf)
    nisa.scalar_tensor_tensor(
        dst=size, data=distance, op0=nl.multiply, operand0=-1.0, op1=nl.maximum, operand1=distance
    )
    nisa.scalar_tensor_tensor(
        dst=s, data=size, op0=nl.multiply, operand0=-slope, op1=nl.add, operand1=s
    )
