"""Addresses for the tiles of a trace: one pass over live ranges, around fixed addresses.

A tile lives from its allocation to its last use in the trace. Memory that has been free the longest
is taken first, so that a tile waits for its predecessors as little as can be; where that fragments
so that a tile does not fit, the whole memory is placed again at the lowest free address. A PSUM
tile owns whole banks; an SBUF tile owns its bytes on all partitions.
"""

from __future__ import annotations

import heapq
import math
from bisect import bisect_right
from collections import Counter
from dataclasses import dataclass, field
from typing import Literal, NamedTuple

import numpy as np
import numpy.typing as npt

from nki_kernels.hardware.spec import CoreSpec
from nki_kernels.machine.errors import DoesNotFit
from nki_kernels.machine.trace import Tile, Trace, where

#: Finer than this, rotation would search longer than it saves; first fit uses the exact grain.
_MAX_UNITS = 4096
_LIVE = np.iinfo(np.int64).max
_NEVER = -1
_LISTED = 12

Strategy = Literal["rotation", "first fit"]


@dataclass(slots=True)
class Placement:
    """Where every on-chip tile of a trace lies.

    Attributes:
        addresses: (start partition, byte offset in the partition) by tile id. Tiles that no event
            touches are dropped.
        predecessors: by tile id, the tiles whose memory it reuses and whose life ended before; only
            the latest owner of each byte, since that one waited for the owners before it.
        aliases: by tile id, tiles at overlapping fixed addresses with overlapping lives.
        strategies: how each (core, memory) was placed.
        peak_sbuf_bytes: most bytes per partition alive at once, on any core.
        peak_psum_banks: most PSUM banks alive at once, on any core.
        peak_sbuf_tiles: ids of the tiles alive at that peak.
        peak_psum_tiles: the same for PSUM.
    """

    addresses: dict[int, tuple[int, int]] = field(default_factory=dict)
    predecessors: dict[int, tuple[int, ...]] = field(default_factory=dict)
    aliases: dict[int, tuple[int, ...]] = field(default_factory=dict)
    strategies: dict[tuple[int, str], Strategy] = field(default_factory=dict)
    peak_sbuf_bytes: int = 0
    peak_psum_banks: int = 0
    peak_sbuf_tiles: tuple[int, ...] = ()
    peak_psum_tiles: tuple[int, ...] = ()


class _Life(NamedTuple):
    """A tile and the closed range of sequence numbers over which it owns its memory."""

    start: int
    tile: Tile
    end: int


