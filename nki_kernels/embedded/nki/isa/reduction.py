"""Reductions along the free axes on Vector: sums, scans, statistics, select_reduce."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
from nki.isa.accumulator import VectorAccumulator, accumulate, hidden, store_result
from nki.isa.alu import (
    NumberOrVector,
    VectorArithmetic,
    fold,
    kernel_of,
    ops_problem,
    pair,
    per_partition,
)
from nki.isa.enums import reduce_cmd as commands

from nki_kernels.hardware.spec import Engine
from nki_kernels.machine import dtypes, work
from nki_kernels.machine.access_rules import TensorIndirection
from nki_kernels.machine.core import Run, float_values, write_values
from nki_kernels.machine.dtypes import Array
from nki_kernels.machine.instruction import Context, instruction
from nki_kernels.machine.operators import OPS, operator
from nki_kernels.machine.rules import (
    COMPUTE,
    AtMost,
    BufferIs,
    DtypeIn,
    NotAllIn,
    Operands,
    PerPartition,
    Rule,
    SameExtent,
)
from nki_kernels.machine.tensor import NkiTensor

_ON_CHIP = ("sbuf", "psum")


def reduced_axes(axis: Any, ndim: int) -> tuple[int, ...] | None:
    """Return the axes as sorted non-negative ints, or None if they are not trailing free ones."""
    given = axis if isinstance(axis, (tuple, list)) else (axis,)
    if not given or not all(isinstance(a, (int, np.integer)) for a in given):
        return None
    axes = tuple(sorted(int(a) + ndim if a < 0 else int(a) for a in given))
    return axes if axes == tuple(range(ndim - len(axes), ndim)) and axes[0] > 0 else None


@dataclass(frozen=True)
class _ReduceAxes(Rule):
    """`axis` names the last free dimensions of data; dst holds one element for the others."""

    def problem(self, ops: Operands) -> str | None:
        dst, data = ops["dst"], ops["data"]
        axes = reduced_axes(ops["axis"], data.ndim)
        if axes is None:
            return (
                f"axis={ops['axis']!r} of data {list(data.shape)}; it must be the last free "
                f"dimensions, up to and with {data.ndim - 1}, without the partition dimension 0: "
                "permute the view"
            )
        kept = math.prod(data.shape[1 : axes[0]])
        if (dst.shape[0], dst.free_size) != (data.shape[0], kept):
            return (
                f"dst {list(dst.shape)} for data {list(data.shape)} reduced over {list(axes)}; dst "
                f"must hold [{data.shape[0]}, {kept}] elements: allocate it so"
            )
        return None

    def __str__(self) -> str:
        return "`axis` the last free dimensions; `dst` [P, kept elements]"


@dataclass(frozen=True)
class _ReduceOp(Rule):
    """A reduction operator; bitvec on integers of one width; negate for arithmetic only."""

    def problem(self, ops: Operands) -> str | None:
        found = ops_problem(ops, (ops["op"],), ("data",))
        if found is not None:
            return found
        op = operator(ops["op"])
        if not op.reduces:
            legal = ", ".join(f"nl.{o.name}" for o in OPS.values() if o.reduces)
            return f"op={op!r} is no reduction; allowed are {legal}"
        if ops["negate"] and op.kind == "bitvec":
            return f"negate with bitvec {op!r}; it applies to arithmetic operators: drop it"
        return None

    def __str__(self) -> str:
        return "`op` a reduction operator; bitvec on integers; `negate` with arithmetic only"


@instruction(
    engines=(Engine.vector,),
    reads=("data",),
    writes=("dst",),
    rules=(
        *COMPUTE,
        TensorIndirection("dst", "data"),
        BufferIs("dst", *_ON_CHIP),
        _ReduceAxes(),
        _ReduceOp(),
    ),
    cost=work.stream("tensor_reduce", data=("data",), function="op", n_of="data"),
    lists=("axis",),
    source="nki.isa.tensor_reduce; cost: N cycles of data (NKI 2.26), trn2 laws",
)
def tensor_reduce(
    ctx: Context,
    dst: NkiTensor,
    op: Any,
    data: NkiTensor,
    axis: Any,
    negate: bool = False,
    keepdims: bool = False,
    name: str | None = None,
) -> None:
    """dst[p, k] = (-1 if negate) * op over the trailing axes of data[p, k, ...].

    From left to right in float32 (bit-equal to recorded Trainium sums), subtract as
    x0 - x1 - x2 ...; logical operators give 1 or 0; bitvec operators work on raw bits. Negative
    axes count from the end (not documented). keepdims changes no element of dst.
    """
    kind = operator(op)
    axes = reduced_axes(axis, data.ndim)
    if axes is None:
        raise TypeError(f"axis {axis!r} of {data!r}")
    count = math.prod(data.shape[axes[0] :])
    if kind.kind == "bitvec":
        bits = data.mem.array(data.region, data.dtype.host).reshape(-1, count)
        target = dst.mem.array(dst.region, dst.dtype.host)
        np.copyto(target, fold(kind, bits, ctx.run).view(target.dtype).reshape(target.shape))
        return
    values = fold(kind, float_values(data, ctx.run, "a").reshape(-1, count), ctx.run)
    write_values(dst, -values if negate else values)


@dataclass(frozen=True)
class _NotReversed(Rule):
    """The documents mark reverse0 as not supported yet."""

    def problem(self, ops: Operands) -> str | None:
        if ops["reverse0"]:
            return (
                "reverse0=True; it is documented as not supported yet: use tensor_scalar and "
                "tensor_reduce"
            )
        return None

    def __str__(self) -> str:
        return "`reverse0` False"


@instruction(
    engines=(Engine.vector,),
    reads=("data", "operand0", "reduce_init"),
    writes=("dst", "reduce_res"),
    rules=(
        *COMPUTE,
        TensorIndirection("dst", "data"),
        BufferIs("dst", *_ON_CHIP),
        SameExtent("dst", "data"),
        PerPartition("operand0", "data"),
        PerPartition("reduce_init", "data"),
        PerPartition("reduce_res", "data"),
        VectorArithmetic("op0"),
        NumberOrVector("operand0", op="op0", float32=True),
        _NotReversed(),
        VectorAccumulator(
            ("reset_reduce", "reduce", "load_reduce"), ("add", "multiply", "maximum", "minimum")
        ),
    ),
    cost=work.stream(
        "tensor_scalar_reduce", data=("data",), vectors=("operand0",), function="op0", n_of="data"
    ),
    hidden=hidden,
    source="nki.isa.tensor_scalar_reduce; cost: max(64, N) + 64 cycles (NKI 2.26)",
)
def tensor_scalar_reduce(
    ctx: Context,
    dst: NkiTensor,
    data: NkiTensor,
    op0: Any,
    operand0: Any,
    reduce_op: Any,
    reduce_res: NkiTensor | None = None,
    reverse0: bool = False,
    reduce_cmd: commands = commands.reset_reduce,
    reduce_init: Any = None,
    reduce_res_negate: bool = False,
    name: str | None = None,
) -> None:
    """dst = op0(data, operand0[p]); acc[p] = reduce_op(acc[p], dst[p, 0], dst[p, 1], ...).

    acc begins with the identity of reduce_op (reset_reduce), what it held (reduce) or reduce_init
    (load_reduce), and takes values before they are rounded to dst. reduce_res = acc, negated if
    asked; the register itself is not.
    """
    run, first = ctx.run, operator(op0)
    values = float_values(data, run, "a")
    result = kernel_of(first)(
        *pair(first, values, operand0, False, run, "b"), out=run.scratch("middle", data.shape)
    )
    lanes = accumulate(run, data, result, operator(reduce_op), reduce_cmd, reduce_init)
    write_values(dst, result)
    store_result(reduce_res, lanes, reduce_res_negate)


@instruction(
    engines=(Engine.vector,),
    reads=("data0", "data1", "initial"),
    writes=("dst",),
    rules=(
        *COMPUTE,
        BufferIs("dst", *_ON_CHIP),
        SameExtent("dst", "data0", "data1"),
        NotAllIn("psum", "data0", "data1"),
        PerPartition("initial", "data0"),
        VectorArithmetic("op0", "op1", pairs=("op0", "op1")),
        NumberOrVector("initial"),
    ),
    cost=work.stream(
        "tensor_tensor_scan", data=("data0", "data1"), vectors=("initial",), function="op0"
    ),
    source="nki.isa.tensor_tensor_scan; cost: max(64, 2 N) cycles (NKI 2.26), trn2 laws",
)
def tensor_tensor_scan(
    ctx: Context,
    dst: NkiTensor,
    data0: NkiTensor,
    data1: NkiTensor,
    initial: Any,
    op0: Any,
    op1: Any,
    reverse0: bool = False,
    reverse1: bool = False,
    name: str | None = None,
) -> None:
    """dst[p, i] = state = op1(op0(data0[p, i], state), data1[p, i]), state = initial[p] before.

    reverse0 and reverse1 swap a pair. The state is float32 and is not rounded to dst's type on the
    way (the documents say only that the results are cast). i runs over the flattened free axes.
    """
    run = ctx.run
    rows, count = data0.shape[0], data0.free_size
    # Columns in memory order: each step then works on neighbouring numbers.
    left, right, states = (run.scratch(s, (count, rows)) for s in ("scan0", "scan1", "scan"))
    np.copyto(left, float_values(data0, run, "a").reshape(rows, count).T)
    np.copyto(right, float_values(data1, run, "b").reshape(rows, count).T)
    state: Any = np.empty(rows, np.float32)
    state[...] = per_partition(initial, 1, run, "c")
    first, second = kernel_of(operator(op0)), kernel_of(operator(op1))
    held = run.scratch("scan_middle", (rows,))
    for x, y, out in zip(left, right, states, strict=True):
        middle = first(state, x, out=held) if reverse0 else first(x, state, out=held)
        state = second(y, middle, out=out) if reverse1 else second(middle, y, out=out)
        if state is not out:  # comparisons make an array of their own
            out[...] = state
    write_values(dst, states.T)


@dataclass(frozen=True)
class _Columns(Rule):
    """The operand has the partitions of `like` and exactly `count` elements in each."""

    operand: str
    like: str
    count: int

    def problem(self, ops: Operands) -> str | None:
        view, like = ops[self.operand], ops[self.like]
        if (view.shape[0], view.free_size) == (like.shape[0], self.count):
            return None
        return (
            f"{self.operand} {list(view.shape)} for {self.like} {list(like.shape)}; it must hold "
            f"[{like.shape[0]}, {self.count}] elements: slice it"
        )

    def __str__(self) -> str:
        return f"`{self.operand}` [P, {self.count}]"


@instruction(
    engines=(Engine.vector,),
    reads=("data",),
    writes=("dst",),
    rules=(
        *COMPUTE,
        BufferIs("dst", *_ON_CHIP),
        AtMost("data", free="bn_stats_fmax"),
        _Columns("dst", "data", 6),
    ),
    cost=work.stream("bn_stats", data=("data",), n_of="data"),
    source="nki.isa.bn_stats; cost: max(64, N) cycles (NKI 2.26)",
)
def bn_stats(
    ctx: Context,
    dst: NkiTensor,
    data: NkiTensor,
    name: str | None = None,
) -> None:
    """dst[p] = (count, mean, variance * count) of elements 0, 2, 4 ... of data[p], then of 1, 3 ...

    Float32, sums from left to right, variance * count = sum (x - mean)^2. Of one element the odd
    half is empty: three zeros (not documented).
    """
    run = ctx.run
    rows = float_values(data, run, "a").reshape(data.shape[0], -1)
    stats = np.zeros((data.shape[0], 6), np.float32)
    for start in (0, 1):
        half = rows[:, start::2]
        if half.shape[1]:
            mean = _total(half, run) / np.float32(half.shape[1])
            spread = np.square(half - mean[:, None])
            stats[:, 3 * start] = half.shape[1]
            stats[:, 3 * start + 1] = mean
            stats[:, 3 * start + 2] = _total(spread, run)
    write_values(dst, stats)


def _total(rows: Array, run: Run) -> Array:
    return fold(OPS["add"], rows, run)


@dataclass(frozen=True)
class _Triples(Rule):
    """data is a list of (count, mean, variance * count)."""

    def problem(self, ops: Operands) -> str | None:
        data = ops["data"]
        if data.free_size % 3:
            return (
                f"data {list(data.shape)} has {data.free_size} elements per partition; it must be "
                "a multiple of 3, (count, mean, variance * count) from bn_stats: slice it"
            )
        return None

    def __str__(self) -> str:
        return "`data` a multiple of 3 elements per partition"


@instruction(
    engines=(Engine.vector,),
    reads=("data",),
    writes=("dst",),
    rules=(*COMPUTE, BufferIs("dst", *_ON_CHIP), _Triples(), _Columns("dst", "data", 2)),
    cost=work.stream("bn_aggr", data=("data",), n_of="data"),
    source="nki.isa.bn_aggr; cost: max(64, 13/3 N) cycles (NKI 2.26)",
)
def bn_aggr(
    ctx: Context,
    dst: NkiTensor,
    data: NkiTensor,
    name: str | None = None,
) -> None:
    """dst[p] = (mean, variance) of the union of the triples (c, m, s) of data[p].

    C = sum c; mean = sum c m / C; variance = sum (s + c (m - mean)^2) / C, population variance.
    The form avoids the cancellation of mean squares. Of no elements both are 0 (not documented).
    """
    run = ctx.run
    triples = float_values(data, run, "a").reshape(data.shape[0], -1, 3)
    count, mean, spread = (triples[:, :, i] for i in range(3))
    total = _total(count, run).copy()
    some = total != 0
    divisor = np.where(some, total, np.float32(1))
    centre = np.where(some, _total(count * mean, run) / divisor, np.float32(0))
    off = mean - centre[:, None]
    parts = spread + count * np.square(off)
    variance = np.where(some, _total(parts, run) / divisor, np.float32(0))
    write_values(dst, np.stack([centre, variance], axis=1))


@dataclass(frozen=True)
class _SelectTypes(Rule):
    """on_true is no 32-bit integer and no tfloat32."""

    def problem(self, ops: Operands) -> str | None:
        kind = ops["on_true"].dtype
        if kind in (dtypes.int32, dtypes.uint32, dtypes.tfloat32):
            return (
                f"on_true is {kind}; int32, uint32 and tfloat32 are not supported: convert it with "
                "tensor_copy"
            )
        return None

    def __str__(self) -> str:
        return "`on_true` not int32, uint32, tfloat32"


@instruction(
    engines=(Engine.vector,),
    reads=("predicate", "on_true", "on_false"),
    writes=("dst", "reduce_res"),
    rules=(
        *COMPUTE,
        BufferIs("dst", *_ON_CHIP),
        SameExtent("dst", "on_true", "predicate"),
        NotAllIn("psum", "predicate", "on_true"),
        PerPartition("on_false", "on_true"),
        PerPartition("reduce_res", "on_true"),
        DtypeIn("predicate", (dtypes.int8, dtypes.uint8, dtypes.int16, dtypes.uint16)),
        _SelectTypes(),
        NumberOrVector("on_false"),
        VectorAccumulator(("idle", "reduce", "reset_reduce"), ("maximum",), float_result=True),
    ),
    cost=work.stream("select_reduce", data=("predicate", "on_true"), vectors=("on_false",)),
    hidden=hidden,
    source="nki.isa.select_reduce; cost: N cycles, as tensor_tensor (no published formula)",
)
def select_reduce(
    ctx: Context,
    dst: NkiTensor,
    predicate: NkiTensor,
    on_true: NkiTensor,
    on_false: Any,
    reduce_res: NkiTensor | None = None,
    reduce_cmd: commands = commands.idle,
    reduce_op: Any = OPS["maximum"],
    reverse_pred: bool = False,
    name: str | None = None,
) -> None:
    """dst[p, f] = on_true[p, f] if predicate[p, f] != 0 else on_false[p]; acc[p] = max over f.

    reverse_pred swaps the branches. Values pass through float32. acc begins with -inf
    (reset_reduce) or what it held (reduce); idle leaves it unknown. reduce_res = acc.
    """
    run = ctx.run
    values = float_values(on_true, run, "a")
    chosen = predicate.mem.array(predicate.region, predicate.dtype.host).reshape(values.shape) != 0
    if reverse_pred:
        chosen = ~chosen
    result = np.where(chosen, values, per_partition(on_false, values.ndim, run, "b"))
    lanes = accumulate(run, on_true, result, operator(reduce_op), reduce_cmd)
    write_values(dst, result)
    store_result(reduce_res, lanes)
