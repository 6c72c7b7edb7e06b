"""Which earlier events an event has to wait for: from bytes, from reused memory, from registers.

The edges follow from program order alone; no time enters. Accesses are compared as boxes of rows
and byte columns (a strided one with its step and run, so that interleaved accesses stay apart). Per
distinct box of a tile the overlapping boxes are found once; afterwards an access costs as many
looks as it has neighbours.
"""

from __future__ import annotations

import enum
from typing import NamedTuple, TypeAlias

from nki_kernels.hardware.spec import Engine
from nki_kernels.machine.placement import Placement
from nki_kernels.machine.trace import Access, DmaWork, Event, Tile, Trace

#: Boxes of one tile that are compared one by one before a grid is laid over it.
_SCAN = 32
_CELLS = 4096
_ROW_CELLS = 256
#: A box over more cells than this is compared with every other.
_LARGE = 64
_ENGINES = max(Engine) + 1

#: Queue numbers: an engine's own number, and this much above it for its software-DGE stores.
STORE_QUEUE = _ENGINES
QUEUES = 2 * _ENGINES

#: An access without its tile.
_Pattern: TypeAlias = tuple[int, tuple[int, ...], tuple[int, ...], int, bool]


def queue_number(event: Event) -> int:
    """Return the in-order queue an event stands in.

    A DMA stands in the queue of the engine that triggers it. Stores whose descriptors software
    writes have a queue of their own beside the loads: on hardware a store that waits for its data
    holds back no load behind it, while both share the one descriptor generator (CS149 vector_add:
    three DMAs of 0.607 us an iteration, whether or not the store could have gone; AWS's tutorial
    matmuls agree).
    """
    work = event.work
    if not isinstance(work, DmaWork):
        return event.engine
    stores = work.mode == "dge_sw" and work.src != "hbm" and work.dst == "hbm"
    return work.queue + STORE_QUEUE if stores else work.queue


class Wait(enum.IntEnum):
    """What of the earlier event is waited for, and why."""

    result = 0
    read = 1
    reuse_result = 2
    reuse_read = 3


_WAITS = tuple(Wait)


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
    """One distinct box of a tile: its last writer, the readers since, and whom it overlaps.

    Tuples of numbers instead of lists: a long trace keeps many, and the collector skips them.
    """

    __slots__ = ("box", "near", "readers", "writer")

    def __init__(self, box: Box) -> None:
        self.box = box
        self.near: list[_Node] | None = None
        self.writer = -1
        self.readers: tuple[int, ...] = ()

    def join(self, other: _Node) -> None:
        """Note that this box and another share bytes."""
        for node, neighbour in ((self, other), (other, self)):
            if node.near is None:
                node.near = [node]
            node.near.append(neighbour)


