"""ceil, floor and trunc, from the one rounding the hardware has: to nearest, on conversion."""

from __future__ import annotations

from typing import Any

from nki import isa
from nki.language.math import fresh

from nki_kernels.machine.core import current
from nki_kernels.machine.dtypes import float32, int32, uint8
from nki_kernels.machine.operators import OPS
from nki_kernels.machine.tensor import NkiTensor

#: From here on every float32 is an integer.
_INTEGERS = 2.0**23


def _integral(x: NkiTensor, name: str, dtype: Any) -> NkiTensor:
    """Round in the direction of `name`; a zero result is +0 (NumPy keeps the sign of -0)."""
    what = f"nl.{name}"
    result = fresh(x, dtype, what)
    if x.dtype.is_integer:
        isa.tensor_copy(dst=result, src=x)
        return result
    exact = fresh(x, float32, what)
    isa.tensor_copy(dst=exact, src=x)
    if name == "trunc":
        rounded = _stepped(_magnitude(exact), "floor")
        sign = fresh(x, float32, what)
        isa.activation(dst=sign, op=OPS["sign"], data=exact)
        isa.tensor_tensor(dst=rounded, data1=rounded, data2=sign, op=OPS["multiply"])
        isa.tensor_scalar(dst=rounded, data=rounded, op0=OPS["add"], operand0=0.0)
    else:
        rounded = _stepped(exact, name)
    small = current(what).allocate(x.shape, uint8, rounded.buffer)
    isa.tensor_scalar(
        dst=small, data=exact, op0=OPS["abs"], operand0=None, op1=OPS["less"], operand1=_INTEGERS
    )
    # The conversion saturates at 2^31; larger values, infinities and NaN are their own result.
    isa.tensor_copy_predicated(dst=rounded, src=exact, predicate=small, reverse_pred=True)
    isa.tensor_copy(dst=result, src=rounded)
    return result


def _magnitude(x: NkiTensor) -> NkiTensor:
    """Return |x| in a new float32 tile."""
    magnitude = fresh(x, float32, "nl.trunc")
    isa.tensor_scalar(dst=magnitude, data=x, op0=OPS["abs"], operand0=None)
    return magnitude


def _stepped(x: NkiTensor, name: str) -> NkiTensor:
    """Return the nearest integer, one lower (floor) or higher (ceil) where it passed x."""
    nearest = current(f"nl.{name}").allocate(x.shape, int32, x.buffer)
    isa.tensor_copy(dst=nearest, src=x)
    step = fresh(x, float32, f"nl.{name}")
    passed, fix = ("greater", "subtract") if name == "floor" else ("less", "add")
    isa.tensor_tensor(dst=step, data1=nearest, data2=x, op=OPS[passed])
    isa.tensor_tensor(dst=step, data1=nearest, data2=step, op=OPS[fix])
    return step


def ceil(x: NkiTensor, dtype: Any = None) -> NkiTensor:
    """Return the smallest integers >= x in a new SBUF tile; its dtype is `dtype` or x's."""
    return _integral(x, "ceil", dtype)


def floor(x: NkiTensor, dtype: Any = None) -> NkiTensor:
    """Return the largest integers <= x in a new SBUF tile; its dtype is `dtype` or x's."""
    return _integral(x, "floor", dtype)


def trunc(x: NkiTensor, dtype: Any = None) -> NkiTensor:
    """Return x without its fraction in a new SBUF tile; its dtype is `dtype` or x's."""
    return _integral(x, "trunc", dtype)
