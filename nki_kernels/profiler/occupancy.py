"""How full SBUF and PSUM are over time, and what lives at the peak.

A tile occupies its memory from the start of the first event that touches it to the end of the last,
on the modelled time axis; whoever reuses the memory ends it too. (The peaks of the placement count
from allocation to last use in program order, where iterations that overlap in time do not.)
"""

from __future__ import annotations

from collections import Counter, defaultdict
from typing import Literal, NamedTuple

import numpy as np
import numpy.typing as npt

from nki_kernels.hardware.spec import CoreSpec
from nki_kernels.machine.placement import Placement
from nki_kernels.machine.timeline import Timeline
from nki_kernels.machine.trace import Tile, Trace
from nki_kernels.profiler.lines import Sites

OnChip = Literal["sbuf", "psum"]


class Curve(NamedTuple):
    """Memory in use as steps: `used[i]` holds from `times[i]` (ns) to the next time.

    `used` counts bytes per partition (SBUF) or banks (PSUM); `capacity` is what a kernel may use.
    """

    core: int
    memory: OnChip
    unit: str
    capacity: int
    times: npt.NDArray[np.float64]
    used: npt.NDArray[np.int64]

    @property
    def peak(self) -> int:
        """The largest value of the curve."""
        return int(self.used.max(initial=0))

    @property
    def peak_ns(self) -> float:
        """When it is reached first."""
        return float(self.times[int(np.argmax(self.used))]) if len(self.times) else 0.0


class Resident(NamedTuple):
    """Like tiles alive at the peak: one allocation line, one shape, so many of them.

    `each` counts the unit of the curve; tiles of one `fixed` address may share their memory.
    """

    tiles: int
    each: int
    name: str
    shape: tuple[int, ...]
    dtype: str
    place: int
    fixed: bool


def size_of(tile: Tile, spec: CoreSpec) -> int:
    """Return the bytes per partition (SBUF) or banks (PSUM) a tile occupies."""
    return tile.row_bytes if tile.memory == "sbuf" else -(-tile.row_bytes // spec.psum_bank_bytes)


def tile_spans(timeline: Timeline, placement: Placement) -> dict[int, tuple[float, float]]:
    """Return when each tile occupies its memory, in ns, by tile id; unused tiles are left out."""
    spans: dict[int, tuple[float, float]] = {}
    ends = np.maximum(timeline.service_end, timeline.issue)
    for number, event in enumerate(timeline.trace.events):
        start = float(timeline.start[number])
        for accesses, end in ((event.reads, ends[number]), (event.writes, timeline.result[number])):
            for access in accesses:
                low, high = spans.get(access.tile.id, (start, 0.0))
                spans[access.tile.id] = (min(low, start), max(high, float(end)))
    for tile, before in placement.predecessors.items():
        # The reader lets go of its operand before it ends, and the next tile may start there.
        for other in before:
            if tile in spans and other in spans:
                low, high = spans[other]
                spans[other] = (low, max(low, min(high, spans[tile][0])))
    return spans


def curves(timeline: Timeline, spans: dict[int, tuple[float, float]]) -> list[Curve]:
    """Return the occupancy of SBUF and PSUM of every core over time."""
    trace, spec = timeline.trace, timeline.trace.spec
    steps: dict[tuple[int, OnChip], list[tuple[float, int]]] = defaultdict(list)
    shared: dict[tuple[int, OnChip, tuple[int, int], int], list[tuple[float, float]]] = {}
    for tile in trace.tiles:
        if tile.memory == "hbm" or tile.id not in spans:
            continue
        size = size_of(tile, spec)
        if tile.address is not None:
            # Tiles at one fixed address are one piece of memory.
            key = tile.core, tile.memory, tile.address, size
            shared.setdefault(key, []).append(spans[tile.id])
            continue
        low, high = spans[tile.id]
        steps[tile.core, tile.memory] += [(low, size), (high, -size)]
    for (core, memory, _, size), lives in shared.items():
        for low, high in _merged(lives):
            steps[core, memory] += [(low, size), (high, -size)]
    return [_curve(core, memory, steps[core, memory], spec) for core, memory in sorted(steps)]


def _merged(spans: list[tuple[float, float]]) -> list[tuple[float, float]]:
    found: list[tuple[float, float]] = []
    for low, high in sorted(spans):
        if found and low <= found[-1][1]:
            found[-1] = (found[-1][0], max(high, found[-1][1]))
        else:
            found.append((low, high))
    return found


def _curve(core: int, memory: OnChip, steps: list[tuple[float, int]], spec: CoreSpec) -> Curve:
    moments = np.array([t for t, _ in steps])
    changes = np.array([c for _, c in steps], np.int64)
    times, index = np.unique(moments, return_inverse=True)
    delta = np.zeros(len(times), np.int64)
    np.add.at(delta, index.reshape(-1), changes)
    unit, capacity = "B/partition", spec.sbuf_usable_bytes
    if memory == "psum":
        unit, capacity = "banks", spec.psum_banks
    return Curve(core, memory, unit, capacity, times, np.cumsum(delta))


def residents(
    trace: Trace, curve: Curve, spans: dict[int, tuple[float, float]], sites: Sites
) -> list[Resident]:
    """Return the tiles alive at the (first) peak of a curve, the largest groups first."""
    groups: Counter[Resident] = Counter()
    now = curve.peak_ns
    for tile in trace.tiles:
        low, high = spans.get(tile.id, (0.0, 0.0))
        if tile.memory == curve.memory and tile.core == curve.core and low <= now < high:
            given = "" if tile.name == f"t{tile.id}" else tile.name
            key = Resident(
                1, size_of(tile, trace.spec), given, tile.shape, tile.dtype,
                sites.place(tile.site), tile.address is not None,
            )  # fmt: skip
            groups[key] += 1
    found = [group._replace(tiles=count) for group, count in groups.items()]
    return sorted(found, key=lambda r: (-r.tiles * r.each, r.place, r.name))
