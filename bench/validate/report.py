"""The readings as plain text, at most 100 columns wide."""

from __future__ import annotations

import textwrap
from collections.abc import Iterable, Sequence

from bench.table import WIDTH, render
from bench.validate.reading import Ladder, Reading, ladders

_HEADER = ("measurement", "unit", "hardware", "model", "error %", "roofline", "documents", "use")
_USES = {"held out": "", "partly": "~", "parameter": "="}


def report(readings: Sequence[Reading]) -> str:
    """Return laws in summary, probes and kernels in full, ladders, and the misses with causes."""
    blocks = [
        _laws([r for r in readings if r.part == "laws"]),
        _table("Isolated probes", [r for r in readings if r.part == "probes"]),
        _table("Kernels and transfers", [r for r in readings if r.part == "kernels"]),
        _table("Tutorials", [r for r in readings if r.part == "trn1"], "trn1"),
        _ladders(ladders(readings)),
        _misses([r for r in readings if r.missed]),
        _summary([r for r in readings if r.part != "laws"]),
        "\n".join(_legend()),
    ]
    return "\n\n".join(block for block in blocks if block)


def _laws(readings: Sequence[Reading]) -> str:
    if not readings:
        return ""
    within = [r for r in readings if not r.missed]
    worst = max(abs(r.error_percent) for r in within) if within else 0.0
    return "\n".join(
        textwrap.wrap(
            f"Instruction laws (consistency): {len(within)} of {len(readings)} measured laws come "
            f"back from real kernels within {readings[0].limit_percent:g} %, the worst of these "
            f"{worst:.2f} % off, at the worst of three sizes of their domain.",
            WIDTH,
        )
    )


def _table(title: str, readings: Sequence[Reading], target: str = "trn2") -> str:
    if not readings:
        return ""
    rows = [_row(reading) for reading in readings]
    return "\n".join(
        [f"{title}: model against hardware (published), {target}", *render(rows, _HEADER)]
    )


def _row(reading: Reading) -> tuple[str, ...]:
    mark = "*" if reading.ranked_only else "!" if reading.missed else " "
    return (
        f"{reading.id} {reading.what}",
        reading.unit,
        _number(reading.measured),
        _number(reading.modelled),
        f"{reading.error_percent:+.1f}{mark}",
        _number(reading.roofline),
        _number(reading.documented),
        _USES[reading.use],
    )


def _number(value: float | None) -> str:
    if value is None:
        return "-"
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"


def _ladders(found: Sequence[Ladder]) -> str:
    if not found:
        return ""

    def rank(value: float | None) -> str:
        return "none" if value is None else f"{value:.2f}"

    rows = [
        (item.name, str(item.rungs), rank(item.model), rank(item.roofline), rank(item.documented))
        for item in found
    ]
    header = ("Rank correlation with hardware", "rungs", "model", "roofline", "documents")
    return "\n".join(render(rows, header))


def _misses(readings: Iterable[Reading]) -> str:
    causes: dict[str, list[str]] = {}
    for reading in readings:
        label = f"{reading.id} {reading.what.strip()} {reading.error_percent:+.1f} %"
        causes.setdefault(reading.cause or "unknown", []).append(label)
    lines = []
    for cause, labels in causes.items():
        lines += textwrap.wrap("; ".join(labels), WIDTH)
        lines += textwrap.wrap(cause, WIDTH, initial_indent="    ", subsequent_indent="    ")
    return "\n".join(["Beyond their limit, and the suspected cause", *lines]) if lines else ""


def _summary(readings: Sequence[Reading]) -> str:
    rows = []
    for use in _USES:
        judged = [r for r in readings if r.use == use and r.limit_percent is not None]
        if judged:
            errors = sorted(abs(r.error_percent) for r in judged)
            rows.append(
                (
                    use,
                    str(len(judged)),
                    str(sum(not r.missed for r in judged)),
                    f"{errors[len(errors) // 2]:.1f}",
                    f"{errors[-1]:.1f}",
                )
            )
    header = ("figures by use", "count", "within", "median error %", "largest error %")
    return "\n".join(render(rows, header)) if rows else ""


def _legend() -> list[str]:
    text = (
        "use: '=' a parameter of the model was read off this measurement, so agreement proves only "
        "the code; '~' partly; none: held out. error: '!' beyond the limit (laws 1 %, probes 5 %, "
        "kernels one resource limits 8 %, others 15 %); '*' another kernel than the measured one, "
        "only its order counts. roofline: max(FLOPs / peak, HBM bytes / rate). documents: AWS's "
        "formulas summed per engine, longest engine; both without the kernel's start and end. "
        "Nothing is fitted to a whole kernel."
    )
    return textwrap.wrap(text, WIDTH)


def markdown(readings: Sequence[Reading]) -> str:
    """Return the summary the README shows: whole kernels, then counts of everything."""
    lines = [
        "| whole kernel, published for trn2 | hardware µs | model µs | error % |",
        "|---|---:|---:|---:|",
    ]
    shown = [
        r
        for r in readings
        if r.part == "kernels" and r.ladder and r.unit == "us" and not r.ranked_only
    ]
    lines += [
        f"| {r.id} {r.what} | {_number(r.measured)} | {_number(r.modelled)} "
        f"| {r.error_percent:+.1f} |"
        for r in shown
    ]
    lines.append("")
    for use, name in (
        ("parameter", "read off by the model"),
        ("partly", "partly"),
        ("held out", "held out"),
    ):
        judged = [
            r for r in readings if r.part != "laws" and r.use == use and r.limit_percent is not None
        ]
        if judged:
            errors = sorted(abs(r.error_percent) for r in judged)
            within = sum(not r.missed for r in judged)
            lines.append(
                f"- {name}: {within} of {len(judged)} figures within their limit, median error "
                f"{errors[len(errors) // 2]:.1f} %"
            )
    return "\n".join(lines)
