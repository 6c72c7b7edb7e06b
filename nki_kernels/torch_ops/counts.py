"""What did run: how often each op ran on each backend, counted in the op itself.

A backend agrees with plain PyTorch, so a right result proves nothing about where it came from;
these counts do.
"""

from __future__ import annotations

import contextlib
import threading
from collections import Counter
from collections.abc import Iterator
from contextvars import ContextVar

#: A call with a zero-size input: nothing to compute, so no backend ran.
EMPTY = "empty"
#: A strided input that was copied for a kernel. Counted per input, beside the run itself.
COPY = "copy"

_off: ContextVar[bool] = ContextVar("nki_kernels_uncounted", default=False)
_lock = threading.Lock()
_counts: Counter[tuple[str, str]] = Counter()


def count(op: str, what: str, times: int = 1) -> None:
    """Add `times` to the count of (op, what)."""
    if times and not _off.get():
        with _lock:
            _counts[op, what] += times


@contextlib.contextmanager
def uncounted() -> Iterator[None]:
    """Leave out what runs within the ``with`` block: trials that are no part of a model's work."""
    token = _off.set(True)
    try:
        yield
    finally:
        _off.reset(token)


def counters() -> Counter[tuple[str, str]]:
    """Return a copy of the counts since the start or the last reset, of all threads.

    Keys are (op, backend), for example ("matmul", "simulator"); beside the backends stand "empty"
    (a zero-size input: returned without a backend) and "copy" (a strided input made dense). What
    never happened counts 0. A call that raised is not counted, nor is tracing by `torch.compile` or
    `torch.export`; a backward pass counts as calls of the ops it is made of.
    """
    with _lock:
        return _counts.copy()


def reset_counters() -> None:
    """Set every count to zero."""
    with _lock:
        _counts.clear()
