"""Bounds of attention on exponentials that stand transposed, keys on partitions."""

from __future__ import annotations

import nki.isa as nisa
import nki.language as nl


class Masks:
    """Sets exponentials outside a bound to 0, in place.

    GpSimd selects, 235 ns for 128 queries. A window has two bounds per tile, more than GpSimd can
    take beside its other work: then Vector, 166 ns, multiplies every other one by 0 and 1. Where an
    exponential overflowed outside the bound that gives NaN, which the test of the sums finds.
    """

    def __init__(self, rule):
        self.rule = rule
        self.turn = 0
        self.made = {}

    def apply(self, p, query, key, bound):
        """Bound p [keys, queries], which begins at `key` and `query`; `bound` is left or right."""
        rule = self.rule
        sign = 1 if bound == "right" else -1
        reach = rule.right if bound == "right" else rule.left
        offset = sign * (query + rule.offset - key) + reach
        self.turn += 1
        if rule.left is None or self.turn % 2:
            _select(p, p, sign, offset)
            return
        kind = (bound, offset, p.shape[0], p.shape[1])
        if kind not in self.made:
            tile = nl.ndarray((p.shape[0], p.shape[1]), dtype=p.dtype, buffer=nl.sbuf)
            nisa.memset(dst=tile, value=1.0)
            _select(tile, tile, sign, offset)
            self.made[kind] = tile
        nisa.tensor_tensor(dst=p, data1=p, data2=self.made[kind], op=nl.multiply)


def _select(dst, source, sign, offset):
    """dst[k, q] = source[k, q] where offset + sign * (q - k) >= 0, else 0."""
    nisa.affine_select(
        dst=dst,
        pattern=[[sign, source.shape[1]]],
        channel_multiplier=-sign,
        on_true_tile=source,
        on_false_value=0.0,
        cmp_op=nl.greater_equal,
        offset=offset,
    )
