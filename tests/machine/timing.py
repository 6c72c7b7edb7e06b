"""How far a modelled time lies from a measured one, and how far it may."""

from __future__ import annotations

#: The laws are the model's parameters: it has to give them back.
LAW = 0.01
#: Raw probe points that are not parameters themselves.
PROBE = 0.05


def error(modelled: float, expected: float) -> float:
    """Return the relative error."""
    return abs(modelled - expected) / expected
