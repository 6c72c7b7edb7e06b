"""What each uncertain number of the hardware does to a modelled time, and the band they span.

A number counts as uncertain if its origin states a low or a high bound, measured ones included.
The same trace is timed again with one number at a bound; then once with every number at its faster
bound and once with every number at its slower one.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from nki_kernels.hardware.origin import Origin
from nki_kernels.hardware.spec import CoreSpec
from nki_kernels.machine.placement import Placement
from nki_kernels.machine.scheduler import schedule
from nki_kernels.machine.trace import Trace


@dataclass(frozen=True, slots=True)
class Effect:
    """What one number does to one modelled time.

    Attributes:
        name: the number, dotted as in `CoreSpec.origins`.
        origin: where it comes from, and its bounds.
        low_ns: total with the number at its low bound; the nominal one where it has none.
        high_ns: the same at its high bound.
    """

    name: str
    origin: Origin
    low_ns: float
    high_ns: float


@dataclass(frozen=True, slots=True)
class Sensitivity:
    """Effects of all uncertain numbers on one modelled time, and its band.

    Attributes:
        nominal_ns: the modelled time.
        fastest_ns: with every number at its faster bound.
        slowest_ns: with every number at its slower bound.
        effects: by name, those that change nothing included.
    """

    nominal_ns: float
    fastest_ns: float
    slowest_ns: float
    effects: dict[str, Effect]

    @property
    def largest(self) -> list[Effect]:
        """The effects that change the time, the largest first."""

        def span(effect: Effect) -> float:
            times = (self.nominal_ns, effect.low_ns, effect.high_ns)
            return max(times) - min(times)

        moving = [e for e in self.effects.values() if span(e) > 0.0]
        return sorted(moving, key=lambda e: (-span(e), e.name))


def uncertain(spec: CoreSpec) -> dict[str, Origin]:
    """Return the numbers of a core that state a bound, by name."""
    return {
        name: origin
        for name, origin in spec.origins().items()
        if origin.low is not None or origin.high is not None
    }


def sensitivity(trace: Trace, placement: Placement | None = None) -> Sensitivity:
    """Time a trace at the bounds of every uncertain number.

    Args:
        trace: the events of one launch.
        placement: addresses, for the waits on reused memory; None leaves those out.

    Returns:
        effects and band; the band is not the sum of the effects, since waits overlap.
    """

    def total(spec: CoreSpec) -> float:
        return schedule(replace(trace, spec=spec), placement).total_ns

    nominal = total(trace.spec)
    fastest = slowest = trace.spec
    effects = {}
    for name, origin in uncertain(trace.spec).items():
        times = {}
        for bound, value in (("low", origin.low), ("high", origin.high)):
            if value is None:
                times[bound] = nominal
            else:
                times[bound] = total(trace.spec.with_bounds(name, bound))  # type: ignore[arg-type]
        effects[name] = Effect(name, origin, times["low"], times["high"])
        fast = min(times, key=lambda b: times[b])
        slow = max(times, key=lambda b: times[b])
        if times[fast] < nominal:
            fastest = fastest.with_bounds(name, fast)  # type: ignore[arg-type]
        if times[slow] > nominal:
            slowest = slowest.with_bounds(name, slow)  # type: ignore[arg-type]
    return Sensitivity(nominal, total(fastest), total(slowest), effects)
