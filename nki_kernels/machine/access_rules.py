"""Rules about which elements of an operand a call touches: columns by offsets, parts never read."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeAlias

from nki_kernels.hardware.spec import Engine
from nki_kernels.machine.indirection import group_size
from nki_kernels.machine.rules import Operands, Rule, memory
from nki_kernels.machine.tensor import NkiTensor

#: From the name of an operand and all arguments: the views of it that are read, None for all.
Parts: TypeAlias = Callable[[str, tuple[Any, ...]], list[NkiTensor] | None]


@dataclass(frozen=True, init=False)
class TensorIndirection(Rule):
    """Which operands may be indirect views (gen4), and where they and their offsets lie.

    Gathered operands start where their offsets do; the offsets of a scattered dst where the first
    source does. Source: "Tensor indirection" in nki.isa.
    """

    operands: tuple[str, ...]

    def __init__(self, *operands: str) -> None:
        object.__setattr__(self, "operands", operands)

    def problem(self, ops: Operands) -> str | None:
        """Return what is wrong, or None."""
        used = [(n, v) for n, v in ops.tensors() if v.dynamic and v.dynamic.kind == "indirect"]
        if used and ops.spec.generation < 4:
            return f"{used[0][0]} is an indirect view on {ops.spec.name}; it needs gen4: copy it"
        for name, view in used:
            if name not in self.operands:
                legal = ", ".join(self.operands) or "no operand"
                return f"{name} is an indirect view; {ops.opcode} takes {legal} so: copy it first"
            found = self._place(ops, name, view) or self._group(ops, name, view)
            if found is not None:
                return found
        return None

    def _group(self, ops: Operands, name: str, view: NkiTensor) -> str | None:
        group = group_size(ops.engine, ops.spec)
        index = view.dynamic.index if view.dynamic else view
        if view.shape[0] % group:
            return (
                f"{name} {list(view.shape)} is an indirect view; on the {ops.engine.name} engine "
                f"{group} partitions share their offsets: use a multiple of {group}"
            )
        held = group * index.free_size
        if view.shape[1] > held:
            return (
                f"{name} {list(view.shape)} is an indirect view of {view.shape[1]} columns; its "
                f"index {list(index.shape)} holds {held} offsets for a group of {group}: pass "
                "num_elem"
            )
        return None

    def _place(self, ops: Operands, name: str, view: NkiTensor) -> str | None:
        index = view.dynamic.index if view.dynamic else view
        start = _start(index)
        if start % ops.spec.quadrant:
            return (
                f"the index of {name} starts at partition {start}; it must be a multiple of "
                f"{ops.spec.quadrant}: move it with a DMA"
            )
        if name != "dst":
            if _start(view) != start:
                return (
                    f"{name} starts at partition {_start(view)}, its index at {start}; they must "
                    "start together: slice one"
                )
            return None
        if ops.engine is Engine.scalar and memory(view) == "psum":
            return "dst is an indirect view in PSUM; the scalar engine scatters to SBUF only"
        source = next((v for n, v in ops.tensors() if n in self.operands and n != "dst"), None)
        if source is not None and memory(source) == "sbuf" and _start(source) != start:
            return (
                f"the index of dst starts at partition {start}, the data at {_start(source)}; they "
                "must start together: slice one"
            )
        return None

    def __str__(self) -> str:
        names = ", ".join(f"`{n}`" for n in self.operands)
        return f"{names or 'no operand'} may be an indirect view (gen4)"


def _start(view: NkiTensor) -> int:
    """Return the first partition of a view, counting a fixed address."""
    fixed = view.mem.tile.address
    return view.start_partition + (fixed[0] if fixed else 0)


@dataclass(frozen=True)
class PartlyRead(Rule):
    """Not all of an operand is read: what is not need not have been written."""

    parts: Parts

    def problem(self, ops: Operands) -> str | None:
        """Return what is wrong, or None."""
        return None

    def __str__(self) -> str:
        return "parts of an operand are never read"
