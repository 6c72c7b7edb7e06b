"""Wrappers that move, spread or choose elements: transpose, matmul, broadcast_to, where ..."""

from __future__ import annotations

from typing import Any

from nki import isa
from nki.language.math import require_tile

from nki_kernels.machine import dtypes
from nki_kernels.machine.core import Run, current
from nki_kernels.machine.errors import RuleViolation, ShapeError
from nki_kernels.machine.operators import OPS
from nki_kernels.machine.tensor import MemoryRegion, NkiTensor

_SBUF, _PSUM = MemoryRegion.sbuf, MemoryRegion.psum


def expand_dims(x: NkiTensor, axis: int) -> NkiTensor:
    """Return the view of `x` with a dimension of size 1 at position `axis` of the result."""
    require_tile(x, "nl.expand_dims")
    return x.expand_dim(axis + x.ndim + 1 if axis < 0 else axis)


def broadcast_to(x: NkiTensor, shape: Any, dtype: Any = None) -> NkiTensor:
    """Return a new SBUF tile in which dimensions of size 1 repeat, the partition one included.

    `x` itself where shape and dtype are its own. Free dimensions are read with stride 0;
    partitions are filled by nc_stream_shuffle, a quadrant at a time.
    """
    run = current("nl.broadcast_to")
    require_tile(x, "nl.broadcast_to")
    wanted = tuple(int(n) for n in shape)
    fits = len(wanted) == x.ndim and all(
        old in (1, new) for old, new in zip(x.shape, wanted, strict=True)
    )
    if not fits:
        raise ShapeError(
            f"nl.broadcast_to: a tile {list(x.shape)} to {list(wanted)}; ranks must be equal and "
            "every dimension the same or 1: expand it with nl.expand_dims first"
        )
    kind = dtypes.as_dtype(dtype or x.dtype)
    if wanted == x.shape and kind == x.dtype:
        return x
    view = x
    for dim in range(1, x.ndim):
        if view.shape[dim] != wanted[dim]:
            view = view.broadcast(dim, wanted[dim])
    result = run.allocate(wanted, kind, _SBUF)
    if wanted[0] == x.shape[0]:
        isa.tensor_copy(dst=result, src=view)
        return result
    if kind != x.dtype:
        row = run.allocate((1, *wanted[1:]), kind, _SBUF)
        isa.tensor_copy(dst=row, src=view)
        view = row
    quadrant = run.spec.quadrant
    for start in range(0, wanted[0], quadrant):
        stop = min(start + quadrant, wanted[0])
        isa.nc_stream_shuffle(dst=result[start:stop], src=view, shuffle_mask=[0] * quadrant)
    return result


def transpose(x: NkiTensor, dtype: Any = None) -> NkiTensor:
    """Return the transpose of a 2-D SBUF tile as a new PSUM tile, through the Tensor engine."""
    run = current("nl.transpose")
    if x.ndim != 2:
        raise ShapeError(
            f"nl.transpose: a tile {list(x.shape)} of {x.ndim} dimensions; it must have 2: "
            "reshape or slice it"
        )
    wanted = dtypes.as_dtype(dtype or x.dtype)
    # The array of gen2 writes 16-bit data as float32.
    wide = run.spec.generation == 2 and x.dtype.itemsize == 2
    landed = run.allocate(x.shape[::-1], dtypes.float32 if wide else x.dtype, _PSUM)
    isa.nc_transpose(dst=landed, data=x)
    if landed.dtype == wanted:
        return landed
    result = run.allocate(landed.shape, wanted, _PSUM)
    isa.tensor_copy(dst=result, src=landed)
    return result


def matmul(x: NkiTensor, y: NkiTensor, transpose_x: bool = False) -> NkiTensor:
    """Return x @ y, or x.T @ y, as a new float32 PSUM tile.

    Args:
        x: [M, K] in SBUF; with `transpose_x` [K, M], which saves a transpose and a copy: the
            Tensor engine contracts partitions.
        y: [K, N] in SBUF.
        transpose_x: x lies transposed.
    """
    run = current("nl.matmul")
    require_tile(x, "nl.matmul")
    require_tile(y, "nl.matmul", "y")
    stationary = x
    if not transpose_x:
        turned = transpose(x, x.dtype)
        stationary = run.allocate(turned.shape, x.dtype, _SBUF)
        isa.tensor_copy(dst=stationary, src=turned)
    result = run.allocate((stationary.free_size, y.free_size), dtypes.float32, _PSUM)
    isa.nc_matmul(dst=result, stationary=stationary, moving=y)
    return result


def load_transpose2d(src: NkiTensor, dtype: Any = None) -> NkiTensor:
    """Return a new SBUF tile [F, P] with the transpose of the HBM tensor `src` [P, F]."""
    run = current("nl.load_transpose2d")
    require_tile(src, "nl.load_transpose2d", "src")
    if src.ndim != 2:
        raise ShapeError(
            f"nl.load_transpose2d: a tensor {list(src.shape)} of {src.ndim} dimensions; it must "
            "have 2: reshape or slice it"
        )
    landed = run.allocate(src.shape[::-1], src.dtype, _SBUF)
    isa.dma_transpose(dst=landed, src=src)
    return _as(run, landed, dtypes.as_dtype(dtype or src.dtype))


def where(condition: NkiTensor, x: NkiTensor, y: NkiTensor, dtype: Any = None) -> NkiTensor:
    """Return a new SBUF tile with x where `condition` is not 0, else y; dtype is `dtype` or x's."""
    run = current("nl.where")
    for name, value in (("condition", condition), ("x", x), ("y", y)):
        require_tile(value, "nl.where", name)
    kind = dtypes.as_dtype(dtype or x.dtype)
    predicate = run.allocate(condition.shape, dtypes.uint8, _SBUF)
    isa.tensor_scalar(dst=predicate, data=condition, op0=OPS["not_equal"], operand0=0.0)
    result = run.allocate(x.shape, kind, _SBUF)
    isa.tensor_copy(dst=result, src=y)
    isa.tensor_copy_predicated(dst=result, src=_as(run, x, kind), predicate=predicate)
    return result


def gather_flattened(
    data: NkiTensor, indices: NkiTensor, axis: int = 0, dtype: Any = None
) -> NkiTensor:
    """Return result[p].flat[i] = data[p].flat[indices[p].flat[i]] in a new SBUF tile.

    Args:
        data: a tile in SBUF.
        indices: uint32, as many partitions as data; positions in data's flattened free
            dimensions. The result has their shape.
        axis: 0. The documents name it and give no meaning to another value.
        dtype: of the result; data's by default.

    Raises:
        RuleViolation: another axis.
    """
    run = current("nl.gather_flattened")
    require_tile(data, "nl.gather_flattened", "data")
    require_tile(indices, "nl.gather_flattened", "indices")
    if axis != 0:
        raise RuleViolation(
            f"nl.gather_flattened: axis={axis!r}; only 0 is defined: elements are taken from the "
            "flattened free dimensions of each partition"
        )
    result = run.allocate(indices.shape, data.dtype, _SBUF)
    isa.nc_n_gather(dst=result, data=data, indices=indices)
    return _as(run, result, dtypes.as_dtype(dtype or data.dtype))


def _as(run: Run, x: NkiTensor, kind: dtypes.DType) -> NkiTensor:
    """Return `x`, or a converted copy of it in SBUF."""
    if x.dtype == kind:
        return x
    converted = run.allocate(x.shape, kind, _SBUF)
    isa.tensor_copy(dst=converted, src=x)
    return converted
