"""The cores of a launch and the ranks of a world: one team of runs that meet at exchanges.

Under LNC2 two cores run the kernel; a world has one launch per rank. Every core is a member of one
crew (`crew`). What needs others is a meeting: each member brings an offer, the last to arrive
completes it for all and records the events, in order of members.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

from nki_kernels.hardware.spec import Engine
from nki_kernels.machine.core import Run, write_values
from nki_kernels.machine.crew import Crew
from nki_kernels.machine.dtypes import Array
from nki_kernels.machine.errors import KernelError, NkiKernelsError
from nki_kernels.machine.indirection import row_accesses
from nki_kernels.machine.instruction import Call
from nki_kernels.machine.layout import row_major
from nki_kernels.machine.tensor import MemoryRegion, NkiTensor
from nki_kernels.machine.trace import MEETING, Access, Event, Site, Tile, Work, where

T = TypeVar("T")


@dataclass(slots=True, eq=False)
class Offer:
    """What one member brings to a meeting.

    Attributes:
        run: the member.
        opcode: the call, for messages.
        site: its kernel line.
        given: whatever completes the meeting needs of this member.
        event: the event recorded for the member when the meeting was completed.
        met: True from then on.
    """

    run: Run
    opcode: str
    site: Site
    given: Any
    event: Event | None = None
    met: bool = False

    def __str__(self) -> str:
        return f"{self.run.label} at {where(self.site)}"

    def record(
        self,
        engine: Engine,
        work: Work,
        reads: tuple[Access, ...] = (),
        writes: tuple[Access, ...] = (),
        hidden: tuple[str, ...] = (MEETING,),
    ) -> None:
        """Append the member's event to its trace; by default the cores of a launch met."""
        run = self.run
        events = run.trace.events
        name = self.opcode.rpartition(".")[2]
        self.event = Event(
            len(events), run.core, run.loop, name, engine, reads, writes, (), hidden, work,
            self.site,
        )  # fmt: skip
        events.append(self.event)


@dataclass(slots=True)
class _Shared:
    """The shared HBM tensors of one rank, in order of allocation, and how many a core has."""

    tensors: list[NkiTensor] = field(default_factory=list)
    counts: dict[int, int] = field(default_factory=dict)


class Team:
    """The runs of one launch or one world.

    Args:
        ranks: per rank, its runs in order of cores.
    """

    def __init__(self, ranks: Sequence[Sequence[Run]]) -> None:
        self.ranks = ranks
        self._runs = [run for cores in ranks for run in cores]
        self._shared = [_Shared() for _ in ranks]
        self._meetings: dict[Any, dict[int, Offer]] = {}
        #: Per rank and event, a digest of the bytes it wrote to shared HBM.
        self.digests: list[dict[int, int]] = [{} for _ in ranks]
        #: Per rank and event, what its accesses to shared HBM with run-time addresses touched.
        self.rows: list[dict[int, list[tuple[Access, tuple[Access, ...]]]]] = [{} for _ in ranks]
        for rank, cores in enumerate(ranks):
            for run in cores:
                run.team, run.rank = self, rank
                run.label = self._label(run)
        self._member = {id(run): at for at, run in enumerate(self._runs)}
        self._crew = Crew([run.label for run in self._runs], self._ended)

    def execute(self, job: Callable[[Run], T]) -> list[T]:
        """Run `job` on every member, taking turns; return the results in order of members."""

        def work(run: Run) -> T:
            try:
                return job(run)
            except NkiKernelsError as error:
                error.add_note(f"raised on {run.label}")
                raise

        return self._crew.run([lambda run=run: work(run) for run in self._runs])  # type: ignore[misc]

    def meet(
        self,
        offer: Offer,
        key: Any,
        members: Sequence[Run],
        complete: Callable[[list[Offer]], None],
    ) -> None:
        """See the function `meet`."""
        there = self._meetings.setdefault(key, {})
        there[id(offer.run)] = offer
        if len(there) == len(members):
            del self._meetings[key]
            offers = [there[id(run)] for run in members]
            complete(offers)
            for each in offers:
                each.met = True
            return
        missing = ", ".join(run.label for run in members if id(run) not in there)
        says = f"waits at {offer.opcode}, {where(offer.site)}, for {missing}"
        self._crew.wait(self._member[id(offer.run)], lambda: offer.met, says)

    def share(
        self, run: Run, tile: Tile, extents: tuple[int, ...], nbytes: int, kind: Any
    ) -> NkiTensor:
        """Return the shared HBM tensor for an allocation: the n-th of each core is one tensor."""
        shared = self._shared[run.rank]
        at = shared.counts.get(run.core, 0)
        shared.counts[run.core] = at + 1
        if at == len(shared.tensors):
            run.trace.tiles.append(tile)
            strides = row_major(extents)
            tensor = run.tensor(tile, extents, strides, kind, MemoryRegion.shared_hbm, nbytes)
            shared.tensors.append(tensor)
            return tensor
        found = shared.tensors[at]
        if found.shape != extents or found.dtype != kind:
            first = found.mem.tile
            raise KernelError(
                f"nl.ndarray at {where(tile.site)}: core {run.core} allocates shared tensor {at} "
                f"as {list(extents)} {kind}, core {first.core} as {list(found.shape)} "
                f"{found.dtype} (at {where(first.site)}); both cores must allocate the same shared "
                "tensors in the same order"
            )
        return found

    def note(
        self, event: Event, rank: int, reads: Sequence[NkiTensor], writes: Sequence[NkiTensor]
    ) -> None:
        """Remember what the trace of an event does not show of shared HBM.

        That is what it wrote, as two cores may write the same, and which rows it touched where
        their addresses are known at run time only.
        """
        if len(self.ranks[rank]) == 1:
            return
        rows: dict[int, tuple[Access, ...]] = {}
        for view in (*reads, *writes):
            if view.dynamic is not None and view.mem.tile.shared:
                found = row_accesses(view)
                if found is not None:
                    rows[id(view)] = found
                    self.rows[rank].setdefault(event.seq, []).append((view.access, found))
        shared = [v for v in writes if v.mem.tile.shared]
        if not shared or any(v.mem.abstract for v in shared):
            return
        regions = [
            (v.mem, region)
            for v in shared
            for region in (
                [v.region] if v.dynamic is None else [row[1:5] for row in rows.get(id(v), ())]
            )
        ]
        left = [mem.bits(region).tobytes() for mem, region in regions]
        self.digests[rank][event.seq] = hash(tuple(left))

    def _label(self, run: Run) -> str:
        core = f"core {run.core}" if run.lnc > 1 or len(self.ranks) == 1 else ""
        rank = f"rank {run.rank}" if len(self.ranks) > 1 else ""
        return f"{rank} {core}".strip()

    def _ended(self, member: int) -> str:
        run = self._runs[member]
        last = next((e for e in reversed(run.trace.events) if e.core == run.core), None)
        return "ended" if last is None else f"ended (its last instruction: {where(last.site)})"


