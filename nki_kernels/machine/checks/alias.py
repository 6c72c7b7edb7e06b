"""Reads that meet another tile's bytes: two tiles at one fixed address share memory.

In the simulation every tile owns its bytes, so such a kernel computes what its author meant; on the
device it reads what was written last. Making tiles at one address is normal (allocators do, every
iteration), and so is writing through one after the other is done: only the read is a mistake.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import TypeAlias

import numpy as np

from nki_kernels.machine.dtypes import Array
from nki_kernels.machine.errors import KernelError
from nki_kernels.machine.placement import Placement
from nki_kernels.machine.trace import Access, Event, Tile, Trace, where

_NOBODY = -1

#: One memory of one core.
_Space: TypeAlias = tuple[int, str]


def alias_errors(trace: Trace, placement: Placement) -> Iterator[KernelError]:
    """Yield an error for each read of bytes that were last written through another tile.

    Each pair of tiles is reported once. Accesses with run-time addresses are left out: which bytes
    they touch is not in the trace.
    """
    if not placement.aliases:
        return
    owners = _spaces(trace, placement)
    said: set[tuple[int, int]] = set()
    for event in trace.events:
        for access in event.reads:
            found = _find(access, owners, placement)
            other = _NOBODY if found is None else found.other(access)
            if other != _NOBODY and (access.tile.id, other) not in said:
                said.add((access.tile.id, other))
                yield _error(event, access.tile, trace.tiles[other])
        for access in event.writes:
            found = _find(access, owners, placement)
            if found is not None:
                found.view(access)[...] = access.tile.id


def _spaces(trace: Trace, placement: Placement) -> dict[_Space, _Owners]:
    tiles: dict[_Space, list[Tile]] = {}
    for number in placement.aliases:
        tile = trace.tiles[number]
        tiles.setdefault((tile.core, tile.memory), []).append(tile)
    sizes = {a.itemsize for e in trace.events for a in (*e.reads, *e.writes)}
    return {space: _Owners(found, math.gcd(*sizes)) for space, found in tiles.items()}


def _find(access: Access, owners: dict[_Space, _Owners], placement: Placement) -> _Owners | None:
    tile = access.tile
    if access.whole or tile.id not in placement.aliases:
        return None
    return owners[tile.core, tile.memory]


class _Owners:
    """Which tile each byte of a memory was last written through.

    A grain is the greatest number of bytes that divides every position and size.
    """

    def __init__(self, tiles: list[Tile], grain: int) -> None:
        addresses = [_address(tile) for tile in tiles]
        self._low = min(start for _, start in addresses)
        starts = [start - self._low for _, start in addresses]
        self._grain = math.gcd(grain, *starts, *(tile.row_bytes for tile in tiles))
        high = max(start + t.row_bytes for t, (_, start) in zip(tiles, addresses, strict=True))
        rows = max(first + t.partitions for t, (first, _) in zip(tiles, addresses, strict=True))
        self._map: Array = np.full((rows, (high - self._low) // self._grain), _NOBODY, np.int32)

    def view(self, access: Access) -> Array:
        """Return the owners of an access's bytes: its shape, and one axis for an element's."""
        tile, size, grain = access.tile, access.itemsize, self._grain
        first, start = _address(tile)
        row, column = divmod(access.offset * size, tile.row_bytes)
        down, across = self._map.strides
        at = (first + row) * down + (start - self._low + column) // grain * across
        steps = [access.strides[0] * size // tile.row_bytes * down]
        steps += [stride * size // grain * across for stride in access.strides[1:]]
        shape = (*access.shape, size // grain)
        return np.ndarray(shape, np.int32, self._map, at, [*steps, across])

    def other(self, access: Access) -> int:
        """Return a tile other than the access's through which a byte of it was written last."""
        seen = self.view(access)
        strange = seen[(seen != access.tile.id) & (seen != _NOBODY)]
        return int(strange[0]) if strange.size else _NOBODY


def _address(tile: Tile) -> tuple[int, int]:
    if tile.address is None:
        raise ValueError(f"tile {tile.name!r} has no fixed address and cannot share one")
    return tile.address


def _error(event: Event, tile: Tile, other: Tile) -> KernelError:
    return KernelError(
        f"nisa.{event.opcode} at {where(event.site)}: reads bytes of the {tile.memory} tile "
        f"{tile.name!r} {list(tile.shape)} {tile.dtype} at address {tile.address} (allocated at "
        f"{where(tile.site)}) that were last written through tile {other.name!r} "
        f"{list(other.shape)} {other.dtype} at address {other.address} (allocated at "
        f"{where(other.site)}); on the device they hold the other tile's values: finish reading "
        "before the other tile is written, or give the two different addresses"
    )
