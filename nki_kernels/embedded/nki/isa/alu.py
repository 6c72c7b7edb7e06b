"""What instructions with ALU operators share: rules, operand order, one rounding, folds."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from nki_kernels.hardware.spec import Engine
from nki_kernels.machine import dtypes
from nki_kernels.machine.checks.values import check_result
from nki_kernels.machine.core import Run, float_values
from nki_kernels.machine.dtypes import Array
from nki_kernels.machine.operators import Kernel, Op, operator
from nki_kernels.machine.rules import Operands, Rule
from nki_kernels.machine.tensor import NkiTensor


def ops_problem(ops: Operands, tokens: tuple[Any, ...], data: tuple[str, ...]) -> str | None:
    """Rules shared by instructions with ALU operators: known, one kind, right engine and types."""
    table = [operator(t) for t in tokens if t is not None]
    for op in table:
        if op.alu is None:
            return f"{op!r} is no ALU operator; use nisa.activation for activation functions"
        if op.name in ("abs_max", "abs_min") and ops.spec.generation < 4:
            return f"{op!r} on {ops.spec.name}; it needs gen4"
    kinds = {op.kind for op in table}
    if len(kinds) > 1:
        return (
            f"operators {table}; op0 and op1 are both bitvec or both arithmetic: split the "
            "instruction"
        )
    if kinds == {"bitvec"}:
        views = [(n, v) for n in (*data, "dst") if (v := ops.tensor(n)) is not None]
        bad = [f"{n} {v.dtype}" for n, v in views if not v.dtype.is_integer]
        if bad:
            return f"bitvec operator {table[0]!r} with {', '.join(bad)}; operands must be integers"
        if len({v.dtype.itemsize for _, v in views}) > 1:
            return f"bitvec operator {table[0]!r} on different widths; bits are never converted"
        if ops.engine is not Engine.vector:
            return (
                f"bitvec operator {table[0]!r} on {ops.engine.name}; it runs on the vector engine"
            )
    return None


@dataclass(frozen=True, init=False)
class VectorArithmetic(Rule):
    """The named arguments hold arithmetic operators that Vector has; `pairs` take two operands."""

    tokens: tuple[str, ...]
    pairs: tuple[str, ...]

    def __init__(self, *tokens: str, pairs: tuple[str, ...] = ()) -> None:
        object.__setattr__(self, "tokens", tokens)
        object.__setattr__(self, "pairs", pairs)

    def problem(self, ops: Operands) -> str | None:
        """Return what is wrong, or None."""
        for token in self.tokens:
            op = operator(ops[token])
            if op.kind == "bitvec":
                return (
                    f"{token}={op!r} is a bitvec operator; {ops.opcode} takes arithmetic ones: use "
                    "tensor_scalar or tensor_tensor"
                )
            found = ops_problem(ops, (op,), ())
            if found is not None:
                return found
            if op.name in ("square", "relu") and ops.spec.generation < 4:
                return f"{token}={op!r} on {ops.spec.name}; it needs gen4: use nisa.activation"
            if op.name == "rsqrt":
                return f"{token}={op!r}; the vector engine has no rsqrt: use nisa.activation"
            if token in self.pairs and op.arity != 2:
                return f"{token}={op!r} takes one operand; it must take two, for example nl.add"
            if token in self.pairs and op.name == "power":
                return f"{token}={op!r}; nl.power of two tiles runs on gpsimd: use tensor_tensor"
        return None

    def __str__(self) -> str:
        return " and ".join(f"`{t}`" for t in self.tokens) + " arithmetic operators of Vector"


@dataclass(frozen=True)
class NumberOrVector(Rule):
    """The operand is a number or a [P, 1] tile (see `PerPartition` for its extent).

    Attributes:
        operand: its name.
        op: the argument with its operator; a unary one takes None or 0.
        float32: a tile must be float32.
        optional: None is legal.
    """

    operand: str
    op: str | None = None
    float32: bool = False
    optional: bool = False

    def problem(self, ops: Operands) -> str | None:
        """Return what is wrong, or None."""
        value = ops[self.operand]
        if self.op is not None and operator(ops[self.op]).arity == 1:
            if value is None or (is_number(value) and value == 0):
                return None
            return f"{self.operand} for unary {operator(ops[self.op])!r}; it must be None or 0"
        if isinstance(value, NkiTensor):
            if self.float32 and value.dtype != dtypes.float32:
                return (
                    f"{self.operand} is {value.dtype}; a vector operand must be float32: convert "
                    "it with tensor_copy"
                )
            return None
        if is_number(value) or (value is None and self.optional):
            return None
        kind = "float32 " if self.float32 else ""
        return f"{self.operand}={value!r}; it must be a number or a {kind}[P, 1] tile"

    def __str__(self) -> str:
        return f"`{self.operand}` a number or {'float32 ' if self.float32 else ''}[P, 1]"


_FLOAT32_MAX = float(np.finfo(np.float32).max)


def is_number(value: Any) -> bool:
    """Return True for Python and NumPy numbers that become a float32; bool is none."""
    if isinstance(value, int):
        # A larger int has no float at all; a float beyond the range becomes an infinity.
        return not isinstance(value, bool) and abs(value) <= _FLOAT32_MAX
    return isinstance(value, (float, np.integer, np.floating))


def kernel_of(op: Op) -> Kernel:
    """Return the ALU form of an operator whose rules have passed.

    Raises:
        TypeError: it has none.
    """
    if op.alu is None:
        raise TypeError(f"{op!r} has no ALU form")
    return op.alu


def compute(run: Run, op: Op, target: Array, *operands: Any) -> None:
    """Evaluate an ALU operator in float32 and round once into `target`."""
    alu = kernel_of(op)
    if target.dtype.kind in "iu":
        result = alu(*operands, out=run.scratch("out", target.shape))
        check_result(run, op, result, target, operands)
        dtypes.store(target, result)
        return
    if target.dtype == np.float32:
        result = alu(*operands, out=target)
        if result is not target:
            np.copyto(target, result)
        return
    dtypes.store(target, alu(*operands, out=run.scratch("out", target.shape)))


def pair(
    op: Op, values: Array, operand: Any, reverse: bool, run: Run, slot: str
) -> tuple[Any, ...]:
    """Return the operator's arguments in order; a [P, 1] vector broadcasts over the free axes."""
    if op.arity == 1:
        return (values,)
    other = per_partition(operand, values.ndim, run, slot)
    return (other, values) if reverse else (values, other)


