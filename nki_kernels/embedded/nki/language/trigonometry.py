"""sin, cos and tan with range reduction: accurate beyond the Scalar engine's [-pi, pi].

Source: nki.api.shared, "nki.language.sin applies additional instructions to perform range
reduction before the activation"; which ones is not documented. Here r = x - 2 pi k with 2 pi in
three parts (Cody and Waite): k times the first two is exact in float32 while k has at most 13
bits, that is for |x| < 5e4. Beyond, the error grows with |x|, and from 2^31 periods on the result
means nothing. Infinities are undefined.
"""

from __future__ import annotations

import math
from typing import Any

from nki import isa
from nki.language.math import Function, fresh

from nki_kernels.machine.core import current
from nki_kernels.machine.dtypes import float32, int32
from nki_kernels.machine.operators import OPS
from nki_kernels.machine.tensor import NkiTensor

#: 2 pi = _HIGH + _MIDDLE + _LOW; the first two have at most 11 significant bits.
_HIGH = math.ldexp(round(math.ldexp(2 * math.pi, 8)), -8)
_MIDDLE = math.ldexp(round(math.ldexp(2 * math.pi - _HIGH, 20)), -20)
_LOW = 2 * math.pi - _HIGH - _MIDDLE


def _reduced(x: NkiTensor, what: str) -> NkiTensor:
    """Return x - 2 pi k in float32 with k the integer nearest to x / (2 pi)."""
    rest = fresh(x, float32, what)
    turns = current(what).allocate(x.shape, int32, rest.buffer)
    isa.tensor_scalar(dst=turns, data=x, op0=OPS["multiply"], operand0=1 / (2 * math.pi))
    before = x
    for part in (_HIGH, _MIDDLE, _LOW):
        isa.scalar_tensor_tensor(
            dst=rest, data=turns, op0=OPS["multiply"], operand0=-part, op1=OPS["add"],
            operand1=before,
        )  # fmt: skip
        before = rest
    return rest


def _sine(rest: NkiTensor) -> NkiTensor:
    """Return sin(rest), in place; rounding may have led a step beyond [-pi, pi]."""
    isa.tensor_scalar(
        dst=rest, data=rest, op0=OPS["minimum"], operand0=math.pi, op1=OPS["maximum"],
        operand1=-math.pi,
    )  # fmt: skip
    isa.activation(dst=rest, op=OPS["sin"], data=rest)
    return rest


def _cosine(rest: NkiTensor, dst: NkiTensor) -> NkiTensor:
    """Return dst = sin(pi/2 - |rest|), whose argument lies in [-pi/2, pi/2]."""
    isa.tensor_scalar(
        dst=dst, data=rest, op0=OPS["abs"], operand0=None, op1=OPS["subtract"],
        operand1=math.pi / 2, reverse1=True,
    )  # fmt: skip
    isa.activation(dst=dst, op=OPS["sin"], data=dst)
    return dst


def _rounded(value: NkiTensor, x: NkiTensor, dtype: Any, what: str) -> NkiTensor:
    """Return float32 `value` in the dtype asked for, or x's."""
    result = fresh(x, dtype, what)
    isa.tensor_copy(dst=result, src=value)
    return result


class Sine(Function):
    """``nl.sin``: wrapper with range reduction, and the operator token without."""

    def __call__(self, x: NkiTensor, dtype: Any = None) -> NkiTensor:
        """Return the sine of x in a new SBUF tile; its dtype is `dtype` or x's."""
        return _rounded(_sine(_reduced(x, "nl.sin")), x, dtype, "nl.sin")


sin = Sine("sin")


def cos(x: NkiTensor, dtype: Any = None) -> NkiTensor:
    """Return the cosine of x in a new SBUF tile; its dtype is `dtype` or x's."""
    rest = _reduced(x, "nl.cos")
    return _rounded(_cosine(rest, rest), x, dtype, "nl.cos")


def tan(x: NkiTensor, dtype: Any = None) -> NkiTensor:
    """Return sin(x) / cos(x), as a product with the reciprocal, in a new SBUF tile."""
    rest = _reduced(x, "nl.tan")
    cosine = _cosine(rest, fresh(x, float32, "nl.tan"))
    isa.reciprocal(dst=cosine, data=cosine)
    result = fresh(x, dtype, "nl.tan")
    isa.tensor_tensor(dst=result, data1=_sine(rest), data2=cosine, op=OPS["multiply"])
    return result
