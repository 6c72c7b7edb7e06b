"""Which kernel line every event comes from, and what each line costs.

A line's own figures count the instructions it issued itself; `total_ns` adds those of the helpers
it called. Engines run side by side, so the engine time of all lines exceeds
the kernel's; `path_ns` is the share of the critical path and adds up to the makespan.
"""

from __future__ import annotations

import linecache
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from nki_kernels.machine.timeline import Timeline
from nki_kernels.machine.trace import DmaWork, Frame, Site, Trace, resolve

#: Where an event was issued outside any kernel line.
_NOWHERE = Frame("", 0, "", "")


@dataclass(slots=True)
class Line:
    """One source line and its cost.

    Attributes:
        file: path of the file.
        line: its number, from 1 (0: outside a kernel).
        function: the function it stands in.
        text: the source text.
        instructions: instructions it issued.
        engine_ns: time by engine name; "dma" is payload time.
        total_ns: engine time with the helpers it called.
        path_ns: time on the critical path.
        nbytes: bytes its DMAs moved.
        hbm_bytes: HBM bytes read and written.
    """

    file: str
    line: int
    function: str
    text: str
    instructions: int = 0
    engine_ns: dict[str, float] = field(default_factory=dict)
    total_ns: float = 0.0
    path_ns: float = 0.0
    nbytes: int = 0
    hbm_bytes: int = 0

    @property
    def self_ns(self) -> float:
        """Engine time of the line's own instructions."""
        return sum(self.engine_ns.values())

    @property
    def place(self) -> str:
        """``file:line`` with the name of the file only."""
        return f"{self.file.replace(chr(92), '/').rpartition('/')[2]}:{self.line}"


class Sites:
    """Frames of the events of a trace, each distinct call site resolved once.

    Attributes:
        frames: distinct (file, line) places.
        innermost: per event, its place in `frames`.
        stacks: per distinct call site, its places, innermost first.
        stack_of: per event, its place in `stacks`.
    """

    def __init__(self, trace: Trace) -> None:
        self.frames: list[Frame] = []
        self.stacks: list[tuple[int, ...]] = []
        self._places: dict[tuple[str, int], int] = {}
        self._known: dict[tuple[int, ...], int] = {}
        self.stack_of = np.fromiter(
            (self._stack(event.site) for event in trace.events), np.int64, len(trace.events)
        )
        first = np.array([stack[0] for stack in self.stacks], np.int64)
        self.innermost: npt.NDArray[np.int64] = (
            first[self.stack_of] if len(first) else np.zeros(0, np.int64)
        )

    def place(self, site: Site) -> int:
        """Return the place of a call site's innermost kernel frame in `frames`."""
        return self.stacks[self._stack(site)][0]

    def _stack(self, site: Site) -> int:
        # Code objects hash by content, which is slow; they live as long as the trace.
        key = tuple([number for code, lasti in site for number in (id(code), lasti)])
        known = self._known.get(key)
        if known is None:
            frames = resolve(site) or (_NOWHERE,)
            self.stacks.append(tuple(self._place(frame) for frame in frames))
            known = self._known[key] = len(self.stacks) - 1
        return known

    def _place(self, frame: Frame) -> int:
        key = frame.file, frame.line
        if key not in self._places:
            self._places[key] = len(self.frames)
            self.frames.append(frame)
        return self._places[key]


def event_ns(timeline: Timeline) -> npt.NDArray[np.float64]:
    """Return how long each event occupies what it runs on: an engine, or the DMA engines."""
    return np.maximum(timeline.service_end - timeline.service, 0.0)


def line_costs(timeline: Timeline, sites: Sites, path_ns: npt.NDArray[np.float64]) -> list[Line]:
    """Return the cost of every line that issued an instruction or called one that did.

    Args:
        timeline: the schedule.
        sites: the call sites of its trace.
        path_ns: per event, its time on the critical path.

    Returns:
        lines, the most critical-path time first.
    """
    lines = [Line(f.file, f.line, f.function, f.text) for f in sites.frames]
    spent = event_ns(timeline)
    for number, event in enumerate(timeline.trace.events):
        line = lines[sites.innermost[number]]
        line.instructions += 1
        name = event.engine.name
        line.engine_ns[name] = line.engine_ns.get(name, 0.0) + float(spent[number])
        line.path_ns += float(path_ns[number])
        if isinstance(event.work, DmaWork):
            line.nbytes += event.work.nbytes
            line.hbm_bytes += event.work.hbm_read_bytes + event.work.hbm_write_bytes
    by_stack = np.bincount(sites.stack_of, weights=spent, minlength=len(sites.stacks))
    for stack, total in zip(sites.stacks, by_stack, strict=True):
        for place in set(stack):
            lines[place].total_ns += float(total)
    return sorted(lines, key=lambda line: (-line.path_ns, -line.total_ns, line.file, line.line))


def source_of(lines: Sequence[Line]) -> dict[str, list[str]]:
    """Return the text of every file the lines stand in, by path; unreadable ones are left out."""
    texts = {line.file: linecache.getlines(line.file) for line in lines if line.line}
    return {file: [row.rstrip("\n") for row in text] for file, text in texts.items() if text}


def opcode_costs(timeline: Timeline) -> list[dict[str, str | int | float]]:
    """Return count and time (us) of each instruction by engine, the most time first."""
    spent = event_ns(timeline)
    counts: Counter[tuple[str, str]] = Counter()
    times: Counter[tuple[str, str]] = Counter()
    for number, event in enumerate(timeline.trace.events):
        key = event.engine.name, event.opcode
        counts[key] += 1
        times[key] += float(spent[number])  # type: ignore[assignment]
    order = sorted(counts, key=lambda key: (-times[key], key))
    return [
        {"engine": key[0], "opcode": key[1], "count": counts[key], "time_us": times[key] / 1e3}
        for key in order
    ]
