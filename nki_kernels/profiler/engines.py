"""Faults in how the engines are used: tables, PSUM, strides, lanes, collisions, transposes."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import numpy as np

from nki_kernels.hardware.spec import CoreSpec, Engine
from nki_kernels.machine.costs import pe_timing, stream_timing
from nki_kernels.machine.dtypes import as_dtype
from nki_kernels.machine.stream_costs import COPIES
from nki_kernels.machine.timeline import Cause
from nki_kernels.machine.trace import ControlWork, DmaWork, Event, PeWork, StreamWork
from nki_kernels.profiler.advice import (
    ON_PATH_PERCENT,
    SMALL_PERCENT,
    TRANSPOSE_PERCENT,
    Advice,
    Case,
)
from nki_kernels.profiler.path import blocker

_EVICTING = (Engine.vector, Engine.scalar)


def table_switches(case: Case) -> Iterator[Advice]:
    """Activation tables loaded more often than there are sets of functions."""
    scalar = case.timeline.trace.spec.scalar
    set_of = {f: str(i) for i, s in enumerate(scalar.table_sets) for f in s}
    loaded: dict[int, str] = {}
    seen: set[tuple[int, str]] = set()
    again: list[int] = []
    for number, event in enumerate(case.events):
        work = event.work
        if not isinstance(work, StreamWork) or "act_table" not in event.hidden_reads:
            continue
        if work.function in COPIES:
            continue
        wanted = set_of.get(work.function, work.function)
        if loaded.get(event.core) == wanted:
            continue
        loaded[event.core] = wanted
        if (event.core, wanted) in seen:
            again.append(number)
        seen.add((event.core, wanted))
    at_stake = len(again) * scalar.table_load_ns
    if case.percent(at_stake) < SMALL_PERCENT or not case.matters(Engine.scalar):
        return
    functions = {w.function for w in (case.events[n].work for n in again)
                 if isinstance(w, StreamWork)}  # fmt: skip
    yield case.give(
        "table switches",
        f"Scalar loads an activation table {len(again)} times more than it has to "
        f"({scalar.table_load_ns:,.0f} ns each), switching to {', '.join(sorted(functions))} "
        f"{case.at(again)}; do all of one function before the next",
        at_stake,
        again,
    )


def eviction(case: Case) -> Iterator[Advice]:
    """PSUM emptied by one engine while another that could do it is idle."""
    evicting: dict[Engine, list[int]] = {engine: [] for engine in _EVICTING}
    for number, event in enumerate(case.events):
        if event.engine in evicting and _reads(event, "psum") and not _writes(event, "psum"):
            evicting[event.engine].append(number)
    spent = {e: float(sum(case.spent[n] for n in evicting[e])) for e in _EVICTING}
    total = sum(spent.values())
    busy = case.timeline.busy_ns
    for engine, other in zip(_EVICTING, reversed(_EVICTING), strict=True):
        unequal = (busy[engine.name] - busy[other.name]) / 2
        at_stake = min(unequal, spent[engine] / 2)
        alone = spent[engine] >= 0.9 * total and busy[other.name] < 0.6 * busy[engine.name]
        if alone and case.percent(at_stake) >= SMALL_PERCENT and case.matters(engine):
            yield case.give(
                "eviction on one engine",
                f"{engine.name} alone empties PSUM, {len(evicting[engine])} times "
                f"{case.at(evicting[engine])}, and is active {case.percent(busy[engine.name]):.0f} "
                f"% of the time, {other.name} {case.percent(busy[other.name]):.0f} %; let "
                f"{other.name} evict its share",
                at_stake,
                evicting[engine],
            )


def strided_operands(case: Case) -> Iterator[Advice]:
    """Operands whose innermost step slows an instruction down."""
    spec = case.timeline.trace.spec
    extra: dict[Engine, float] = defaultdict(float)
    slow: dict[Engine, list[int]] = defaultdict(list)
    for number, event in enumerate(case.events):
        lost = _stride_cost(event, spec)
        if lost > 0.0:
            extra[event.engine] += lost
            slow[event.engine].append(number)
    for engine, at_stake in extra.items():
        if case.percent(at_stake) >= SMALL_PERCENT and case.matters(engine):
            yield case.give(
                "strided operand",
                f"{len(slow[engine])} instructions of {engine.name} {case.at(slow[engine])} step "
                f"more than {_free_step(engine, spec)} B between neighbouring elements and run at "
                "a fraction of the rate; make the innermost dimension contiguous",
                at_stake,
                slow[engine],
            )


def _free_step(engine: Engine, spec: CoreSpec) -> int:
    if engine is Engine.tensor:
        return spec.pe.free_step_bytes
    part = {Engine.scalar: spec.scalar, Engine.gpsimd: spec.gpsimd}
    return part.get(engine, spec.vector).free_step_bytes


def _stride_cost(event: Event, spec: CoreSpec) -> float:
    """Return what the strides of an instruction cost, in ns."""
    work = event.work
    if isinstance(work, PeWork):
        free = spec.pe.free_step_bytes
        steps = (work.moving_step_bytes, work.stationary_step_bytes)
        if all(abs(step) <= free for step in steps):
            return 0.0
        straight = replace(work, moving_step_bytes=1, stationary_step_bytes=1)
        now, then = (pe_timing(w, spec, False) for w in (work, straight))
        return now.issue - then.issue
    if not isinstance(work, StreamWork):
        return 0.0
    free = _free_step(event.engine, spec)
    if all(abs(step) <= free for _, _, step in (*work.sources, work.dst)):
        return 0.0
    even = replace(
        work,
        sources=tuple(_contiguous(operand) for operand in work.sources),
        dst=_contiguous(work.dst),
    )
    return stream_timing(work, event.engine, spec).issue - (
        stream_timing(even, event.engine, spec).issue
    )


def _contiguous(operand: tuple[str, Any, int]) -> tuple[str, Any, int]:
    dtype, memory, _ = operand
    return dtype, memory, as_dtype(dtype).itemsize


def unused_partitions(case: Case) -> Iterator[Advice]:
    """Instructions on the critical path that leave lanes of their engine idle."""
    spec = case.timeline.trace.spec
    lost: dict[Engine, float] = defaultdict(float)
    narrow: dict[Engine, list[int]] = defaultdict(list)
    for number, event in enumerate(case.events):
        share = _lanes(event, spec)
        if share < 1.0 and case.path.event_ns[number] > 0.0:
            lost[event.engine] += float(case.path.event_ns[number]) * (1.0 - share)
            narrow[event.engine].append(number)
    for engine, at_stake in lost.items():
        if case.percent(at_stake) < 2 * ON_PATH_PERCENT:
            continue
        what = "rows of the array" if engine is Engine.tensor else "partitions"
        used = 100.0 * (1.0 - at_stake / max(case.on_path[engine], at_stake))
        yield case.give(
            "unused partitions",
            f"{len(narrow[engine])} instructions of {engine.name} on the critical path "
            f"{case.at(narrow[engine])} use {used:.0f} % of the {what}; give them all "
            f"{spec.partitions}",
            at_stake,
            narrow[engine],
        )


def _lanes(event: Event, spec: CoreSpec) -> float:
    """Return the share of an engine's lanes that an instruction uses."""
    work = event.work
    if isinstance(work, PeWork):
        return min(1.0, work.k / spec.pe.rows)
    if isinstance(work, StreamWork):
        return min(1.0, work.partitions / spec.partitions)
    return 1.0