class _Pool(NamedTuple):
    """One memory of one core: capacity in grains, and what a tile of it occupies."""

    memory: Literal["sbuf", "psum"]
    capacity: int
    grain: int

    @property
    def units(self) -> int:
        return self.capacity // self.grain

    def size(self, tile: Tile) -> int:
        """Return the grains a tile occupies."""
        return max(1, -(-tile.row_bytes // self.grain))


def place(trace: Trace) -> Placement:
    """Give every on-chip tile of `trace` an address.

    Returns:
        the placement; deterministic, and near-linear in events and tiles.

    Raises:
        DoesNotFit: the live tiles exceed SBUF or PSUM; the message lists them.
    """
    result = Placement()
    for (core, memory), lives in sorted(_lives(trace).items()):
        if memory == "sbuf":
            _place_pool(result, core, lives, _sbuf(trace.spec, lives), trace.spec)
        else:
            banks = trace.spec.psum_banks * trace.spec.psum_bank_bytes
            pool = _Pool("psum", banks, trace.spec.psum_bank_bytes)
            _place_pool(result, core, lives, pool, trace.spec)
    return result


def _lives(trace: Trace) -> dict[tuple[int, str], list[_Life]]:
    """Return the used on-chip tiles by core and memory, in order of their start.

    A tile at a fixed address owns it from its first use only: kernels declare many tiles over a few
    addresses up front.
    """
    first: dict[int, int] = {}
    last: dict[int, int] = {}
    addressed = any(tile.address is not None for tile in trace.tiles)
    for event in trace.events:
        seq = event.seq
        for access in event.reads:
            last[access.tile.id] = seq
        for access in event.writes:
            last[access.tile.id] = seq
        if addressed:
            for access in (*event.reads, *event.writes):
                first.setdefault(access.tile.id, seq)
    found: dict[tuple[int, str], list[_Life]] = {}
    for tile in trace.tiles:
        if tile.memory == "hbm" or tile.id not in last:
            continue
        start = tile.seq if tile.address is None else first[tile.id]
        found.setdefault((tile.core, tile.memory), []).append(_Life(start, tile, last[tile.id]))
    for lives in found.values():
        lives.sort(key=lambda life: (life.start, life.tile.id))
    return found


def _sbuf(spec: CoreSpec, lives: list[_Life]) -> _Pool:
    """Return the SBUF pool at the exact grain of these tiles."""
    sizes = [-(-life.tile.row_bytes // spec.sbuf_align) for life in lives]
    offsets = [life.tile.address[1] for life in lives if life.tile.address is not None]
    grain = math.gcd(spec.sbuf_align * math.gcd(*sizes), *offsets)
    return _Pool("sbuf", spec.sbuf_usable_bytes, max(1, grain))


def _place_pool(
    result: Placement, core: int, lives: list[_Life], pool: _Pool, spec: CoreSpec
) -> None:
    coarse = pool.grain
    while pool.capacity // coarse > _MAX_UNITS:
        coarse *= 2
    fixed = _Fixed(lives, pool, spec)
    attempt = _Attempt(pool._replace(grain=coarse), fixed, rotate=True)
    if not all(attempt.take(life) for life in lives):
        attempt = _Attempt(pool, fixed, rotate=False)
        for life in lives:
            if not attempt.take(life):
                raise DoesNotFit(_message(life, attempt, pool))
    result.strategies[core, pool.memory] = "rotation" if attempt.rotate else "first fit"
    result.addresses.update(attempt.addresses)
    result.predecessors.update(attempt.predecessors)
    result.aliases.update({tile: tuple(sorted(ids)) for tile, ids in attempt.aliases.items()})
    tiles = tuple(
        life.tile.id
        for life in lives[: attempt.peak_index + 1]
        if life.end >= lives[attempt.peak_index].start
    )
    if pool.memory == "sbuf" and attempt.peak > result.peak_sbuf_bytes:
        result.peak_sbuf_bytes, result.peak_sbuf_tiles = attempt.peak, tiles
    if pool.memory == "psum" and attempt.peak > result.peak_psum_banks:
        result.peak_psum_banks, result.peak_psum_tiles = attempt.peak, tiles


class _Box(NamedTuple):
    """What a fixed address covers: partitions and bytes (whole banks in PSUM)."""

    row0: int
    row1: int
    byte0: int
    byte1: int

    def meets(self, other: _Box) -> bool:
        return (
            self.row0 < other.row1
            and other.row0 < self.row1
            and self.byte0 < other.byte1
            and other.byte0 < self.byte1
        )


class _Fixed:
    """The fixed addresses of one memory: few distinct boxes, however many tiles share them."""

    def __init__(self, lives: list[_Life], pool: _Pool, spec: CoreSpec) -> None:
        self.box: dict[int, _Box] = {}
        #: Per box: starts in order, and the latest end among the tiles up to each of them.
        self._starts: dict[_Box, list[int]] = {}
        self._ends: dict[_Box, list[int]] = {}
        self.meets: dict[_Box, list[_Box]] = {}
        for life in lives:
            tile = life.tile
            if tile.address is None:
                continue
            rows, offset = tile.address
            stop = offset + pool.size(tile) * pool.grain
            if stop > pool.capacity or rows + tile.partitions > spec.partitions:
                raise DoesNotFit(
                    f"{where(tile.site)}: {_describe(tile)} at address ({rows}, {offset}) reaches "
                    f"partition {rows + tile.partitions} and byte {offset + tile.row_bytes}; "
                    f"{pool.memory.upper()} has {spec.partitions} partitions of "
                    f"{pool.capacity:,} B for kernels; move it down or make it smaller"
                )
            box = _Box(rows, rows + tile.partitions, offset, stop)
            self.box[tile.id] = box
            ends = self._ends.setdefault(box, [])
            ends.append(max(life.end, ends[-1] if ends else life.end))
            self._starts.setdefault(box, []).append(life.start)
        for box in self._starts:
            self.meets[box] = [other for other in self._starts if box.meets(other)]

    def blocked(self, start: int, end: int) -> list[_Box]:
        """Return the boxes that a fixed tile owns at some time in [start, end]."""
        found = []
        for box, starts in self._starts.items():
            index = bisect_right(starts, end)
            if index and self._ends[box][index - 1] >= start:
                found.append(box)
        return found


class _Attempt:
    """One way through the tiles of one memory, in order of their start."""

    def __init__(self, pool: _Pool, fixed: _Fixed, *, rotate: bool) -> None:
        self.pool = pool
        self.fixed = fixed
        self.rotate = rotate
        self.addresses: dict[int, tuple[int, int]] = {}
        self.predecessors: dict[int, tuple[int, ...]] = {}
        self.aliases: dict[int, set[int]] = {}
        self.live: dict[int, Tile] = {}
        self.peak = 0
        self.peak_index = 0
        self._index = 0
        self._used = 0
        self._full = pool.capacity if pool.memory == "sbuf" else pool.units
        self._sharing: Counter[_Box] = Counter()
        self._ends: list[tuple[int, int, int, int]] = []
        #: Per grain: when its last owner died, _NEVER, or _LIVE.
        self.freed: npt.NDArray[np.int64] = np.full(pool.units, _NEVER, np.int64)
        #: Per grain: the last automatic tile that owned it.
        self._owner: list[int] = [_NEVER] * pool.units
        #: Per box of fixed addresses: the tiles a newcomer has to wait for or shares bytes with.
        self._holders: dict[_Box, list[_Life]] = {}
        if rotate:
            # Simple and fast: automatic tiles keep out of every fixed address for good.
            for box in fixed.meets:
                a, b = self._grains(box)
                self.freed[a:b] = _LIVE

    def take(self, life: _Life) -> bool:
        """Place one tile; return False if there is no room for it."""
        if self._ends and self._ends[0][0] < life.start:
            self._expire(life.start)
        tile = life.tile
        if tile.address is None:
            size = self.pool.size(tile)
            at = self._oldest(size) if self.rotate else self._lowest(size, life)
            if at is None:
                return False
            self.addresses[tile.id] = (0, at * self.pool.grain)
            self._own(life, at, at + size)
            cost = tile.row_bytes if self.pool.memory == "sbuf" else size
        else:
            self.addresses[tile.id] = tile.address
            self._own_fixed(life, self.fixed.box[tile.id])
            cost = self._cost(tile, 1)
        self.live[tile.id] = tile
        self._used += cost
        if self._used > self.peak:
            used = min(self._used, self._full)
            if used > self.peak:
                self.peak, self.peak_index = used, self._index
        self._index += 1
        return True

    def _expire(self, now: int) -> None:
        ends, sbuf = self._ends, self.pool.memory == "sbuf"
        while ends and ends[0][0] < now:
            end, number, a, b = heapq.heappop(ends)
            self.freed[a:b] = end
            tile = self.live.pop(number)
            if tile.address is None:
                self._used -= tile.row_bytes if sbuf else b - a
            else:
                self._used -= self._cost(tile, -1)

    def _cost(self, tile: Tile, change: int) -> int:
        """Return what a tile adds to the memory in use; tiles at one fixed address count once."""
        box = None if tile.address is None else self.fixed.box[tile.id]
        if box is not None:
            self._sharing[box] += change
            if self._sharing[box] != max(0, change):
                return 0
        return tile.row_bytes if self.pool.memory == "sbuf" else self.pool.size(tile)

    def _oldest(self, size: int) -> int | None:
        """Return the first of the runs whose latest death lies furthest back."""
        if size > len(self.freed):
            return None
        if size == 1:
            at = int(self.freed.argmin())
            return None if self.freed[at] == _LIVE else at
        latest, width = self.freed, 1
        while 2 * width <= size:
            latest = np.maximum(latest[:-width], latest[width:])
            width *= 2
        if width < size:
            latest = np.maximum(latest[: width - size], latest[size - width :])
        at = int(latest.argmin())
        return None if latest[at] == _LIVE else at

    def _lowest(self, size: int, life: _Life) -> int | None:
        """Return the lowest run that is free over the whole life of the tile."""
        if size > len(self.freed):
            return None
        busy = self.freed == _LIVE
        for box in self.fixed.blocked(life.start, life.end):
            a, b = self._grains(box)
            busy[a:b] = True
        before = np.concatenate(([0], np.cumsum(busy)))
        free = before[size:] == before[:-size]
        at = int(free.argmax())
        return at if free[at] else None

    def _grains(self, box: _Box) -> tuple[int, int]:
        return box.byte0 // self.pool.grain, -(-box.byte1 // self.pool.grain)

    def _own(self, life: _Life, a: int, b: int) -> None:
        """Record an automatic tile: whom it follows, and when it dies."""
        if b - a == 1:
            one = self._owner[a]
            self._owner[a] = life.tile.id
            before = set() if one == _NEVER else {one}
        else:
            before = set(self._owner[a:b])
            before.discard(_NEVER)
            self._owner[a:b] = [life.tile.id] * (b - a)
        if self._holders and not self.rotate:
            for box, holders in self._holders.items():
                first, last = self._grains(box)
                if first < b and a < last:
                    before.update(holder.tile.id for holder in holders)
        if before:
            self.predecessors[life.tile.id] = tuple(sorted(before))
        self.freed[a:b] = _LIVE
        heapq.heappush(self._ends, (life.end, life.tile.id, a, b))

    def _own_fixed(self, life: _Life, box: _Box) -> None:
        """Record a tile at a fixed address; lives at one address may overlap."""
        tile = life.tile.id
        a, b = self._grains(box)
        before = set(self._owner[a:b])
        before.discard(_NEVER)
        for other in self.fixed.meets[box]:
            kept = []
            for holder in self._holders.get(other, ()):
                if holder.end < life.start:
                    before.add(holder.tile.id)
                    continue
                self.aliases.setdefault(tile, set()).add(holder.tile.id)
                self.aliases.setdefault(holder.tile.id, set()).add(tile)
                kept.append(holder)
            if other == box:
                # Whoever comes next waits for this tile, which waited for those that are gone.
                self._holders[box] = [*kept, life]
        if before:
            self.predecessors[tile] = tuple(sorted(before))
        # No grain is freed when it dies: `blocked` knows the lives at fixed addresses.
        heapq.heappush(self._ends, (life.end, tile, 0, 0))


def _describe(tile: Tile) -> str:
    return f"{tile.memory.upper()} tile {tile.name!r} {list(tile.shape)} {tile.dtype}"


def _message(life: _Life, attempt: _Attempt, pool: _Pool) -> str:
    """Say what did not fit, beside what, and what to do."""
    tile = life.tile
    if pool.memory == "psum":
        need, have = f"{pool.size(tile)} banks", f"{pool.units} banks exist"
        held = f"{sum(pool.size(t) for t in attempt.live.values())} banks"
    else:
        need, have = f"{tile.row_bytes:,} B per partition", f"{pool.capacity:,} B are usable"
        held = f"{sum(t.row_bytes for t in attempt.live.values()):,} B"
    groups = Counter(
        (t.row_bytes, _describe(t), where(t.site))
        for t in sorted(attempt.live.values(), key=lambda t: t.id)
    )
    ranked = sorted(groups.items(), key=lambda item: (-item[0][0] * item[1], item[0][1:]))
    lines = [
        f"  {count} x {size:,} B: {text}, allocated at {site}"
        for (size, text, site), count in ranked[:_LISTED]
    ]
    if len(ranked) > _LISTED:
        lines.append(f"  and {len(ranked) - _LISTED} more lines")
    head = (
        f"{where(tile.site)}: {_describe(tile)} needs {need} and does not fit: {have}, and "
        f"{len(attempt.live)} live tiles hold {held}. Use smaller tiles, or finish with some of "
        "these before it is allocated:"
    )
    return "\n".join([head, *(lines or ["  (none: the tile alone is too large)"])])
