"""The view whose columns are chosen at run time (gen4)."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

from nki_kernels.machine.dtypes import DType, int32, uint16, uint32
from nki_kernels.machine.errors import RuleViolation
from nki_kernels.machine.layout import Dynamic, is_int

if TYPE_CHECKING:
    from nki_kernels.machine.memory import Memory
    from nki_kernels.machine.tensor import NkiTensor


class IndirectViews:
    """`indirect`, mixed into the views of a tensor."""

    __slots__ = ()

    if TYPE_CHECKING:
        mem: Memory
        shape: tuple[int, ...]
        strides: tuple[int, ...]
        offset: int
        dtype: DType
        dynamic: Dynamic | None

        def _what(self) -> str: ...

    def indirect(self, index: Any, num_elem: int | None = None) -> NkiTensor:
        """Return columns chosen at run time: an operand that is gathered or scattered (gen4).

        Column i of a partition is at free offset ``index[g + i % G, i // G]``, where g is the first
        partition of its group of G: 16, or 32 on the Tensor engine. Offsets count elements of this
        view's free dimensions, flattened.

        Args:
            index: an SBUF tile of uint16, int32 or uint32 with as many partitions.
            num_elem: columns; ``index.size`` by default, which is right for a single group.

        Raises:
            RuleViolation: operands that are no tiles, or have a run-time address already.
        """
        what = f"{self._what()}: indirect"
        if self.mem.tile.memory == "hbm":
            raise RuleViolation(
                f"{what} in HBM; it works in SBUF and PSUM: gather with ap(vector_offset=...)"
            )
        if self.dynamic is not None:
            raise RuleViolation(f"{what} on a view with a run-time index; only one is possible")
        if (
            not isinstance(index, IndirectViews)
            or index.mem.tile.memory != "sbuf"
            or index.dtype not in (int32, uint32, uint16)
            or index.dynamic is not None
        ):
            raise RuleViolation(
                f"{what} by {index!r}; offsets are an SBUF tile of uint16, int32 or uint32"
            )
        if index.shape[0] != self.shape[0]:
            raise RuleViolation(
                f"{what} by offsets in {index.shape[0]} partitions; both need equally many: slice "
                "one"
            )
        count = math.prod(index.shape) if num_elem is None else num_elem
        if not is_int(count) or count < 1:
            raise RuleViolation(f"{what} num_elem={num_elem!r}; it must be a positive int")
        # Only the partition stride means anything: columns are where the offsets say.
        view: NkiTensor = type(self)(  # type: ignore[call-arg, assignment]
            self.mem, (self.shape[0], int(count)), (self.strides[0], 0), self.offset, self.dtype,
            Dynamic("indirect", index, 0, self),
        )  # fmt: skip
        return view

    def _not_indirect(self) -> None:
        """Refuse what an indirect view cannot do."""
        if self.dynamic is not None and self.dynamic.kind == "indirect":
            raise RuleViolation(
                f"{self._what()}: an indirect view is an operand and nothing else; take views and "
                "values before .indirect()"
            )
