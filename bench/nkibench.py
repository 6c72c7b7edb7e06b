"""``python -m bench nkibench``: the 14 problems of NKIBench, ours by the model, theirs on a device.

The device figures are other kernels on other hardware (trn1), so they stand beside ours and no
ratio is formed.
"""

from __future__ import annotations

import textwrap
from collections.abc import Mapping, Sequence

from bench.record import Result
from bench.running import Work
from bench.table import WIDTH, group_label, render
from nki_kernels.operators import OPERATORS
from nki_kernels.operators.nkibench import DTYPE, PROBLEMS, Problem

#: Milliseconds on a trn1.32xlarge, one core, float32: NKIBench's own kernel, and the fastest one
#: AccelOpt found with gpt-oss-120b. Source: github.com/zhang677/AccelOpt at 47e29a7,
#: experiments/full_complete_local/profile_results.csv and results/11110904_best_plan_id.csv.
DEVICE_MS: Mapping[str, tuple[float, float]] = {
    "matmul": (35.199742, 35.309013),
    "bmm": (4.610889, 4.333210),
    "transpose_matmul": (9.610311, 9.355877),
    "rope_single_freq_apply": (4.333010, 3.332587),
    "bmm_softmax": (11.999614, 11.999839),
    "gqa_full": (19.110503, 17.272605),
    "swiglu": (4.221777, 4.222600),
    "lora": (30.166370, 30.165788),
    "rmsnorm_matmul": (1.055760, 0.999723),
    "add_rmsnorm_matmul": (1.221911, 1.054769),
    "matmul_add_rmsnorm": (2.666580, 2.666164),
    "silu": (1.333232, 0.797740),
    "mamba": (2.888663, 2.277542),
    "adamw": (1.999829, 1.888003),
}
DEVICE = "trn1"


def nkibench_work(targets: Sequence[str]) -> list[Work]:
    """Return the problems that one of our operators solves, on every target."""
    return [
        Work(problem.op, problem.shape, DTYPE, target)
        for target in targets
        for problem in PROBLEMS
        if problem.op is not None and problem.op in OPERATORS
    ]


def nkibench_table(results: Sequence[Result]) -> str:
    """Return one table per target: ours by the model, then what was published for hardware."""
    blocks = []
    for target in dict.fromkeys(r.target for r in results):
        group = [r for r in results if r.target == target]
        found = {r.shape: r for r in group}
        rows = [_row(problem, found.get(problem.shape)) for problem in PROBLEMS]
        header = ("problem", "sizes", "our operator", "model us", "roof %", "device us", "best us")
        lines = [f"NKIBench, {DTYPE}; ours on {target} ({group_label(group)})"]
        lines += render(rows, header, left=3)
        lines += [f"FAILED {r.shape}: {r.failure}" for r in group if not r.correct]
        blocks.append("\n".join(lines))
    notes = [f"{p.name}: {p.differs}" for p in PROBLEMS if p.differs and p.op in OPERATORS]
    lines = [line for text in (*_LEGEND, *notes) for line in textwrap.wrap(text, WIDTH)]
    blocks.append("\n".join(lines))
    return "\n\n".join(blocks)


_LEGEND = (
    f"device us: NKIBench's own kernel, measured on {DEVICE}; best us: the fastest AccelOpt found.",
    "Other kernels on other hardware, from another source: no ratio to ours is formed.",
    "roof %: of ours, the larger of the FLOP and the HBM-byte bound, against the modelled time.",
)


def _row(problem: Problem, result: Result | None) -> tuple[str, ...]:
    device = tuple(f"{1000 * ms:,.0f}" for ms in DEVICE_MS[problem.name])
    head = (problem.name, problem.sizes)
    if result is None:
        return (*head, "no operator yet", "-", "-", *device)
    if result.modelled_us is None:
        return (*head, result.op, "FAILED", "-", *device)
    time, roof = f"{result.modelled_us:,.0f}", f"{result.percent_of_roofline:.1f}"
    return (*head, result.op, time, roof, *device)