def collisions(case: Case) -> Iterator[Advice]:
    """Two engines at one PSUM bank, or at the SBUF port Vector shares with GpSimd."""
    for cause, name, what, fix in (
        (Cause.bank, "bank conflict", "a PSUM bank that Vector and Scalar use at the same time",
         "give each engine whole banks of its own"),
        (Cause.port, "shared port", "the SBUF port that GpSimd and Vector's fast modes share",
         "move the work off GpSimd, or run it while Vector is idle"),
    ):  # fmt: skip
        numbers = np.flatnonzero(case.timeline.cause == cause).tolist()
        waits = {number: _idle_before(case, number) for number in numbers}
        total = sum(waits.values())
        at_stake = min(total, case.idle_ns)
        if case.percent(at_stake) >= SMALL_PERCENT and case.matters(*_EVICTING, Engine.gpsimd):
            yield case.give(
                name,
                f"{len(waits)} instructions wait for {what}, {total / 1e3:,.1f} us in all "
                f"{case.at(waits)}; {fix}",
                at_stake,
                waits,
            )


def _idle_before(case: Case, number: int) -> float:
    """Return how long an engine stood idle before an event, while its rival was at work."""
    before = case.order.before[number]
    free = 0.0 if before < 0 else float(case.timeline.issue[before])
    rival = blocker(case.timeline, case.order, number)
    if rival >= 0:
        free = max(free, float(case.timeline.start[rival]))
    return max(0.0, float(case.timeline.start[number]) - free)


