"""Operand rules as values: a rule checks a call, prints its own error, and documents itself.

Rules are pure functions of operand signatures, so a verdict is remembered per signature and a rule
runs once per distinct call, not once per instruction.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np

from nki_kernels.hardware.spec import CoreSpec, Engine
from nki_kernels.machine.dtypes import DType
from nki_kernels.machine.tensor import NkiTensor


class Operands:
    """The arguments of one call by name, its engine, and the core it runs on."""

    def __init__(
        self, opcode: str, names: tuple[str, ...], args: tuple[Any, ...], spec: CoreSpec
    ) -> None:
        self.opcode = opcode
        self.values = dict(zip(names, args, strict=True))
        self.spec = spec
        self.engine = Engine.unknown
        #: Operands in HBM that are refused already: one report each.
        self.misplaced: set[str] = set()

    def __getitem__(self, name: str) -> Any:
        return self.values[name]

    def tensor(self, name: str) -> NkiTensor | None:
        """Return the operand if it is a tensor, else None (absent, or a scalar)."""
        value = self.values[name]
        return value if isinstance(value, NkiTensor) else None

    def tensors(self) -> Iterator[tuple[str, NkiTensor]]:
        """Every tensor operand with its name."""
        for name, value in self.values.items():
            if isinstance(value, NkiTensor):
                yield name, value


def memory(view: NkiTensor) -> str:
    """Return "sbuf", "psum" or "hbm"."""
    return view.mem.tile.memory


@dataclass(frozen=True)
class Rule:
    """Base of operand rules.

    Attributes:
        check: the option that sets the level.
        about: what it limits: "buffers", "sizes", "dtypes", or "rules" for anything else. The
            generated pages and docstrings sort by it.
    """

    check: ClassVar[str] = "operands"
    about: ClassVar[str] = "rules"

    def since(self) -> int:
        """Return the first generation on which a call can keep the rule."""
        return 2

    def problem(self, ops: Operands) -> str | None:
        """Return what is wrong (what is, what is allowed, what to do), or None."""
        raise TypeError(f"{type(self).__name__} states no condition")


@dataclass(frozen=True, init=False)
class BufferIs(Rule):
    """The operand lives in one of the named memories."""

    about: ClassVar[str] = "buffers"
    check: ClassVar[str] = "buffer"
    operand: str
    allowed: tuple[str, ...]
    remedy: str

    def __init__(self, operand: str, *allowed: str, remedy: str = "") -> None:
        object.__setattr__(self, "operand", operand)
        object.__setattr__(self, "allowed", allowed)
        object.__setattr__(self, "remedy", remedy)

    def problem(self, ops: Operands) -> str | None:
        view = ops.tensor(self.operand)
        if view is None or memory(view) in self.allowed or self.operand in ops.misplaced:
            return None
        where = " or ".join(m.upper() for m in self.allowed)
        remedy = self.remedy or f"copy it to {self.allowed[0].upper()} first"
        return f"{self.operand} is in {memory(view).upper()}; it must be in {where}: {remedy}"

    def __str__(self) -> str:
        return f"`{self.operand}` in {' or '.join(m.upper() for m in self.allowed)}"


@dataclass(frozen=True, init=False)
class SameExtent(Rule):
    """The operands agree in partitions and in elements per partition; free shapes may differ."""

    about: ClassVar[str] = "sizes"
    operands: tuple[str, ...]

    def __init__(self, *operands: str) -> None:
        object.__setattr__(self, "operands", operands)

    def problem(self, ops: Operands) -> str | None:
        present = [(n, v) for n in self.operands if (v := ops.tensor(n)) is not None]
        extents = {(v.shape[0], v.free_size) for _, v in present}
        if len(extents) <= 1:
            return None
        given = ", ".join(f"{n} {list(v.shape)}" for n, v in present)
        return (
            f"{given}: partitions and elements per partition must agree; slice or reshape the "
            "operands to one size"
        )

    def __str__(self) -> str:
        return " and ".join(f"`{n}`" for n in self.operands) + " of equal extent [P, N]"


@dataclass(frozen=True, init=False)
class SameSize(Rule):
    """The operands have the same number of elements in all."""

    about: ClassVar[str] = "sizes"
    operands: tuple[str, ...]

    def __init__(self, *operands: str) -> None:
        object.__setattr__(self, "operands", operands)

    def problem(self, ops: Operands) -> str | None:
        present = [(n, v) for n in self.operands if (v := ops.tensor(n)) is not None]
        if len({v.size for _, v in present}) <= 1:
            return None
        given = ", ".join(f"{n} {list(v.shape)} ({v.size} elements)" for n, v in present)
        return f"{given}: element counts must be equal; slice one of them"

    def __str__(self) -> str:
        return " and ".join(f"`{n}`" for n in self.operands) + " of equal element count"


@dataclass(frozen=True, init=False)
class SameDtype(Rule):
    """The operands have one dtype."""

    about: ClassVar[str] = "dtypes"
    operands: tuple[str, ...]

    def __init__(self, *operands: str) -> None:
        object.__setattr__(self, "operands", operands)

    def problem(self, ops: Operands) -> str | None:
        present = [(n, v) for n in self.operands if (v := ops.tensor(n)) is not None]
        if len({v.dtype for _, v in present}) <= 1:
            return None
        given = ", ".join(f"{n} {v.dtype}" for n, v in present)
        return f"{given}: dtypes must be equal; convert with tensor_copy first"

    def __str__(self) -> str:
        return " and ".join(f"`{n}`" for n in self.operands) + " of one dtype"


@dataclass(frozen=True)
class DtypeIn(Rule):
    """The operand's dtype is one of a set."""

    about: ClassVar[str] = "dtypes"
    operand: str
    allowed: tuple[DType, ...]

    def problem(self, ops: Operands) -> str | None:
        view = ops.tensor(self.operand)
        if view is None or view.dtype in self.allowed:
            return None
        names = ", ".join(str(d) for d in self.allowed)
        return f"{self.operand} is {view.dtype}; allowed are {names}: convert it first"

    def __str__(self) -> str:
        return f"`{self.operand}` of " + ", ".join(str(d) for d in self.allowed)


