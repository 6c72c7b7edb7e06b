"""nki.collectives between ranks of one process, against NumPy; events, shapes, order."""

from __future__ import annotations

import nki.collectives as ncc
import nki.isa as nisa
import nki.language as nl
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from nki_kernels.machine import crew
from nki_kernels.machine.errors import (
    RuleViolation,
)
from nki_kernels.machine.ranks import launch_ranks
from nki_kernels.machine.tensor import Abstract
from nki_kernels.machine.trace import DmaWork, where
from tests.embedded.harness import hbm
from tests.embedded.world import FOUR, PAIRS, copied, grouped, integers, worked

OPS = {"add": np.add, "minimum": np.minimum, "maximum": np.maximum}
EVERYWHERE = pytest.mark.parametrize(
    ("memory", "lnc"), [("hbm", 1), ("hbm", 2), ("sbuf", 1), ("sbuf", 2)]
)
GROUPS = pytest.mark.parametrize("group", [FOUR, PAIRS], ids=["four", "pairs"])


@EVERYWHERE
@GROUPS
@pytest.mark.parametrize("op", OPS)
def test_all_reduce(op, group, memory, lnc):
    arrays = integers(4, 3, 5)

    def body(src, dst):
        ncc.all_reduce([src], [dst], group, getattr(nl, op))

    found = worked(body, arrays, out=(3, 5), memory=memory, lnc=lnc)
    for (parts, _), result in zip(grouped(group, arrays), found, strict=True):
        assert np.array_equal(result, OPS[op].reduce(parts))


@EVERYWHERE
@GROUPS
@pytest.mark.parametrize("dim", [0, 1])
def test_all_gather(dim, group, memory, lnc):
    arrays = integers(4, 1, 2)
    count = len(group.groups[0])
    out = (count, 2) if dim == 0 else (1, 2 * count)

    def body(src, dst):
        ncc.all_gather([src], [dst], group, dim)

    if memory == "hbm" and dim == 1:
        with pytest.raises(RuleViolation, match="collective_dim=1; it must be 0 for these"):
            worked(body, arrays, out=out, memory=memory, lnc=lnc)
        return
    found = worked(body, arrays, out=out, memory=memory, lnc=lnc)
    for (parts, _), result in zip(grouped(group, arrays), found, strict=True):
        assert np.array_equal(result, np.concatenate(parts, dim))


@EVERYWHERE
@GROUPS
def test_reduce_scatter(group, memory, lnc):
    arrays = integers(4, 4, 3)
    rows = 4 // len(group.groups[0])

    def body(src, dst):
        ncc.reduce_scatter([src], [dst], group, 0, nl.add)

    found = worked(body, arrays, out=(rows, 3), memory=memory, lnc=lnc)
    for (parts, place), result in zip(grouped(group, arrays), found, strict=True):
        assert np.array_equal(result, sum(parts)[place * rows : (place + 1) * rows])


@GROUPS
@pytest.mark.parametrize("lnc", [1, 2])
def test_all_to_all(group, lnc):
    arrays = integers(4, 4, 2, 3)
    rows = 4 // len(group.groups[0])

    def body(src, dst):
        ncc.all_to_all([src], [dst], group, 0)

    found = worked(body, arrays, out=(4, 2, 3), lnc=lnc)
    for (parts, place), result in zip(grouped(group, arrays), found, strict=True):
        mine = slice(place * rows, (place + 1) * rows)
        assert np.array_equal(result, np.concatenate([part[mine] for part in parts]))


def test_several_tensors_at_once():
    def kernel(x, y):
        a, b, c, d = copied(x), copied(y), hbm(*x.shape), hbm(*y.shape)
        ncc.all_reduce([a, b], [c, d], FOUR, nl.add)
        return c, d

    xs, ys = integers(4, 2, 2), integers(4, 1, 5)
    for run in launch_ranks(kernel, list(zip(xs, ys, strict=True)), target="toy"):
        assert np.array_equal(run.result[0], sum(xs))
        assert np.array_equal(run.result[1], sum(ys))


def test_a_reduction_in_place():
    arrays = integers(4, 2, 3)

    def body(src, dst):
        ncc.all_reduce([src], [src], FOUR, nl.add)
        nisa.dma_copy(dst=dst, src=src)

    for result in worked(body, arrays, out=(2, 3)):
        assert np.array_equal(result, sum(arrays))


