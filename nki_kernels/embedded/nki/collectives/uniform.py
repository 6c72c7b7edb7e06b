"""Collectives in which every rank contributes as much: all_reduce, all_gather and so on."""

from __future__ import annotations

from typing import Any

import numpy as np
from nki.collectives.group import Collective, Given, Reduction, ReplicaGroup

from nki_kernels.machine.cores import put, put_rounded, taken
from nki_kernels.machine.dtypes import Array
from nki_kernels.machine.handles import NkiInstruction
from nki_kernels.machine.tensor import NkiTensor


def reduced(op: Reduction, views: list[NkiTensor]) -> Array | None:
    """Return op over the views in order, in float32; None where one has no values."""
    if any(v.mem.abstract for v in views):
        return None
    parts = [v.mem.array(v.region, v.dtype.host).astype(np.float32) for v in views]
    total = parts[0]
    for part in parts[1:]:
        total = op.apply(total, part, out=total)
    return total


def all_reduce(
    srcs: list[NkiTensor],
    dsts: list[NkiTensor],
    replica_group: ReplicaGroup,
    op: Any,
    priority: int | None = None,
    name: str | None = None,
) -> NkiInstruction:
    """dsts[i] = op over the ranks of the group of their srcs[i], on every rank.

    float32 in the group's order from left to right, one rounding on the write (the order is not
    documented). src and dst have one shape and dtype; dst may be src. HBM, or one 2-D tile in SBUF.
    """
    call = Collective("all_reduce")
    ranks = call.group(replica_group)
    sources, targets = call.tensors("srcs", srcs), call.tensors("dsts", dsts)
    call.together(sources, targets)
    found = call.reduction(op)
    call.priority(priority)
    for at, (src, dst) in enumerate(zip(sources, targets, strict=True)):
        call.shapes(at, dst, src.shape, "the shape of its source")

    def move(given: list[Given]) -> None:
        for at in range(len(sources)):
            total = reduced(found, [g.srcs[at] for g in given])
            for g in given:
                put_rounded(g.dsts[at], total)

    return call.exchange(ranks, Given(sources, targets, (found.name,)), move, name)


def all_gather(
    srcs: list[NkiTensor],
    dsts: list[NkiTensor],
    replica_group: ReplicaGroup,
    collective_dim: int,
    priority: int | None = None,
    name: str | None = None,
) -> NkiInstruction:
    """dsts[i] = the srcs[i] of all ranks, joined along `collective_dim` in the group's order.

    `collective_dim` is 0 in HBM, 0 (partitions) or 1 for a 2-D tile in SBUF.
    """
    call = Collective("all_gather")
    ranks = call.group(replica_group)
    sources, targets = call.tensors("srcs", srcs), call.tensors("dsts", dsts)
    call.together(sources, targets)
    call.dimension(collective_dim, (0, 1) if sources[0].on_chip else (0,))
    call.priority(priority)
    for at, (src, dst) in enumerate(zip(sources, targets, strict=True)):
        wanted = list(src.shape)
        wanted[collective_dim] *= len(ranks)
        call.shapes(at, dst, tuple(wanted), f"{len(ranks)} parts of {list(src.shape)}")

    def move(given: list[Given]) -> None:
        for at in range(len(sources)):
            parts = [taken(g.srcs[at]) for g in given]
            extent = sources[at].shape[collective_dim]
            for g in given:
                for place, part in enumerate(parts):
                    cut = slice(place * extent, (place + 1) * extent)
                    put(g.dsts[at][cut] if collective_dim == 0 else g.dsts[at][:, cut], part)

    return call.exchange(ranks, Given(sources, targets, (collective_dim,)), move, name)


def reduce_scatter(
    srcs: list[NkiTensor],
    dsts: list[NkiTensor],
    replica_group: ReplicaGroup,
    collective_dim: int,
    op: Any,
    priority: int | None = None,
    name: str | None = None,
) -> NkiInstruction:
    """dsts[i] = this rank's part of op over the ranks of their srcs[i], cut along dimension 0.

    Arithmetic as in `all_reduce`; the n-th rank of the group gets the n-th part.
    """
    call = Collective("reduce_scatter")
    ranks = call.group(replica_group)
    sources, targets = call.tensors("srcs", srcs), call.tensors("dsts", dsts)
    call.together(sources, targets)
    call.dimension(collective_dim, (0,))
    found = call.reduction(op)
    call.priority(priority)
    for at, (src, dst) in enumerate(zip(sources, targets, strict=True)):
        rows = _parts(call, at, src, len(ranks))
        call.shapes(at, dst, (rows, *src.shape[1:]), f"one of {len(ranks)} parts")

    def move(given: list[Given]) -> None:
        for at in range(len(sources)):
            total = reduced(found, [g.srcs[at] for g in given])
            rows = targets[at].shape[0]
            for place, g in enumerate(given):
                part = None if total is None else total[place * rows : (place + 1) * rows]
                put_rounded(g.dsts[at], part)

    settings = (collective_dim, found.name)
    return call.exchange(ranks, Given(sources, targets, settings), move, name)


def all_to_all(
    srcs: list[NkiTensor],
    dsts: list[NkiTensor],
    replica_group: ReplicaGroup,
    collective_dim: int,
    priority: int | None = None,
    name: str | None = None,
) -> NkiInstruction:
    """Part r of dsts[i] = this rank's part of the r-th rank's srcs[i], along dimension 0. HBM."""
    call = Collective("all_to_all")
    ranks = call.group(replica_group)
    sources = call.tensors("srcs", srcs, sbuf=False)
    targets = call.tensors("dsts", dsts, sbuf=False)
    call.together(sources, targets)
    call.dimension(collective_dim, (0,))
    call.priority(priority)
    for at, (src, dst) in enumerate(zip(sources, targets, strict=True)):
        _parts(call, at, src, len(ranks))
        call.shapes(at, dst, src.shape, "the shape of its source")

    def move(given: list[Given]) -> None:
        for at in range(len(sources)):
            parts = [taken(g.srcs[at]) for g in given]
            rows = sources[at].shape[0] // len(ranks)
            for place, g in enumerate(given):
                mine = slice(place * rows, (place + 1) * rows)
                for sender, part in enumerate(parts):
                    cut = slice(sender * rows, (sender + 1) * rows)
                    put(g.dsts[at][cut], None if part is None else part[mine])

    return call.exchange(ranks, Given(sources, targets, (collective_dim,)), move, name)


def _parts(call: Collective, at: int, src: NkiTensor, count: int) -> int:
    """Return the rows of a part of `src`; the parts must come out even."""
    if src.shape[0] % count:
        raise call.refuse(
            f"srcs[{at}] {list(src.shape)}: dimension 0 must be a multiple of the {count} ranks of "
            "the group; pad it"
        )
    return src.shape[0] // count
