"""Results and shapes as plain text, at most 100 columns wide."""

from __future__ import annotations

import textwrap
from collections.abc import Iterable, Mapping, Sequence

from bench.record import Result
from nki_kernels.operators.contract import Operator
from nki_kernels.operators.shapes import cases

WIDTH = 100
_SHORT = {"bfloat16": "bf16", "float16": "fp16", "float32": "fp32"}
COLUMNS = ("shape", "dtype", "correct", "checked at", "model us", "limiting", "MFU %", "roof %")


def render(rows: Sequence[Sequence[str]], header: Sequence[str], left: int = 1) -> list[str]:
    """Lay out rows under a header; the first `left` columns are left-aligned, the rest right.

    The first column is shortened where the line would be wider than `WIDTH`.
    """
    table = [header, *rows]
    widths = [max(len(row[i]) for row in table) for i in range(len(header))]
    widths[0] = min(widths[0], WIDTH - sum(widths[1:]) - len(widths) + 1)
    lines = []
    for row in table:
        first = row[0] if len(row[0]) <= widths[0] else row[0][: widths[0] - 1] + "…"
        cells = [first, *row[1:]]
        padded = [
            cell.ljust(width) if i < left else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(cells, widths, strict=True))
        ]
        lines.append(" ".join(padded).rstrip())
    return [lines[0], "-" * max(map(len, lines)), *lines[1:]]


def results_table(results: Iterable[Result]) -> str:
    """Return one table per operator and target, each with its source and what it rests on."""
    blocks = []
    for (op, target), group in grouped(results).items():
        rows = [result_row(r) for r in group]
        lines = [f"{op} on {target} ({group_label(group)})", *render(rows, COLUMNS)]
        failed = [f"FAILED {r.shape} {r.dtype}: {r.failure}" for r in group if not r.correct]
        lines += [line for text in failed for line in textwrap.wrap(text, WIDTH)]
        lines += _legend(group)
        blocks.append("\n".join(lines))
    return "\n\n".join(blocks)


def grouped(results: Iterable[Result]) -> dict[tuple[str, str], list[Result]]:
    """Return the results by (operator, target), in the order they came."""
    groups: dict[tuple[str, str], list[Result]] = {}
    for result in results:
        groups.setdefault((result.op, result.target), []).append(result)
    return groups


def group_label(group: Sequence[Result]) -> str:
    """Return where the times of a group come from."""
    label = "model"
    label += "" if all(r.validated for r in group) else ", unvalidated"
    return label + (", projected hardware" if any(r.projected for r in group) else "")


def result_row(result: Result) -> tuple[str, ...]:
    """Return the cells of one result, in the order of `COLUMNS`."""
    head = (
        result.shape,
        _SHORT.get(result.dtype, result.dtype),
        "yes" if result.correct else "NO",
        result.checked_at,
    )
    if result.modelled_us is None:
        return (*head, "-", "-", "-", "-")
    return (
        *head,
        f"{result.modelled_us:.1f}",
        str(result.limiting_engine),
        f"{result.mfu_estimated_percent:.1f}",
        f"{result.percent_of_roofline:.1f}",
    )


def _legend(group: Sequence[Result]) -> list[str]:
    peaks = {_SHORT.get(r.dtype, r.dtype): r.peak_tflops for r in group}
    against = ", ".join(f"{dtype} {peak:.1f} TFLOP/s" for dtype, peak in peaks.items())
    estimates = max((r.estimated_constants or 0 for r in group), default=0)
    return [
        f"model us: kernel start and end included, {estimates} estimated constants inside.",
        f"MFU %: useful FLOPs against {against}.",
        "roof %: the larger of the FLOP and the HBM-byte bound, against the modelled time.",
    ]


def shapes_table(operators: Mapping[str, tuple[Operator, Sequence[str]]]) -> str:
    """Return the operators and their named shapes.

    Args:
        operators: operator and default shapes, which are marked with a star, by name.
    """
    blocks = []
    for name, (op, starred) in operators.items():
        order = "x".join(op.axis_order)
        named = [(case.name, case.axes) for case in cases(op.name)]
        rows = [
            (f"{'*' if shape in starred else ' '} {shape}",
             "x".join(str(axes[letter]) for letter in op.axis_order))
            for shape, axes in named
        ]  # fmt: skip
        rows += [(f"* {shape}", shape) for shape in starred if shape not in dict(named)]
        lines = textwrap.wrap(f"{name}: {op.summary}", WIDTH, subsequent_indent="  ")
        lines.append(f"dtypes: {', '.join(op.dtypes)}")
        lines += render(rows, ("  shape", order))
        foot = f"* = timed by 'run {name}' when no shape is named; any {order} works too."
        lines += textwrap.wrap(foot, WIDTH, subsequent_indent="  ")
        blocks.append("\n".join(lines))
    return "\n\n".join(blocks)