def test_a_sum_rounds_once_in_the_groups_order():
    """2^24 + 1 + 1 - 2^24 in float32 depends on the order; bfloat16 would lose every step."""
    big = np.float32(2**24)
    values = [np.full((1, 1), v, np.float32) for v in (big, 1.0, 1.0, -big)]

    def body(group):
        return lambda src, dst: ncc.all_reduce([src], [dst], group, nl.add)

    other = ncc.ReplicaGroup([[0, 3, 1, 2]])
    assert [r.item() for r in worked(body(FOUR), values, out=(1, 1))] == [0.0] * 4
    assert [r.item() for r in worked(body(other), values, out=(1, 1))] == [2.0] * 4
    halves = [np.full((1, 1), v).astype(nl.bfloat16.host) for v in (256.0, 1.0, 1.0, 0.0)]
    assert [float(r.item()) for r in worked(body(FOUR), halves, out=(1, 1))] == [258.0] * 4


@given(
    data=st.data(),
    ranks=st.integers(1, 5),
    shape=st.tuples(st.integers(1, 3), st.integers(1, 4)),
    lnc=st.sampled_from([1, 2]),
)
def test_any_partition_of_the_ranks_gathers_and_reduces(data, ranks, shape, lnc):
    order = data.draw(st.permutations(range(ranks)))
    size = data.draw(st.sampled_from([n for n in range(1, ranks + 1) if ranks % n == 0]))
    group = ncc.ReplicaGroup([order[i : i + size] for i in range(0, ranks, size)])
    arrays = integers(ranks, *shape)
    left = iter(data.draw(st.lists(st.integers(0, 9), max_size=20)))

    def body(src, dst):
        ncc.all_gather([src], [dst[0:1]], group, 0) if size == shape[0] == 1 else None
        total = hbm(*shape)
        ncc.all_reduce([src], [total], group, nl.add)
        ncc.all_gather([total], [dst], group, 0)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(crew, "first", lambda able: able[next(left, 0) % len(able)])
        found = worked(body, arrays, out=(size * shape[0], shape[1]), lnc=lnc)
    for (parts, _), result in zip(grouped(group, arrays), found, strict=True):
        assert np.array_equal(result, np.concatenate([sum(parts)] * size))


# -- permutations ----------------------------------------------------------------------------------


@given(order=st.permutations(range(4)), lnc=st.sampled_from([1, 2]))
def test_any_permutation_of_pairs(order, lnc):
    arrays = integers(4, 2, 2)
    pairs = list(enumerate(order))

    def body(src, dst):
        ncc.collective_permute([src], [dst], pairs)

    found = worked(body, arrays, out=(2, 2), lnc=lnc)
    for source, target in pairs:
        assert np.array_equal(found[target], arrays[source])


def test_a_rank_without_a_source_keeps_its_destination():
    arrays = integers(3, 1, 2)

    def body(src, dst):
        nisa.dma_copy(dst=dst, src=src)
        ncc.collective_permute([src], [dst], [(0, 1)])

    found = worked(body, arrays, out=(1, 2))
    assert np.array_equal(found[0], arrays[0])
    assert np.array_equal(found[1], arrays[0])
    assert np.array_equal(found[2], arrays[2])


@EVERYWHERE
@GROUPS
def test_a_ring_of_one_channel(group, memory, lnc):
    arrays = integers(4, 1, 3)

    def body(src, dst):
        ncc.collective_permute_implicit([[src]], [[dst]], group)

    found = worked(body, arrays, out=(1, 3), memory=memory, lnc=lnc)
    for (parts, place), result in zip(grouped(group, arrays), found, strict=True):
        assert np.array_equal(result, parts[place - 1])


def test_a_ring_of_channels_that_reduces():
    arrays = integers(4, 2, 3)

    def body(src, dst):
        rows = [[src[0:1]], [src[1:2]]]
        ncc.collective_permute_implicit_reduce(
            rows, rows[::-1], [[dst[0:1]], [dst[1:2]]], FOUR, nl.add, [0, 1]
        )

    for rank, result in enumerate(worked(body, arrays, out=(2, 3))):
        before = arrays[rank - 1]
        assert np.array_equal(result, np.stack([before.sum(0)] * 2))


