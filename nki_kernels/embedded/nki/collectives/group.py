"""Who takes part in a collective, the checks they share, and where they meet.

A collective blocks: no rank goes on before every rank of its group has called it. On two cores
(LNC2) tensors in shared HBM belong to the rank, so both cores call and it is one operation of all
of them, ordered like a barrier on its tensors; tiles in SBUF and private HBM belong to a core, and
core c meets the cores c of the other ranks. (The documents do not say; published kernels do both.)
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from nki_kernels.hardware.spec import Engine
from nki_kernels.machine import work
from nki_kernels.machine.core import Run, current
from nki_kernels.machine.cores import Offer, meet, put, taken, world
from nki_kernels.machine.dtypes import Array
from nki_kernels.machine.errors import KernelError, RuleViolation
from nki_kernels.machine.handles import NkiInstruction
from nki_kernels.machine.layout import is_int
from nki_kernels.machine.memory import uninitialized
from nki_kernels.machine.operators import operator
from nki_kernels.machine.tensor import MemoryRegion, NKIObject, NkiTensor
from nki_kernels.machine.trace import MEETING, where

OPERATORS = ("add", "minimum", "maximum")


@dataclass
class ReplicaGroup(NKIObject):
    """Disjoint groups of ranks; a collective runs within each group on its own.

    Args:
        groups: a list of lists of rank numbers. The order within a group is that of gathered
            parts, of the summation, and of the ring.
    """

    groups: Any

    def __post_init__(self) -> None:
        """Refuse anything but disjoint, non-empty lists of ranks."""
        groups = self.groups
        wanted = "it must be a list of disjoint, non-empty lists of rank numbers"
        if not isinstance(groups, (list, tuple)) or not groups:
            raise RuleViolation(f"ReplicaGroup: {groups!r}; {wanted}: [[0, 1], [2, 3]]")
        seen: set[int] = set()
        for group in groups:
            if not isinstance(group, (list, tuple)) or not group:
                raise RuleViolation(f"ReplicaGroup: group {group!r}; {wanted}: [[0, 1], [2, 3]]")
            for rank in group:
                if not is_int(rank) or rank < 0:
                    raise RuleViolation(f"ReplicaGroup: rank {rank!r}; ranks are ints from 0 up")
                if rank in seen:
                    raise RuleViolation(
                        f"ReplicaGroup: rank {rank} is in {groups!r} twice; groups are disjoint: "
                        "leave it in one"
                    )
                seen.add(int(rank))

    def of(self, run: Run, what: str) -> tuple[int, ...]:
        """Return the group of the rank that calls; every rank named must exist."""
        ranks = len(world(run))
        for group in self.groups:
            for rank in group:
                if rank >= ranks:
                    raise KernelError(
                        f"{what}: rank {rank} of {self.groups!r} does not exist in a world of "
                        f"{ranks}; run the kernel with nki_kernels.machine.ranks.launch_ranks, one "
                        "set of arguments per rank"
                    )
        for group in self.groups:
            if run.rank in group:
                return tuple(int(rank) for rank in group)
        raise KernelError(
            f"{what}: rank {run.rank} is in none of the groups {self.groups!r}; add it, or leave "
            "the call out on this rank"
        )


@dataclass(slots=True)
class Given:
    """What a core brings: its tensors, and what must be the same on every rank.

    `reads` are the operands that must have been written, by name: the sources unless it says so.
    `counts` is the part of the metadata that the collective writes.
    """

    srcs: tuple[NkiTensor, ...]
    dsts: tuple[NkiTensor, ...]
    settings: tuple[Any, ...] = ()
    metadata: NkiTensor | None = None
    reads: tuple[tuple[str, NkiTensor], ...] | None = None
    counts: NkiTensor | None = None

    @property
    def form(self) -> tuple[Any, ...]:
        """Shapes and dtypes, for the comparison between ranks."""
        return tuple((v.shape, str(v.dtype)) for v in (*self.srcs, *self.dsts))


class Reduction(NamedTuple):
    """An operator and its function of two float32 arrays."""

    name: str
    apply: Callable[..., Array]


class Collective:
    """One call of one collective on one core."""

    def __init__(self, name: str) -> None:
        self.run = current(f"nki.collectives.{name}")
        self.opcode = f"nki.collectives.{name}"
        self.site = self.run.site(2)
        self.what = f"{self.opcode} at {where(self.site)}"

    def refuse(self, says: str) -> RuleViolation:
        """Build the error for a broken rule."""
        return RuleViolation(f"{self.what}: {says}")

    def group(self, replica_group: Any) -> tuple[int, ...]:
        """Return the ranks of this rank's group."""
        if not isinstance(replica_group, ReplicaGroup):
            raise self.refuse(f"replica_group={replica_group!r}; it must be a ReplicaGroup")
        return replica_group.of(self.run, self.what)

    def tensors(
        self, name: str, value: Any, *, sbuf: bool = True, most: int | None = None
    ) -> tuple[NkiTensor, ...]:
        """Return a list operand, each tensor of it where it may be."""
        if not isinstance(value, (list, tuple)) or not value:
            raise self.refuse(f"{name}={value!r}; it must be a list of tensors: [tensor]")
        for at, view in enumerate(value):
            self._tensor(f"{name}[{at}]", view, sbuf)
        if most is not None and len(value) > most:
            raise self.refuse(f"{name} has {len(value)} tensors; at most {most}: call it for each")
        return tuple(value)

    def _tensor(self, name: str, view: Any, sbuf: bool) -> None:
        if not isinstance(view, NkiTensor):
            raise self.refuse(f"{name} is {type(view).__name__}; it must be a tensor")
        memory = view.mem.tile.memory
        allowed = "HBM or SBUF" if sbuf else "HBM"
        if memory == "psum" or (memory == "sbuf" and not sbuf):
            raise self.refuse(f"{name} is in {memory.upper()}; it must be in {allowed}: copy it")
        if memory == "sbuf" and view.ndim != 2:
            raise self.refuse(
                f"{name} {list(view.shape)} in SBUF; collectives take 2-D tiles there: reshape it"
            )
        if view.dynamic is not None:
            raise self.refuse(f"{name} has a run-time address; copy it with dma_copy first")
        if view.mem.tile.role == "input":
            raise self.refuse(
                f"{name} {view.name!r} is an argument of the kernel, which collectives do not "
                "reach (nki-library, test_collectives.py); copy it to an nl.shared_hbm tensor first"
            )

    def together(self, srcs: Sequence[NkiTensor], dsts: Sequence[NkiTensor]) -> None:
        """All tensors in one memory; several of them only in HBM."""
        memories = {v.mem.tile.memory for v in (*srcs, *dsts)}
        if len(memories) > 1:
            raise self.refuse("tensors in SBUF and in HBM; all must be in one of them")
        if len(srcs) != len(dsts):
            raise self.refuse(f"{len(srcs)} srcs and {len(dsts)} dsts; they must be as many")
        if len(srcs) > 1 and memories == {"sbuf"}:
            raise self.refuse(f"{len(srcs)} tensors in SBUF; several at once must be in HBM")
        for at, (src, dst) in enumerate(zip(srcs, dsts, strict=True)):
            if src.dtype != dst.dtype:
                raise self.refuse(
                    f"srcs[{at}] {src.dtype}, dsts[{at}] {dst.dtype}; dtypes must be equal"
                )

    def shapes(self, at: int, dst: NkiTensor, wanted: tuple[int, ...], why: str) -> None:
        """Refuse a dst of another shape."""
        if dst.shape != wanted:
            raise self.refuse(f"dsts[{at}] {list(dst.shape)}; it must be {list(wanted)}: {why}")

    def dimension(self, value: Any, allowed: tuple[int, ...]) -> None:
        """Refuse a collective_dim that is not supported."""
        if not is_int(value) or value not in allowed:
            either = " or ".join(map(str, allowed))
            raise self.refuse(f"collective_dim={value!r}; it must be {either} for these tensors")

    def reduction(self, op: Any) -> Reduction:
        """Return the operator of a reduction."""
        found = operator(op)
        if found.name not in OPERATORS or found.alu is None:
            raise self.refuse(f"op={found!r}; it must be nl.add, nl.minimum or nl.maximum")
        return Reduction(found.name, found.alu)

    def priority(self, value: Any) -> None:
        """Refuse a DMA priority the generation does not have."""
        if value is None:
            return
        if self.run.spec.generation < 4 or not is_int(value) or value not in (0, 1, 2, 3):
            raise self.refuse(
                f"priority={value!r} on {self.run.spec.name}; it must be None, or 0 to 3 on gen4"
            )

    def exchange(
        self,
        ranks: tuple[int, ...],
        given: Given,
        move: Callable[[list[Given]], None],
        name: str | None = None,
    ) -> NkiInstruction:
        """Meet the other ranks; the last to arrive moves the values for all.

        Args:
            ranks: the group, in order.
            given: what this core brings.
            move: called once with what each rank brings, in the group's order.
            name: label of the instruction.
        """
        run = self.run
        both = run.lnc > 1 and self._belongs_to_rank(given)
        rows = [world(run)[rank] for rank in ranks]
        members = [r for row in rows for r in (row if both else row[run.core : run.core + 1])]
        offer = Offer(run, self.opcode, self.site, given)
        scope = "both" if both else run.core
        width = run.lnc if both else 1

        def complete(offers: list[Offer]) -> None:
            _agree(offers, width)
            for each in offers[::width]:
                _written(each)
            move([each.given for each in offers[::width]])
            for at, each in enumerate(offers):
                _copy_counts(offers[at - at % width].given, each.given)
                _record(each, width, both)

        meet(offer, ("collective", ranks, scope), members, complete)
        if name is not None and offer.event is not None:
            run.trace.names.setdefault((run.core, name), []).append(offer.event)
        return NkiInstruction(offer.event)

    def _belongs_to_rank(self, given: Given) -> bool:
        regions = {v.buffer is MemoryRegion.shared_hbm for v in (*given.srcs, *given.dsts)}
        if len(regions) > 1:
            raise self.refuse("tensors in private and in shared HBM; all must be in one of them")
        return regions == {True}