@dataclass(frozen=True)
class AtMost(Rule):
    """Extents bounded by a number of the core: partitions (dimension 0) or free elements."""

    about: ClassVar[str] = "sizes"
    operand: str
    partitions: str | None = None
    free: str | None = None

    def problem(self, ops: Operands) -> str | None:
        view = ops.tensor(self.operand)
        if view is None:
            return None
        for extent, field, what in (
            (view.shape[0], self.partitions, "partitions"),
            (view.free_size, self.free, "elements per partition"),
        ):
            if field is not None and extent > getattr(ops.spec, field):
                limit = getattr(ops.spec, field)
                return (
                    f"{self.operand} {list(view.shape)} has {extent} {what}; at most {limit} on "
                    f"{ops.spec.name}: tile it"
                )
        return None

    def __str__(self) -> str:
        bounds = [
            f"{f} {what}" for f, what in ((self.partitions, "rows"), (self.free, "columns")) if f
        ]
        return f"`{self.operand}` at most {', '.join(bounds)}"


@dataclass(frozen=True)
class PerPartition(Rule):
    """The operand, where it is a tensor, is one element per partition: [P, 1] of `like`."""

    about: ClassVar[str] = "sizes"
    operand: str
    like: str

    def problem(self, ops: Operands) -> str | None:
        view, like = ops.tensor(self.operand), ops.tensor(self.like)
        if view is None or like is None:
            return None
        if view.shape[0] == like.shape[0] and view.free_size == 1:
            return None
        return (
            f"{self.operand} {list(view.shape)}; a vector operand is [{like.shape[0]}, 1], one "
            f"element per partition of {self.like} {list(like.shape)}: slice it, or use "
            "tensor_tensor"
        )

    def __str__(self) -> str:
        return f"`{self.operand}` a scalar or [P, 1]"


@dataclass(frozen=True, init=False)
class NotAllIn(Rule):
    """At least one of the operands lives outside `buffer`."""

    about: ClassVar[str] = "buffers"
    check: ClassVar[str] = "buffer"
    buffer: str
    operands: tuple[str, ...]

    def __init__(self, buffer: str, *operands: str) -> None:
        object.__setattr__(self, "buffer", buffer)
        object.__setattr__(self, "operands", operands)

    def problem(self, ops: Operands) -> str | None:
        views = [ops.tensor(n) for n in self.operands]
        if not all(v is not None and memory(v) == self.buffer for v in views):
            return None
        return (
            f"{' and '.join(self.operands)} are all in {self.buffer.upper()}; at most "
            f"{len(self.operands) - 1} may be: copy one to SBUF with tensor_copy"
        )

    def __str__(self) -> str:
        return f"not all of {', '.join(f'`{n}`' for n in self.operands)} in {self.buffer.upper()}"


