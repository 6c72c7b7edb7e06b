"""The critical path: why the kernel did not end earlier, from the last result back to the launch.

Each step asks what bound the start of an event (`Timeline.cause`) and goes on there; the pieces
cover the makespan without gap or overlap. What is on the path is worth making faster, and how the
path came there says what is wrong: through a buffer that was not free, a queue, a shared bank.
"""

from __future__ import annotations

import enum
from bisect import bisect_left
from collections import defaultdict
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from nki_kernels.hardware.spec import CoreSpec, Engine
from nki_kernels.machine.costs import dma_timing
from nki_kernels.machine.dependencies import STORE_QUEUE, queue_number
from nki_kernels.machine.servers import BARRIERS
from nki_kernels.machine.timeline import Cause, Timeline
from nki_kernels.machine.trace import ControlWork, DmaWork

#: Times are sums in float64; moments closer than this are the same moment.
_SAME_NS = 1e-6
#: Payloads before one's own that may be in its way.
_AHEAD = 32
#: Matmuls that may stream side by side on tiles of the array.
_TILES = 16


class Part(enum.IntEnum):
    """What of an event a piece of the path is."""

    compute = 0
    trigger = 1
    transfer = 2
    #: The payload kept the DMA engines from the next one on the path.
    bandwidth = 3
    notify = 4
    handoff = 5
    launch = 6


class Piece(NamedTuple):
    """A stretch of the critical path: `event` (-1 before the first) from `start` to `end`."""

    event: int
    part: Part
    start: float
    end: float
    cause: Cause


class Order:
    """Who came before whom: per queue in program order, DMA payloads in order of service."""

    def __init__(self, timeline: Timeline) -> None:
        events = timeline.trace.events
        self.before = [-1] * len(events)
        last: dict[tuple[int, int], int] = {}
        queues: dict[tuple[int, int], list[int]] = defaultdict(list)
        for number, event in enumerate(events):
            key = event.core, queue_number(event)
            self.before[number] = last.get(key, -1)
            last[key] = number
            queues[key].append(number)
        self._starts: dict[tuple[int, int], tuple[list[float], list[int]]] = {}
        for key, numbers in queues.items():
            numbers.sort(key=lambda n: (float(timeline.start[n]), n))
            self._starts[key] = [float(timeline.start[n]) for n in numbers], numbers
        self.served: dict[int, int] = {}
        payloads = sorted(
            (float(timeline.service[n]), n)
            for n, event in enumerate(events)
            if event.engine is Engine.dma
        )
        for at, (begin, number) in enumerate(payloads[1:], 1):
            # It waits for the memory interface or for a DMA engine: whoever let go last.
            ahead = [n for _, n in payloads[max(0, at - _AHEAD) : at]]
            done = [n for n in ahead if float(timeline.service_end[n]) <= begin + _SAME_NS]
            self.served[number] = max(done or ahead[-1:], key=lambda n: timeline.service_end[n])

        self._ended = np.argsort(timeline.result, kind="stable")
        self._results = timeline.result[self._ended]
        self._cores = np.array([event.core for event in events], np.int64)

    def ended(self, number: int, now: float, core: int | None = None) -> int:
        """Return the event, other than `number`, whose result was the last up to `now`, or -1.

        Args:
            number: an event.
            now: ns.
            core: only events of this core.
        """
        at = int(np.searchsorted(self._results, now + _SAME_NS, side="right"))
        for other in self._ended[:at][::-1]:
            if other != number and core in (None, int(self._cores[other])):
                return int(other)
        return -1

    def running(self, core: int, queue: int, now: float) -> int:
        """Return the last event of a queue that started before `now`, or -1."""
        starts, numbers = self._starts.get((core, queue), ([], []))
        at = bisect_left(starts, now)
        return numbers[at - 1] if at else -1

    def ahead(self, timeline: Timeline, number: int) -> int:
        """Return the event that kept a queue from taking event `number` earlier, or -1.

        It is the one before, unless the other queue of the same engine (stores whose descriptors
        software writes) held the engine or its descriptor generator for longer.
        """
        event, before = timeline.trace.events[number], self.before[number]
        queue, start = queue_number(event), float(timeline.start[number])
        sibling = queue - STORE_QUEUE if queue >= STORE_QUEUE else queue + STORE_QUEUE
        other = self.running(event.core, sibling, start)
        if other < 0 or float(timeline.issue[other]) > start + _SAME_NS:
            return before
        if before >= 0 and float(timeline.issue[before]) >= float(timeline.issue[other]):
            return before
        return other


