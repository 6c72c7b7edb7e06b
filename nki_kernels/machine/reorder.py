"""Program order as a reordering compiler would leave it: a bounded window per queue.

NKI keeps the program's order; the older compiler moves instructions, and kernels written for it
rely on that. A list scheduler passes over the trace: of the next `window` instructions of each
queue that wait for nothing unscheduled, the one that can start first goes next, by the costs of the
instructions alone and without contention, which a compiler does not see either. Addresses stay as
they are: what reuses memory still waits for its last user. Nothing moves across a loop iteration or
a barrier, and instructions that share an accumulator, a mask or a register keep their order.
"""

from __future__ import annotations

from dataclasses import replace

from nki_kernels.hardware.spec import CoreSpec
from nki_kernels.machine.costs import control_ns, dma_timing, pe_timing, stream_timing
from nki_kernels.machine.dependencies import Dependencies, queue_number, split
from nki_kernels.machine.placement import Placement
from nki_kernels.machine.servers import BARRIERS, handoffs
from nki_kernels.machine.trace import ControlWork, DmaWork, Event, PeWork, StreamWork, Trace

#: Hidden state that no order of instructions can spoil: it is reloaded where it is needed.
_RELOADED = frozenset({"act_table", "pe_stationary"})


def reorder(trace: Trace, placement: Placement | None, window: int) -> Trace:
    """Return the trace with its events moved by at most a window.

    Args:
        trace: the events of one launch, in program order.
        placement: addresses, for the waits on reused memory.
        window: how many instructions of a queue the scheduler looks at; below 2 nothing moves.

    Returns:
        a trace with the same events; the events of each core take each other's places.
    """
    if window < 2:
        return trace
    before = _predecessors(trace, placement)
    events = list(trace.events)
    for places in _segments(trace):
        for place, number in zip(places, _moved(trace, places, before, window), strict=True):
            events[place] = trace.events[number]
    return replace(trace, events=events)


def _segments(trace: Trace) -> list[list[int]]:
    """Return the stretches, core by core, that no instruction leaves."""
    stretches: dict[int, list[int]] = {}
    done = []
    for number, event in enumerate(trace.events):
        work = event.work
        if isinstance(work, ControlWork) and work.kind in BARRIERS:
            done.append(stretches.pop(event.core, []))
        else:
            stretches.setdefault(event.core, []).append(number)
    return [places for places in (*done, *stretches.values()) if len(places) > 1]


def _predecessors(trace: Trace, placement: Placement | None) -> list[set[int]]:
    """Return what each event has to come after."""
    edges = Dependencies(trace, placement, ordered=False).edges
    before = [{split(edge)[0] for edge in found} for found in edges]
    last: dict[tuple[int, str], int] = {}
    for number, event in enumerate(trace.events):
        for name in {*event.hidden_reads, *event.hidden_writes} - _RELOADED:
            other = last.get((event.core, name))
            if other is not None:
                before[number].add(other)
            last[event.core, name] = number
    return before


def _moved(trace: Trace, places: list[int], before: list[set[int]], window: int) -> list[int]:
    """Return the events of a stretch in the order the list scheduler gives them."""
    spec, handoff = trace.spec, handoffs(trace.spec)
    queues: dict[int, list[int]] = {}
    for number in places:
        queues.setdefault(queue_number(trace.events[number]), []).append(number)
    inside = set(places)
    waits = {number: before[number] & inside for number in places}
    free = dict.fromkeys(queues, 0.0)
    start: dict[int, float] = {}
    result: dict[int, float] = {}
    for _ in places:
        best: tuple[float, int, int] | None = None
        for queue, waiting in queues.items():
            for number in waiting[:window]:
                ready = free[queue]
                consumer = trace.events[number].engine
                for other in waits[number]:
                    if other not in result:
                        break
                    producer = trace.events[other].engine
                    ready = max(ready, result[other] + handoff[producer][consumer])
                else:
                    if best is None or (ready, number) < best[:2]:
                        best = (ready, number, queue)
                    if ready <= free[queue]:
                        break  # the first that need not wait
        if best is None:
            raise RuntimeError(f"{len(places) - len(start)} events wait for one another")
        ready, number, queue = best
        issue, done = _cost(trace.events[number], spec)
        start[number], result[number] = ready, ready + done
        free[queue] = ready + issue
        queues[queue].remove(number)
    return sorted(places, key=lambda n: (start[n], n))


def _cost(event: Event, spec: CoreSpec) -> tuple[float, float]:
    """Return (queue free, result usable) after the start, alone on the machine."""
    work = event.work
    if isinstance(work, PeWork):
        pe = pe_timing(work, spec, throttled=False)
        return pe.issue, pe.load + pe.result
    if isinstance(work, StreamWork):
        stream = stream_timing(work, event.engine, spec)
        return stream.issue, stream.result
    if isinstance(work, DmaWork):
        dma = dma_timing(work, spec)
        served = dma.turns * max(dma.core, *(held for _, held in dma.engines), 0.0)
        return dma.queue, dma.dispatch + served + dma.latency + dma.notify
    held = control_ns(work, spec)
    return held, held


def window_problem(window: int) -> str:
    """Return what is wrong with a window, or an empty string."""
    if isinstance(window, bool) or not isinstance(window, int) or window < 0:
        return (
            f"reorder window: {window!r}; allowed are 0 (program order) and positive counts of "
            "instructions, 16 to mimic the reordering compiler; pass one of these"
        )
    return ""
