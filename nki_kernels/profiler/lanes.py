"""The timeline as lanes of boxes that do not overlap: what Perfetto and the page draw.

Per core: one lane per engine with its instructions, one per queue with its DMA triggers, and as
many as it takes for the payloads, which overlap.
"""

from __future__ import annotations

import heapq
from dataclasses import dataclass, field

from nki_kernels.hardware.spec import Engine
from nki_kernels.machine.timeline import Timeline
from nki_kernels.machine.trace import DmaWork

#: The order in which a page shows engines.
ORDER = (Engine.tensor, Engine.vector, Engine.scalar, Engine.gpsimd, Engine.sync)


@dataclass(slots=True)
class Lane:
    """Boxes in order of time.

    Attributes:
        core: the core.
        kind: "engine", "trigger" or "payload".
        name: of the engine, of the triggering queue, or the number of the payload lane.
        events: event of each box.
        starts: start of each box, ns.
        ends: end of each box, ns; never beyond the next start.
    """

    core: int
    kind: str
    name: str
    events: list[int] = field(default_factory=list)
    starts: list[float] = field(default_factory=list)
    ends: list[float] = field(default_factory=list)

    def add(self, event: int, start: float, end: float) -> None:
        """Append a box; one that starts before the last ended is cut to what is left of it."""
        start = max(start, self.ends[-1]) if self.ends else start
        self.events.append(event)
        self.starts.append(start)
        self.ends.append(max(start, end))


def lanes(timeline: Timeline) -> list[Lane]:
    """Return the lanes of a timeline, by core, engines first, then triggers, then payloads."""
    start, issue = timeline.start.tolist(), timeline.issue.tolist()
    service, end = timeline.service.tolist(), timeline.service_end.tolist()
    found: dict[tuple[int, str, str], Lane] = {}
    payloads: dict[int, list[int]] = {}
    for number in sorted(range(len(start)), key=lambda n: (start[n], n)):
        event = timeline.trace.events[number]
        if isinstance(event.work, DmaWork):
            key = event.core, "trigger", event.work.queue.name
            payloads.setdefault(event.core, []).append(number)
        else:
            key = event.core, "engine", event.engine.name
        lane = found.get(key)
        if lane is None:
            lane = found[key] = Lane(*key)
        lane.add(number, start[number], issue[number])
    ranks = {engine.name: rank for rank, engine in enumerate(ORDER)}
    kinds = {"engine": 0, "trigger": 1}
    result = sorted(found.values(), key=lambda x: (x.core, kinds[x.kind], ranks.get(x.name, 9)))
    for core, numbers in sorted(payloads.items()):
        numbers.sort(key=lambda n: (service[n], n))
        result += _packed(core, numbers, service, end)
    return sorted(result, key=lambda lane: lane.core)


def _packed(core: int, numbers: list[int], starts: list[float], ends: list[float]) -> list[Lane]:
    """Put each payload into the first lane that is free."""
    packed: list[Lane] = []
    busy: list[tuple[float, int]] = []
    free: list[int] = []
    for number in numbers:
        while busy and busy[0][0] <= starts[number]:
            heapq.heappush(free, heapq.heappop(busy)[1])
        if not free:
            packed.append(Lane(core, "payload", str(len(packed))))
            free.append(len(packed) - 1)
        at = heapq.heappop(free)
        packed[at].add(number, starts[number], ends[number])
        heapq.heappush(busy, (ends[number], at))
    return packed
