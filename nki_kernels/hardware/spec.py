"""CoreSpec: every number of one NeuronCore generation, each with its origin.

One instance per generation lives in its own file (trn1.py, trn2.py, trn3.py, toy.py). Times are in
nanoseconds, clocks in GHz (cycles per nanosecond), sizes in bytes, rates in bytes per nanosecond.
"""

from __future__ import annotations

import enum
from dataclasses import dataclass

from nki_kernels.hardware.laws import LawTable
from nki_kernels.hardware.origin import Sourced


class Engine(enum.IntEnum):
    """The engines of a NeuronCore, numbered as in ``nki.isa.engine``."""

    unknown = 0
    tensor = 1
    scalar = 2
    gpsimd = 3
    dma = 4
    vector = 5
    sync = 6


@dataclass(frozen=True, kw_only=True, eq=False)
class PeSpec(Sourced):
    """The Tensor engine: a systolic array that streams moving rows past stationary weights.

    Attributes:
        clock_ghz: array clock.
        rows: array rows (contraction).
        columns: array columns (stationary free size).
        min_stream_cycles: a shorter moving operand costs this much.
        overhead_short_cycles: added per pass for moving sizes up to `overhead_short_n`.
        overhead_long_cycles: added per pass at `overhead_long_n` and beyond; linear between.
        fp32_passes: passes per float32 matmul.
        fp32_cycles_per_row: cycles per moving row and pass in float32.
        ldw_fp32_cycles: weight-load cycles per stationary column, float32.
        ldw_cycles: the same for 1- and 2-byte types.
        transpose_fp32_ns: issue interval of a full float32 transpose.
        transpose_fp32_throttled_ns: the same in the throttled state.
        drain_ns: last row streamed to result usable; not scaled by the throttle.
        free_step_bytes: largest innermost byte step of an operand that streams at full rate.
        strided_factor: slowdown beyond it.
        double_row_rows: contraction rows per array row with ``perf_mode=double_row``.
        mx_rows: the same for MX data.
        tf32_cycles_per_row: cycles per moving row for tfloat32.
        cold_front_ns: extra latency of a pass that finds the array idle and throttled.
        cold_front_fp32_ns: the same in float32.
        throttle: share of the clock in the throttled state (1: this core does not throttle).
        throttle_window_ns: sustained work that releases the throttle.
        throttle_share: utilisation above which it is released and below which it returns.
    """

    clock_ghz: float
    rows: int
    columns: int
    min_stream_cycles: int
    overhead_short_n: int
    overhead_short_cycles: float
    overhead_long_n: int
    overhead_long_cycles: float
    fp32_passes: int
    fp32_cycles_per_row: float
    ldw_fp32_cycles: float
    ldw_cycles: float
    transpose_fp32_ns: float
    transpose_fp32_throttled_ns: float
    drain_ns: float
    free_step_bytes: int
    strided_factor: float
    double_row_rows: int
    mx_rows: int
    tf32_cycles_per_row: float
    cold_front_ns: float
    cold_front_fp32_ns: float
    throttle: float
    throttle_window_ns: float
    throttle_share: float


@dataclass(frozen=True, kw_only=True, eq=False)
class StreamSpec(Sourced):
    """What Vector, Scalar and GpSimd share: they stream a free axis past a fixed pipeline.

    Attributes:
        clock_ghz: engine clock.
        startup_ns: issue to first result, data in SBUF.
        psum_startup_ns: the same with a source in PSUM.
        memset_startup_ns: the same for an instruction with no source.
        gap_ns: idle time between two independent instructions.
        min_issue_cycles: smallest issue interval.
        dynamic_min_cycles: smallest issue interval of an access with a run-time offset.
        read_ns: last element streamed to operands released.
        free_step_bytes: largest innermost byte step that streams at full rate.
        strided_factor: slowdown beyond it.
        one_input_cycles: cycles per element where no other rule applies.
        two_input_cycles: the same with two full-size 4-byte inputs.
        two_input_2byte_cycles: the same with two full-size inputs and output of 2 bytes.
    """

    clock_ghz: float
    startup_ns: float
    psum_startup_ns: float
    memset_startup_ns: float
    gap_ns: float
    min_issue_cycles: int
    dynamic_min_cycles: int
    read_ns: float
    free_step_bytes: int
    strided_factor: float
    one_input_cycles: float
    two_input_cycles: float
    two_input_2byte_cycles: float


