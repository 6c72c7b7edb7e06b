"""Tensor engine: nc_matmul, nc_transpose."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from nki.isa.enums import matmul_perf_mode

from nki_kernels.hardware.spec import Engine
from nki_kernels.machine import dtypes, work
from nki_kernels.machine.access_rules import TensorIndirection
from nki_kernels.machine.core import Run, float_values, write_values
from nki_kernels.machine.dtypes import Array
from nki_kernels.machine.errors import RuleViolation
from nki_kernels.machine.instruction import Context, instruction
from nki_kernels.machine.layout import is_int
from nki_kernels.machine.rules import (
    COMPUTE,
    AtMost,
    BufferIs,
    DtypeIn,
    Operands,
    Rule,
    memory,
)
from nki_kernels.machine.tensor import NkiTensor
from nki_kernels.machine.trace import where

_FP32 = (dtypes.float32, dtypes.tfloat32)
_INPUTS = (*dtypes.MATMUL_INPUTS, dtypes.float8_e4m3fn)


@dataclass(frozen=True)
class _Contraction(Rule):
    """Operand extents of C[M, N] = S[K, M].T @ M[K, N]; double row adds a leading free 2."""

    def problem(self, ops: Operands) -> str | None:
        dst, stationary, moving = ops["dst"], ops["stationary"], ops["moving"]
        double = work.mode_name(ops["perf_mode"]) == "double_row"
        given = (
            f"stationary {list(stationary.shape)}, moving {list(moving.shape)}, "
            f"dst {list(dst.shape)}"
        )
        if double and any(v.ndim < 3 or v.shape[1] != 2 for v in (stationary, moving)):
            return f"{given}: double_row operands are [K, 2, columns]; reshape them"
        if stationary.shape[0] != moving.shape[0]:
            return (
                f"{given}: the contraction (dimension 0) is {stationary.shape[0]} against "
                f"{moving.shape[0]}; both operands need the same number of partitions: slice or "
                "pad one"
            )
        per_row = 2 if double else 1
        m, n = stationary.free_size // per_row, moving.free_size // per_row
        if dst.shape[0] != m or dst.free_size != n:
            return (
                f"{given}: dst must be [{m}, {n}], stationary columns by moving columns; slice dst"
            )
        return None

    def __str__(self) -> str:
        return "`dst` [M, N] for `stationary` [K, M] and `moving` [K, N]"


def _is_pair(value: Any) -> bool:
    return isinstance(value, tuple) and len(value) == 2 and all(map(is_int, value))


@dataclass(frozen=True)
class _MatmulSizes(Rule):
    """Array limits: K <= 128, M <= 128, N <= 512 (gen4: the whole PSUM)."""

    def problem(self, ops: Operands) -> str | None:
        spec = ops.spec
        rows, columns = spec.partitions, spec.stationary_fmax
        if ops["tile_size"] and Tiling().problem(ops) is None:
            rows, columns = ops["tile_size"]
        double = 2 if work.mode_name(ops["perf_mode"]) == "double_row" else 1
        width = spec.moving_fmax
        if spec.generation >= 4:
            width = spec.psum_banks * spec.psum_bank_bytes // ops["dst"].dtype.itemsize
        k, m = ops["stationary"].shape[0], ops["stationary"].free_size // double
        n = ops["moving"].free_size // double
        for extent, limit, what in (
            (k, rows, "contraction rows (partitions)"),
            (m, columns, "stationary columns"),
            (n, width, "moving columns"),
        ):
            if extent > limit:
                return f"{extent} {what}; at most {limit} on {spec.name}: tile the matmul"
        return None

    def __str__(self) -> str:
        return "K and M within the array, N within `moving_fmax`"


@dataclass(frozen=True)
class _MatmulDtypes(Rule):
    """Which operand types may meet, and what PSUM holds."""

    def problem(self, ops: Operands) -> str | None:
        dst, a, b = ops["dst"].dtype, ops["stationary"].dtype, ops["moving"].dtype
        generation = ops.spec.generation
        if (a in _FP32) != (b in _FP32):
            return (
                f"stationary {a} with moving {b}; float32 and tfloat32 multiply only with each "
                "other: convert one operand"
            )
        if generation < 4 and dtypes.float8_e4m3fn in (a, b):
            return f"float8_e4m3fn on {ops.spec.name}; it needs gen4: use float8_e4m3"
        if {a, b} == {dtypes.float8_e4m3, dtypes.float8_e4m3fn}:
            return (
                "float8_e4m3 with float8_e4m3fn; the two formats cannot meet: convert one operand"
            )
        if ops["is_transpose"] and generation >= 3:
            return (
                None
                if dst == a
                else f"is_transpose writes {dst}; dst must have the data's type {a}"
            )
        allowed = (dtypes.float32,) if generation < 4 else (dtypes.float32, dtypes.bfloat16)
        if dst not in allowed:
            names = " or ".join(str(d) for d in allowed)
            return f"dst is {dst}; PSUM accumulates in {names} on {ops.spec.name}: allocate it so"
        return None

    def __str__(self) -> str:
        return "float32/tfloat32 only with each other; `dst` float32 (gen4 also bfloat16)"


@dataclass(frozen=True)
class _Modes(Rule):
    """What the flags may be, and which go together."""

    def problem(self, ops: Operands) -> str | None:
        mode, accumulate = ops["perf_mode"], ops["accumulate"]
        names = [m.value for m in matmul_perf_mode]
        if work.mode_name(mode) not in names:
            return f"perf_mode={mode!r}; it must be a member of nisa.matmul_perf_mode"
        if accumulate is not None and not isinstance(accumulate, (bool, np.bool_)):
            return f"accumulate={accumulate!r}; it must be True, False or None"
        if work.mode_name(mode) != "double_row":
            return None
        a, b, spec = ops["stationary"].dtype, ops["moving"].dtype, ops.spec
        if spec.generation < 3:
            return f"double_row on {spec.name}; it needs gen3: split the contraction in two"
        if not {a, b} <= set(dtypes.FP8):
            return f"double_row with {a} and {b}; it needs fp8 operands"
        if ops["is_transpose"]:
            return "double_row with is_transpose; they cannot be combined: drop double_row"
        size = ops["tile_size"]
        if _is_pair(size) and size[1] != spec.partitions:
            return (
                f"double_row with tile_size {size}; it allows no column tiles: use "
                f"{spec.partitions} columns"
            )
        return None

    def __str__(self) -> str:
        return "double_row from gen3, fp8, without column tiles and transposes"


@dataclass(frozen=True)
class _OneBank(Rule):
    """What the Tensor engine writes stays inside one PSUM bank before gen4."""

    check = "psum_bank"

    def problem(self, ops: Operands) -> str | None:
        dst = ops["dst"]
        by_array = ops.engine is Engine.tensor and memory(dst) == "psum"
        if ops.spec.generation >= 4 or not by_array:
            return None
        size, bank = dst.dtype.itemsize, ops.spec.psum_bank_bytes
        first = dst.offset * size % dst.mem.tile.row_bytes
        reach = sum((n - 1) * s for n, s in zip(dst.shape[1:], dst.strides[1:], strict=True))
        last = first + (reach + 1) * size - 1
        if first // bank == last // bank:
            return None
        return (
            f"dst covers bytes {first} to {last} of its partition, across PSUM banks of {bank} "
            "bytes; the Tensor engine writes one bank: align the tile and narrow it"
        )

    def __str__(self) -> str:
        return "`dst` inside one PSUM bank (gen2, gen3)"


@dataclass(frozen=True)
class Tiling(Rule):
    """Row and column tiles of the array: sizes 32 (gen3), 64, 128, positions multiples of them."""

    def problem(self, ops: Operands) -> str | None:
        """Return what is wrong, or None."""
        position, size = ops["tile_position"], ops["tile_size"]
        if not position and not size:
            return None
        if not position or not size:
            return "tile_position and tile_size go together; give both or neither"
        given = f"tile_position {position!r} with tile_size {size!r}"
        if not (_is_pair(position) and _is_pair(size)):
            return f"{given}; each is two ints, for rows and for columns"
        full, quadrant = ops.spec.partitions, ops.spec.quadrant
        allowed = (
            (2 * quadrant, full) if ops.spec.generation < 3 else (quadrant, 2 * quadrant, full)
        )
        if size[0] not in allowed or size[1] not in allowed:
            sides = ", ".join(map(str, allowed))
            return f"tile_size {size}; each side is one of {sides} on {ops.spec.name}"
        if position[0] % size[0] or position[1] % size[1]:
            return f"tile_position {position} is no multiple of tile_size {size}"
        last = (full - size[0], full - size[1])
        if not (0 <= position[0] <= last[0] and 0 <= position[1] <= last[1]):
            return (
                f"tile_position {position} with tile_size {size} is outside the array; rows start "
                f"at 0 to {last[0]}, columns at 0 to {last[1]}"
            )
        start = ops["dst"].start_partition
        if size[1] != full and start != position[1]:
            return (
                f"dst starts at partition {start} with start column {position[1]}; column tile c "
                "writes the partitions from c on: slice dst there"
            )
        return None

    def __str__(self) -> str:
        return "`tile_position` a multiple of `tile_size`; both or neither"


@dataclass(frozen=True)
class _IndirectMatmul(Rule):
    """Indirect operands: 1- and 2-byte floats, no tiles of the array, no identity."""

    def problem(self, ops: Operands) -> str | None:
        used = [n for n, v in ops.tensors() if v.dynamic and v.dynamic.kind == "indirect"]
        if not used:
            return None
        position = ops["tile_position"]
        if position and tuple(position) != (0, 0):
            return f"{used[0]} is an indirect view with tile_position {position}; it must be (0, 0)"
        if ops["is_transpose"] and "moving" in used:
            return "moving is an indirect view with is_transpose; pass the identity as it is"
        for name in used:
            kind = ops[name].dtype
            if name != "dst" and kind in _FP32:
                return f"{name} {kind} is an indirect view; it must be a float of 1 or 2 bytes"
        return None

    def __str__(self) -> str:
        return "indirect operands of 1 or 2 bytes, at tile position (0, 0)"


def _groups(run: Run, args: tuple[Any, ...]) -> bool | Array:
    """Return which elements of dst this matmul adds to."""
    dst, transposes, accumulate = args[0], args[5], args[6]
    if transposes:
        dst.mem.end_groups(dst.region)
        return False
    return started(run, "nc_matmul", dst, accumulate)


def started(run: Run, opcode: str, dst: NkiTensor, accumulate: bool | None) -> bool | Array:
    """Return which elements of dst a matmul adds to, and note that it wrote them.

    Raises:
        RuleViolation: accumulate=True on elements no matmul wrote, None where
            nothing can be inferred.
    """
    asked = None if accumulate is None else bool(accumulate)
    if dst.dynamic is not None:
        return bool(asked)  # the address has no value, so nothing is known of what is there
    if asked and run.spec.generation >= 4 and dst.mem.is_written(dst.region):
        # Only gen2 and gen3 forbid adding to what another instruction initialised.
        dst.mem.accumulates(dst.region, None, run.loop)
        return True
    mem, region = dst.mem, dst.region
    try:
        return mem.accumulates(region, asked, run.loop)
    except RuleViolation as problem:
        line = where(run.kernel_site())
        error = RuleViolation(f"nisa.{opcode} at {line}: {problem} [nki.isa.{opcode}]")
    run.report(run.options.accumulation, error)
    # Below level "error" the matmul adds to whatever was written, and overwrites the rest.
    inferred = mem.accumulates(region, None)
    return mem.written_mask(region) if asked else inferred


def form(dst: NkiTensor, weights: Array, data: Array, adds: bool | Array) -> None:
    """dst (+)= weights.T @ data for float32 [K, M] and [K, N]; `adds` as `started` returned it."""
    if isinstance(adds, bool) and dst.dtype is dtypes.float32 and dst.ndim == 2:
        dst.mem.multiply(dst.region, weights, data, adds)
        return
    target = dst.mem.array(dst.region, dst.dtype.host)
    shaped = (weights.T @ data).reshape(target.shape)
    if adds is False:
        dtypes.store(target, shaped)
    else:
        dtypes.store(target, np.where(adds, target.astype(np.float32) + shaped, shaped))


@instruction(
    engines=(Engine.tensor,),
    reads=("stationary", "moving"),
    writes=("dst",),
    rules=(
        *COMPUTE,
        TensorIndirection("dst", "stationary", "moving"),
        BufferIs("dst", "psum", remedy="allocate it with buffer=nl.psum"),
        BufferIs("stationary", "sbuf", remedy="copy it to SBUF with tensor_copy"),
        BufferIs("moving", "sbuf", remedy="copy it to SBUF with tensor_copy"),
        DtypeIn("stationary", _INPUTS),
        DtypeIn("moving", _INPUTS),
        _Modes(),
        _MatmulDtypes(),
        _Contraction(),
        _MatmulSizes(),
        _OneBank(),
        Tiling(),
        _IndirectMatmul(),
    ),
    cost=work.matmul,
    hidden=lambda ops: ((), ("pe_stationary",)),
    state=_groups,
    lists=("tile_position", "tile_size"),
    source="nki.isa.nc_matmul; cost: 1 moving row per cycle, fp32 4 (NKI 2.26 cost formulas)",
)
def nc_matmul(
    ctx: Context,
    dst: NkiTensor,
    stationary: NkiTensor,
    moving: NkiTensor,
    is_stationary_onezero: bool = False,
    is_moving_onezero: bool = False,
    is_transpose: bool = False,
    accumulate: bool | None = None,
    tile_position: tuple[int, ...] = (),
    tile_size: tuple[int, ...] = (),
    perf_mode: matmul_perf_mode = matmul_perf_mode.none,
    name: str | None = None,
) -> None:
    """dst[m, n] (+)= sum_k stationary[k, m] * moving[k, n], products and sums in float32.

    ``accumulate``: False overwrites, True adds to what an earlier matmul wrote, None overwrites
    what no matmul of this tile has written and adds to the rest. double_row: operands
    [K, 2, columns], both planes contracted. is_transpose: dst = stationary.T bit for bit, moving
    is an identity. The order of the sum over k is unspecified on the device; here it is the host
    BLAS's.
    """
    if is_transpose:
        _transpose_by_identity(ctx, dst, stationary, moving)
        return
    rows = stationary.shape[0]
    if work.mode_name(perf_mode) == "double_row":
        rows *= 2
    weights = stationary.mem.snapshot(stationary.region, rows, stationary.dtype)
    data = moving.mem.snapshot(moving.region, rows, moving.dtype)
    form(dst, weights, data, ctx.state)


def _transpose_by_identity(
    ctx: Context, dst: NkiTensor, stationary: NkiTensor, moving: NkiTensor
) -> None:
    eye = float_values(moving, ctx.run, "moving").reshape(moving.shape[0], -1)
    if eye.shape[0] != eye.shape[1] or not np.array_equal(eye, np.eye(eye.shape[0])):
        raise RuleViolation(
            f"nisa.nc_matmul at {where(ctx.run.kernel_site())}: is_transpose with a moving operand "
            f"{list(moving.shape)} that is no identity; pass an identity matrix of the data's type "
            "as moving, the data as stationary"
        )
    values = stationary.mem.array(stationary.region, stationary.dtype.host)
    flipped = values.reshape(values.shape[0], -1).T
    target = dst.mem.array(dst.region, dst.dtype.host)
    np.copyto(target, flipped.reshape(target.shape), casting="unsafe")


def _transpose_engine(ops: Operands) -> Engine:
    """Chosen from where the result goes (0.4.0 release notes): PSUM Tensor, SBUF Vector."""
    return Engine.tensor if memory(ops["dst"]) == "psum" else Engine.vector


@dataclass(frozen=True)
class _Flipped(Rule):
    """dst [F, P] for data [P, F]; at most 128 x 128 on Tensor, one quadrant square on Vector."""

    def problem(self, ops: Operands) -> str | None:
        dst, data = ops["dst"], ops["data"]
        p, f = data.shape[0], data.free_size
        if (dst.shape[0], dst.free_size) != (f, p):
            return f"data {list(data.shape)} into dst {list(dst.shape)}; dst must be [{f}, {p}]"
        tensor = ops.engine is Engine.tensor
        limit = ops.spec.stationary_fmax if tensor else ops.spec.quadrant
        if max(p, f) > limit:
            return (
                f"data {list(data.shape)} on the {ops.engine.name} engine; at most [{limit}, "
                f"{limit}]: tile it"
            )
        return None

    def __str__(self) -> str:
        return "`dst` [F, P] for `data` [P, F]"


@dataclass(frozen=True)
class _TransposeOperands(Rule):
    """Tensor: SBUF to PSUM. Result type: the data's; gen2 writes 16-bit data as float32."""

    def problem(self, ops: Operands) -> str | None:
        dst, data = ops["dst"], ops["data"]
        if ops.engine is Engine.tensor and (memory(dst), memory(data)) != ("psum", "sbuf"):
            return (
                f"data in {memory(data).upper()} to dst in {memory(dst).upper()} on the tensor "
                "engine; it reads SBUF and writes PSUM: copy the data, or use "
                "engine=nisa.engine.vector"
            )
        wanted = data.dtype
        if ops.spec.generation == 2 and ops.engine is Engine.tensor and data.dtype.itemsize == 2:
            wanted = dtypes.float32
        if dst.dtype != wanted:
            return (
                f"data {data.dtype} into dst {dst.dtype}; dst must be {wanted} on {ops.spec.name}"
            )
        narrow = ops.engine is Engine.tensor and data.dtype.itemsize == 1
        # One column has no step.
        if narrow and dst.shape[-1] > 1 and work.inner_step(dst) != 2:
            return (
                f"1-byte {data.dtype} with a dst step of {work.inner_step(dst)} bytes; each result "
                "takes 16 bits in PSUM: give dst an extra innermost dimension of 2 and pass [..., "
                "0]"
            )
        return None

    def __str__(self) -> str:
        return "Tensor: SBUF to PSUM; equal dtypes (gen2: 16-bit data becomes float32)"


