"""The timeline in the JSON trace event format, which Perfetto's UI and chrome://tracing open.

One process per core, one thread per lane (`lanes`), complete events ("X") in microseconds, counters
("C") for the memory in use, and a flow arrow ("s", "f") from what the longest idle gaps of the
busiest engine waited for to the event that ended them.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from nki_kernels.machine.timeline import Cause
from nki_kernels.machine.trace import DmaWork
from nki_kernels.profiler.lanes import Lane, lanes
from nki_kernels.profiler.record import thinned

if TYPE_CHECKING:
    from nki_kernels.profiler.session import Profile

_POINTS = 20_000
_FLOWS = 200


def perfetto(profile: Profile) -> dict[str, Any]:
    """Return the trace as data ready for JSON."""
    found = lanes(profile.timeline)
    threads = {id(lane): number for number, lane in enumerate(found, 1)}
    events: list[dict[str, Any]] = []
    for core in sorted({lane.core for lane in found}):
        events.append(_meta("process_name", core, 0, name=f"core {core}"))
    for lane in found:
        thread = threads[id(lane)]
        events.append(_meta("thread_name", lane.core, thread, name=_title(lane)))
        events.append(_meta("thread_sort_index", lane.core, thread, sort_index=thread))
        events += _boxes(profile, lane, thread)
    events += _counters(profile)
    events += _flows(profile, found, threads)
    return {
        "displayTimeUnit": "ns",
        "otherData": {
            "kernel": profile.trace.kernel,
            "target": profile.trace.spec.name,
            "source": profile.label,
            "launch_us": profile.timeline.launch_ns / 1e3,
        },
        "traceEvents": events,
    }


def _title(lane: Lane) -> str:
    return {"engine": "{}", "trigger": "DMA triggers of {}", "payload": "DMA {}"}[lane.kind].format(
        lane.name
    )


def _meta(kind: str, core: int, thread: int, **args: Any) -> dict[str, Any]:
    return {"ph": "M", "name": kind, "pid": core, "tid": thread, "args": args}


def _boxes(profile: Profile, lane: Lane, thread: int) -> Iterator[dict[str, Any]]:
    sites, timeline = profile.case.sites, profile.timeline
    for number, start, end in zip(lane.events, lane.starts, lane.ends, strict=True):
        event = profile.trace.events[number]
        frame = sites.frames[sites.innermost[number]]
        args: dict[str, Any] = {
            "event": number,
            "line": f"{frame.file}:{frame.line}",
            "text": frame.text,
            "waited": Cause(timeline.cause[number]).name,
            "result_us": float(timeline.result[number]) / 1e3,
        }
        if int(timeline.cause_event[number]) >= 0:
            args["waited_for"] = int(timeline.cause_event[number])
        if isinstance(event.work, DmaWork):
            args["bytes"] = event.work.nbytes
        yield {
            "ph": "X",
            "name": event.opcode,
            "cat": lane.kind,
            "pid": lane.core,
            "tid": thread,
            "ts": start / 1e3,
            "dur": (end - start) / 1e3,
            "args": args,
        }


def _counters(profile: Profile) -> Iterator[dict[str, Any]]:
    for curve in profile.curves:
        for time, used in zip(*thinned(curve, _POINTS), strict=True):
            yield {
                "ph": "C",
                "name": f"{curve.memory.upper()} {curve.unit}",
                "pid": curve.core,
                "ts": time / 1e3,
                "args": {"used": used},
            }


def _flows(
    profile: Profile, found: list[Lane], threads: dict[int, int]
) -> Iterator[dict[str, Any]]:
    """Yield the two ends of an arrow per gap, each inside the box it binds to."""
    wanted = {n for g in profile.gaps[:_FLOWS] for n in (g.event, g.waited_for) if n >= 0}
    boxes: dict[int, tuple[Lane, float]] = {}
    for lane in found:
        for number, start, end in zip(lane.events, lane.starts, lane.ends, strict=True):
            if number in wanted:
                boxes[number] = lane, (start + end) / 2
    for flow, gap in enumerate(profile.gaps[:_FLOWS], 1):
        if gap.waited_for not in boxes or gap.event not in boxes:
            continue
        for phase, number in (("s", gap.waited_for), ("f", gap.event)):
            lane, middle = boxes[number]
            yield {
                "ph": phase,
                "bp": "e",
                "id": flow,
                "name": "idle until",
                "cat": "gap",
                "pid": lane.core,
                "tid": threads[id(lane)],
                "ts": middle / 1e3,
            }
