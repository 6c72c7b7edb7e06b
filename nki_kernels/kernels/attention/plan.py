"""Which scores are computed, in which order: plain arithmetic on sizes, before any instruction.

Scores stand transposed, keys on partitions and queries along the free axis. A *piece* is the part
of a key tile's row of scores, within a block of queries, that some query attends; a *bank* packs
pieces into a PSUM bank; a *group* is the banks one exponential covers.
"""

from __future__ import annotations

from dataclasses import dataclass

import nki.language as nl


@dataclass(frozen=True)
class AttentionRule(nl.NKIObject):
    """Which keys a query attends, and how a score is made of a product.

    Query i attends key j when i + offset - left <= j <= i + offset + right; None is no bound.

    Attributes:
        scale: factor of q·k.
        left, right: keys attended before and after the query's own position.
        offset: position of query 0 among the keys.
        softcap: scores become softcap * tanh(score / softcap); 0 is off.
        slopes: per query head, what a score loses for each place between query and key; or None.
        longest: keys further than this from a query belong to another sequence; or None.
    """

    scale: float
    left: int | None
    right: int | None
    offset: int
    softcap: float
    slopes: tuple[float, ...] | None = None
    longest: int | None = None


def reach(rule):
    """Return (left, right) as far as keys need to be computed."""
    left, right = rule.left, rule.right
    if rule.longest is not None:
        most = rule.longest - 1
        left = most if left is None else min(left, most)
        right = most if right is None else min(right, most)
    return left, right


def spans(extent, size):
    """Cut 0 .. extent - 1 into (start, stop) of `size`; the last may be shorter."""
    return [(start, min(start + size, extent)) for start in range(0, extent, size)]