def _agree(offers: list[Offer], width: int) -> None:
    """Every rank calls the same collective, alike; both cores of a rank name the same tensors."""
    first = offers[0]
    for other in offers[1:]:
        if other.opcode != first.opcode:
            raise KernelError(
                f"collectives: {first} calls {first.opcode}, {other} calls {other.opcode}; all "
                "ranks of a group must make the same calls in the same order"
            )
        mine, theirs = first.given, other.given
        if mine.settings != theirs.settings:
            raise KernelError(
                f"{first.opcode}: {first} asks for {mine.settings!r}, {other} for "
                f"{theirs.settings!r}; they must be equal on all ranks"
            )
        if mine.form != theirs.form:
            raise KernelError(
                f"{first.opcode}: {first} has {_shown(mine)}, {other} has {_shown(theirs)}; shapes "
                "and dtypes must be equal on all ranks"
            )
    for at in range(0, len(offers), width):
        one, two = offers[at], offers[at + width - 1]
        if [v.mem.tile.id for v in (*one.given.srcs, *one.given.dsts)] != [
            v.mem.tile.id for v in (*two.given.srcs, *two.given.dsts)
        ]:
            raise KernelError(
                f"{first.opcode}: {one} and {two} name different shared tensors; both cores of a "
                "rank must name the same"
            )


