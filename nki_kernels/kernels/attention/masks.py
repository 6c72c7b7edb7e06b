"""Bounds of attention on exponentials that stand transposed, keys on partitions."""

from __future__ import annotations

import nki.isa as nisa
import nki.language as nl

from nki_kernels.kernels.attention.plan import masks_of, runs_of


class Masks:
    """Sets exponentials outside the bounds to 0, in place.

    GpSimd selects: 233 ns for 128 queries, 553 for four times as many. In the short band of a
    narrow window every tile is on a bound; pieces of one shape stand at equal distances then, and
    one instruction bounds them all. Vector could multiply by 0 and 1 in 630 ns a block, but in that
    mode it holds the SBUF port, and GpSimd's divisions wait (8 heads of 10240, window 128: 276 us).
    """

    def __init__(self, rule):
        self.rule = rule

    def apply(self, p, step):
        """Bound p [keys, columns], the exponentials of a step's group."""
        alike = {}
        for at, kind in self._spots(step):
            alike.setdefault(kind, []).append(at)
        for (width, sign, offset), places in alike.items():
            for first, distance, count in runs_of(places):
                _select(p, (first, distance, count, width), sign, offset)

    def _spots(self, step):
        """Return (first column, (columns, sign, offset)) per bound that a piece meets."""
        rule, spots = self.rule, []
        for piece in step["group"]["pieces"]:
            first = step["block"][0] + piece["columns"][0]
            span = (first, step["block"][0] + piece["columns"][1])
            for start, stop, bound in masks_of(span, piece["keys"], rule):
                sign = 1 if bound == "right" else -1
                reach = rule.right if bound == "right" else rule.left
                offset = sign * (start + rule.offset - piece["keys"][0]) + reach
                spots.append((piece["at"] + start - first, (stop - start, sign, offset)))
        return spots


def _select(p, columns, sign, offset):
    """Keep p[k, q] where offset + sign * (q - k) >= 0, else set it to 0.

    Args:
        p: [keys, columns].
        columns: (first, distance, count, width): count times width columns; q counts in each.
        sign: of the distance of query and key.
        offset: of query 0 and key 0.
    """
    first, distance, count, width = columns
    rows = [p.shape[1], p.shape[0]]
    view = p.ap(pattern=[rows, [distance, count], [1, width]], offset=first)
    nisa.affine_select(
        dst=view,
        pattern=[[0, count], [sign, width]],
        channel_multiplier=-sign,
        on_true_tile=view,
        on_false_value=0.0,
        cmp_op=nl.greater_equal,
        offset=offset,
    )
