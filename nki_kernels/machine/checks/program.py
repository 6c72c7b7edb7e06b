"""What the compiler sees of a program as a whole: names of tensors, number of instructions."""

from __future__ import annotations

from collections.abc import Iterator

from nki_kernels.machine.checks.regions import describe
from nki_kernels.machine.errors import KernelError
from nki_kernels.machine.trace import Event, Tile, Trace, where


def repeated_names(trace: Trace) -> Iterator[KernelError]:
    """Yield an error for each name a kernel gives to two tensors of one core.

    The body of a device loop is one piece of program, so only its first iteration counts.
    """
    seen: dict[tuple[int, str], Tile] = {}
    said: set[tuple[int, str]] = set()
    for tile in trace.tiles:
        if tile.name == f"t{tile.id}" or tile.role == "input":
            continue
        if 0 < tile.seq <= len(trace.events) and not _written_once(trace.events[tile.seq - 1]):
            continue
        key = (tile.core, tile.name)
        first = seen.setdefault(key, tile)
        if first is tile or key in said:
            continue
        said.add(key)
        yield KernelError(
            f"nl.ndarray at {where(tile.site)}: the {describe(tile)} has the name of the "
            f"{describe(first)} allocated at {where(first.site)}; names are unique: put the loop "
            "index into it"
        )


def too_long(trace: Trace, limit: int) -> Iterator[KernelError]:
    """Yield an error for each core whose unrolled program exceeds `limit` instructions."""
    if len(trace.events) <= limit:
        return
    counts: dict[int, int] = {}
    for event in trace.events:
        if event.opcode != "loop_iteration" and _written_once(event):
            counts[event.core] = counts.get(event.core, 0) + 1
    for core, count in sorted(counts.items()):
        if count > limit:
            yield KernelError(
                f"kernel {trace.kernel!r}: core {core} has {count:,} instructions; Python loops "
                f"are unrolled, and beyond some {limit:,} compiling takes very long: use "
                "nl.fori_loop for the outer loop, or raise Options.instruction_limit"
            )


def _written_once(event: Event) -> bool:
    """Return True for the first iteration of every device loop around an event."""
    return all(iteration == 0 for _, iteration in event.loop)
