"""A profile as plain data: everything but the single instructions, which trace and page have."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from nki_kernels._version import __version__
from nki_kernels.profiler.gaps import busiest
from nki_kernels.profiler.lines import opcode_costs
from nki_kernels.profiler.occupancy import Curve, residents

if TYPE_CHECKING:
    from nki_kernels.profiler.session import Profile

#: Raised whenever a field changes its meaning or goes away.
SCHEMA_VERSION = 1
_GAPS = 20
_POINTS = 500


def record(profile: Profile) -> dict[str, Any]:
    """Return the profile as data ready for JSON; times in microseconds."""
    trace, timeline = profile.trace, profile.timeline
    engine, core = busiest(timeline)
    return {
        "schema_version": SCHEMA_VERSION,
        "nki_kernels": __version__,
        "source": "model",
        "label": profile.label,
        "kernel": trace.kernel,
        "target": trace.spec.name,
        "lnc": trace.lnc,
        "launch_us": timeline.launch_ns / 1e3,
        "verdict": profile.verdict,
        "advice": [
            {
                "name": advice.name,
                "text": advice.text,
                "at_stake_us": advice.at_stake_ns / 1e3,
                "at_stake_percent": advice.at_stake_percent,
                "instructions": len(advice.events),
                "first": advice.events[0] if advice.events else None,
                "lines": [_place(profile, place) for place in advice.places],
            }
            for advice in profile.advice
        ],
        "summary": profile.summary(),
        "busy_us": {name: ns / 1e3 for name, ns in timeline.busy_ns.items()},
        "critical_path_us": {part.name: ns / 1e3 for part, ns in profile.case.path.part_ns.items()},
        "gaps": {
            "engine": engine.name,
            "core": core,
            "count": len(profile.gaps),
            "idle_us": sum(gap.end - gap.start for gap in profile.gaps) / 1e3,
            "longest": [
                {
                    "start_us": gap.start / 1e3,
                    "end_us": gap.end / 1e3,
                    "reason": gap.reason,
                    "ended_by": _event(profile, gap.event),
                    "waited_for": _event(profile, gap.waited_for),
                }
                for gap in profile.gaps[:_GAPS]
            ],
        },
        "lines": [
            {
                "file": line.file,
                "line": line.line,
                "function": line.function,
                "text": line.text,
                "instructions": line.instructions,
                "path_us": line.path_ns / 1e3,
                "self_us": line.self_ns / 1e3,
                "total_us": line.total_ns / 1e3,
                "engine_us": {name: ns / 1e3 for name, ns in line.engine_ns.items()},
                "bytes": line.nbytes,
                "hbm_bytes": line.hbm_bytes,
            }
            for line in profile.lines
        ],
        "instructions": opcode_costs(timeline),
        "memory": [_memory(profile, curve) for curve in profile.curves],
    }


def _place(profile: Profile, place: int) -> dict[str, Any]:
    frame = profile.case.sites.frames[place]
    return {"file": frame.file, "line": frame.line}


def _event(profile: Profile, number: int) -> dict[str, Any] | None:
    if number < 0:
        return None
    event = profile.trace.events[number]
    return {
        "event": number,
        "opcode": event.opcode,
        "engine": event.engine.name,
        **_place(profile, int(profile.case.sites.innermost[number])),
    }


def _memory(profile: Profile, curve: Curve) -> dict[str, Any]:
    times, used = thinned(curve, _POINTS)
    return {
        "core": curve.core,
        "memory": curve.memory,
        "unit": curve.unit,
        "capacity": curve.capacity,
        "peak": curve.peak,
        "peak_us": curve.peak_ns / 1e3,
        "times_us": [time / 1e3 for time in times],
        "used": used,
        "residents": [
            {
                "tiles": tile.tiles,
                "each": tile.each,
                "name": tile.name,
                "shape": list(tile.shape),
                "dtype": tile.dtype,
                "fixed_address": tile.fixed,
                **_place(profile, tile.place),
            }
            for tile in residents(profile.trace, curve, profile.spans, profile.case.sites)
        ],
    }


def thinned(curve: Curve, points: int) -> tuple[list[float], list[int]]:
    """Return a curve of at most `points` steps; each stands for the largest value it replaces."""
    count = len(curve.times)
    if count <= points:
        return curve.times.tolist(), curve.used.tolist()
    starts = np.linspace(0, count, points, endpoint=False).astype(np.int64)
    return curve.times[starts].tolist(), np.maximum.reduceat(curve.used, starts).tolist()
