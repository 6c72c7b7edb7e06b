"""The handle of an instruction, and orders between instructions (NKI 0.7)."""

from __future__ import annotations

import enum

from nki_kernels.machine.core import current
from nki_kernels.machine.errors import RuleViolation
from nki_kernels.machine.trace import Event, where


class dependency(enum.Enum):
    """What `NkiInstruction.depends_on` asks for (NKI 0.7; the values are not published)."""

    runtime = "runtime"
    schedule = "schedule"


class NkiInstruction:
    """The handle an instruction call returns; `event` is None where nothing had to be done."""

    __slots__ = ("event",)

    def __init__(self, event: Event | None) -> None:
        self.event = event

    def __repr__(self) -> str:
        return f"NkiInstruction({self.event!r})"

    def depends_on(
        self, *producers: NkiInstruction, kind: dependency | None = None
    ) -> NkiInstruction:
        """Order this instruction after each producer; returns itself.

        Program order, in which a run executes, already keeps a producer first; runtime
        dependencies are noted in the trace (`Trace.orders`).

        Args:
            producers: handles of earlier instructions of this core, in the same device loops or in
                an enclosing scope.
            kind: of `dependency`; None (deprecated in NKI) means runtime.

        Raises:
            RuleViolation: something else, with the reason.
        """
        run = current("depends_on")
        what = f"depends_on at {where(run.kernel_site())}"
        if kind is not None and not isinstance(kind, dependency):
            raise RuleViolation(
                f"{what}: kind={kind!r}; it must be nisa.dependency.runtime or .schedule"
            )
        for producer in producers:
            if not isinstance(producer, NkiInstruction):
                raise RuleViolation(
                    f"{what}: producer {producer!r}; it must be what an instruction call returned"
                )
            first, second = producer.event, self.event
            if first is None or second is None:
                continue
            problem = unordered(first, second)
            if problem:
                raise RuleViolation(f"{what}: {second!r} after {first!r}: {problem}")
            if kind is not dependency.schedule:
                run.trace.orders.append((first.seq, second.seq))
        return self


def unordered(first: Event, second: Event) -> str:
    """Return why `second` cannot be ordered after `first`, or nothing."""
    if first.core != second.core:
        return "they run on different cores: use nisa.core_barrier"
    if first.seq >= second.seq:
        return "it comes first in program order: call depends_on of the later one"
    if second.loop[: len(first.loop)] != first.loop:
        return (
            "the producer is inside a device loop that the other is not in; an order cannot leave "
            "a loop: move one of them"
        )
    return ""
