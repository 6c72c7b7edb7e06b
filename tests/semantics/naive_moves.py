"""Naive twins of instructions that multiply, move, search or index."""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass
from typing import Any

import numpy as np

from tests.semantics.naive import Machine, Tile, rounded, single, twin

# -- Tensor engine ---------------------------------------------------------------------------------


def address(tile: Tile, p: int, i: int) -> int:
    steps = zip(tile.place(p, i), tile.array.strides, strict=True)
    pointer: int = tile.array.__array_interface__["data"][0]
    return pointer + sum(index * step for index, step in steps)


@twin
def nc_matmul(
    m: Machine,
    dst: Tile,
    stationary: Tile,
    moving: Tile,
    accumulate: bool | None = None,
    is_transpose: bool = False,
    perf_mode: str = "none",
) -> None:
    planes = 2 if perf_mode == "double_row" else 1
    columns, rows = moving.free // planes, stationary.free // planes
    for i, j in itertools.product(range(rows), range(columns)):
        where = (address(dst, i, j),)
        if is_transpose:
            dst.put_raw(i, j, stationary.raw(j, i))
            m.groups.discard(where)
            continue
        total = sum(
            stationary.value(k, plane * rows + i) * moving.value(k, plane * columns + j)
            for plane in range(planes)
            for k in range(moving.partitions)
        )
        if accumulate or (accumulate is None and where in m.groups):
            total += dst.value(i, j)
        dst.put(i, j, total)
        m.groups.add(where)


@twin
def nc_transpose(m: Machine, dst: Tile, data: Tile) -> None:
    for p in range(data.partitions):
        for i in range(data.free):
            dst.put_raw(i, p, data.raw(p, i))


# -- searches --------------------------------------------------------------------------------------


@twin
def max8(m: Machine, dst: Tile, src: Tile) -> None:
    for p in range(src.partitions):
        for k, x in enumerate(sorted(src.row(p), reverse=True)[:8]):
            dst.put(p, k, x)


def _ones(tile: Tile) -> Any:
    return np.iinfo(tile.array.dtype).max


@twin
def nc_find_index8(m: Machine, dst: Tile, data: Tile, vals: Tile) -> None:
    for p in range(data.partitions):
        taken: set[int] = set()
        row = data.row(p)
        for k in range(8):
            free = [i for i, x in enumerate(row) if x == vals.value(p, k) and i not in taken]
            dst.put_raw(p, k, free[0] if free else _ones(dst))
            taken.update(free[:1])


@twin
def nc_match_replace8(
    m: Machine, dst: Tile, data: Tile, vals: Tile, imm: float, dst_idx: Tile | None = None
) -> None:
    for p in range(data.partitions):
        row = data.row(p)
        old = [data.raw(p, i) for i in range(data.free)]
        wanted = [vals.value(p, k) for k in range(8)]
        taken: dict[int, int] = {}
        for k in reversed(range(8)):
            free = [i for i, x in enumerate(row) if x == wanted[k] and i not in taken]
            if free:
                taken[free[0]] = k
            if dst_idx is not None:
                dst_idx.put_raw(p, k, free[0] if free else _ones(dst_idx))
        for i, x in enumerate(old):
            if i in taken:
                dst.put(p, i, imm)
            elif dst.dtype == data.dtype:
                dst.put_raw(p, i, x)
            else:
                dst.put(p, i, row[i])


# -- gathers on chip -------------------------------------------------------------------------------


@twin
def nc_stream_shuffle(m: Machine, dst: Tile, src: Tile, shuffle_mask: Any) -> None:
    old = [[src.raw(p, i) for i in range(src.free)] for p in range(src.partitions)]
    for p in range(dst.partitions):
        entry = shuffle_mask[p % m.quadrant]
        if entry != 255:
            for i, x in enumerate(old[p - p % m.quadrant + entry]):
                dst.put_raw(p, i, x)


@twin
def nc_n_gather(m: Machine, dst: Tile, data: Tile, indices: Tile) -> None:
    for p in range(dst.partitions):
        old = [data.raw(p, i) for i in range(data.free)]
        for i in range(dst.free):
            dst.put_raw(p, i, old[int(indices.raw(p, i))])


@twin
def local_gather(
    m: Machine,
    dst: Tile,
    src_buffer: Tile,
    index: Tile,
    num_elem_per_idx: int = 1,
    num_valid_indices: int | None = None,
) -> None:
    per = m.core_partitions
    for p in range(dst.partitions):
        core = p - p % per
        # Partition by partition within a column of the core's rows.
        listed = [int(index.raw(core + r, c)) for c in range(index.free) for r in range(per)]
        spots = [i + e for i in listed[:num_valid_indices] for e in range(num_elem_per_idx)]
        for k, i in enumerate(spots):
            dst.put_raw(p, k, src_buffer.raw(p, i))


# -- index lists -----------------------------------------------------------------------------------


