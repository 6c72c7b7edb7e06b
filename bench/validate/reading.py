"""One comparison of the model with a published measurement, and the rank of a ladder of them."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Literal, TypeAlias

#: What the measurement did for the model. "parameter": a number of the model was read off this very
#: measurement, so agreement proves only the code; "partly": off one of its features, or off other
#: points of its kind; "held out": nothing was taken from it.
Use: TypeAlias = Literal["held out", "partly", "parameter"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Reading:
    """A modelled figure beside the published one.

    Attributes:
        part: "laws" (consistency), "probes" (isolated instructions), "kernels" (whole kernels) or
            "trn1" (whole kernels on the first generation, whose numbers are mostly documents').
        id: the measurement's name.
        what: what was measured.
        unit: of every figure here.
        measured: published hardware figure; the middle where a range was published.
        source: where it was published.
        modelled: by the timing model.
        roofline: max(FLOPs / peak, HBM bytes / rate); None where it says nothing.
        documented: the longest engine's sum of AWS's documented formulas; None as well.
        use: whether the model's numbers rest on this measurement.
        ladder: versions of one thing, whose order is judged; "" for none.
        ranked_only: the kernel is not the measured one, so only its order means something.
        limit_percent: the error allowed; None for a figure that is only shown.
        cause: suspected cause of an error beyond the limit, or what to know of the figure.
        error_percent: signed error of the model against the measurement.
        missed: whether that is beyond the limit.
    """

    part: Literal["laws", "probes", "kernels", "trn1"]
    id: str
    what: str
    unit: Literal["ns", "us", "%"]
    measured: float
    source: str
    modelled: float
    roofline: float | None = None
    documented: float | None = None
    use: Use = "held out"
    ladder: str = ""
    ranked_only: bool = False
    limit_percent: float | None = None
    cause: str = ""

    error_percent: float = field(init=False)
    missed: bool = field(init=False)

    def __post_init__(self) -> None:
        error = error_percent(self.modelled, self.measured)
        object.__setattr__(self, "error_percent", error)
        missed = self.limit_percent is not None and abs(error) > self.limit_percent
        object.__setattr__(self, "missed", missed)


@dataclass(frozen=True, slots=True, kw_only=True)
class Ladder:
    """Spearman's rank correlation with the measured order; None where all values are equal."""

    name: str
    rungs: int
    model: float | None
    roofline: float | None
    documented: float | None
    part: Literal["ladders"] = "ladders"


def error_percent(found: float, measured: float) -> float:
    """Return 100 (found - measured) / measured."""
    return 100.0 * (found - measured) / measured


def ladders(readings: Iterable[Reading]) -> list[Ladder]:
    """Return the rank correlation of each ladder, for the model and for both baselines."""
    groups: dict[str, list[Reading]] = {}
    for reading in readings:
        if reading.ladder:
            groups.setdefault(reading.ladder, []).append(reading)
    return [_ladder(name, group) for name, group in groups.items()]


def _ladder(name: str, group: Sequence[Reading]) -> Ladder:
    measured = [r.measured for r in group]

    def rank(values: list[float | None]) -> float | None:
        known = [v for v in values if v is not None]
        return spearman(known, measured) if len(known) == len(measured) else None

    return Ladder(
        name=name,
        rungs=len(group),
        model=rank([r.modelled for r in group]),
        roofline=rank([r.roofline for r in group]),
        documented=rank([r.documented for r in group]),
    )


def spearman(a: Sequence[float], b: Sequence[float]) -> float | None:
    """Return Spearman's rank correlation: Pearson's of the ranks, ties sharing their mean rank.

    Args:
        a: values.
        b: as many values.

    Returns:
        -1 to 1; None where either is constant, for then there is no order to compare.

    Raises:
        ValueError: the lengths differ, or there are fewer than two values.
    """
    if len(a) != len(b) or len(a) < 2:
        raise ValueError(
            f"spearman: {len(a)} and {len(b)} values; it takes two sequences of one length, at "
            "least 2: pair the values first"
        )
    x, y = _ranks(a), _ranks(b)
    mean = (len(a) + 1) / 2
    cross = sum((i - mean) * (j - mean) for i, j in zip(x, y, strict=True))
    spread = sum((i - mean) ** 2 for i in x) * sum((j - mean) ** 2 for j in y)
    return cross / spread**0.5 if spread else None


def _ranks(values: Sequence[float]) -> list[float]:
    order = sorted(values)
    return [order.index(v) + (order.count(v) + 1) / 2 for v in values]
