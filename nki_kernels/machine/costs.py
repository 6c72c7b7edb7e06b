"""What one instruction costs, alone: work record and core in, moments in nanoseconds out.

The formulas are here and the numbers are in `nki_kernels.hardware`. Everything is relative to the
start of the instruction and memoised, since a loop repeats few distinct work records.
"""

from __future__ import annotations

import math
from functools import lru_cache
from typing import NamedTuple

from nki_kernels.hardware.spec import CoreSpec
from nki_kernels.machine.stream_costs import MEMO, Milestones, stream_timing
from nki_kernels.machine.trace import ControlWork, DmaWork, PeWork

__all__ = [
    "DmaMilestones", "Milestones", "PeMilestones", "control_ns", "dma_timing", "pe_timing",
    "stream_timing",
]  # fmt: skip


class PeMilestones(NamedTuple):
    """A Tensor engine instruction in one throttle state, in ns.

    Attributes:
        load: weight load, hidden behind the stream before it.
        issue: start of the stream to the next stream.
        result: start of the stream to result usable.
        front: added to the result where the array was idle and throttled.
        weight: share of the array rows that work, which is what the throttle watches.
    """

    load: float
    issue: float
    result: float
    front: float
    weight: float


class DmaMilestones(NamedTuple):
    """One DMA: times it holds each resource, and its latencies, in ns.

    Attributes:
        queue: occupancy of the trigger queue.
        dispatch: trigger to payload.
        turns: pieces the payload is served in, other queues' pieces between them.
        engines: (DMA engine, occupancy per turn) of those that take part.
        core: occupancy of the memory interface of the core, per turn.
        pair: occupancy of the HBM interface of a core pair, per turn.
        latency: last byte through the servers to payload done.
        notify: payload done to semaphore visible.
    """

    queue: float
    dispatch: float
    turns: int
    engines: tuple[tuple[int, float], ...]
    core: float
    pair: float
    latency: float
    notify: float


# -- Tensor engine ---------------------------------------------------------------------------------


@lru_cache(MEMO)
def pe_timing(work: PeWork, spec: CoreSpec, throttled: bool) -> PeMilestones:
    """Return the moments of a matmul or transpose in one throttle state.

    Formula: ``pass = max((cycles per row * max(minimum, n) * stride + overhead) / clock, load)``,
    ``issue = passes * pass``, ``result = (passes - 1) * pass + stream of the last pass + drain``.
    The throttle scales the stream only: neither weight loads nor the drain.
    """
    pe = spec.pe
    clock = pe.clock_ghz * (pe.throttle if throttled else 1.0)
    fp32 = work.dtype == "float32"
    weight = min(1.0, work.k / pe.rows)
    front = pe.cold_front_fp32_ns if fp32 else pe.cold_front_ns
    rows = max(pe.min_stream_cycles, work.n)
    if fp32 and work.mode == "transpose":
        full = pe.transpose_fp32_throttled_ns if throttled else pe.transpose_fp32_ns
        interval = full * rows / max(pe.min_stream_cycles, pe.columns)
        interval *= _slow(work.moving_step_bytes, spec)
        return PeMilestones(0.0, interval, interval + pe.drain_ns, front, weight)
    passes, per_row, load = 1, 1.0, work.m * pe.ldw_cycles
    if fp32:
        passes = 1 if work.onezero else pe.fp32_passes
        per_row, load = pe.fp32_cycles_per_row, work.m * pe.ldw_fp32_cycles
    elif work.dtype == "tfloat32":
        per_row = pe.tf32_cycles_per_row
    stride = _slow(work.moving_step_bytes, spec)
    load *= _slow(work.stationary_step_bytes, spec) / pe.clock_ghz
    one = max((per_row * rows * stride + _overhead(rows, spec)) / clock, load)
    stream = per_row * work.n * stride / clock
    return PeMilestones(
        load, passes * one, (passes - 1) * one + stream + pe.drain_ns, front, weight
    )


def _slow(step: int, spec: CoreSpec) -> float:
    return spec.pe.strided_factor if abs(step) > spec.pe.free_step_bytes else 1.0


def _overhead(rows: int, spec: CoreSpec) -> float:
    """Return the overhead cycles of a pass, linear in n between its two measured points."""
    pe = spec.pe
    span = (rows - pe.overhead_short_n) / (pe.overhead_long_n - pe.overhead_short_n)
    share = min(1.0, max(0.0, span))
    return pe.overhead_short_cycles + share * (pe.overhead_long_cycles - pe.overhead_short_cycles)


