"""Scalar engine: activation, activation_reduce."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from nki.isa.alu import fold, is_number, per_partition
from nki.isa.enums import reduce_cmd as reduce_commands

from nki_kernels.hardware.spec import Engine
from nki_kernels.machine import dtypes, work
from nki_kernels.machine.access_rules import TensorIndirection
from nki_kernels.machine.checks.values import check_domain
from nki_kernels.machine.core import Run, float_values
from nki_kernels.machine.dtypes import Array
from nki_kernels.machine.instruction import Context, instruction
from nki_kernels.machine.operators import OPS, operator
from nki_kernels.machine.rules import COMPUTE, BufferIs, Operands, PerPartition, Rule, SameExtent
from nki_kernels.machine.tensor import NkiTensor
from nki_kernels.machine.trace import StreamWork

_ON_CHIP = ("sbuf", "psum")
_COMMANDS = ("idle", "reset", "reduce", "reset_reduce")


@dataclass(frozen=True)
class _ActivationOperands(Rule):
    """Function, scale, bias and accumulation of an activation."""

    def problem(self, ops: Operands) -> str | None:
        op = operator(ops["op"])
        if op.activation is None:
            return (
                f"{op!r} is no activation function; ALU operators go to tensor_scalar or "
                "tensor_tensor"
            )
        scale, bias = ops["scale"], ops["bias"]
        if isinstance(scale, NkiTensor):
            if scale.dtype != dtypes.float32:
                return f"scale is {scale.dtype}; a vector scale must be float32"
        elif not is_number(scale):
            return f"scale={scale!r}; it must be a number or a float32 [P, 1] tile"
        if isinstance(bias, NkiTensor):
            if bias.dtype == dtypes.tfloat32 or not bias.dtype.is_float:
                return f"bias is {bias.dtype}; it must be a float type other than tfloat32"
        elif bias is not None:
            if not is_number(bias):
                return f"bias={bias!r}; it must be None, a number or a [P, 1] tile"
            if ops.spec.generation == 2:
                return f"bias={bias!r} is a number; on {ops.spec.name} it must be a [P, 1] tile"
        if bias is not None and op.name == "reciprocal" and ops.spec.generation == 2:
            return f"nl.reciprocal with a bias on {ops.spec.name}; add the bias first"
        return self._reduction(ops)

    def _reduction(self, ops: Operands) -> str | None:
        # activation_reduce has no such operand: it is always reset_reduce.
        asked = ops.values.get("reduce_cmd", reduce_commands.reset_reduce)
        command = getattr(asked, "name", None)
        if command not in _COMMANDS:
            return f"reduce_cmd={asked!r}; allowed are {', '.join(_COMMANDS)}"
        reduce_op = ops["reduce_op"]
        if reduce_op is not None and operator(reduce_op).name != "add":
            return f"reduce_op={reduce_op!r}; the Scalar engine only adds: pass nl.add"
        if command in ("reduce", "reset_reduce") and reduce_op is None:
            return f"reduce_cmd={command} without reduce_op; pass reduce_op=nl.add"
        result = ops.tensor("reduce_res")
        if result is None and ops["reduce_res"] is not None:
            return f"reduce_res={ops['reduce_res']!r}; it must be a [P, 1] tile or None"
        if result is not None and not result.dtype.is_float:
            return f"reduce_res is {result.dtype}; it must be a float type"
        return None

    def __str__(self) -> str:
        return "`op` an activation; `scale` a number or float32 [P, 1]; `reduce_op` nl.add"


@dataclass(frozen=True)
class ScalarOrGpSimd(Rule):
    """GpSimd activates from gen4 on (NKI 0.7), without an accumulator."""

    def problem(self, ops: Operands) -> str | None:
        """Return what is wrong, or None."""
        if ops.engine is not Engine.gpsimd:
            return None
        if ops.spec.generation < 4:
            return f"engine=gpsimd on {ops.spec.name}; it needs gen4: use the scalar engine"
        idle = ops["reduce_cmd"] is reduce_commands.idle
        if not idle or ops["reduce_res"] is not None or ops["reduce_op"] is not None:
            return (
                "a reduction with engine=gpsimd; only the scalar engine has accumulators: use it, "
                "or reduce the result with tensor_reduce"
            )
        return None

    def __str__(self) -> str:
        return "GpSimd from gen4, without a reduction"


def hidden(ops: Operands) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Return the hidden state read and written: always the table, else as the command says."""
    if ops.engine is Engine.gpsimd:
        return (), ()
    command = getattr(ops.values.get("reduce_cmd"), "name", "reset_reduce")
    reads = ["act_table"]
    if command == "reduce" or (command == "idle" and ops.tensor("reduce_res") is not None):
        reads.append("act_accumulator")
    return tuple(reads), () if command == "idle" else ("act_accumulator",)


