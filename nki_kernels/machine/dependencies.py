"""Which earlier events an event has to wait for: from bytes, from reused memory, from registers.

The edges follow from program order alone; no time enters. Accesses are compared as boxes of rows
and byte columns (a strided one with its step and run, so that interleaved accesses stay apart). Per
distinct box of a tile the overlapping boxes are found once; afterwards an access costs as many
looks as it has neighbours.
"""

from __future__ import annotations

import enum
from typing import NamedTuple

from nki_kernels.hardware.spec import Engine
from nki_kernels.machine.placement import Placement
from nki_kernels.machine.trace import Access, DmaWork, Event, Tile, Trace

#: Boxes of one tile that are compared one by one before a grid is laid over it.
_SCAN = 32
_GRID = 4096
_LARGE = 64
_ENGINES = max(Engine) + 1


class Wait(enum.IntEnum):
    """What of the earlier event is waited for, and why."""

    result = 0
    read = 1
    reuse_result = 2
    reuse_read = 3


class Edge(NamedTuple):
    """Wait for a moment of event number `event`."""

    event: int
    wait: Wait


class Axis(NamedTuple):
    """An extent [low, high); if `step`, only runs of `run` every `step` belong to it."""

    low: int
    high: int
    step: int
    run: int

    def meets(self, other: Axis) -> bool:
        """Return False if the two cannot share an element; True if they do or may."""
        if self.low >= other.high or other.low >= self.high:
            return False
        step = self.step or other.step
        if self.step and other.step:
            step = min(self.step, other.step)
            if max(self.step, other.step) % step:
                return True
        if not step:
            return True
        ahead = (other.low - self.low) % step
        return ahead < self.run or step - ahead < other.run


class Box(NamedTuple):
    """The bytes an access may touch: rows (partitions on chip) by byte columns."""

    rows: Axis
    columns: Axis

    def meets(self, other: Box) -> bool:
        """Return False only if no byte is shared."""
        return self.rows.meets(other.rows) and self.columns.meets(other.columns)


