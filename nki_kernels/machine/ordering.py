"""`Kernel.with_schedule`: order between named instructions beyond what the data demand.

It only adds to `Trace.orders`: a kernel means what it says in program order, so no edge changes a
value. Source: scheduling guide (NKI 0.6.0).
"""

from __future__ import annotations

from collections.abc import Iterable
from graphlib import CycleError, TopologicalSorter
from typing import Any, TypeAlias

from nki_kernels.machine.errors import KernelError
from nki_kernels.machine.handles import unordered
from nki_kernels.machine.trace import Event, Trace, where

#: (consumer, its producers), by label.
Schedule: TypeAlias = tuple[tuple[str, tuple[str, ...]], ...]


def checked(kernel: str, edges: Any) -> Schedule:
    """Return the edges of `with_schedule` in one form: (consumer, (producer, ...)).

    Raises:
        KernelError: anything but pairs of names, an instruction after itself, or a circle.
    """
    head = f"kernel {kernel!r}.with_schedule"
    wanted = 'it must be a list of ("consumer", "producer") or ("consumer", ["producer", ...])'
    if not isinstance(edges, (list, tuple)):
        raise KernelError(f"{head}: {edges!r}; {wanted}")
    found = []
    for edge in edges:
        if not isinstance(edge, (list, tuple)) or len(edge) != 2:
            raise KernelError(f"{head}: edge {edge!r}; {wanted}")
        consumer, producers = edge
        names = (producers,) if isinstance(producers, str) else producers
        if not isinstance(names, (list, tuple)) or not all(
            isinstance(name, str) for name in (consumer, *names)
        ):
            raise KernelError(f"{head}: edge {edge!r}; {wanted}")
        found.append((consumer, tuple(names)))
    circle = _circle(found)
    if circle:
        raise KernelError(
            f"{head}: {' after '.join(circle)}; no order has each after the next: remove an edge"
        )
    return tuple(found)


def _circle(edges: Iterable[tuple[str, tuple[str, ...]]]) -> list[str]:
    """Return names each of which is to run after the next, the first one again last; or nothing."""
    sorter: TopologicalSorter[str] = TopologicalSorter()
    for consumer, producers in edges:
        sorter.add(consumer, *producers)
    try:
        sorter.prepare()
    except CycleError as error:
        found: list[str] = error.args[1]
        return found[::-1]
    return []


def apply(trace: Trace, edges: Schedule) -> None:
    """Add the edges of `with_schedule` to a finished trace, on each core.

    Raises:
        KernelError: a name that no instruction has or that several have, an edge into or out of a
            device loop or against program order.
    """
    for core in range(trace.lnc):
        for consumer, producers in edges:
            second = _only(trace, core, consumer)
            for producer in producers:
                first = _only(trace, core, producer)
                problem = unordered(first, second)
                if problem:
                    raise KernelError(
                        f"with_schedule: {consumer!r} {second!r} after {producer!r} {first!r}: "
                        f"{problem}"
                    )
                trace.orders.append((first.seq, second.seq))


def _only(trace: Trace, core: int, name: str) -> Event:
    events = trace.names.get((core, name), [])
    if len(events) == 1:
        return events[0]
    if events:
        raise KernelError(
            f"with_schedule: {name!r} names {len(events)} instructions, the first two at "
            f"{where(events[0].site)} and {where(events[1].site)}; give each a name of its own: "
            'name=f"..."'
        )
    known = ", ".join(sorted(n for c, n in trace.names if c == core)) or "none"
    raise KernelError(
        f"with_schedule: no instruction of kernel {trace.kernel!r} has the name {name!r}; names "
        f"are {known}: pass name= to the instruction"
    )
