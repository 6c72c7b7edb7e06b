"""Which products the gradients of attention need, in which order: plain arithmetic on sizes.

Scores stand with a *tile* of queries on partitions and a *block* of keys along the free axis. A
*segment* is the tiles that stay in SBUF together: for each block of keys it takes one *step* per
tile that attends some key of the block. All query heads of a key head follow one another.
"""

from __future__ import annotations

import nki.language as nl

from nki_kernels.kernels.attention.plan import attended, spans

#: Plain steps between two bounded ones.
_BETWEEN = 3


def steps_of(q_shape, k_shape, rule, config):
    """Return all steps in the order of execution.

    A step is {"tile", "block", "columns", "first", "last", "opens", "closes", "closes segment"}:
    the columns of its block, whether it is the block's first and last in this segment, its tile's
    first and last, and its segment's last.
    Tiles, blocks and segments are dictionaries that steps share; loads and sums are added to them.
    A block "begins" in the first segment that has it and "ends" in the last.

    Args:
        q_shape: [B, H, M, D].
        k_shape: [B, G, N, D].
        rule: AttentionRule.
        config: AttentionBackwardConfig.
    """
    batch, heads, rows, _ = q_shape
    group = heads // k_shape[1]
    steps = []
    for b in range(batch):
        for g in range(k_shape[1]):
            steps += _key_head(b, g, group, rows, k_shape[2], rule, config)
    return steps


def _key_head(b, g, group, rows, keys, rule, config):
    places = []
    for member in range(group):
        for span in spans(rows, nl.tile_size.gemm_stationary_fmax):
            first, last = attended(span, keys, rule)
            if first < last:
                places.append((g * group + member, span))
    unions = {block: _union(rows, block, keys, rule) for block in spans(keys, config.keys)}
    # Segments of one length: a short last one would load keys for little work.
    count = max(1, -(-len(places) // config.segment))
    steps = []
    latest = {}
    for start, stop in spans(len(places), max(1, -(-len(places) // count))):
        segment = {"kv": (b, g), "tiles": []}
        for head, span in places[start:stop]:
            tile = {"segment": segment, "at": len(segment["tiles"]), "head": head, "rows": span}
            segment["tiles"].append(tile)
        for block in unions:
            some = _block(segment, block, unions[block], keys, rule)
            if some:
                shared = some[0]["block"]
                shared["begins"] = block not in latest
                latest[block] = shared
                steps += some
    for block in latest:
        latest[block]["ends"] = True
    _ends(steps)
    return steps


def _union(rows, block, keys, rule):
    """Return (start, stop) in the block of the keys that some row attends, or None."""
    cuts = []
    for span in spans(rows, nl.tile_size.gemm_stationary_fmax):
        columns = _columns(span, block, keys, rule)
        if columns is not None:
            cuts.append(columns)
    if not cuts:
        return None
    return min(cut[0] for cut in cuts), max(cut[1] for cut in cuts)


def _block(segment, block, union, keys, rule):
    """Return the steps of one block of keys."""
    shared = {"segment": segment, "keys": block, "columns": union, "ends": False, "tiles": None}
    steps = []
    for tile in segment["tiles"]:
        columns = _columns(tile["rows"], block, keys, rule)
        if columns is not None:
            steps.append({"tile": tile, "block": shared, "columns": columns})
    if not steps:
        return steps
    steps = _ordered(steps, rule)
    # Its products overwrite what PSUM holds, for all columns: a bank bears one sum at a time.
    steps[0]["columns"] = union
    for number in range(len(steps)):
        steps[number]["first"] = number == 0
        steps[number]["last"] = number == len(steps) - 1
    return steps


def _ordered(steps, rule):
    """Begin with the widest step, and put three plain ones before each that is bounded.

    The chain of a bounded step is longer by a select, and PE's work on it shorter: several in a row
    let PE wait (causal 8192: 691 us with the diagonal at the start of a block, see `backward`).
    """
    widest = max(_width(step) for step in steps)
    plain, bounded = [], []
    for step in steps:
        start = step["block"]["keys"][0]
        keys = (start + step["columns"][0], start + step["columns"][1])
        if _width(step) < widest or bounds_of(step["tile"]["rows"], keys, rule):
            bounded.append(step)
        else:
            plain.append(step)
    bounded.sort(key=_width)
    order = []
    while plain or bounded:
        order += plain[:_BETWEEN]
        plain = plain[_BETWEEN:]
        if bounded:
            order.append(bounded.pop())
    return order


def _width(step):
    return step["columns"][1] - step["columns"][0]


def _columns(rows, block, keys, rule):
    """Return (start, stop) in the block, whole tiles of keys, that some row attends, or None."""
    first, last = attended(rows, keys, rule)
    first, last = max(first, block[0]) - block[0], min(last, block[1]) - block[0]
    if first >= last:
        return None
    tile = nl.tile_size.pmax
    return first // tile * tile, min(-(-last // tile) * tile, block[1] - block[0])


def _ends(steps):
    """Mark the first and the last step of each tile, and the last of each segment."""
    for number in range(len(steps)):
        tile = steps[number]["tile"]
        steps[number]["opens"] = "latest" not in tile
        tile["latest"] = number
        tile["segment"]["latest"] = number
    for number in range(len(steps)):
        tile = steps[number]["tile"]
        steps[number]["closes"] = tile["latest"] == number
        steps[number]["closes segment"] = tile["segment"]["latest"] == number


def bounds_of(rows, keys, rule):
    """Return the selects a rectangle of scores needs: (first key, stop, bound), relative to keys.

    `bound` is "right" or "left"; every row attends the keys outside as far as that bound goes.
    """
    found = []
    size = keys[1] - keys[0]
    if rule.right is not None:
        start = max(0, rows[0] + rule.offset + rule.right + 1 - keys[0])
        if start < size:
            found.append((start, size, "right"))
    if rule.left is not None:
        stop = min(size, rows[1] - 1 + rule.offset - rule.left - keys[0])
        if stop > 0:
            found.append((0, stop, "left"))
    return found


def most_attended(keys, rule):
    """Return the most keys that a query attends."""
    if rule.left is None or rule.right is None:
        return keys
    return min(keys, rule.left + rule.right + 1)


def idle_rows(rows, keys, rule):
    """Return the tiles of queries that attend no key."""
    idle = []
    for span in spans(rows, nl.tile_size.gemm_stationary_fmax):
        first, last = attended(span, keys, rule)
        if first >= last:
            idle.append(span)
    return idle


def idle_keys(rows, keys, rule, size):
    """Return the spans of keys, within blocks of `size`, that no step covers."""
    idle = []
    for block in spans(keys, size):
        union = _union(rows, block, keys, rule)
        left, right = union if union is not None else (0, 0)
        for start, stop in ((0, left), (right, block[1] - block[0])):
            if start < stop:
                idle.append((block[0] + start, block[0] + stop))
    return idle
