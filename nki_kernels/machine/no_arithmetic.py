"""Python's operators on a tile: refused, each with the function that does it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NoReturn

from nki_kernels.machine.errors import KernelError


def _refused(symbol: str, remedy: str) -> Callable[..., NoReturn]:
    def refuse(self: Any, other: Any = None) -> NoReturn:
        raise KernelError(
            f"{self!r}: the operator {symbol} does not exist for tiles, since each instruction is "
            f"written out; use {remedy}"
        )

    return refuse


def _two(symbol: str, name: str) -> Callable[..., NoReturn]:
    return _refused(
        symbol,
        f"nl.{name}(x, y) for a new tile, or nisa.tensor_tensor / nisa.tensor_scalar with "
        f"op=nl.{name}",
    )


class NoArithmetic:
    """Base of tensors: no document gives them operators, and a plain TypeError names no remedy."""

    __slots__ = ()

    __array_ufunc__ = None  # NumPy scalars and arrays on the left leave the operator to us

    __add__ = __radd__ = _two("+", "add")
    __sub__ = __rsub__ = _two("-", "subtract")
    __mul__ = __rmul__ = _two("*", "multiply")
    __truediv__ = __rtruediv__ = _refused(
        "/", "nl.multiply(x, nl.reciprocal(y)); no engine divides"
    )
    __floordiv__ = __rfloordiv__ = _refused(
        "//", "nl.floor(nl.multiply(x, nl.reciprocal(y))); no engine divides"
    )
    __mod__ = __rmod__ = _refused("%", "nl.floor and nl.subtract; no engine has a remainder")
    __pow__ = __rpow__ = _two("**", "power")
    __matmul__ = __rmatmul__ = _refused(
        "@", "nisa.nc_matmul(dst, stationary, moving), which computes stationary.T @ moving"
    )
    __and__ = __rand__ = _two("&", "bitwise_and")
    __or__ = __ror__ = _two("|", "bitwise_or")
    __xor__ = __rxor__ = _two("^", "bitwise_xor")
    __lshift__ = __rlshift__ = _two("<<", "left_shift")
    __rshift__ = __rrshift__ = _two(">>", "right_shift")
    __lt__ = _two("<", "less")
    __le__ = _two("<=", "less_equal")
    __gt__ = _two(">", "greater")
    __ge__ = _two(">=", "greater_equal")
    __neg__ = _refused("-", "nl.negative(x)")
    __pos__ = _refused("+", "the tile itself")
    __invert__ = _refused("~", "nl.invert(x) or nl.logical_not(x)")
    __abs__ = _refused("abs()", "nl.abs(x)")