# -- DMA -------------------------------------------------------------------------------------------


@lru_cache(MEMO)
def dma_timing(work: DmaWork, spec: CoreSpec) -> DmaMilestones:
    """Return what a DMA holds and for how long.

    Formula: a DMA engine is held for the sum over its descriptors of ``fixed + bytes / rate``, the
    core's memory interface for ``bytes / rate of all engines``. An isolated payload was measured to
    take ``fixed + slope * bytes / rate`` (the excess of the slope over 1 is kept to its measured
    domain); what of it the servers do not account for where all engines share the bytes is latency,
    which a payload pays however long it waited for its servers and however few of them it uses.
    """
    dma = spec.dma
    store = work.dst == "hbm"
    share = _share(work, spec)
    moved = max(work.nbytes, work.hbm_read_bytes + work.hbm_write_bytes)
    ideal = work.nbytes / spec.hbm_bytes_per_ns
    fixed = dma.store_latency_ns if store else dma.load_latency_ns
    slope = dma.store_latency_slope if store else dma.load_latency_slope
    within = min(max(work.nbytes, dma.law_min_bytes), dma.law_max_bytes) / spec.hbm_bytes_per_ns
    hbm = work.hbm_read_bytes + work.hbm_write_bytes
    engines = [(e, _service(work, runs, share, spec)) for e, runs in work.descriptors]
    core = moved / (share * spec.hbm_bytes_per_ns)
    served = max(core, sum(held for _, held in engines) / spec.dma_engines)
    longest = max(core, *(held for _, held in engines)) if engines else core
    turns = max(1, math.ceil(longest / dma.turn_ns))
    isolated = fixed + ideal / share + (slope - 1.0) * within
    return DmaMilestones(
        queue=_queue(work, spec),
        dispatch=dma.store_dispatch_ns if store else dma.load_dispatch_ns,
        turns=turns,
        engines=tuple((e, held / turns) for e, held in engines),
        core=core / turns,
        pair=hbm / (share * spec.sync.pair_bytes_per_ns) / turns,
        latency=max(0.0, isolated - served),
        notify=dma.store_notify_ns if store else dma.load_notify_ns,
    )


def _share(work: DmaWork, spec: CoreSpec) -> float:
    """Return the share of the plain rate this kind of DMA reaches."""
    share = 1.0
    if work.kind == "transpose":
        from_hbm = work.src == "hbm"
        share = spec.dma.transpose_hbm_share if from_hbm else spec.dma.transpose_sbuf_share
    if work.kind == "compute" or work.casts:
        share *= spec.dma.compute_share
    return share


def _queue(work: DmaWork, spec: CoreSpec) -> float:
    dma = spec.dma
    if work.mode == "static":
        return dma.static_queue_ns
    if work.mode == "dge_hw":
        return dma.hw_queue_ns
    if work.kind == "transpose":
        # The cooperating engines split a transpose by themselves: its descriptors are no rows.
        return dma.hw_queue_ns
    count = sum(count for _, runs in work.descriptors for count, _ in runs)
    # An addition has software descriptors only where a vector_offset gathers or scatters rows.
    indirect = work.kind in ("indirect", "compute")
    each = dma.sw_indirect_descriptor_ns if indirect else dma.sw_queue_descriptor_ns
    return dma.sw_queue_ns + count * each


def _service(
    work: DmaWork, runs: tuple[tuple[int, int], ...], share: float, spec: CoreSpec
) -> float:
    """Return how long one DMA engine is held."""
    dma = spec.dma
    if work.kind == "transpose":
        nbytes = sum(count * size for count, size in runs)
        return nbytes * spec.dma_engines / (share * spec.hbm_bytes_per_ns)
    held = 0.0
    for count, size in runs:
        pieces = -(-size // dma.max_descriptor_bytes)
        each = pieces * dma.descriptor_ns + size / (share * dma.engine_bytes_per_ns)
        if work.dst == "hbm" and size < dma.small_write_bytes:
            each *= dma.small_write_factor
        held += count * each
    return held


# -- sequencers ------------------------------------------------------------------------------------


def control_ns(work: ControlWork, spec: CoreSpec) -> float:
    """Return how long sequencer work takes."""
    sync = spec.sync
    return {
        "register_move": sync.register_move_ns,
        "register_load": sync.register_memory_ns,
        "register_store": sync.register_memory_ns,
        "loop_iteration": sync.loop_iteration_ns,
        "barrier": sync.core_barrier_ns,
    }[work.kind]
