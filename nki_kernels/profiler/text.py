"""The report: what `print(profile)` shows."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from nki_kernels.profiler.gaps import busiest
from nki_kernels.profiler.occupancy import residents

if TYPE_CHECKING:
    from nki_kernels.profiler.session import Profile

_GAPS, _LINES, _TILES = 5, 12, 4
_WIDTH = 100


def text(profile: Profile) -> str:
    """Return the report: verdict and advice, figures, idle gaps, lines, memory."""
    parts = [_head(profile), _advice(profile), _figures(profile)]
    if len(profile.trace):
        parts += [_gaps(profile), _lines(profile), _memory(profile)]
    return "\n\n".join("\n".join(part) for part in parts)


def _head(profile: Profile) -> Iterator[str]:
    yield f"{profile.trace.kernel} on {profile.trace.spec.name} ({profile.label})"
    yield profile.verdict


def _advice(profile: Profile) -> Iterator[str]:
    if not profile.advice:
        yield "No performance fault found of those this profiler knows."
        return
    yield "What to change first (and the share of the time at stake)"
    for number, advice in enumerate(profile.advice, 1):
        yield f"  {number}. {advice.name} ({advice.at_stake_percent:.0f} %)"
        yield from _wrapped(advice.text, 5)


def _wrapped(words: str, indent: int) -> Iterator[str]:
    line = " " * indent
    for word in words.split():
        if len(line) + len(word) >= _WIDTH:
            yield line.rstrip()
            line = " " * indent
        line += word + " "
    yield line.rstrip()


def shown(value: Any) -> str:
    """Return a figure as the report prints it."""
    if isinstance(value, float):
        return f"{value:,.2f}"
    return f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) else str(value)


def _figures(profile: Profile) -> Iterator[str]:
    for name, value in profile.summary().items():
        yield f"  {name:<40}{shown(value):>20}"


def describe(profile: Profile, number: int) -> str:
    """Return ``opcode #n at file:line`` of an event."""
    event = profile.trace.events[number]
    frame = profile.case.sites.frames[profile.case.sites.innermost[number]]
    name = frame.file.replace("\\", "/").rpartition("/")[2]
    return f"{event.opcode} #{number} on {event.engine.name} at {name}:{frame.line}"


def _gaps(profile: Profile) -> Iterator[str]:
    engine, core = busiest(profile.timeline)
    idle = sum(gap.end - gap.start for gap in profile.gaps)
    where = f" of core {core}" if profile.trace.lnc > 1 else ""
    yield (
        f"Idle gaps of the busiest engine, {engine.name}{where} "
        f"({idle / 1e3:,.2f} us in {len(profile.gaps):,})"
    )
    for gap in profile.gaps[:_GAPS]:
        what = f"{gap.reason} {describe(profile, gap.waited_for)}" if gap.waited_for >= 0 else (
            gap.reason
        )  # fmt: skip
        yield f"  {(gap.end - gap.start) / 1e3:8.2f} us at {gap.start / 1e3:10.2f}  {what}"


def _lines(profile: Profile) -> Iterator[str]:
    yield "Lines, by time on the critical path"
    yield f"  {'path us':>10}{'engine us':>11}{'MiB':>9}{'count':>9}  line"
    issuing = [line for line in profile.lines if line.instructions]
    for line in issuing[:_LINES]:
        yield (
            f"  {line.path_ns / 1e3:10.2f}{line.self_ns / 1e3:11.2f}{line.nbytes / 2**20:9.2f}"
            f"{line.instructions:9,}  {line.place:<18} {line.text}"
        )[: _WIDTH + 20]
    if len(issuing) > _LINES:
        yield f"  and {len(issuing) - _LINES} more"


def _memory(profile: Profile) -> Iterator[str]:
    yield "Memory in use at once (model), and what lives at the peak"
    for curve in profile.curves:
        where = f" of core {curve.core}" if profile.trace.lnc > 1 else ""
        yield (
            f"  {curve.memory.upper()}{where}: {curve.peak:,} of {curve.capacity:,} {curve.unit} "
            f"at {curve.peak_ns / 1e3:,.2f} us"
        )
        found = residents(profile.trace, curve, profile.spans, profile.case.sites)
        for tile in found[:_TILES]:
            frame = profile.case.sites.frames[tile.place]
            name = frame.file.replace("\\", "/").rpartition("/")[2]
            yield (
                f"    {tile.tiles:4} x {tile.each:>7,}  {list(tile.shape)} {tile.dtype} "
                f"{tile.name} at {name}:{frame.line}"
            )
        if len(found) > _TILES:
            yield f"    and {len(found) - _TILES} more lines"
