"""Patterns of indices, and selection by index or predicate: iota, affine_select and others."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
from nki.isa.accumulator import VectorAccumulator, accumulate, hidden, store_result
from nki.isa.alu import is_number, per_partition, rounded
from nki.isa.enums import reduce_cmd as commands

from nki_kernels.hardware.spec import Engine
from nki_kernels.machine import dtypes, work
from nki_kernels.machine.access_rules import TensorIndirection
from nki_kernels.machine.core import Run, VirtualRegister, float_values, write_values
from nki_kernels.machine.dtypes import Array
from nki_kernels.machine.errors import RuleViolation
from nki_kernels.machine.instruction import Context, instruction
from nki_kernels.machine.operators import OPS, operator
from nki_kernels.machine.rules import (
    COMPUTE,
    BufferIs,
    DtypeIn,
    NotAllIn,
    Operands,
    PerPartition,
    Rule,
    SameDtype,
    SameExtent,
)
from nki_kernels.machine.tensor import NkiTensor
from nki_kernels.machine.trace import where

#: The lowest float32, the fill value of range_select.
FP32_MIN = -3.4028235e38
#: float32 holds every integer up to here.
_EXACT_INTEGERS = 2**24


@dataclass(frozen=True)
class _Pattern(Rule):
    """Up to four [step, count] pairs whose counts multiply to the elements per partition."""

    def problem(self, ops: Operands) -> str | None:
        pattern, dst = ops["pattern"], ops["dst"]
        pairs = isinstance(pattern, tuple) and all(
            isinstance(p, tuple)
            and len(p) == 2
            and all(isinstance(v, (int, np.integer)) for v in p)
            for p in pattern
        )
        if not pairs or not 1 <= len(pattern) <= 4:
            return f"pattern {pattern!r}; it must be 1 to 4 pairs [step, count] of ints"
        count = math.prod(n for _, n in pattern)
        if min(n for _, n in pattern) < 1 or count != dst.free_size:
            return (
                f"pattern {[list(p) for p in pattern]} makes {count} values, dst {list(dst.shape)} "
                f"holds {dst.free_size} per partition; the counts must multiply to that"
            )
        if not all(-(2**31) <= step < 2**31 for step, _ in pattern):
            return f"pattern {[list(p) for p in pattern]}; steps are integers of 32 bits"
        for name in ("offset", "channel_multiplier"):
            value = ops[name]
            if not isinstance(value, (int, np.integer, VirtualRegister)):
                return f"{name}={value!r}; it must be an int (offset also a register)"
        return None

    def __str__(self) -> str:
        return "`pattern` 1 to 4 pairs [step, count]; counts multiply to N"


def affine(
    partitions: int, pattern: tuple[tuple[int, int], ...], offset: int, channel_multiplier: int
) -> Array:
    """Return int32 [P, N]: offset + p * channel_multiplier + sum(index * step), wrapping."""
    starts = np.arange(partitions, dtype=np.int64) * int(channel_multiplier) + offset
    values: Array = starts.astype(np.int32)[:, None] + _line(pattern)
    return values


@lru_cache
def _line(pattern: tuple[tuple[int, int], ...]) -> Array:
    """Return int32 [1, N]: sum(index * step), wrapping; kept, since loops repeat their patterns."""
    line = np.zeros(1, np.int64)
    for step, count in pattern:
        line = (line[:, None] + np.arange(count, dtype=np.int64) * int(step)).reshape(-1)
    return line.astype(np.int32)[None, :]


@instruction(
    engines=(Engine.gpsimd,),
    reads=(),
    writes=("dst",),
    rules=(*COMPUTE, BufferIs("dst", "sbuf", remedy="GpSimd reaches SBUF only"), _Pattern()),
    cost=work.stream("iota"),
    lists=("pattern",),
    unkeyed=("offset", "channel_multiplier"),
    source="nki.isa.iota; cost: 150 + N cycles (NKI 2.26)",
)
def iota(
    ctx: Context,
    dst: NkiTensor,
    pattern: Any,
    offset: Any = 0,
    channel_multiplier: int = 0,
    name: str | None = None,
) -> None:
    """dst[p, w, z, y, x] = offset + p*multiplier + w*step_w + z*step_z + y*step_y + x*step_x.

    `multiplier` is channel_multiplier. 32-bit integer arithmetic, then one cast to dst. p counts
    from 0 in the view of dst (the documents leave open whether it counts physical partitions).
    """
    start = _offset(ctx, "iota", offset, channel_multiplier)
    values = affine(dst.shape[0], pattern, start, channel_multiplier)
    target = dst.mem.array(dst.region, dst.dtype.host)
    dtypes.store(target, values.reshape(target.shape))


def _offset(ctx: Context, opcode: str, offset: Any, channel_multiplier: int) -> int:
    """Return the value of `offset`; refuse what does not fit the 32-bit arithmetic."""
    start = offset.read() if isinstance(offset, VirtualRegister) else int(offset)
    # Here and not in a rule: verdicts are not remembered by the values of these two.
    for operand, value in (("offset", start), ("channel_multiplier", channel_multiplier)):
        if not -(2**31) <= value < 2**31:
            raise RuleViolation(
                f"nisa.{opcode} at {where(ctx.run.kernel_site())}: {operand}={value}; it must fit "
                "32 bits, -2147483648 to 2147483647: write the wrapped value"
            )
    return start


_COMPARE = {
    "equal": np.equal,
    "not_equal": np.not_equal,
    "less": np.less,
    "less_equal": np.less_equal,
    "greater": np.greater,
    "greater_equal": np.greater_equal,
}


_RANGE_OPS = tuple(name for name in _COMPARE if name != "not_equal")


@dataclass(frozen=True)
class _Comparison(Rule):
    """The argument is a comparison operator."""

    token: str
    allowed: tuple[str, ...]

    def problem(self, ops: Operands) -> str | None:
        op = operator(ops[self.token])
        if op.name in self.allowed:
            return None
        legal = ", ".join(f"nl.{name}" for name in self.allowed)
        return f"{self.token}={op!r}; it must be a comparison: {legal}"

    def __str__(self) -> str:
        return f"`{self.token}` a comparison"


@dataclass(frozen=True)
class _Number(Rule):
    """The argument is a number, not a tile."""

    operand: str

    def problem(self, ops: Operands) -> str | None:
        if is_number(ops[self.operand]):
            return None
        return f"{self.operand}={ops[self.operand]!r}; it must be a number (float32)"

    def __str__(self) -> str:
        return f"`{self.operand}` a number"


@instruction(
    engines=(Engine.gpsimd,),
    reads=("on_true_tile",),
    writes=("dst",),
    rules=(
        *COMPUTE,
        BufferIs("dst", "sbuf", remedy="GpSimd reaches SBUF only"),
        BufferIs("on_true_tile", "sbuf", remedy="GpSimd reaches SBUF only: copy it there"),
        SameExtent("dst", "on_true_tile"),
        _Pattern(),
        _Number("on_false_value"),
        _Comparison("cmp_op", tuple(_COMPARE)),
    ),
    cost=work.stream("affine_select", data=("on_true_tile",)),
    lists=("pattern",),
    unkeyed=("offset", "channel_multiplier"),
    source="nki.isa.affine_select; cost: trn2 law (documented 150 + N cycles, NKI 2.26)",
)
def affine_select(
    ctx: Context,
    dst: NkiTensor,
    pattern: Any,
    channel_multiplier: int,
    on_true_tile: NkiTensor,
    on_false_value: float,
    cmp_op: Any = OPS["equal"],
    offset: Any = 0,
    name: str | None = None,
) -> None:
    """dst[p, i] = on_true_tile[p, i] if cmp_op(a[p, i], 0) else on_false_value.

    a[p, w, z, y, x] = offset + p*channel_multiplier + w*step_w + z*step_z + y*step_y + x*step_x,
    32-bit integers; p counts from 0 in the view of dst. Selected elements keep their bits where the
    dtypes are equal and pass through float32 elsewhere; on_false_value is float32, rounded to dst.
    """
    start = _offset(ctx, "affine_select", offset, channel_multiplier)
    indices = affine(dst.shape[0], pattern, start, channel_multiplier)
    target = dst.mem.array(dst.region, dst.dtype.host)
    chosen = _COMPARE[operator(cmp_op).name](indices, 0).reshape(target.shape)
    _choose(ctx.run, dst, target, chosen, on_true_tile, on_false_value)


def _choose(
    run: Run, dst: NkiTensor, target: Array, chosen: Array, on_true: NkiTensor, on_false: float
) -> None:
    """target = on_true where `chosen`, else the number; bits where the dtypes are equal."""
    if on_true.dtype is not dst.dtype:
        values = float_values(on_true, run, "a").reshape(target.shape)
        dtypes.store(target, np.where(chosen, values, np.float32(on_false)))
        return
    values = on_true.mem.array(on_true.region, on_true.dtype.host).reshape(target.shape)
    np.copyto(target, np.where(chosen, values, rounded(float(on_false), target.dtype)))


@dataclass(frozen=True)
class _RangeSelect(Rule):
    """From gen3 on; the fill value is the lowest float32; indices are exact in float32."""

    def since(self) -> int:
        """Return the first generation that has it."""
        return 3

    def problem(self, ops: Operands) -> str | None:
        if ops.spec.generation < self.since():
            return f"range_select on {ops.spec.name}; it needs gen3: use affine_select"
        data = ops["on_true_tile"]
        if not data.dtype.is_float:
            return f"on_true_tile is {data.dtype}; it must be a float type"
        for name in ("bound0", "bound1"):
            if ops[name].dtype != dtypes.float32:
                return f"{name} is {ops[name].dtype}; bounds are float32: convert with tensor_copy"
        fill = ops["on_false_value"]
        if not is_number(fill) or np.float32(fill) != np.finfo(np.float32).min:
            return f"on_false_value={fill!r}; the hardware has only {FP32_MIN!r}: leave it out"
        start = ops["range_start"]
        if isinstance(start, bool) or not isinstance(start, (int, np.integer)):
            return f"range_start={start!r}; it must be an int known when the kernel is built"
        last = int(start) + data.free_size - 1
        if max(abs(int(start)), abs(last)) > _EXACT_INTEGERS:
            return (
                f"indices {start} to {last}; float32 compares integers up to {_EXACT_INTEGERS}: "
                "shift the bounds instead"
            )
        return None

    def __str__(self) -> str:
        return "gen3; `on_true_tile` float, bounds float32, `on_false_value` FP32_MIN"


@instruction(
    engines=(Engine.vector,),
    reads=("on_true_tile", "bound0", "bound1"),
    writes=("dst", "reduce_res"),
    rules=(
        *COMPUTE,
        BufferIs("dst", "sbuf", "psum"),
        SameExtent("dst", "on_true_tile"),
        PerPartition("bound0", "on_true_tile"),
        PerPartition("bound1", "on_true_tile"),
        PerPartition("reduce_res", "on_true_tile"),
        _RangeSelect(),
        _Comparison("comp_op0", _RANGE_OPS),
        _Comparison("comp_op1", _RANGE_OPS),
        VectorAccumulator(("idle", "reset", "reduce", "reset_reduce"), ("maximum",)),
    ),
    cost=work.stream("range_select", data=("on_true_tile",), vectors=("bound0", "bound1")),
    hidden=hidden,
    source="nki.isa.range_select; cost: max(64, N) cycles (NKI 2.26)",
)
def range_select(
    ctx: Context,
    dst: NkiTensor,
    on_true_tile: NkiTensor,
    comp_op0: Any,
    comp_op1: Any,
    bound0: NkiTensor,
    bound1: NkiTensor,
    reduce_cmd: commands = commands.reset_reduce,
    reduce_res: NkiTensor | None = None,
    reduce_op: Any = OPS["maximum"],
    range_start: int = 0,
    on_false_value: float = FP32_MIN,
    name: str | None = None,
) -> None:
    """dst[p, i] = on_true_tile[p, i] if op0(j, bound0[p]) and op1(j, bound1[p]) else FP32_MIN.

    j = range_start + i over the flattened free axes, compared in float32. acc[p] = max over i, from
    the values before rounding: a 16- or 8-bit dst stores -inf for FP32_MIN, acc and a float32
    reduce_res hold FP32_MIN. idle leaves acc unknown.
    """
    run = ctx.run
    values = float_values(on_true_tile, run, "a").reshape(on_true_tile.shape[0], -1)
    indices = np.arange(values.shape[1], dtype=np.float32) + np.float32(range_start)
    chosen = np.logical_and(
        _COMPARE[operator(comp_op0).name](indices, per_partition(bound0, 2, run, "b")),
        _COMPARE[operator(comp_op1).name](indices, per_partition(bound1, 2, run, "c")),
    )
    result = np.where(chosen, values, np.float32(FP32_MIN))
    lanes = accumulate(run, on_true_tile, result, operator(reduce_op), reduce_cmd)
    write_values(dst, result)
    store_result(reduce_res, lanes)


@dataclass(frozen=True)
class _PredicatedSource(Rule):
    """src has dst's dtype, or is a number that dst's type can hold."""

    def problem(self, ops: Operands) -> str | None:
        src, dst = ops["src"], ops["dst"]
        if isinstance(src, NkiTensor):
            return None  # SameDtype
        if not is_number(src):
            return f"src={src!r}; it must be a tile or a number"
        if dst.dtype.is_integer and not isinstance(src, (int, np.integer)):
            return f"src={src!r} is a float and dst is {dst.dtype}; write an int, for example 0"
        return None

    def __str__(self) -> str:
        return "`src` a tile or a number of dst's kind"


@instruction(
    engines=(Engine.vector,),
    reads=("src", "predicate"),
    writes=("dst",),
    updates=("dst",),
    rules=(
        *COMPUTE,
        TensorIndirection("dst", "predicate"),
        BufferIs("dst", "sbuf", "psum"),
        SameExtent("dst", "src", "predicate"),
        SameDtype("src", "dst"),
        NotAllIn("psum", "src", "predicate"),
        DtypeIn("predicate", (dtypes.uint8, dtypes.uint16, dtypes.uint32)),
        _PredicatedSource(),
    ),
    cost=work.stream("tensor_copy_predicated", data=("src", "predicate")),
    source=(
        "nki.isa.tensor_copy_predicated; cost: trn2 law for a number, documented N (one operand in "
        "PSUM) or 2 N cycles for a tile (NKI 2.26)"
    ),
)
def tensor_copy_predicated(
    ctx: Context,
    dst: NkiTensor,
    src: Any,
    predicate: NkiTensor,
    reverse_pred: bool = False,
    name: str | None = None,
) -> None:
    """dst[p, f] = src[p, f], bit for bit, where predicate[p, f] != 0; other elements of dst stay.

    reverse_pred copies where predicate is 0. A number is rounded to dst's dtype.
    """
    target = dst.mem.array(dst.region, dst.dtype.host)
    chosen = predicate.mem.array(predicate.region, predicate.dtype.host).reshape(target.shape) != 0
    if reverse_pred:
        chosen = ~chosen
    if isinstance(src, NkiTensor):
        values = src.mem.array(src.region, src.dtype.host).reshape(target.shape)
    else:
        values = rounded(src if dst.dtype.is_integer else float(src), target.dtype)
    np.copyto(target, values, where=chosen)
    dst.mem.mark_where(dst.region, chosen)
