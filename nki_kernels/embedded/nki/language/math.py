"""Operator tokens and the wrappers of the same names.

``nl.add`` is both the operator an instruction takes (``op=nl.add``) and a function that allocates a
tile and issues that instruction. The wrappers add no semantics of their own.
"""

from __future__ import annotations

from typing import Any

from nki import isa

from nki_kernels.machine.core import current
from nki_kernels.machine.errors import RuleViolation
from nki_kernels.machine.operators import OPS
from nki_kernels.machine.tensor import MemoryRegion, NkiTensor


class Function:
    """An ``nl`` math function: callable on tiles, and the operator token of instructions."""

    def __init__(self, name: str) -> None:
        self.nki_op = OPS[name]
        self.__name__ = name
        self.__doc__ = f"nl.{name}: operator token, and wrapper that returns a new SBUF tile."

    def __repr__(self) -> str:
        return f"nl.{self.__name__}"


class Binary(Function):
    """``f(x, y, dtype=None)`` for tile with tile, tile with number, number with tile."""

    def __call__(self, x: Any, y: Any, dtype: Any = None) -> NkiTensor:
        """Return a new SBUF tile; its dtype is `dtype` or the first tile's."""
        first = x if isinstance(x, NkiTensor) else y
        if not isinstance(first, NkiTensor):
            raise RuleViolation(f"nl.{self.__name__}({x!r}, {y!r}): one operand must be a tile")
        result = _result(first, dtype)
        if isinstance(x, NkiTensor) and isinstance(y, NkiTensor):
            isa.tensor_tensor(dst=result, data1=x, data2=y, op=self)
        elif isinstance(x, NkiTensor):
            isa.tensor_scalar(dst=result, data=x, op0=self, operand0=y)
        else:
            isa.tensor_scalar(dst=result, data=y, op0=self, operand0=x, reverse0=True)
        return result


class Unary(Function):
    """``f(x, dtype=None)`` through activation, or tensor_scalar for bit operators."""

    def __call__(self, x: NkiTensor, dtype: Any = None) -> NkiTensor:
        """Return a new SBUF tile; its dtype is `dtype` or x's."""
        result = _result(x, dtype)
        if self.nki_op.activation is None:
            isa.tensor_scalar(dst=result, data=x, op0=self, operand0=None)
        else:
            isa.activation(dst=result, op=self, data=x)
        return result


def _result(like: NkiTensor, dtype: Any) -> NkiTensor:
    run = current("an nl math function")
    return run.allocate(like.shape, dtype or like.dtype, MemoryRegion.sbuf)


class Copy(Function):
    """``nl.copy(x, dtype=None)``: tensor_copy to a new SBUF tile; bits where dtypes are equal."""

    def __call__(self, x: NkiTensor, dtype: Any = None) -> NkiTensor:
        """Return the copy."""
        result = _result(x, dtype)
        isa.tensor_copy(dst=result, src=x)
        return result


class Rsqrt(Function):
    """``nl.rsqrt(x, dtype=None)`` on GpSimd, from SBUF only (NKI 0.5.0 release notes)."""

    def __call__(self, x: NkiTensor, dtype: Any = None) -> NkiTensor:
        """Return a new SBUF tile; its dtype is `dtype` or x's."""
        result = _result(x, dtype)
        isa.tensor_scalar(dst=result, data=x, op0=self, operand0=None, engine=isa.engine.gpsimd)
        return result


def negative(x: NkiTensor, dtype: Any = None) -> NkiTensor:
    """Return -x in a new SBUF tile; its dtype is `dtype` or x's."""
    result = _result(x, dtype)
    isa.tensor_scalar(dst=result, data=x, op0=OPS["multiply"], operand0=-1.0)
    return result


def load(src: NkiTensor, dtype: Any = None) -> NkiTensor:
    """Return a new SBUF tile with the values of the HBM tensor `src`."""
    result = _result(src, dtype)
    isa.dma_copy(dst=result, src=src)
    return result


def store(dst: NkiTensor, value: NkiTensor) -> None:
    """Copy an SBUF tile to the HBM tensor `dst`."""
    isa.dma_copy(dst=dst, src=value)


add = Binary("add")
subtract = Binary("subtract")
multiply = Binary("multiply")
maximum = Binary("maximum")
minimum = Binary("minimum")
power = Binary("power")
abs_max = Binary("abs_max")
abs_min = Binary("abs_min")
equal = Binary("equal")
not_equal = Binary("not_equal")
less = Binary("less")
less_equal = Binary("less_equal")
greater = Binary("greater")
greater_equal = Binary("greater_equal")
logical_and = Binary("logical_and")
logical_or = Binary("logical_or")
logical_xor = Binary("logical_xor")
bitwise_and = Binary("bitwise_and")
bitwise_or = Binary("bitwise_or")
bitwise_xor = Binary("bitwise_xor")
left_shift = Binary("left_shift")
right_shift = Binary("right_shift")
invert = Unary("invert")
abs = Unary("abs")
square = Unary("square")
relu = Unary("relu")
rsqrt = Rsqrt("rsqrt")
reciprocal = Unary("reciprocal")
exp = Unary("exp")
log = Unary("log")
sqrt = Unary("sqrt")
sigmoid = Unary("sigmoid")
tanh = Unary("tanh")
gelu = Unary("gelu")
gelu_dx = Unary("gelu_dx")
gelu_apprx_tanh = Unary("gelu_apprx_tanh")
gelu_apprx_sigmoid = Unary("gelu_apprx_sigmoid")
gelu_apprx_sigmoid_dx = Unary("gelu_apprx_sigmoid_dx")
silu = Unary("silu")
silu_dx = Unary("silu_dx")
softplus = Unary("softplus")
mish = Unary("mish")
erf = Unary("erf")
erf_dx = Unary("erf_dx")
sin = Unary("sin")
arctan = Unary("arctan")
sign = Unary("sign")
copy = Copy("copy")
bypass = Function("bypass")
average = Function("average")
prelu = Function("prelu")
