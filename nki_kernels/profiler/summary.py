"""The summary of one launch, in the field names of Neuron's own profiler.

Times come from the timing model, counts from the trace. Source of the names and of the definitions
of MFU and MBU: Neuron Explorer profile schema reference.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from nki_kernels.hardware.spec import CoreSpec
from nki_kernels.machine.launch import launch
from nki_kernels.machine.options import Options
from nki_kernels.machine.placement import Placement, place
from nki_kernels.machine.timeline import Timeline
from nki_kernels.machine.trace import DmaWork, PeWork, Trace

#: MFU counts against the 2-byte peak whatever the operands, as Neuron's profiler does.
_MFU_DTYPE = "bfloat16"


@dataclass(frozen=True, slots=True)
class Profile:
    """One launch, executed or traced, placed and timed.

    Attributes:
        trace: every event (static).
        placement: where the tiles lie (static).
        timeline: when everything happens (model, unvalidated).
        result: what the kernel returned; `Abstract` where arguments had no values.
    """

    trace: Trace
    placement: Placement
    timeline: Timeline
    result: Any

    def summary(self) -> dict[str, Any]:
        """Return the figures by name: percent of the total time, bytes, counts, microseconds."""
        timeline, spec = self.timeline, self.trace.spec
        total = timeline.total_ns
        dmas = [e.work for e in self.trace if isinstance(e.work, DmaWork)]
        macs = {"matmul": 0, "transpose": 0}
        for event in self.trace:
            if isinstance(event.work, PeWork):
                macs[event.work.mode] += event.work.macs
        peak = spec.peak_tflops(_MFU_DTYPE) * 1e3 * self.trace.lnc
        moved = timeline.hbm_read_bytes + timeline.hbm_write_bytes
        bandwidth = spec.hbm_bytes_per_ns * self.trace.lnc
        engines = ("tensor", "vector", "scalar", "gpsimd", "sync")
        return {
            "total_time_us": total / 1e3,
            "limiting_engine": timeline.limiting_engine,
            **{
                f"{name}_engine_active_time_percent": 100 * timeline.busy_ns[name] / total
                for name in engines
            },
            "dma_active_time_percent": 100 * timeline.busy_ns["dma"] / total,
            "throttle_active_time_percent": 100 * timeline.throttled_ns / total,
            "mfu_estimated_percent": 100 * 2 * macs["matmul"] / (peak * total),
            "mbu_estimated_percent": 100 * moved / (bandwidth * total),
            "hardware_flops": 2 * (macs["matmul"] + macs["transpose"]),
            "transpose_flops": 2 * macs["transpose"],
            "hbm_read_bytes": timeline.hbm_read_bytes,
            "hbm_write_bytes": timeline.hbm_write_bytes,
            "dma_transfer_average_bytes": sum(d.nbytes for d in dmas) / max(len(dmas), 1),
            "instructions": len(self.trace),
            "peak_sbuf_bytes": self.placement.peak_sbuf_bytes,
            "peak_psum_banks": self.placement.peak_psum_banks,
            "estimated_constants": timeline.estimates,
            "validated": timeline.validated,
        }

    def __repr__(self) -> str:
        total = self.timeline.total_ns / 1e3
        return (
            f"<Profile of {self.trace.kernel!r} on {self.trace.spec.name}: {total:.2f} us "
            f"({_label(self.trace.spec, self.timeline)}), {len(self.trace)} instructions; print it>"
        )

    def __str__(self) -> str:
        figures = self.summary()
        spec = self.trace.spec
        lines = [f"{self.trace.kernel} on {spec.name} ({_label(spec, self.timeline)})"]
        for name, value in figures.items():
            shown = f"{value:.2f}" if isinstance(value, float) else f"{value:,}" if (
                isinstance(value, int) and not isinstance(value, bool)
            ) else str(value)  # fmt: skip
            lines.append(f"  {name:<36}{shown:>20}")
        return "\n".join(lines)


def _label(spec: CoreSpec, timeline: Timeline) -> str:
    projected = ", projected hardware numbers" if spec.projected else ""
    return f"model, {'validated' if timeline.validated else 'unvalidated'}{projected}"


def profile(
    kernel: Any,
    *args: Any,
    target: str | None = None,
    lnc: int | None = None,
    options: Options | None = None,
    **kwargs: Any,
) -> Profile:
    """Run a kernel on the embedded machine and model its time.

    Args:
        kernel: an ``@nki.jit`` kernel or a plain function, this library's or anyone's.
        *args: its arguments: NumPy arrays, torch tensors, `nki_kernels.Abstract` (a shape without
            values), constants.
        target: "trn1", "trn2", "trn3" or "toy"; None reads NEURON_PLATFORM_TARGET_OVERRIDE.
        lnc: cores, 1 or 2; None takes the kernel's bracket or the environment.
        options: which checks run.
        **kwargs: more arguments of the kernel, by name.

    Returns:
        The profile; print it, or read `summary()`.

    Raises:
        NkiKernelsError: for every mistake of the kernel or the call.
        ValueError: an unknown target.
    """
    run = launch(kernel, args, kwargs, target=target, lnc=lnc, options=options)
    return Profile(run.trace, run.placement or place(run.trace), run.time(), run.result)
