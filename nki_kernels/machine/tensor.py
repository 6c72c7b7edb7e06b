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

from nki_kernels.machine.dtypes import Array, DType, as_dtype
from nki_kernels.machine.errors import (
    AbstractValue,
    KernelError,
    NkiKernelsError,
    OutOfBounds,
    RuleViolation,
    ShapeError,
)
from nki_kernels.machine.layout import MAX_DIMS, Dynamic, Signature, is_int, signature_of
from nki_kernels.machine.memory import Memory, poisoned
from nki_kernels.machine.no_arithmetic import NoArithmetic
from nki_kernels.machine.objects import NKIObject as NKIObject
from nki_kernels.machine.products import Region
from nki_kernels.machine.trace import Access
from nki_kernels.machine.views import Views


class MemoryRegion(Enum):
    """Where a tensor lives. ``hbm`` is the documented alias of ``private_hbm``."""

    sbuf = "sbuf"
    psum = "psum"
    private_hbm = "private_hbm"
    shared_hbm = "shared_hbm"

    __hash__ = object.__hash__  # members are single; Enum's is a call of Python per allocation


class Abstract:
    """A kernel argument with a shape and a dtype but no values: times a kernel without data.

    Args:
        shape: positive integers.
        dtype: anything `as_dtype` accepts.
    """

    def __init__(self, shape: Sequence[int], dtype: Any) -> None:
        if not isinstance(shape, (tuple, list)) or not all(is_int(s) for s in shape):
            raise ShapeError(
                f"Abstract: shape={shape!r}; it must be a tuple of positive integers: compute "
                "sizes with // and int()"
            )
        self.shape = tuple(int(s) for s in shape)
        self.dtype = as_dtype(dtype)

    def __repr__(self) -> str:
        return f"Abstract({list(self.shape)}, {self.dtype})"


class DynamicSlice(NamedTuple):
    """``nl.ds(start, size)``: elements start .. start + size - 1."""

    start: int
    size: int