#: Who holds what an event collided with.
_RIVALS = {
    (Cause.bank, Engine.vector): Engine.scalar,
    (Cause.bank, Engine.scalar): Engine.vector,
    (Cause.port, Engine.vector): Engine.gpsimd,
    (Cause.port, Engine.gpsimd): Engine.vector,
}


def blocker(timeline: Timeline, order: Order, number: int) -> int:
    """Return the event that bound the start of event `number`; -1 if nothing did."""
    cause, event = Cause(timeline.cause[number]), timeline.trace.events[number]
    start = float(timeline.start[number])
    if isinstance(event.work, ControlWork) and event.work.kind in BARRIERS:
        own = event.core if event.work.kind == "loop_iteration" else None
        return order.ended(number, start, own)
    if event.engine is Engine.tensor:
        # Weights load behind the stream before: the array, not the operand, may be what was late.
        # Tiles of the array stream side by side: whose end was it?
        before = order.before[number]
        for _ in range(_TILES):
            if before < 0 or timeline.trace.events[before].engine is not Engine.tensor:
                break
            if abs(float(timeline.issue[before]) - start) < _SAME_NS:
                return before
            before = order.before[before]
    source = int(timeline.cause_event[number])
    if source >= 0:
        return source
    rival = _RIVALS.get((cause, event.engine))
    if rival is not None:
        return order.running(event.core, rival, start)
    if cause is Cause.launch:
        return -1
    return order.ahead(timeline, number)


def dispatched(number: int, timeline: Timeline, spec: CoreSpec) -> float:
    """Return when the payload of a DMA could have started, had no other been in the way."""
    work = timeline.trace.events[number].work
    extra = dma_timing(work, spec).dispatch if isinstance(work, DmaWork) else 0.0
    return float(timeline.start[number]) + extra


class CriticalPath:
    """The pieces of the critical path of one timeline, last first.

    Attributes:
        pieces: they cover [0, makespan].
        event_ns: per event, its time on the path.
        part_ns: time by what it was spent on.
    """

    def __init__(self, timeline: Timeline, order: Order) -> None:
        self.pieces: list[Piece] = list(self._walk(timeline, order))
        self.event_ns: npt.NDArray[np.float64] = np.zeros(len(timeline.trace.events))
        self.part_ns = dict.fromkeys(Part, 0.0)
        for piece in self.pieces:
            self.part_ns[piece.part] += piece.end - piece.start
            if piece.event >= 0:
                self.event_ns[piece.event] += piece.end - piece.start

    def _walk(self, timeline: Timeline, order: Order) -> Iterator[Piece]:
        if not len(timeline.trace.events):
            return
        number, now = int(np.argmax(timeline.result)), float(timeline.makespan_ns)
        payload = Part.transfer
        events, spec = timeline.trace.events, timeline.trace.spec
        # Every step goes to an event scheduled before; the bound only guards against rounding.
        for _ in range(4 * len(events) + 4):
            cause = Cause(timeline.cause[number])
            start = float(timeline.start[number])
            late = False
            if events[number].engine is Engine.dma:
                begin = float(timeline.service[number])
                late = now > begin and begin > dispatched(number, timeline, spec) + _SAME_NS
                late = late and number in order.served
                yield from self._dma(timeline, number, now, payload, late)
                now = min(now, begin if late else start)
            elif now > start:
                yield Piece(number, Part.compute, start, now, cause)
                now = start
            payload = Part.bandwidth if late else Part.transfer
            previous = order.served[number] if late else blocker(timeline, order, number)
            if previous < 0 and now > _SAME_NS:
                previous = order.ended(number, now)
            if previous < 0:
                break
            waited = cause is Cause.result and not late
            end = float(timeline.result[previous])
            if waited and end < now:
                yield Piece(number, Part.handoff, end, now, cause)
                now = end
            number = previous
        if now > 0.0:
            yield Piece(-1, Part.launch, 0.0, now, Cause.launch)

    @staticmethod
    def _dma(
        timeline: Timeline, number: int, now: float, payload: Part, late: bool
    ) -> Iterator[Piece]:
        """Cut a DMA into notification, payload and trigger, each up to `now`."""
        cause = Cause(timeline.cause[number])
        start, begin = float(timeline.start[number]), float(timeline.service[number])
        end = max(begin, float(timeline.service_end[number]))
        for part, low, high in (
            (Part.notify if payload is Part.transfer else payload, end, now),
            (payload, begin, min(end, now)),
            (Part.trigger, start, min(begin, now)),
        ):
            if high > low and not (late and part is Part.trigger):
                yield Piece(number, part, low, high, cause)
