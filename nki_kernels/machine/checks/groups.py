"""Accumulation groups in PSUM: sums that go on after they were read, groups that interleave.

A group is a matmul that overwrites and the matmuls that add to what it wrote. The Tensor engine
keeps one outstanding group per bank (eight banks, eight groups); two that alternate in one bank, on
the same partitions, have been reported to lose a contribution on Trainium 2.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from nki_kernels.machine.checks.regions import box, describe, overlap
from nki_kernels.machine.errors import RuleViolation
from nki_kernels.machine.trace import Access, Event, PeWork, Trace, where


def sums_read(trace: Trace) -> Iterator[RuleViolation]:
    """Yield an error for each tile where ``accumulate=None`` adds to sums that were read.

    "The first write overwrites, later ones add": no document says whether a read ends the group.
    """
    tiles = {e.writes[0].tile.id for e in trace.events if _infers(e)}
    if not tiles:
        return
    written: dict[int, dict[Access, int]] = {tile: {} for tile in tiles}
    read: dict[int, dict[Access, Event]] = {tile: {} for tile in tiles}
    said: set[int] = set()
    for event in trace.events:
        matmul = isinstance(event.work, PeWork)
        if not matmul:
            for access in event.reads:
                if access.tile.id in tiles:
                    read[access.tile.id][access] = event
        for access in event.writes:
            tile = access.tile.id
            if tile not in tiles:
                continue
            if _infers(event) and tile not in said:
                last = max((s for a, s in written[tile].items() if overlap(a, access)), default=-1)
                for seen, reader in read[tile].items():
                    if reader.seq > last and overlap(seen, access):
                        said.add(tile)
                        yield _read_error(event, access, reader)
                        break
            written[tile][access] = event.seq


def _infers(event: Event) -> bool:
    work = event.work
    return isinstance(work, PeWork) and work.inferred and work.accumulate


def _read_error(event: Event, access: Access, reader: Event) -> RuleViolation:
    return RuleViolation(
        f"nisa.{event.opcode} at {where(event.site)}: accumulate=None adds to elements of the "
        f"{describe(access.tile)} (allocated at {where(access.tile.site)}) that nisa."
        f"{reader.opcode} at {where(reader.site)} has read since they were written; whether a read "
        "ends a group is not documented: pass accumulate=True to go on, False to start anew, or "
        "allocate a tile per group"
    )


@dataclass(slots=True)
class _Group:
    """A group by the matmul that began it, and the first one that began another in its bank."""

    start: Event
    disturbed: Event | None = None


def interleaved(trace: Trace) -> Iterator[RuleViolation]:
    """Yield an error for each group that continues after another one began in its bank.

    Groups on different partitions do not meet: each partition has its own banks, and column tiles
    of the array work that way. A tile begins at a bank, so its byte columns tell the bank.
    """
    bank = trace.spec.psum_bank_bytes
    open_groups: dict[int, dict[Access, _Group]] = {}
    said: set[int] = set()
    for event in trace.events:
        work = event.work
        if not isinstance(work, PeWork) or work.mode != "matmul":
            continue
        access = event.writes[0]
        groups = open_groups.setdefault(access.tile.id, {})
        if not work.accumulate:
            for other, group in groups.items():
                if group.disturbed is None and other != access and _meet(other, access, bank):
                    group.disturbed = event
            groups[access] = _Group(event)
            continue
        found = groups.get(access)
        if found is None or found.disturbed is None or access.tile.id in said:
            continue
        said.add(access.tile.id)
        yield _interleaved_error(event, access, found.start, found.disturbed)


def _meet(a: Access, b: Access, bank: int) -> bool:
    """Return True if two accesses of one tile have a bank of a partition in common."""
    one, two = box(a), box(b)
    if one.rows.low >= two.rows.high or two.rows.low >= one.rows.high:
        return False
    first, last = one.columns.low // bank, (one.columns.high - 1) // bank
    return first <= (two.columns.high - 1) // bank and two.columns.low // bank <= last


def _interleaved_error(event: Event, access: Access, start: Event, other: Event) -> RuleViolation:
    return RuleViolation(
        f"nisa.{event.opcode} at {where(event.site)}: dst {list(access.shape)} of the "
        f"{describe(access.tile)} continues the accumulation group that began at "
        f"{where(start.site)}, but nisa.{other.opcode} at {where(other.site)} began another group "
        "in the same PSUM bank meanwhile; a bank holds one outstanding group: finish one before "
        "the next begins, or give each a bank of its own"
    )