@dataclass(frozen=True, kw_only=True, eq=False)
class VectorSpec(StreamSpec):
    """The Vector engine (DVE) and its fast modes, in cycles per element.

    Attributes:
        copy_2byte_cycles: copy or tensor_scalar, SBUF to SBUF, 2-byte types, contiguous.
        copy_2byte_strided_cycles: the same, innermost dimension not contiguous.
        copy_2byte_psum_cycles: 2-byte types, contiguous, exactly one side in PSUM.
        copy_4byte_cycles: 4-byte source, SBUF to SBUF.
        copy_widening_cycles: 2-byte source, 4-byte destination, SBUF to SBUF.
        copy_narrow_cycles: 1-byte source or destination, SBUF to SBUF.
        copy_psum_cycles: anything else with a side in PSUM.
        psum_two_input_cycles: two inputs, one of them in PSUM.
        reduce_cycles: tensor_reduce and the like.
        reduce_2byte_cycles: the same with 2-byte input and output.
        scan_cycles: tensor_tensor_scan.
        reciprocal_cycles: reciprocal.
        memset_cycles: memset.
        fused_two_input_cycles: scalar_tensor_tensor.
        predicated_cycles: tensor_copy_predicated of a tile, all in SBUF.
        exponential_cycles: exponential (fourth generation).
        accumulate_cycles: added once where a reduction is folded into another instruction.
        scan_seed_ns: added where the initial value of a scan is a tensor.
        mask_load_ns: loading a shuffle mask.
        transpose_startup_ns: startup of the 32x32 transpose.
        bn_aggr_cycles: cycles per element of bn_aggr.
        shares_gpsimd_port: fast modes lock the SBUF port shared with GpSimd.
        gpsimd_exclusive: every SBUF access excludes GpSimd (first generation).
    """

    copy_2byte_cycles: float
    copy_2byte_strided_cycles: float
    copy_2byte_psum_cycles: float
    copy_4byte_cycles: float
    copy_widening_cycles: float
    copy_narrow_cycles: float
    copy_psum_cycles: float
    psum_two_input_cycles: float
    reduce_cycles: float
    reduce_2byte_cycles: float
    scan_cycles: float
    reciprocal_cycles: float
    memset_cycles: float
    fused_two_input_cycles: float
    predicated_cycles: float
    exponential_cycles: float
    accumulate_cycles: int
    scan_seed_ns: float
    mask_load_ns: float
    transpose_startup_ns: float
    bn_aggr_cycles: float
    shares_gpsimd_port: bool
    gpsimd_exclusive: bool


@dataclass(frozen=True, kw_only=True, eq=False)
class ScalarSpec(StreamSpec):
    """The Scalar engine (ACT): one function of one input, with a table per function set.

    Attributes:
        lut_startup_ns: startup of a function that needs a table, SBUF source.
        lut_psum_startup_ns: the same, PSUM source.
        fast_2byte_cycles: cycles per element of a copy or scale between 2-byte types.
        vector_read_ns: added per [P, 1] operand (bias, scale) read beside the data of a copy.
        lut_vector_read_ns: the same for a function that needs a table.
        strided_dst_issue_cycles: added to the issue interval per element of a strided destination.
        accumulator_forward_ns: last element streamed to accumulator readable.
        read_accumulator_ns: reading the accumulator to result usable.
        read_accumulator_issue_ns: issue interval of that read.
        table_load_ns: one switch of the function set.
        table_sets: functions that share a table; copy and identity are in every table.
        psum_exclusive: every PSUM access excludes Vector, not only one of the same bank.
    """

    lut_startup_ns: float
    lut_psum_startup_ns: float
    fast_2byte_cycles: float
    vector_read_ns: float
    lut_vector_read_ns: float
    strided_dst_issue_cycles: float
    accumulator_forward_ns: float
    read_accumulator_ns: float
    read_accumulator_issue_ns: float
    table_load_ns: float
    table_sets: tuple[frozenset[str], ...]
    psum_exclusive: bool


@dataclass(frozen=True, kw_only=True, eq=False)
class GpSimdSpec(StreamSpec):
    """The GpSimd engine (Pool): eight cores of sixteen lanes.

    Attributes:
        topk_cycles: cycles per element of topk.
        rsqrt_cycles: cycles per element of rsqrt.
        core_partitions: neighbouring partitions that one of its cores serves.
    """

    topk_cycles: float
    rsqrt_cycles: float
    core_partitions: int


