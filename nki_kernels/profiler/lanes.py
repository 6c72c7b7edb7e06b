"""The timeline as lanes of boxes that do not overlap: what Perfetto and the page draw.

Per core: a lane per engine with its instructions and one per queue with its DMA triggers, and as
many as it takes for what overlaps: DMA payloads, and matmuls on tiles of the Tensor engine's array.
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
        name: of the engine or of the triggering queue, with a number from the second lane on; of
            payloads the number alone.
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


def lanes(timeline: Timeline) -> list[Lane]:
    """Return the lanes of a timeline, by core, engines first, then triggers, then payloads."""
    start, issue = timeline.start.tolist(), timeline.issue.tolist()
    service, end = timeline.service.tolist(), timeline.service_end.tolist()
    groups: dict[tuple[int, str, str], list[int]] = {}
    for number, event in enumerate(timeline.trace.events):
        if isinstance(event.work, DmaWork):
            groups.setdefault((event.core, "trigger", event.work.queue.name), []).append(number)
            groups.setdefault((event.core, "payload", ""), []).append(number)
        else:
            groups.setdefault((event.core, "engine", event.engine.name), []).append(number)
    ranks = {engine.name: rank for rank, engine in enumerate(ORDER)}
    kinds = {"engine": 0, "trigger": 1, "payload": 2}
    found: list[Lane] = []
    for key in sorted(groups, key=lambda k: (k[0], kinds[k[1]], ranks.get(k[2], len(ranks)))):
        times = (service, end) if key[1] == "payload" else (start, issue)
        found += _packed(*key, groups[key], *times)
    return found


def _packed(
    core: int, kind: str, name: str, numbers: list[int], starts: list[float], ends: list[float]
) -> list[Lane]:
    """Put each box into the first lane that is free; most engines need no second one."""
    packed: list[Lane] = []
    busy: list[tuple[float, int]] = []
    free: list[int] = []
    for number in sorted(numbers, key=lambda n: (starts[n], n)):
        while busy and busy[0][0] <= starts[number]:
            heapq.heappush(free, heapq.heappop(busy)[1])
        if not free:
            words = [name] if name else []
            words += [str(len(packed) + 1)] if packed or not name else []
            packed.append(Lane(core, kind, " ".join(words)))
            free.append(len(packed) - 1)
        at = heapq.heappop(free)
        packed[at].events.append(number)
        packed[at].starts.append(starts[number])
        packed[at].ends.append(max(starts[number], ends[number]))
        heapq.heappush(busy, (packed[at].ends[-1], at))
    return packed
