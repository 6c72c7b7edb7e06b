"""NkiTensor: a strided view over one tile. No view copies data.

Element (i0, i1, ...) lies at ``offset + sum(strides[k] * i_k)`` of the tile, in elements of the
view's dtype. On chip, dimension 0 is the partition and the tile is laid out partition by partition.
Source: nki.language NkiTensor docstrings; access-pattern deep dive (NKI 0.6.0).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from enum import Enum
from typing import Any, NamedTuple, NoReturn

import numpy as np

from nki_kernels.machine import dtypes
from nki_kernels.machine.dtypes import Array, DType, as_dtype
from nki_kernels.machine.errors import AbstractValue, KernelError, OutOfBounds, RuleViolation, ShapeError
from nki_kernels.machine.memory import Memory, Region, poisoned
from nki_kernels.machine.trace import Access

MAX_DIMS = 5


class MemoryRegion(Enum):
    """Where a tensor lives. ``hbm`` is the documented alias of ``private_hbm``."""

    sbuf = "sbuf"
    psum = "psum"
    private_hbm = "hbm"
    shared_hbm = "shared_hbm"


class Abstract:
    """A kernel argument with a shape and a dtype but no values: times a kernel without data.

    Args:
        shape: positive integers.
        dtype: anything `as_dtype` accepts.
    """

    def __init__(self, shape: Sequence[int], dtype: Any) -> None:
        self.shape = tuple(int(s) for s in shape)
        self.dtype = as_dtype(dtype)

    def __repr__(self) -> str:
        return f"Abstract({list(self.shape)}, {self.dtype})"


class DynamicSlice(NamedTuple):
    """``nl.ds(start, size)``: elements start .. start + size - 1."""

    start: int
    size: int


class Dynamic(NamedTuple):
    """An address that depends on a run-time value.

    `kind` is "scalar" (one index moves the whole pattern by index * scale elements) or "vector"
    (row i of dimension 0 starts at index[i] * scale). `index` is a tensor or a register.
    """

    kind: str
    index: Any
    scale: int


class NKIObject:
    """Base class of objects that NKI kernels may carry; nothing but a marker here."""


class NkiTensor(NKIObject):
    """A view over a tile in SBUF, PSUM or HBM. Made by ``nl.ndarray`` and by the methods below."""

    __slots__ = ("_access", "_signature", "dtype", "dynamic", "mem", "offset", "shape", "strides")

    mem: Memory
    shape: tuple[int, ...]
    strides: tuple[int, ...]
    offset: int
    dtype: DType
    dynamic: Dynamic | None

    def __init__(
        self,
        mem: Memory,
        shape: tuple[int, ...],
        strides: tuple[int, ...],
        offset: int,
        dtype: DType,
        dynamic: Dynamic | None = None,
    ) -> None:
        self.mem = mem
        self.shape = shape
        self.strides = strides
        self.offset = offset
        self.dtype = dtype
        self.dynamic = dynamic
        self._signature: tuple[Any, ...] | None = None
        self._access: Access | None = None

    # -- properties ------------------------------------------------------------------------------

    @property
    def buffer(self) -> MemoryRegion:
        """The memory region."""
        region: MemoryRegion = self.mem.buffer
        return region

    @property
    def name(self) -> str:
        """The name given at allocation, or one made from the allocation number."""
        return self.mem.tile.name

    @property
    def ndim(self) -> int:
        """Number of dimensions."""
        return len(self.shape)

    @property
    def size(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)

    @property
    def on_chip(self) -> bool:
        """True in SBUF and PSUM."""
        return self.mem.tile.memory != "hbm"

    @property
    def free_size(self) -> int:
        """Elements per partition: the product of every dimension but the first."""
        return math.prod(self.shape[1:])

    @property
    def row_elements(self) -> int:
        """Elements of this dtype per partition of the tile."""
        return self.mem.tile.row_bytes // self.dtype.itemsize

    @property
    def start_partition(self) -> int:
        """First partition the view touches (on chip)."""
        return self.offset // self.row_elements

    @property
    def region(self) -> Region:
        """The access as a key of the tile's written map."""
        return (self.offset, self.shape, self.strides, self.dtype.itemsize)

    @property
    def signature(self) -> tuple[Any, ...]:
        """Everything an operand rule or a cost may depend on, and nothing else."""
        found = self._signature
        if found is None:
            tile = self.mem.tile
            memory = tile.memory
            if memory == "hbm":
                place: tuple[int, ...] = ()
            else:
                start, rest = divmod(self.offset * self.dtype.itemsize, tile.row_bytes)
                fixed = tile.address[0] if tile.address is not None else 0
                # Free offsets matter to no SBUF rule; in PSUM they decide the bank.
                place = (start + fixed, rest if memory == "psum" else 0, tile.row_bytes)
            dynamic = self.dynamic
            found = (
                self.dtype, memory, self.shape, self.strides, place,
                None if dynamic is None else (dynamic.kind, dynamic.scale),
            )  # fmt: skip
            self._signature = found
        return found

    @property
    def access(self) -> Access:
        """The record of this view for the trace."""
        found = self._access
        if found is None:
            found = Access(
                self.mem.tile, self.offset, self.shape, self.strides, self.dtype.itemsize,
                self.dynamic is not None,
            )  # fmt: skip
            self._access = found
        return found

    # -- indexing --------------------------------------------------------------------------------

    def __getitem__(self, key: Any) -> NkiTensor:
        """Return the view ``t[key]``: ints, slices with positive steps, Ellipsis, ``nl.ds``.

        On chip an int keeps dimension 0 as size 1 and the result is at least 2-D; in HBM an int drops
        its dimension and the result is at least 1-D.

        Raises:
            OutOfBounds: an index or a slice end outside the dimension.
            ShapeError: too many indices, an empty slice, a step on the partition dimension.
        """
        keys = key if key.__class__ is tuple else (key,)
        shape, strides, offset = self.shape, self.strides, self.offset
        if self.dynamic is not None or Ellipsis in keys or len(keys) > len(shape):
            keys = self._plain_keys(keys)
        on_chip = self.mem.tile.memory != "hbm"
        new_shape: list[int] = []
        new_strides: list[int] = []
        dropped = 0
        for dim, index in enumerate(keys):
            extent, stride = shape[dim], strides[dim]
            if index.__class__ is slice:
                start, count, step = self._bounds(index, dim)
                if step != 1 and on_chip and dim == 0 and count > 1:
                    raise ShapeError(
                        f"{self._what()}: slice step {step} on dimension 0; partitions are contiguous: "
                        "use step 1, or copy with a DMA"
                    )
                offset += start * stride
                new_shape.append(count)
                new_strides.append(stride * step)
            elif index.__class__ is DynamicSlice:
                start, count = index
                if not (_is_int(start) and _is_int(count)):
                    raise RuleViolation(
                        f"{self._what()}: nl.ds({start!r}, {count!r}) needs ints; for a run-time start use "
                        ".ap(..., scalar_offset=...) or .select(dim, index)"
                    )
                if start < 0 or count < 1 or start + count > extent:
                    raise self._outside(f"nl.ds({start}, {count})", dim)
                offset += start * stride
                new_shape.append(count)
                new_strides.append(stride)
            elif _is_int(index):
                at = int(index)
                if at < 0:
                    at += extent
                if not 0 <= at < extent:
                    raise self._outside(str(index), dim)
                offset += at * stride
                if on_chip and dim == 0:
                    new_shape.append(1)
                    new_strides.append(stride)
                else:
                    dropped = stride
            else:
                raise RuleViolation(
                    f"{self._what()}: index {index!r} of type {type(index).__name__}; allowed are int, "
                    "slice, Ellipsis and nl.ds(start, size); for run-time indices use .ap(..., "
                    "scalar_offset= / vector_offset=) or .select(dim, index)"
                )
        rest = len(keys)
        new_shape.extend(shape[rest:])
        new_strides.extend(strides[rest:])
        if len(new_shape) < (2 if on_chip else 1):
            new_shape.append(1)
            new_strides.append(dropped or 1)
        return NkiTensor(
            self.mem, tuple(new_shape), tuple(new_strides), offset, self.dtype, self.dynamic
        )

    def _plain_keys(self, keys: tuple[Any, ...]) -> tuple[Any, ...]:
        """Expand an Ellipsis, refuse too many indices and indices on an indirect dimension."""
        if keys.count(Ellipsis) > 1:
            raise ShapeError(f"{self._what()}: {keys!r} has more than one Ellipsis; use one")
        given = len(keys) - keys.count(Ellipsis)
        if given > len(self.shape):
            raise ShapeError(
                f"{self._what()}: {given} indices for {len(self.shape)} dimensions; index at most "
                f"{len(self.shape)}"
            )
        if Ellipsis in keys:
            at = keys.index(Ellipsis)
            fill = (slice(None),) * (len(self.shape) - given)
            keys = keys[:at] + fill + keys[at + 1 :]
        if self.dynamic is not None and self.dynamic.kind == "vector" and keys[0] != slice(None):
            raise RuleViolation(
                f"{self._what()}: dimension 0 takes part in the indirection and cannot be indexed; "
                "slice the index tensor instead"
            )
        return keys

    def _bounds(self, index: slice, dim: int) -> tuple[int, int, int]:
        extent = self.shape[dim]
        start, stop, step = index.start, index.stop, index.step
        if start is None:
            start = 0
        elif start < 0:
            start += extent
        if stop is None:
            stop = extent
        elif stop < 0:
            stop += extent
        if step is None:
            step = 1
        elif step < 1:
            raise ShapeError(
                f"{self._what()}: slice step {step} on dimension {dim}; steps are positive: reverse the "
                "data elsewhere"
            )
        if start < 0 or stop > extent:
            raise self._outside(f"{index.start}:{index.stop}", dim)
        if stop <= start:
            raise ShapeError(
                f"{self._what()}: slice {index.start}:{index.stop} on dimension {dim} of size {extent} is "
                "empty; start must be smaller than end"
            )
        return int(start), int(-(-(stop - start) // step)), int(step)

    def __setitem__(self, key: Any, value: Any) -> NoReturn:
        """Refused: a NeuronCore has no assignment; use an instruction."""
        raise KernelError(
            f"{self._what()}: assignment to a tensor does not exist on the device; use an instruction "
            "with dst=, for example nisa.tensor_copy(dst=t[...], src=...)"
        )

    # -- views -----------------------------------------------------------------------------------

    def slice(self, dim: int, start: int, end: int, step: int = 1) -> NkiTensor:
        """Return elements start .. end - 1 of `dim`, every `step`-th; 0 <= start < end <= extent."""
        self._dim(dim, "slice")
        if not 0 <= start < end <= self.shape[dim]:
            raise self._outside(f"slice({dim}, {start}, {end})", dim)
        return self[(slice(None),) * dim + (slice(start, end, step),)]

    def select(self, dim: int, index: Any) -> NkiTensor:
        """Return the view at `index` of `dim` without that dimension.

        Args:
            dim: the dimension to drop.
            index: an int, or a (1, 1) integer tensor or a register for a run-time choice.
        """
        self._dim(dim, "select")
        if _is_int(index):
            if not 0 <= index < self.shape[dim]:
                raise self._outside(f"select({dim}, {index})", dim)
            return self[(slice(None),) * dim + (int(index),)]
        if self.on_chip and dim == 0:
            raise RuleViolation(
                f"{self._what()}: select(0, <run-time index>) on chip; partitions cannot be chosen at "
                "run time: select another dimension, or keep the data in HBM"
            )
        self._one_dynamic("select")
        shape = self.shape[:dim] + self.shape[dim + 1 :]
        strides = self.strides[:dim] + self.strides[dim + 1 :]
        if not shape:
            shape, strides = (1,), (1,)
        scalar = Dynamic("scalar", index, self.strides[dim])
        return NkiTensor(self.mem, shape, strides, self.offset, self.dtype, scalar)

    def vector_select(self, dim: int, vector_offset: NkiTensor) -> NkiTensor:
        """Return a gather view: row i is row ``vector_offset[i]`` of this HBM tensor."""
        if dim != 0 or self.on_chip:
            raise RuleViolation(
                f"{self._what()}: vector_select({dim}, ...); it works on dimension 0 of an HBM tensor"
            )
        self._one_dynamic("vector_select")
        vector = Dynamic("vector", vector_offset, self.strides[0])
        shape = (vector_offset.shape[0], *self.shape[1:])
        return NkiTensor(self.mem, shape, self.strides, self.offset, self.dtype, vector)

    def permute(self, dims: Sequence[int]) -> NkiTensor:
        """Return the view with its dimensions in the order `dims`; on chip ``dims[0]`` is 0."""
        order = tuple(dims)
        if sorted(order) != list(range(self.ndim)):
            raise ShapeError(
                f"{self._what()}: permute{order} is no permutation of {tuple(range(self.ndim))}"
            )
        self._keep_partition(order[0] == 0, f"permute{order}")
        shape = tuple(self.shape[d] for d in order)
        strides = tuple(self.strides[d] for d in order)
        return self._with(shape, strides)

    def broadcast(self, dim: int, size: int) -> NkiTensor:
        """Return the view with dimension `dim` of size 1 repeated `size` times (stride 0)."""
        self._dim(dim, "broadcast")
        self._keep_partition(dim != 0, f"broadcast({dim}, {size})")
        if self.shape[dim] != 1:
            raise ShapeError(
                f"{self._what()}: broadcast({dim}, {size}) of a dimension of size {self.shape[dim]}; "
                "only size 1 can be repeated"
            )
        shape = (*self.shape[:dim], int(size), *self.shape[dim + 1 :])
        strides = (*self.strides[:dim], 0, *self.strides[dim + 1 :])
        return self._with(shape, strides)

    def expand_dim(self, dim: int) -> NkiTensor:
        """Return the view with a new dimension of size 1 at position `dim`."""
        self._keep_partition(dim != 0, f"expand_dim({dim})")
        if not 0 <= dim <= self.ndim:
            raise ShapeError(f"{self._what()}: expand_dim({dim}); allowed are 0 to {self.ndim}")
        stride = self.strides[dim] * self.shape[dim] if dim < self.ndim else 1
        shape = (*self.shape[:dim], 1, *self.shape[dim:])
        return self._with(shape, (*self.strides[:dim], stride, *self.strides[dim:]))

    def squeeze_dim(self, dim: int) -> NkiTensor:
        """Return the view without dimension `dim`, which must have size 1."""
        self._dim(dim, "squeeze_dim")
        self._keep_partition(dim != 0, f"squeeze_dim({dim})")
        if self.shape[dim] != 1:
            raise ShapeError(
                f"{self._what()}: squeeze_dim({dim}) of a dimension of size {self.shape[dim]}; only "
                "size 1 can be removed"
            )
        shape = self.shape[:dim] + self.shape[dim + 1 :]
        return self._with(shape, self.strides[:dim] + self.strides[dim + 1 :])

    def reshape_dim(self, dim: int, shape: Sequence[int]) -> NkiTensor:
        """Return the view with `dim` split into `shape`, one entry of which may be -1."""
        self._dim(dim, "reshape_dim")
        parts = _infer(tuple(shape), self.shape[dim])
        if math.prod(parts) != self.shape[dim]:
            raise ShapeError(
                f"{self._what()}: reshape_dim({dim}, {tuple(shape)}) does not multiply to {self.shape[dim]}"
            )
        self._keep_partition(dim != 0 or len(parts) == 1, f"reshape_dim({dim}, {tuple(shape)})")
        inner = self.strides[dim]
        strides = tuple(inner * math.prod(parts[k + 1 :]) for k in range(len(parts)))
        return self._with(
            self.shape[:dim] + parts + self.shape[dim + 1 :],
            self.strides[:dim] + strides + self.strides[dim + 1 :],
        )

    def flatten_dims(self, start_dim: int, end_dim: int) -> NkiTensor:
        """Return the view with dimensions start_dim .. end_dim (inclusive) merged into one."""
        self._dim(start_dim, "flatten_dims")
        self._dim(end_dim, "flatten_dims")
        self._keep_partition(start_dim > 0 or end_dim == 0, f"flatten_dims({start_dim}, {end_dim})")
        merged = self.shape[start_dim : end_dim + 1]
        strides = _restride(merged, self.strides[start_dim : end_dim + 1], (math.prod(merged),))
        if strides is None:
            raise ShapeError(
                f"{self._what()}: flatten_dims({start_dim}, {end_dim}) of dimensions that are not "
                "contiguous; copy the data first"
            )
        return self._with(
            (*self.shape[:start_dim], math.prod(merged), *self.shape[end_dim + 1 :]),
            self.strides[:start_dim] + strides + self.strides[end_dim + 1 :],
        )

    def reshape(self, shape: Sequence[int]) -> NkiTensor:
        """Return the view with a new shape of the same size; on chip ``shape[0]`` is unchanged."""
        new = _infer(tuple(shape), self.size)
        if math.prod(new) != self.size:
            raise ShapeError(
                f"{self._what()}: reshape{tuple(shape)} has {math.prod(new)} elements, the view {self.size}"
            )
        self._keep_partition(new[0] == self.shape[0], f"reshape{tuple(shape)}")
        strides = _restride(self.shape, self.strides, new)
        if strides is None:
            raise ShapeError(
                f"{self._what()}: reshape{tuple(shape)} needs a copy, the layout (strides "
                f"{self.strides}) allows no view; copy the data first"
            )
        return self._with(new, strides)

    def rearrange(
        self,
        src_pattern: Sequence[Any],
        dst_pattern: Sequence[Any],
        fixed_sizes: dict[str, int] | None = None,
    ) -> NkiTensor:
        """Return an einops-style view, for example ``('b', ('h', 'w')) -> ('b', 'w', 'h')``."""
        sizes = dict(fixed_sizes or {})
        groups = [g if isinstance(g, (tuple, list)) else (g,) for g in src_pattern]
        if len(groups) != self.ndim:
            raise ShapeError(
                f"{self._what()}: rearrange pattern {tuple(src_pattern)} has {len(groups)} dimensions"
            )
        view = self
        names: list[str] = []
        for group in groups:
            at = len(names)
            if len(group) > 1:
                view = view.reshape_dim(at, [sizes.get(n, -1) for n in group])
            names.extend(group)
        wanted = [n for g in dst_pattern for n in (g if isinstance(g, (tuple, list)) else (g,))]
        if sorted(wanted) != sorted(names) or len(set(names)) != len(names):
            raise ShapeError(
                f"{self._what()}: rearrange {tuple(src_pattern)} -> {tuple(dst_pattern)} must name the "
                "same dimensions once each"
            )
        view = view.permute([names.index(n) for n in wanted])
        dim = 0
        for group in dst_pattern:
            if isinstance(group, (tuple, list)):
                view = view.flatten_dims(dim, dim + len(group) - 1)
            dim += 1
        return view

    def view(self, dtype: Any) -> NkiTensor:
        """Return the same bits as another dtype; the last dimension scales with the item size."""
        new = as_dtype(dtype)
        old_size, new_size = self.dtype.itemsize, new.itemsize
        if new_size == old_size:
            return NkiTensor(self.mem, self.shape, self.strides, self.offset, new, self.dynamic)
        if self.dynamic is not None or self.strides[-1] != 1:
            raise ShapeError(
                f"{self._what()}: view({new}) needs a contiguous last dimension and no run-time index "
                f"(strides {self.strides})"
            )
        scaled = [self.offset, self.shape[-1], *self.strides[:-1]]
        if any(v * old_size % new_size for v in scaled):
            raise ShapeError(
                f"{self._what()}: view({new}) of offset {self.offset}, shape {self.shape}, strides "
                f"{self.strides}: {new_size}-byte elements do not divide it"
            )
        offset, last, *rest = (v * old_size // new_size for v in scaled)
        return NkiTensor(self.mem, (*self.shape[:-1], last), (*rest, 1), offset, new)

    reinterpret_cast = view

    def ap(
        self,
        pattern: Sequence[Sequence[int]],
        offset: int | None = None,
        scalar_offset: Any = None,
        vector_offset: NkiTensor | None = None,
        indirect_dim: int = 0,
        dtype: Any = None,
    ) -> NkiTensor:
        """Return a view with an explicit access pattern over the tile.

        Args:
            pattern: ``[[step, count], ...]``, slow to fast, in elements of the new view. On chip the
                first pair is the partition: its step is the tile's elements per partition.
            offset: elements added to this view's own offset; None means 0.
            scalar_offset: a (1, 1) int32/uint32 SBUF tensor or a register; moves the start by its value
                times the product of ``shape[indirect_dim + 1:]``.
            vector_offset: a (P, 1) int32/uint32 SBUF tensor; row i of this HBM tensor starts at
                ``vector_offset[i] * prod(shape[1:])``; the first step is then ignored.
            indirect_dim: which dimension of this view scales the run-time offset.
            dtype: reinterpret the bytes; inherited offsets are rescaled.
        """
        new = self.dtype if dtype is None else as_dtype(dtype)
        shape = tuple(int(count) for _, count in pattern)
        strides = tuple(int(step) for step, _ in pattern)
        if not shape or len(shape) > MAX_DIMS or min(shape) < 1 or min(strides) < 0:
            raise ShapeError(
                f"{self._what()}: ap pattern {[list(p) for p in pattern]}; allowed are 1 to {MAX_DIMS} pairs "
                "[step >= 0, count >= 1]"
            )
        base, rest = divmod(self.offset * self.dtype.itemsize, new.itemsize)
        if rest:
            raise ShapeError(f"{self._what()}: offset {self.offset} is no multiple of one {new}")
        dynamic = self._dynamic(scalar_offset, vector_offset, indirect_dim, new, shape)
        if self.on_chip:
            strides = self._partition_step(shape, strides, new)
        result = NkiTensor(self.mem, shape, strides, base + (offset or 0), new, dynamic)
        if dynamic is None:
            result.require_inside("ap")
        return result

    def _dynamic(
        self, scalar: Any, vector: NkiTensor | None, dim: int, dtype: DType, shape: tuple[int, ...]
    ) -> Dynamic | None:
        if scalar is None and vector is None:
            return None
        if scalar is not None and vector is not None:
            raise RuleViolation(f"{self._what()}: ap takes scalar_offset or vector_offset, not both")
        self._one_dynamic("ap")
        if dtype.itemsize != self.dtype.itemsize:
            raise RuleViolation(
                f"{self._what()}: ap with a run-time offset and dtype={dtype} of another size; the unit of "
                "the offset is undocumented: reinterpret first"
            )
        self._dim(dim, "ap indirect_dim")
        scale = math.prod(self.shape[dim + 1 :])
        if scalar is not None:
            if self.on_chip and dim == 0:
                raise RuleViolation(f"{self._what()}: scalar_offset on the partition dimension")
            return Dynamic("scalar", scalar, scale)
        if self.on_chip or dim != 0:
            raise RuleViolation(f"{self._what()}: vector_offset works on dimension 0 of an HBM tensor")
        if vector is not None and vector.shape[0] != shape[0] and vector.size != vector.shape[0]:
            return Dynamic("vector", vector, scale)
        if vector is not None and vector.shape[0] != shape[0]:
            raise ShapeError(
                f"{self._what()}: vector_offset has {vector.shape[0]} rows, the pattern {shape[0]}"
            )
        return Dynamic("vector", vector, scale)

    def _partition_step(
        self, shape: tuple[int, ...], strides: tuple[int, ...], dtype: DType
    ) -> tuple[int, ...]:
        row = self.mem.tile.row_bytes // dtype.itemsize
        own = self.free_size * self.dtype.itemsize // dtype.itemsize
        if strides[0] == row or shape[0] == 1 or strides[0] == own:
            return (row, *strides[1:])
        raise ShapeError(
            f"{self._what()}: ap partition step {strides[0]}; the first pair walks partitions, so its step "
            f"is the tile's {row} elements of {dtype} per partition"
        )

    def require_inside(self, what: str) -> None:
        """Raise OutOfBounds if any element lies outside the tile."""
        last = self.offset + sum((n - 1) * s for n, s in zip(self.shape, self.strides, strict=True))
        limit = self.mem.nbytes // self.dtype.itemsize
        if self.offset < 0 or last >= limit:
            raise OutOfBounds(
                f"{self._what()}: {what} reaches element {last if last >= limit else self.offset} of a tile "
                f"of {limit} elements; keep offset and pattern inside"
            )
        if self.on_chip:
            row = self.row_elements
            used = self.offset % row + sum(
                (n - 1) * s for n, s in zip(self.shape[1:], self.strides[1:], strict=True)
            )
            if used >= row:
                raise OutOfBounds(
                    f"{self._what()}: {what} reaches element {used} of a partition of {row} elements; an "
                    "access cannot run on into the next partition"
                )

    # -- queries ---------------------------------------------------------------------------------

    def get_pattern(self) -> list[list[int]]:
        """Return ``[[stride, count], ...]`` in the order of the dimensions."""
        return [[s, n] for s, n in zip(self.strides, self.shape, strict=True)]

    def is_contiguous(self) -> bool:
        """True if the free dimensions (HBM: all) lie in row-major order without gaps."""
        skip = 1 if self.on_chip else 0
        dims = list(zip(self.shape, self.strides, strict=True))[skip:]
        expected = 1
        for extent, stride in reversed(dims):
            if extent != 1 and stride != expected:
                return False
            expected *= extent
        return True

    def is_indirect(self) -> bool:
        """True if the address depends on a run-time value."""
        return self.dynamic is not None

    # -- inspection ------------------------------------------------------------------------------

    def numpy(self) -> Array:
        """Return a copy of the values at this moment; never-written elements show as NaN or 4.

        Raises:
            AbstractValue: the tile has a shape only.
        """
        if self.mem.abstract:
            raise AbstractValue(
                f"{self._what()}: the tile has a shape but no values, because something written to it came "
                "from an argument without values; pass arrays for every argument it depends on"
            )
        view = self if self.dynamic is None else self.resolved()
        return poisoned(view, view.dtype)

    def resolved(self) -> NkiTensor:
        """Return the view with its run-time scalar offset replaced by the value it has now."""
        dynamic = self.dynamic
        if dynamic is None or dynamic.kind != "scalar":
            return self
        moved = self.offset + read_index(dynamic.index) * dynamic.scale
        return NkiTensor(self.mem, self.shape, self.strides, moved, self.dtype)

    def __repr__(self) -> str:
        region = self.mem.buffer.value if isinstance(self.mem.buffer, Enum) else self.mem.buffer
        return f"<NkiTensor {self.name!r} {list(self.shape)} {self.dtype} in {region}>"

    def __str__(self) -> str:
        if self.mem.abstract:
            return f"{self!r}: shape only"
        with np.errstate(all="ignore"):
            return f"{self!r}:\n{self.numpy()}"

    def _no_value(self, what: str) -> NoReturn:
        raise AbstractValue(
            f"{self._what()}: {what} needs the tile's values while the kernel is being built; on the device "
            "they do not exist yet: use nl.fori_loop, nisa.register_load, or a compile-time argument"
        )

    def __bool__(self) -> bool:
        self._no_value("a condition")

    def __int__(self) -> int:
        self._no_value("int()")

    def __float__(self) -> float:
        self._no_value("float()")

    def __index__(self) -> int:
        self._no_value("an index")

    # -- small helpers ---------------------------------------------------------------------------

    def _with(self, shape: tuple[int, ...], strides: tuple[int, ...]) -> NkiTensor:
        if len(shape) > MAX_DIMS:
            raise ShapeError(f"{self._what()}: {len(shape)} dimensions; a view has at most {MAX_DIMS}")
        return NkiTensor(self.mem, shape, strides, self.offset, self.dtype, self.dynamic)

    def _what(self) -> str:
        return f"tensor {self.name!r} {list(self.shape)}"

    def _outside(self, index: str, dim: int) -> OutOfBounds:
        return OutOfBounds(
            f"{self._what()}: index {index} is outside dimension {dim} of size {self.shape[dim]}; indices "
            f"run from 0 to {self.shape[dim] - 1}, ends to {self.shape[dim]}"
        )

    def _dim(self, dim: int, what: str) -> None:
        if not 0 <= dim < self.ndim:
            raise ShapeError(f"{self._what()}: {what} on dimension {dim}; it has {self.ndim}")

    def _keep_partition(self, kept: bool, what: str) -> None:
        if not kept and (self.on_chip or (self.dynamic is not None and self.dynamic.kind == "vector")):
            raise ShapeError(
                f"{self._what()}: {what} would change dimension 0, which is the partition (or the indirect) "
                "dimension; it must stay first and whole"
            )

    def _one_dynamic(self, what: str) -> None:
        if self.dynamic is not None:
            raise RuleViolation(
                f"{self._what()}: {what} on a view that already has a run-time index; only one is possible"
            )


def _is_int(value: Any) -> bool:
    return isinstance(value, (int, np.integer)) and not isinstance(value, bool)


def read_index(index: Any) -> int:
    """Return the run-time value of a (1, 1) integer tensor or a register."""
    if isinstance(index, NkiTensor):
        if index.size != 1 or index.dtype not in (dtypes.int32, dtypes.uint32):
            raise DynamicIndexError(
                f"{index!r} as a run-time index; it must be one int32 or uint32 element"
            )
        return int(index.numpy().reshape(-1)[0])
    return int(index.read())


class DynamicIndexError(RuleViolation, TypeError):
    """A run-time index that is not one 32-bit integer."""


def _infer(shape: tuple[int, ...], size: int) -> tuple[int, ...]:
    if -1 not in shape:
        return shape
    known = -math.prod(shape)
    return tuple(size // known if s == -1 and known else s for s in shape)


def _restride(
    shape: tuple[int, ...], strides: tuple[int, ...], new: tuple[int, ...]
) -> tuple[int, ...] | None:
    """Return strides for `new` over the same elements, or None where only a copy could do it."""
    old = [(n, s) for n, s in zip(shape, strides, strict=True) if n != 1]
    runs: list[list[int]] = []
    for n, s in old:
        if runs and runs[-1][1] == s * n:
            runs[-1] = [runs[-1][0] * n, s]
        else:
            runs.append([n, s])
    result: list[int] = []
    at = len(runs) - 1
    left, step = runs[at] if runs else (1, 1)
    for extent in reversed(new):
        if extent == 1:
            result.append(step)
            continue
        if left == 1 and at > 0:
            at -= 1
            left, step = runs[at]
        if left % extent:
            return None
        result.append(step)
        left //= extent
        step *= extent
    return tuple(reversed(result))
