"""The Vector engine's accumulator registers, one float32 per partition, shared by instructions.

Reductions happen on the float32 values before they are rounded to dst: the note of range_select
(FP32_MIN in the accumulator, -inf in a bfloat16 dst) holds only so; assumed for the others.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from nki.isa.alu import fold, fold_onto, is_number, kernel_of, per_partition
from nki.isa.enums import reduce_cmd as commands

from nki_kernels.machine import dtypes
from nki_kernels.machine.core import Run
from nki_kernels.machine.dtypes import Array
from nki_kernels.machine.operators import Op, operator
from nki_kernels.machine.rules import Operands, Rule
from nki_kernels.machine.tensor import NkiTensor

#: Value of the registers after a reset.
_IDENTITY = {"add": 0.0, "multiply": 1.0, "maximum": -np.inf, "minimum": np.inf}
NAME = "vector_accumulator"


@dataclass(frozen=True)
class VectorAccumulator(Rule):
    """Command, operator and result of a reduction in the accumulator.

    Attributes:
        commands: names of the legal commands.
        operators: names of the legal reduction operators.
        float_result: reduce_res must be of a float type.
    """

    commands: tuple[str, ...]
    operators: tuple[str, ...]
    float_result: bool = False

    def problem(self, ops: Operands) -> str | None:
        """Return what is wrong, or None."""
        command = getattr(ops["reduce_cmd"], "name", None)
        if command not in self.commands:
            return f"reduce_cmd={ops['reduce_cmd']!r}; allowed are {', '.join(self.commands)}"
        op = operator(ops["reduce_op"])
        if op.name not in self.operators:
            legal = ", ".join(f"nl.{name}" for name in self.operators)
            return f"reduce_op={op!r}; allowed: {legal}"
        result = ops.tensor("reduce_res")
        if result is not None:
            if command == "idle":
                return (
                    "reduce_res with reduce_cmd=idle; the accumulator is unknown after idle: pass "
                    "reduce_cmd.reset_reduce"
                )
            if self.float_result and not result.dtype.is_float:
                return f"reduce_res is {result.dtype}; it must be a float type"
        elif ops["reduce_res"] is not None:
            return f"reduce_res={ops['reduce_res']!r}; it must be a [P, 1] tile or None"
        return self._init(ops, command)

    def _init(self, ops: Operands, command: str) -> str | None:
        if "load_reduce" not in self.commands:
            return None
        init = ops["reduce_init"]
        if (command == "load_reduce") != (init is not None):
            return (
                f"reduce_init={init!r} with reduce_cmd={command}; give it with load_reduce and "
                "only then"
            )
        if isinstance(init, NkiTensor):
            if init.dtype != dtypes.float32:
                return f"reduce_init is {init.dtype}; a vector must be float32"
        elif init is not None and not is_number(init):
            return f"reduce_init={init!r}; it must be a number or a float32 [P, 1] tile"
        return None

    def __str__(self) -> str:
        names = ", ".join(self.operators)
        return f"`reduce_cmd` {', '.join(self.commands)}; `reduce_op` {names}"


def hidden(ops: Operands) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Return the hidden state read and written: reduce continues, every command leaves a value."""
    continues = getattr(ops["reduce_cmd"], "name", "") == "reduce"
    return ((NAME,) if continues else (), (NAME,))


def accumulate(
    run: Run, data: NkiTensor, values: Array, op: Op, command: commands, init: Any = None
) -> Array:
    """Apply `command` to the registers of data's partitions and return them.

    Elements are reduced one after the other onto the register. After idle the registers are NaN:
    the documents call them unknown.
    """
    first = data.start_partition
    lanes: Array = run.vector_accumulator[first : first + data.shape[0]]
    if command is commands.idle:
        lanes[...] = np.nan
        return lanes
    if command in (commands.reset, commands.reset_reduce):
        lanes[...] = _IDENTITY[op.name]
    elif command is commands.load_reduce:
        lanes[...] = per_partition(init, 1, run, "init")
    if command is commands.reset:
        return lanes
    rows = values.reshape(values.shape[0], -1)
    if command is commands.reset_reduce:
        # The same as beginning with the identity, without copying the rows behind it.
        lanes[...] = kernel_of(op)(lanes, fold(op, rows, run))
    else:
        lanes[...] = fold_onto(op, lanes, rows, run)
    return lanes


def store_result(reduce_res: NkiTensor | None, lanes: Array, negate: bool = False) -> None:
    """Round the registers into reduce_res, negated if asked."""
    if reduce_res is None:
        return
    sums = reduce_res.mem.array(reduce_res.region, reduce_res.dtype.host)
    dtypes.store(sums, (-lanes if negate else lanes).reshape(sums.shape))