@pytest.mark.parametrize("lnc", [1, 2])
def test_a_ring_gathers_what_the_rank_ids_say(lnc):
    """The documented use: ask whose data this is, put it there, pass it on."""
    arrays = integers(4, 1, 2)

    def kernel(x):
        held, out = [copied(x), hbm(*x.shape)], hbm(4, 2)
        for step in range(4):
            owner = ncc.collective_permute_implicit_current_processing_rank_id(step, FOUR)
            nisa.dma_copy(
                dst=out.ap(pattern=[[2, 1], [1, 2]], scalar_offset=owner, indirect_dim=0),
                src=held[step % 2],
            )
            if step < 3:
                ncc.collective_permute_implicit([[held[step % 2]]], [[held[1 - step % 2]]], FOUR)
        return out

    for run in launch_ranks(kernel, [(x,) for x in arrays], lnc=lnc, target="toy"):
        assert np.array_equal(run.result, np.concatenate(arrays))


def test_rank_id_is_a_register_with_the_rank():
    def kernel():
        out = hbm(1, 1, dtype=nl.int32)
        nisa.register_store(out, ncc.rank_id())
        return out

    assert [r.result.item() for r in launch_ranks(kernel, [()] * 3, target="toy")] == [0, 1, 2]


# -- shapes without values, events, time -----------------------------------------------------------


def shape_kernel(x):
    src, dst, far = copied(x), hbm(8, 3), hbm(2, 3)
    ncc.all_gather([src], [dst], FOUR, 0, name="gather")
    ncc.reduce_scatter([dst], [far], FOUR, 0, nl.add)
    return far


def outline(run):
    return [
        (e.seq, e.core, e.opcode, e.work, where(e.site), [a[1:] for a in e.reads])
        for e in run.trace
    ]


@pytest.mark.parametrize("lnc", [1, 2])
def test_shapes_alone_give_the_same_trace_and_time(lnc):
    valued = launch_ranks(shape_kernel, [(x,) for x in integers(4, 2, 3)], target="toy", lnc=lnc)
    shapes = [(Abstract((2, 3), "float32"),)] * 4
    bare = launch_ranks(shape_kernel, shapes, target="toy", lnc=lnc)
    for one, other in zip(valued, bare, strict=True):
        assert outline(one) == outline(other)
        assert other.outputs == (None,)
        assert one.time().total_ns == other.time().total_ns > 0


@pytest.mark.parametrize("lnc", [1, 2])
def test_the_event_of_a_collective(lnc):
    run = launch_ranks(shape_kernel, [(x,) for x in integers(4, 2, 3)], target="toy", lnc=lnc)[1]
    gathers = [e for e in run.trace if e.opcode == "all_gather"]
    assert [e.core for e in gathers] == list(range(lnc))
    assert [event for (_, name), [event] in run.trace.names.items() if name == "gather"] == gathers
    for event in gathers:
        assert isinstance(event.work, DmaWork)
        assert event.work.hbm_read_bytes == 2 * 3 * 4 // lnc
        assert event.work.hbm_write_bytes == 8 * 3 * 4 // lnc
        assert [a.tile.memory for a in (*event.reads, *event.writes)] == ["hbm", "hbm"]


def test_fifty_runs_leave_one_trace():
    arrays = [(x,) for x in integers(4, 2, 3)]
    first = [outline(run) for run in launch_ranks(shape_kernel, arrays, target="toy", lnc=2)]
    for _ in range(49):
        runs = launch_ranks(shape_kernel, arrays, target="toy", lnc=2)
        assert [outline(run) for run in runs] == first


def test_two_cores_fill_a_shared_source_before_it_is_sent():
    """A collective on shared HBM is a meeting of both cores, too."""
    arrays = integers(4, 2, 3)

    def kernel(x):
        src, dst = hbm(2, 3), hbm(8, 3)
        me = nl.program_id()
        nisa.dma_copy(dst=src[me : me + 1], src=x[me : me + 1])
        ncc.all_gather([src], [dst], FOUR, 0)
        return dst

    for run in launch_ranks(kernel, [(x,) for x in arrays], target="toy", lnc=2):
        assert np.array_equal(run.result, np.concatenate(arrays))