@twin
def nonzero_with_count(
    m: Machine, dst: Tile, src: Tile, index_offset: int = 0, padding_val: int = -1
) -> None:
    for p in range(0, src.partitions, m.core_partitions):
        found = [i + index_offset for i in range(src.free) if src.raw(p, i) != 0]
        padding = [padding_val] * (src.free - len(found))
        for i, x in enumerate([*found, *padding, len(found)]):
            dst.put_raw(p, i, x)


@twin
def topk(m: Machine, val_dst: Tile, idx_dst: Tile, src: Tile, n: int) -> None:
    per = m.core_partitions
    for p in range(src.partitions):
        core = p - p % per
        snake = [(src.value(core + e % per, e // per), e) for e in range(n)]
        best = sorted(snake)[-val_dst.free :]
        for k, (x, e) in enumerate(best):
            val_dst.put(p, k, x)
            idx_dst.put_raw(p, k, e)


@twin
def sequence_bounds(m: Machine, dst: Tile, segment_ids: Tile) -> None:
    ids = segment_ids.row(0)
    n = len(ids)
    for i, x in enumerate(ids):
        first = last = i
        while first > 0 and ids[first - 1] == x:
            first -= 1
        while last + 1 < n and ids[last + 1] == x:
            last += 1
        start, end = (n, -1) if x == 0 else (first, last + 1)
        dst.put_raw(0, i, start)
        dst.put_raw(0, n + i, end)


# -- DMA -------------------------------------------------------------------------------------------


@dataclass
class Rows:
    """Rows of an HBM tensor at run-time addresses, as `.ap(...)` with an offset describes them."""

    base: Any  # one-dimensional array of the whole tensor
    dtype: str
    starts: list[int]
    steps: list[tuple[int, int]]

    @property
    def partitions(self) -> int:
        return len(self.starts)

    @property
    def free(self) -> int:
        return math.prod(count for _, count in self.steps)

    def addresses(self, row: int) -> list[int]:
        return [
            self.starts[row] + sum(i * step for i, (step, _) in zip(at, self.steps, strict=True))
            for at in itertools.product(*(range(count) for _, count in self.steps))
        ]

    def inside(self, row: int) -> bool:
        return all(0 <= a < self.base.size for a in self.addresses(row))

    def raw(self, row: int, i: int) -> Any:
        return self.base[self.addresses(row)[i]]

    def put_raw(self, row: int, i: int, bits: Any) -> None:
        self.base[self.addresses(row)[i]] = bits

    def value(self, row: int, i: int) -> float:
        return single(float(self.raw(row, i)))


def _inside(side: Tile | Rows, row: int) -> bool:
    return side.inside(row) if isinstance(side, Rows) else True


def _moved(bits: Any, source: str, target: str) -> Any:
    return bits if source == target else rounded(float(bits), target)


@twin
def dma_copy(m: Machine, dst: Tile | Rows, src: Tile | Rows) -> None:
    """Out-of-bounds rows are skipped: callers allow it."""
    total = src.partitions * src.free
    old = [
        src.raw(*divmod(k, src.free)) if _inside(src, k // src.free) else None for k in range(total)
    ]
    for k, bits in enumerate(old):
        row, i = divmod(k, dst.free)
        if bits is not None and _inside(dst, row):
            dst.put_raw(row, i, _moved(bits, src.dtype, dst.dtype))


@twin
def dma_transpose(m: Machine, dst: Tile, src: Tile | Rows, axes: Any = None) -> None:
    shape = (
        (src.partitions, *(n for _, n in src.steps))
        if isinstance(src, Rows)
        else tuple(src.array.shape)
    )
    order = {2: (1, 0), 3: (2, 1, 0), 4: (3, 1, 2, 0)}[len(shape)]
    for place in itertools.product(*(range(n) for n in shape)):
        if not _inside(src, place[0]):
            continue
        free = 0
        for index, extent in zip(place[1:], shape[1:], strict=True):
            free = free * extent + index
        dst.array[tuple(place[a] for a in order)] = src.raw(place[0], free)


@twin
def dma_compute(m: Machine, dst: Tile | Rows, srcs: Any, reduce_op: str) -> None:
    """A sum; with Rows among the operands a read-modify-write of two sources, row by row."""
    indexed = [s for s in srcs if isinstance(s, Rows)]
    if not indexed:
        total = dst.partitions * dst.free
        sums = []
        for k in range(total):
            terms = [s.value(*divmod(k, s.free)) for s in srcs]
            x = terms[0]
            for y in terms[1:]:
                x = single(x + y)
            sums.append(x)
        for k, x in enumerate(sums):
            dst.put_raw(*divmod(k, dst.free), rounded(x, dst.dtype))
        return
    rows = indexed[0]
    other = next(s for s in srcs if not isinstance(s, Rows))
    for row in range(rows.partitions):
        if rows.inside(row):
            for i in range(rows.free):
                x = single(rows.value(row, i) + other.value(row, i))
                dst.put_raw(row, i, rounded(x, dst.dtype))
