"""Who sends to whom: explicit pairs, rings, and the ranks' own numbers."""

from __future__ import annotations

from typing import Any

import numpy as np
from nki.collectives.group import Collective, Given, ReplicaGroup
from nki.collectives.uniform import reduced

from nki_kernels.machine.core import VirtualRegister, current
from nki_kernels.machine.cores import put, put_rounded, taken, world
from nki_kernels.machine.handles import NkiInstruction
from nki_kernels.machine.layout import is_int
from nki_kernels.machine.tensor import NkiTensor
from nki_kernels.machine.trace import ControlWork

#: Channels between the devices of one node (nki.collectives.collective_permute_implicit).
_MOST_CHANNELS = 4


def collective_permute(
    srcs: list[NkiTensor],
    dsts: list[NkiTensor],
    source_target_pairs: list[tuple[int, int]],
    priority: int | None = None,
    name: str | None = None,
) -> NkiInstruction:
    """The dst of `target` = the src of `source`, for every pair (source, target). One HBM tensor.

    A rank is the source of one pair at most and the target of one at most; a rank that receives
    nothing keeps its dst, and one in no pair does nothing (undocumented).
    """
    call = Collective("collective_permute")
    sources = call.tensors("srcs", srcs, sbuf=False, most=1)
    targets = call.tensors("dsts", dsts, sbuf=False, most=1)
    call.together(sources, targets)
    call.priority(priority)
    call.shapes(0, targets[0], sources[0].shape, "the shape of its source")
    pairs = _pairs(call, source_target_pairs)
    ranks = tuple(sorted({rank for pair in pairs for rank in pair}))
    if call.run.rank not in ranks:
        return NkiInstruction(None)

    def move(every: list[Given]) -> None:
        by_rank = dict(zip(ranks, every, strict=True))
        bits = {source: taken(by_rank[source].srcs[0]) for source, _ in pairs}
        for source, target in pairs:
            put(by_rank[target].dsts[0], bits[source])

    given = Given(sources, targets, pairs)
    if call.run.rank not in dict(pairs):
        given.reads = ()
    return call.exchange(ranks, given, move, name)


def _pairs(call: Collective, value: Any) -> tuple[tuple[int, int], ...]:
    if not isinstance(value, (list, tuple)) or not value:
        raise call.refuse(f"source_target_pairs={value!r}; it must be a list of (source, target)")
    ranks = len(world(call.run))
    for pair in value:
        if (
            not isinstance(pair, (list, tuple))
            or len(pair) != 2
            or not all(is_int(rank) and 0 <= rank < ranks for rank in pair)
        ):
            raise call.refuse(
                f"pair {pair!r} of source_target_pairs; it must be two ranks of 0 to {ranks - 1}"
            )
    pairs = tuple((int(source), int(target)) for source, target in value)
    for end, what in ((0, "source"), (1, "target")):
        ends = [pair[end] for pair in pairs]
        if len(set(ends)) != len(ends):
            raise call.refuse(f"{pairs!r}: a rank is {what} twice; once at most: call it twice")
    return pairs


def collective_permute_implicit(
    srcs_by_channel: list[list[NkiTensor]],
    dsts_by_channel: list[list[NkiTensor]],
    replica_group: ReplicaGroup,
    channel_ids: list[int] = [0],  # noqa: B006 (the published default; never changed)
    priority: int | None = None,
    name: str | None = None,
) -> NkiInstruction:
    """On every channel, dst of the next rank of the ring = this rank's src.

    The ring is the group in its order, the last rank sends to the first; the same on every channel
    (the hardware's choice of ring is not documented). Each channel has one tensor.
    """
    call = Collective("collective_permute_implicit")
    ranks = call.group(replica_group)
    call.priority(priority)
    sources = _channels(call, "srcs_by_channel", srcs_by_channel, channel_ids)
    targets = _channels(call, "dsts_by_channel", dsts_by_channel, channel_ids)
    _alike(call, sources, targets)

    def move(given: list[Given]) -> None:
        for at in range(len(sources)):
            bits = [taken(g.srcs[at]) for g in given]
            for place, g in enumerate(given):
                put(g.dsts[at], bits[place - 1])

    return call.exchange(ranks, Given(sources, targets), move, name)


