"""When an engine stood idle, and what it waited for."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from nki_kernels.hardware.spec import Engine
from nki_kernels.machine.timeline import Cause, Timeline
from nki_kernels.machine.trace import DmaWork
from nki_kernels.profiler.path import Order, blocker, dispatched

#: How a gap reads, by what bound the event that ends it.
REASONS = {
    Cause.launch: "waiting for the kernel to start",
    Cause.engine: "in its queue behind",
    Cause.result: "waiting for the result of",
    Cause.read: "waiting to overwrite what is still read by",
    Cause.memory: "waiting for memory still used by",
    Cause.queue: "waiting for the trigger queue, busy with",
    Cause.barrier: "at a barrier",
    Cause.port: "waiting for the SBUF port held by",
    Cause.bank: "waiting for the PSUM bank held by",
}
BANDWIDTH = "waiting for the DMA engines, busy with"
DISPATCH = "between trigger and payload of"
DONE = "no more work; others finish until the end, last"


class Gap(NamedTuple):
    """An idle stretch of an engine.

    Attributes:
        start: ns after the kernel's first instruction could start.
        end: the same.
        reason: what it waited for, in words.
        event: the event that ended the gap, or -1 for the tail.
        waited_for: the event in the way, or -1.
    """

    start: float
    end: float
    reason: str
    event: int
    waited_for: int


def busiest(timeline: Timeline) -> tuple[Engine, int]:
    """Return the engine that limits the kernel and the core on which it is busier."""
    name = timeline.limiting_engine
    engine = Engine.unknown if name == "none" else Engine[name]
    cores = sorted({event.core for event in timeline.trace.events}) or [0]
    spans = [sum(high - low for low, high in timeline.intervals(engine, c)) for c in cores]
    return engine, cores[int(np.argmax(spans))]


def idle_gaps(timeline: Timeline, order: Order, engine: Engine, core: int = 0) -> list[Gap]:
    """Return every idle stretch of an engine between 0 and the makespan, the longest first."""
    numbers = [
        n for n, e in enumerate(timeline.trace.events) if e.engine is engine and e.core == core
    ]
    numbers.sort(key=lambda n: (float(timeline.service[n]), n))
    gaps, now = [], 0.0
    for number in numbers:
        start = float(timeline.service[number])
        if start > now:
            gaps.append(_gap(timeline, order, now, start, number))
        now = max(now, float(timeline.service_end[number]))
    if timeline.makespan_ns > now:
        last = int(np.argmax(timeline.result))
        gaps.append(Gap(now, timeline.makespan_ns, DONE, -1, last))
    return sorted(gaps, key=lambda gap: (gap.start - gap.end, gap.start))


def _gap(timeline: Timeline, order: Order, low: float, high: float, number: int) -> Gap:
    event = timeline.trace.events[number]
    cause = Cause(timeline.cause[number])
    if isinstance(event.work, DmaWork):
        free = dispatched(number, timeline, timeline.trace.spec)
        if float(timeline.start[number]) <= low and free >= high:
            return Gap(low, high, f"{DISPATCH} the transfer itself", number, -1)
        if free < high and number in order.served:
            return Gap(low, high, BANDWIDTH, number, order.served[number])
    other = blocker(timeline, order, number)
    reason = REASONS[cause]
    if cause is Cause.engine and isinstance(event.work, DmaWork):
        reason = f"its trigger stands {reason}"
    return Gap(low, high, reason, number, other)