def per_partition(operand: Any, ndim: int, run: Run, slot: str) -> Any:
    """Return a number as float32, or a [P, 1] tile as float32 that broadcasts over `ndim` axes."""
    if isinstance(operand, NkiTensor):
        return float_values(operand, run, slot).reshape((operand.shape[0],) + (1,) * (ndim - 1))
    return np.float32(operand)


def rounded(number: float, host: Any) -> Array:
    """Return [1], the number rounded once to a host dtype (through float32 unless it is an int)."""
    single = np.empty(1, host)
    wide = np.int64 if isinstance(number, (int, np.integer)) else np.float32
    dtypes.store(single, np.full(1, number, wide))
    return single


_FOLDS: dict[str, np.ufunc] = {
    "add": np.add,
    "subtract": np.subtract,
    "multiply": np.multiply,
    "maximum": np.maximum,
    "minimum": np.minimum,
    "logical_and": np.logical_and,
    "logical_or": np.logical_or,
    "logical_xor": np.logical_xor,
    "bitwise_and": np.bitwise_and,
    "bitwise_or": np.bitwise_or,
    "bitwise_xor": np.bitwise_xor,
}
#: Operators whose result depends on the order, because each step rounds.
_ROUNDING = frozenset({"add", "subtract", "multiply"})


def fold(op: Op, rows: Array, run: Run) -> Array:
    """Reduce the last axis of [rows, n] from left to right, one rounding a step.

    Recorded Trainium results of tensor_reduce are bit-equal to that order; np.add.reduce sums in
    pairs. Logical operators give 1 or 0. The result lasts until the next call.
    """
    ufunc = _FOLDS[op.name]
    if op.name in _ROUNDING:
        steps = ufunc.accumulate(rows, axis=1, out=run.scratch("fold", rows.shape))
        last: Array = steps[:, -1]
        return last
    if op.name.startswith("logical"):
        truth: Array = ufunc.reduce(np.not_equal(rows, 0), axis=1).astype(np.float32)
        return truth
    result: Array = ufunc.reduce(rows, axis=1)
    return result


def fold_onto(op: Op, start: Array, rows: Array, run: Run) -> Array:
    """Reduce like `fold`, beginning with `start` [rows] as the zeroth element of each row."""
    held = run.scratch("fold_from", (rows.shape[0], rows.shape[1] + 1))
    held[:, 0] = start
    held[:, 1:] = rows
    return fold(op, held, run)
