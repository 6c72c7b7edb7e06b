"""Host memory that launches hand on to each other.

A fresh buffer costs a page fault per 4 KiB, a used one none: a 512^3 matmul took 1,100 of them, a
tenth of its time. What is handed on is bounded, and never something that anyone still looks at.
"""

from __future__ import annotations

import sys

import numpy as np

from nki_kernels.machine.dtypes import Array

#: Bytes of the largest buffer kept, and of all that are kept of one size; sizes kept. A size may
#: fill SBUF (24 MiB); larger buffers are few, and their page faults are little beside their use.
LARGEST = 8 << 20
PER_SIZE = 32 << 20
SIZES = 24


def _sample() -> int:
    """Return what `give` counts for a buffer that nobody else knows: it depends on the Python."""

    def counted(data: Array) -> int:
        return sys.getrefcount(data)

    data = np.empty(1, np.uint8)
    return counted(data)


_ALONE = _sample()
_spare: dict[int, list[Array]] = {}


def take(nbytes: int) -> Array:
    """Return `nbytes` bytes, flat, of any content."""
    spare = _spare.get(nbytes)
    if spare:
        try:
            return spare.pop()
        except IndexError:  # another thread was faster
            pass
    return np.empty(nbytes, np.uint8)


def give(data: Array) -> None:
    """Keep a buffer for who takes one of its size next, unless a view of it is still held.

    The caller holds the only reference besides the argument's.
    """
    nbytes = data.nbytes
    if nbytes > LARGEST or sys.getrefcount(data) > _ALONE:
        return
    spare = _spare.get(nbytes)
    if spare is None:
        if len(_spare) == SIZES:
            _spare.clear()
        spare = _spare.setdefault(nbytes, [])
    if (len(spare) + 1) * nbytes <= PER_SIZE:
        spare.append(data)
