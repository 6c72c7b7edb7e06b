"""Matmuls whose sums are formed when somebody looks, many accumulators in one host product.

A tuned kernel issues C as a grid of accumulators, each a chain of [K <= 128] products, and the
accumulators of a row share one operand, those of a column the other. Formed one instruction at a
time the host's matmul works at half its speed, and every link costs a pass over the accumulator.
So links are noted when the instruction runs (with a snapshot of the operands; float32 operands lend
their bytes, and a write to them forms what waits first: later writes change nothing) and multiplied
when an accumulator is read: one product for the whole grid where the links form one, one product
per accumulator otherwise. The order of the sum over k is unspecified on the device, so no value
depends on which. 2048^3 bf16 on 2 cores: 205 -> 125 ms.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeAlias

import numpy as np

from nki_kernels.machine.buffers import give, take
from nki_kernels.machine.dtypes import Array

if TYPE_CHECKING:
    from nki_kernels.machine.memory import Memory

#: (offset, shape, strides, itemsize) of an access.
Region: TypeAlias = tuple[int, tuple[int, ...], tuple[int, ...], int]

#: A noted matmul: weights [K, M] and data [K, N], float32, never written again.
Link: TypeAlias = tuple[Array, Array]

#: Links after which an accumulator is formed unasked: the snapshots must stay few.
MAX_LINKS = 16


@dataclass(slots=True)
class Pending:
    """The links into one region of a tile that are not in its values yet."""

    region: Region
    overwrites: bool
    links: list[Link]


class Products:
    """The pending matmuls of a run."""

    def __init__(self) -> None:
        self._tiles: dict[int, Memory] = {}
        self._scratch: dict[str, Array] = {}

    def add(self, tile: Memory, region: Region, link: Link, adds: bool) -> None:
        """Note ``region (+)= weights.T @ data``; without `adds` the region starts anew."""
        pending = tile.pending
        if pending is not None and pending.region != region:
            self.settle(tile)
            pending = None
        if pending is None or not adds:
            pending = tile.pending = Pending(region, not adds, [])
            self._tiles[id(tile)] = tile
        pending.links.append(link)
        if len(pending.links) >= MAX_LINKS:
            self.settle(tile)

    def settle(self, tile: Memory) -> None:
        """Form everything pending for `tile`, and what others share with it."""
        grid = self._grid(tile)
        if grid is not None:
            self._form_grid(*grid)
        if tile.pending is not None:
            weights, data = self._stack([tile.pending.links])
            self._form(tile, weights, data, len(tile.pending.links))

    def settle_all(self) -> None:
        """Form everything pending: an operand that is lent to it is about to change."""
        for tile in list(self._tiles.values()):
            if tile.pending is not None:
                self.settle(tile)

    def drop(self, tile: Memory) -> None:
        """Forget what is pending for `tile`."""
        tile.pending = None
        self._tiles.pop(id(tile), None)

    # -- one product for a grid --------------------------------------------------------------------

    def _grid(self, tile: Memory) -> tuple[list[list[Memory]], int] | None:
        """Return accumulators as rows of shared weights and columns of shared data, and depth.

        None unless every combination of the pending weights and data occurs exactly once.
        """
        tiles = [(t, t.pending) for t in self._tiles.values() if t.pending is not None]
        if len(tiles) < 2 or tile.pending is None:
            return None
        depth = min(len(p.links) for _, p in tiles)
        rows: dict[tuple[int, ...], dict[tuple[int, ...], Memory]] = {}
        for t, pending in tiles:
            links = pending.links[:depth]
            row = rows.setdefault(tuple([id(w) for w, _ in links]), {})
            row[tuple([id(d) for _, d in links])] = t
        columns = list(next(iter(rows.values())))
        if any(list(row) != columns for row in rows.values()):
            return None
        if len(rows) * len(columns) != len(tiles):
            return None
        return [list(row.values()) for row in rows.values()], depth

    def _form_grid(self, grid: list[list[Memory]], depth: int) -> None:
        first_column = [self._links(row[0])[:depth] for row in grid]
        first_row = [self._links(t)[:depth] for t in grid[0]]
        weights, _ = self._stack(first_column, data=False)
        _, data = self._stack(first_row, weights=False)
        product = self._buffer("product", weights.shape[1], data.shape[1])
        np.matmul(weights.T, data, out=product)
        top = 0
        for row in grid:
            left = 0
            bottom = top + self._links(row[0])[0][0].shape[1]
            for tile in row:
                right = left + self._links(tile)[0][1].shape[1]
                self._deliver(tile, product[top:bottom, left:right], depth)
                left = right
            top = bottom

    def _links(self, tile: Memory) -> list[Link]:
        return [] if tile.pending is None else tile.pending.links

    # -- one product for an accumulator ------------------------------------------------------------

    def _form(self, tile: Memory, weights: Array, data: Array, depth: int) -> None:
        pending = tile.pending
        if pending is not None and pending.overwrites and depth == len(pending.links):
            target = tile.array_now(pending.region, np.float32)
            if target.flags.c_contiguous:
                self.drop(tile)
                np.matmul(weights.T, data, out=target)
                return
        product = self._buffer("product", weights.shape[1], data.shape[1])
        np.matmul(weights.T, data, out=product)
        self._deliver(tile, product, depth)

    def _deliver(self, tile: Memory, product: Array, depth: int) -> None:
        """Put the sum of the first `depth` links of a tile into its values."""
        pending = tile.pending
        if pending is None:
            return
        self.drop(tile)
        target = tile.array(pending.region, np.float32)
        if pending.overwrites:
            np.copyto(target, product)
        else:
            np.add(target, product, out=target)
        if depth < len(pending.links):
            tile.pending = Pending(pending.region, False, pending.links[depth:])
            self._tiles[id(tile)] = tile

    # -- buffers -----------------------------------------------------------------------------------

    def _stack(
        self, chains: list[list[Link]], weights: bool = True, data: bool = True
    ) -> tuple[Array, Array]:
        """Stack chains side by side, their links on top of each other."""
        empty = np.empty((0, 0), np.float32)
        return (
            self._stacked("weights", [[w for w, _ in c] for c in chains]) if weights else empty,
            self._stacked("data", [[d for _, d in c] for c in chains]) if data else empty,
        )

    def _stacked(self, slot: str, chains: list[list[Array]]) -> Array:
        if len(chains) == 1 and len(chains[0]) == 1:
            return chains[0][0]
        rows = sum(a.shape[0] for a in chains[0])
        stack = self._buffer(slot, rows, sum(chain[0].shape[1] for chain in chains))
        left = 0
        for chain in chains:
            right = left + chain[0].shape[1]
            top = 0
            for array in chain:
                bottom = top + array.shape[0]
                stack[top:bottom, left:right] = array
                top = bottom
            left = right
        return stack

    def _buffer(self, slot: str, rows: int, columns: int) -> Array:
        size = 4 * rows * columns
        held = self._scratch.get(slot)
        if held is None or held.nbytes < size:
            # A power of two, so that the next launch finds it fit as well.
            held = self._scratch[slot] = take(1 << (size - 1).bit_length())
        return held[:size].view(np.float32).reshape(rows, columns)

    def __del__(self) -> None:
        """Hand the buffers on to the next launch."""
        while self._scratch:
            _, held = self._scratch.popitem()
            give(held)
