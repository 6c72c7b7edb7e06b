"""``python -m bench report RESULTS.json``: one self-contained page, or a picture of it.

A roofline with every case, percent of the roof by operator and shape, what limits the cases, and
the modelled times of earlier commits. Figures are drawn by matplotlib and stand in the page as SVG.
"""

from __future__ import annotations

import html
import io
import json
import math
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from bench.goldens import FILE
from bench.record import ROOT, BenchError, Result
from bench.table import COLUMNS, group_label, grouped, result_row
from nki_kernels.hardware import spec_for

#: Commits of `goldens.json` that the history shows at most.
_COMMITS = 60
_STYLE = """
body { font: 15px/1.45 system-ui, sans-serif; margin: 2rem auto; max-width: 76rem; padding: 0 1rem;
       color: #1b1b1f; background: #fff }
h1 { font-size: 1.5rem } h2 { font-size: 1.15rem; margin-top: 2.2rem }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; font-size: 13px }
th, td { padding: .15rem .6rem; border-bottom: 1px solid #e3e3e8; text-align: left }
td:nth-child(n+5):not(:nth-child(6)) { text-align: right }
.bad { color: #b3261e; font-weight: 600 } .note { color: #55555e }
svg { max-width: 100%; height: auto }
"""


def plotting() -> Any:
    """Return matplotlib's pyplot, drawing without a screen.

    Raises:
        BenchError: matplotlib is not installed.
    """
    try:
        import matplotlib
    except ModuleNotFoundError:
        raise BenchError(
            "the report needs the package matplotlib; install the extra with pip install '.[bench]'"
        ) from None
    matplotlib.use("Agg")
    # Text stays text, and the same figures give the same bytes.
    matplotlib.rcParams.update({"svg.fonttype": "none", "svg.hashsalt": "bench", "font.size": 9})
    from matplotlib import pyplot

    return pyplot


def timed(results: Sequence[Result]) -> list[Result]:
    """Return the results that have a time.

    Raises:
        BenchError: none has.
    """
    found = [r for r in results if r.modelled_us is not None]
    if not found:
        raise BenchError("the files hold no timed case; name files of 'python -m bench run --json'")
    return found


