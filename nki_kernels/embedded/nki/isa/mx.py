"""Microscaling (gen4): quantize_mx, nc_matmul_mx.

An x4 element packs four values along the contraction, the first in its lowest bits. A block of 32
values, 8 partitions by one x4 element, shares a scale of 2**(byte - 127). The scales of the
partitions of a quadrant lie in the first 4 partitions of that quadrant of the scale tile, counted
from the start of its view. Sources: OCP Microscaling Formats 1.0; nki mxfp-matmul deep dive.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import ml_dtypes
import numpy as np
from nki.isa.matmul import Tiling, form, started

from nki_kernels.hardware.spec import Engine
from nki_kernels.machine import dtypes, work
from nki_kernels.machine.access_rules import PartlyRead, TensorIndirection
from nki_kernels.machine.core import Run, float_values
from nki_kernels.machine.dtypes import Array, DType
from nki_kernels.machine.instruction import Context, instruction
from nki_kernels.machine.rules import (
    BufferIs,
    DtypeIn,
    OnChipOperands,
    Operands,
    Rule,
    StartPartition,
)
from nki_kernels.machine.tensor import NkiTensor
from nki_kernels.machine.trace import PeWork

#: A block is so many partitions by so many values of one partition (nki.isa.quantize_mx).
BLOCK_PARTITIONS = 8
PACKED = 4
_BIAS = 127
_NAN_SCALE = 255
_X4 = (dtypes.float8_e5m2_x4, dtypes.float8_e4m3fn_x4, dtypes.float4_e2m1fn_x4)
_SCALES = (dtypes.float8_e8m0fnu, dtypes.uint8)
#: Value type of a packed type, and the largest unbiased exponent of it (OCP MX, table 1).
_FP8 = {dtypes.float8_e5m2_x4: (ml_dtypes.float8_e5m2, 15),
        dtypes.float8_e4m3fn_x4: (ml_dtypes.float8_e4m3fn, 8)}  # fmt: skip
_FP4 = np.arange(16, dtype=np.uint8).view(ml_dtypes.float4_e2m1fn).astype(np.float32)
#: Where a packed scale tensor may begin in a quadrant.
_SCALE_STARTS = (0, 4, 8, 12)


def scale_rows(partitions: int, quadrant: int) -> list[int]:
    """Return the partition of the scale view that holds each block row of `partitions`."""
    return [
        start + row
        for start in range(0, partitions, quadrant)
        for row in range(quadrant // BLOCK_PARTITIONS)
    ]


@dataclass(frozen=True)
class _MxStart(StartPartition):
    """Start partitions of all but the scales, which may be packed at 4, 8 or 12 of a quadrant."""

    scales: tuple[str, ...]

    def problem(self, ops: Operands) -> str | None:
        """Return what is wrong, or None."""
        others = [n for n in ops.values if n not in self.scales]
        held = Operands(ops.opcode, tuple(others), tuple(ops[n] for n in others), ops.spec)
        found = super().problem(held)
        if found is not None:
            return found
        for name in self.scales:
            view = ops[name]
            fixed = view.mem.tile.address
            start = view.start_partition + (fixed[0] if fixed else 0)
            if start % ops.spec.quadrant not in _SCALE_STARTS:
                return (
                    f"{name} starts at partition {start}; scales start at 0, 4, 8 or 12 of a "
                    f"quadrant of {ops.spec.quadrant}: slice the scale tile there"
                )
        return None

    def __str__(self) -> str:
        return "scales start at partition 0, 4, 8 or 12 of a quadrant"


def _scale_problem(ops: Operands, name: str, data: NkiTensor, columns: int) -> str | None:
    """Return what is wrong with a scale view for data partitions and x4 columns."""
    view = ops[name]
    needed = scale_rows(data.shape[0], ops.spec.quadrant)[-1] + 1
    if view.shape[0] >= needed and view.free_size == columns:
        return None
    return (
        f"{name} {list(view.shape)}; for {data.shape[0]} partitions of {columns} blocks it must "
        f"hold [at least {needed}, {columns}]: slice the scale tile so"
    )


@dataclass(frozen=True)
class _Quantize(Rule):
    """From gen4; whole quadrants, whole blocks, dst a quarter of src, scales of every block."""

    def since(self) -> int:
        """Return the first generation that has it."""
        return 4

    def problem(self, ops: Operands) -> str | None:
        """Return what is wrong, or None."""
        dst, src = ops["dst"], ops["src"]
        if ops.spec.generation < self.since():
            return f"quantize_mx on {ops.spec.name}; it needs gen4: scale to fp8 with tensor_scalar"
        if src.shape[0] % ops.spec.quadrant or src.free_size % PACKED:
            return (
                f"src {list(src.shape)}; partitions come in multiples of {ops.spec.quadrant}, "
                f"elements per partition in multiples of {PACKED}: pad it"
            )
        columns = src.free_size // PACKED
        if (dst.shape[0], dst.free_size) != (src.shape[0], columns):
            return (
                f"dst {list(dst.shape)} for src {list(src.shape)}; it must hold [{src.shape[0]}, "
                f"{columns}] x4 elements: allocate it so"
            )
        return _scale_problem(ops, "dst_scale", src, columns)

    def __str__(self) -> str:
        return "gen4; P a multiple of 32, N of 4; `dst` [P, N/4], `dst_scale` [rows, N/4]"


@instruction(
    engines=(Engine.vector,),
    reads=("src",),
    writes=("dst", "dst_scale"),
    updates=("dst_scale",),
    rules=(
        OnChipOperands(),
        BufferIs("src", "sbuf"),
        BufferIs("dst", "sbuf"),
        BufferIs("dst_scale", "sbuf"),
        DtypeIn("src", (dtypes.float16, dtypes.bfloat16)),
        DtypeIn("dst", tuple(_FP8)),
        DtypeIn("dst_scale", _SCALES),
        _Quantize(),
        _MxStart(("dst_scale",)),
    ),
    cost=work.stream("quantize_mx", data=("src",)),
    source="nki.isa.quantize_mx; cost: N / 4 cycles (trn3 guide: four elements a cycle)",
)
def quantize_mx(
    ctx: Context,
    dst: NkiTensor,
    src: NkiTensor,
    dst_scale: NkiTensor,
    name: str | None = None,
) -> None:
    """dst = src / X, rounded once; dst_scale = X = 2**(floor(log2(max |src|)) - (Emax - 1)).

    One X for each block of 8 partitions by 4 elements; Emax is 8 (e4m3fn) or 15 (e5m2). X is kept
    within 2**-127, which is also that of a block of zeros, and 2**127. A block with an infinity or
    NaN gets the scale NaN and elements NaN (undocumented). Rows of dst_scale without a block keep
    what they hold.
    """
    values = float_values(src, ctx.run, "a").reshape(src.shape[0] // BLOCK_PARTITIONS,
                                                     BLOCK_PARTITIONS, -1, PACKED)  # fmt: skip
    host, emax = _FP8[dst.dtype]
    most = np.abs(values).max(axis=(1, 3))
    # The exponent field of a float32 is floor(log2) + bias; a subnormal maximum clamps to 0.
    field = (most.view(np.uint32) >> np.uint32(23)).astype(np.int32)
    stored = np.where(np.isfinite(most), np.maximum(field - (emax - 1), 0), _NAN_SCALE)
    scaled = np.ldexp(values, (_BIAS - stored)[:, None, :, None])
    scaled[np.broadcast_to((stored == _NAN_SCALE)[:, None, :, None], scaled.shape)] = np.nan
    quantized = scaled.astype(host).reshape(src.shape[0], -1)
    np.copyto(dst.mem.bits(dst.region), quantized.view(np.uint32).reshape(dst.shape))
    rows = scale_rows(src.shape[0], ctx.run.spec.quadrant)
    target = dst_scale.mem.bits(dst_scale.region)
    target[rows] = stored.reshape(len(rows), *target.shape[1:])
    if not dst_scale.mem.full:
        chosen = np.zeros(dst_scale.shape, np.bool_)
        chosen[rows] = True
        dst_scale.mem.mark_where(dst_scale.region, chosen)


@dataclass(frozen=True)
class _MxMatmul(Rule):
    """From gen4; whole quadrants of K, even M, N within PSUM, scales of every block."""

    def since(self) -> int:
        """Return the first generation that has it."""
        return 4

    def problem(self, ops: Operands) -> str | None:
        """Return what is wrong, or None."""
        dst, stationary, moving, spec = ops["dst"], ops["stationary"], ops["moving"], ops.spec
        if spec.generation < self.since():
            return f"nc_matmul_mx on {spec.name}; it needs gen4: use nc_matmul with fp8 or bfloat16"
        k, m, n = stationary.shape[0], stationary.free_size, moving.free_size
        given = f"stationary {list(stationary.shape)}, moving {list(moving.shape)}"
        if moving.shape[0] != k or k % spec.quadrant:
            return (
                f"{given}: both have equally many partitions, a multiple of {spec.quadrant}: pad "
                "them"
            )
        rows = ops["tile_size"][0] if ops["tile_size"] else spec.partitions
        width = spec.psum_banks * spec.psum_bank_bytes // dst.dtype.itemsize
        if k > rows or m > spec.stationary_fmax or m % 2 or n > width:
            return (
                f"{given}: at most {rows} partitions, an even number of at most "
                f"{spec.stationary_fmax} stationary columns and {width} moving columns: tile it"
            )
        if (dst.shape[0], dst.free_size) != (m, n):
            return f"{given}, dst {list(dst.shape)}: dst must be [{m}, {n}]; slice dst"
        return _scale_problem(ops, "stationary_scale", stationary, m) or _scale_problem(
            ops, "moving_scale", moving, n
        )

    def __str__(self) -> str:
        return "gen4; K a multiple of 32, M even, `dst` [M, N], scales of every block"


_OPERANDS = ("stationary", "moving", "stationary_scale", "moving_scale")


@dataclass(frozen=True)
class _IndirectPairs(Rule):
    """Data and scales are indirect together, by one index; no tiles of the array."""

    def problem(self, ops: Operands) -> str | None:
        """Return what is wrong, or None."""
        indices = {
            n: v.dynamic.index
            for n, v in ops.tensors()
            if v.dynamic is not None and v.dynamic.kind == "indirect"
        }
        position = ops["tile_position"]
        if indices and position and tuple(position) != (0, 0):
            return f"an indirect view with tile_position {position}; it must be (0, 0)"
        for data in _OPERANDS[:2]:
            one, other = indices.get(data), indices.get(f"{data}_scale")
            # A verdict is remembered by signature: another tile like the index is not told apart.
            same = (one is None) == (other is None)
            if one is not None and other is not None:
                same = one.signature == other.signature
            if not same:
                return (
                    f"{data} and {data}_scale are one tensor; both are indirect by the same index, "
                    "or neither: take .indirect(index) of both"
                )
        return None

    def __str__(self) -> str:
        return "data and scales indirect by the same index, or neither"


@dataclass(frozen=True)
class _RowTiling(Tiling):
    """Row tiles of the array only."""

    def problem(self, ops: Operands) -> str | None:
        """Return what is wrong, or None."""
        found = super().problem(ops)
        if found is not None:
            return found
        size, full = ops["tile_size"], ops.spec.partitions
        if size and size[1] != full:
            return f"tile_size {size}; nc_matmul_mx tiles rows only: use {full} columns"
        accumulate = ops["accumulate"]
        if accumulate is not None and not isinstance(accumulate, (bool, np.bool_)):
            return f"accumulate={accumulate!r}; it must be True, False or None"
        return None

    def __str__(self) -> str:
        return "row tiles only"


def _cost(ops: Operands) -> PeWork:
    """One pass, as a matmul of 2-byte types, with four values in each array row."""
    stationary, moving = ops["stationary"], ops["moving"]
    position, size = ops["tile_position"], ops["tile_size"]
    return PeWork(
        inferred=ops["accumulate"] is None,
        k=moving.shape[0],
        m=stationary.free_size,
        n=moving.free_size,
        dtype=str(max(stationary.dtype, moving.dtype, key=lambda d: d.itemsize)),
        mode="matmul",
        stationary_step_bytes=work.inner_step(stationary),
        moving_step_bytes=work.inner_step(moving),
        row_start=position[0] if position else 0,
        tile_rows=size[0] if size else 0,
        tile_cols=size[1] if size else 0,
    )


def _adds(run: Run, args: tuple[Any, ...]) -> bool | Array:
    return started(run, "nc_matmul_mx", args[0], args[7])


def _read(name: str, args: tuple[Any, ...]) -> list[NkiTensor] | None:
    """Return the rows of a scale tile that hold scales; the others are never read."""
    if not name.endswith("_scale"):
        return None
    data, scale = (args[1], args[3]) if name == "stationary_scale" else (args[2], args[4])
    per = BLOCK_PARTITIONS * PACKED
    return [scale[at : at + PACKED] for at in range(0, data.shape[0], per)]


@instruction(
    engines=(Engine.tensor,),
    reads=_OPERANDS,
    writes=("dst",),
    rules=(
        OnChipOperands(),
        TensorIndirection("dst", *_OPERANDS),
        _IndirectPairs(),
        BufferIs("dst", "psum"),
        BufferIs("stationary", "sbuf"),
        BufferIs("moving", "sbuf"),
        BufferIs("stationary_scale", "sbuf"),
        BufferIs("moving_scale", "sbuf"),
        DtypeIn("stationary", _X4),
        DtypeIn("moving", _X4),
        DtypeIn("stationary_scale", _SCALES),
        DtypeIn("moving_scale", _SCALES),
        DtypeIn("dst", (dtypes.float32, dtypes.bfloat16)),
        _RowTiling(),
        _MxMatmul(),
        _MxStart(("stationary_scale", "moving_scale")),
        PartlyRead(_read),
    ),
    cost=_cost,
    hidden=lambda ops: ((), ("pe_stationary",)),
    state=_adds,
    lists=("tile_position", "tile_size"),
    source="nki.isa.nc_matmul_mx; cost: one moving row per cycle (trn3 guide: 4 times bfloat16)",
)
def nc_matmul_mx(
    ctx: Context,
    dst: NkiTensor,
    stationary: NkiTensor,
    moving: NkiTensor,
    stationary_scale: NkiTensor,
    moving_scale: NkiTensor,
    tile_position: Any = None,
    tile_size: Any = None,
    accumulate: bool | None = None,
    name: str | None = None,
) -> None:
    """dst[m, n] (+)= sum_k sum_q (S[k, m, q] X[k, m]) * (M[k, n, q] Y[k, n]), q = 0 ... 3.

    S and M are the values of the x4 elements, X and Y the scales of their blocks; both operands are
    scaled to float32 first, products and sums are float32. `accumulate` as for nc_matmul. A scale
    byte of 255 is NaN.
    """
    quadrant = ctx.run.spec.quadrant
    weights = _dequantized(stationary, stationary_scale, quadrant)
    data = _dequantized(moving, moving_scale, quadrant)
    form(dst, weights, data, ctx.state)


def _dequantized(view: NkiTensor, scale: NkiTensor, quadrant: int) -> Array:
    """Return float32 [4 K, columns], the values of an x4 tile times their scales."""
    rows = view.shape[0]
    values = _unpacked(view.mem.bits(view.region).reshape(rows, -1), view.dtype)
    stored = scale.mem.bits(scale.region).reshape(scale.shape[0], -1)
    stored = stored[scale_rows(rows, quadrant)].astype(np.int32)
    factors = np.ldexp(np.float32(1), stored - _BIAS)
    factors[stored == _NAN_SCALE] = np.nan
    values *= np.repeat(factors, BLOCK_PARTITIONS, axis=0)[:, :, None]
    result: Array = values.transpose(0, 2, 1).reshape(rows * PACKED, -1)
    return result


def _unpacked(packed: Array, kind: DType) -> Array:
    """Return float32 [rows, columns, 4], the values of x4 elements."""
    if kind in _FP8:
        flat: Array = np.ascontiguousarray(packed).view(_FP8[kind][0]).astype(np.float32)
        return flat.reshape(*packed.shape, PACKED)
    shifts = np.arange(0, 4 * PACKED, 4, dtype=np.uint16)
    result: Array = _FP4[(packed[:, :, None] >> shifts) & np.uint16(15)]
    return result