@instruction(
    engines=(Engine.tensor, Engine.vector),
    default=_transpose_engine,
    reads=("data",),
    writes=("dst",),
    rules=(
        *COMPUTE,
        BufferIs("dst", "psum", "sbuf"),
        BufferIs("data", "sbuf", "psum"),
        AtMost("data", partitions="partitions"),
        _TransposeOperands(),
        _Flipped(),
        _OneBank(),
    ),
    cost=work.transpose,
    source="nki.isa.nc_transpose; cost: max(P, min(64, F)) on Tensor, max(64, N) on Vector (2.26)",
)
def nc_transpose(
    ctx: Context,
    dst: NkiTensor,
    data: NkiTensor,
    engine: Engine = Engine.unknown,
    name: str | None = None,
) -> None:
    """dst[f, p] = data[p, f], bit for bit (gen3 and later); always overwrites.

    1-byte types on the Tensor engine fill 16 bits each: the odd bytes of dst become 0.
    """
    values = data.mem.array(data.region, data.dtype.host)
    flipped = values.reshape(values.shape[0], -1).T
    target = dst.mem.array(dst.region, dst.dtype.host)
    if dst.dtype == data.dtype:
        np.copyto(target, flipped.reshape(target.shape))
    else:
        write_values(dst, flipped.astype(np.float32))
    if ctx.engine is Engine.tensor and data.dtype.itemsize == 1:
        odd = (dst.offset + 1, dst.shape, dst.strides, 1)
        dst.mem.array(odd, dst.dtype.host)[...] = 0
        dst.mem.mark(odd)
