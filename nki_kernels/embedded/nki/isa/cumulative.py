"""Running results, and reductions across partitions.

tensor_scalar_cumulative, tensor_partition_reduce.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from nki.isa.accumulator import NAME
from nki.isa.alu import NumberOrVector, VectorArithmetic, fold, kernel_of, pair, per_partition
from nki.isa.enums import reduce_cmd as commands

from nki_kernels.hardware.spec import Engine
from nki_kernels.machine import dtypes, work
from nki_kernels.machine.access_rules import TensorIndirection
from nki_kernels.machine.core import Run, float_values, write_values
from nki_kernels.machine.dtypes import Array
from nki_kernels.machine.instruction import Context, instruction
from nki_kernels.machine.operators import OPS, Op, operator
from nki_kernels.machine.rules import COMPUTE, BufferIs, Operands, PerPartition, Rule, SameExtent
from nki_kernels.machine.tensor import NkiTensor

_START = {"add": 0.0, "subtract": 0.0, "multiply": 1.0, "maximum": -np.inf, "minimum": np.inf}
_COMMANDS = ("reset_reduce", "reduce", "load_reduce")


@dataclass(frozen=True)
class _Cumulative(Rule):
    """Running operator, command and initial value; no 32-bit integers."""

    def problem(self, ops: Operands) -> str | None:
        op = operator(ops["op1"])
        if op.name not in _START:
            legal = ", ".join(f"nl.{name}" for name in _START)
            return f"op1={op!r}; allowed are {legal}"
        for name in ("dst", "src"):
            kind = ops[name].dtype
            if kind in (dtypes.int32, dtypes.uint32, dtypes.tfloat32) or kind.kind == "packed":
                return (
                    f"{name} is {kind}; allowed are 8- and 16-bit integers and floats other than "
                    "tfloat32: convert it with tensor_copy"
                )
        command = getattr(ops["reduce_cmd"], "name", None)
        if command not in _COMMANDS:
            return f"reduce_cmd={ops['reduce_cmd']!r}; allowed are {', '.join(_COMMANDS)}"
        if (command == "load_reduce") != (ops["imm1"] is not None):
            return (
                f"imm1={ops['imm1']!r} with reduce_cmd={command}; give it with load_reduce and "
                "only then"
            )
        return None

    def __str__(self) -> str:
        return "`op1` add, subtract, multiply, maximum, minimum; `imm1` with load_reduce only"


def _hidden(ops: Operands) -> tuple[tuple[str, ...], tuple[str, ...]]:
    return ((NAME,) if ops["reduce_cmd"] is commands.reduce else (), (NAME,))


@instruction(
    engines=(Engine.vector,),
    reads=("src", "imm0", "imm1"),
    writes=("dst",),
    rules=(
        *COMPUTE,
        TensorIndirection("dst", "src"),
        BufferIs("dst", "sbuf", "psum"),
        SameExtent("dst", "src"),
        PerPartition("imm0", "src"),
        PerPartition("imm1", "src"),
        VectorArithmetic("op0"),
        NumberOrVector("imm0", op="op0", float32=True),
        NumberOrVector("imm1", float32=True, optional=True),
        _Cumulative(),
    ),
    cost=work.stream("tensor_scalar_cumulative", data=("src",), vectors=("imm0",), function="op0"),
    hidden=_hidden,
    source="nki.isa.tensor_scalar_cumulative; cost: 2 N cycles, as a scan (no published formula)",
)
def tensor_scalar_cumulative(
    ctx: Context,
    dst: NkiTensor,
    src: NkiTensor,
    op0: Any,
    op1: Any,
    imm0: Any,
    imm1: Any = None,
    reduce_cmd: commands = commands.reset_reduce,
    name: str | None = None,
) -> None:
    """dst[p, i] = reg[p] = op1(op0(src[p, i], imm0[p]), reg[p]), i over the flattened free axes.

    reg is Vector's accumulator in float32, not rounded to dst on the way. It begins with the
    identity of op1 (reset_reduce; 0 for subtract), what it held (reduce) or imm1 (load_reduce), and
    keeps the last value. subtract is op0(...) - reg.
    """
    run, first, second = ctx.run, operator(op0), operator(op1)
    values = kernel_of(first)(
        *pair(first, float_values(src, run, "a"), imm0, False, run, "b"),
        out=run.scratch("middle", src.shape),
    ).reshape(src.shape[0], -1)
    start = src.start_partition
    lanes = run.vector_accumulator[start : start + src.shape[0]]
    if reduce_cmd is commands.load_reduce:
        lanes[...] = per_partition(imm1, 1, run, "init")
    elif reduce_cmd is commands.reset_reduce:
        lanes[...] = _START[second.name]
    steps = _steps(second, lanes, values, run)
    lanes[...] = steps[:, -1]
    write_values(dst, steps)


def _steps(op: Op, start: Array, values: Array, run: Run) -> Array:
    """Return every running value [rows, n], beginning with op(values[:, 0], start)."""
    held = run.scratch("cumulative", (values.shape[0], values.shape[1] + 1))
    held[:, 0] = start
    held[:, 1:] = values
    if op.name == "subtract":
        for at in range(1, held.shape[1]):
            np.subtract(held[:, at], held[:, at - 1], out=held[:, at])
    else:
        # The others commute, so the running value may come first.
        np.copyto(held, _UFUNCS[op.name].accumulate(held, axis=1))
    return held[:, 1:]


_UFUNCS: dict[str, np.ufunc] = {
    "add": np.add, "multiply": np.multiply, "maximum": np.maximum, "minimum": np.minimum,
}  # fmt: skip


@dataclass(frozen=True)
class _AcrossPartitions(Rule):
    """An operator GpSimd reduces with; dst is one partition of data's columns."""

    def problem(self, ops: Operands) -> str | None:
        op, dst, data = operator(ops["op"]), ops["dst"], ops["data"]
        if op.name not in _ACROSS:
            return f"op={op!r}; allowed are {', '.join(f'nl.{name}' for name in _ACROSS)}"
        if (dst.shape[0], dst.free_size) != (1, data.free_size):
            return (
                f"dst {list(dst.shape)} for data {list(data.shape)}; it must hold [1, "
                f"{data.free_size}] elements: allocate it so"
            )
        if op.kind == "bitvec":
            bad = [f"{n} {v.dtype}" for n, v in ops.tensors() if not v.dtype.is_integer]
            if bad:
                return f"bitvec operator {op!r} with {', '.join(bad)}; operands must be integers"
            if dst.dtype.itemsize != data.dtype.itemsize:
                return f"bitvec operator {op!r} on different widths; bits are never converted"
        return None

    def __str__(self) -> str:
        return "`op` add, average, maximum, bitwise_or, bitwise_and; `dst` [1, N]"