def box_of(access: Access) -> Box:
    """Return the box of an access; where its dimensions wrap around rows, whole rows."""
    tile, size = access.tile, access.itemsize
    width = max(1, tile.row_bytes)
    if access.whole:
        rows = max(1, tile.partitions)
        return Box(Axis(0, rows, 0, rows), Axis(0, width, 0, width))
    start = access.offset * size
    rows_of: list[tuple[int, int]] = []
    columns_of: list[tuple[int, int]] = []
    for extent, stride in zip(access.shape, access.strides, strict=True):
        step = stride * size
        if extent <= 1 or step == 0:
            continue
        if step < 0:
            start += (extent - 1) * step
            step = -step
        if step % width:
            columns_of.append((step, extent))
        else:
            rows_of.append((step // width, extent))
    row, column = divmod(start, width)
    high, step, run = _extent(columns_of, size)
    if column + high > width:
        last = (column + high - 1) // width
        rows_high, _, _ = _extent(rows_of, last + 1)
        return Box(Axis(row, row + rows_high, 0, rows_high), Axis(0, width, 0, width))
    rows_high, rows_step, rows_run = _extent(rows_of, 1)
    return Box(
        Axis(row, row + rows_high, rows_step, rows_run),
        Axis(column, column + high, step, run),
    )


def _extent(dims: list[tuple[int, int]], unit: int) -> tuple[int, int, int]:
    """Return (extent, step, run) of nested steps over runs of `unit`; step 0 without gaps."""
    dims.sort()
    run, step = unit, 0
    reach = unit
    for index, (stride, extent) in enumerate(dims):
        if not step and stride > run and all(s % stride == 0 for s, _ in dims[index:]):
            step = stride
        elif not step:
            run += (extent - 1) * stride
        reach += (extent - 1) * stride
    return (reach, step, run) if step else (reach, 0, reach)


class _Node:
    """One distinct box of a tile: its last writer, the readers since, and whom it overlaps."""

    __slots__ = ("box", "near", "readers", "writer")

    def __init__(self, box: Box) -> None:
        self.box = box
        self.near: list[_Node] = [self]
        self.writer = -1
        self.readers: list[int] = []


class _TileBoxes:
    """The boxes of one tile, found by access pattern."""

    __slots__ = ("_cell", "_cells", "_known", "_large", "_nodes", "_rows", "nodes")

    def __init__(self, tile: Tile) -> None:
        self.nodes: dict[tuple[object, ...], _Node] = {}
        self._known: dict[Box, _Node] = {}
        self._nodes: list[_Node] = []
        self._large: list[_Node] = []
        self._cells: dict[tuple[int, int], list[_Node]] = {}
        rows = min(max(1, tile.partitions), _LARGE)
        self._rows = -(-max(1, tile.partitions) // rows)
        self._cell = -(-max(1, tile.row_bytes) // (_GRID // rows))

    def add(self, access: Access, key: tuple[object, ...]) -> _Node:
        """Return the node of a new access pattern."""
        box = box_of(access)
        node = self._known.get(box)
        if node is None:
            node = self._known[box] = _Node(box)
            for other in self._candidates(box):
                if box.meets(other.box):
                    node.near.append(other)
                    other.near.append(node)
            self._insert(node)
        self.nodes[key] = node
        return node

    def _span(self, box: Box) -> list[tuple[int, int]] | None:
        """Return the grid cells of a box, or None for one that covers many."""
        r0, r1 = box.rows.low // self._rows, (box.rows.high - 1) // self._rows
        c0, c1 = box.columns.low // self._cell, (box.columns.high - 1) // self._cell
        if (r1 - r0 + 1) * (c1 - c0 + 1) > _LARGE:
            return None
        return [(r, c) for r in range(r0, r1 + 1) for c in range(c0, c1 + 1)]

    def _candidates(self, box: Box) -> list[_Node]:
        if len(self._nodes) <= _SCAN:
            return self._nodes
        cells = self._span(box)
        if cells is None:
            return self._nodes
        found = {id(n): n for cell in cells for n in self._cells.get(cell, ())}
        return [*self._large, *found.values()]

    def _insert(self, node: _Node) -> None:
        self._nodes.append(node)
        cells = self._span(node.box)
        if cells is None:
            self._large.append(node)
            return
        for cell in cells:
            self._cells.setdefault(cell, []).append(node)


class _Uses:
    """The accesses of a tile that whoever gets its memory next has to wait for."""

    __slots__ = ("readers", "writers")

    def __init__(self) -> None:
        #: Last event per in-order engine, every event for DMA (negative keys).
        self.readers: dict[int, int] = {}
        self.writers: dict[int, int] = {}


class Dependencies:
    """Edges of a trace, event by event.

    Attributes:
        edges: per event, the waits that are not implied by an earlier event of the same queue.
        banks: per event of Vector or Scalar that touches PSUM, keys of the banks it touches.
        looks: box comparisons and neighbour visits made, the measure of the work done.
    """

    def __init__(self, trace: Trace, placement: Placement | None) -> None:
        self.edges: list[tuple[Edge, ...]] = []
        self.banks: dict[int, tuple[int, ...]] = {}
        self.looks = 0
        self._events = trace.events
        self._bank_bytes = trace.spec.psum_bank_bytes
        self._tiles: dict[tuple[int, int], _TileBoxes] = {}
        self._written = {(e.core, a.tile.id) for e in trace.events for a in e.writes}
        self._registers: dict[tuple[int, str], int] = {}
        self._before = {} if placement is None else placement.predecessors
        self._aliases = {} if placement is None else placement.aliases
        self._reused = {t for ids in self._before.values() for t in ids}
        self._reused.update(self._aliases)
        self._uses: dict[int, _Uses] = {}
        self._gated: set[tuple[int, int]] = set()
        #: Latest event a queue has waited for, per consumer port and producer: starts are in order.
        self._seen: dict[tuple[int, int, int], int] = {}
        self._found: dict[int, int] = {}
        for number, event in enumerate(trace.events):
            self.edges.append(self._event(number, event))

    def _event(self, number: int, event: Event) -> tuple[Edge, ...]:
        found = self._found
        found.clear()
        engine = event.engine
        work = event.work
        port = int(engine)
        if isinstance(work, DmaWork):
            port = _ENGINES + work.queue
        for access in event.reads:
            self._access(number, event, access, port, writes=False)
        for access in event.writes:
            self._access(number, event, access, port, writes=True)
        for name in event.hidden_reads:
            writer = self._registers.get((event.core, name))
            if writer is not None:
                self._want(writer, Wait.result, engine)
        for name in event.hidden_writes:
            if name.startswith("register:"):
                self._registers[event.core, name] = number
        if self._reused:
            self._record_uses(number, event)
        return self._edges(event.core, port)

    def _access(
        self, number: int, event: Event, access: Access, port: int, *, writes: bool
    ) -> None:
        tile = access.tile
        where = (event.core, tile.id)
        if where not in self._written:
            return
        boxes = self._tiles.get(where)
        if boxes is None:
            boxes = self._tiles[where] = _TileBoxes(tile)
        key = access[1:]
        node = boxes.nodes.get(key)
        if node is None:
            node = boxes.add(access, key)
        engine = event.engine
        self.looks += len(node.near)
        # The array writes PSUM in order and adds in place: it never waits for itself.
        itself = engine if engine is Engine.tensor and tile.memory == "psum" else None
        events = self._events
        for near in node.near:
            if near.writer >= 0 and events[near.writer].engine is not itself:
                self._want(near.writer, Wait.result, engine)
            if writes:
                for reader in near.readers:
                    if reader != number:
                        self._want(reader, Wait.read, engine)
        if writes:
            node.writer = number
            node.readers = []
        else:
            self._read(number, event, node)
        if tile.memory == "psum" and engine in (Engine.vector, Engine.scalar):
            self.banks[number] = (*self.banks.get(number, ()), *self._bank_keys(tile, node.box))
        if tile.id in self._before or tile.id in self._aliases:
            self._reuse(tile.id, port, engine)

    def _read(self, number: int, event: Event, node: _Node) -> None:
        """Remember a reader; of an in-order engine only its last."""
        readers = node.readers
        if event.engine is not Engine.dma:
            for at, other in enumerate(readers):
                if self._events[other].engine is event.engine:
                    readers[at] = number
                    return
        readers.append(number)

    def _bank_keys(self, tile: Tile, box: Box) -> tuple[int, ...]:
        first = box.columns.low // self._bank_bytes
        last = (box.columns.high - 1) // self._bank_bytes
        return tuple(tile.id * _GRID + bank for bank in range(first, last + 1))

    def _want(self, event: int, wait: Wait, engine: Engine) -> None:
        """Collect a wait; of one in-order engine and kind only the latest counts."""
        producer = self._events[event].engine
        if producer is Engine.dma:
            self._found[-1 - event * 4 - wait] = event
            return
        if producer is engine and wait in (Wait.read, Wait.reuse_read):
            return
        key = producer * 4 + wait
        if self._found.get(key, -1) < event:
            self._found[key] = event

    def _reuse(self, tile: int, port: int, engine: Engine) -> None:
        """Wait for the tiles whose memory this one reuses; once per queue: starts are in order."""
        others = self._aliases.get(tile, ())
        if (tile, port) not in self._gated:
            self._gated.add((tile, port))
            others = (*self._before.get(tile, ()), *others)
        for other in others:
            uses = self._uses.get(other)
            if uses is None:
                continue
            for event in uses.writers.values():
                self._want(event, Wait.reuse_result, engine)
            for event in uses.readers.values():
                self._want(event, Wait.reuse_read, engine)

    def _record_uses(self, number: int, event: Event) -> None:
        key = -1 - number if event.engine is Engine.dma else int(event.engine)
        for accesses, writes in ((event.reads, False), (event.writes, True)):
            for access in accesses:
                tile = access.tile.id
                if tile in self._reused:
                    uses = self._uses.get(tile)
                    if uses is None:
                        uses = self._uses[tile] = _Uses()
                    (uses.writers if writes else uses.readers)[key] = number

    def _edges(self, core: int, port: int) -> tuple[Edge, ...]:
        if not self._found:
            return ()
        edges = []
        seen = self._seen
        for key, event in self._found.items():
            if key >= 0:
                # One column for results and one for reads: a reuse waits for the same moment.
                column = (core * 64 + port, key // 4, key & 1)
                if seen.get(column, -1) >= event:
                    continue
                seen[column] = event
                edges.append(Edge(event, Wait(key & 3)))
            else:
                edges.append(Edge(event, Wait((-1 - key) & 3)))
        return tuple(edges)