def loop_overhead(case: Case) -> Iterator[Advice]:
    """Device loops whose iterations do less than their boundary costs."""
    turns = [
        number
        for number, event in enumerate(case.events)
        if isinstance(event.work, ControlWork) and event.work.kind == "loop_iteration"
    ]
    at_stake = float(case.path.event_ns[turns].sum())
    if case.percent(at_stake) >= ON_PATH_PERCENT:
        yield case.give(
            "loop overhead",
            f"{len(turns)} iterations of device loops {case.at(turns)} end with all engines "
            f"drained, {at_stake / 1e3:,.1f} us in all; do more in an iteration, or unroll the "
            "loop with Python's range",
            at_stake,
            turns,
        )


def transposes(case: Case) -> Iterator[Advice]:
    """The same data transposed again, or too much of the Tensor engine's work in transposes."""
    version: Counter[int] = Counter()
    seen: set[tuple[object, ...]] = set()
    again: list[int] = []
    on_pe: list[int] = []
    flops = {"matmul": 0, "transpose": 0}
    for number, event in enumerate(case.events):
        work = event.work
        flips = isinstance(work, DmaWork) and work.kind == "transpose"
        if isinstance(work, PeWork):
            flops[work.mode] += work.macs
            if work.mode == "transpose":
                on_pe.append(number)
                flips = True
        if (flips or event.opcode == "nc_transpose") and event.reads:
            source = event.reads[0]
            key = (source.tile.id, *source[1:], version[source.tile.id])
            if key in seen:
                again.append(number)
            seen.add(key)
        for access in event.writes:
            version[access.tile.id] += 1
    # PE leaves a transpose in PSUM: fetching it from there is part of the price.
    banks = {a.tile for n in again for a in case.events[n].writes if a.tile.memory == "psum"}
    fetched = [
        n for n, event in enumerate(case.events)
        if event.engine in _EVICTING and any(a.tile in banks for a in event.reads)
    ] if banks else []  # fmt: skip
    repeated = float(sum(case.spent[n] for n in (*again, *fetched)))
    if again and case.percent(repeated) >= SMALL_PERCENT / 2:
        yield case.give(
            "redundant transposes",
            f"{len(again)} of {len(seen) + len(again)} transposes {case.at(again)} repeat one of "
            "unchanged data; keep the transposed tile and use it again",
            repeated,
            again,
        )
    share = 100.0 * flops["transpose"] / max(1, sum(flops.values()))
    if flops["matmul"] and share > TRANSPOSE_PERCENT and case.matters(Engine.tensor):
        yield case.give(
            "transposes",
            f"{share:.0f} % of the Tensor engine's FLOPs are transposes {case.at(on_pe)} (AWS: "
            f"above {TRANSPOSE_PERCENT:.0f} % is too much); load transposed with dma_transpose, or "
            "choose a layout that needs none",
            float(sum(case.spent[n] for n in on_pe)),
            on_pe,
        )


def _reads(event: Event, memory: str) -> bool:
    return any(access.tile.memory == memory for access in event.reads)


def _writes(event: Event, memory: str) -> bool:
    return any(access.tile.memory == memory for access in event.writes)
