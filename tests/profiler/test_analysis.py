"""Critical path, idle gaps, lines, occupancy and lanes: sums and orders that always hold.

Random small kernels are drawn as lists of steps; a few whole ones come from the neighbours.
"""

from __future__ import annotations

import math
from itertools import pairwise

import nki.isa as nisa
import nki.language as nl
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import nki_kernels
from nki_kernels.hardware import Engine
from nki_kernels.machine.timeline import Cause
from nki_kernels.profiler import Profile
from nki_kernels.profiler.gaps import DONE, busiest, idle_gaps
from nki_kernels.profiler.lanes import lanes
from nki_kernels.profiler.lines import event_ns, opcode_costs
from nki_kernels.profiler.occupancy import residents
from nki_kernels.profiler.path import Part
from nki_kernels.profiler.record import thinned
from tests.profiler.kernels import empty, exchange, looped, many, two_cores_kernel
from tests.profiler.mlp import mlp

STEPS = ("load", "store", "matmul", "evict", "exp", "add", "gpsimd", "fresh", "square")
ENGINES = tuple(engine for engine in Engine if engine is not Engine.unknown)


def drawn(x, steps, fixed):
    """A kernel made of steps on one current tile and one PSUM tile."""
    out = nl.ndarray(x.shape, dtype=x.dtype, buffer=nl.shared_hbm)
    address = (0, 4096) if fixed else None
    tile = nl.ndarray(x.shape, dtype=x.dtype, buffer=nl.sbuf, address=address)
    bank = nl.ndarray((x.shape[1], x.shape[1]), dtype=nl.float32, buffer=nl.psum)
    nisa.dma_copy(dst=tile, src=x)
    nisa.nc_matmul(dst=bank, stationary=tile, moving=tile, accumulate=False)
    for step in steps:
        if step == "load":
            nisa.dma_copy(dst=tile, src=x)
        elif step == "store":
            nisa.dma_copy(dst=out, src=tile)
        elif step == "matmul":
            nisa.nc_matmul(dst=bank, stationary=tile, moving=tile, accumulate=False)
        elif step == "evict":
            nisa.tensor_copy(dst=tile, src=bank[: x.shape[0], :], engine=nisa.engine.vector)
        elif step in ("exp", "square"):
            nisa.activation(dst=tile, op=getattr(nl, step), data=tile)
        elif step == "add":
            nisa.tensor_tensor(dst=tile, data1=tile, data2=tile, op=nl.add)
        elif step == "gpsimd":
            nisa.tensor_copy(dst=tile, src=tile, engine=nisa.engine.gpsimd)
        else:
            tile = nl.ndarray(x.shape, dtype=x.dtype, buffer=nl.sbuf)
            nisa.memset(dst=tile, value=1.0)
    nisa.dma_copy(dst=out, src=tile)
    return out


def make(steps: list[str], fixed: bool = False) -> Profile:
    x = nki_kernels.Abstract((64, 64), "float32")
    return nki_kernels.profile(drawn, x, steps, fixed, target="trn2")


programs = st.builds(make, st.lists(st.sampled_from(STEPS), max_size=30), st.booleans())


def whole(name: str) -> Profile:
    if name == "many":
        return nki_kernels.profile(
            many, nki_kernels.Abstract((128, 128), "bfloat16"), 50, target="trn2"
        )
    if name == "two cores":
        x = nki_kernels.Abstract((64, 32), "float32")
        return nki_kernels.profile(two_cores_kernel, x, target="trn2", lnc=2)
    if name == "loop":
        return nki_kernels.profile(looped, np.ones((8, 8), np.float32), target="trn2")
    if name == "exchange":
        return nki_kernels.profile(exchange, np.ones((8, 8), np.float32), target="trn2", lnc=2)
    if name == "empty":
        return nki_kernels.profile(empty, np.ones((2, 2), np.float32), target="trn2")
    x, w = (nki_kernels.Abstract(s, "bfloat16") for s in ((1024, 256), (256, 2048)))
    return nki_kernels.profile(mlp, x, w, fault=name, target="trn2")


WHOLE = (
    "many",
    "two cores",
    "loop",
    "exchange",
    "none",
    "serialised loads",
    "bank conflict",
    "reloaded input",
)


def rounding(profile: Profile) -> float:
    """Sums of n float64 times: n roundings of at most half an ulp of the largest each."""
    return len(profile.trace) * 8 * math.ulp(profile.timeline.makespan_ns)


def check_path(profile: Profile) -> None:
    path, makespan = profile.case.path, profile.timeline.makespan_ns
    assert path.pieces[0].end == makespan
    assert path.pieces[-1].start == 0.0
    for later, earlier in pairwise(path.pieces):
        assert later.start == earlier.end
    assert all(piece.end > piece.start for piece in path.pieces)
    assert abs(sum(path.part_ns.values()) - makespan) <= rounding(profile)
    outside = path.part_ns[Part.launch]
    assert abs(float(path.event_ns.sum()) + outside - makespan) <= rounding(profile)
    for piece in path.pieces:
        if piece.event >= 0 and piece.part is not Part.handoff:
            assert piece.start >= profile.timeline.start[piece.event] - 1e-6
            # A payload may hold a server beyond its own end.
            if piece.part is Part.compute:
                timeline, number = profile.timeline, piece.event
                assert piece.end <= max(timeline.result[number], timeline.issue[number]) + 1e-6


