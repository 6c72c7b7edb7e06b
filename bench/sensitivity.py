"""``python -m bench sensitivity``: which figures rest on which uncertain number of the hardware."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from bench.entries import Entry
from bench.record import SCHEMA_VERSION
from bench.table import render
from nki_kernels.machine.sensitivity import Sensitivity, sensitivity
from nki_kernels.operators.shapes import Case

#: A change of less than this is not shown, in percent of the modelled time.
SHOWN_PERCENT = 0.1


@dataclass(frozen=True, slots=True, kw_only=True)
class Band:
    """The band of one case, and what moves it.

    Attributes:
        op, shape, dtype, target: the case.
        nominal_us, fastest_us, slowest_us: the modelled time and its band.
        effects: percent of the nominal time by number: at its low bound, at its high bound.
    """

    op: str
    shape: str
    dtype: str
    target: str
    nominal_us: float
    fastest_us: float
    slowest_us: float
    effects: dict[str, tuple[float, float]]
    source: str = "model"
    schema_version: int = SCHEMA_VERSION


def measure_band(entry: Entry, case: Case, dtype: str, target: str) -> Band:
    """Time a case at the bounds of every uncertain number, from shapes only."""
    inputs = entry.shapes_only(case.axes, dtype)
    run = entry.op.launch(inputs, entry.op.options_of(case.axes), target=target)
    found: Sensitivity = sensitivity(run.trace, run.placement)
    nominal = found.nominal_ns
    return Band(
        op=entry.op.name,
        shape=case.name,
        dtype=dtype,
        target=target,
        nominal_us=nominal / 1e3,
        fastest_us=found.fastest_ns / 1e3,
        slowest_us=found.slowest_ns / 1e3,
        effects={
            e.name: (100 * (e.low_ns / nominal - 1), 100 * (e.high_ns / nominal - 1))
            for e in found.largest
        },
    )


def sensitivity_table(bands: Sequence[Band]) -> str:
    """Return the bands, then per number what it does to each case."""
    rows = [
        (
            f"[{i}] {b.op} {b.shape} {b.dtype}",
            f"{b.nominal_us:.1f}",
            f"{b.fastest_us:.1f}",
            f"{b.slowest_us:.1f}",
            f"{100 * (b.fastest_us / b.nominal_us - 1):+.1f}",
            f"{100 * (b.slowest_us / b.nominal_us - 1):+.1f}",
        )
        for i, b in enumerate(bands, 1)
    ]
    lines = ["modelled time and its band (model, unvalidated), all uncertain numbers together"]
    header = ("case", "us", "fastest", "slowest", "%", "%")
    lines += render(rows, header, left=1)
    names = {name for b in bands for name, e in b.effects.items() if _shown(e)}
    weight = {n: max(_span(b.effects.get(n, (0.0, 0.0))) for b in bands) for n in names}
    effects: list[tuple[str, ...]] = [
        (name, *(_cell(b.effects.get(name, (0.0, 0.0))) for b in bands))
        for name in sorted(names, key=lambda n: (-weight[n], n))
    ]
    lines += ["", "percent of the time with one number at its low / high bound"]
    lines += render(effects, ("number", *(f"[{i}]" for i in range(1, len(bands) + 1))), left=1)
    lines += [f"left out: changes below {SHOWN_PERCENT} %"]
    return "\n".join(lines)


def _span(effect: tuple[float, float]) -> float:
    return max(0.0, *effect) - min(0.0, *effect)


def _shown(effect: tuple[float, float]) -> bool:
    return _span(effect) >= SHOWN_PERCENT


def _cell(effect: tuple[float, float]) -> str:
    return " / ".join(f"{e:+.1f}" for e in effect) if _shown(effect) else "."