_ACROSS = ("add", "average", "maximum", "bitwise_or", "bitwise_and")


@instruction(
    engines=(Engine.gpsimd,),
    reads=("data",),
    writes=("dst",),
    rules=(*COMPUTE, _AcrossPartitions()),
    cost=work.stream("tensor_partition_reduce", data=("data",), function="op"),
    source="nki.isa.tensor_partition_reduce; cost: N cycles, a lower bound (no published formula)",
)
def tensor_partition_reduce(
    ctx: Context,
    dst: NkiTensor,
    op: Any,
    data: NkiTensor,
    name: str | None = None,
) -> None:
    """dst[0, f] = op over partitions p of data[p, f], from the first to the last, in float32.

    average divides the sum by P once. Bitwise operators work on raw bits. The documents name the
    operators and the engine only.
    """
    kind, run = operator(op), ctx.run
    if kind.kind == "bitvec":
        bits = data.mem.array(data.region, data.dtype.host).reshape(data.shape[0], -1)
        target = dst.mem.array(dst.region, dst.dtype.host)
        np.copyto(target, fold(kind, bits.T, run).view(target.dtype).reshape(target.shape))
        return
    rows = float_values(data, run, "a").reshape(data.shape[0], -1).T
    if kind.name != "average":
        write_values(dst, fold(kind, rows, run))
        return
    write_values(dst, fold(OPS["add"], rows, run) / np.float32(data.shape[0]))
