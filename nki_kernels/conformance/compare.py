"""When the output of a kernel counts as equal to its reference.

AWS's own rule is |a - b| <= atol + rtol * max|b| with the maximum over the whole tensor, which
lets a small column be wrong entirely. Here the same must hold in the Euclidean norm of every
neighbourhood as well (the last axes, as many as it takes to hold some elements), with the rtol and
atol that AWS's test states. Integers and booleans are equal or wrong.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from nki_kernels.conformance.shims import is_float_type, packed_name, unpack
from nki_kernels.machine.dtypes import Array

#: Elements of a neighbourhood: with two, a cancellation in both is no scale.
_NEIGHBOURS = 64


@dataclass(frozen=True)
class Difference:
    """The outcome of one comparison.

    Attributes:
        worst: the largest error as a share of what is allowed; above 1 is a mismatch.
        norm: |a - b| / |b| in the Euclidean norm over all elements.
        problem: what is wrong, "" if nothing is.
    """

    worst: float
    norm: float
    problem: str


def difference(name: str, got: Array, want: Array, rtol: float, atol: float) -> Difference:
    """Compare one output with its reference."""
    if got.shape != want.shape:
        if got.size != want.size:
            shapes = f"{list(got.shape)}, the reference {list(want.shape)}"
            return Difference(float("inf"), float("inf"), f"{name}: shape {shapes}")
        got = got.reshape(want.shape)
    if packed_name(want.dtype) is not None and got.dtype.itemsize == want.dtype.itemsize:
        got = np.ascontiguousarray(got).view(want.dtype)
    if packed_name(got.dtype) is not None or packed_name(want.dtype) is not None:
        got, want = unpack(got), unpack(want)
    exact = not is_float_type(got.dtype) or not is_float_type(want.dtype)
    a, b = got.astype(np.float64), want.astype(np.float64)
    finite = np.isfinite(b)
    if not np.array_equal(np.isfinite(a), finite):
        count = int((np.isfinite(a) != finite).sum())
        return Difference(float("inf"), float("inf"), f"{name}: {count} elements not finite in one")
    a, b = np.where(finite, a, 0.0), np.where(finite, b, 0.0)
    error = np.abs(a - b)
    norm = float(np.linalg.norm(error) / (np.linalg.norm(b) or 1.0))
    if exact:
        wrong = int((error > 0).sum())
        problem = f"{name}: {wrong} of {a.size} integers differ" if wrong else ""
        return Difference(float("inf") if wrong else 0.0, norm, problem)
    axes = _neighbourhood(b.shape)
    elements = atol + rtol * np.max(np.abs(b), initial=0.0)
    norms = atol + rtol * np.sqrt(np.mean(b * b, axis=axes))
    worst = max(_share(error, elements), _share(np.sqrt(np.mean(error**2, axis=axes)), norms))
    problem = f"{name}: error {worst:.3g} times the allowed one" if worst > 1 else ""
    return Difference(worst, norm, problem)


def _share(error: Array, allowed: Array | float) -> float:
    """The largest error as a share of what is allowed."""
    return float(np.max(error / np.maximum(allowed, np.finfo(float).tiny), initial=0.0))


def _neighbourhood(shape: tuple[int, ...]) -> tuple[int, ...]:
    """The last axes, so many that they have `_NEIGHBOURS` elements."""
    axis = len(shape)
    while axis > 0 and np.prod(shape[axis:]) < _NEIGHBOURS:
        axis -= 1
    return tuple(range(axis, len(shape)))
