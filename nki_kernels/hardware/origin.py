"""Where a hardware number comes from, stated at the value itself.

A spec is built from ``documented(2.4, "...")``, ``measured(...)`` and ``estimated(...)``. The
fields then hold plain numbers, and `Sourced.origins` gives back the provenance of each by name.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any, Literal, Self, TypeVar, cast

T = TypeVar("T")
Kind = Literal["documented", "measured", "estimated"]
Bound = Literal["low", "high"]


@dataclass(frozen=True, slots=True)
class Origin:
    """Provenance of one number.

    Attributes:
        kind: "documented" (vendor), "measured" (isolated probe on hardware) or "estimated".
        source: document, data set, or the reason for the estimate.
        low: smallest plausible value, in the unit of the field; None when nothing better is known.
        high: largest plausible value.
    """

    kind: Kind
    source: str
    low: float | None = None
    high: float | None = None


class _Stated:
    """A value with its origin, on its way into a field of a `Sourced` record."""

    __slots__ = ("origin", "value")

    def __init__(self, value: Any, origin: Origin) -> None:
        self.value = value
        self.origin = origin


def _state(value: T, origin: Origin) -> T:
    # The type of the value itself: fields declare plain numbers and hold plain numbers.
    return cast("T", _Stated(value, origin))


def documented(value: T, source: str, *, low: float | None = None, high: float | None = None) -> T:
    """State a number the vendor published, and where."""
    return _state(value, Origin("documented", source, low, high))


def measured(value: T, source: str, *, low: float | None = None, high: float | None = None) -> T:
    """State a number from an isolated measurement on hardware, and whose."""
    return _state(value, Origin("measured", source, low, high))


def estimated(value: T, why: str, *, low: float | None = None, high: float | None = None) -> T:
    """State a guess, the reason for it, and the range it may lie in."""
    return _state(value, Origin("estimated", why, low, high))


@dataclass(frozen=True, kw_only=True, eq=False)
class Sourced:
    """Base of the spec records: every number must arrive with its origin.

    Instances compare and hash by identity, so they are cheap keys of a memo.

    Raises:
        TypeError: a numeric field was given without documented(), measured() or estimated().
    """

    def __post_init__(self) -> None:
        origins: dict[str, Origin] = {}
        for f in fields(self):
            value = getattr(self, f.name)
            if isinstance(value, _Stated):
                origins[f.name] = value.origin
                object.__setattr__(self, f.name, value.value)
            elif isinstance(value, Sourced):
                for name, origin in value.origins().items():
                    origins[f"{f.name}.{name}"] = origin
            elif isinstance(value, (int, float, tuple)) and not isinstance(value, bool):
                raise TypeError(
                    f"{type(self).__name__}.{f.name}={value!r} has no origin; "
                    "wrap it in documented(), measured() or estimated()"
                )
        object.__setattr__(self, "_origins", origins)

    def origins(self) -> dict[str, Origin]:
        """Return the origin of every number, by dotted field name."""
        found: dict[str, Origin] = self.__dict__["_origins"]
        return dict(found)

    def derive(self, **changes: Any) -> Self:
        """Return a copy with some fields changed; the others keep value and origin.

        Raises:
            TypeError: an unknown field, or a number without an origin.
        """
        values: dict[str, Any] = {}
        origins = self.origins()
        for f in fields(self):
            value = getattr(self, f.name)
            values[f.name] = _Stated(value, origins[f.name]) if f.name in origins else value
        return type(self)(**{**values, **changes})

    def as_estimates(self, why: str) -> Self:
        """Return a copy in which every measured number is an estimate: another core's, borrowed."""
        values: dict[str, Any] = {}
        for f in fields(self):
            value = getattr(self, f.name)
            origin = self.origins().get(f.name)
            if isinstance(value, Sourced):
                values[f.name] = value.as_estimates(why)
            elif origin is not None and origin.kind == "measured":
                source = f"{why}: {origin.source}"
                values[f.name] = _Stated(
                    value, Origin("estimated", source, origin.low, origin.high)
                )
        return self.derive(**values)

    def with_bounds(self, name: str, bound: Bound) -> Self:
        """Return a copy in which the number `name` (dotted) takes its low or high bound.

        Raises:
            KeyError: no such number.
            ValueError: the number has no such bound.
        """
        origin = self.origins().get(name)
        if origin is None:
            raise KeyError(f"{type(self).__name__} has no number {name!r}; see origins()")
        value = origin.low if bound == "low" else origin.high
        if value is None:
            raise ValueError(f"{name} ({origin.kind}: {origin.source}) states no {bound} bound")
        return self._set(name, _Stated(value, origin))

    def _set(self, name: str, stated: _Stated) -> Self:
        head, _, rest = name.partition(".")
        if not rest:
            return self.derive(**{head: stated})
        part: Sourced = getattr(self, head)
        return self.derive(**{head: part._set(rest, stated)})