def draw_roofline(axes: Any, results: Sequence[Result]) -> None:
    """Draw FLOP rate against FLOPs per compulsory byte, with the roofs, for one target."""
    spec = spec_for(results[0].target)
    points = [r for r in results if r.flops > 0]
    intensities = [r.flops / r.min_hbm_bytes for r in points] or [1.0]
    low, high = min(intensities) / 2, max(intensities) * 2
    for dtype in dict.fromkeys(r.dtype for r in results):
        peak = spec.peak_tflops(dtype)
        knee = peak * 1e3 / spec.hbm_bytes_per_ns
        roof = [(x, min(peak, x * spec.hbm_bytes_per_ns / 1e3)) for x in (low, knee, high)]
        roof = sorted(p for p in roof if low <= p[0] <= high)
        axes.plot(*zip(*roof, strict=True), color="0.3", linewidth=1)
        axes.annotate(f"{dtype} {peak:.1f} TFLOP/s", (high, peak), ha="right", va="bottom")
    for number, op in enumerate(dict.fromkeys(r.op for r in points)):
        mine = [r for r in points if r.op == op]
        colour, marker = f"C{number % 10}", "os^Dv"[number // 10 % 5]
        axes.scatter(
            [r.flops / r.min_hbm_bytes for r in mine],
            [r.flops / (r.modelled_us or math.inf) / 1e6 for r in mine],
            s=18, alpha=0.8, label=op, color=colour, marker=marker,
        )  # fmt: skip
    axes.set(xscale="log", yscale="log", xlabel="useful FLOPs per compulsory byte")
    axes.set_ylabel("TFLOP/s (modelled)")
    axes.set_title(f"{results[0].target}: roofline ({group_label(results)})")
    axes.grid(alpha=0.25)
    axes.legend(fontsize=7, loc="lower right", ncols=2)


def draw_heat(axes: Any, results: Sequence[Result]) -> None:
    """Draw percent of the roof by operator and shape, one row per operator, for one target."""
    operators = list(dict.fromkeys(r.op for r in results))
    columns = max(sum(r.op == op for r in results) for op in operators)
    grid = [[math.nan] * columns for _ in operators]
    for row, op in enumerate(operators):
        shares = sorted((r.percent_of_roofline or 0.0 for r in results if r.op == op), reverse=True)
        grid[row][: len(shares)] = shares
    image = axes.imshow(grid, aspect="auto", vmin=0, vmax=100, cmap="viridis")
    for row, shares in enumerate(grid):
        for column, share in enumerate(shares):
            if not math.isnan(share) and columns <= 40:
                colour = "white" if share < 60 else "black"
                axes.text(column, row, f"{share:.0f}", ha="center", va="center", fontsize=6,
                          color=colour)  # fmt: skip
    axes.set_yticks(range(len(operators)), operators)
    axes.set_xticks([])
    axes.set_xlabel("shapes, best first")
    axes.set_title(f"{results[0].target}: percent of the roof ({group_label(results)})")
    axes.figure.colorbar(image, ax=axes, shrink=0.8)


def draw_history(axes: Any, history: Sequence[tuple[str, dict[str, float]]]) -> None:
    """Draw each checked-in modelled time over commits, against its last one."""
    last = history[-1][1]
    for name in last:
        points = [(i, f[name] / last[name]) for i, (_, f) in enumerate(history) if name in f]
        axes.plot(*zip(*points, strict=True), linewidth=0.8, alpha=0.6)
    axes.set_xticks(range(len(history)), [label for label, _ in history], rotation=60, fontsize=6)
    axes.set_ylabel("modelled time / that of now")
    axes.set_title("checked-in modelled times by commit (model, unvalidated)")
    axes.grid(alpha=0.25)


def history_of(path: Path = FILE) -> list[tuple[str, dict[str, float]]]:
    """Return (commit, ns by case) of the checked-in times, oldest first; empty without git."""
    name = path.relative_to(ROOT).as_posix()
    listed = _git("log", f"-{_COMMITS}", "--format=%h", "--", name)
    found = []
    for commit in reversed(listed.split()):
        try:
            figures = json.loads(_git("show", f"{commit}:{name}"))["figures"]
            found.append((commit, {case: float(f["ns"]) for case, f in figures.items()}))
        except (ValueError, KeyError, TypeError):
            continue  # a commit that held something else
    return found


def _git(*arguments: str) -> str:
    try:
        command = ["git", "-C", str(ROOT), *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout
    except (OSError, subprocess.CalledProcessError):
        return ""


def figures_of(results: Sequence[Result]) -> list[Any]:
    """Return one figure per target with roofline and heat map."""
    pyplot = plotting()
    figures = []
    for target in dict.fromkeys(r.target for r in results):
        mine = [r for r in results if r.target == target]
        rows = len({r.op for r in mine})
        size = (13, max(4.2, 1.2 + 0.3 * rows))
        figure, (left, right) = pyplot.subplots(1, 2, figsize=size, layout="constrained")
        draw_roofline(left, mine)
        draw_heat(right, mine)
        figures.append(figure)
    return figures


def svg_of(figure: Any) -> str:
    """Return a figure as an SVG element."""
    text = io.StringIO()
    figure.savefig(text, format="svg", metadata={"Date": None})
    return text.getvalue()[text.getvalue().index("<svg") :]


def png_of(results: Sequence[Result]) -> bytes:
    """Return roofline and heat map of the first target as a PNG."""
    image = io.BytesIO()
    figures_of(timed(results))[0].savefig(image, format="png", dpi=110)
    plotting().close("all")
    return image.getvalue()


def page_of(results: Sequence[Result]) -> str:
    """Return the page: figures, then every case in a table; it needs no other file."""
    parts = [svg_of(figure) for figure in figures_of(timed(results))]
    history = history_of()
    if len(history) > 1:
        figure, axes = plotting().subplots(figsize=(13, 4), layout="constrained")
        draw_history(axes, history)
        parts += ["<h2>History</h2>", svg_of(figure)]
    plotting().close("all")
    for (op, target), group in grouped(results).items():
        parts.append(f"<h2>{html.escape(op)} on {target} ({group_label(group)})</h2>")
        parts.append(_table(group))
    commits = ", ".join(dict.fromkeys(r.git_sha[:12] for r in results))
    note = (
        f"{len(results)} cases, of commit {html.escape(commits)}. Modelled times: nominal "
        "parameters, one core, kernel start and end included. Percent of roof: the larger of the "
        "FLOP and the HBM-byte bound, against the modelled time."
    )
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        f"<title>nki-kernels: benchmarks</title><style>{_STYLE}</style></head><body>\n"
        f"<h1>Benchmarks of nki-kernels</h1>\n<p class=note>{note}</p>\n"
        + "\n".join(parts)
        + "\n</body></html>\n"
    )


def _table(group: Sequence[Result]) -> str:
    head = "".join(f"<th>{name}</th>" for name in COLUMNS)
    rows = []
    for result in group:
        cells = "".join(f"<td>{html.escape(cell)}</td>" for cell in result_row(result))
        rows.append(f"<tr{'' if result.correct else ' class=bad'}>{cells}</tr>")
        if result.failure:
            rows.append(f"<tr class=bad><td colspan=8>{html.escape(result.failure)}</td></tr>")
    return f"<table><tr>{head}</tr>\n" + "\n".join(rows) + "</table>"