@dataclass(frozen=True)
class OnChipOperands(Rule):
    """Every tensor operand is a tile in SBUF or PSUM."""

    about: ClassVar[str] = "buffers"
    check: ClassVar[str] = "buffer"

    def problem(self, ops: Operands) -> str | None:
        found = []
        for name, view in ops.tensors():
            if memory(view) == "hbm":
                ops.misplaced.add(name)
                remedy = "write a tile and store it" if name == "dst" else "load it"
                found.append(
                    f"{name} {list(view.shape)} is in HBM; compute engines reach SBUF and PSUM "
                    f"only: {remedy} with dma_copy"
                )
        return "; and ".join(found) or None

    def __str__(self) -> str:
        return "tensor operands in SBUF or PSUM"


@dataclass(frozen=True)
class PartitionCount(Rule):
    """A compute operand has no more partitions than the core."""

    about: ClassVar[str] = "sizes"

    def problem(self, ops: Operands) -> str | None:
        for name, view in ops.tensors():
            if view.shape[0] > ops.spec.partitions:
                return (
                    f"{name} partition dimension {view.shape[0]} exceeds maximum "
                    f"{ops.spec.partitions}; tile it"
                )
        return None

    def __str__(self) -> str:
        return "no more partitions than the core has"


#: An access pattern encodes the size of a free dimension in 16 bits, its step in 16 with a sign.
LONGEST, FURTHEST = int(np.iinfo(np.uint16).max), int(np.iinfo(np.int16).max)


@dataclass(frozen=True)
class Encodable(Rule):
    """The ISA has a field for every size and step of an operand's free dimensions.

    Source: architecture guide, data access: a size is a uint16, a step an int16, in elements.
    """

    about: ClassVar[str] = "sizes"
    check: ClassVar[str] = "access_pattern"

    def problem(self, ops: Operands) -> str | None:
        for name, view in ops.tensors():
            if memory(view) == "hbm":
                continue
            for dim, (extent, step) in enumerate(zip(view.shape, view.strides, strict=True)):
                if dim == 0 or extent == 1:
                    continue
                if extent > LONGEST:
                    return (
                        f"{name} {list(view.shape)} has {extent} elements in dimension {dim}; an "
                        f"access pattern counts to {LONGEST}: reshape it into more dimensions, or "
                        "split it"
                    )
                if step > FURTHEST:
                    return (
                        f"{name} {list(view.shape)} steps {step} elements in dimension {dim}; an "
                        f"access pattern steps at most {FURTHEST}: split the operand along it"
                    )
        return None

    def __str__(self) -> str:
        return f"free dimensions of at most {LONGEST} elements, steps of at most {FURTHEST}"


@dataclass(frozen=True)
class StartPartition(Rule):
    """An operand of P partitions starts where a quadrant group can hold it.

    P up to one quadrant: a multiple of the quadrant; up to two: a multiple of two; more: 0.
    Source: NeuronCore architecture guide, "partition access".
    """

    check: ClassVar[str] = "start_partition"
    about: ClassVar[str] = "sizes"

    def problem(self, ops: Operands) -> str | None:
        quadrant = ops.spec.quadrant
        for name, view in ops.tensors():
            if memory(view) == "hbm":
                continue
            fixed = view.mem.tile.address
            start = view.start_partition + (fixed[0] if fixed else 0)
            span = view.shape[0]
            step = quadrant if span <= quadrant else 2 * quadrant if span <= 2 * quadrant else 0
            if (start % step if step else start) == 0:
                continue
            allowed = range(0, ops.spec.partitions, step) if step else (0,)
            return (
                f"{name} covers {span} partitions from {start}; {span} partitions may start at "
                f"{', '.join(map(str, allowed))}: move the data with a DMA, or split the operand"
            )
        return None

    def __str__(self) -> str:
        return "operands start at a partition their size allows"


@dataclass(frozen=True)
class EngineReach(Rule):
    """GpSimd reaches SBUF only."""

    about: ClassVar[str] = "buffers"
    check: ClassVar[str] = "buffer"

    def problem(self, ops: Operands) -> str | None:
        if ops.engine is not Engine.gpsimd:
            return None
        for name, view in ops.tensors():
            if memory(view) == "psum":
                return (
                    f"{name} is in PSUM and the engine is gpsimd, which reaches SBUF only: use the "
                    "vector or scalar engine, or copy to SBUF first"
                )
        return None

    def __str__(self) -> str:
        return "no PSUM operand on GpSimd"


#: Rules of every compute instruction (a DMA has its own).
COMPUTE: tuple[Rule, ...] = (
    OnChipOperands(),
    PartitionCount(),
    EngineReach(),
    StartPartition(),
    Encodable(),
)
