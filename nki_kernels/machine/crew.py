"""Threads of which one runs at a time, so that a run with several cores repeats.

A member runs until it waits for the others or ends; then the next one whose wait is over goes on,
in cyclic order. Nothing else switches, so the order of all events is a function of the kernel. When
nobody can go on, the member that notices raises, and all others are unwound: a launch never hangs.
"""

from __future__ import annotations

import contextvars
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

from nki_kernels.machine.errors import KernelError

T = TypeVar("T")


class _Unwound(BaseException):
    """Ends a member whose crew has failed; no kernel's ``except Exception`` holds it."""


def first(able: Sequence[int]) -> int:
    """Return the member that goes on, of those that can: the first in cyclic order."""
    return able[0]


class Crew:
    """A fixed number of members that take turns.

    Args:
        names: what errors call each member, "core 0".
        ended: what errors say of a member whose job is done.
    """

    def __init__(self, names: Sequence[str], ended: Callable[[int], str]) -> None:
        self._names = names
        self._ended_says = ended
        size = len(names)
        self._turns = [threading.Semaphore(0) for _ in range(size)]
        self._until: list[Callable[[], bool] | None] = [None] * size
        self._says = [""] * size
        self._ended: set[int] = set()
        self._failed: int | None = None

    def run(self, jobs: Sequence[Callable[[], T]]) -> list[T]:
        """Run one job per member; return their results, or raise the first error of any."""
        with ThreadPoolExecutor(len(jobs), "nki-core") as pool:
            futures = [
                pool.submit(contextvars.copy_context().run, self._work, me, job)
                for me, job in enumerate(jobs)
            ]
            self._turns[first(range(len(jobs)))].release()
            try:
                for future in futures:
                    future.exception()
            except BaseException:  # an interrupt: the pool waits for its threads
                self._failed = -1 if self._failed is None else self._failed
                raise
        if self._failed is not None:
            futures[self._failed].result()
        return [future.result() for future in futures]

    def wait(self, me: int, until: Callable[[], bool], says: str) -> None:
        """Let the others run until `until()` holds.

        Args:
            me: the member that calls.
            until: a condition that only other members change.
            says: what this member does, for the error: "waits at ...".

        Raises:
            KernelError: nobody can go on.
        """
        if self._failed is not None:
            raise _Unwound
        if until():
            return
        self._until[me], self._says[me] = until, says
        self._pass_on(me)
        self._turns[me].acquire()
        self._until[me] = None
        if self._failed is not None:
            raise _Unwound
        if not until():
            raise self._deadlock()

    def _work(self, me: int, job: Callable[[], T]) -> T:
        self._turns[me].acquire()
        done = False
        try:
            if self._failed is not None:
                raise _Unwound
            result = job()
            done = True
            return result
        finally:
            if not done and self._failed is None:
                self._failed = me
            self._ended.add(me)
            self._pass_on(me)

    def _pass_on(self, me: int) -> None:
        """Wake the next member; where none can go on, one that waits, to find out."""
        size = len(self._turns)
        others = [(me + 1 + step) % size for step in range(size)]
        alive = [other for other in others if other not in self._ended]
        able = [m for m in alive if self._failed is not None or self._can_go_on(m)]
        if alive:
            self._turns[first(able) if able else alive[-1]].release()

    def _can_go_on(self, member: int) -> bool:
        until = self._until[member]
        return until is None or until()

    def _deadlock(self) -> KernelError:
        parts: list[Any] = []
        for member, name in enumerate(self._names):
            ended = member in self._ended
            parts.append(f"{name} {self._ended_says(member) if ended else self._says[member]}")
        return KernelError(
            f"{'; '.join(parts)}: nobody can go on; every core and rank must run the same "
            "exchanges (sendrecv, core_barrier, collectives) in the same order"
        )
