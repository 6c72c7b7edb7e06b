"""Scalar engine from gen4: activate2, an activation behind two tensor-scalar operations."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from nki.isa.activation import ScalarOrGpSimd, hidden
from nki.isa.alu import NumberOrVector, fold_onto, kernel_of, pair, per_partition
from nki.isa.enums import reduce_cmd as commands

from nki_kernels.hardware.spec import Engine
from nki_kernels.machine import dtypes, work
from nki_kernels.machine.access_rules import TensorIndirection
from nki_kernels.machine.core import Run, float_values, write_values
from nki_kernels.machine.dtypes import Array
from nki_kernels.machine.instruction import Context, instruction
from nki_kernels.machine.operators import Op, operator
from nki_kernels.machine.rules import COMPUTE, BufferIs, Operands, PerPartition, Rule, SameExtent
from nki_kernels.machine.tensor import NkiTensor

_ON_CHIP = ("sbuf", "psum")
#: The pairs (op0, op1) that exist.
_PAIRS = (
    ("multiply", "add"), ("multiply", "subtract"), ("multiply", "bypass"), ("add", "bypass"),
    ("subtract", "bypass"), ("bypass", "bypass"),
)  # fmt: skip
#: Value of the accumulator after a reset; those of abs_max and abs_min are undocumented.
_IDENTITY = {"add": 0.0, "maximum": -np.inf, "minimum": np.inf, "abs_max": 0.0, "abs_min": np.inf}
_COMMANDS = ("idle", "reset", "reduce", "reset_reduce")


@dataclass(frozen=True)
class _Stages(Rule):
    """From gen4: an activation, one of six operator pairs, reversals of operators that exist."""

    def since(self) -> int:
        """Return the first generation that has it."""
        return 4

    def problem(self, ops: Operands) -> str | None:
        """Return what is wrong, or None."""
        if ops.spec.generation < self.since():
            return f"activate2 on {ops.spec.name}; it needs gen4: use nisa.activation"
        op = operator(ops["op"])
        if op.activation is None and op.name != "prelu":
            return f"{op!r} is no activation function; pass one such as nl.exp, or nl.prelu"
        found = tuple(operator(ops[name]).name for name in ("op0", "op1"))
        if found not in _PAIRS:
            legal = ", ".join(f"(nl.{a}, nl.{b})" for a, b in _PAIRS)
            return f"(op0, op1) is (nl.{found[0]}, nl.{found[1]}); allowed are {legal}"
        for index, name in enumerate(found):
            if ops[f"reverse{index}"] not in (True, False):
                return f"reverse{index}={ops[f'reverse{index}']!r}; it must be True or False"
            if ops[f"reverse{index}"] and name == "bypass":
                return f"reverse{index} with op{index}=nl.bypass; there is nothing to reverse"
        return None

    def __str__(self) -> str:
        return "gen4; `op0`, `op1` one of six pairs; `op` an activation or prelu"


@dataclass(frozen=True)
class _Immediates(Rule):
    """Numbers, or float [P, 1] tiles of one dtype; what nl.bypass ignores may be None."""

    def problem(self, ops: Operands) -> str | None:
        """Return what is wrong, or None."""
        tiles = []
        for index in (0, 1):
            name, bypassed = f"imm{index}", operator(ops[f"op{index}"]).name == "bypass"
            found = NumberOrVector(name, optional=bypassed).problem(ops)
            if found is not None:
                return found
            view = ops.tensor(name)
            if view is None:
                continue
            if not view.dtype.is_float:
                return f"{name} is {view.dtype}; it must be a float type: convert it first"
            tiles.append(view)
        if len({v.dtype for v in tiles}) > 1:
            return (
                f"imm0 {tiles[0].dtype}, imm1 {tiles[1].dtype}; two tiles must have one dtype: "
                "convert one"
            )
        return None

    def __str__(self) -> str:
        return "`imm0`, `imm1` numbers or float [P, 1] of one dtype"


@dataclass(frozen=True)
class _Reduction(Rule):
    """Command, operator and result of the accumulator."""

    def problem(self, ops: Operands) -> str | None:
        """Return what is wrong, or None."""
        command = getattr(ops["reduce_cmd"], "name", None)
        if command not in _COMMANDS:
            return f"reduce_cmd={ops['reduce_cmd']!r}; allowed are {', '.join(_COMMANDS)}"
        token = ops["reduce_op"]
        if token is None:
            if command != "idle":
                return f"reduce_cmd={command} without reduce_op; pass one, for example nl.add"
        elif operator(token).name not in _IDENTITY:
            legal = ", ".join(f"nl.{name}" for name in _IDENTITY)
            return f"reduce_op={operator(token)!r}; allowed are {legal}"
        result = ops.tensor("reduce_res")
        if result is None and ops["reduce_res"] is not None:
            return f"reduce_res={ops['reduce_res']!r}; it must be a [P, 1] tile or None"
        if result is not None and not result.dtype.is_float:
            return f"reduce_res is {result.dtype}; it must be a float type"
        return None

    def __str__(self) -> str:
        return f"`reduce_op` {', '.join(_IDENTITY)}; `reduce_cmd` {', '.join(_COMMANDS)}"


@instruction(
    engines=(Engine.scalar, Engine.gpsimd),
    reads=("data", "imm0", "imm1", "relu_param"),
    writes=("dst", "reduce_res"),
    rules=(
        *COMPUTE,
        TensorIndirection("dst", "data"),
        BufferIs("dst", *_ON_CHIP),
        SameExtent("dst", "data"),
        PerPartition("imm0", "data"),
        PerPartition("imm1", "data"),
        PerPartition("relu_param", "data"),
        PerPartition("reduce_res", "data"),
        NumberOrVector("relu_param"),
        _Stages(),
        _Immediates(),
        _Reduction(),
        ScalarOrGpSimd(),
    ),
    cost=work.stream(
        "activate2", data=("data",), vectors=("imm0", "imm1", "relu_param"), function="op"
    ),
    hidden=hidden,
    source="nki.isa.activate2; cost: as nki.isa.activation (no published formula)",
)
def activate2(  # noqa: PLR0913  (the published signature)
    ctx: Context,
    dst: NkiTensor,
    op: Any,
    data: NkiTensor,
    imm0: Any,
    imm1: Any,
    op0: Any,
    op1: Any,
    relu_param: Any = 0.0,
    reverse0: bool = False,
    reverse1: bool = False,
    reduce_op: Any = None,
    reduce_res: Any = None,
    reduce_cmd: commands = commands.idle,
    name: str | None = None,
    engine: Engine = Engine.scalar,
) -> None:
    """dst[p, f] = op((data[p, f] op0 imm0[p]) op1 imm1[p]) in float32, one rounding on the write.

    A reversed operator has its immediate first. nl.prelu is x for x >= 0, else relu_param[p] * x;
    other functions ignore relu_param. The accumulator of each partition, shared with activation,
    is set to the identity of reduce_op (reset, reset_reduce) and takes the activated values before
    they are rounded, from left to right: acc = reduce_op(acc, value) (reduce, reset_reduce).
    reduce_res, if given, receives it afterwards, also with idle. `engine` is of NKI 0.7.
    """
    run = ctx.run
    values = float_values(data, run, "a")
    for slot, token, imm, reverse in (("b", op0, imm0, reverse0), ("c", op1, imm1, reverse1)):
        stage = operator(token)
        if stage.name != "bypass":
            operands = pair(stage, values, imm, reverse, run, slot)
            values = kernel_of(stage)(*operands, out=run.scratch("stage", data.shape))
    values = _function(operator(op), values, per_partition(relu_param, data.ndim, run, "d"))
    write_values(dst, values)
    if reduce_cmd is commands.idle and reduce_res is None:
        return
    first = data.start_partition
    lanes = run.act_accumulator[first : first + data.shape[0]]
    if reduce_cmd in (commands.reset, commands.reset_reduce):
        lanes[...] = _IDENTITY[operator(reduce_op).name]
    if reduce_cmd in (commands.reduce, commands.reset_reduce):
        lanes[...] = _folded(operator(reduce_op), lanes, values.reshape(len(lanes), -1), run)
    if reduce_res is not None:
        sums = reduce_res.mem.array(reduce_res.region, reduce_res.dtype.host)
        dtypes.store(sums, lanes.reshape(sums.shape))


def _function(op: Op, values: Array, slope: Any) -> Array:
    """Return op(values) in float32; the slope belongs to prelu."""
    if op.activation is not None:
        return op.activation(values)
    result: Array = np.where(values >= 0, values, slope * values)
    return result


def _folded(op: Op, lanes: Array, rows: Array, run: Run) -> Array:
    """Reduce each row onto its lane, one element after the other."""
    if op.name not in ("abs_max", "abs_min"):
        return fold_onto(op, lanes, rows, run)
    state = lanes
    for column in rows.T:
        state = kernel_of(op)(state, column)
    return state
