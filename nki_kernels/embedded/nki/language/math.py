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
        result = fresh(first, dtype, f"nl.{self.__name__}")
        if isinstance(x, NkiTensor) and isinstance(y, NkiTensor):
            isa.tensor_tensor(dst=result, data1=x, data2=y, op=self)
        elif isinstance(x, NkiTensor):
            isa.tensor_scalar(dst=result, data=x, op0=self, operand0=y)
        else:
            isa.tensor_scalar(dst=result, data=y, op0=self, operand0=x, reverse0=True)
        return result


class Magnitude(Binary):
    """``nl.abs_max`` and ``nl.abs_min``: y may also be a float32 [P, 1] tile.

    The published examples compare a [128, 512] tile with a [128, 1] tile, though no document says
    that tiles broadcast; the other functions of two tiles take equal shapes only.
    """

    def __call__(self, x: Any, y: Any, dtype: Any = None) -> NkiTensor:
        """Return a new SBUF tile: x where its magnitude is larger (abs_min: smaller), else y."""
        tiles = isinstance(x, NkiTensor) and isinstance(y, NkiTensor)
        if not tiles or x.shape == y.shape or y.shape != (x.shape[0], 1):
            return super().__call__(x, y, dtype)
        result = fresh(x, dtype, f"nl.{self.__name__}")
        isa.tensor_scalar(dst=result, data=x, op0=self, operand0=y)
        return result


class Refused:
    """A published function that no NeuronCore runs: the compiler refuses it, and so do we.

    AWS's simulator computes it. Source: nki.language index, "not supported".
    """

    def __init__(self, name: str, remedy: str) -> None:
        self.__name__ = name
        self.__doc__ = f"nl.{name}(x, y, dtype=None): refused, no engine has it; {remedy}."
        self.remedy = remedy

    def __call__(self, x: Any, y: Any, dtype: Any = None) -> NkiTensor:
        """Raise RuleViolation, always."""
        raise RuleViolation(
            f"nl.{self.__name__}: no engine has this operation (AWS's simulator computes it, its "
            f"compiler refuses it); {self.remedy}"
        )

    def __repr__(self) -> str:
        return f"nl.{self.__name__}"


class Unary(Function):
    """``f(x, dtype=None)`` through activation, or tensor_scalar for bit operators."""

    def __call__(self, x: NkiTensor, dtype: Any = None) -> NkiTensor:
        """Return a new SBUF tile; its dtype is `dtype` or x's."""
        result = fresh(x, dtype, f"nl.{self.__name__}")
        if self.nki_op.activation is None:
            isa.tensor_scalar(dst=result, data=x, op0=self, operand0=None)
        else:
            isa.activation(dst=result, op=self, data=x)
        return result


def fresh(like: NkiTensor, dtype: Any, what: str) -> NkiTensor:
    """Return an unwritten SBUF tile of like's shape; its dtype is `dtype` or like's.

    Raises:
        RuleViolation: `like` is no tile.
    """
    run = current(what)
    require_tile(like, what)
    return run.allocate(like.shape, dtype or like.dtype, MemoryRegion.sbuf)


def require_tile(value: Any, what: str, name: str = "x") -> None:
    """Refuse an operand that is no tile (a number, an array), and calls outside a kernel."""
    current(what)
    if not isinstance(value, NkiTensor):
        raise RuleViolation(
            f"{what}: {name} is {type(value).__name__} {value!r}; it must be a tile: make one with "
            "nl.ndarray or nl.full, or load an HBM tensor with nl.load"
        )


class Copy(Function):
    """``nl.copy(x, dtype=None)``: tensor_copy to a new SBUF tile; bits where dtypes are equal."""

    def __call__(self, x: NkiTensor, dtype: Any = None) -> NkiTensor:
        """Return the copy."""
        result = fresh(x, dtype, f"nl.{self.__name__}")
        isa.tensor_copy(dst=result, src=x)
        return result


class Rsqrt(Function):
    """``nl.rsqrt(x, dtype=None)`` on GpSimd, from SBUF only (NKI 0.5.0 release notes)."""

    def __call__(self, x: NkiTensor, dtype: Any = None) -> NkiTensor:
        """Return a new SBUF tile; its dtype is `dtype` or x's."""
        result = fresh(x, dtype, f"nl.{self.__name__}")
        isa.tensor_scalar(dst=result, data=x, op0=self, operand0=None, engine=isa.engine.gpsimd)
        return result


def negative(x: NkiTensor, dtype: Any = None) -> NkiTensor:
    """Return -x in a new SBUF tile; its dtype is `dtype` or x's."""
    result = fresh(x, dtype, "nl.negative")
    isa.tensor_scalar(dst=result, data=x, op0=OPS["multiply"], operand0=-1.0)
    return result


def logical_not(x: NkiTensor, dtype: Any = None) -> NkiTensor:
    """Return x XOR 1, bit for bit, in a new SBUF tile: NOT of an integer tile of zeros and ones.

    For other values the documents name ``nl.equal(x, 0)``. Float tiles are refused: a bit operator
    takes integers.
    """
    result = fresh(x, dtype, "nl.logical_not")
    isa.tensor_scalar(dst=result, data=x, op0=OPS["bitwise_xor"], operand0=1)
    return result


def load(src: NkiTensor, dtype: Any = None) -> NkiTensor:
    """Return a new SBUF tile with the values of the HBM tensor `src`.

    Raises:
        RuleViolation: src is on chip.
    """
    require_tile(src, "nl.load", "src")
    if src.on_chip:
        raise RuleViolation(f"nl.load: src is {src!r}; it must be in HBM: copy a tile with nl.copy")
    result = fresh(src, dtype, "nl.load")
    isa.dma_copy(dst=result, src=src)
    return result


def store(dst: NkiTensor, value: NkiTensor) -> None:
    """Copy an SBUF tile to the HBM tensor `dst`.

    Raises:
        RuleViolation: dst is on chip, or value is in HBM or PSUM.
    """
    require_tile(dst, "nl.store", "dst")
    require_tile(value, "nl.store", "value")
    if dst.on_chip or not value.on_chip:
        raise RuleViolation(
            f"nl.store: dst is {dst!r}, value is {value!r}; an SBUF tile goes to an HBM tensor: "
            "use nisa.tensor_copy on chip, nisa.dma_copy between HBM tensors"
        )
    isa.dma_copy(dst=dst, src=value)


add = Binary("add")
subtract = Binary("subtract")
multiply = Binary("multiply")
maximum = Binary("maximum")
minimum = Binary("minimum")
divide = Refused("divide", "multiply by nl.reciprocal(y)")
mod = Refused("mod", "compute x - y * nl.floor(x / y) with nl.reciprocal and nl.floor")
fmod = Refused("fmod", "compute x - y * nl.trunc(x / y) with nl.reciprocal and nl.trunc")
power = Binary("power")
abs_max = Magnitude("abs_max")
abs_min = Magnitude("abs_min")
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
arctan = Unary("arctan")
sign = Unary("sign")
copy = Copy("copy")
bypass = Function("bypass")
average = Function("average")
prelu = Function("prelu")