class NkiTensor(NKIObject, Views, NoArithmetic):
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
        self._signature: Signature | None = None
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
    def signature(self) -> Signature:
        """Everything an operand rule or a cost may depend on, and nothing else."""
        found = self._signature
        if found is None:
            tile = self.mem.tile
            memory = tile.memory
            if memory == "hbm":
                place: tuple[int, ...] = ()
                if len(self.shape) > MAX_DIMS:
                    raise ShapeError(
                        f"{self._what()}: an operand of {len(self.shape)} dimensions; an access "
                        f"has at most {MAX_DIMS}: index some of them, or reshape"
                    )
            else:
                start, rest = divmod(self.offset * self.dtype.itemsize, tile.row_bytes)
                fixed = tile.address[0] if tile.address is not None else 0
                # Free offsets matter to no SBUF rule; in PSUM they decide the bank.
                place = (start + fixed, rest if memory == "psum" else 0, tile.row_bytes)
            parts = (
                self.dtype, memory, self.shape, self.strides, place, self._dynamic_signature(),
            )  # fmt: skip
            self._signature = found = signature_of(parts)
        return found

    def _dynamic_signature(self) -> tuple[Any, ...] | None:
        dynamic = self.dynamic
        if dynamic is None:
            return None
        index = dynamic.index
        if dynamic.kind == "unusable":
            raise index
        return (
            dynamic.kind,
            dynamic.scale,
            index.signature if isinstance(index, NkiTensor) else type(index),
            None if dynamic.base is None else dynamic.base.signature,
        )

    @property
    def access(self) -> Access:
        """The record of this view for the trace."""
        found = self._access
        if found is None:
            # Two operands of three are new; a named tuple's own constructor takes twice as long.
            parts = (
                self.mem.tile, self.offset, self.shape, self.strides, self.dtype.itemsize,
                self.dynamic is not None,
            )  # fmt: skip
            self._access = found = tuple.__new__(Access, parts)
        return found

    # -- indexing --------------------------------------------------------------------------------

    def __getitem__(self, key: Any) -> NkiTensor:
        """Return the view ``t[key]``: ints, slices with positive steps, Ellipsis, ``nl.ds``.

        On chip an int keeps dimension 0 as size 1 and the result is at least 2-D; in HBM an int
        drops its dimension and the result is at least 1-D.

        Raises:
            OutOfBounds: an index or a slice end outside the dimension.
            ShapeError: too many indices, a slice that ends before it starts, a step on the
                partition dimension. An empty view is an error where it is used.
        """
        keys = key if key.__class__ is tuple else (key,)
        shape, strides, offset = self.shape, self.strides, self.offset
        try:
            plain = self.dynamic is None and Ellipsis not in keys and len(keys) <= len(shape)
        except ValueError:  # an array among the keys compares element by element
            plain = True
        if not plain:
            keys = self._plain_keys(keys)
        on_chip = self.mem.tile.memory != "hbm"
        new_shape: list[int] = []
        new_strides: list[int] = []
        dropped = 0
        empty = False
        for dim, index in enumerate(keys):
            extent, stride = shape[dim], strides[dim]
            if index.__class__ is slice:
                start, stop, step = index.start, index.stop, index.step
                if (
                    start.__class__ is int
                    and stop.__class__ is int
                    and step is None
                    and 0 <= start < stop <= extent
                ):
                    # The common case, inline: a call per slice costs as much as the rest.
                    offset += start * stride
                    new_shape.append(stop - start)
                    new_strides.append(stride)
                    continue
                start, count, step = self._bounds(index, dim)
                empty |= not count
                offset += start * stride
                new_shape.append(count)
                new_strides.append(stride * step)
            elif index.__class__ is DynamicSlice:
                start, count = self._dynamic_bounds(index, dim)
                empty |= not count
                offset += start * stride
                new_shape.append(count)
                new_strides.append(stride)
            else:
                offset += self._position(index, dim) * stride
                if on_chip and dim == 0:
                    new_shape.append(1)
                    new_strides.append(stride)
                else:
                    dropped = stride
        dynamic = self.dynamic
        if empty:
            dynamic = Dynamic("unusable", self._empty(keys), 0)
        rest = len(keys)
        new_shape.extend(shape[rest:])
        new_strides.extend(strides[rest:])
        if len(new_shape) < (2 if on_chip else 1):
            new_shape.append(1)
            new_strides.append(dropped or 1)
        return NkiTensor(
            self.mem, tuple(new_shape), tuple(new_strides), offset, self.dtype, dynamic
        )

    def _empty(self, keys: tuple[Any, ...]) -> ShapeError:
        shown = ", ".join(
            f"{k.start}:{k.stop}" if isinstance(k, slice) else f"nl.ds({k.start}, {k.size})"
            if isinstance(k, DynamicSlice) else str(k)
            for k in keys
        )  # fmt: skip
        return ShapeError(
            f"{self._what()}: the view [{shown}] is empty and nothing can use it; start must be "
            "smaller than end"
        )

    def _plain_keys(self, keys: tuple[Any, ...]) -> tuple[Any, ...]:
        """Expand an Ellipsis, refuse too many indices and indices on an indirect dimension."""
        self._not_indirect()
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
        vector = self.dynamic is not None and self.dynamic.kind == "vector"
        if vector and keys and keys[0] != slice(None):
            raise RuleViolation(
                f"{self._what()}: dimension 0 takes part in the indirection and cannot be indexed; "
                "slice the index tensor instead"
            )
        return keys

    def _dynamic_bounds(self, index: DynamicSlice, dim: int) -> tuple[int, int]:
        start, count = index
        if not (is_int(start) and is_int(count)):
            raise RuleViolation(
                f"{self._what()}: nl.ds({start!r}, {count!r}) needs ints; for a run-time start use "
                ".ap(..., scalar_offset=...) or .select(dim, index)"
            )
        if start < 0 or count < 0 or start + count > self.shape[dim]:
            raise self._outside(f"nl.ds({start}, {count})", dim)
        return int(start), int(count)

    def _position(self, index: Any, dim: int) -> int:
        if not is_int(index):
            raise RuleViolation(
                f"{self._what()}: index {index!r} of type {type(index).__name__}; allowed are int, "
                "slice, Ellipsis and nl.ds(start, size); for run-time indices use .ap(..., "
                "scalar_offset= / vector_offset=) or .select(dim, index)"
            )
        extent = self.shape[dim]
        at = int(index) + extent if index < 0 else int(index)
        if not 0 <= at < extent:
            raise self._outside(str(index), dim)
        return at

    def _bounds(self, index: slice, dim: int) -> tuple[int, int, int]:
        extent = self.shape[dim]
        start, stop, step = index.start, index.stop, index.step
        for bound in (start, stop, step):
            if bound.__class__ is not int and bound is not None and not is_int(bound):
                raise RuleViolation(
                    f"{self._what()}: slice {start!r}:{stop!r}:{step!r} on dimension {dim}; bounds "
                    "are ints: for a run-time start use .ap(..., scalar_offset=...)"
                )
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
                f"{self._what()}: slice step {step} on dimension {dim}; steps are positive: "
                "reverse the data elsewhere"
            )
        if start < 0 or stop > extent:
            raise self._outside(f"{index.start}:{index.stop}", dim)
        if stop < start:
            raise ShapeError(
                f"{self._what()}: slice {index.start}:{index.stop} on dimension {dim} of size "
                f"{extent} is empty; start must be smaller than end"
            )
        count = int(-(-(stop - start) // step))
        if step != 1 and dim == 0 and count > 1 and self.on_chip:
            raise ShapeError(
                f"{self._what()}: slice step {step} on dimension 0; partitions are contiguous: use "
                "step 1, or copy with a DMA"
            )
        return int(start), count, int(step)

    def __setitem__(self, key: Any, value: Any) -> NoReturn:
        """Refused: a NeuronCore has no assignment; use an instruction."""
        raise KernelError(
            f"{self._what()}: assignment to a tensor does not exist on the device; use an "
            "instruction with dst=, for example nisa.tensor_copy(dst=t[...], src=...)"
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
                f"{self._what()}: the tile has a shape but no values, because something written to "
                "it came from an argument without values; pass arrays for every argument it "
                "depends on"
            )
        dynamic = self.dynamic
        self._not_indirect()
        if dynamic is not None and dynamic.kind == "vector":
            return self._gathered(dynamic)
        view = self if dynamic is None else self.resolved("numpy()")
        return poisoned(view, view.dtype)

    def _gathered(self, dynamic: Dynamic) -> Array:
        shape = (1, *self.shape[1:])
        rows = []
        for index in dynamic.index.numpy().T.reshape(-1)[: self.shape[0]]:
            at = self.offset + int(index) * dynamic.scale
            row = NkiTensor(self.mem, shape, self.strides, at, self.dtype)
            row.require_inside(f"numpy() of row {index}")
            rows.append(poisoned(row, row.dtype))
        return np.concatenate(rows)

    def resolved(self, what: str) -> NkiTensor:
        """Return the view with its run-time scalar offset replaced by the value it has now.

        Raises:
            OutOfBounds: the index leads out of the tile, or on chip out of the partition.
        """
        dynamic = self.dynamic
        if dynamic is None or dynamic.kind == "vector":
            return self
        if dynamic.kind == "unusable":
            raise dynamic.index
        index = read_index(dynamic.index)
        moved = self.offset + index * dynamic.scale
        view = NkiTensor(self.mem, self.shape, self.strides, moved, self.dtype)
        view.require_inside(what)
        if self.on_chip and view.start_partition != self.start_partition:
            raise OutOfBounds(
                f"{self._what()}: {what} with index {index} starts in partition "
                f"{view.start_partition}, the view in {self.start_partition}; keep the index "
                "inside the free dimensions"
            )
        return view

    def __repr__(self) -> str:
        region = self.mem.buffer.value if isinstance(self.mem.buffer, Enum) else self.mem.buffer
        return f"<NkiTensor {self.name!r} {list(self.shape)} {self.dtype} in {region}>"

    def __str__(self) -> str:
        if self.mem.abstract:
            return f"{self!r}: shape only"
        try:
            with np.errstate(all="ignore"):
                return f"{self!r}:\n{self.numpy()}"
        except NkiKernelsError as error:  # printing is for debugging and must not end the run
            return f"{self!r}: {error}"

    def _no_value(self, what: str) -> NoReturn:
        raise AbstractValue(
            f"{self._what()}: {what} needs the tile's values while the kernel is being built; on "
            "the device they do not exist yet: use nl.fori_loop, nisa.register_load, or a "
            "compile-time argument"
        )

    def __eq__(self, other: object) -> bool:
        """Identity, so that ``x == None`` works as kernels need it; values cannot be compared."""
        if other is not None and not isinstance(other, NkiTensor):
            self._no_value(f"== {other!r}")
        return self is other

    __hash__ = object.__hash__

    def __bool__(self) -> bool:
        self._no_value("a condition")

    def __int__(self) -> int:
        self._no_value("int()")

    def __float__(self) -> float:
        self._no_value("float()")

    def __index__(self) -> int:
        self._no_value("an index")


def read_index(index: Any) -> int:
    """Return the run-time value of a (1, 1) integer tensor or a register."""
    if isinstance(index, NkiTensor):
        return int(index.numpy().reshape(-1)[0])
    return int(index.read())
