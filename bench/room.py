"""How much memory a case takes, estimated before it starts: a shape too large is refused."""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from bench.check import reduced_axes
from bench.entries import Entry
from bench.record import BenchError
from nki_kernels.hardware import spec_for
from nki_kernels.machine.dtypes import as_dtype
from nki_kernels.operators.contract import Axes, Operand
from nki_kernels.operators.shapes import Case

#: Below this no trace fills a memory: a Tensor engine instruction does at least a thousandth of
#: its best in any kernel worth timing, and 2 * 4096**3 FLOPs at its best are 8192 instructions.
_SMALL_FLOPS = 2 * 4096**3
_SMALL_BYTES = 1 << 30
#: Host memory of one traced and timed instruction: 44 MB for the 14,656 of a matmul with
#: M 4096, N 6144, K 4096.
BYTES_PER_INSTRUCTION = 3000
#: float64 arrays of the output's size a reference and the comparison hold: value, magnitude, error,
#: allowed.
_CHECK_ARRAYS = 4


def require_room(
    entry: Entry, case: Case, dtype: str, target: str, *, full: bool, jobs: int
) -> None:
    """Refuse a case whose estimate is more than this process may take.

    Raises:
        BenchError: the estimate, what there is, and what to do.
    """
    spec = spec_for(target)
    config = entry.op.configure(case.axes, dtype, spec)
    checked = dict(case.axes) if full else reduced_axes(entry, case.axes, config, target)
    values = check_bytes(entry, checked, dtype)
    instructions = 0
    op = entry.op
    if op.flops(case.axes) > _SMALL_FLOPS or op.min_bytes(case.axes, dtype) > _SMALL_BYTES:
        instructions = _instructions(entry, case.axes, dtype, config, target)
    need, room = values + instructions * BYTES_PER_INSTRUCTION, available() // jobs
    if need <= room:
        return
    what = f"{values / 1e9:,.1f} GB for its check" if values > need / 2 else (
        f"about {instructions:,.0f} instructions of {BYTES_PER_INSTRUCTION} bytes"
    )  # fmt: skip
    each = f" for each of {jobs} jobs" if jobs > 1 else ""
    raise BenchError(
        f"{entry.op.name} {case.name} {dtype}: needs about {need / 1e9:,.1f} GB of memory "
        f"({what}); "
        f"there are {room / 1e9:,.1f} GB{each}; choose smaller sizes"
    )


def check_bytes(entry: Entry, axes: Axes, dtype: str) -> int:
    """Return the host memory of a check: inputs and float64 copies, outputs and the comparison."""
    op = entry.op
    shapes = op.input_shapes(axes)
    outputs = op.output_shapes(*shapes, options=op.options_of(axes))

    def held(operands: Sequence[Operand], sizes: Sequence[tuple[int, ...]], extra: int) -> int:
        return sum(
            math.prod(shape) * (as_dtype(operand.dtype or dtype).itemsize + extra)
            for operand, shape in zip(operands, sizes, strict=True)
        )

    return held(op.inputs, shapes, 8) + held(op.outputs, outputs, 8 * _CHECK_ARRAYS)


def _instructions(entry: Entry, axes: Axes, dtype: str, config: Any, target: str) -> int:
    """Estimate the instructions of a large case from those of its reduced one, by the work."""
    op, spec = entry.op, spec_for(target)
    reduced = dict(op.reduced(axes, config, spec))
    flops = op.flops(axes)
    # An operator that only moves data has no FLOPs.
    work = (flops, op.flops(reduced)) if flops else (
        op.min_bytes(axes, dtype), op.min_bytes(reduced, dtype)
    )  # fmt: skip
    if reduced == dict(axes):
        # No smaller problem is known to be legal: as many as the largest instruction would leave.
        return flops // (2 * spec.partitions * spec.stationary_fmax * spec.moving_fmax)
    inputs = entry.shapes_only(reduced, dtype)
    run = op.launch(inputs, op.options_of(reduced), config=config, target=target)
    return len(run.trace) * work[0] // max(1, work[1])


def available() -> int:
    """Return the bytes of memory that can still be taken without swapping."""
    try:
        for line in Path("/proc/meminfo").read_text(encoding="ascii").splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024
    except OSError:
        pass  # not Linux: all memory there is
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
