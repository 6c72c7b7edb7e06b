"""Faults of data movement: loads too late, too small, too often; intermediate results in HBM."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator

from nki_kernels.machine.costs import dma_timing
from nki_kernels.machine.timeline import Cause
from nki_kernels.machine.trace import Access, DmaWork, Event
from nki_kernels.profiler.advice import (
    GOOD_RUN_BYTES,
    GOOD_TRANSFER_BYTES,
    ON_PATH_PERCENT,
    SPILL_PERCENT,
    Advice,
    Case,
)
from nki_kernels.profiler.path import Part, Piece

_DMA_PARTS = (Part.trigger, Part.transfer, Part.bandwidth, Part.notify)
_REUSE = (Cause.read, Cause.memory)


def _dma_runs(case: Case) -> Iterator[list[Piece]]:
    """Yield the stretches of the critical path that consist of DMAs and end with a load.

    The pieces of a run are in the order of the path: the last in time first.
    """
    run: list[Piece] = []
    for piece in case.path.pieces:
        work = case.events[piece.event].work if piece.event >= 0 else None
        if piece.part is Part.handoff:
            continue
        if isinstance(work, DmaWork) and (run or work.dst != "hbm"):
            run.append(piece)
            continue
        if run:
            yield run
        run = []
    if run:
        yield run


def _head(case: Case, number: int) -> tuple[int, int]:
    """Return the event at which the queue of a load last stood still, and the first load after it.

    They are the same event if that was a load.
    """
    first = number
    while case.timeline.cause[number] in (Cause.engine, Cause.queue):
        before = case.order.ahead(case.timeline, number)
        if before < 0:
            break
        number = before
        if not _is_load(case.events[number]):
            return number, first
        first = number
    return number, first


def _is_load(event: Event) -> bool:
    return isinstance(event.work, DmaWork) and event.work.dst != "hbm"


def _exposed(case: Case, run: list[Piece], first: int) -> float:
    """Return how long the path waited for a chain of loads that could have started earlier."""
    last = run[0].event
    span = float(case.timeline.result[last] - case.timeline.start[first])
    # DMAs that keep each other waiting are bandwidth at work, not a wait.
    length = sum(piece.end - piece.start for piece in run if piece.part is not Part.bandwidth)
    return min(span, length)


def serialised_loads(case: Case) -> Iterator[Advice]:
    """Loads that nothing but their place in a queue kept from starting earlier."""
    held: set[int] = set()
    at_stake = 0.0
    for run in _dma_runs(case):
        head, first = _head(case, run[0].event)
        if not _is_load(case.events[head]):
            at_stake += _exposed(case, run, first)
            held.add(run[0].event)
            continue
        for piece in run:
            if piece.part is Part.trigger and piece.cause is Cause.queue:
                at_stake += piece.end - piece.start
                held.add(piece.event)
    at_stake = min(at_stake, case.idle_ns)
    if case.percent(at_stake) < ON_PATH_PERCENT:
        return
    queues = Counter(w.queue.name for w in (case.events[n].work for n in held)
                     if isinstance(w, DmaWork))  # fmt: skip
    names = " and ".join(name for name, _ in queues.most_common(2))
    yield case.give(
        "serialised loads",
        f"{len(held)} loads {case.at(held)} hold the kernel up because they were queued behind "
        f"other work of {names}; issue loads ahead of use, on a queue that no store or compute "
        "instruction blocks, and spread them over queues",
        at_stake,
        sorted(held),
    )


def single_buffering(case: Case) -> Iterator[Advice]:
    """Work that waits until a buffer's last use is over, on the critical path."""
    at_stake = 0.0
    waiting: set[int] = set()
    for run in _dma_runs(case):
        head, first = _head(case, run[0].event)
        if _is_load(case.events[head]) and case.timeline.cause[head] in _REUSE:
            at_stake += _exposed(case, run, first)
            waiting.update((head, run[0].event))
    for piece in case.path.pieces:
        if piece.part is Part.compute and piece.cause in _REUSE:
            at_stake += piece.end - piece.start
            waiting.add(piece.event)
    at_stake = min(at_stake, case.idle_ns)
    if case.percent(at_stake) < ON_PATH_PERCENT:
        return
    tiles = Counter(a.tile for n in waiting for a in case.events[n].writes)
    lines = sorted({case.sites.frames[case.sites.place(t.site)].line for t in tiles})
    yield case.give(
        "single buffering",
        f"{len(waiting)} instructions {case.at(waiting)} wait until the tile they write (allocated "
        f"at line {', '.join(map(str, lines[:3]))}) is free; allocate it inside the loop, or "
        "alternate between two or more",
        at_stake,
        sorted(waiting),
    )


