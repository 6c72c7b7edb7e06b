"""Exponentials on the Vector engine (gen4): exponential."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from nki.isa.accumulator import accumulate, hidden, store_result
from nki.isa.alu import NumberOrVector, is_number, per_partition
from nki.isa.enums import reduce_cmd as commands

from nki_kernels.hardware.spec import Engine
from nki_kernels.machine import dtypes, work
from nki_kernels.machine.access_rules import TensorIndirection
from nki_kernels.machine.core import float_values, write_values
from nki_kernels.machine.instruction import Context, instruction
from nki_kernels.machine.operators import OPS
from nki_kernels.machine.rules import (
    COMPUTE,
    BufferIs,
    DtypeIn,
    Operands,
    PerPartition,
    Rule,
    SameExtent,
)
from nki_kernels.machine.tensor import NkiTensor

_NARROW = (
    dtypes.float8_e4m3, dtypes.float8_e5m2, dtypes.float16, dtypes.bfloat16, dtypes.float32,
)  # fmt: skip
_WHOLE = (dtypes.int8, dtypes.int16, dtypes.int32, dtypes.uint8, dtypes.uint16)
_COMMANDS = ("idle", "reset_reduce", "reduce", "load_reduce")
_RANK = 4


@dataclass(frozen=True)
class _Exponential(Rule):
    """From gen4, up to 4-D; the sum's command, initial value and result."""

    def since(self) -> int:
        """Return the first generation that has it."""
        return 4

    def problem(self, ops: Operands) -> str | None:
        if ops.spec.generation < self.since():
            return f"exponential on {ops.spec.name}; it needs gen4: use nisa.activation with nl.exp"
        for name in ("dst", "src"):
            if ops[name].ndim > _RANK:
                return (
                    f"{name} {list(ops[name].shape)} has {ops[name].ndim} dimensions; at most "
                    f"{_RANK}: flatten the free ones"
                )
        command = getattr(ops["reduce_cmd"], "name", None)
        if command not in _COMMANDS:
            return f"reduce_cmd={ops['reduce_cmd']!r}; allowed are {', '.join(_COMMANDS)}"
        init = ops["reduce_init"]
        if command != "load_reduce" and not (is_number(init) and init == 0):
            return f"reduce_init={init!r} with reduce_cmd={command}; give it with load_reduce only"
        if ops.tensor("reduce_res") is None:
            if ops["reduce_res"] is not None:
                return f"reduce_res={ops['reduce_res']!r}; it must be a [P, 1] tile or None"
        elif command == "idle":
            return (
                "reduce_res with reduce_cmd=idle; the accumulator is unknown after idle: pass "
                "reduce_cmd.reset_reduce"
            )
        return None

    def __str__(self) -> str:
        return "gen4; at most 4-D; `reduce_init` with load_reduce only"


@instruction(
    engines=(Engine.vector,),
    reads=("src", "max_value", "reduce_init"),
    writes=("dst", "reduce_res"),
    rules=(
        *COMPUTE,
        TensorIndirection("dst", "src"),
        BufferIs("dst", "sbuf", "psum"),
        SameExtent("dst", "src"),
        PerPartition("max_value", "src"),
        PerPartition("reduce_init", "src"),
        PerPartition("reduce_res", "src"),
        DtypeIn("src", (*_NARROW, *_WHOLE, dtypes.uint32)),
        DtypeIn("dst", (*_NARROW, dtypes.tfloat32, *_WHOLE)),
        DtypeIn("reduce_res", (*_NARROW, dtypes.tfloat32)),
        NumberOrVector("max_value", float32=True),
        NumberOrVector("reduce_init", float32=True),
        _Exponential(),
    ),
    cost=work.stream("exponential", data=("src",), vectors=("max_value",)),
    hidden=hidden,
    source="nki.isa.exponential; cost: N / 4 cycles of Scalar (trn3 guide: 4 times as fast)",
)
def exponential(
    ctx: Context,
    dst: NkiTensor,
    src: NkiTensor,
    max_value: Any = 0.0,
    reduce_res: NkiTensor | None = None,
    reduce_cmd: commands = commands.idle,
    reduce_init: Any = 0.0,
    name: str | None = None,
) -> None:
    """dst[p, f] = exp(src[p, f] - max_value[p]); acc[p] = acc[p] + sum over f of it.

    acc, Vector's accumulator, begins with 0 (reset_reduce), what it held (reduce) or reduce_init
    (load_reduce) and takes values before they are rounded to dst, from left to right; idle leaves
    it unknown. reduce_res = acc.
    """
    run = ctx.run
    values = float_values(src, run, "a")
    result = run.scratch("exp", src.shape)
    np.subtract(values, per_partition(max_value, values.ndim, run, "b"), out=result)
    np.exp(result, out=result)
    lanes = accumulate(run, src, result, OPS["add"], reduce_cmd, reduce_init)
    write_values(dst, result)
    store_result(reduce_res, lanes)
