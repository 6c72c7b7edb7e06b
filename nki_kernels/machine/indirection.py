"""Run-time addresses of operands: scalar offsets, and columns by offsets (gen4).

An instruction sees an indirect operand as a tile of its own, made of the columns when the offsets
are known and put back when it was written; no body knows about it. Source: nki.language
NkiTensor.indirect, "Tensor indirection" of each nki.isa instruction, trainium3 guide.
"""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any

import numpy as np

from nki_kernels.hardware.spec import CoreSpec, Engine
from nki_kernels.machine.dtypes import Array
from nki_kernels.machine.errors import OutOfBounds
from nki_kernels.machine.memory import uninitialized
from nki_kernels.machine.tensor import NkiTensor, read_index
from nki_kernels.machine.trace import Access, where

if TYPE_CHECKING:
    from nki_kernels.machine.core import Run
    from nki_kernels.machine.instruction import Plan


def group_size(engine: Engine, spec: CoreSpec) -> int:
    """Return the partitions that share a list of offsets."""
    return spec.quadrant if engine is Engine.tensor else spec.gpsimd.core_partitions


def row_starts(view: NkiTensor) -> list[int]:
    """Return the element at which each row of dimension 0 starts, run-time addresses resolved."""
    count, stride = view.shape[0], view.strides[0]
    dynamic = view.dynamic
    if dynamic is None:
        return [view.offset + i * stride for i in range(count)]
    if dynamic.kind == "scalar":
        base = view.offset + read_index(dynamic.index) * dynamic.scale
        return [base + i * stride for i in range(count)]
    flat = dynamic.index.numpy().T.reshape(-1)[:count]
    return [view.offset + int(i) * dynamic.scale for i in flat]


def row_accesses(view: NkiTensor) -> tuple[Access, ...] | None:
    """Return what the rows of a view in HBM with a run-time address touch; None if unknown.

    Rows that leave the tensor are left out, as a DMA that skips them leaves them out.
    """
    if view.dynamic is not None:
        index = view.dynamic.index
        if index.mem.abstract if isinstance(index, NkiTensor) else index.abstract:
            return None
    shape, strides, size = view.shape[1:], view.strides[1:], view.dtype.itemsize
    reach = sum((n - 1) * s for n, s in zip(shape, strides, strict=True))
    limit = view.mem.nbytes // size - reach
    return tuple(
        [
            Access(view.mem.tile, start, shape, strides, size)
            for start in row_starts(view)
            if 0 <= start < limit
        ]
    )


class Columns(NkiTensor):
    """A tile of the chosen columns of `base`: column i of partition p is ``base[p, at[p, i]]``."""

    __slots__ = ("at", "base")

    at: Array
    base: NkiTensor


def resolve(
    run: Run, plan: Plan, args: tuple[Any, ...]
) -> tuple[tuple[Any, ...], tuple[Access, ...], bool]:
    """Replace what run-time values decide by what it is now; list the index tensors as reads.

    The third result is True when an index has no value: addresses are unknown, values too.

    Raises:
        UninitializedRead: an index that nothing wrote.
    """
    resolved = list(args)
    indices: list[Access] = []
    unknown = False
    for place in plan.tensors:
        view = args[place]
        dynamic = view.dynamic
        if dynamic is None:
            continue
        index = dynamic.index
        if isinstance(index, NkiTensor):
            if not index.mem.is_written(index.region):
                site = where(run.kernel_site())
                what = f"the index of {plan.names[place]}"
                raise uninitialized(plan.opcode, what, index, site)
            indices.append(index.access)
            unknown |= index.mem.abstract
        else:
            unknown |= index.abstract
        if unknown or plan.handles_dynamic:
            continue
        if dynamic.kind == "scalar":
            what = f"{plan.opcode} {plan.names[place]} at {where(run.kernel_site())}"
            static = view.resolved(what)
            static._access = view.access
            resolved[place] = static
        elif dynamic.kind == "indirect":
            resolved[place] = operand(run, plan, place, view)
    return tuple(resolved), tuple(indices), unknown


def operand(run: Run, plan: Plan, place: int, view: NkiTensor) -> Columns:
    """Return the columns of an indirect operand, for an instruction that may be asked to write it.

    Raises:
        OutOfBounds: an offset outside the free dimensions.
    """
    dynamic = view.dynamic
    if dynamic is None or dynamic.base is None:
        raise TypeError(f"{view!r} is no indirect view")
    base: NkiTensor = dynamic.base
    at = _offsets(run, plan, place, view)
    tile = dataclasses.replace(
        base.mem.tile, shape=view.shape, dtype=str(view.dtype), itemsize=view.dtype.itemsize,
        row_bytes=view.shape[1] * view.dtype.itemsize, partitions=view.shape[0],
    )  # fmt: skip
    mem = base.mem.extract(base.region, at, tile)
    found = Columns(mem, view.shape, (view.shape[1], 1), 0, view.dtype)
    found.base, found.at = base, at
    found._access = view.access
    return found


def put_back(view: Any) -> None:
    """Bring what was written to the columns of an indirect operand back to its tile.

    Of equal offsets the last column wins (undocumented).
    """
    if isinstance(view, Columns):
        view.base.mem.insert(view.base.region, view.at, view.mem)


def _offsets(run: Run, plan: Plan, place: int, view: NkiTensor) -> Array:
    """Return the free offset of each column in each partition."""
    dynamic = view.dynamic
    if dynamic is None:
        raise TypeError(f"{view!r} is no indirect view")
    index = dynamic.index
    group = group_size(plan.engine, run.spec)
    stored = index.mem.array(index.region, index.dtype.host).reshape(index.shape[0], -1)
    lists = stored.reshape(-1, group, stored.shape[1]).transpose(0, 2, 1)
    lists = lists.reshape(lists.shape[0], -1)[:, : view.shape[1]].astype(np.int64)
    limit = dynamic.base.free_size
    outside = (lists < 0) | (lists >= limit)
    if outside.any():
        bad = int(lists[outside][0])
        raise OutOfBounds(
            f"{plan.opcode} {plan.names[place]} at {where(run.kernel_site())}: offset {bad} leaves "
            f"the {limit} elements per partition of tensor {view.name!r}; keep offsets inside"
        )
    result: Array = np.repeat(lists, group, axis=0)
    return result