class _Grid:
    """Cells over a tile that has many boxes, so that a new one meets only its neighbourhood."""

    def __init__(self, tile: Tile, nodes: list[_Node]) -> None:
        self._large: list[_Node] = []
        self._cells: dict[tuple[int, int], list[_Node]] = {}
        # On chip a box spans partitions and is told apart by its columns; in HBM, by its rows.
        rows = 1 if tile.memory != "hbm" else min(max(1, tile.partitions), _ROW_CELLS)
        self._rows = -(-max(1, tile.partitions) // rows)
        self._columns = -(-max(1, tile.row_bytes) // (_CELLS // rows))
        for node in nodes:
            self.insert(node)

    def _span(self, box: Box) -> list[tuple[int, int]] | None:
        """Return the cells of a box, or None for one that covers many."""
        r0, r1 = box.rows.low // self._rows, (box.rows.high - 1) // self._rows
        c0, c1 = box.columns.low // self._columns, (box.columns.high - 1) // self._columns
        if (r1 - r0 + 1) * (c1 - c0 + 1) > _LARGE:
            return None
        return [(r, c) for r in range(r0, r1 + 1) for c in range(c0, c1 + 1)]

    def insert(self, node: _Node) -> None:
        """Add a node to its cells."""
        cells = self._span(node.box)
        if cells is None:
            self._large.append(node)
            return
        for cell in cells:
            self._cells.setdefault(cell, []).append(node)

    def near(self, box: Box) -> list[_Node] | None:
        """Return the nodes that share a cell with `box`; None for all of them."""
        cells = self._span(box)
        if cells is None:
            return None
        found = {id(node): node for cell in cells for node in self._cells.get(cell, ())}
        return [*self._large, *found.values()]


class _TileBoxes:
    """The distinct boxes of one tile, by access pattern."""

    __slots__ = ("_grid", "_known", "nodes")

    def __init__(self) -> None:
        self.nodes: dict[_Pattern, _Node] = {}
        self._known: dict[Box, _Node] | None = None
        self._grid: _Grid | None = None

    def add(self, pattern: _Pattern, box: Box, tile: Tile) -> int:
        """Add the node of a new access pattern; return the boxes it was compared with."""
        if not self.nodes:
            self.nodes[pattern] = _Node(box)
            return 0
        known = self._known
        if known is None:
            known = self._known = {node.box: node for node in self.nodes.values()}
        node = known.get(box)
        if node is not None:
            self.nodes[pattern] = node
            return 0
        node = _Node(box)
        if self._grid is None and len(known) > _SCAN:
            self._grid = _Grid(tile, list(known.values()))
        near = None if self._grid is None else self._grid.near(box)
        others = known.values() if near is None else near
        for other in others:
            if box.meets(other.box):
                node.join(other)
        compared = len(others)
        known[box] = self.nodes[pattern] = node
        if self._grid is not None:
            self._grid.insert(node)
        return compared


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
        edges: per event, the waits that are not implied by an earlier event of the same queue;
            each is ``4 * event + wait`` (`split` takes it apart).
        banks: per event of Vector or Scalar that touches PSUM, keys of the banks it touches.
        looks: box comparisons and neighbour visits made, the measure of the work done.

    With `ordered` False no queue is taken to run in order: every wait is an edge of its own, for a
    reader that moves instructions.
    """

    def __init__(self, trace: Trace, placement: Placement | None, *, ordered: bool = True) -> None:
        self.edges: list[tuple[int, ...]] = []
        self.banks: dict[int, tuple[int, ...]] = {}
        self.looks = 0
        self._ordered = ordered
        self._bank_bytes = trace.spec.psum_bank_bytes
        self._engines = [event.engine for event in trace.events]
        self._cores = 1 + max((event.core for event in trace.events), default=0)
        self._tiles: dict[int, _TileBoxes] = {}
        self._boxes: dict[tuple[_Pattern, int, int], Box] = {}
        #: Tiles some event of the core writes: nothing ever waits for the others.
        self._written = {self._where(a.tile, e.core) for e in trace.events for a in e.writes}
        self._registers: dict[tuple[int, str], int] = {}
        self._before = {} if placement is None else placement.predecessors
        self._aliases = {} if placement is None else placement.aliases
        self._reused = {t for ids in self._before.values() for t in ids}
        self._reused.update(self._aliases)
        self._uses: dict[int, _Uses] = {}
        self._gated: set[tuple[int, int]] = set()
        #: Latest event a queue has waited for, by consumer port, producer and moment: later events
        #: of the queue start no earlier, so they need not wait for it again.
        self._seen: dict[tuple[int, int], int] = {}
        self._found: dict[int, int] = {}
        self._core = 0
        self._event_cores = [event.core for event in trace.events]
        #: What the kernel orders beyond its data (depends_on, with_schedule).
        self._after: dict[int, list[int]] = {}
        for producer, consumer in trace.orders:
            self._after.setdefault(consumer, []).append(producer)
        for number, event in enumerate(trace.events):
            self.edges.append(self._event(number, event))

    def _where(self, tile: Tile, core: int) -> int:
        """Return the key of a tile's history: HBM has one per core, a tile on chip one."""
        return tile.id * self._cores + (core if tile.memory == "hbm" else tile.core)

    def _event(self, number: int, event: Event) -> tuple[int, ...]:
        self._found.clear()
        self._core = event.core
        for producer in self._after.get(number, ()):
            self._want(producer, Wait.result, event.engine)
        work = event.work
        port: int = event.engine
        if isinstance(work, DmaWork):
            port = _ENGINES + queue_number(event)
        for access in event.reads:
            self._access(number, event, access, port, writes=False)
        for access in event.writes:
            self._access(number, event, access, port, writes=True)
        for name in event.hidden_reads:
            writer = self._registers.get((event.core, name))
            if writer is not None:
                self._want(writer, Wait.result, event.engine)
        for name in event.hidden_writes:
            if name.startswith("register:"):
                self._registers[event.core, name] = number
        if self._reused:
            self._record_uses(number, event)
        return self._edges(event.core * (_ENGINES + QUEUES) + port) if self._found else ()

    def _access(
        self, number: int, event: Event, access: Access, port: int, *, writes: bool
    ) -> None:
        tile = access.tile
        where = self._where(tile, event.core)
        if where not in self._written:
            return
        boxes = self._tiles.get(where)
        if boxes is None:
            boxes = self._tiles[where] = _TileBoxes()
        pattern = access[1:]
        node = boxes.nodes.get(pattern)
        if node is None:
            self.looks += boxes.add(pattern, self._box(access, pattern), tile)
            node = boxes.nodes[pattern]
        engine = event.engine
        # The array writes PSUM in order and adds in place: it never waits for itself.
        in_place = self._ordered and engine is Engine.tensor and tile.memory == "psum"
        itself = engine if in_place else None
        nodes = node.near or (node,)
        self.looks += len(nodes)
        for near in nodes:
            if near.writer >= 0 and self._engines[near.writer] is not itself:
                self._want(near.writer, Wait.result, engine)
            if writes:
                for reader in near.readers:
                    if reader != number:
                        self._want(reader, Wait.read, engine)
        if writes:
            node.writer, node.readers = number, ()
        else:
            self._read(number, engine, node)
        if tile.memory == "psum" and engine in (Engine.vector, Engine.scalar):
            self.banks[number] = (*self.banks.get(number, ()), *self._bank_keys(tile, node.box))
        if tile.id in self._before or tile.id in self._aliases:
            self._reuse(tile.id, port, engine)

    def _box(self, access: Access, pattern: _Pattern) -> Box:
        """Return the box of an access; tiles of one geometry share their boxes."""
        key = (pattern, access.tile.row_bytes, access.tile.partitions)
        box = self._boxes.get(key)
        if box is None:
            box = self._boxes[key] = box_of(access)
        return box

    def _read(self, number: int, engine: Engine, node: _Node) -> None:
        """Remember a reader; of an in-order engine only its last."""
        others = node.readers
        if others and engine is not Engine.dma and self._ordered:
            others = tuple([r for r in others if self._engines[r] is not engine])
        node.readers = (*others, number)

    def _bank_keys(self, tile: Tile, box: Box) -> tuple[int, ...]:
        first = box.columns.low // self._bank_bytes
        last = (box.columns.high - 1) // self._bank_bytes
        return tuple(tile.id * _CELLS + bank for bank in range(first, last + 1))

    def _want(self, event: int, wait: Wait, engine: Engine) -> None:
        """Collect a wait; of one in-order engine and kind only the latest counts.

        An engine does not wait to overwrite what it read itself: it reads in order.
        """
        producer = self._engines[event]
        apart = self._event_cores[event] != self._core
        if producer is Engine.dma or not self._ordered or apart:
            self._found[-1 - event * 4 - wait] = event
        elif producer is not engine or not wait & 1:
            key = producer * 4 + wait
            if self._found.get(key, -1) < event:
                self._found[key] = event

    def _reuse(self, tile: int, port: int, engine: Engine) -> None:
        """Wait for the tiles whose memory this one reuses; once per queue: starts are in order."""
        others = self._aliases.get(tile, ())
        if (tile, port) not in self._gated or not self._ordered:
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
        apart = event.engine is Engine.dma or not self._ordered
        key = -1 - number if apart else int(event.engine)
        for accesses, writes in ((event.reads, False), (event.writes, True)):
            for access in accesses:
                tile = access.tile.id
                if tile in self._reused:
                    uses = self._uses.get(tile)
                    if uses is None:
                        uses = self._uses[tile] = _Uses()
                    (uses.writers if writes else uses.readers)[key] = number

    def _edges(self, port: int) -> tuple[int, ...]:
        edges = []
        seen = self._seen
        for key, event in self._found.items():
            if key < 0:
                edges.append(-1 - key)
                continue
            # Reused memory waits for the same two moments as bytes do: one column for both.
            column = (port, key & ~2)
            if seen.get(column, -1) < event:
                seen[column] = event
                edges.append(event * 4 + (key & 3))
        return tuple(edges)


def split(edge: int) -> tuple[int, Wait]:
    """Return the event an edge waits for, and what of it."""
    return edge >> 2, _WAITS[edge & 3]