def world(run: Run) -> Sequence[Sequence[Run]]:
    """Return the runs of every rank; a launch of its own is a world of one rank."""
    return ((run,),) if run.team is None else run.team.ranks


def meet(
    offer: Offer, key: Any, members: Sequence[Run], complete: Callable[[list[Offer]], None]
) -> None:
    """Bring `offer` to the meeting `key` of `members` and wait until it is completed.

    Args:
        offer: of the member that calls.
        key: what tells the meetings apart that may be under way at once.
        members: who takes part, the caller among them.
        complete: called once, by the last to arrive, with the offers in order of `members`.

    Raises:
        KernelError: some of the members never come.
    """
    if offer.run.team is None or len(members) == 1:
        complete([offer])
    else:
        offer.run.team.meet(offer, key, members, complete)


def _cores(call: Call) -> Sequence[Run]:
    run = call.run
    if run.lnc == 1:
        raise KernelError(
            f"{call.opcode} at {where(call.site)}: the launch has one core and this needs two; "
            "launch kernel[2](...), or leave it out where nl.num_programs() is 1"
        )
    return world(run)[run.rank]


# -- what meetings move ----------------------------------------------------------------------------


def taken(view: NkiTensor) -> Array | None:
    """Return a copy of the bits of a view, None where it has no values."""
    if view.mem.abstract or view.dynamic is not None:
        return None
    return view.mem.bits(view.region).copy()


def put_rounded(view: NkiTensor, values: Array | None) -> None:
    """Write float32 values (None: unknown ones), rounded once."""
    if values is None or (view.mem.abstract and not view.mem.covers(view.region)):
        put(view, None)
        return
    view.mem.touch()
    view.mem.abstract = False
    write_values(view, values)
    view.mem.mark(view.region)


def put(view: NkiTensor, bits: Array | None) -> None:
    """Write bits (None: something without values) to a view and note that it is written."""
    mem = view.mem
    mem.touch()
    if bits is None or view.dynamic is not None or (mem.abstract and not mem.covers(view.region)):
        mem.lose_values()
    else:
        mem.abstract = False
        mem.bits(view.region)[...] = bits
    if view.dynamic is None:
        mem.mark(view.region)
    else:
        mem.fill()


def exchange(call: Call, pipe: int, src: NkiTensor, dst: NkiTensor) -> None:
    """Send `src` to the other core's dst and receive its src in `dst`: one meeting of a pipe."""
    offer = Offer(call.run, call.opcode, call.site, (call, src, dst))
    meet(offer, ("pipe", call.run.rank, pipe), _cores(call), _swap)
    call.event = offer.event


def _swap(offers: list[Offer]) -> None:
    for sender, receiver in (offers, offers[::-1]):
        src, dst = sender.given[1], receiver.given[2]
        if src.shape != dst.shape or src.dtype != dst.dtype:
            raise KernelError(
                f"{sender.opcode}: {sender} sends {list(src.shape)} {src.dtype}, {receiver} "
                f"receives {list(dst.shape)} {dst.dtype}; both ends must have one shape and dtype"
            )
    bits = [taken(offer.given[1]) for offer in offers]
    for sender, receiver, moved in zip(offers, offers[::-1], bits, strict=True):
        call, src, _ = sender.given
        dst = receiver.given[2]
        put(dst, moved)
        reads = (src.access, *call.extra)
        sender.record(Engine.dma, call.work, reads, (dst.access,))


def barrier(call: Call, data: NkiTensor) -> None:
    """Wait until both cores are here."""
    offer = Offer(call.run, call.opcode, call.site, (call, data))
    meet(offer, ("barrier", call.run.rank), _cores(call), _pass_barrier)
    call.event = offer.event


def _pass_barrier(offers: list[Offer]) -> None:
    datas = [offer.given[1] for offer in offers]
    tiles = {d.mem.tile.id for d in datas if not d.on_chip}
    if len(tiles) > 1 or len({d.on_chip for d in datas}) > 1:
        given = " and ".join(f"{o} on {d!r}" for o, d in zip(offers, datas, strict=True))
        raise KernelError(
            f"{offers[0].opcode}: {given}; both cores must name the same shared tensor"
        )
    for offer in offers:
        call, data = offer.given
        # The barrier waits for what this core did to the data and holds back what it does later.
        both = () if data.on_chip else (data.access,)
        offer.record(call.engine, call.work, both, both)
