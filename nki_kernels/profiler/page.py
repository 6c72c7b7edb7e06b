"""One self-contained page of a profile: no request leaves it, and it opens from a file.

The figures go in as JSON, the instructions as columns of 32-bit integers: differences, byte planes,
deflate, base64, which takes 6 to 10 bytes an instruction. The page's own code is in `web/`.
"""

from __future__ import annotations

import base64
import html
import json
import zlib
from collections.abc import Iterable
from importlib.resources import files
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from nki_kernels.machine.timeline import Cause
from nki_kernels.machine.trace import Access, DmaWork, Event, StreamWork
from nki_kernels.profiler.gaps import REASONS
from nki_kernels.profiler.lanes import Lane, lanes
from nki_kernels.profiler.lines import Line, source_of
from nki_kernels.profiler.path import Part, blocker
from nki_kernels.profiler.record import record, thinned
from nki_kernels.profiler.summary import peak_flops_per_ns

if TYPE_CHECKING:
    from nki_kernels.profiler.session import Profile

#: Resolution of a time on the page; coarser where 32 bits would not reach.
_TICK_NS = 0.05
_CURVE_POINTS = 20_000
#: Lines of source shown around one that costs something.
_AROUND = 25
_GAPS = 100


def page(profile: Profile) -> str:
    """Return the page as text."""
    columns = _Columns()
    meta = _meta(profile, columns)
    title = html.escape(f"{profile.trace.kernel} on {profile.trace.spec.name}")
    parts = {
        "TITLE": title,
        "CSS": _asset("page.css"),
        "META": _script_json(meta),
        "COLUMNS": columns.packed(),
        "JS": "\n".join(_asset(name) for name in ("data.js", "timeline.js", "page.js")),
    }
    text = _asset("page.html")
    for name, part in parts.items():
        text = text.replace(f"{{{{{name}}}}}", part, 1)
    return text


def _asset(name: str) -> str:
    return files("nki_kernels.profiler").joinpath("web", name).read_text(encoding="utf-8")


def _script_json(data: object) -> str:
    """Return JSON that is safe inside a script element."""
    text = json.dumps(data, separators=(",", ":"))
    return text.replace("<", "\\u003c").replace("\u2028", "\\u2028").replace("\u2029", "\\u2029")


class _Columns:
    """Columns of unsigned 32-bit integers, packed one after the other."""

    def __init__(self) -> None:
        self._parts: list[bytes] = []
        self.index: list[tuple[str, int]] = []

    def add(self, name: str, values: Iterable[int] | npt.NDArray[Any]) -> None:
        """Append a column: stored as differences (modulo 2**32), lowest bytes first."""
        array = np.asarray(values if isinstance(values, np.ndarray) else list(values), np.int64)
        step = np.diff(array, prepend=0).astype(np.uint32)
        planes = step.astype("<u4").view(np.uint8).reshape(-1, 4).T
        self._parts.append(planes.tobytes())
        self.index.append((name, len(array)))

    def packed(self) -> str:
        """Return all columns, compressed, as text."""
        return base64.b64encode(zlib.compress(b"".join(self._parts), 6)).decode("ascii")


def _meta(profile: Profile, columns: _Columns) -> dict[str, Any]:
    timeline = profile.timeline
    tick = max(_TICK_NS, timeline.makespan_ns / 2**31)
    data = record(profile)
    names = _Names()
    _events(profile, columns, names, tick)
    found = lanes(timeline)
    for number, lane in enumerate(found):
        columns.add(f"lane{number}", lane.events)
    _path(profile, columns, tick)
    data.update(
        tick_ns=tick,
        makespan_us=timeline.makespan_ns / 1e3,
        lanes=[_lane(lane) for lane in found],
        opcodes=names.opcodes,
        details=names.details,
        causes=[REASONS[cause] for cause in Cause],
        parts=[part.name for part in Part],
        places=[
            {"file": f.file, "line": f.line, "function": f.function, "text": f.text}
            for f in profile.case.sites.frames
        ],
        stacks=[list(stack) for stack in profile.case.sites.stacks],
        sources=_sources(profile.lines),
        curves=_curves(profile),
        page_gaps=[
            [gap.start / 1e3, gap.end / 1e3, gap.reason, gap.event, gap.waited_for]
            for gap in profile.gaps[:_GAPS]
        ],
        advice_events=[list(advice.events[:1]) for advice in profile.advice],
        advice_places=[list(advice.places) for advice in profile.advice],
        roofline=_roofline(profile),
        columns=columns.index,
    )
    return data