def _copy_counts(first: Given, other: Given) -> None:
    """Each core of a rank gets the counts that the collective wrote for the first one."""
    if other is not first and first.counts is not None and other.counts is not None:
        put(other.counts, taken(first.counts))


def _written(offer: Offer) -> None:
    """Refuse reads of memory nothing wrote, now that both cores have done their part."""
    given = offer.given
    reads = given.reads
    if reads is None:
        reads = [(f"srcs[{at}]", view) for at, view in enumerate(given.srcs)]
    for name, view in reads:
        require_written(offer.run, offer.opcode, name, view, where(offer.site))


def require_written(run: Run, opcode: str, name: str, view: NkiTensor, line: str) -> None:
    """Refuse a read of memory nothing wrote (the level of `uninitialized` applies)."""
    level = run.options.uninitialized
    if level != "off" and not view.mem.is_written(view.region):
        run.report(level, uninitialized(opcode, name, view, line))


def _shown(given: Given) -> str:
    parts = [
        f"{name} " + ", ".join(f"{list(v.shape)} {v.dtype}" for v in views)
        for name, views in (("srcs", given.srcs), ("dsts", given.dsts))
    ]
    return ", ".join(parts)


def _record(offer: Offer, width: int, both: bool) -> None:
    given, run = offer.given, offer.run
    reads = [v.access for v in given.srcs]
    writes = [v.access for v in given.dsts]
    if given.metadata is not None:
        reads.append(given.metadata.access)
    if given.counts is not None:
        writes.append(given.counts.access)
    offer.record(
        Engine.dma, work.collective(given.srcs, given.dsts, run.spec, width),
        tuple(reads), tuple(writes), (MEETING,) if both else (),
    )  # fmt: skip
