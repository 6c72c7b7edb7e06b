"""The band of a profile: how far the uncertain numbers of the hardware can move its time."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from nki_kernels.machine.sensitivity import Effect, Sensitivity

#: An effect below this is not shown, in percent of the modelled time.
SHOWN_PERCENT = 0.1
_ROWS = 8


def percent(time: float, nominal: float) -> float:
    """Return how far a time is from the nominal one, in percent; 0 where that is 0."""
    return 100 * (time / nominal - 1) if nominal else 0.0


def band_text(band: Sensitivity) -> str:
    """Return the band, and the numbers that move the time most."""
    return "\n".join(_rows(band))


def _rows(band: Sensitivity) -> Iterator[str]:
    nominal = band.nominal_ns
    yield (
        f"Band: {band.fastest_ns / 1e3:,.2f} to {band.slowest_ns / 1e3:,.2f} us "
        f"({percent(band.fastest_ns, nominal):+.1f} to {percent(band.slowest_ns, nominal):+.1f} % "
        f"of {nominal / 1e3:,.2f}), all {len(band.effects)} uncertain numbers at their bounds"
    )
    moving = [effect for effect in band.largest if _moves(effect, nominal)]
    if not moving:
        yield f"No single one of them moves the time by {SHOWN_PERCENT} %."
        return
    yield f"  {'low %':>8}{'high %':>8}  number at its bound alone"
    for effect in moving[:_ROWS]:
        low, high = percent(effect.low_ns, nominal), percent(effect.high_ns, nominal)
        yield f"  {low:+8.1f}{high:+8.1f}  {effect.name} ({_bounds(effect)}, {effect.origin.kind})"
    if len(moving) > _ROWS:
        yield f"  and {len(moving) - _ROWS} that move it less"


def _moves(effect: Effect, nominal: float) -> bool:
    times = (effect.low_ns, effect.high_ns)
    return any(abs(percent(time, nominal)) >= SHOWN_PERCENT for time in times)


def _bounds(effect: Effect) -> str:
    low, high = effect.origin.low, effect.origin.high
    if low is None or high is None:
        return f"at most {high:g}" if low is None else f"at least {low:g}"
    return f"{low:g} to {high:g}"


def band_record(band: Sensitivity) -> dict[str, Any]:
    """Return the band as data ready for JSON; times in microseconds, the largest effect first."""
    return {
        "fastest_us": band.fastest_ns / 1e3,
        "slowest_us": band.slowest_ns / 1e3,
        "uncertain_numbers": len(band.effects),
        "effects": [
            {
                "name": effect.name,
                "kind": effect.origin.kind,
                "low": effect.origin.low,
                "high": effect.origin.high,
                "low_us": effect.low_ns / 1e3,
                "high_us": effect.high_ns / 1e3,
            }
            for effect in band.largest
        ],
    }
