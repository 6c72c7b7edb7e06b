"""Arithmetic inside the DMA engines: dma_compute."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from nki.isa.dma import Rows, require_inside, rows_of, source_row
from nki.isa.enums import oob_mode as oob_modes

from nki_kernels.hardware.spec import Engine
from nki_kernels.machine import dtypes, work
from nki_kernels.machine.core import float_values, write_values
from nki_kernels.machine.errors import RuleViolation
from nki_kernels.machine.instruction import Context, instruction
from nki_kernels.machine.operators import operator
from nki_kernels.machine.rules import BufferIs, Operands, Rule, memory
from nki_kernels.machine.tensor import NkiTensor
from nki_kernels.machine.trace import where

#: Sources one instruction adds (nki.isa.dma_compute).
MOST_SOURCES = 16


def _sources(ops: Operands) -> list[tuple[str, NkiTensor]]:
    return [(name, view) for name, view in ops.tensors() if name != "dst"]


def _gathers(view: NkiTensor) -> bool:
    return view.dynamic is not None and view.dynamic.kind == "vector"


@dataclass(frozen=True)
class _Sum(Rule):
    """A sum of 1 to 16 tensors of equal element count, unscaled."""

    def problem(self, ops: Operands) -> str | None:
        sources, dst = _sources(ops), ops["dst"]
        if not 1 <= len(sources) <= MOST_SOURCES:
            return (
                f"srcs holds {len(sources)} tensors; it must be a list of 1 to {MOST_SOURCES}: "
                "split the sum"
            )
        if operator(ops["reduce_op"]).name != "add":
            return f"reduce_op={operator(ops['reduce_op'])!r}; the DMA engines only add: nl.add"
        scales = ops["scales"]
        if scales is not None and (
            not isinstance(scales, tuple)
            or len(scales) != len(sources)
            or any(s != 1 for s in scales)
        ):
            return f"scales={scales!r}; it must be None or {len(sources)} times 1.0: scale the data"
        for name, view in sources:
            if view.size != dst.size:
                return (
                    f"{name} {list(view.shape)} has {view.size} elements, dst {list(dst.shape)} "
                    f"{dst.size}; they must be equal: slice one of them"
                )
        for name, view in ops.tensors():
            if memory(view) == "psum":
                return f"{name} is in PSUM; a DMA reaches SBUF and HBM: copy it with tensor_copy"
            if view.dtype.kind == "packed" or view.dtype == dtypes.float8_e8m0fnu:
                return f"{name} is {view.dtype}; packed and scale types have no sum: convert it"
        return None

    def __str__(self) -> str:
        return "1 to 16 `srcs` of dst's element count; `reduce_op` nl.add; `scales` all 1.0"


@dataclass(frozen=True)
class _Update(Rule):
    """With a vector_offset: read-modify-write of two sources, one of which is dst itself."""

    def problem(self, ops: Operands) -> str | None:
        mode, dst = ops["oob_mode"], ops["dst"]
        if not isinstance(mode, oob_modes):
            return f"oob_mode={mode!r}; it must be a member of nisa.oob_mode"
        for name, view in ops.tensors():
            if view.dynamic is not None and view.dynamic.kind == "scalar":
                return (
                    f"{name} has a scalar_offset; addresses must be known when the kernel is "
                    "built, or come from a vector_offset: move it with dma_copy first"
                )
        indexed = [(n, v) for n, v in ops.tensors() if _gathers(v)]
        if not indexed:
            if mode is oob_modes.skip:
                return "oob_mode=skip without a vector_offset; drop it"
            return None
        return self._indices(ops, indexed) or self._pairing(ops, dst)

    def _indices(self, ops: Operands, indexed: list[tuple[str, NkiTensor]]) -> str | None:
        for name, view in indexed:
            index = view.dynamic.index if view.dynamic else None
            if not isinstance(index, NkiTensor) or memory(index) != "sbuf":
                return f"the vector_offset of {name} is not an SBUF tile; load the indices first"
            if index.dtype not in (dtypes.int32, dtypes.uint32):
                return f"the vector_offset of {name} is {index.dtype}; it must be int32 or uint32"
        if ops["unique_indices"] is not True:
            return (
                f"unique_indices={ops['unique_indices']!r} with a vector_offset; repeated indices "
                "are not supported: pass True and add repeated rows beforehand"
            )
        return None

    def _pairing(self, ops: Operands, dst: NkiTensor) -> str | None:
        sources = _sources(ops)
        if len(sources) != 2:
            return f"{len(sources)} srcs with a vector_offset; read-modify-write takes exactly 2"
        indexed = [view for _, view in sources if _gathers(view)]
        plain = [view for _, view in sources if not _gathers(view)]
        if len(indexed) != 1:
            return (
                f"{len(indexed)} of 2 srcs have a vector_offset; exactly one has: dst itself when "
                "dst is scattered into, else the rows to gather"
            )
        twin = indexed[0] if _gathers(dst) else plain[0]
        if twin.signature != dst.signature:
            return (
                f"dst {list(dst.shape)} {dst.dtype} is none of the srcs; read-modify-write adds "
                "to dst: pass the same view in srcs"
            )
        chip = plain[0] if _gathers(dst) else dst
        if memory(chip) != "sbuf":
            return f"{list(chip.shape)} in HBM beside indexed rows; it must be in SBUF: load it"
        if plain[0].shape[0] != indexed[0].shape[0]:
            return (
                f"{indexed[0].shape[0]} indexed rows beside {list(plain[0].shape)}; dimension 0 "
                "must agree: slice it"
            )
        return None

    def __str__(self) -> str:
        return "with a `vector_offset`: two `srcs`, one of them `dst`; unique int32/uint32 indices"


@instruction(
    engines=(Engine.dma,),
    reads=(),
    writes=("dst",),
    many="srcs",
    rules=(BufferIs("dst", "sbuf", "hbm", remedy="sum into SBUF"), _Sum(), _Update()),
    cost=work.dma_compute,
    handles_dynamic=True,
    lists=("scales",),
    source="nki.isa.dma_compute; cost: half the DMA rate (trn2)",
)
def dma_compute(
    ctx: Context,
    dst: NkiTensor,
    srcs: Sequence[NkiTensor],
    reduce_op: Any,
    scales: Any = None,
    unique_indices: bool = True,
    oob_mode: oob_modes = oob_modes.error,
    name: str | None = None,
) -> None:
    """dst = srcs[0] + srcs[1] + ... in float32 from left to right, one rounding on the write.

    Elements correspond in row-major order of each view. With a vector_offset, row by row:
    ``dst[indices[i]] += src[i]`` (scatter: dst is also a source) or ``dst[i] += src[indices[i]]``
    (gather). A row out of bounds raises, or with skip is left out. Repeated indices add in order
    here and warn: on the device their result is undefined. dst may be any source (not documented
    without a vector_offset).
    """
    indexed = [view for view in srcs if view.dynamic is not None]
    if indexed:
        plain = next(view for view in srcs if view.dynamic is None)
        if dst.dynamic is not None:
            _scatter(ctx, dst, plain, indexed[0], oob_mode)
        else:
            _gather(ctx, dst, plain, indexed[0], oob_mode)
        return
    total = ctx.run.scratch("sum", dst.shape)
    for at, view in enumerate(srcs):
        values = float_values(view, ctx.run, "a").reshape(dst.shape)
        if at == 0:
            np.copyto(total, values)
        else:
            np.add(total, values, out=total)
    write_values(dst, total)


def _line(ctx: Context) -> str:
    return f"nisa.dma_compute at {where(ctx.run.kernel_site())}"


def _scatter(
    ctx: Context, dst: NkiTensor, update: NkiTensor, twin: NkiTensor, mode: oob_modes
) -> None:
    _require_same(ctx, dst, twin)
    rows = rows_of(dst)
    require_inside(ctx, f"{_line(ctx)} dst", rows, mode)
    _warn_repeated(ctx, rows)
    added = float_values(update, ctx.run, "a").reshape(dst.shape)
    for row, inside in enumerate(rows.inside):
        if inside:
            old = source_row(ctx, _line(ctx), rows, row)
            dtypes.store(old, old.astype(np.float32) + added[row])


def _gather(
    ctx: Context, dst: NkiTensor, twin: NkiTensor, source: NkiTensor, mode: oob_modes
) -> None:
    _require_same(ctx, dst, twin)
    rows = rows_of(source)
    require_inside(ctx, f"{_line(ctx)} srcs", rows, mode)
    target = dst.mem.array(dst.region, dst.dtype.host)
    for row, inside in enumerate(rows.inside):
        if inside:
            added = source_row(ctx, _line(ctx), rows, row).astype(np.float32)
            dtypes.store(
                target[row], target[row].astype(np.float32) + added.reshape(target[row].shape)
            )


def _require_same(ctx: Context, dst: NkiTensor, twin: NkiTensor) -> None:
    """Judge at every call what a signature does not tell: the two views are one."""
    same = _place(dst) == _place(twin)
    if dst.dynamic is not None and twin.dynamic is not None:
        same = same and _place(dst.dynamic.index) == _place(twin.dynamic.index)
    if not same:
        raise RuleViolation(
            f"{_line(ctx)}: dst {dst.name!r} and its place in srcs, {twin.name!r}, are different "
            "views; read-modify-write adds to dst itself: pass the same view twice"
        )


def _place(view: NkiTensor) -> tuple[Any, ...]:
    return (view.mem.tile.id, view.region)


def _warn_repeated(ctx: Context, rows: Rows) -> None:
    starts = [s for s, inside in zip(rows.starts, rows.inside, strict=True) if inside]
    repeated = len(starts) - len(set(starts))
    if repeated:
        error = RuleViolation(
            f"{_line(ctx)}: {repeated} of {len(starts)} indices repeat another; the device's "
            "result is then undefined: add repeated rows beforehand"
        )
        ctx.run.report("warn", error)
