"""Searching the elements of a partition, eight at a time: max8, nc_find_index8, nc_match_replace8.

Comparisons are of float32 values. NaN equals nothing, and max8 ranks it above every number: the
documents say nothing about it.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from nki.isa.alu import is_number, rounded

from nki_kernels.hardware.spec import Engine
from nki_kernels.machine import dtypes, work
from nki_kernels.machine.core import float_values, write_values
from nki_kernels.machine.dtypes import Array
from nki_kernels.machine.instruction import Context, instruction
from nki_kernels.machine.rules import COMPUTE, BufferIs, DtypeIn, Operands, Rule, SameExtent
from nki_kernels.machine.tensor import NkiTensor

_ON_CHIP = ("sbuf", "psum")
#: Values one instruction handles, and the longest row it searches (nki.isa docstrings).
WIDTH = 8
LONGEST = 16384


@dataclass(frozen=True)
class _Searched(Rule):
    """Rank and length of the tile that is searched."""

    operand: str
    rank: int
    least: int = WIDTH

    def problem(self, ops: Operands) -> str | None:
        view = ops[self.operand]
        if not self.least <= view.free_size <= LONGEST:
            return (
                f"{self.operand} {list(view.shape)} has {view.free_size} elements per partition; "
                f"allowed are {self.least} to {LONGEST}: tile or pad it"
            )
        if view.ndim > self.rank:
            return (
                f"{self.operand} {list(view.shape)} has {view.ndim} dimensions; at most "
                f"{self.rank}: flatten the free ones"
            )
        return None

    def __str__(self) -> str:
        return f"`{self.operand}` of {self.least} to {LONGEST} elements, at most {self.rank}-D"


@dataclass(frozen=True)
class _Eight(Rule):
    """The operand has the partitions of `like` and eight elements in each."""

    operand: str
    like: str
    rank: int

    def problem(self, ops: Operands) -> str | None:
        view, like = ops.tensor(self.operand), ops[self.like]
        if view is None:
            return None
        right = (view.shape[0], view.free_size) == (like.shape[0], WIDTH)
        if right and view.ndim <= self.rank:
            return None
        return (
            f"{self.operand} {list(view.shape)} for {self.like} {list(like.shape)}; it must hold "
            f"[{like.shape[0]}, {WIDTH}] elements in at most {self.rank} dimensions: slice it"
        )

    def __str__(self) -> str:
        return f"`{self.operand}` [P, {WIDTH}]"


@instruction(
    engines=(Engine.vector,),
    reads=("src",),
    writes=("dst",),
    rules=(*COMPUTE, BufferIs("dst", *_ON_CHIP), _Searched("src", 3), _Eight("dst", "src", 2)),
    cost=work.stream("max8", data=("src",), n_of="src"),
    source="nki.isa.max8; cost: N cycles (NKI 2.26)",
)
def max8(
    ctx: Context,
    dst: NkiTensor,
    src: NkiTensor,
    name: str | None = None,
) -> None:
    """dst[p] = the 8 largest elements of src[p], largest first, equal ones repeated."""
    rows = float_values(src, ctx.run, "a").reshape(src.shape[0], -1)
    cut = rows.shape[1] - WIDTH
    top = np.sort(np.partition(rows, cut, axis=1)[:, cut:], axis=1)
    write_values(dst, top[:, ::-1])


def _positions(rows: Array, vals: Array, backwards: bool) -> tuple[Array, Array]:
    """Return where each value stands in its row, and whether it does.

    Columns take their turn from 0 to 7, or backwards: each occurrence of a repeated value goes to
    one column.
    """
    equal = vals[:, :, None] == vals[:, None, :]
    # Occurrences that the columns before took: [p, k] counts equal values of earlier columns.
    taken = (np.triu(equal, 1) if backwards else np.tril(equal, -1)).sum(axis=2)
    hits = rows[:, None, :] == vals[:, :, None]
    tied = taken.any(axis=1)
    if tied.any():
        order = np.cumsum(hits[tied], axis=2, dtype=np.uint16)
        hits[tied] &= order > taken[tied][:, :, None]
    return hits.argmax(axis=2), hits.any(axis=2)


def _store_indices(dst: NkiTensor, at: Array, found: Array) -> None:
    target = dst.mem.array(dst.region, dst.dtype.host)
    missing = np.iinfo(dst.dtype.host).max  # all ones
    dtypes.store(target, np.where(found, at, missing).reshape(target.shape))


_INDEX_TYPES = (dtypes.uint16, dtypes.uint32)


@instruction(
    engines=(Engine.vector,),
    reads=("data", "vals"),
    writes=("dst",),
    rules=(
        *COMPUTE,
        BufferIs("dst", *_ON_CHIP),
        _Searched("data", 3),
        _Eight("vals", "data", 3),
        _Eight("dst", "data", 2),
        DtypeIn("dst", _INDEX_TYPES),
    ),
    cost=work.stream("nc_find_index8", data=("data",), n_of="data"),
    source="nki.isa.nc_find_index8; cost: N cycles (NKI 2.26)",
)
def nc_find_index8(
    ctx: Context,
    dst: NkiTensor,
    data: NkiTensor,
    vals: NkiTensor,
    name: str | None = None,
) -> None:
    """dst[p, k] = position of vals[p, k] in the flattened data[p]; all ones where it is not there.

    Columns take their turn from 0 to 7: of a repeated value the j-th column gets the j-th
    occurrence, and all ones when the occurrences are used up.
    """
    run = ctx.run
    rows = float_values(data, run, "a").reshape(data.shape[0], -1)
    wanted = float_values(vals, run, "b").reshape(vals.shape[0], -1)
    _store_indices(dst, *_positions(rows, wanted, backwards=False))


@dataclass(frozen=True)
class _Replacement(Rule):
    """imm is a number, dst_idx a tile or absent."""

    def problem(self, ops: Operands) -> str | None:
        if not is_number(ops["imm"]):
            return f"imm={ops['imm']!r}; it must be a number (float32)"
        if ops["dst_idx"] is not None and ops.tensor("dst_idx") is None:
            return f"dst_idx={ops['dst_idx']!r}; it must be None or a uint16 or uint32 [P, 8] tile"
        return None

    def __str__(self) -> str:
        return "`imm` a number"


@instruction(
    engines=(Engine.vector,),
    reads=("data", "vals"),
    writes=("dst", "dst_idx"),
    rules=(
        *COMPUTE,
        BufferIs("dst", *_ON_CHIP),
        SameExtent("dst", "data"),
        _Searched("data", 5, least=1),
        _Eight("vals", "data", 3),
        _Eight("dst_idx", "data", 3),
        DtypeIn("dst_idx", _INDEX_TYPES),
        _Replacement(),
    ),
    cost=work.stream("nc_match_replace8", data=("data",), n_of="data"),
    source="nki.isa.nc_match_replace8; cost: N cycles (documented min(64, N), read as a slip)",
)
def nc_match_replace8(
    ctx: Context,
    dst: NkiTensor,
    data: NkiTensor,
    vals: NkiTensor,
    imm: float,
    dst_idx: NkiTensor | None = None,
    name: str | None = None,
) -> None:
    """dst = data with one occurrence of each vals[p, k] replaced by imm; dst_idx[p, k] = where.

    Columns take their turn from 7 to 0: of a repeated value the highest column gets the first
    occurrence. A value that is not there replaces nothing and its index is all ones (the documents
    call that undefined). dst may be data.
    """
    run = ctx.run
    rows = float_values(data, run, "a").reshape(data.shape[0], -1)
    wanted = float_values(vals, run, "b").reshape(vals.shape[0], -1)
    at, found = _positions(rows, wanted, backwards=True)
    lines, columns = np.nonzero(found)
    target = dst.mem.array(dst.region, dst.dtype.host)
    result: Array
    if data.dtype is dst.dtype:
        result = data.mem.array(data.region, data.dtype.host).reshape(rows.shape).copy()
    else:
        result = np.empty(rows.shape, target.dtype)
        dtypes.store(result, rows)
    result[lines, at[lines, columns]] = rounded(float(imm), target.dtype)
    np.copyto(target, result.reshape(target.shape))
    if dst_idx is not None:
        _store_indices(dst_idx, at, found)
