"""Iterations declared independent (``nl.affine_range``) that are not.

The documents: such a loop has no loop-carried dependency, "associative reductions are not
considered loop carried dependencies". So an iteration may not read what an earlier one wrote, and
no two may write the same element of HBM, unless an associative update or PSUM does the sum.
On-chip scratch that each iteration writes before it reads carries nothing.
"""

from __future__ import annotations

import bisect
import math
from collections.abc import Iterator

import numpy as np

from nki_kernels.machine.checks.regions import describe
from nki_kernels.machine.dtypes import Array
from nki_kernels.machine.errors import KernelError
from nki_kernels.machine.trace import (
    Access,
    DeclaredLoop,
    DmaWork,
    Event,
    PeWork,
    StreamWork,
    Tile,
    Trace,
    where,
)

_NOBODY = -1
_ASSOCIATIVE = frozenset(
    {
        "add", "multiply", "maximum", "minimum", "bitwise_and", "bitwise_or", "bitwise_xor",
        "logical_and", "logical_or", "logical_xor",
    }
)  # fmt: skip


def carried(trace: Trace) -> Iterator[KernelError]:
    """Yield an error for each declared loop and tile through which iterations depend."""
    for loop in trace.declared:
        if len(loop.starts) > 1:
            yield from _judge(trace, loop)


def _judge(trace: Trace, loop: DeclaredLoop) -> Iterator[KernelError]:
    events = [e for e in trace.events[loop.starts[0] : loop.end] if e.core == loop.core]
    owners = _owners(events, loop)
    if not owners:
        return
    said: set[int] = set()
    for event in events:
        for access in event.reads:
            found = owners.get(access.tile.id)
            if found is None or access.tile.id in said or _updates(event, access):
                continue
            iteration = bisect.bisect_right(loop.starts, event.seq) - 1
            other = found.foreign(access, iteration)
            if other is not None:
                said.add(access.tile.id)
                yield _error(event, access.tile, loop, iteration, other, "reads")
        for access in event.writes:
            found = owners.get(access.tile.id)
            if found is None or access.tile.id in said:
                continue
            iteration = bisect.bisect_right(loop.starts, event.seq) - 1
            if access.tile.memory == "hbm" and not _updates(event, access):
                other = found.foreign(access, iteration)
                if other is not None:
                    said.add(access.tile.id)
                    yield _error(event, access.tile, loop, iteration, other, "overwrites")
            found.take(access, iteration)


def _owners(events: list[Event], loop: DeclaredLoop) -> dict[int, _Owners]:
    """Return a map for each tile from before the loop that can carry something."""
    read: set[int] = set()
    written: dict[int, Tile] = {}
    sizes: dict[int, int] = {}
    for event in events:
        for accesses in (event.reads, event.writes):
            for access in accesses:
                tile = access.tile
                if tile.id >= loop.tiles:
                    continue  # allocated in the loop: nearly all are, and they carry nothing
                sizes[tile.id] = math.gcd(sizes.get(tile.id, 0), access.itemsize)
                if accesses is event.reads:
                    read.add(tile.id)
                else:
                    written[tile.id] = tile
    return {
        number: _Owners(tile, sizes[number], len(loop.starts))
        for number, tile in written.items()
        if number in read or tile.memory == "hbm"
    }


class _Owners:
    """Which iteration wrote each grain of a tile last.

    Most loops write a tensor in stretches of their own, which the ends of the stretches show; the
    map of grains is made when two iterations' stretches meet, or when there are too many to look
    through.
    """

    _MOST = 64

    def __init__(self, tile: Tile, grain: int, iterations: int) -> None:
        self._grain = grain
        self._size = tile.row_bytes * tile.partitions // grain
        self._dtype = np.int16 if iterations <= np.iinfo(np.int16).max else np.int32
        self._writes: list[tuple[int, int, int, Access]] = []
        self._map: Array | None = None

    def _view(self, grains: Array, access: Access) -> Array:
        per = access.itemsize // self._grain
        size = grains.itemsize
        steps = [size * per * stride for stride in access.strides]
        start = size * per * access.offset
        return np.ndarray((*access.shape, per), grains.dtype, grains, start, (*steps, size))

    def _mapped(self) -> Array:
        if self._map is None:
            self._map = np.full(self._size, _NOBODY, self._dtype)
            for iteration, _, _, access in self._writes:
                self._view(self._map, access)[...] = iteration
        return self._map

    def foreign(self, access: Access, iteration: int) -> int | None:
        """Return another iteration that wrote a byte of the access, if there is one."""
        if access.whole:
            return None  # which bytes it touches is not in the trace
        if self._map is None:
            first, last = _ends(access)
            if not any(
                other != iteration and start <= last and first <= stop
                for other, start, stop, _ in self._writes
            ):
                return None
        seen = self._view(self._mapped(), access)
        others = seen[(seen != iteration) & (seen != _NOBODY)]
        return int(others[0]) if others.size else None

    def take(self, access: Access, iteration: int) -> None:
        """Record a write."""
        if access.whole:
            return
        if self._map is None and len(self._writes) < self._MOST:
            self._writes.append((iteration, *_ends(access), access))
        else:
            self._view(self._mapped(), access)[...] = iteration


def _ends(access: Access) -> tuple[int, int]:
    """Return the first and the last byte that an access can touch (strides are not negative)."""
    reach = sum((n - 1) * step for n, step in zip(access.shape, access.strides, strict=True))
    size = access.itemsize
    return access.offset * size, (access.offset + reach + 1) * size - 1


def _updates(event: Event, access: Access) -> bool:
    """Return True if the event adds to what it reads, in an order that does not matter."""
    if access not in event.writes or access not in event.reads:
        return False
    work = event.work
    if isinstance(work, StreamWork):
        if work.law == "scalar_tensor_tensor":
            # The sum is the last operand: nothing scales it.
            return access != event.reads[0] and work.joins in _ASSOCIATIVE
        return work.law == "tensor_tensor" and work.function in _ASSOCIATIVE
    return isinstance(work, PeWork) or (isinstance(work, DmaWork) and work.kind == "compute")


def _error(
    event: Event, tile: Tile, loop: DeclaredLoop, iteration: int, other: int, does: str
) -> KernelError:
    return KernelError(
        f"nisa.{event.opcode} at {where(event.site)}: iteration {iteration} of the nl.affine_range "
        f"at {where(loop.site)} {does} elements of the {describe(tile)} (allocated at "
        f"{where(tile.site)}) that iteration {other} wrote; iterations of an affine_range are "
        "declared independent: use range(), or give each iteration memory of its own"
    )
