"""Data movement: dma_copy, dma_transpose."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

import numpy as np
from nki.isa.enums import dge_mode as dge_modes
from nki.isa.enums import oob_mode as oob_modes

from nki_kernels.hardware.spec import Engine
from nki_kernels.machine import dtypes, work
from nki_kernels.machine.dtypes import Array
from nki_kernels.machine.errors import OutOfBounds, UninitializedRead
from nki_kernels.machine.indirection import row_starts
from nki_kernels.machine.instruction import Context, instruction
from nki_kernels.machine.rules import BufferIs, Operands, Rule, SameDtype, SameSize, memory
from nki_kernels.machine.tensor import NkiTensor
from nki_kernels.machine.trace import where

_PSUM_REMEDY = "copy it to SBUF with tensor_copy or activation first"
_REACH = (
    BufferIs("dst", "sbuf", "hbm", remedy=_PSUM_REMEDY),
    BufferIs("src", "sbuf", "hbm", remedy=_PSUM_REMEDY),
)


@dataclass(frozen=True)
class _Dge(Rule):
    """Which descriptor engine, queue and priority a generation has."""

    def problem(self, ops: Operands) -> str | None:
        mode, generation = ops["dge_mode"], ops.spec.generation
        if not isinstance(mode, dge_modes):
            return f"dge_mode={mode!r}; it must be a member of nisa.dge_mode"
        if mode is dge_modes.hwdge and generation < 3:
            return f"dge_mode=hwdge on {ops.spec.name}; hardware descriptor generation needs gen3"
        priority = ops["priority"]
        if priority is not None and (generation < 4 or priority not in (0, 1, 2, 3)):
            return f"priority={priority!r} on {ops.spec.name}; priorities 0 to 3 exist from gen4 on"
        if not isinstance(ops["oob_mode"], oob_modes):
            return f"oob_mode={ops['oob_mode']!r}; it must be a member of nisa.oob_mode"
        engine = ops.values.get("engine", Engine.unknown)
        if engine is Engine.unknown:
            return None
        if mode is not dge_modes.hwdge or engine not in (Engine.sync, Engine.scalar):
            return (
                f"engine={engine.name} with dge_mode={mode.name}; engine is sync or scalar, and "
                "only with dge_mode=nisa.dge_mode.hwdge"
            )
        return None

    def __str__(self) -> str:
        return "hwdge from gen3; `engine` sync or scalar with hwdge; `priority` from gen4"


@dataclass(frozen=True)
class _CopyTypes(Rule):
    """Converting copies need software; packed types are never converted."""

    check: ClassVar[str] = "dma_dtype"

    def problem(self, ops: Operands) -> str | None:
        dst, src = ops["dst"].dtype, ops["src"].dtype
        if dst == src:
            return None
        if ops["dge_mode"] is dge_modes.hwdge:
            return (
                f"src {src} to dst {dst} with hwdge; it moves bits: use equal dtypes, or another "
                "mode"
            )
        if "packed" in (dst.kind, src.kind) or dtypes.float8_e8m0fnu in (dst, src):
            return (
                f"src {src} to dst {dst}; packed and scale types are not converted: use equal "
                "dtypes"
            )
        return None

    def __str__(self) -> str:
        return "equal dtypes with hwdge and for packed types"


@dataclass(frozen=True)
class _Indirect(Rule):
    """At most one gather or scatter side; rows of both sides correspond."""

    def problem(self, ops: Operands) -> str | None:
        vector = [(n, v) for n, v in ops.tensors() if v.dynamic and v.dynamic.kind == "vector"]
        if len(vector) == 2:
            return "src and dst both have a vector_offset; gather into SBUF first, then scatter"
        if not vector:
            return None
        name, view = vector[0]
        index = view.dynamic.index if view.dynamic else None
        if not isinstance(index, NkiTensor) or memory(index) != "sbuf":
            return f"the vector_offset of {name} is not an SBUF tile; load the indices first"
        if index.dtype not in (dtypes.int32, dtypes.uint32):
            return f"the vector_offset of {name} is {index.dtype}; it must be int32 or uint32"
        if ops["dge_mode"] not in (dge_modes.unknown, dge_modes.swdge):
            return (
                f"vector_offset with dge_mode={ops['dge_mode'].name}; it needs swdge (or unknown)"
            )
        other = ops["dst"] if name == "src" else ops["src"]
        if ops.opcode == "dma_copy" and other.shape[0] != view.shape[0]:
            return (
                f"{name} gathers {view.shape[0]} rows, the other side {list(other.shape)} has "
                f"{other.shape[0]}; dimension 0 must agree: slice it"
            )
        return None

    def __str__(self) -> str:
        return "at most one `vector_offset` side, indices int32/uint32 in SBUF"


class Rows(NamedTuple):
    """A view as rows of dimension 0: element offset of each, and which are inside the tensor."""

    starts: list[int]
    inside: list[bool]
    view: NkiTensor

    def region(self, row: int) -> tuple[int, tuple[int, ...], tuple[int, ...], int]:
        """Return one row as a key of the tile's written map."""
        view = self.view
        return (self.starts[row], view.shape[1:], view.strides[1:], view.dtype.itemsize)


