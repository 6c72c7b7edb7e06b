"""Two cores that touch the same bytes of HBM while nothing orders them.

In the simulation one core runs at a time, so such a kernel computes something; on the device either
core may be first. What orders the cores is a meeting (`cores`): `sendrecv` and a barrier on a tile
in SBUF order everything before against everything after; `core_barrier` and a collective on shared
HBM order the tensors they name, since engines that do other work run on (nki.isa.core_barrier). All
meetings are between both cores and in one order, so the vector clocks of an access have one
component per tensor: how many meetings that order it its core has passed.

Both cores may do the same work twice, as published kernels do: equal bytes written to the same
place are no race, nor is a core's read of what it wrote so itself. Accesses with run-time addresses
count row by row, as the run found them; where an index has no value they are left out.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple, TypeAlias

import numpy as np
import numpy.typing as npt

from nki_kernels.machine.dependencies import Axis, Box, box_of
from nki_kernels.machine.errors import KernelError
from nki_kernels.machine.trace import MEETING, Access, Event, Tile, Trace, where

#: Bytes above which two overlapping boxes count as an overlap without looking at each byte.
_MOST_BYTES = 1 << 26
_CHUNK = 1 << 20
_ALL = -1

#: What a write leaves: its bytes (a digest), or where it stands if it has no values.
_Left: TypeAlias = object
#: By event number, accesses with run-time addresses and what their rows touched.
Rows: TypeAlias = Mapping[int, Sequence[tuple[Access, tuple[Access, ...]]]]


class _Use(NamedTuple):
    """One access of one core, the first of its kind between two meetings."""

    event: Event
    access: Access
    box: Box
    writes: bool
    left: _Left
    rows: tuple[Access, ...]


_Uses: TypeAlias = dict[object, _Use]


def race_errors(
    trace: Trace, digests: Mapping[int, int], rows: Rows | None = None
) -> Iterator[KernelError]:
    """Yield an error for each pair of kernel lines that race.

    Args:
        trace: of a launch on two cores; with one there are no races.
        digests: by event number, the digest of the bytes it wrote to shared HBM.
        rows: what accesses to shared HBM with run-time addresses touched.
    """
    if trace.lnc < 2:
        return
    said: set[object] = set()
    for tile, uses in _between_meetings(trace, digests, rows or {}):
        for one, other in _overlaps(list(uses[0].values()), list(uses[1].values())):
            lines = (tile.id, one.event.site, other.event.site)
            if lines in said or _agree(one, other, uses) or not _meet(one.rows, other.rows):
                continue
            said.add(lines)
            yield _error(tile, one, other)


def _between_meetings(
    trace: Trace, digests: Mapping[int, int], rows: Rows
) -> Iterator[tuple[Tile, tuple[_Uses, _Uses]]]:
    """Yield, per tensor both cores use and one writes, its uses between two meetings, by core."""
    found: dict[tuple[int, int], tuple[_Uses, _Uses]] = {}
    met: Counter[tuple[int, int]] = Counter()
    for event in trace.events:
        core = event.core
        if MEETING in event.hidden_writes:
            tensors = {a.tile.id for a in event.writes if a.tile.memory == "hbm"}
            met.update([(core, tile) for tile in tensors] if tensors else [(core, _ALL)])
            continue
        for accesses, writes in ((event.reads, False), (event.writes, True)):
            for access in accesses:
                tile = access.tile
                touched = _touched(event, access, rows) if tile.memory == "hbm" else ()
                if not touched:
                    continue
                clock = met[core, _ALL] + met[core, tile.id]
                uses = found.setdefault((tile.id, clock), ({}, {}))[core]
                left: _Left = digests.get(event.seq, event.site) if writes else None
                if access.whole:
                    left = (left, *[row.offset for row in touched])
                kind = (access[1:], left)
                if kind not in uses:
                    box = _box(touched, tile)
                    uses[kind] = _Use(event, access, box, writes, left, touched)
    for (number, _), both in sorted(found.items(), key=lambda item: item[0]):
        if all(both) and any(use.writes for uses in both for use in uses.values()):
            yield trace.tiles[number], both


def _touched(event: Event, access: Access, rows: Rows) -> tuple[Access, ...]:
    """Return the access, or its rows if it has run-time addresses: none where nobody knows them."""
    if not access.whole:
        return (access,)
    return next((found for a, found in rows.get(event.seq, ()) if a is access), ())


def _box(touched: tuple[Access, ...], tile: Tile) -> Box:
    """Return the box of all rows of an access."""
    if len(touched) == 1:
        return box_of(touched[0])
    offsets = [row.offset for row in touched]
    ends = [box_of(touched[0]._replace(offset=at)) for at in (min(offsets), max(offsets))]
    low, high = ends[0].rows.low, ends[1].rows.high
    width = max(1, tile.row_bytes)
    left, right = 0, width
    if len({at * touched[0].itemsize % width for at in offsets}) == 1:
        left, right = ends[0].columns.low, ends[0].columns.high
    return Box(Axis(low, high, 0, high - low), Axis(left, right, 0, right - left))


def _overlaps(ones: list[_Use], others: list[_Use]) -> Iterator[tuple[_Use, _Use]]:
    """Yield the pairs whose boxes may share bytes and of which one writes, in order of program."""
    a, b = _bounds(ones), _bounds(others)
    step = max(1, _CHUNK // len(others))
    for start in range(0, len(ones), step):
        part = a[start : start + step, None]
        pairs = part[..., 4] | b[:, 4] > 0
        for low, high in ((0, 1), (2, 3)):
            pairs &= (part[..., low] < b[:, high]) & (b[:, low] < part[..., high])
        for i, j in np.argwhere(pairs):
            one, other = ones[start + int(i)], others[int(j)]
            if one.box.meets(other.box):
                yield one, other


def _bounds(uses: list[_Use]) -> npt.NDArray[np.int64]:
    return np.array(
        [
            (b.rows.low, b.rows.high, b.columns.low, b.columns.high, writes)
            for _, _, b, writes, *_ in uses
        ],
        np.int64,
    )


def _agree(one: _Use, other: _Use, uses: tuple[_Uses, _Uses]) -> bool:
    """Return True if both cores wrote the same bytes to the same place, and before any read.

    A write over what both wrote is no race either if both cores do that too.
    """
    for mine, theirs in ((one, other), (other, one)):
        if theirs.writes:
            twin = uses[mine.event.core].get((theirs.access[1:], theirs.left))
            alike = not mine.writes or (mine.access[1:], mine.left) in uses[theirs.event.core]
            if twin is not None and alike and twin.event.seq <= mine.event.seq:
                return True
    return False


def _meet(ones: tuple[Access, ...], others: tuple[Access, ...]) -> bool:
    """Return True if a row of the one and a row of the other have a byte in common."""
    if len(ones) == len(others) == 1:
        return _share(ones[0], others[0])
    a, b = (np.array([_reach(row, 1) for row in rows], np.int64) for rows in (ones, others))
    near = (a[:, None, 0] < b[:, 1]) & (b[:, 0] < a[:, None, 1])
    return any(_share(ones[int(i)], others[int(j)]) for i, j in np.argwhere(near))


def _share(one: Access, other: Access) -> bool:
    """Return True if the accesses have a byte in common."""
    grain = math.gcd(one.itemsize, other.itemsize)
    low = min(_reach(a, grain)[0] for a in (one, other))
    high = max(_reach(a, grain)[1] for a in (one, other))
    if high - low > _MOST_BYTES:
        return True
    flags = np.zeros(high - low, np.bool_)
    for access in (one, other):
        per = access.itemsize // grain
        view = np.ndarray(
            (*access.shape, per), np.bool_, flags, access.offset * per - low,
            [*(s * per for s in access.strides), 1],
        )  # fmt: skip
        if access is other and view.any():
            return True
        view[...] = True
    return False


def _reach(access: Access, grain: int) -> tuple[int, int]:
    """Return the first grain of an access and the one after its last."""
    per = access.itemsize // grain
    steps = [(n - 1) * s for n, s in zip(access.shape, access.strides, strict=True)]
    first = access.offset + sum(s for s in steps if s < 0)
    last = access.offset + sum(s for s in steps if s > 0)
    return first * per, (last + 1) * per


def _error(tile: Tile, one: _Use, other: _Use) -> KernelError:
    does = [
        f"nisa.{use.event.opcode} at {where(use.event.site)} (core {use.event.core}) "
        f"{'writes' if use.writes else 'reads'} {list(use.access.shape)}"
        for use in (one, other)
    ]
    origin = "an argument" if tile.role == "input" else f"allocated at {where(tile.site)}"
    return KernelError(
        f"lnc_race: {does[0]} and {does[1]} of tensor {tile.name!r} {list(tile.shape)} "
        f"{tile.dtype} ({origin}), the same bytes, and nothing orders the "
        "two; on the device either may come first: put nisa.core_barrier on this tensor between "
        "them, or give each core its own part"
    )
