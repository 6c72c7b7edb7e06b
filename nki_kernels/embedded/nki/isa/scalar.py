"""Integers computed on the device (NKI 0.7): NkiScalar, scalar_load, scalar_store."""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

from nki.isa.register import load, store, wrap

from nki_kernels.machine.core import Run, VirtualRegister, current
from nki_kernels.machine.dtypes import DType, int32
from nki_kernels.machine.errors import DtypeError, RuleViolation
from nki_kernels.machine.layout import is_int
from nki_kernels.machine.tensor import NkiTensor
from nki_kernels.machine.trace import ControlWork


class NkiScalar(VirtualRegister):
    """An int32 that exists at run time: a loop index, what scalar_load gives, and sums of those.

    ``+``, ``-``, ``*`` with ints and scalars give new scalars and wrap at 32 bits. It serves
    wherever a register that is read does (scalar_offset, bounds of nl.fori_loop). The published
    class also has 64 bits, which the embedded NKI does not.
    """

    __slots__ = ()

    @property
    def dtype(self) -> DType:
        """The width: nl.int32."""
        return int32

    def __add__(self, other: Any) -> NkiScalar:
        return _combined(operator.add, "+", self, other)

    def __radd__(self, other: Any) -> NkiScalar:
        return _combined(operator.add, "+", other, self)

    def __sub__(self, other: Any) -> NkiScalar:
        return _combined(operator.sub, "-", self, other)

    def __rsub__(self, other: Any) -> NkiScalar:
        return _combined(operator.sub, "-", other, self)

    def __mul__(self, other: Any) -> NkiScalar:
        return _combined(operator.mul, "*", self, other)

    def __rmul__(self, other: Any) -> NkiScalar:
        return _combined(operator.mul, "*", other, self)

    def __neg__(self) -> NkiScalar:
        return _combined(operator.sub, "-", 0, self)


def new_scalar(run: Run, value: int | None) -> NkiScalar:
    """Return a scalar of its own; without a value it is abstract."""
    run.registers += 1
    scalar = NkiScalar(run.registers, value, frozen=True)
    scalar.abstract = value is None
    return scalar


def _combined(function: Callable[[int, int], int], symbol: str, a: Any, b: Any) -> NkiScalar:
    run = current("arithmetic of an NkiScalar")
    for side in (a, b):
        whole = is_int(side) and -(2**31) <= side < 2**31
        if not whole and not isinstance(side, NkiScalar):
            raise RuleViolation(
                f"NkiScalar {symbol} {side!r}; both sides are NkiScalars or ints of 32 bits: load "
                "a register's value with nisa.scalar_load"
            )
    scalars = [s for s in (a, b) if isinstance(s, NkiScalar)]
    if any(s.abstract for s in scalars):
        result = new_scalar(run, None)
    else:
        left, right = (s.read() if isinstance(s, NkiScalar) else int(s) for s in (a, b))
        result = new_scalar(run, wrap(function(left, right)))
    run.control(
        "scalar_arithmetic", ControlWork("register_move"),
        hidden_reads=tuple(f"register:{s.number}" for s in scalars),
        hidden_writes=(f"register:{result.number}",),
    )  # fmt: skip
    return result


def scalar_load(src: NkiTensor) -> NkiScalar:
    """Return the single int32 of `src` (SBUF or HBM) as a scalar.

    Raises:
        ShapeError: `src` is no tensor of one element.
        DtypeError: it is no int32 (unsigned types are not accepted).
    """
    run = current("nisa.scalar_load")
    _int32(src, "scalar_load", "src")
    scalar = new_scalar(run, None)
    load(run, "scalar_load", scalar, src)
    return scalar


def scalar_store(dst: NkiTensor, value: NkiScalar) -> None:
    """The single int32 of `dst` (SBUF or HBM) = value.

    Raises:
        ShapeError: `dst` is no tensor of one element.
        DtypeError: it is no int32.
        RuleViolation: the value is no scalar; ints are not accepted.
    """
    run = current("nisa.scalar_store")
    _int32(dst, "scalar_store", "dst")
    if not isinstance(value, NkiScalar):
        raise RuleViolation(
            f"nisa.scalar_store: value={value!r}; it must be an NkiScalar: use nisa.memset for a "
            "constant, nisa.register_store for a register"
        )
    store(run, "scalar_store", dst, value)


def _int32(view: Any, opcode: str, operand: str) -> None:
    if isinstance(view, NkiTensor) and view.dtype != int32:
        raise DtypeError(
            f"nisa.{opcode}: {operand} is {view.dtype}; it must be int32 (the embedded NKI has no "
            "64 bits): copy it into an int32 tile"
        )