def check_gaps(profile: Profile) -> None:
    timeline = profile.timeline
    for core in range(profile.trace.lnc):
        for engine in ENGINES:
            spans = timeline.intervals(engine, core)
            gaps = idle_gaps(timeline, profile.case.order, engine, core)
            pieces = sorted([*spans, *[(gap.start, gap.end) for gap in gaps]])
            if not spans:
                continue
            assert pieces[0][0] == 0.0
            assert pieces[-1][1] == max(timeline.makespan_ns, spans[-1][1])
            for (_, end), (start, _) in pairwise(pieces):
                assert start == end
            lengths = [gap.end - gap.start for gap in gaps]
            assert lengths == sorted(lengths, reverse=True)
            for gap in gaps:
                if gap.reason == DONE:
                    assert gap.event == -1
                    assert timeline.result[gap.waited_for] == timeline.makespan_ns
                else:
                    assert timeline.service[gap.event] == gap.end
                if gap.event >= 0 and gap.waited_for >= 0:
                    assert timeline.start[gap.waited_for] <= gap.end


def check_lines(profile: Profile) -> None:
    lines, timeline = profile.lines, profile.timeline
    assert sum(line.instructions for line in lines) == len(profile.trace)
    spent = float(event_ns(timeline).sum())
    assert abs(sum(line.self_ns for line in lines) - spent) <= rounding(profile)
    assert abs(sum(line.path_ns for line in lines) - profile.case.path.event_ns.sum()) <= (
        rounding(profile)
    )
    moved = timeline.hbm_read_bytes + timeline.hbm_write_bytes
    assert sum(line.hbm_bytes for line in lines) == moved
    for line in lines:
        assert line.total_ns >= line.self_ns - rounding(profile)
    costs = opcode_costs(timeline)
    assert sum(int(cost["count"]) for cost in costs) == len(profile.trace)


def check_occupancy(profile: Profile) -> None:
    spec = profile.trace.spec
    for curve in profile.curves:
        assert np.all(np.diff(curve.times) > 0)
        assert np.all(curve.used >= 0)
        assert curve.used[-1] == 0
        assert curve.peak <= curve.capacity
        assert curve.capacity in (spec.sbuf_usable_bytes, spec.psum_banks)
        found = residents(profile.trace, curve, profile.spans, profile.case.sites)
        if not any(tile.fixed for tile in found):
            assert sum(tile.tiles * tile.each for tile in found) == curve.peak
        times, used = thinned(curve, 5)
        assert len(times) <= 5 or len(curve.times) <= 5
        assert max(used) == curve.peak


def check_lanes(profile: Profile) -> None:
    boxes = {"engine": 0, "trigger": 0, "payload": 0}
    for lane in lanes(profile.timeline):
        boxes[lane.kind] += len(lane.events)
        for start, end, after in zip(
            lane.starts, lane.ends, [*lane.starts[1:], math.inf], strict=True
        ):
            assert start <= end <= after
        starts = profile.timeline.service if lane.kind == "payload" else profile.timeline.start
        ends = profile.timeline.service_end if lane.kind == "payload" else profile.timeline.issue
        assert lane.starts == [starts[n] for n in lane.events]
        assert lane.ends == [ends[n] for n in lane.events]
    assert boxes["engine"] + boxes["trigger"] == len(profile.trace)
    assert boxes["payload"] == boxes["trigger"]


CHECKS = (check_path, check_gaps, check_lines, check_occupancy, check_lanes)


@given(programs)
def test_random_programs(profile):
    for check in CHECKS:
        check(profile)


@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
@pytest.mark.parametrize("name", WHOLE)
def test_whole_kernels(name, check):
    check(whole(name))


def test_the_path_of_a_chain_is_the_chain():
    """Load, square, store: everything waits for what is before it."""
    profile = make(["square"])
    opcodes = [
        (profile.trace.events[p.event].opcode, p.part.name)
        for p in reversed(profile.case.path.pieces)
        if p.part is not Part.handoff
    ]
    assert opcodes == [
        ("dma_copy", "trigger"), ("dma_copy", "transfer"), ("dma_copy", "notify"),
        ("nc_matmul", "compute"), ("activation", "compute"),
        ("dma_copy", "trigger"), ("dma_copy", "transfer"), ("dma_copy", "notify"),
    ]  # fmt: skip


def test_a_gap_names_what_was_waited_for():
    profile = whole("none")
    engine, core = busiest(profile.timeline)
    assert (engine, core) == (Engine.scalar, 0)
    first = profile.gaps[0]
    assert first.start == 0.0
    assert first.reason == "waiting for the result of"
    assert profile.trace.events[first.waited_for].opcode == "nc_matmul"
    assert profile.timeline.cause[first.event] == Cause.result


def test_an_empty_kernel_has_nothing_to_say():
    profile = whole("empty")
    assert (profile.advice, profile.lines, profile.curves) == ([], [], [])
    assert profile.verdict == "The kernel issues no instruction."
    assert profile.case.path.pieces == []
    assert "instructions" in str(profile)
    assert "Idle gaps" not in str(profile)
