"""Shapes and strides as numbers, without a tensor."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import numpy as np

from nki_kernels.machine.errors import RuleViolation

#: Dimensions of a view (partition and four free ones: what an access pattern encodes).
MAX_DIMS = 5


class Dynamic(NamedTuple):
    """An address that depends on a run-time value.

    `kind` is "scalar" (one index moves the whole pattern by index * scale elements) or "vector"
    (row i of dimension 0 starts at index[i] * scale). "indirect" (gen4) takes columns of `base` by
    offsets. `index` is a tensor or a register. "unusable": a view that no instruction can take,
    outside its tile or empty; `index` is then the error, raised at the first use. (Published
    kernels form such views on the last turn of a loop and pass them by.)
    """

    kind: str
    index: Any
    scale: int
    base: Any = None


class Signature:
    """Everything of a view that an operand rule or a cost may depend on: one object per content.

    So the keys of instruction calls are compared and hashed by identity, which costs nothing.
    """

    __slots__ = ("parts",)

    def __init__(self, parts: tuple[Any, ...]) -> None:
        self.parts = parts


_SIGNATURES: dict[tuple[Any, ...], Signature] = {}


def signature_of(parts: tuple[Any, ...]) -> Signature:
    """Return the signature with these parts."""
    return _SIGNATURES.get(parts) or _SIGNATURES.setdefault(parts, Signature(parts))


def is_int(value: Any) -> bool:
    """True for an int of Python or NumPy, but not for a bool."""
    return isinstance(value, (int, np.integer)) and not isinstance(value, bool)


def row_major(extents: tuple[int, ...]) -> tuple[int, ...]:
    """Return the strides, in elements, of a dense array whose last dimension runs fastest."""
    strides = [1] * len(extents)
    for dim in range(len(extents) - 2, -1, -1):
        strides[dim] = strides[dim + 1] * extents[dim + 1]
    return tuple(strides)


def as_address(value: Any) -> tuple[int, int] | None:
    """Return an allocation's address as (start partition, bytes in the partition), or None.

    Raises:
        RuleViolation: it is no pair of ints.
    """
    if value is None:
        return None
    if not isinstance(value, (tuple, list)) or len(value) != 2 or not all(map(is_int, value)):
        raise RuleViolation(
            f"nl.ndarray: address={value!r}; it must be two ints (start partition, bytes in the "
            "partition): write for example (0, 2048), or None to have one chosen"
        )
    return int(value[0]), int(value[1])


def infer(shape: tuple[int, ...], size: int) -> tuple[int, ...]:
    """Return `shape` with an entry of -1 replaced by what `size` leaves for it."""
    if -1 not in shape:
        return shape
    known = -math.prod(shape)
    return tuple(size // known if s == -1 and known else s for s in shape)


def restride(
    shape: tuple[int, ...], strides: tuple[int, ...], new: tuple[int, ...]
) -> tuple[int, ...] | None:
    """Return strides for `new` over the same elements, or None where only a copy could do it."""
    old = [(n, s) for n, s in zip(shape, strides, strict=True) if n != 1]
    runs: list[list[int]] = []
    for n, s in old:
        if runs and runs[-1][1] == s * n:
            runs[-1] = [runs[-1][0] * n, s]
        else:
            runs.append([n, s])
    result: list[int] = []
    at = len(runs) - 1
    left, step = runs[at] if runs else (1, 1)
    for extent in reversed(new):
        if extent == 1:
            result.append(step)
            continue
        if left == 1 and at > 0:
            at -= 1
            left, step = runs[at]
        if left % extent:
            return None
        result.append(step)
        left //= extent
        step *= extent
    return tuple(reversed(result))


def reach(
    shape: tuple[int, ...], strides: tuple[int, ...], offset: int, limit: int, row: int | None
) -> str | None:
    """Say how an access leaves its tile of `limit` elements; None if it does not.

    `row` is the elements of a partition, None in HBM.
    """
    spans = [(n - 1) * s for n, s in zip(shape, strides, strict=True)]
    last = offset + sum(spans)
    if offset < 0 or last >= limit:
        at = last if last >= limit else offset
        return f"reaches element {at} of a tile of {limit} elements; keep offset and pattern inside"
    used = 0 if row is None else offset % row + sum(spans[1:])
    if row is not None and used >= row:
        return (
            f"reaches element {used} of a partition of {row} elements; an access cannot run on "
            "into the next partition"
        )
    return None
