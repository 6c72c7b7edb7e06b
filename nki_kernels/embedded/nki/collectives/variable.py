"""Collectives whose sizes are data: all_gather_v, all_to_all_v."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from nki.collectives.group import Collective, Given, ReplicaGroup, require_written

from nki_kernels.machine.cores import put, taken
from nki_kernels.machine.dtypes import Array, uint32
from nki_kernels.machine.errors import OutOfBounds
from nki_kernels.machine.handles import NkiInstruction
from nki_kernels.machine.tensor import NkiTensor
from nki_kernels.machine.trace import where

#: Ranks of one chip, the only group all_gather_v takes (nki.collectives.all_gather_v).
_CHIP_RANKS = 4
_SEND_COUNT, _SEND_DISPL, _RECV_COUNT, _RECV_DISPL = range(4)


def all_gather_v(
    srcs: list[NkiTensor],
    dsts: list[NkiTensor],
    replica_group: ReplicaGroup,
    metadata_tensor: NkiTensor,
    recv_counts_known: bool = False,
    has_rdispls: bool = False,
    priority: int | None = None,
    name: str | None = None,
) -> NkiInstruction:
    """dst[s·slot : s·slot + count_s] = src_s[displ_s : displ_s + count_s] for every sender s.

    Flat, in row-major order; slot = dst.size / ranks. `metadata_tensor` is uint32, [3, ranks] in
    HBM or [1, 3, ranks] in SBUF: row 0 the send count and row 1 the displacement (column 0 only),
    row 2 receives the counts unless `recv_counts_known`. Behind a chunk, dst keeps its bytes.
    One HBM tensor each; two cores a rank and groups of four (documented limits), no `has_rdispls`.
    """
    call = Collective("all_gather_v")
    ranks = call.group(replica_group)
    if has_rdispls:
        raise call.refuse("has_rdispls=True is not supported yet by NKI; leave it out")
    if len(ranks) != _CHIP_RANKS or call.run.lnc != 2:
        raise call.refuse(
            f"a group of {len(ranks)} ranks on {call.run.lnc} core(s) each; it takes groups of "
            f"{_CHIP_RANKS} and launches on two cores"
        )
    given = _given(call, srcs, dsts, metadata_tensor, len(ranks), has_rdispls, priority)
    given.settings = (recv_counts_known,)
    given.counts = None if recv_counts_known else _row(metadata_tensor, _RECV_COUNT)
    _inputs(given, (_SEND_COUNT, _SEND_DISPL), columns=1)

    def move(all_given: list[Given]) -> None:
        count = len(all_given)
        tables = [_table(g) for g in all_given]
        chunks = [_chunk(call, g, table, 0) for g, table in zip(all_given, tables, strict=True)]
        for g in all_given:
            slot = g.dsts[0].size // count
            _receive(call, g, chunks, [slot * sender for sender in range(count)], slot)
            _write_counts(g, chunks)

    return call.exchange(ranks, given, move, name)


def all_to_all_v(
    srcs: list[NkiTensor],
    dsts: list[NkiTensor],
    replica_group: ReplicaGroup,
    metadata_tensor: NkiTensor,
    recv_counts_known: bool = False,
    has_rdispls: bool = False,
    priority: int | None = None,
    name: str | None = None,
) -> NkiInstruction:
    """As `all_gather_v`, with a chunk of its own for every destination.

    Row 0 and row 1 of the metadata hold count and displacement per destination. With `has_rdispls`
    (gen4) row 3 says where the chunk of each sender lands, else slots of equal size. On gen4 a rank
    has two cores. Which ranks share a device or a node is not part of a simulated world, so the
    restrictions on that are not checked.
    """
    call = Collective("all_to_all_v")
    ranks = call.group(replica_group)
    generation = call.run.spec.generation
    if has_rdispls and generation < 4:
        raise call.refuse(f"has_rdispls=True on {call.run.spec.name}; it needs gen4: leave it out")
    if generation >= 4 and call.run.lnc != 2:
        raise call.refuse("a launch on one core; on gen4 it takes two: launch with lnc=2")
    given = _given(call, srcs, dsts, metadata_tensor, len(ranks), has_rdispls, priority)
    given.settings = (recv_counts_known, has_rdispls)
    given.counts = None if recv_counts_known else _row(metadata_tensor, _RECV_COUNT)
    inputs = (_SEND_COUNT, _SEND_DISPL) + ((_RECV_DISPL,) if has_rdispls else ())
    _inputs(given, inputs, columns=len(ranks))

    def move(all_given: list[Given]) -> None:
        count = len(all_given)
        tables = [_table(g) for g in all_given]
        chunks = [
            [_chunk(call, g, table, to) for g, table in zip(all_given, tables, strict=True)]
            for to in range(count)
        ]
        for g, table, arriving in zip(all_given, tables, chunks, strict=True):
            slot = g.dsts[0].size // count
            starts = [slot * sender for sender in range(count)]
            if has_rdispls and table is not None:
                starts, slot = [int(start) for start in table[_RECV_DISPL]], g.dsts[0].size
            _receive(call, g, arriving, starts, slot)
            _write_counts(g, arriving)

    return call.exchange(ranks, given, move, name)


class _Chunk(NamedTuple):
    """What one rank sends to one other: None where values or counts are unknown."""

    size: int | None
    bits: Array | None


def _given(
    call: Collective,
    srcs: list[NkiTensor],
    dsts: list[NkiTensor],
    metadata: NkiTensor,
    count: int,
    has_rdispls: bool,
    priority: int | None,
) -> Given:
    call.priority(priority)
    sources = call.tensors("srcs", srcs, sbuf=False, most=1)
    targets = call.tensors("dsts", dsts, sbuf=False, most=1)
    call.together(sources, targets)
    rows = 4 if has_rdispls else 3
    if not isinstance(metadata, NkiTensor):
        raise call.refuse(f"metadata_tensor={metadata!r}; it must be a uint32 tensor")
    memory = metadata.mem.tile.memory
    wanted = (1, rows, count) if memory == "sbuf" else (rows, count)
    if memory == "psum" or metadata.shape != wanted or metadata.dtype != uint32:
        raise call.refuse(
            f"metadata_tensor {list(metadata.shape)} {metadata.dtype} in {memory.upper()}; it must "
            f"be uint32, [{rows}, {count}] in HBM or [1, {rows}, {count}] in SBUF"
        )
    return Given(sources, targets, metadata=metadata)


def _row(metadata: NkiTensor, row: int, columns: int | None = None) -> NkiTensor:
    cut = slice(0, columns)
    if metadata.on_chip:
        return metadata[:, row : row + 1, cut]
    return metadata[row : row + 1, cut]


def _inputs(given: Given, rows: tuple[int, ...], columns: int) -> None:
    """Name the metadata that must have been written; of the source only the chunks are read."""
    metadata = _metadata(given)
    given.reads = tuple((f"row {row} of metadata", _row(metadata, row, columns)) for row in rows)


def _metadata(given: Given) -> NkiTensor:
    if given.metadata is None:
        raise TypeError("a collective with sizes has a metadata tensor")
    return given.metadata


def _table(given: Given) -> Array | None:
    """Return the metadata as [rows, ranks], None where it has no values."""
    metadata = _metadata(given)
    if metadata.mem.abstract:
        return None
    values = metadata.mem.array(metadata.region, np.uint32)
    return values.reshape(metadata.shape[-2:]).astype(np.int64)


def _chunk(call: Collective, given: Given, table: Array | None, to: int) -> _Chunk:
    """Return what a rank sends to the `to`-th of the group."""
    if table is None:
        return _Chunk(None, None)
    count, start = int(table[_SEND_COUNT, to]), int(table[_SEND_DISPL, to])
    src = given.srcs[0]
    if start + count > src.size:
        raise OutOfBounds(
            f"{call.what}: a rank sends elements {start} to {start + count - 1} of its src, which "
            f"has {src.size}; send_displ + send_count must not exceed that: correct the metadata"
        )
    if count == 0:
        return _Chunk(0, None)
    part = src.reshape((src.size,))[start : start + count]
    require_written(call.run, call.opcode, "the chunk sent", part, where(call.site))
    return _Chunk(count, taken(part))


def _receive(
    call: Collective, given: Given, chunks: list[_Chunk], starts: list[int], room: int
) -> None:
    dst = given.dsts[0]
    flat = dst.reshape((dst.size,))
    for sender, (chunk, start) in enumerate(zip(chunks, starts, strict=True)):
        if chunk.size is None:
            put(flat, None)
            return
        if chunk.size > room or start + chunk.size > dst.size:
            raise OutOfBounds(
                f"{call.what}: {chunk.size} elements of the {sender}. rank of the group arrive at "
                f"element {start} of a dst of {dst.size}, in a slot of {room}; they must fit: send "
                "less, or make dst larger"
            )
        if chunk.size:
            put(flat[start : start + chunk.size], chunk.bits)


def _write_counts(given: Given, chunks: list[_Chunk]) -> None:
    row = given.counts
    if row is None:
        return
    known = [chunk.size for chunk in chunks if chunk.size is not None]
    complete = len(known) == len(chunks)
    put(row, np.array(known, np.uint32).reshape(row.shape) if complete else None)
