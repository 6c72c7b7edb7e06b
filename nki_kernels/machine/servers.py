"""The state a schedule is made of: queues, servers, the Tensor engine's throttle, the records."""

from __future__ import annotations

import math
from collections import deque
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Final

from nki_kernels.hardware.spec import CoreSpec, Engine
from nki_kernels.machine.costs import DmaMilestones
from nki_kernels.machine.dependencies import QUEUES, STORE_QUEUE, queue_number
from nki_kernels.machine.trace import ControlWork, Event, PeWork

BARRIERS: Final = ("loop_iteration", "barrier")

#: The column of `handoffs` for stores whose descriptors software writes.
SOFTWARE_STORE: Final = Engine.unknown

#: The Tensor engine's array is told apart in 4 x 4 sub-arrays of 32 x 32: the smallest tile.
_PE_SIDE = 4
PE_CELLS: Final = _PE_SIDE * _PE_SIDE
_EVERY_CELL: Final = tuple(range(PE_CELLS))

#: Rounding of a running sum must not release the throttle.
_NOISE = 1e-6


class Throttle:
    """The Tensor engine's power limit: half the clock until it has worked for a while.

    Utilisation is the share of the window in which rows were streaming, weighted by the share of
    array rows in use. Above the limit, after a full window since the work began, the clock is
    released; below it the limit returns.
    """

    def __init__(self, spec: CoreSpec) -> None:
        self._window = spec.pe.throttle_window_ns
        self._share = spec.pe.throttle_share
        self.on = spec.pe.throttle < 1.0
        self._enabled = self.on
        self._since: float | None = None
        self._spans: deque[tuple[float, float, float]] = deque()
        self._busy = 0.0
        self.idle = True

    def advance(self, now: float) -> None:
        """Bring the state to time `now`, the start of a stream."""
        if not self._enabled:
            return
        low = now - self._window
        while self._spans and self._spans[0][1] <= low:
            start, end, weight = self._spans.popleft()
            self._busy -= (end - start) * weight
        self.idle = not self._spans
        if self.idle:
            self._busy = 0.0
            self._since = None
            self.on = True
        if self._since is None:
            self._since = now
        busy = self._busy
        if self._spans and self._spans[0][0] < low:
            busy -= (low - self._spans[0][0]) * self._spans[0][2]
        share = busy / self._window
        if self.on:
            self.on = now - self._since < self._window or share <= self._share + _NOISE
        elif share < self._share - _NOISE:
            self.on = True
            self._since = now

    def work(self, start: float, end: float, weight: float) -> None:
        """Record a stream."""
        if self._enabled:
            self._spans.append((start, end, weight))
            self._busy += (end - start) * weight


@lru_cache(1 << 12)
def pe_cells(work: PeWork, spec: CoreSpec) -> tuple[int, ...]:
    """Return the sub-arrays a matmul runs in: all, unless it names a tile of the array."""
    if not work.tile_rows or not work.tile_cols:
        return _EVERY_CELL
    high, wide = spec.pe.rows / _PE_SIDE, spec.pe.columns / _PE_SIDE
    rows = range(int(work.row_start / high), math.ceil((work.row_start + work.tile_rows) / high))
    columns = range(int(work.col_start / wide), math.ceil((work.col_start + work.tile_cols) / wide))
    return tuple(row * _PE_SIDE + column for row in rows for column in columns)


@dataclass(slots=True)
class Pipe:
    """What stands behind the queues of an engine: it is free from these times on."""

    #: The engine itself.
    free: float = 0.0
    #: Its descriptor generator.
    triggers: float = 0.0
    trigger_busy: float = 0.0


@dataclass(slots=True)
class Queue:
    """One sequencer: its instructions in program order, and when it can take the next."""

    number: int
    pipe: Pipe
    events: list[int] = field(default_factory=list)
    head: int = 0
    #: Instructions leave a queue in order, so none before the one ahead of it started.
    dispatched: float = 0.0


@dataclass(slots=True)
class Transfer:
    """A DMA on its way: what is left of it."""

    event: int
    cost: DmaMilestones
    ready: float
    turns: int
    service: float = -1.0


