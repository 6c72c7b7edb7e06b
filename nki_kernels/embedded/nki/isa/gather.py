"""Moving data across partitions: nc_stream_shuffle."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import Any, ClassVar

import numpy as np

from nki_kernels.hardware.spec import Engine
from nki_kernels.machine import work
from nki_kernels.machine.dtypes import Array
from nki_kernels.machine.instruction import Context, instruction
from nki_kernels.machine.rules import (
    BufferIs,
    EngineReach,
    OnChipOperands,
    Operands,
    Rule,
    SameDtype,
)
from nki_kernels.machine.tensor import NkiTensor

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