@dataclass(frozen=True, kw_only=True, eq=False)
class DmaSpec(Sourced):
    """DMA: trigger queue, descriptors, sixteen engines, one memory interface, notification.

    Attributes:
        engine_bytes_per_ns: rate of one engine inside a descriptor.
        descriptor_ns: fixed cost of a descriptor on its engine.
        max_descriptor_bytes: a longer contiguous run is split.
        sw_queue_ns: occupancy of the GpSimd queue per software-DGE trigger, before descriptors.
        sw_queue_descriptor_ns: added per descriptor.
        sw_indirect_descriptor_ns: the same for indexed rows.
        hw_queue_ns: occupancy of a queue per hardware-DGE trigger.
        static_queue_ns: occupancy of a queue per trigger of prepared descriptors.
        load_dispatch_ns: trigger to payload, destination on chip.
        store_dispatch_ns: trigger to payload, destination in HBM.
        load_latency_ns: fixed latency of an isolated payload.
        load_latency_slope: latency of an isolated payload in units of bytes / rate.
        store_latency_ns: fixed latency of an isolated store.
        store_latency_slope: latency of an isolated store in units of bytes / rate.
        law_min_bytes: smallest transfer the two slopes were measured on.
        law_max_bytes: largest.
        load_notify_ns: payload done to semaphore visible.
        store_notify_ns: the same for stores.
        turn_ns: what one queue moves before the DMA engines take the next queue's turn.
        transpose_hbm_share: share of the rate a transpose from HBM reaches.
        transpose_sbuf_share: share of the rate a transpose from SBUF reaches.
        compute_share: share of the rate with a cast or an addition on the way.
        small_write_bytes: descriptors below this size into HBM pay `small_write_factor`.
        small_write_factor: their slowdown.
    """

    engine_bytes_per_ns: float
    descriptor_ns: float
    max_descriptor_bytes: int
    sw_queue_ns: float
    sw_queue_descriptor_ns: float
    sw_indirect_descriptor_ns: float
    hw_queue_ns: float
    static_queue_ns: float
    load_dispatch_ns: float
    store_dispatch_ns: float
    load_latency_ns: float
    load_latency_slope: float
    store_latency_ns: float
    store_latency_slope: float
    law_min_bytes: int
    law_max_bytes: int
    load_notify_ns: float
    store_notify_ns: float
    turn_ns: float
    transpose_hbm_share: float
    transpose_sbuf_share: float
    compute_share: float
    small_write_bytes: int
    small_write_factor: float


@dataclass(frozen=True, kw_only=True, eq=False)
class SyncSpec(Sourced):
    """Handoffs between engines, and what a kernel pays around its own work.

    Attributes:
        same_engine_ns: result to a dependent start on the same engine.
        other_engine_ns: result to a dependent start on another engine.
        to_dma_ns: result to a dependent DMA trigger.
        to_software_store_ns: the same where software then writes the descriptors of a store.
        from_dma_ns: DMA semaphore visible to a dependent start.
        register_move_ns: sequencer register move.
        register_memory_ns: register load or store.
        loop_iteration_ns: boundary of a dynamic-loop iteration, all engines drained.
        core_barrier_ns: barrier between the two cores of an LNC2 launch.
        launch_ns: start and end of a kernel on one core.
        launch_lnc2_ns: the same on a core pair.
        pair_bytes_per_ns: HBM rate a core pair shares under LNC2.
    """

    same_engine_ns: float
    other_engine_ns: float
    to_dma_ns: float
    to_software_store_ns: float
    from_dma_ns: float
    register_move_ns: float
    register_memory_ns: float
    loop_iteration_ns: float
    core_barrier_ns: float
    launch_ns: float
    launch_lnc2_ns: float
    pair_bytes_per_ns: float


@dataclass(frozen=True, kw_only=True, eq=False)
class CoreSpec(Sourced):
    """One NeuronCore.

    Attributes:
        name: the target's name.
        generation: 2 (trn1, inf2), 3 (trn2) or 4 (trn3).
        projected: no per-instruction measurement of this generation exists.
        partitions: SBUF and PSUM partitions.
        quadrant: granule of a start partition.
        sbuf_bytes: SBUF bytes per partition, physical.
        sbuf_usable_bytes: what a kernel may allocate of them.
        sbuf_align: alignment of an SBUF allocation.
        psum_banks: PSUM banks per partition.
        psum_bank_bytes: bytes of a bank per partition.
        stationary_fmax: largest stationary free size.
        moving_fmax: largest moving free size.
        bn_stats_fmax: largest free size of bn_stats.
        dma_engines: DMA engines.
        partitions_per_dma_engine: an engine serves this many neighbouring partitions.
        hbm_bytes_per_ns: what the DMA engines of one core sustain together, reads plus writes.
        op_laws: measured cost laws of single instructions.
    """

    name: str
    generation: int
    projected: bool
    partitions: int
    quadrant: int
    sbuf_bytes: int
    sbuf_usable_bytes: int
    sbuf_align: int
    psum_banks: int
    psum_bank_bytes: int
    stationary_fmax: int
    moving_fmax: int
    bn_stats_fmax: int
    dma_engines: int
    partitions_per_dma_engine: int
    hbm_bytes_per_ns: float
    pe: PeSpec
    vector: VectorSpec
    scalar: ScalarSpec
    gpsimd: GpSimdSpec
    dma: DmaSpec
    sync: SyncSpec
    op_laws: LawTable

    def peak_tflops(self, dtype: str) -> float:
        """Return the dense matmul peak of one core in TFLOP/s.

        Formula: ``2 * rows * columns * clock / (passes * cycles per row)``, times the contraction
        rows an array row holds for 1-byte (double row) and MX types.
        """
        pe = self.pe
        rate = 2 * pe.rows * pe.columns * pe.clock_ghz / 1e3
        if dtype == "float32":
            return rate / (pe.fp32_passes * pe.fp32_cycles_per_row)
        if dtype == "tfloat32":
            return rate / pe.tf32_cycles_per_row
        if dtype.endswith("_x4"):
            return rate * pe.mx_rows
        if dtype.startswith("float8"):
            return rate * pe.double_row_rows
        return rate