@dataclass(slots=True)
class Pair:
    """The HBM interface two cores share: free from this time on."""

    free: float = 0.0


class Core:
    """The servers of one core, and its program cut at barriers."""

    def __init__(self, number: int, spec: CoreSpec) -> None:
        self.number = number
        self.segments: list[dict[int, list[int]]] = [{}]
        self.barriers: list[tuple[int, ControlWork]] = []
        self.segment = 0
        self.left = 0
        self.pipes = [Pipe() for _ in range(STORE_QUEUE)]
        self.queues = [Queue(n, self.pipes[n % STORE_QUEUE]) for n in range(QUEUES)]
        self.horizon = 0.0
        self.throttle = Throttle(spec)
        #: Per sub-array of the Tensor engine: start and end of the last stream through it.
        self.streaming = [0.0] * PE_CELLS
        self.streamed = [0.0] * PE_CELLS
        self.loaded = 0.0
        self.table: str | None = None
        self.dma_free = [0.0] * spec.dma_engines
        self.dma_busy = [0.0] * spec.dma_engines
        #: Per queue, transfers on their way: the first has the queue's turns.
        self.transfers: list[deque[Transfer]] = [deque() for _ in range(QUEUES)]
        self.memory_free = 0.0
        self.memory_busy = 0.0
        self.busy = dict.fromkeys(Engine, 0.0)
        #: End of the last use: SBUF port by GpSimd and by Vector fast modes, PSUM bank by engine.
        self.port = {Engine.gpsimd: 0.0, Engine.vector: 0.0}
        self.bank: dict[tuple[Engine, int], float] = {}

    def add(self, number: int, event: Event) -> None:
        """Append an event of the program."""
        work = event.work
        if isinstance(work, ControlWork) and work.kind in BARRIERS:
            self.barriers.append((number, work))
            self.segments.append({})
            return
        self.segments[-1].setdefault(queue_number(event), []).append(number)

    def serve(self, cost: DmaMilestones, ready: float, pair: Pair | None) -> tuple[float, float]:
        """Pass the memory interfaces and the DMA engines for one turn; return its (start, end)."""
        service = max(ready, self.memory_free)
        self.memory_free = service + cost.core
        self.memory_busy += cost.core
        end = self.memory_free
        if pair is not None:
            service = max(service, pair.free)
            pair.free = service + cost.pair
            end = max(end, pair.free)
        free, busy = self.dma_free, self.dma_busy
        for engine, held in cost.engines:
            begin = free[engine]
            if begin < ready:
                begin = ready
            elif begin > service:
                service = begin
            free[engine] = begin + held
            busy[engine] += held
            if begin + held > end:
                end = begin + held
        return service, end


@dataclass(slots=True)
class Record:
    """What the scheduler writes per event."""

    size: int
    start: list[float] = field(init=False)
    issue: list[float] = field(init=False)
    read: list[float] = field(init=False)
    result: list[float] = field(init=False)
    service: list[float] = field(init=False)
    service_end: list[float] = field(init=False)
    cause: list[int] = field(init=False)
    cause_event: list[int] = field(init=False)
    done: bytearray = field(init=False)

    def __post_init__(self) -> None:
        for name in ("start", "issue", "read", "result", "service", "service_end"):
            setattr(self, name, [0.0] * self.size)
        self.cause = [0] * self.size
        self.cause_event = [-1] * self.size
        self.done = bytearray(self.size)


def handoffs(spec: CoreSpec) -> list[list[float]]:
    """Return the delay from producer to consumer, by engine numbers."""
    sync = spec.sync
    count = max(Engine) + 1
    table = [[sync.other_engine_ns] * count for _ in range(count)]
    for engine in Engine:
        table[engine][engine] = sync.same_engine_ns
    for engine in Engine:
        table[Engine.dma][engine] = sync.from_dma_ns
    for engine in Engine:
        table[engine][Engine.dma] = sync.to_dma_ns
        table[engine][SOFTWARE_STORE] = sync.to_software_store_ns
    return table
