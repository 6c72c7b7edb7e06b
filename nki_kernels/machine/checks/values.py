"""Checks that look at values while an instruction executes."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import numpy as np

from nki_kernels.machine.dtypes import Array, DType, int32, uint32
from nki_kernels.machine.errors import RuleViolation
from nki_kernels.machine.operators import Op
from nki_kernels.machine.trace import where

if TYPE_CHECKING:
    from nki_kernels.machine.core import Run
    from nki_kernels.machine.tensor import NkiTensor

#: Integers of these types do not all fit float32.
WIDE: tuple[DType, ...] = (int32, uint32)
#: Beyond it float32 skips integers.
EXACT = 2 ** (np.finfo(np.float32).nmant + 1)
#: Operators whose result on integers is an integer that the caller wants exactly.
_COUNTS = frozenset({"add", "subtract", "multiply"})


def operand_name(run: Run, view: NkiTensor) -> str:
    """Return the name under which the instruction in progress has `view`."""
    if run.executing is None:
        return f"tile {view.name!r}"
    plan, args = run.executing
    names = (name for name, value in zip(plan.names, args, strict=True) if value is view)
    return next(names, f"tile {view.name!r}")


def _opcode(run: Run) -> str:
    return "an instruction" if run.executing is None else run.executing[0].opcode


def check_integers(run: Run, view: NkiTensor, values: Array) -> None:
    """Report 32-bit integers that change on their way through float32.

    Multiples of a power of two beyond 2^24 may be exact; they pass. So does the largest value of
    the type: saturation makes it and skipped indices use it, and it comes back as it was.
    """
    if run.options.integers == "off" or not values.size:
        return
    if int(values.min()) >= -EXACT and int(values.max()) <= EXACT:
        return
    lost = values.astype(np.float32).astype(np.float64) != values.astype(np.float64)
    lost &= values != np.iinfo(values.dtype).max
    if not lost.any():
        return
    first = tuple(int(i) for i in np.argwhere(lost)[0])
    value = int(values[first])
    run.report(
        run.options.integers,
        RuleViolation(
            f"{_opcode(run)} at {where(run.kernel_site())}: {operand_name(run, view)} "
            f"{list(view.shape)} {view.dtype} holds {value} at index {list(first)}, which the "
            f"float32 arithmetic of the engine reads as {int(np.float32(value))} "
            f"({int(lost.sum())} of {values.size} elements beyond 2^24 change); use tensor_tensor "
            "on gpsimd, a bitvec operator, or split the number"
        ),
    )


def check_result(
    run: Run, op: Op, result: Array, target: Array, operands: tuple[Array, ...]
) -> None:
    """Report sums and products of integers that float32 no longer counts one by one."""
    level = run.options.integers
    if level == "off" or op.name not in _COUNTS or target.dtype.itemsize != WIDE[0].itemsize:
        return
    size = np.abs(result)
    most = size.max(initial=0)
    if not EXACT < most < math.inf or not all(_whole(o) for o in operands):
        return
    first = tuple(int(i) for i in np.argwhere(size > EXACT)[0])
    run.report(
        level,
        RuleViolation(
            f"{_opcode(run)} at {where(run.kernel_site())}: {op!r} of integers gives "
            f"{int(result[first])} at index {list(first)}; the engine computes in float32, which "
            "counts to 2^24 only, so the result may be rounded: use tensor_tensor on gpsimd, or "
            "split the number"
        ),
    )


def _whole(values: Array) -> bool:
    return bool(np.array_equal(values, np.rint(values)))


def check_domain(run: Run, op: Op, view: NkiTensor, values: Array) -> None:
    """Report inputs outside the valid range of an activation function; NaN is no finding.

    Args:
        run: the run.
        op: the function.
        view: the data operand.
        values: what the function gets: data * scale + bias, of the shape of `view`.
    """
    low, high = op.domain
    level = run.options.domain
    if level == "off" or (low == -math.inf and high == math.inf):
        return
    if low <= values.min() and values.max() <= high and not op.smallest:
        return
    outside = (values < np.float32(low)) | (values > np.float32(high))
    if op.smallest:
        outside |= np.abs(values) < np.float32(op.smallest)
    if not outside.any():
        return
    first = tuple(int(i) for i in np.argwhere(outside)[0])
    run.report(
        level,
        RuleViolation(
            f"{_opcode(run)} at {where(run.kernel_site())}: {op!r} gets {values[first]!s} at index "
            f"{list(first)} of {operand_name(run, view)} {list(view.shape)}, after scale and bias "
            f"({int(outside.sum())} of {values.size} elements); its valid range is "
            f"{_range(op)}, outside of which the hardware's result is invalid: clamp or shift the "
            "input first"
        ),
    )


def _range(op: Op) -> str:
    if op.smallest:
        return f"{_power(op.smallest)} to {_power(op.domain[1])} in magnitude"
    return f"{_power(op.domain[0])} to {_power(op.domain[1])}"


def _power(value: float) -> str:
    """Return 2^n for powers of two, else the number."""
    mantissa, exponent = math.frexp(value)
    return f"2^{exponent - 1}" if mantissa == 1 / 2 else f"{value:.6g}"
