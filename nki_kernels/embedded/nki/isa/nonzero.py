"""Index lists on GpSimd: nonzero_with_count, topk, sequence_bounds."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from nki_kernels.hardware.spec import Engine
from nki_kernels.machine import dtypes, work
from nki_kernels.machine.core import float_values, write_values
from nki_kernels.machine.dtypes import Array
from nki_kernels.machine.errors import RuleViolation
from nki_kernels.machine.instruction import Context, instruction
from nki_kernels.machine.layout import is_int
from nki_kernels.machine.rules import COMPUTE, DtypeIn, Operands, Rule
from nki_kernels.machine.tensor import NkiTensor
from nki_kernels.machine.trace import StreamWork, where

_INT32 = np.iinfo(np.int32)


@dataclass(frozen=True)
class _Nonzero(Rule):
    """From gen3; dst has one element per partition more than src; numbers fit int32."""

    def since(self) -> int:
        """Return the first generation that has it."""
        return 3

    def problem(self, ops: Operands) -> str | None:
        dst, src = ops["dst"], ops["src"]
        if ops.spec.generation < self.since():
            return f"nonzero_with_count on {ops.spec.name}; it needs gen3: use nisa.iota and select"
        if (dst.shape[0], dst.free_size) != (src.shape[0], src.free_size + 1):
            return (
                f"dst {list(dst.shape)} for src {list(src.shape)}; dst must hold [{src.shape[0]}, "
                f"{src.free_size + 1}] elements, the last one the count: allocate it so"
            )
        for name in ("index_offset", "padding_val"):
            value = ops[name]
            if not is_int(value) or not _INT32.min <= value <= _INT32.max:
                return f"{name}={value!r}; it must be an int of 32 bits"
        return None

    def __str__(self) -> str:
        return "gen3; `dst` [P, N + 1] for `src` [P, N]; `index_offset`, `padding_val` int32"


@instruction(
    engines=(Engine.gpsimd,),
    reads=("src",),
    writes=("dst",),
    updates=("dst",),
    rules=(
        *COMPUTE,
        DtypeIn("src", (dtypes.float32, dtypes.int32)),
        DtypeIn("dst", (dtypes.int32,)),
        _Nonzero(),
    ),
    cost=work.stream("nonzero_with_count", data=("src",), n_of="src"),
    source="nki.isa.nonzero_with_count; cost: N cycles (no published formula)",
)
def nonzero_with_count(
    ctx: Context,
    dst: NkiTensor,
    src: NkiTensor,
    index_offset: int = 0,
    padding_val: int = -1,
    name: str | None = None,
) -> None:
    """dst[p] = (index_offset + positions of nonzeros of src[p] ..., padding_val ..., count).

    Only the first partition of each GpSimd core, p = 0, 16, 32 ... of the view (0, 4 ... on the toy
    core), is read and written; free dimensions are flattened. The other rows of dst keep what they
    hold. A sum past 32 bits wraps (not documented).
    """
    step = ctx.run.spec.gpsimd.core_partitions
    rows = src.mem.array(src.region, src.dtype.host)[::step]
    target = dst.mem.array(dst.region, dst.dtype.host)
    for at, row in enumerate(rows.reshape(rows.shape[0], -1)):
        found = np.flatnonzero(row)
        line = np.full(row.size + 1, padding_val, np.int32)
        line[: found.size] = (found + index_offset).astype(np.int32)
        line[-1] = found.size
        target[at * step] = line.reshape(target.shape[1:])
    if not dst.mem.full:
        chosen = np.zeros(dst.shape, np.bool_)
        chosen[::step] = True
        dst.mem.mark_where(dst.region, chosen)


@dataclass(frozen=True)
class _TopK(Rule):
    """n elements in the snake of whole cores; equally many values and indices out."""

    def problem(self, ops: Operands) -> str | None:
        vals, idx, src, n = ops["val_dst"], ops["idx_dst"], ops["src"], ops["n"]
        per = ops.spec.gpsimd.core_partitions
        if src.shape[0] % per:
            return (
                f"src {list(src.shape)} has {src.shape[0]} partitions; a GpSimd core serves {per}: "
                f"use a multiple of {per}"
            )
        if not is_int(n) or not 8 <= n < 65536:
            return f"n={n!r}; allowed are 8 to 65535"
        if src.free_size * per < n:
            return (
                f"src {list(src.shape)} holds {src.free_size * per} elements a core for n={n}; "
                f"it must have {-(-n // per)} elements per partition"
            )
        extents = {(v.shape[0], v.free_size) for v in (vals, idx)}
        k = vals.free_size
        if extents != {(src.shape[0], k)} or not 1 <= k < 32768 or k > n:
            return (
                f"val_dst {list(vals.shape)} and idx_dst {list(idx.shape)} for n={n}; both must "
                f"hold [{src.shape[0]}, k] elements with k at most n and 32767"
            )
        return None

    def __str__(self) -> str:
        return "whole GpSimd cores; 8 <= `n` < 65536; `val_dst` and `idx_dst` [P, k], k <= n"


def _topk_cost(ops: Operands) -> StreamWork:
    """Documented: 4 n + k cycles; the law counts 4 an element."""
    vals, idx, src = ops["val_dst"], ops["idx_dst"], ops["src"]
    return StreamWork(
        law="topk",
        function="",
        n=ops["n"] + -(-vals.free_size // 4),
        partitions=src.shape[0],
        sources=(work.operand(src),),
        dst=work.operand(idx),
    )


@instruction(
    engines=(Engine.gpsimd,),
    reads=("src",),
    writes=("val_dst", "idx_dst"),
    rules=(
        *COMPUTE,
        DtypeIn("src", (dtypes.bfloat16,)),
        DtypeIn("val_dst", (dtypes.bfloat16,)),
        DtypeIn("idx_dst", (dtypes.uint32,)),
        _TopK(),
    ),
    cost=_topk_cost,
    source="nki.isa.topk; cost: 4 n + k cycles (NKI 0.6)",
)
def topk(
    ctx: Context,
    val_dst: NkiTensor,
    idx_dst: NkiTensor,
    src: NkiTensor,
    n: int,
    name: str | None = None,
) -> None:
    """val_dst = the k largest of the n elements of a core, ascending; idx_dst = where they stood.

    Element e of a core lies in its partition e % 16, column e // 16 (4 for 16 on the toy core). The
    documents also say that partitions work independently; the snake is taken, and every partition
    of the core gets the same k results. Of equal values the earlier are kept and stand last; NaN
    ranks below every number (neither is documented).
    """
    per = ctx.run.spec.gpsimd.core_partitions
    values = float_values(src, ctx.run, "a").reshape(src.shape[0] // per, per, -1)
    snakes = values.transpose(0, 2, 1).reshape(values.shape[0], -1)[:, :n]
    order = np.argsort(-snakes, axis=1, kind="stable")[:, : val_dst.free_size][:, ::-1]
    write_values(val_dst, np.repeat(np.take_along_axis(snakes, order, axis=1), per, axis=0))
    target = idx_dst.mem.array(idx_dst.region, idx_dst.dtype.host)
    np.copyto(target, np.repeat(order, per, axis=0).reshape(target.shape), casting="unsafe")


@dataclass(frozen=True)
class _Bounds(Rule):
    """One partition; dst holds a start and an end for each id."""

    def problem(self, ops: Operands) -> str | None:
        dst, ids = ops["dst"], ops["segment_ids"]
        if ids.shape[0] != 1:
            return f"segment_ids {list(ids.shape)}; it must have one partition: split it"
        if dst.shape != (1, 2, ids.free_size):
            return (
                f"dst {list(dst.shape)} for segment_ids {list(ids.shape)}; it must be "
                f"{[1, 2, ids.free_size]}: starts, then ends"
            )
        return None

    def __str__(self) -> str:
        return "`segment_ids` [1, N]; `dst` [1, 2, N]"


_ID_TYPES = (dtypes.float32, dtypes.int32)


@instruction(
    engines=(Engine.gpsimd,),
    reads=("segment_ids",),
    writes=("dst",),
    rules=(
        *COMPUTE,
        DtypeIn("dst", _ID_TYPES),
        DtypeIn("segment_ids", _ID_TYPES),
        _Bounds(),
    ),
    cost=work.stream("sequence_bounds", data=("segment_ids",)),
    source="nki.isa.sequence_bounds; cost: 2 N cycles (no published formula)",
)
def sequence_bounds(
    ctx: Context,
    dst: NkiTensor,
    segment_ids: NkiTensor,
    name: str | None = None,
) -> None:
    """dst[0, 0, i], dst[0, 1, i] = first position, and one past the last, of the run of ids at i.

    A run is neighbouring elements of equal id. Id 0 is padding: start N, end -1.
    """
    ids = segment_ids.mem.array(segment_ids.region, segment_ids.dtype.host).reshape(-1)
    if (ids < 0).any():
        raise RuleViolation(
            f"nisa.sequence_bounds at {where(ctx.run.kernel_site())}: segment id {ids.min()}; ids "
            "are 0 (padding) or positive: shift them"
        )
    edges = np.flatnonzero(np.diff(ids)) + 1
    starts: Array = np.concatenate([[0], edges])
    ends: Array = np.concatenate([edges, [ids.size]])
    sizes = ends - starts
    padding = ids == 0
    bounds = np.stack(
        [
            np.where(padding, ids.size, np.repeat(starts, sizes)),
            np.where(padding, -1, np.repeat(ends, sizes)),
        ]
    )
    target = dst.mem.array(dst.region, dst.dtype.host)
    np.copyto(target, bounds.reshape(target.shape), casting="unsafe")