class _Names:
    """Dictionaries of what repeats."""

    def __init__(self) -> None:
        self.opcodes: list[tuple[str, str]] = []
        self.details: list[str] = []
        self._opcode: dict[tuple[str, str], int] = {}
        self._detail: dict[tuple[Any, ...], int] = {}

    def opcode(self, event: Event) -> int:
        """Return the number of an (engine, opcode) pair."""
        key = event.engine.name, event.opcode
        if key not in self._opcode:
            self._opcode[key] = len(self.opcodes)
            self.opcodes.append(key)
        return self._opcode[key]

    def detail(self, event: Event) -> int:
        """Return the number of the description of an event's operands."""
        function = event.work.function if isinstance(event.work, StreamWork) else ""
        queue = ""
        if isinstance(event.work, DmaWork):
            queue = f"{event.work.queue.name}, {event.work.mode}"
        key = (
            function, queue,
            *[(a.tile.memory, a.tile.dtype, a.shape, a.tile.role) for a in event.writes], None,
            *[(a.tile.memory, a.tile.dtype, a.shape, a.tile.role) for a in event.reads],
        )  # fmt: skip
        if key not in self._detail:
            self._detail[key] = len(self.details)
            words = [f"{function} ", f"[queue {queue}] "]
            head = (words[0] if function else "") + (words[1] if queue else "")
            sides = [", ".join(_operand(a) for a in side) for side in (event.writes, event.reads)]
            self.details.append(f"{head}{sides[0]} \u2190 {sides[1]}" if any(sides) else head)
        return self._detail[key]


def _operand(access: Access) -> str:
    tile = access.tile
    name = tile.name if tile.memory == "hbm" else ""
    shape = "\u00d7".join(map(str, access.shape)) or "1"
    return f"{tile.memory.upper()} {name}[{shape}] {tile.dtype}"


def _events(profile: Profile, columns: _Columns, names: _Names, tick: float) -> None:
    timeline, events = profile.timeline, profile.trace.events

    def ticks(moments: npt.NDArray[np.float64]) -> npt.NDArray[np.int64]:
        return np.rint(moments / tick).astype(np.int64)

    start = ticks(timeline.start)
    columns.add("start", start)
    for name in ("issue", "service", "service_end", "result"):
        columns.add(name, ticks(getattr(timeline, name)) - start)
    columns.add("cause", timeline.cause.astype(np.int64))
    numbers = range(len(events))
    waited = np.array(
        [blocker(timeline, profile.case.order, number) for number in numbers], np.int64
    )
    columns.add("back", np.where(waited >= 0, np.arange(len(events)) - waited, 0))
    columns.add("opcode", [names.opcode(event) for event in events])
    columns.add("detail", [names.detail(event) for event in events])
    columns.add("stack", profile.case.sites.stack_of)
    columns.add("core", [event.core for event in events])
    columns.add("bytes", [e.work.nbytes if isinstance(e.work, DmaWork) else 0 for e in events])


def _path(profile: Profile, columns: _Columns, tick: float) -> None:
    pieces = [p for p in reversed(profile.case.path.pieces) if p.event >= 0]
    columns.add("path_event", [piece.event for piece in pieces])
    columns.add("path_part", [int(piece.part) for piece in pieces])
    columns.add("path_start", [round(piece.start / tick) for piece in pieces])
    columns.add("path_end", [round(piece.end / tick) for piece in pieces])


def _lane(lane: Lane) -> dict[str, Any]:
    return {"core": lane.core, "kind": lane.kind, "name": lane.name}


def _curves(profile: Profile) -> list[dict[str, Any]]:
    found = []
    for curve in profile.curves:
        times, used = thinned(curve, _CURVE_POINTS)
        found.append(
            {
                "core": curve.core, "memory": curve.memory, "unit": curve.unit,
                "capacity": curve.capacity, "times": [round(t / 1e3, 5) for t in times],
                "used": used,
            }
        )  # fmt: skip
    return found


def _sources(lines: list[Line]) -> list[dict[str, Any]]:
    """Return the neighbourhood of every line that costs something, by file, dearest file first."""
    by_file: dict[str, dict[int, Line]] = {}
    for line in lines:
        by_file.setdefault(line.file, {})[line.line] = line
    texts = source_of(lines)
    found = []
    for file, known in by_file.items():
        rows = texts.get(file) or [
            known[n].text if n in known else "" for n in range(1, max(known) + 1)
        ]
        near = {
            n for at in known for n in range(at - _AROUND, at + _AROUND + 1) if 1 <= n <= len(rows)
        }
        found.append(
            {
                "file": file,
                "path_us": sum(line.path_ns for line in known.values()) / 1e3,
                "rows": [[n, rows[n - 1]] for n in sorted(near)],
            }
        )
    return sorted(found, key=lambda source: (-float(source["path_us"]), str(source["file"])))


def _roofline(profile: Profile) -> dict[str, float]:
    """Return the two roofs and the kernel's point (TFLOP/s, FLOPs per HBM byte)."""
    spec, timeline = profile.trace.spec, profile.timeline
    summary = profile.summary()
    flops = summary["hardware_flops"] - summary["transpose_flops"]
    moved = timeline.hbm_read_bytes + timeline.hbm_write_bytes
    return {
        "peak_tflops": peak_flops_per_ns(spec, profile.trace.lnc) / 1e3,
        "hbm_gb_s": spec.hbm_bytes_per_ns * profile.trace.lnc,
        "intensity": float(summary["mm_arithmetic_intensity"]),
        "tflops": flops / timeline.total_ns / 1e3,
        "gb_s": moved / timeline.total_ns,
    }