def tiny_dmas(case: Case) -> Iterator[Advice]:
    """Transfers too small, or cut into too short runs, for what each costs."""
    spec = case.timeline.trace.spec
    at_stake, nbytes, runs = 0.0, 0, 0
    small: list[int] = []
    for number, event in enumerate(case.events):
        work = event.work
        if not isinstance(work, DmaWork):
            continue
        longest = max((size for _, cut in work.descriptors for _, size in cut), default=0)
        short = work.kind != "transpose" and longest < GOOD_RUN_BYTES
        if work.nbytes >= GOOD_TRANSFER_BYTES and not short:
            continue
        cost = dma_timing(work, spec)
        held = max(cost.queue, *(ns for _, ns in cost.engines), cost.core)
        ideal = work.nbytes / spec.hbm_bytes_per_ns
        at_stake += max(0.0, held - ideal)
        nbytes += work.nbytes
        runs += sum(count for _, cut in work.descriptors for count, _ in cut)
        small.append(number)
    at_stake = min(at_stake, float(sum(case.path.event_ns[n] for n in small)))
    if case.percent(at_stake) < ON_PATH_PERCENT:
        return
    yield case.give(
        "tiny DMAs",
        f"{len(small)} DMAs move {nbytes / len(small):,.0f} B on average in runs of "
        f"{nbytes / max(1, runs):,.0f} B {case.at(small)}; AWS asks for at least "
        f"{GOOD_TRANSFER_BYTES // 1024} KiB in runs of {GOOD_RUN_BYTES} B or more: move larger "
        "tiles, or several at once",
        at_stake,
        small,
    )


def reloaded_input(case: Case) -> Iterator[Advice]:
    """HBM bytes loaded more than once, where loading holds the kernel up."""
    spec = case.timeline.trace.spec
    seen: set[tuple[object, ...]] = set()
    again: list[int] = []
    nbytes: Counter[str] = Counter()
    for number, event in enumerate(case.events):
        if not isinstance(event.work, DmaWork):
            continue
        for access in event.reads:
            if access.tile.memory != "hbm" or access.tile.role != "input" or access.whole:
                continue
            key = (event.core, access.tile.id, *access[1:])
            if key in seen:
                again.append(number)
                nbytes[access.tile.name] += _bytes(access)
            seen.add(key)
    at_stake = sum(nbytes.values()) / spec.hbm_bytes_per_ns
    exposed = case.percent(case.exposed(_DMA_PARTS))
    if case.percent(at_stake) < ON_PATH_PERCENT or exposed < 2 * ON_PATH_PERCENT:
        return
    names = ", ".join(f"{name!r}" for name, _ in nbytes.most_common(2))
    yield case.give(
        "reloaded input",
        f"{sum(nbytes.values()) / 2**20:,.1f} MiB of {names} are loaded again {case.at(again)} in "
        "the same pieces; keep them in SBUF, or reorder the loops so that each piece is used up "
        "while it is there",
        at_stake,
        again,
    )


def spills(case: Case) -> Iterator[Advice]:
    """Intermediate results sent to HBM and read back."""
    saved, reloaded, events = spill_bytes(case.events)
    reads = case.timeline.hbm_read_bytes
    share = 100.0 * reloaded / max(1, reads)
    if share > SPILL_PERCENT:
        yield case.give(
            "spills",
            f"{share:.0f} % of the HBM reads fetch back intermediate tensors {case.at(events)} "
            f"(AWS: above {SPILL_PERCENT:.0f} % is too much); fuse the steps, or keep the tensor "
            "in SBUF",
            (saved + reloaded) / case.timeline.trace.spec.hbm_bytes_per_ns,
            events,
        )


def spill_bytes(events: list[Event]) -> tuple[int, int, list[int]]:
    """Return bytes written to and read from HBM tensors that are neither input nor output."""
    saved = reloaded = 0
    moving: list[int] = []
    for number, event in enumerate(events):
        if not isinstance(event.work, DmaWork):
            continue
        for access in event.writes:
            if access.tile.memory == "hbm" and access.tile.role == "temp":
                saved += event.work.hbm_write_bytes
        for access in event.reads:
            if access.tile.memory == "hbm" and access.tile.role == "temp":
                reloaded += event.work.hbm_read_bytes
                moving.append(number)
    return saved, reloaded, moving


def _bytes(access: Access) -> int:
    size = access.itemsize
    for extent, stride in zip(access.shape, access.strides, strict=True):
        size *= extent if stride else 1
    return size
