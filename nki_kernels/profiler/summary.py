"""The figures of one launch by name, in the field names of Neuron's own profiler.

Times come from the timing model, counts from the trace. Source of the names and of the definitions
of MFU, HFU and MBU: Neuron Explorer profile schema reference. Spills, which AWS counts where its
compiler makes them, are here the traffic of HBM tensors that are neither input nor output.
"""

from __future__ import annotations

from typing import Any

from nki_kernels.hardware.spec import CoreSpec
from nki_kernels.machine.placement import Placement
from nki_kernels.machine.timeline import Timeline
from nki_kernels.machine.trace import DmaWork, PeWork
from nki_kernels.profiler.movement import spill_bytes

#: MFU counts against the 2-byte peak whatever the operands, as Neuron's profiler does.
MFU_DTYPE = "bfloat16"
ENGINES = ("tensor", "vector", "scalar", "gpsimd", "sync")


def summarise(timeline: Timeline, placement: Placement) -> dict[str, Any]:
    """Return the figures by name: percent of the total time, bytes, counts, microseconds."""
    trace, spec = timeline.trace, timeline.trace.spec
    total = timeline.total_ns
    dmas = [e.work for e in trace if isinstance(e.work, DmaWork)]
    macs = {"matmul": 0, "transpose": 0}
    for event in trace:
        if isinstance(event.work, PeWork):
            macs[event.work.mode] += event.work.macs
    peak = peak_flops_per_ns(spec, trace.lnc)
    bandwidth = spec.hbm_bytes_per_ns * trace.lnc
    moved = timeline.hbm_read_bytes + timeline.hbm_write_bytes
    intensity = 2 * macs["matmul"] / moved if moved else 0.0
    saved, reloaded, _ = spill_bytes(trace.events)
    active = max(timeline.busy_ns.values())
    transferred = sum(d.nbytes for d in dmas)
    return {
        "total_time_us": total / 1e3,
        "limiting_engine": timeline.limiting_engine,
        "total_active_time_percent": 100 * active / total,
        **{
            f"{name}_engine_active_time_percent": 100 * timeline.busy_ns[name] / total
            for name in ENGINES
        },
        "dma_active_time_percent": 100 * timeline.busy_ns["dma"] / total,
        "throttle_active_time_percent": 100 * timeline.throttled_ns / total,
        "mfu_estimated_percent": 100 * 2 * macs["matmul"] / (peak * total),
        "mfu_max_achievable_estimated_percent": min(100.0, 100 * intensity * bandwidth / peak),
        "hfu_estimated_percent": 100 * 2 * sum(macs.values()) / (peak * total),
        "mbu_estimated_percent": 100 * moved / (bandwidth * total),
        "mm_arithmetic_intensity": intensity,
        "hardware_flops": 2 * (macs["matmul"] + macs["transpose"]),
        "transpose_flops": 2 * macs["transpose"],
        "hbm_read_bytes": timeline.hbm_read_bytes,
        "hbm_write_bytes": timeline.hbm_write_bytes,
        "spill_save_bytes": saved,
        "spill_reload_bytes": reloaded,
        "dma_transfer_total_bytes": transferred,
        "dma_transfer_average_bytes": transferred / max(len(dmas), 1),
        "instructions": len(trace),
        "activation_table_loads": timeline.table_loads,
        "peak_sbuf_bytes": placement.peak_sbuf_bytes,
        "peak_psum_banks": placement.peak_psum_banks,
        "estimated_constants": timeline.estimates,
        "validated": timeline.validated,
    }


def peak_flops_per_ns(spec: CoreSpec, lnc: int) -> float:
    """Return the roof of `mfu_estimated_percent`: FLOPs per ns of all cores of the launch."""
    return spec.peak_tflops(MFU_DTYPE) * 1e3 * lnc