def block_of(depth):
    """Return (queries of a block, PSUM banks of an output tile) for rows of `depth` and a sum."""
    width = nl.tile_size.gemm_moving_fmax
    banks = -(-(depth + 1) // width)
    return width // banks, banks


def attending(keys, total, rule):
    """Return (start, stop) of the queries, of `total`, that attend some key of the span `keys`."""
    start, stop = 0, total
    left, right = reach(rule)
    if right is not None:
        start = max(start, keys[0] - rule.offset - right)
    if left is not None:
        stop = min(stop, keys[1] - rule.offset + left)
    return start, stop


def attended(queries, total, rule):
    """Return (start, stop) of the keys, of `total`, that some query of the span attends."""
    start, stop = 0, total
    left, right = reach(rule)
    if left is not None:
        start = max(start, queries[0] + rule.offset - left)
    if right is not None:
        stop = min(stop, queries[1] + rule.offset + right)
    return start, stop


def pieces_of(block, keys, total, rule, sub):
    """Return the pieces of a block of queries: {"keys", "columns"}, whole tiles of `sub` queries.

    Args:
        block: (start, stop) of the queries.
        keys: number of keys.
        total: number of queries.
        rule: AttentionRule.
        sub: queries of an output tile.
    """
    pieces = []
    for span in spans(keys, nl.tile_size.pmax):
        start, stop = attending(span, total, rule)
        start, stop = max(start, block[0]) - block[0], min(stop, block[1]) - block[0]
        if start < stop:
            start = start // sub * sub
            stop = min(-(-stop // sub) * sub, block[1] - block[0])
            pieces.append({"keys": span, "columns": (start, stop)})
    return pieces


def groups_of(pieces, width, banks):
    """Pack pieces into groups of at most `banks` banks of `width` columns.

    Pieces are placed with the column "at" of their group. Narrow pieces, those on a diagonal, come
    first: their longer chain (a mask) hides under the rest. Only the last bank of a group has free
    columns, so that one exponential covers a group; a piece is cut where that needs it.

    Returns:
        a list of {"pieces", "keys": of its largest piece, "used": columns}.
    """
    groups = []
    bins = _bins(pieces, width)
    full = [b for b in bins if b["used"] == width]
    part = [b for b in bins if b["used"] < width]
    while full or part:
        count = min(len(full), banks - 1 if part else banks)
        taken, full = full[:count], full[count:]
        if part:
            taken.append(part[0])
            part = part[1:]
        groups.append(_group(taken, width))
    return groups


def _bins(pieces, width):
    """Place pieces into banks: first fit, wide ones first among those that share a bank."""
    whole = [p for p in pieces if p["columns"][1] - p["columns"][0] == width]
    narrow = [p for p in pieces if p["columns"][1] - p["columns"][0] < width]
    # Of equal ones the last keys first: a band's right ends then stand at equal distances.
    narrow.sort(key=lambda p: (p["columns"][0] - p["columns"][1], -p["keys"][0]))
    bins = []
    for piece in narrow:
        size = piece["columns"][1] - piece["columns"][0]
        home = None
        # Only the last few: more would search long where thousands of narrow pieces fill banks.
        for candidate in bins[-4:]:
            if home is None and candidate["used"] + size <= width:
                home = candidate
        if home is None:
            home = {"pieces": [], "used": 0}
            bins.append(home)
        home["pieces"].append((piece, home["used"]))
        home["used"] += size
    part = [b for b in bins if b["used"] < width]
    if len(part) > 1:
        bins = [b for b in bins if b["used"] == width] + _dense(part, width)
    return bins + [{"pieces": [(p, 0)], "used": width} for p in whole]


def _dense(bins, width):
    """Place the pieces of `bins` again, cut between output tiles to fill all but the last bank."""
    sub = nl.tile_size.gemm_stationary_fmax
    whole, rest = [], []
    for piece in [piece for b in bins for piece, _ in b["pieces"]]:
        left, right = piece["columns"]
        cut = left + (right - left) // sub * sub
        whole.append({**piece, "columns": (left, cut)})
        rest.append({**piece, "columns": (cut, right)})
    dense = [{"pieces": [], "used": 0}]
    for piece in whole + rest:
        left, right = piece["columns"]
        while left < right:
            room = width - dense[-1]["used"]
            # Less than an output tile is not cut.
            if room == 0 or room < min(sub, right - left):
                dense.append({"pieces": [], "used": 0})
                room = width
            stop = min(right, left + room)
            dense[-1]["pieces"].append(({**piece, "columns": (left, stop)}, dense[-1]["used"]))
            dense[-1]["used"] += stop - left
            left = stop
    return dense


def _group(bins, width):
    pieces, keys = [], 0
    for number in range(len(bins)):
        for piece, at in bins[number]["pieces"]:
            pieces.append({**piece, "at": number * width + at})
            keys = max(keys, piece["keys"][1] - piece["keys"][0])
    return {"pieces": pieces, "keys": keys, "used": (len(bins) - 1) * width + bins[-1]["used"]}


def masks_of(queries, keys, rule):
    """Return the selects a rectangle of scores needs: (first query, stop, bound).

    `bound` is "right" or "left"; the queries outside attend every key of the span as far as that
    bound goes.
    """
    found = []
    if rule.right is not None:
        stop = min(queries[1], keys[1] - 1 - rule.offset - rule.right)
        if queries[0] < stop:
            found.append((queries[0], stop, "right"))
    if rule.left is not None:
        start = max(queries[0], keys[0] - rule.offset + rule.left + 1)
        if start < queries[1]:
            found.append((start, queries[1], "left"))
    return found


def idle_rows(queries, keys, rule):
    """Return (rows at the start, rows at the end) of the span `queries` that attend no key."""
    before, after = 0, 0
    size = queries[1] - queries[0]
    if rule.right is not None:
        before = min(size, max(0, -rule.offset - rule.right - queries[0]))
    if rule.left is not None:
        last = keys - 1 - rule.offset + rule.left
        after = min(size, max(0, queries[1] - 1 - last))
    return before, after


def runs_of(places):
    """Cut increasing numbers into runs of equal distance: (first, distance, count) each."""
    runs = []
    for place in sorted(places):
        if runs and (runs[-1][2] == 1 or place == runs[-1][0] + runs[-1][1] * runs[-1][2]):
            first, distance, count = runs[-1]
            runs[-1] = (first, place - first if count == 1 else distance, count + 1)
        else:
            runs.append((place, 1, 1))
    return runs
