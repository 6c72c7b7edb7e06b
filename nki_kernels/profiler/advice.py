"""What to change first: performance faults by name, with the kernel lines and the time at stake.

Each rule looks for one fault. The time at stake is what the fault itself takes: removing it saves
less where something else limits as well, and more where others waited for it. Advice below its
threshold is not given, so that a good kernel is not accused of its small change. AWS's
own thresholds are used where it published one: a compute engine active 90 % or memory bandwidth
used to 60 % is good, transfers of 32 KiB and contiguous runs of 512 B, transposes above 10 % of the
hardware FLOPs, spill reloads above 25 % of the HBM reads (NKI performance guide, Neuron Explorer).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import numpy.typing as npt

from nki_kernels.hardware.spec import Engine
from nki_kernels.machine.timeline import Timeline
from nki_kernels.machine.trace import Event
from nki_kernels.profiler.lines import Sites, event_ns
from nki_kernels.profiler.path import CriticalPath, Order, Part

GOOD_ACTIVE_PERCENT = 90.0
GOOD_MBU_PERCENT = 60.0
GOOD_TRANSFER_BYTES = 32 * 1024
GOOD_RUN_BYTES = 512
TRANSPOSE_PERCENT = 10.0
SPILL_PERCENT = 25.0
#: Ours: less than this share of the total time is not worth a word.
SMALL_PERCENT = 5.0
#: Ours: a resource with less than this share of the critical path holds nothing up.
ON_PATH_PERCENT = 10.0


@dataclass(frozen=True, slots=True)
class Advice:
    """One performance fault.

    Attributes:
        name: the fault's name, stable; what a test or a script looks for.
        text: what is, with values, and what to do.
        at_stake_ns: what the fault itself takes.
        at_stake_percent: the same in percent of the total time.
        events: events that show it, the first of them for a click.
        places: the kernel lines concerned, most concerned first (indices of `Sites.frames`).
    """

    name: str
    text: str
    at_stake_ns: float
    at_stake_percent: float
    events: tuple[int, ...] = ()
    places: tuple[int, ...] = ()


@dataclass
class Case:
    """A timed run and what the rules need to know about it."""

    timeline: Timeline
    sites: Sites
    order: Order
    path: CriticalPath

    @property
    def events(self) -> list[Event]:
        """The events of the trace."""
        return self.timeline.trace.events

    @cached_property
    def spent(self) -> npt.NDArray[np.float64]:
        """Per event, how long it occupies its engine."""
        return event_ns(self.timeline)

    @cached_property
    def on_path(self) -> dict[Engine, float]:
        """Time of the critical path by the engine whose event is on it."""
        found = dict.fromkeys(Engine, 0.0)
        for event, ns in zip(self.events, self.path.event_ns, strict=True):
            found[event.engine] += float(ns)
        return found

    def percent(self, ns: float) -> float:
        """Return a time in percent of the total."""
        return 100.0 * ns / self.timeline.total_ns

    @property
    def idle_ns(self) -> float:
        """Idle time of the busiest engine: no wait that is removed can save more."""
        return self.timeline.makespan_ns - max(self.timeline.busy_ns.values())

    def matters(self, *engines: Engine) -> bool:
        """Return True if the engines together hold a worthwhile share of the critical path."""
        return self.percent(sum(self.on_path[e] for e in engines)) >= ON_PATH_PERCENT

    def exposed(self, parts: Iterable[Part]) -> float:
        """Return the time of the critical path spent on these parts."""
        return sum(self.path.part_ns[part] for part in parts)

    def lines(self, events: Iterable[int], most: int = 3) -> tuple[int, ...]:
        """Return the places that most of the events come from."""
        counts = Counter(int(self.sites.innermost[n]) for n in events)
        return tuple(place for place, _ in counts.most_common(most))

    def at(self, events: Iterable[int]) -> str:
        """Return ``at file:line, line`` of the events, for a message."""
        frames = [self.sites.frames[place] for place in self.lines(events)]
        name = frames[0].file.replace("\\", "/").rpartition("/")[2] if frames else ""
        numbers = [str(frame.line) for frame in frames if frame.file == frames[0].file]
        return f"at {name}:{', '.join(numbers)}" if frames else ""

    def give(self, name: str, text: str, at_stake_ns: float, events: Iterable[int]) -> Advice:
        """Return advice with the lines of its events."""
        found = tuple(events)
        at_stake = min(at_stake_ns, self.timeline.total_ns)
        return Advice(name, text, at_stake, self.percent(at_stake), found, self.lines(found))


Rule = Callable[[Case], Iterator[Advice]]


def advise(case: Case, rules: Iterable[Rule]) -> list[Advice]:
    """Return all advice, the most time at stake first."""
    if not case.events:
        return []
    found = [advice for rule in rules for advice in rule(case)]
    return sorted(found, key=lambda a: (-a.at_stake_ns, a.name))


def verdict(case: Case, mbu_percent: float) -> str:
    """Return one sentence: compute-bound, memory-bound, or what else, by AWS's thresholds."""
    timeline = case.timeline
    name = timeline.limiting_engine
    if name == "none":
        return "The kernel issues no instruction."
    active = 100.0 * timeline.busy_ns[name] / timeline.total_ns
    inside = 100.0 * timeline.busy_ns[name] / timeline.makespan_ns
    what = f"{name} is active {active:.0f} % of the total time"
    if timeline.launch_ns > 0.1 * timeline.total_ns:
        what += f" ({inside:.0f} % between launch and end, which take {timeline.launch_ns:,.0f} ns)"
    if name == "dma" and mbu_percent >= GOOD_MBU_PERCENT:
        return f"Memory-bound: {mbu_percent:.0f} % of the HBM bandwidth; {what}."
    if inside >= GOOD_ACTIVE_PERCENT:
        bound = "Bound by DMA, not by bandwidth" if name == "dma" else "Compute-bound"
        return f"{bound}: {what}."
    return f"Neither compute- nor memory-bound: {what}, and {mbu_percent:.0f} % of HBM bandwidth."
