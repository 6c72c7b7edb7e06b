"""What changed between two profiles: time, figures, lines and advice."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

from nki_kernels.machine.errors import OptionError
from nki_kernels.profiler.record import SCHEMA_VERSION
from nki_kernels.profiler.text import shown

if TYPE_CHECKING:
    from nki_kernels.profiler.session import Profile

#: A profile, its record, or the path of a record that `Profile.save` wrote.
Source: TypeAlias = "Profile | Mapping[str, Any] | str | Path"
_LINES = 10
_SAME_US = 1e-6


@dataclass(frozen=True, slots=True)
class Diff:
    """Two profiles side by side; print it.

    Attributes:
        old: record of the first.
        new: record of the second.
        figures: (old, new) of every figure of the summary that differs, by name.
        lines: (old, new) critical-path time in us of every kernel line that differs, by function
            and text, since an edit moves the numbers; the largest change first.
        fixed: names of the advice that is gone.
        introduced: names of the advice that is new.
    """

    old: dict[str, Any]
    new: dict[str, Any]
    figures: dict[str, tuple[Any, Any]]
    lines: dict[str, tuple[float, float]]
    fixed: tuple[str, ...]
    introduced: tuple[str, ...]

    @property
    def speedup(self) -> float:
        """Total time of the old profile over that of the new one."""
        return float(self.old["summary"]["total_time_us"] / self.new["summary"]["total_time_us"])

    def __str__(self) -> str:
        old, new = self.old, self.new
        times = [r["summary"]["total_time_us"] for r in (old, new)]
        rows = [
            f"{_name(old)} -> {_name(new)} ({new['label']})",
            f"{times[0]:,.2f} us -> {times[1]:,.2f} us: {self.speedup:.3f} times as fast",
        ]
        if old["target"] != new["target"]:
            rows.append("The targets differ: the change is not the kernel's alone.")
        rows += [f"gone: {name}" for name in self.fixed]
        rows += [f"new:  {name}" for name in self.introduced]
        rows.append("Figures that differ")
        for name, (before, after) in self.figures.items():
            rows.append(f"  {name:<40}{shown(before):>18}{shown(after):>18}")
        rows.append("Lines that differ, us on the critical path")
        for name, (was, now) in list(self.lines.items())[:_LINES]:
            rows.append(f"  {was:10.2f} -> {now:10.2f}  {name}")
        return "\n".join(rows)


def _name(record: dict[str, Any]) -> str:
    return f"{record['kernel']} on {record['target']}"


def diff(old: Source, new: Source) -> Diff:
    """Return what changed from one profile to another.

    Args:
        old: a `Profile`, its `record()`, or the path of a saved ``*.json``.
        new: the same.

    Raises:
        OptionError: a file that cannot be read or is no profile of this schema.
    """
    before, after = _record(old), _record(new)
    figures = {
        name: (before["summary"].get(name), value)
        for name, value in after["summary"].items()
        if before["summary"].get(name) != value
    }
    names = [{a["name"] for a in r["advice"]} for r in (before, after)]
    return Diff(
        old=before,
        new=after,
        figures=figures,
        lines=_lines(before, after),
        fixed=tuple(sorted(names[0] - names[1])),
        introduced=tuple(sorted(names[1] - names[0])),
    )


def _lines(old: dict[str, Any], new: dict[str, Any]) -> dict[str, tuple[float, float]]:
    """Match lines by their text within a function, since an edit moves the numbers."""
    sums: list[dict[tuple[str, str], float]] = [{}, {}]
    for total, record in zip(sums, (old, new), strict=True):
        for line in record["lines"]:
            key = line["function"], line["text"]
            total[key] = total.get(key, 0.0) + line["path_us"]
    changes = {
        f"{function}: {text}": (
            sums[0].get((function, text), 0.0),
            sums[1].get((function, text), 0.0),
        )
        for function, text in sums[0] | sums[1]
    }
    # To the picosecond: the same time summed from another start is another float.
    differing = {name: pair for name, pair in changes.items() if abs(pair[1] - pair[0]) >= _SAME_US}
    return dict(
        sorted(differing.items(), key=lambda item: (-abs(item[1][1] - item[1][0]), item[0]))
    )


def _record(source: Source) -> dict[str, Any]:
    if isinstance(source, Mapping):
        found: Any = dict(source)
    elif isinstance(source, str | Path):
        try:
            found = json.loads(Path(source).read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise OptionError(
                f"diff: {str(source)!r} cannot be read as a profile: {error}; pass the JSON that "
                "Profile.save('x.json') or `profile --output x.json` wrote"
            ) from error
    else:
        found = source.record()
    version = found.get("schema_version") if isinstance(found, dict) else None
    if version != SCHEMA_VERSION or "summary" not in found:
        raise OptionError(
            f"diff: {source if isinstance(source, str | Path) else 'a record'!s} has "
            f"schema_version {version!r}; allowed is {SCHEMA_VERSION}: profile the kernel again"
        )
    return dict(found)