def collective_permute_implicit_reduce(
    srcs0_by_channel: list[list[NkiTensor]],
    srcs1_by_channel: list[list[NkiTensor]],
    dsts_by_channel: list[list[NkiTensor]],
    replica_group: ReplicaGroup,
    op: Any,
    channel_ids: list[int] = [0],  # noqa: B006 (the published default; never changed)
    priority: int | None = None,
    name: str | None = None,
) -> NkiInstruction:
    """On every channel, dst of the next rank of the ring = this rank's op(src0, src1).

    float32, one rounding before it is sent. The ring is that of `collective_permute_implicit`.
    """
    call = Collective("collective_permute_implicit_reduce")
    ranks = call.group(replica_group)
    found = call.reduction(op)
    call.priority(priority)
    left = _channels(call, "srcs0_by_channel", srcs0_by_channel, channel_ids)
    right = _channels(call, "srcs1_by_channel", srcs1_by_channel, channel_ids)
    targets = _channels(call, "dsts_by_channel", dsts_by_channel, channel_ids)
    _alike(call, left, targets)
    _alike(call, right, targets)
    count = len(targets)

    def move(given: list[Given]) -> None:
        for at in range(count):
            sums = [reduced(found, [g.srcs[at], g.srcs[count + at]]) for g in given]
            for place, g in enumerate(given):
                put_rounded(g.dsts[at], sums[place - 1])

    return call.exchange(ranks, Given((*left, *right), targets, (found.name,)), move, name)


def _channels(
    call: Collective, operand: str, value: Any, channel_ids: Any
) -> tuple[NkiTensor, ...]:
    if not isinstance(value, (list, tuple)) or not 1 <= len(value) <= _MOST_CHANNELS:
        raise call.refuse(
            f"{operand}={value!r}; it must be a list of 1 to {_MOST_CHANNELS} lists, one a channel"
        )
    if not isinstance(channel_ids, (list, tuple)) or list(channel_ids) != list(range(len(value))):
        raise call.refuse(
            f"channel_ids={channel_ids!r} for {len(value)} channels of {operand}; it must be "
            f"{list(range(len(value)))}"
        )
    return tuple(
        call.tensors(f"{operand}[{at}]", tensors, most=1)[0] for at, tensors in enumerate(value)
    )


def _alike(
    call: Collective, sources: tuple[NkiTensor, ...], targets: tuple[NkiTensor, ...]
) -> None:
    for src, dst in zip(sources, targets, strict=True):
        call.together((src,), (dst,))
        call.shapes(0, dst, src.shape, "the shape of its source")


def collective_permute_implicit_current_processing_rank_id(
    iteration_id: Any, replica_group: ReplicaGroup, channel_id: int = 0, name: str | None = None
) -> VirtualRegister:
    """Return a register with the rank whose data this rank holds after `iteration_id` steps.

    Iteration 0: its own; then that of the rank before it in the ring, and so on around. The
    iteration is an int or a register.
    """
    call = Collective("collective_permute_implicit_current_processing_rank_id")
    ranks = call.group(replica_group)
    if isinstance(iteration_id, VirtualRegister):
        iteration_id = iteration_id.read()
    if not is_int(iteration_id) or iteration_id < 0:
        raise call.refuse(f"iteration_id={iteration_id!r}; it must be an int from 0 up")
    if not is_int(channel_id) or not 0 <= channel_id < _MOST_CHANNELS:
        raise call.refuse(f"channel_id={channel_id!r}; it must be 0 to {_MOST_CHANNELS - 1}")
    at = (ranks.index(call.run.rank) - int(iteration_id)) % len(ranks)
    return _register(ranks[at], "current_processing_rank_id")


def rank_id(name: str | None = None) -> VirtualRegister:
    """Return a register with the number of this rank (0 in a launch of its own)."""
    return _register(current("nki.collectives.rank_id").rank, "rank_id")


def _register(value: int, opcode: str) -> VirtualRegister:
    run = current(opcode)
    register = run.register(int(np.int32(value)))
    run.control(
        opcode, ControlWork("register_move"), hidden_writes=(f"register:{register.number}",)
    )
    return register
