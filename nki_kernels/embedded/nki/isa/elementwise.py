"""Elementwise: tensor_copy, memset, tensor_tensor, tensor_scalar and their relatives."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from nki.isa.alu import (
    NumberOrVector,
    VectorArithmetic,
    compute,
    is_number,
    kernel_of,
    ops_problem,
    pair,
)

from nki_kernels.hardware.spec import Engine
from nki_kernels.machine import dtypes, work
from nki_kernels.machine.access_rules import TensorIndirection
from nki_kernels.machine.core import float_values
from nki_kernels.machine.dtypes import Array, DType
from nki_kernels.machine.instruction import Context, instruction
from nki_kernels.machine.operators import OPS, Op, operator
from nki_kernels.machine.rules import (
    COMPUTE,
    BufferIs,
    NotAllIn,
    Operands,
    PerPartition,
    Rule,
    SameExtent,
    memory,
)
from nki_kernels.machine.tensor import NkiTensor

_INT32 = (dtypes.int32, dtypes.uint32)
_ON_CHIP = ("sbuf", "psum")


@dataclass(frozen=True)
class _CopyEngine(Rule):
    """The Scalar engine of gen2 copies nothing."""

    def problem(self, ops: Operands) -> str | None:
        if ops.engine is Engine.scalar and ops.spec.generation == 2:
            return (
                f"engine=scalar on {ops.spec.name}; use the vector engine, or "
                "activation(op=nl.copy)"
            )
        return None

    def __str__(self) -> str:
        return "Scalar from gen3 on"


@instruction(
    engines=(Engine.vector, Engine.scalar, Engine.gpsimd),
    reads=("src",),
    writes=("dst",),
    rules=(
        *COMPUTE,
        TensorIndirection("dst", "src"),
        BufferIs("dst", *_ON_CHIP),
        BufferIs("src", *_ON_CHIP),
        SameExtent("dst", "src"),
        _CopyEngine(),
    ),
    cost=work.stream("tensor_copy", data=("src",)),
    source="nki.isa.tensor_copy; cost: max(64, N) cycles (NKI 2.26), trn2 laws",
)
def tensor_copy(
    ctx: Context,
    dst: NkiTensor,
    src: NkiTensor,
    engine: Engine = Engine.unknown,
    name: str | None = None,
) -> None:
    """dst[p, f] = src[p, f]: bits where the dtypes are equal, else through float32.

    The default engine is Vector (the published default is the compiler's choice).
    """
    target = dst.mem.array(dst.region, dst.dtype.host)
    if src.dtype is dst.dtype:
        values = src.mem.array(src.region, src.dtype.host)
        np.copyto(target, values if values.shape == target.shape else values.reshape(target.shape))
        return
    values = float_values(src, ctx.run, "a")
    dtypes.store(target, values if values.shape == target.shape else values.reshape(target.shape))


def _bounds(dtype: DType) -> tuple[int, int]:
    """Return the least and the greatest int an immediate of `dtype` may be."""
    if dtype == dtypes.bool_:
        return 0, 1
    if dtype.is_integer:
        info = np.iinfo(dtype.host)
        return int(info.min), int(info.max)
    most = int(np.finfo(np.float32).max)  # immediates are float32, whatever they are rounded to
    return -most, most


@dataclass(frozen=True)
class _FillValue(Rule):
    """A float fills float types only; packed types take 0."""

    def problem(self, ops: Operands) -> str | None:
        dst, value = ops["dst"], ops["value"]
        if not isinstance(value, (int, float, np.integer, np.floating)):
            return f"value {value!r}; it must be a number known when the kernel is built"
        if dst.dtype.is_integer and isinstance(value, (float, np.floating)):
            return f"value {value!r} is a float and dst is {dst.dtype}; write an int, for example 0"
        low, high = _bounds(dst.dtype)
        if not isinstance(value, (float, np.floating)) and not low <= value <= high:
            return f"value {value!r} into {dst.dtype}; it holds {low} to {high}: write one of those"
        if dst.dtype.kind == "packed" and value != 0:
            return f"value {value!r} into {dst.dtype}; packed types can only be filled with 0"
        return None

    def __str__(self) -> str:
        return "`value` of dst's kind"


@instruction(
    engines=(Engine.vector, Engine.gpsimd),
    reads=(),
    writes=("dst",),
    rules=(*COMPUTE, BufferIs("dst", *_ON_CHIP), _FillValue()),
    cost=work.stream("memset"),
    source="nki.isa.memset; cost: max(64, N) cycles (NKI 2.26), trn2 laws",
)
def memset(
    ctx: Context,
    dst: NkiTensor,
    value: float,
    engine: Engine = Engine.unknown,
    name: str | None = None,
) -> None:
    """dst[p, f] = value, rounded to dst's dtype once; integers are exact."""
    target = dst.mem.array(dst.region, dst.dtype.host)
    if dst.dtype.is_integer:
        dtypes.store(target, np.full((), value, np.int64))
    else:
        target[...] = np.float32(value).astype(target.dtype)


@dataclass(frozen=True)
class _TensorTensorOps(Rule):
    """Operator kind, dtypes and engine of tensor_tensor."""

    def problem(self, ops: Operands) -> str | None:
        found = ops_problem(ops, (ops["op"],), ("data1", "data2"))
        if found is not None:
            return found
        op = operator(ops["op"])
        if op.arity != 2:
            return f"{op!r} takes one operand; use tensor_scalar or activation"
        if op.name == "power" and ops.engine is not Engine.gpsimd:
            return "nl.power runs on gpsimd, from SBUF; copy PSUM operands to SBUF"
        return None

    def __str__(self) -> str:
        return "`op` an ALU operator of two operands; bitvec on integers, on Vector"


def _tensor_tensor_engine(ops: Operands) -> Engine:
    """All 32-bit integers in SBUF go to GpSimd, exact; power runs nowhere else."""
    views = [ops["dst"], ops["data1"], ops["data2"]]
    op = operator(ops["op"])
    if op.name == "power":
        return Engine.gpsimd
    exact = op.kind == "arith" and all(v.dtype in _INT32 and memory(v) == "sbuf" for v in views)
    return Engine.gpsimd if exact else Engine.vector


@instruction(
    engines=(Engine.vector, Engine.gpsimd),
    default=_tensor_tensor_engine,
    reads=("data1", "data2"),
    writes=("dst",),
    rules=(
        *COMPUTE,
        TensorIndirection("dst", "data1"),
        BufferIs("dst", *_ON_CHIP),
        SameExtent("dst", "data1", "data2"),
        NotAllIn("psum", "data1", "data2"),
        _TensorTensorOps(),
    ),
    cost=work.stream("tensor_tensor", data=("data1", "data2"), function="op"),
    source="nki.isa.tensor_tensor; cost: trn2 laws (documented: N or 2N cycles, NKI 2.26)",
)
def tensor_tensor(
    ctx: Context,
    dst: NkiTensor,
    data1: NkiTensor,
    data2: NkiTensor,
    op: Any,
    engine: Engine = Engine.unknown,
    name: str | None = None,
) -> None:
    """dst[p, f] = op(data1[p, f], data2[p, f]) in float32.

    Bitvec operators work on raw bits. With only int32/uint32 operands on GpSimd the arithmetic is
    32-bit integer and wraps (wrapping is this project's reading; the documents say "exact"), except
    for power, which stays in float32: no document describes an integer power.
    """
    run, kind = ctx.run, operator(op)
    target = dst.mem.array(dst.region, dst.dtype.host)
    integers = (
        ctx.engine is Engine.gpsimd
        and kind.name != "power"
        and all(v.dtype in _INT32 for v in (dst, data1, data2))
    )
    if kind.kind == "bitvec" or integers:
        a = data1.mem.array(data1.region, data1.dtype.host).reshape(target.shape)
        b = data2.mem.array(data2.region, data2.dtype.host).reshape(target.shape)
        _integer_store(target, kind, a, b)
        return
    a, b = float_values(data1, run, "a"), float_values(data2, run, "b")
    if a.shape != target.shape:
        a = a.reshape(target.shape)
    if b.shape != target.shape:
        b = b.reshape(target.shape)
    compute(run, kind, target, a, b)


def _integer_store(target: Array, op: Op, a: Array, b: Any) -> None:
    alu = kernel_of(op)
    result = alu(a, b) if op.arity == 2 else alu(a)
    np.copyto(target, result.astype(target.dtype, copy=False), casting="unsafe")


@dataclass(frozen=True)
class _TensorScalarOps(Rule):
    """Operators, operand types and engine of tensor_scalar."""

    def problem(self, ops: Operands) -> str | None:
        op1, operand1 = ops["op1"], ops["operand1"]
        if (op1 is None) != (operand1 is None) and not (
            op1 is not None and operator(op1).arity == 1
        ):
            return f"op1={op1!r} with operand1={operand1!r}; give both or neither"
        found = ops_problem(ops, (ops["op0"], op1), ("data",))
        if found is not None:
            return found
        return self._operands(ops) or self._engine(ops)

    def _operands(self, ops: Operands) -> str | None:
        for token, name in (("op0", "operand0"), ("op1", "operand1")):
            if ops[token] is None:
                continue
            op, value = operator(ops[token]), ops[name]
            if op.arity == 1:
                if value is not None and (isinstance(value, NkiTensor) or value != 0):
                    return f"{name} for unary {op!r}; it must be None or 0"
                continue
            if op.kind == "bitvec":
                integer = isinstance(value, (int, np.integer)) and not isinstance(value, bool)
                if isinstance(value, NkiTensor):
                    integer = value.dtype.is_integer
                if not integer:
                    return f"{name}={value!r} for bitvec {op!r}; it must be an integer"
                if not isinstance(value, NkiTensor):
                    reverse = ops[f"reverse{name[-1]}"]
                    found = self._bits(name, op, value, ops["data"].dtype, reverse)
                    if found is not None:
                        return found
            elif isinstance(value, NkiTensor):
                if value.dtype != dtypes.float32:
                    return (
                        f"{name} is {value.dtype}; a vector operand of arithmetic must be float32"
                    )
            elif not is_number(value):
                return f"{name}={value!r}; it must be a number or a float32 [P, 1] tile"
        return None

    @staticmethod
    def _bits(name: str, op: Op, value: int, dtype: DType, reverse: bool) -> str | None:
        """Return why an immediate does not fit the data's bits, or shifts by too many."""
        width = 8 * dtype.itemsize
        amount = op.name in ("left_shift", "right_shift") and not reverse
        low, high = (0, width - 1) if amount else (-(2 ** (width - 1)), 2**width - 1)
        if low <= value <= high:
            return None
        return (
            f"{name}={value!r} for {op!r} of {dtype} data; it must be {low} to {high}: write one "
            "of those"
        )

    def _engine(self, ops: Operands) -> str | None:
        names = [operator(t).name for t in (ops["op0"], ops["op1"]) if t is not None]
        for name in names:
            if name in ("square", "relu") and ops.spec.generation < 4:
                return f"nl.{name} on {ops.spec.name}; it needs gen4: use nisa.activation"
        if ops.engine is Engine.gpsimd and names != ["rsqrt"]:
            return f"operators {names} on gpsimd; tensor_scalar runs only nl.rsqrt there"
        if ops.engine is Engine.vector and "rsqrt" in names:
            return "nl.rsqrt on the vector engine; it runs on gpsimd or scalar: use nisa.activation"
        if ops.engine is Engine.scalar and ops.spec.generation < 4:
            legal = (["multiply", "add"], ["multiply"], ["add"], ["rsqrt"])
            if ops.spec.generation < 3 or names not in legal:
                return (
                    f"operators {names} on the scalar engine of {ops.spec.name}; it has "
                    "multiply-add, multiply and add (gen3): use the vector engine"
                )
        return None

    def __str__(self) -> str:
        return "`operand0/1` a number or float32 [P, 1]; bitvec on integers, on Vector"


def _tensor_scalar_engine(ops: Operands) -> Engine:
    """Vector, but rsqrt lives on GpSimd, and on Scalar where an operand is in PSUM."""
    if operator(ops["op0"]).name != "rsqrt":
        return Engine.vector
    psum = any(memory(v) == "psum" for _, v in ops.tensors())
    return Engine.scalar if psum else Engine.gpsimd


@instruction(
    engines=(Engine.vector, Engine.scalar, Engine.gpsimd),
    default=_tensor_scalar_engine,
    reads=("data", "operand0", "operand1"),
    writes=("dst",),
    rules=(
        *COMPUTE,
        TensorIndirection("dst", "data"),
        BufferIs("dst", *_ON_CHIP),
        SameExtent("dst", "data"),
        PerPartition("operand0", "data"),
        PerPartition("operand1", "data"),
        _TensorScalarOps(),
    ),
    cost=work.stream(
        "tensor_scalar", data=("data",), vectors=("operand0", "operand1"), function="op0"
    ),
    source="nki.isa.tensor_scalar; cost: max(64, N) cycles (NKI 2.26), trn2 laws",
)
def tensor_scalar(
    ctx: Context,
    dst: NkiTensor,
    data: NkiTensor,
    op0: Any,
    operand0: Any,
    reverse0: bool = False,
    op1: Any = None,
    operand1: Any = None,
    reverse1: bool = False,
    engine: Engine = Engine.unknown,
    name: str | None = None,
) -> None:
    """dst[p, f] = op1(op0(data[p, f], operand0[p]), operand1[p]) in float32; reverse swaps a pair.

    Numbers are rounded to float32 first. Bitvec operators work on raw bits with integer operands.
    """
    run, first = ctx.run, operator(op0)
    second = None if op1 is None else operator(op1)
    target = dst.mem.array(dst.region, dst.dtype.host)
    if first.kind == "bitvec":
        values = data.mem.array(data.region, data.dtype.host).reshape(target.shape)
        middle = _bits(first, values, operand0, reverse0)
        if second is not None:
            middle = _bits(second, middle, operand1, reverse1)
        np.copyto(target, middle.view(target.dtype))
        return
    values = float_values(data, run, "a")
    if values.shape != target.shape:
        values = values.reshape(target.shape)
    if second is None:
        compute(run, first, target, *pair(first, values, operand0, reverse0, run, "b"))
        return
    middle = kernel_of(first)(
        *pair(first, values, operand0, reverse0, run, "b"), out=run.scratch("middle", target.shape)
    )
    compute(run, second, target, *pair(second, middle, operand1, reverse1, run, "c"))


def _bits(op: Op, values: Array, operand: Any, reverse: bool) -> Array:
    alu = kernel_of(op)
    if op.arity == 1:
        return alu(values)
    if isinstance(operand, NkiTensor):
        other = operand.mem.array(operand.region, operand.dtype.host)
        other = other.reshape((values.shape[0],) + (1,) * (values.ndim - 1)).astype(values.dtype)
    else:
        other = np.asarray(operand).astype(values.dtype)
    return alu(other, values) if reverse else alu(values, other)


@instruction(
    engines=(Engine.vector,),
    reads=("data", "operand0", "operand1"),
    writes=("dst",),
    rules=(
        *COMPUTE,
        BufferIs("dst", *_ON_CHIP),
        SameExtent("dst", "data", "operand1"),
        NotAllIn("psum", "data", "operand1"),
        PerPartition("operand0", "data"),
        VectorArithmetic("op0", "op1", pairs=("op1",)),
        NumberOrVector("operand0", op="op0"),
    ),
    cost=work.stream(
        "scalar_tensor_tensor",
        data=("data", "operand1"),
        vectors=("operand0",),
        function="op0",
        joins="op1",
    ),
    source="nki.isa.scalar_tensor_tensor; cost: N + 102 cycles (AWS profile; documented N or 2N)",
)
def scalar_tensor_tensor(
    ctx: Context,
    dst: NkiTensor,
    data: NkiTensor,
    op0: Any,
    operand0: Any,
    op1: Any,
    operand1: NkiTensor,
    reverse0: bool = False,
    reverse1: bool = False,
    name: str | None = None,
) -> None:
    """dst[p, f] = op1(op0(data[p, f], operand0[p]), operand1[p, f]) in float32.

    reverse0 and reverse1 swap a pair. Arithmetic operators only; the result of op0 is rounded to
    float32 and to nothing narrower.
    """
    run, first, second = ctx.run, operator(op0), operator(op1)
    target = dst.mem.array(dst.region, dst.dtype.host)
    values = float_values(data, run, "a").reshape(target.shape)
    middle = kernel_of(first)(
        *pair(first, values, operand0, reverse0, run, "b"), out=run.scratch("middle", target.shape)
    )
    other = float_values(operand1, run, "c").reshape(target.shape)
    compute(run, second, target, *((other, middle) if reverse1 else (middle, other)))


@instruction(
    engines=(Engine.vector,),
    reads=("data",),
    writes=("dst",),
    rules=(*COMPUTE, BufferIs("dst", *_ON_CHIP), SameExtent("dst", "data")),
    cost=work.stream("reciprocal", data=("data",)),
    source="nki.isa.reciprocal; cost: trn2 laws, 6 N cycles (documented 8 N, NKI 2.26)",
)
def reciprocal(
    ctx: Context,
    dst: NkiTensor,
    data: NkiTensor,
    name: str | None = None,
) -> None:
    """dst[p, f] = 1 / data[p, f] in float32; 1 / 0 is inf with the sign of the zero."""
    target = dst.mem.array(dst.region, dst.dtype.host)
    values = float_values(data, ctx.run, "a").reshape(target.shape)
    compute(ctx.run, OPS["reciprocal"], target, values)
