"""Moving data inside and across partitions: nc_stream_shuffle, nc_n_gather, local_gather."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any, ClassVar

import numpy as np

from nki_kernels.hardware.spec import Engine
from nki_kernels.machine import dtypes, work
from nki_kernels.machine.dtypes import Array
from nki_kernels.machine.errors import OutOfBounds
from nki_kernels.machine.instruction import Context, instruction
from nki_kernels.machine.layout import is_int
from nki_kernels.machine.rules import (
    COMPUTE,
    BufferIs,
    DtypeIn,
    EngineReach,
    OnChipOperands,
    Operands,
    Rule,
    SameDtype,
    SameExtent,
)
from nki_kernels.machine.tensor import NkiTensor
from nki_kernels.machine.trace import StreamWork, where

_ON_CHIP = ("sbuf", "psum")
#: Mask entry of a partition that keeps what it holds.
KEEP = 255


@dataclass(frozen=True)
class _Mask(Rule):
    """One entry per partition of a quadrant: a source partition that src has, or 255."""

    def problem(self, ops: Operands) -> str | None:
        mask, quadrant = ops["shuffle_mask"], ops.spec.quadrant
        ints = isinstance(mask, tuple) and all(isinstance(m, (int, np.integer)) for m in mask)
        if not ints or len(mask) != quadrant:
            return (
                f"shuffle_mask={mask!r}; it must be a list of {quadrant} ints, one for each "
                "partition of a quadrant"
            )
        bad = [m for m in mask if m != KEEP and not 0 <= m < quadrant]
        if bad:
            return (
                f"shuffle_mask entry {bad[0]}; allowed are 0 to {quadrant - 1}, and {KEEP} to keep "
                "a partition"
            )
        src, dst = ops["src"], ops["dst"]
        for row in range(dst.shape[0]):
            source = source_row(mask, row)
            if source is not None and source >= src.shape[0]:
                return (
                    f"dst partition {row} takes src partition {source} of src {list(src.shape)}, "
                    f"which has {src.shape[0]}: change shuffle_mask[{row % quadrant}], or widen src"
                )
        return None

    def __str__(self) -> str:
        return "`shuffle_mask` a source partition of the quadrant, or 255, for each partition"


def source_row(mask: tuple[int, ...], row: int) -> int | None:
    """Return the partition of src that partition `row` of dst takes, None for none."""
    entry = int(mask[row % len(mask)])
    return None if entry == KEEP else row - row % len(mask) + entry


@dataclass(frozen=True)
class _SameColumns(Rule):
    """src and dst have equally many elements per partition; partitions may differ."""

    def problem(self, ops: Operands) -> str | None:
        src, dst = ops["src"], ops["dst"]
        if src.free_size == dst.free_size:
            return None
        return (
            f"src {list(src.shape)} and dst {list(dst.shape)}; elements per partition must be "
            "equal: slice one of them"
        )

    def __str__(self) -> str:
        return "`src` and `dst` of equally many elements per partition"


@dataclass(frozen=True)
class _ShuffleStart(Rule):
    """Start partitions by the larger operand, counted in whole quadrants.

    One active quadrant: any quadrant; two: a multiple of two; more: partition 0.
    """

    check: ClassVar[str] = "start_partition"

    def problem(self, ops: Operands) -> str | None:
        quadrant, total = ops.spec.quadrant, ops.spec.partitions
        src, dst = ops["src"], ops["dst"]
        active = -(-max(src.shape[0], dst.shape[0]) // quadrant) * quadrant
        step = active if active <= 2 * quadrant else total
        for name, view in (("src", src), ("dst", dst)):
            fixed = view.mem.tile.address
            start = view.start_partition + (fixed[0] if fixed else 0)
            if start % step:
                allowed = ", ".join(str(s) for s in range(0, total, step))
                return (
                    f"{name} starts at partition {start}; with {active} active partitions it may "
                    f"start at {allowed}: move the data with a DMA"
                )
        return None

    def __str__(self) -> str:
        return "`src` and `dst` start where the larger one, in whole quadrants, may"


def _hidden(ops: Operands) -> tuple[tuple[str, ...], tuple[str, ...]]:
    return (), ("shuffle_mask",)


@instruction(
    engines=(Engine.vector,),
    reads=("src",),
    writes=("dst",),
    updates=("dst",),
    rules=(
        OnChipOperands(),
        EngineReach(),
        BufferIs("dst", *_ON_CHIP),
        _ShuffleStart(),
        SameDtype("dst", "src"),
        _SameColumns(),
        _Mask(),
    ),
    cost=work.stream("nc_stream_shuffle", data=("src",)),
    hidden=_hidden,
    lists=("shuffle_mask",),
    source="nki.isa.nc_stream_shuffle; cost: trn2 law (documented max(64, N) cycles, NKI 2.26)",
)
def nc_stream_shuffle(
    ctx: Context,
    dst: NkiTensor,
    src: NkiTensor,
    shuffle_mask: Any,
    name: str | None = None,
) -> None:
    """dst[q + i] = src[q + shuffle_mask[i]], bit for bit, in each quadrant q of the views.

    255 leaves a partition of dst as it is. src is read as a whole before dst is written, so both
    may be one tile. dst may have more or fewer partitions than src.
    """
    written, sources = _routes(shuffle_mask, dst.shape[0])
    target = dst.mem.array(dst.region, dst.dtype.host)
    values = src.mem.array(src.region, src.dtype.host).reshape(src.shape[0], *target.shape[1:])
    target[written] = values[sources]
    if not dst.mem.full:
        chosen = np.zeros(dst.shape, np.bool_)
        chosen[written] = True
        dst.mem.mark_where(dst.region, chosen)


@lru_cache
def _routes(mask: tuple[int, ...], rows: int) -> tuple[Array, Array]:
    """Return the partitions of dst that are written and those of src they take."""
    moves = [(row, source) for row in range(rows) if (source := source_row(mask, row)) is not None]
    table = np.array(moves, np.intp).reshape(-1, 2)
    return table[:, 0], table[:, 1]


@dataclass(frozen=True)
class _SamePartitions(Rule):
    """The operands have equally many partitions."""

    one: str
    other: str

    def problem(self, ops: Operands) -> str | None:
        one, other = ops[self.one], ops[self.other]
        if one.shape[0] == other.shape[0]:
            return None
        return (
            f"{self.one} {list(one.shape)} and {self.other} {list(other.shape)}; partitions must "
            "be equal: slice one of them"
        )

    def __str__(self) -> str:
        return f"`{self.one}` and `{self.other}` of equally many partitions"


def _require_indices(ctx: Context, what: str, at: Array, reach: int, limit: int) -> None:
    """Refuse an index whose elements leave the partition; the documents call that undefined."""
    past = at.astype(np.int64) + reach > limit
    if past.any():
        bad = int(at[past][0])
        raise OutOfBounds(
            f"nisa.{what} at {where(ctx.run.kernel_site())}: index {bad} with {reach} element(s) "
            f"leaves the {limit} elements per partition; keep indices inside"
        )


@instruction(
    engines=(Engine.gpsimd,),
    reads=("data", "indices"),
    writes=("dst",),
    rules=(
        *COMPUTE,
        SameDtype("dst", "data"),
        DtypeIn("indices", (dtypes.uint32,)),
        SameExtent("dst", "indices"),
        _SamePartitions("dst", "data"),
    ),
    cost=work.stream("nc_n_gather", data=("data",)),
    source="nki.isa.nc_n_gather; cost: N cycles (no published formula)",
)
def nc_n_gather(
    ctx: Context,
    dst: NkiTensor,
    data: NkiTensor,
    indices: NkiTensor,
    name: str | None = None,
) -> None:
    """dst[p, i] = data[p, indices[p, i]], bit for bit, free dimensions flattened.

    data is read as a whole before dst is written. An index outside the partition raises.
    """
    rows = data.mem.bits(data.region).reshape(data.shape[0], -1)
    at = indices.mem.array(indices.region, indices.dtype.host).reshape(data.shape[0], -1)
    _require_indices(ctx, "nc_n_gather", at, 1, rows.shape[1])
    target = dst.mem.bits(dst.region)
    np.copyto(target, np.take_along_axis(rows, at, axis=1).reshape(target.shape))


#: Elements local_gather takes at an index, and indices of one core (nki.isa.local_gather).
RUNS = (1, 2, 4, 8, 16, 32)
MOST_INDICES = 4096


def _valid(index: NkiTensor, cores: int, given: int | None) -> int:
    return index.size // cores if given is None else given


@dataclass(frozen=True)
class _LocalGather(Rule):
    """Whole cores, a legal run length, no more indices than there are, and dst of their size."""

    def problem(self, ops: Operands) -> str | None:
        dst, src, index = ops["dst"], ops["src_buffer"], ops["index"]
        run, given, per = (
            ops["num_elem_per_idx"],
            ops["num_valid_indices"],
            ops.spec.gpsimd.core_partitions,
        )
        if src.shape[0] % per:
            return (
                f"src_buffer {list(src.shape)} has {src.shape[0]} partitions; a GpSimd core serves "
                f"{per}: use a multiple of {per}"
            )
        if run not in RUNS or not is_int(run):
            return f"num_elem_per_idx={run!r}; allowed are {', '.join(map(str, RUNS))}"
        held = index.free_size * per
        if given is not None and not (is_int(given) and 1 <= given <= held):
            return f"num_valid_indices={given!r}; allowed are 1 to {held}, what index holds a core"
        count = _valid(index, index.shape[0] // per, given)
        if count > MOST_INDICES:
            return f"{count} indices a core; at most {MOST_INDICES}: split index"
        if dst.free_size != count * run:
            return (
                f"dst {list(dst.shape)} for {count} indices of {run} elements; it must hold "
                f"{count * run} elements per partition (NKI 0.6 ignores num_elem_per_idx "
                "otherwise): allocate it so"
            )
        return None

    def __str__(self) -> str:
        return "whole GpSimd cores; `dst` [P, num_valid_indices * num_elem_per_idx]"


def _local_gather_cost(ops: Operands) -> StreamWork:
    """Documented (NKI 2.26): 150 + n * e / C cycles, C = (28 + 4 e) / (4 e) / min(4 / size, e).

    The work counts cycles: one for each element of a stream that long.
    """
    build = work.stream("local_gather", data=("src_buffer",))(ops)
    run, size = ops["num_elem_per_idx"], ops["src_buffer"].dtype.itemsize
    rate = (28 + 4 * run) / (4 * run) / min(4 / size, run)
    return replace(build, n=math.ceil(build.n / rate))


@instruction(
    engines=(Engine.gpsimd,),
    reads=("src_buffer", "index"),
    writes=("dst",),
    rules=(
        *COMPUTE,
        SameDtype("dst", "src_buffer"),
        DtypeIn("index", (dtypes.uint16,)),
        _SamePartitions("src_buffer", "index"),
        _SamePartitions("dst", "src_buffer"),
        _LocalGather(),
    ),
    cost=_local_gather_cost,
    source="nki.isa.local_gather; cost: 150 + n e / C cycles (NKI 2.26)",
)
def local_gather(
    ctx: Context,
    dst: NkiTensor,
    src_buffer: NkiTensor,
    index: NkiTensor,
    num_elem_per_idx: int = 1,
    num_valid_indices: int | None = None,
    name: str | None = None,
) -> None:
    """dst[p] = src_buffer[p, i : i + num_elem_per_idx] for each i of the index list of p's core.

    A core serves 16 partitions (4 on the toy core). Its list is its rows of index, partition by
    partition within a column, cut to num_valid_indices. i counts elements, not runs. Bits are
    moved; src_buffer is read as a whole first. An index past the partition raises (documented as
    undefined).
    """
    per = ctx.run.spec.gpsimd.core_partitions
    cores = src_buffer.shape[0] // per
    rows = src_buffer.mem.bits(src_buffer.region).reshape(cores, per, -1)
    lists = index.mem.array(index.region, index.dtype.host).reshape(cores, per, -1)
    count = _valid(index, cores, num_valid_indices)
    at = lists.transpose(0, 2, 1).reshape(cores, -1)[:, :count]
    _require_indices(ctx, "local_gather", at, num_elem_per_idx, rows.shape[2])
    positions = (at[:, :, None] + np.arange(num_elem_per_idx)).reshape(cores, 1, -1)
    target = dst.mem.bits(dst.region)
    np.copyto(target, np.take_along_axis(rows, positions, axis=2).reshape(target.shape))
