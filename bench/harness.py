"""Check and time one case of one operator."""

from __future__ import annotations

import dataclasses
from typing import Any

from bench.check import Verdict, check, kernel_hash
from bench.entries import Entry
from bench.record import Result, git_sha
from nki_kernels.hardware import spec_for
from nki_kernels.operators.shapes import Case

_LNC = 1


def measure(entry: Entry, case: Case, dtype: str, target: str, *, full: bool) -> Result:
    """Check a case, then model its time; a case that fails its check is not timed.

    Args:
        entry: the operator.
        case: the problem.
        dtype: NKI name of the input and output dtype.
        target: hardware generation.
        full: check at full size whatever it costs.
    """
    op, axes = entry.op, case.axes
    spec = spec_for(target)
    config = op.configure(axes, dtype, spec)
    verdict = check(entry, axes, dtype, config, target, full=full)
    facts = _facts(entry, case, dtype, target, config, verdict)
    if not verdict.correct:
        return Result(**facts)
    run = verdict.run
    if run is None:
        # Too large to compute: the timeline depends on shapes only.
        inputs = entry.shapes_only(axes, dtype)
        run = op.launch(inputs, op.options_of(axes), config=config, target=target)
    timeline = run.time()
    total_ns = timeline.total_ns
    return Result(
        **facts,
        validated=timeline.validated,
        modelled_us=total_ns / 1e3,
        limiting_engine=timeline.limiting_engine,
        mfu_estimated_percent=100 * (facts["flops"] / (facts["peak_tflops"] * 1e3)) / total_ns,
        percent_of_roofline=100 * op.roofline_ns(axes, dtype, spec) / total_ns,
        hbm_read_bytes=timeline.hbm_read_bytes,
        hbm_write_bytes=timeline.hbm_write_bytes,
        instructions=len(run.trace),
        estimated_constants=timeline.estimates,
    )


def refused(entry: Entry, case: Case, dtype: str, target: str, reason: str) -> Result:
    """Return the result of a case that the operator or its kernel refuses: failed, not timed."""
    config = entry.op.configure(case.axes, dtype, spec_for(target))
    verdict = Verdict(False, "-", failure=f"refused: {reason}")
    return Result(**_facts(entry, case, dtype, target, config, verdict))


def _facts(
    entry: Entry, case: Case, dtype: str, target: str, config: Any, verdict: Verdict
) -> dict[str, Any]:
    op, axes, spec = entry.op, case.axes, spec_for(target)
    return {
        "op": op.name,
        "shape": case.name,
        "axes": dict(axes),
        "dtype": dtype,
        "target": target,
        "lnc": _LNC,
        "config": dataclasses.asdict(config),
        "correct": verdict.correct,
        "checked_at": verdict.checked_at,
        "check_cached": verdict.cached,
        "failure": verdict.failure,
        "min_hbm_bytes": op.min_bytes(axes, dtype),
        "flops": op.flops(axes),
        "projected": spec.projected,
        "peak_tflops": spec.peak_tflops(dtype),
        "kernel_source_hash": kernel_hash(entry),
        "git_sha": git_sha(),
    }
