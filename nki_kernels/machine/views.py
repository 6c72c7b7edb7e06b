"""The view methods of a tensor: pure arithmetic on shape, strides and offset.

Source: nki.language NkiTensor docstrings; access-pattern deep dive (NKI 0.6.0).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from nki_kernels.machine.dtypes import DType, as_dtype, int32, uint32
from nki_kernels.machine.errors import OutOfBounds, RuleViolation, ShapeError
from nki_kernels.machine.indirect_view import IndirectViews
from nki_kernels.machine.layout import MAX_DIMS, Dynamic, infer, is_int, reach, restride
from nki_kernels.machine.trace import caller

if TYPE_CHECKING:
    from nki_kernels.machine.memory import Memory
    from nki_kernels.machine.tensor import NkiTensor


class Views(IndirectViews):
    """View methods, mixed into `NkiTensor`; every one returns a new view of the same tile."""

    __slots__ = ()

    if TYPE_CHECKING:
        mem: Memory
        shape: tuple[int, ...]
        strides: tuple[int, ...]
        offset: int
        dtype: DType
        dynamic: Dynamic | None

        @property
        def name(self) -> str:
            """As in `NkiTensor`."""

        @property
        def ndim(self) -> int:
            """As in `NkiTensor`."""

        @property
        def size(self) -> int:
            """As in `NkiTensor`."""

        @property
        def on_chip(self) -> bool:
            """As in `NkiTensor`."""

        @property
        def free_size(self) -> int:
            """As in `NkiTensor`."""

        @property
        def row_elements(self) -> int:
            """As in `NkiTensor`."""

        def __getitem__(self, key: Any) -> NkiTensor: ...

    def _make(
        self,
        shape: tuple[int, ...],
        strides: tuple[int, ...],
        offset: int | None = None,
        dtype: DType | None = None,
        dynamic: Dynamic | None = None,
    ) -> NkiTensor:
        self._not_indirect()
        kind = self.dtype if dtype is None else dtype
        at = self.offset if offset is None else offset
        view: NkiTensor = type(self)(self.mem, shape, strides, at, kind, dynamic)  # type: ignore[call-arg, assignment]
        return view

    def slice(self, dim: int, start: int, end: int, step: int = 1) -> NkiTensor:
        """Return elements start .. end - 1 of `dim`, every `step`-th; 0 <= start < end <= size."""
        self._dim(dim, "slice")
        self._ints((start, end, step), "slice")
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
        if is_int(index):
            if not 0 <= index < self.shape[dim]:
                raise self._outside(f"select({dim}, {index})", dim)
            return self[(slice(None),) * dim + (int(index),)]
        if self.on_chip and dim == 0:
            raise RuleViolation(
                f"{self._what()}: select(0, <run-time index>) on chip; partitions cannot be chosen "
                "at run time: select another dimension, or keep the data in HBM"
            )
        self._one_dynamic("select")
        shape = self.shape[:dim] + self.shape[dim + 1 :]
        strides = self.strides[:dim] + self.strides[dim + 1 :]
        if len(shape) < self._least_dims():
            shape, strides = (*shape, 1), (*strides, 1)
        scalar = Dynamic("scalar", self._scalar_index(index, "select"), self.strides[dim])
        return self._make(shape, strides, self.offset, self.dtype, scalar)

    def vector_select(self, dim: int, vector_offset: NkiTensor) -> NkiTensor:
        """Return a gather view: row i is row ``vector_offset[i]`` of this HBM tensor."""
        if not is_int(dim) or dim != 0 or self.on_chip:
            raise RuleViolation(
                f"{self._what()}: vector_select({dim}, ...); it works on dimension 0 of an HBM "
                "tensor"
            )
        self._one_dynamic("vector_select")
        self._vector_index(vector_offset)
        vector = Dynamic("vector", vector_offset, self.strides[0])
        shape = (vector_offset.shape[0], *self.shape[1:])
        return self._make(shape, self.strides, self.offset, self.dtype, vector)

    def permute(self, dims: Sequence[int]) -> NkiTensor:
        """Return the view with its dimensions in the order `dims`; on chip ``dims[0]`` is 0."""
        order = self._ints(dims, "permute")
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
        self._ints((size,), "broadcast")
        self._keep_partition(dim != 0, f"broadcast({dim}, {size})")
        if self.shape[dim] != 1 or size < 1:
            raise ShapeError(
                f"{self._what()}: broadcast({dim}, {size}) of a dimension of size "
                f"{self.shape[dim]}; only size 1 can be repeated, at least once"
            )
        shape = (*self.shape[:dim], int(size), *self.shape[dim + 1 :])
        strides = (*self.strides[:dim], 0, *self.strides[dim + 1 :])
        return self._with(shape, strides)

    def expand_dim(self, dim: int) -> NkiTensor:
        """Return the view with a new dimension of size 1 at position `dim`."""
        self._ints((dim,), "expand_dim")
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
                f"{self._what()}: squeeze_dim({dim}) of a dimension of size {self.shape[dim]}; "
                "only size 1 can be removed"
            )
        shape = self.shape[:dim] + self.shape[dim + 1 :]
        return self._with(shape, self.strides[:dim] + self.strides[dim + 1 :])

    def reshape_dim(self, dim: int, shape: Sequence[int]) -> NkiTensor:
        """Return the view with `dim` split into `shape`, one entry of which may be -1."""
        self._dim(dim, "reshape_dim")
        parts = infer(self._ints(shape, "reshape_dim"), self.shape[dim])
        if min(parts, default=0) < 1 or math.prod(parts) != self.shape[dim]:
            raise ShapeError(
                f"{self._what()}: reshape_dim({dim}, {tuple(shape)}) does not multiply to "
                f"{self.shape[dim]}; give positive sizes, at most one -1"
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
        if start_dim > end_dim:
            raise ShapeError(
                f"{self._what()}: flatten_dims({start_dim}, {end_dim}); the first dimension comes "
                "first"
            )
        self._keep_partition(start_dim > 0 or end_dim == 0, f"flatten_dims({start_dim}, {end_dim})")
        merged = self.shape[start_dim : end_dim + 1]
        strides = restride(merged, self.strides[start_dim : end_dim + 1], (math.prod(merged),))
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
        new = infer(self._ints(shape, "reshape"), self.size)
        if min(new, default=0) < 1 or math.prod(new) != self.size:
            raise ShapeError(
                f"{self._what()}: reshape{tuple(shape)} has {math.prod(new)} elements, the view "
                f"{self.size}"
            )
        self._keep_partition(new[0] == self.shape[0], f"reshape{tuple(shape)}")
        strides = restride(self.shape, self.strides, new)
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
        patterns = isinstance(src_pattern, (tuple, list)) and isinstance(dst_pattern, (tuple, list))
        if not patterns or not isinstance(fixed_sizes, (dict, type(None))):
            raise ShapeError(
                f"{self._what()}: rearrange({src_pattern!r}, {dst_pattern!r}, {fixed_sizes!r}); "
                "patterns are tuples of names and tuples of names, fixed_sizes a dict: write for "
                "example ('b', ('h', 'w')), ('b', 'w', 'h'), {'h': 4}"
            )
        sizes = dict(fixed_sizes or {})
        groups = [g if isinstance(g, (tuple, list)) else (g,) for g in src_pattern]
        if len(groups) != self.ndim or not all(groups):
            raise ShapeError(
                f"{self._what()}: rearrange pattern {tuple(src_pattern)} has {len(groups)} "
                f"dimensions; name each of the {self.ndim} dimensions of the view"
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
                f"{self._what()}: rearrange {tuple(src_pattern)} -> {tuple(dst_pattern)} must name "
                "the same dimensions once each"
            )
        for name, extent in zip(names, view.shape, strict=True):
            if sizes.get(name, extent) != extent:
                raise ShapeError(
                    f"{self._what()}: rearrange fixed_sizes says {name}={sizes[name]}; the "
                    f"dimension has size {extent}"
                )
        view = view.permute([names.index(n) for n in wanted])
        for dim, group in enumerate(dst_pattern):
            if isinstance(group, (tuple, list)):
                view = view.flatten_dims(dim, dim + len(group) - 1)
        return view

    def view(self, dtype: Any) -> NkiTensor:
        """Return the same bits as another dtype; the last dimension scales with the item size."""
        new = as_dtype(dtype)
        old_size, new_size = self.dtype.itemsize, new.itemsize
        if new_size == old_size:
            return self._make(self.shape, self.strides, self.offset, new, self.dynamic)
        if self.dynamic is not None or (self.strides[-1] != 1 and self.shape[-1] != 1):
            raise ShapeError(
                f"{self._what()}: view({new}) needs a contiguous last dimension and no run-time "
                f"index (strides {self.strides})"
            )
        scaled = [self.offset, self.shape[-1], *self.strides[:-1]]
        if any(v * old_size % new_size for v in scaled):
            raise ShapeError(
                f"{self._what()}: view({new}) of offset {self.offset}, shape {self.shape}, strides "
                f"{self.strides}: {new_size}-byte elements do not divide it"
            )
        offset, last, *rest = (v * old_size // new_size for v in scaled)
        return self._make((*self.shape[:-1], last), (*rest, 1), offset, new)

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
            pattern: ``[[step, count], ...]``, slow to fast, in elements of the new view. On chip
                the first pair is the partition: its step is the tile's elements per partition.
            offset: elements added to this view's own offset; None means 0.
            scalar_offset: a (1, 1) int32/uint32 SBUF tensor or a register; moves the start by its
                value times the product of ``shape[indirect_dim + 1:]``.
            vector_offset: a (P, 1) int32/uint32 SBUF tensor; row i of this HBM tensor starts at
                ``vector_offset[i] * prod(shape[1:])``; the first step is then ignored.
            indirect_dim: which dimension of this view scales the run-time offset.
            dtype: reinterpret the bytes; inherited offsets are rescaled.

        A pattern that leaves the tile is an error where the view is used.
        """
        new = self.dtype if dtype is None else as_dtype(dtype)
        listed = isinstance(pattern, (tuple, list))
        if (
            not listed
            or not self._least_dims() <= len(pattern) <= MAX_DIMS
            or not all(
                isinstance(p, (tuple, list))
                and len(p) == 2
                and is_int(p[0])
                and p[0] >= 0
                and is_int(p[1])
                and p[1] >= 1
                for p in pattern
            )
        ):
            raise ShapeError(
                f"{self._what()}: ap pattern {pattern!r}; allowed are "
                f"{self._least_dims()} to {MAX_DIMS} pairs of ints [step >= 0, count >= 1]"
            )
        if offset is not None:
            self._ints((offset,), "ap offset")
        shape = tuple(int(count) for _, count in pattern)
        strides = tuple(int(step) for step, _ in pattern)
        base, rest = divmod(self.offset * self.dtype.itemsize, new.itemsize)
        if rest:
            raise ShapeError(
                f"{self._what()}: ap as {new} from offset {self.offset}, which is no whole number "
                f"of {new} elements; start the view elsewhere"
            )
        dynamic = self._dynamic(scalar_offset, vector_offset, indirect_dim, new, shape)
        if self.on_chip:
            strides = self._partition_step(shape, strides, new)
        result = self._make(shape, strides, base + (offset or 0), new, dynamic)
        outside = None if dynamic is not None else result.outside("ap")
        if outside is not None:
            result.dynamic = Dynamic("unusable", outside, 0)
        return result

    def _dynamic(
        self, scalar: Any, vector: NkiTensor | None, dim: int, dtype: DType, shape: tuple[int, ...]
    ) -> Dynamic | None:
        if scalar is None and vector is None:
            return None
        if scalar is not None and vector is not None:
            raise RuleViolation(
                f"{self._what()}: ap takes scalar_offset or vector_offset, not both"
            )
        self._one_dynamic("ap")
        if dtype.itemsize != self.dtype.itemsize:
            raise RuleViolation(
                f"{self._what()}: ap with a run-time offset and dtype={dtype} of another size; the "
                "unit of the offset is undocumented: reinterpret first"
            )
        self._dim(dim, "ap indirect_dim")
        scale = math.prod(self.shape[dim + 1 :])
        if scalar is not None:
            if self.on_chip and dim == 0:
                raise RuleViolation(
                    f"{self._what()}: scalar_offset on the partition dimension; partitions cannot "
                    "be chosen at run time: pass indirect_dim >= 1, or keep the data in HBM"
                )
            return Dynamic("scalar", self._scalar_index(scalar, "scalar_offset"), scale)
        if self.on_chip or dim != 0:
            raise RuleViolation(
                f"{self._what()}: vector_offset works on dimension 0 of an HBM tensor"
            )
        index = self._vector_index(vector)
        # Several columns of indices belong to dma_transpose, whose rules count them.
        if index.size == index.shape[0] != shape[0]:
            raise ShapeError(
                f"{self._what()}: vector_offset has {index.shape[0]} rows, the pattern {shape[0]}; "
                "they must agree: slice one of them"
            )
        return Dynamic("vector", index, scale)

    def _scalar_index(self, index: Any, what: str) -> Any:
        """Return a run-time index if it is a register or one 32-bit integer in SBUF."""
        if isinstance(index, Views):
            place = index.mem.tile.memory
            if index.size == 1 and index.dtype in (int32, uint32) and place == "sbuf":
                return index
        elif hasattr(index, "read"):
            return index
        raise RuleViolation(
            f"{self._what()}: {what} by {index!r}; a run-time index is a register or one int32 or "
            "uint32 element in SBUF: load it there"
        )

    def _vector_index(self, index: Any) -> NkiTensor:
        if not isinstance(index, Views):
            raise RuleViolation(
                f"{self._what()}: vector_offset={index!r}; it must be an SBUF tile of row numbers"
            )
        return index  # type: ignore[return-value]

    def _partition_step(
        self, shape: tuple[int, ...], strides: tuple[int, ...], dtype: DType
    ) -> tuple[int, ...]:
        row, rest = divmod(self.mem.tile.row_bytes, dtype.itemsize)
        if rest:
            raise ShapeError(
                f"{self._what()}: ap as {dtype} of partitions of {self.mem.tile.row_bytes} bytes, "
                f"which are no whole number of {dtype} elements; use a narrower dtype"
            )
        own = self.free_size * self.dtype.itemsize // dtype.itemsize
        if strides[0] == row or shape[0] == 1 or strides[0] == own:
            return (row, *strides[1:])
        raise ShapeError(
            f"{self._what()}: ap partition step {strides[0]}; the first pair walks partitions, so "
            f"its step is the tile's {row} elements of {dtype} per partition"
        )

    def require_inside(self, what: str) -> None:
        """Raise OutOfBounds if any element lies outside the tile."""
        error = self.outside(what)
        if error is not None:
            raise error

    def outside(self, what: str) -> OutOfBounds | None:
        """The error of a view with elements outside its tile, None if all are inside."""
        limit = self.mem.nbytes // self.dtype.itemsize
        row = self.row_elements if self.on_chip else None
        problem = reach(self.shape, self.strides, self.offset, limit, row)
        return None if problem is None else OutOfBounds(f"{self._what()}: {what} {problem}")

    def _with(self, shape: tuple[int, ...], strides: tuple[int, ...]) -> NkiTensor:
        if not self._least_dims() <= len(shape) <= MAX_DIMS:
            raise ShapeError(
                f"{self._what()}: a view of {len(shape)} dimensions; it has {self._least_dims()} "
                f"to {MAX_DIMS} (on chip a partition and a free one): keep a dimension of size 1"
            )
        return self._make(shape, strides, self.offset, self.dtype, self.dynamic)

    def _least_dims(self) -> int:
        return 2 if self.on_chip else 1

    def _what(self) -> str:
        return f"{caller()}: tensor {self.name!r} {list(self.shape)}"

    def _outside(self, index: str, dim: int) -> OutOfBounds:
        return OutOfBounds(
            f"{self._what()}: index {index} is outside dimension {dim} of size {self.shape[dim]}; "
            f"indices run from {-self.shape[dim]} (counting from the end) to "
            f"{self.shape[dim] - 1}, ends to {self.shape[dim]}"
        )

    def _dim(self, dim: int, what: str) -> None:
        if not is_int(dim) or not 0 <= dim < self.ndim:
            raise ShapeError(
                f"{self._what()}: {what} on dimension {dim!r}; it has {self.ndim}, numbered from 0"
            )

    def _ints(self, values: Any, what: str) -> tuple[int, ...]:
        """Return `values` as a tuple if it is a sequence of ints."""
        if isinstance(values, (tuple, list)) and all(is_int(v) for v in values):
            return tuple(values)
        raise ShapeError(
            f"{self._what()}: {what} of {values!r}; it takes ints: for a run-time position use "
            "select, or ap with scalar_offset"
        )

    def _keep_partition(self, kept: bool, what: str) -> None:
        if not kept and (
            self.on_chip or (self.dynamic is not None and self.dynamic.kind == "vector")
        ):
            raise ShapeError(
                f"{self._what()}: {what} would change dimension 0, which is the partition (or the "
                "indirect) dimension; it must stay first and whole"
            )

    def _one_dynamic(self, what: str) -> None:
        if self.dynamic is not None:
            raise RuleViolation(
                f"{self._what()}: {what} on a view that already has a run-time index; only one is "
                "possible"
            )
