"""Wrappers that reduce the last free axes of a tile: sum, max, min, mean, prod, all."""

from __future__ import annotations

import math
from typing import Any

from nki import isa
from nki.isa.reduction import reduced_axes
from nki.language.math import Function, require_tile

from nki_kernels.machine import dtypes
from nki_kernels.machine.core import current
from nki_kernels.machine.errors import ShapeError
from nki_kernels.machine.operators import OPS
from nki_kernels.machine.tensor import MemoryRegion, NkiTensor


def _reduced_shape(x: NkiTensor, axis: Any, keepdims: bool, what: str) -> tuple[int, ...]:
    """Return the shape of the result; a tile keeps at least one free dimension."""
    axes = reduced_axes(axis, x.ndim)
    if axes is None:
        raise ShapeError(
            f"{what}: axis={axis!r} of a tile {list(x.shape)}; it must be the last free "
            f"dimensions, up to and with {x.ndim - 1}, without the partition dimension 0"
        )
    kept = x.shape[: axes[0]]
    ones = len(axes) if keepdims else int(len(kept) == 1)
    return (*kept, *(1,) * ones)


def reduce(op: str, x: NkiTensor, axis: Any, dtype: Any, keepdims: bool, what: str) -> NkiTensor:
    """Return `op` over the last free axes of x in a new SBUF tile."""
    run = current(what)
    require_tile(x, what)
    shape = _reduced_shape(x, axis, keepdims, what)
    result = run.allocate(shape, dtype or x.dtype, MemoryRegion.sbuf)
    isa.tensor_reduce(dst=result, op=OPS[op], data=x, axis=axis)
    return result


def spread_over(stat: NkiTensor, x: NkiTensor) -> NkiTensor:
    """Return a view of `stat` in x's shape: dimensions of size 1 are read with stride 0."""
    for dim in range(1, x.ndim):
        if stat.shape[dim] != x.shape[dim]:
            stat = stat.broadcast(dim, x.shape[dim])
    return stat


class Reduction(Function):
    """``nl.max`` and ``nl.min``: wrappers, and operator tokens that mean nl.maximum, nl.minimum."""

    def __init__(self, name: str, op: str) -> None:
        super().__init__(op)
        self.__name__ = name
        self.__doc__ = f"nl.{name}(x, axis, dtype=None, keepdims=False): reduction to a new tile."

    def __call__(
        self, x: NkiTensor, axis: Any, dtype: Any = None, keepdims: bool = False
    ) -> NkiTensor:
        """Return a new SBUF tile; its dtype is `dtype` or x's."""
        return reduce(self.nki_op.name, x, axis, dtype, keepdims, f"nl.{self.__name__}")


max = Reduction("max", "maximum")
min = Reduction("min", "minimum")


def sum(x: NkiTensor, axis: Any, dtype: Any = None, keepdims: bool = False) -> NkiTensor:
    """Return the sum over the last free axes, in float32 from left to right, in a new SBUF tile."""
    return reduce("add", x, axis, dtype, keepdims, "nl.sum")


def prod(x: NkiTensor, axis: Any, dtype: Any = None, keepdims: bool = False) -> NkiTensor:
    """Return the product over the last free axes, in float32 from left to right."""
    return reduce("multiply", x, axis, dtype, keepdims, "nl.prod")


def all(x: NkiTensor, axis: Any, dtype: Any = None) -> NkiTensor:
    """Return 1 where every element along the last free axes is not 0, else 0."""
    return reduce("logical_and", x, axis, dtype, False, "nl.all")


def mean(x: NkiTensor, axis: Any, dtype: Any = None, keepdims: bool = False) -> NkiTensor:
    """Return the mean over the last free axes: the float32 sum times float32(1 / count)."""
    total = reduce("add", x, axis, dtypes.float32, keepdims, "nl.mean")
    count = math.prod(x.shape[1:]) // math.prod(total.shape[1:])
    result = current("nl.mean").allocate(total.shape, dtype or x.dtype, MemoryRegion.sbuf)
    isa.tensor_scalar(dst=result, data=total, op0=OPS["multiply"], operand0=1.0 / count)
    return result