_RULES: tuple[Rule, ...] = (
    *COMPUTE,
    TensorIndirection("dst", "data"),
    BufferIs("dst", *_ON_CHIP),
    SameExtent("dst", "data"),
    PerPartition("bias", "data"),
    PerPartition("scale", "data"),
    PerPartition("reduce_res", "data"),
    _ActivationOperands(),
)


@instruction(
    engines=(Engine.scalar, Engine.gpsimd),
    reads=("data", "bias", "scale"),
    writes=("dst", "reduce_res"),
    rules=(*_RULES, ScalarOrGpSimd()),
    cost=work.stream("activation", data=("data",), vectors=("bias", "scale"), function="op"),
    hidden=hidden,
    source="nki.isa.activation; cost: max(64, N) cycles, +64 to read the accumulator (NKI 2.26)",
)
def activation(
    ctx: Context,
    dst: NkiTensor,
    op: Any,
    data: NkiTensor,
    bias: Any = None,
    scale: Any = 1.0,
    reduce_op: Any = None,
    reduce_res: Any = None,
    reduce_cmd: reduce_commands = reduce_commands.idle,
    name: str | None = None,
    engine: Engine = Engine.scalar,
) -> None:
    """dst[p, f] = op(data[p, f] * scale[p] + bias[p]) in float32, one rounding on the write.

    reduce_cmd: reset clears the accumulator of each partition, reduce adds the row sum of the
    activated values (before rounding to dst: the documents say only "activated data"), reset_reduce
    does both. reduce_res, if given, receives the accumulator afterwards, also with idle. `engine`
    is of NKI 0.7.
    """
    values = _activate(ctx.run, dst, op, data, bias, scale)
    if reduce_cmd is not reduce_commands.idle or reduce_res is not None:
        _reduce(ctx.run, data, values, reduce_cmd, reduce_res)


def _reducing(ops: Operands) -> StreamWork:
    """The cost of an activation that always accumulates."""
    build = work.stream(
        "activation_reduce", data=("data",), vectors=("bias", "scale"), function="op"
    )
    return replace(build(ops), reduces=True)


@instruction(
    engines=(Engine.scalar,),
    reads=("data", "bias", "scale"),
    writes=("dst", "reduce_res"),
    rules=_RULES,
    cost=_reducing,
    hidden=hidden,
    source="nki.isa.activation_reduce; cost: max(64, N) + 64 cycles (NKI 2.26), trn2 laws",
)
def activation_reduce(
    ctx: Context,
    dst: NkiTensor,
    op: Any,
    data: NkiTensor,
    reduce_op: Any,
    reduce_res: NkiTensor | None,
    bias: Any = None,
    scale: Any = 1.0,
    name: str | None = None,
) -> None:
    """dst = op(data * scale + bias); reduce_res[p] = sum_f of it: activation with reset_reduce.

    With reduce_res=None the sum stays in the accumulator.
    """
    values = _activate(ctx.run, dst, op, data, bias, scale)
    _reduce(ctx.run, data, values, reduce_commands.reset_reduce, reduce_res)


def _activate(run: Run, dst: NkiTensor, op: Any, data: NkiTensor, bias: Any, scale: Any) -> Array:
    """Write the activated values to dst and return them unrounded."""
    values = float_values(data, run, "a")
    result = run.scratch("act", data.shape)
    if isinstance(scale, NkiTensor) or scale != 1.0:
        values = np.multiply(values, per_partition(scale, data.ndim, run, "b"), out=result)
    if bias is not None:
        values = np.add(values, per_partition(bias, data.ndim, run, "c"), out=result)
    function = operator(op).activation
    if function is None:
        raise TypeError(f"{op!r} has no activation form")
    check_domain(run, operator(op), data, values)
    values = function(values)
    target = dst.mem.array(dst.region, dst.dtype.host)
    dtypes.store(target, values if values.shape == target.shape else values.reshape(target.shape))
    return values


def _reduce(
    run: Run,
    data: NkiTensor,
    values: Array,
    command: reduce_commands,
    reduce_res: NkiTensor | None,
) -> None:
    """Apply the command to the accumulator and store it."""
    first = data.start_partition
    lanes = run.act_accumulator[first : first + data.shape[0]]
    if command in (reduce_commands.reset, reduce_commands.reset_reduce):
        lanes[...] = 0
    if command in (reduce_commands.reduce, reduce_commands.reset_reduce):
        # Left to right along the free axis, as recorded for tensor_reduce; assumed for this engine.
        lanes += fold(OPS["add"], values.reshape(values.shape[0], -1), run)
    if reduce_res is not None:
        sums = reduce_res.mem.array(reduce_res.region, reduce_res.dtype.host)
        dtypes.store(sums, lanes.reshape(sums.shape))