def rows_of(view: NkiTensor) -> Rows:
    """Resolve the run-time addresses of a view, judged row by row on addresses."""
    starts = row_starts(view)
    reach = sum((n - 1) * s for n, s in zip(view.shape[1:], view.strides[1:], strict=True))
    limit = view.mem.nbytes // view.dtype.itemsize
    inside = [s >= 0 and s + reach < limit for s in starts]
    if view.on_chip:
        # A tile lies partition by partition: past its free elements is the next partition.
        per, first = view.row_elements, view.start_partition
        inside = [s // per == first + i and s % per + reach < per for i, s in enumerate(starts)]
    return Rows(starts, inside, view)


def require_inside(ctx: Context, what: str, rows: Rows, mode: oob_modes) -> None:
    """Refuse rows outside the tensor unless they are skipped (as below level "error").

    Raises:
        OutOfBounds: with the first such row.
    """
    if mode is oob_modes.skip or all(rows.inside):
        return
    bad = rows.inside.index(False)
    tile = rows.view.mem.tile
    error = OutOfBounds(
        f"{what}: row {bad} of its run-time addresses starts at element {rows.starts[bad]} of "
        f"tensor {tile.name!r} {list(tile.shape)}; keep indices inside, or pass "
        "oob_mode=nisa.oob_mode.skip"
    )
    ctx.run.report(ctx.run.options.bounds, error)


def _move_rows(ctx: Context, dst: NkiTensor, src: NkiTensor, mode: oob_modes) -> None:
    """Copy row by row where an address is known only at run time."""
    line = where(ctx.run.kernel_site())
    sources, targets = rows_of(src), rows_of(dst)
    require_inside(ctx, f"nisa.dma_copy src at {line}", sources, mode)
    require_inside(ctx, f"nisa.dma_copy dst at {line}", targets, mode)
    values = np.empty(src.shape, np.float32 if src.mem.wide else src.dtype.host)
    for row, inside in enumerate(sources.inside):
        if inside:
            values[row] = source_row(ctx, f"nisa.dma_copy at {line}", sources, row)
    # Elements correspond in row-major order; the rows of the two sides may be cut differently.
    values = values.reshape(dst.shape)
    moved = np.repeat(sources.inside, src.size // src.shape[0]).reshape(dst.shape)
    for row, inside in enumerate(targets.inside):
        part = moved[row]
        if not (inside and part.any()):
            continue
        write = targets.region(row)
        target = dst.mem.array(write, dst.dtype.host)
        if part.all():
            _move(dst, target, values[row], src)
            dst.mem.mark(write)
            continue
        for at in np.argwhere(part):
            offset = targets.starts[row] + int(np.dot(at, dst.strides[1:]))
            one = (offset, (1,), (1,), dst.dtype.itemsize)
            _move(dst, dst.mem.array(one, dst.dtype.host), values[(row, *at)].reshape(1), src)
            dst.mem.mark(one)


def source_row(ctx: Context, what: str, rows: Rows, row: int) -> Array:
    """Return the elements of a source row that is inside, which must have been written."""
    mem, region = rows.view.mem, rows.region(row)
    if not mem.is_written(region):
        error = UninitializedRead(
            f"{what}: row {row} reads elements from {region[0]} on of tensor {rows.view.name!r} "
            "that no instruction wrote; write the tensor first"
        )
        ctx.run.report(ctx.run.options.uninitialized, error)
    return mem.array(region, rows.view.dtype.host)


def _move(dst: NkiTensor, target: Array, values: Array, src: NkiTensor) -> None:
    """Equal dtypes move bits; others go through float32 and round once."""
    if values.shape != target.shape:
        values = values.reshape(target.shape)
    if dst.dtype == src.dtype:
        np.copyto(target, values)
    else:
        dtypes.store(target, values.astype(np.float32))


@instruction(
    engines=(Engine.dma,),
    reads=("src",),
    writes=("dst",),
    rules=(*_REACH, SameSize("dst", "src"), _Dge(), _CopyTypes(), _Indirect()),
    cost=work.dma("copy"),
    handles_dynamic=True,
    source="nki.isa.dma_copy; cost: NKI DMA bandwidth guide, single-DMA laws",
)
def dma_copy(
    ctx: Context,
    dst: NkiTensor,
    src: NkiTensor,
    priority: Any = None,
    oob_mode: oob_modes = oob_modes.error,
    dge_mode: dge_modes = dge_modes.unknown,
    engine: Engine = Engine.unknown,
    name: str | None = None,
) -> None:
    """dst = src, element by element in row-major order of both views (shapes may differ).

    Run-time addresses (``.ap(scalar_offset=)``, ``.ap(vector_offset=)``) move row by row: a row any
    of whose addresses leaves the tensor is out of bounds; error raises, skip leaves its destination
    unchanged. Rows only partly outside count as outside, and of duplicate scatter rows the last
    wins (both undocumented).
    """
    if dst.dynamic is not None or src.dynamic is not None:
        _move_rows(ctx, dst, src, oob_mode)
        return
    if dst.dtype == src.dtype:
        target, values = dst.mem.bits(dst.region), src.mem.bits(src.region)
    else:
        target = dst.mem.array(dst.region, dst.dtype.host)
        values = src.mem.array(src.region, src.dtype.host)
    _move(dst, target, values, src)


_BLOCK = 64
_AXES = {2: (1, 0), 3: (2, 1, 0), 4: (3, 1, 2, 0)}


@dataclass(frozen=True)
class _TransposeShape(Rule):
    """The permutation belongs to the rank; dst has exactly the permuted shape."""

    def problem(self, ops: Operands) -> str | None:
        dst, src, axes = ops["dst"], ops["src"], ops["axes"]
        wanted = _AXES.get(src.ndim)
        if dst.dynamic is not None:
            return (
                "dst has a run-time address; only src may have one: transpose into a tile, then "
                "move it with dma_copy"
            )
        known = axes is None or (isinstance(axes, tuple) and axes == wanted)
        if wanted is None or not known:
            return (
                f"axes={axes!r} for src {list(src.shape)}; supported are (1, 0), (2, 1, 0) and "
                "(3, 1, 2, 0) by rank"
            )
        shape = tuple(src.shape[a] for a in wanted)
        if dst.shape != shape:
            return f"dst {list(dst.shape)} for src {list(src.shape)}; dst must be {list(shape)}"
        if src.dtype.itemsize not in (2, 4):
            return f"src is {src.dtype}; a DMA transposes 2- and 4-byte elements: view it as one"
        return None

    def __str__(self) -> str:
        return "`dst` of the permuted shape; 2- or 4-byte elements"


@dataclass(frozen=True)
class _TransposeMode(Rule):
    """Extra limits of the hardware and of the gathering transpose."""

    def problem(self, ops: Operands) -> str | None:
        src, mode = ops["src"], ops["dge_mode"]
        gathers = src.dynamic is not None and src.dynamic.kind == "vector"
        if mode is dge_modes.swdge and not gathers:
            return (
                "dge_mode=swdge without a vector_offset; a direct transpose takes unknown or hwdge"
            )
        if mode is dge_modes.hwdge:
            first = (16,) if src.ndim == 2 else (1, 2, 4, 8, 16)
            rows = src.shape[0] * (src.shape[-2] if src.ndim > 2 else 1)
            if (
                src.shape[0] not in first
                or rows % 16
                or src.shape[-1] > 128
                or src.dtype.itemsize != 2
            ):
                return (
                    f"hwdge transpose of src {list(src.shape)} {src.dtype}; it takes 2-byte "
                    "elements, at most 128 columns, and 16 rows in 2-D (shape[0] in 1, 2, 4, 8, "
                    "16 with shape[0] * shape[-2] a multiple of 16 in 3-D and 4-D): use "
                    "dge_mode.unknown"
                )
        if gathers:
            return self._gather(ops)
        if ops["oob_mode"] is oob_modes.skip and src.dynamic is None:
            return "oob_mode=skip without a run-time index; drop it"
        return None

    def _gather(self, ops: Operands) -> str | None:
        src = ops["src"]
        index = src.dynamic.index
        n, m = index.shape[0], index.size // index.shape[0]
        legal = (
            ops.spec.generation >= 3
            and src.shape[-1] <= 128
            and src.dtype.itemsize == 2
            and src.shape[0] % 16 == 0
            and (src.ndim != 4 or 1 in src.shape[1:3])
            and n % 16 == 0
            and 16 <= n <= 128
            and (m == 1 or n == 128)
            and n * m >= src.shape[0]
            and index.dtype == dtypes.uint32
        )
        if legal:
            return None
        return (
            f"gathering transpose of src {list(src.shape)} {src.dtype} by indices "
            f"{list(index.shape)} {index.dtype}; it takes gen3, 2-byte elements, at most 128 "
            "columns, rows in multiples of 16 and uint32 indices [n, m] with n a multiple of 16 "
            "(128 if m > 1) and n * m >= rows"
        )

    def __str__(self) -> str:
        return "hwdge: 16 rows, 128 columns, 2-byte; gather: uint32 indices in multiples of 16"


@instruction(
    engines=(Engine.dma,),
    reads=("src",),
    writes=("dst",),
    rules=(
        BufferIs("dst", "sbuf", remedy="a transpose lands in SBUF; store it with dma_copy"),
        _REACH[1],
        SameDtype("dst", "src"),
        _Dge(),
        _TransposeShape(),
        _Indirect(),
        _TransposeMode(),
    ),
    cost=work.dma("transpose"),
    handles_dynamic=True,
    lists=("axes",),
    source="nki.isa.dma_transpose; cost: at most 90 % (HBM) or 50 % (SBUF) of the DMA rate",
)
def dma_transpose(
    ctx: Context,
    dst: NkiTensor,
    src: NkiTensor,
    axes: Any = None,
    priority: Any = None,
    dge_mode: dge_modes = dge_modes.unknown,
    oob_mode: oob_modes = oob_modes.error,
    name: str | None = None,
) -> None:
    """dst = transpose(src, axes), bit for bit; axes (1, 0), (2, 1, 0) or (3, 1, 2, 0) by rank.

    With a vector_offset rows are gathered first: index k of the flat list is
    ``indices.T.flatten()[k]``; rows skipped as out of bounds leave their column of dst unchanged.
    """
    order = _AXES[src.ndim]
    if src.dynamic is None:
        flipped = src.mem.bits(src.region).transpose(order)
        target = dst.mem.bits(dst.region)
        # In blocks: a transposed walk over long rows of HBM misses the cache at every element.
        for start in range(0, target.shape[-1], _BLOCK):
            target[..., start : start + _BLOCK] = flipped[..., start : start + _BLOCK]
        return
    target = dst.mem.array(dst.region, dst.dtype.host)
    line = where(ctx.run.kernel_site())
    rows = rows_of(src)
    require_inside(ctx, f"nisa.dma_transpose src at {line}", rows, oob_mode)
    columns = target.transpose(np.argsort(order))
    last = dst.ndim - 1
    for row, inside in enumerate(rows.inside):
        if inside:
            columns[row] = source_row(ctx, f"nisa.dma_transpose at {line}", rows, row)
            dst.mem.mark(dst.slice(last, row, row + 1).region)
