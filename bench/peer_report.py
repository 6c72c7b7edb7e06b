"""AWS's kernels beside ours, as text and as Markdown."""

from __future__ import annotations

import textwrap
from collections.abc import Callable, Iterator, Sequence
from itertools import groupby

from bench.peers import PeerResult, result_of
from bench.table import WIDTH, group_label, render

COLUMNS = (
    "shape", "us/core", "cores", "window", "busiest", "MB", "roof %",
    "our us", "busiest", "MB", "roof %", "ratio",
)  # fmt: skip
_LEGEND = (
    "us/core: AWS's kernel, its time times its cores; the best of one core and two, in program "
    "order (window 0) and reordered as its compiler may (16). busiest: the engine busy the longest "
    "and its share of that time. MB: read from and written to HBM, all cores together. our us: one "
    "core, program order. roof %: our operator's bound against either time. ratio: us/core by our "
    "us; above 1 ours is faster. device: published for hardware; never divided into ours."
)


def peers_table(results: Sequence[PeerResult]) -> str:
    """Return one table per kernel of AWS's, what differs below it, and the legend."""
    blocks = []
    for group in _groups(results):
        rows = [_cells(result) for result in group]
        lines = [_title(group), *render(rows, COLUMNS), *_wrapped(_notes(group))]
        blocks.append("\n".join(lines))
    return "\n\n".join([*blocks, "\n".join(textwrap.wrap(_LEGEND, WIDTH))])


def peers_markdown(results: Sequence[PeerResult]) -> str:
    """Return one Markdown table of all comparisons, notes and legend below it."""
    columns = ("AWS's kernel", "ours", *COLUMNS)
    lines = ["| " + " | ".join(columns) + " |", "|---" * 3 + "|---:" * (len(columns) - 3) + "|"]
    lines += ["| " + " | ".join((f"`{r.peer}`", f"`{r.op}`", *_cells(r))) + " |" for r in results]
    notes = [f"- `{group[0].peer}`: {text}" for group in _groups(results) for text in _notes(group)]
    return "\n".join([*lines, "", *notes, "", _LEGEND]) + "\n"


def _groups(results: Sequence[PeerResult]) -> Iterator[list[PeerResult]]:
    key: Callable[[PeerResult], tuple[str, str, str]] = lambda r: (r.peer, r.op, r.target)  # noqa: E731
    for _, group in groupby(results, key):
        yield list(group)


def _title(group: Sequence[PeerResult]) -> str:
    first = group[0]
    label = group_label([result_of(result) for result in group])
    commit = first.commit.partition(" ")[0][:12]
    return f"{first.peer} ({commit}) beside {first.op} on {first.target} ({label})"


def _cells(result: PeerResult) -> tuple[str, ...]:
    ours = result_of(result)
    moved = (ours.hbm_read_bytes or 0) + (ours.hbm_write_bytes or 0)
    mine = (
        ("FAILED", "-", "-", "-")
        if ours.modelled_us is None
        else (
            f"{ours.modelled_us:.1f}", str(ours.limiting_engine), f"{moved / 1e6:.1f}",
            f"{ours.percent_of_roofline:.0f}",
        )
    )  # fmt: skip
    if result.us_per_core is None:
        return (result.shape, "-", "-", "-", "-", "-", "-", *mine, "-")
    theirs = (
        f"{result.us_per_core:.1f}", str(result.lnc), str(result.window),
        f"{result.limiting_engine} {result.busy_percent:.0f} %",
        f"{(result.hbm_bytes or 0) / 1e6:.1f}", f"{result.percent_of_roofline:.0f}",
    )  # fmt: skip
    return (
        result.shape, *theirs, *mine, "-" if result.ratio is None else f"{result.ratio:.2f}",
    )  # fmt: skip


def _notes(group: Sequence[PeerResult]) -> list[str]:
    """What differs, what was published, why something has no time, what the checks say."""
    notes = [f"differs: {group[0].differs}"] if group[0].differs else []
    notes += [f"{r.shape}: {r.device} (device)" for r in group if r.device]
    notes += [f"{r.shape} does not run: {r.failure}" for r in group if r.failure]
    failed = [(r.shape, result_of(r).failure) for r in group]
    notes += [f"{shape}: ours FAILED: {why}" for shape, why in failed if why]
    findings = dict.fromkeys(r.finding for r in group if r.finding)
    return notes + [f"the checks say: {finding}" for finding in findings]


def _wrapped(notes: Sequence[str]) -> list[str]:
    return [line for note in notes for line in textwrap.wrap(note, WIDTH)]
