"""Collectives that cannot work: missing and unlike calls, illegal operands; no hangs."""

from __future__ import annotations

import inspect
from typing import Any

import nki.collectives as ncc
import nki.isa as nisa
import nki.language as nl
import numpy as np
import pytest

from nki_kernels.machine.errors import (
    KernelError,
    NkiKernelsError,
    RuleViolation,
    UninitializedRead,
)
from nki_kernels.machine.ranks import launch_ranks
from tests.embedded.harness import hbm, ps, sb
from tests.embedded.world import FOUR, PAIRS, copied, failing, full, integers, metadata

# -- calls that do not match -----------------------------------------------------------------------


def reduce(shape=(1, 2), group=FOUR, op=nl.add, dtype=nl.float32):
    return ncc.all_reduce([full(*shape, dtype=dtype)], [hbm(*shape, dtype=dtype)], group, op)


def one_rank_stays_away(rank):
    if rank != 2:
        reduce()


def one_rank_calls_twice(rank):
    for _ in range(1 + (rank == 3)):
        reduce()


def groups_differ(rank):
    reduce(group=FOUR if rank else PAIRS)


def one_core_stays_away(rank):
    if rank or nl.program_id():
        reduce()


STUCK = [
    (one_rank_stays_away, 1, ["rank 0 waits at nki.collectives.all_reduce, ", "rank 2 ended"]),
    (one_rank_calls_twice, 1, ["rank 0 ended (its last", "rank 3 waits at", "for rank 0, rank 1"]),
    (groups_differ, 1, ["rank 0 waits at", "for rank 2", "rank 1 waits at", "for rank 0"]),
    (one_core_stays_away, 2, ["rank 0 core 0 ended", "rank 0 core 1 waits", "for rank 0 core 0"]),
]


@pytest.mark.parametrize(("body", "lnc", "says"), STUCK, ids=lambda v: getattr(v, "__name__", ""))
def test_a_missing_call_is_an_error_that_names_the_lines(body, lnc, says):
    message = failing(body, lnc=lnc)
    for part in (*says, f"{__file__}:", "nobody can go on; every core and rank must run the same"):
        assert part in message


def other_call(rank):
    if rank == 1:
        ncc.all_to_all([full(4, 1)], [hbm(4, 1)], FOUR, 0)
    else:
        reduce((4, 1))


def other_operator(rank):
    reduce(op=nl.add if rank else nl.maximum)


def other_shape(rank):
    reduce((1, 2 + (rank == 3)))


def other_dtype(rank):
    reduce(dtype=nl.float32 if rank else nl.int32)


UNLIKE = [
    (other_call, "calls nki.collectives.all_reduce, rank 1 at"),
    (other_call, "all ranks of a group must make the same calls in the same order"),
    (other_operator, "asks for ('maximum',), rank 1 at"),
    (other_shape, "srcs [1, 2] float32, dsts [1, 2] float32, rank 3 at"),
    (other_dtype, "shapes and dtypes must be equal on all ranks"),
]


@pytest.mark.parametrize(("body", "says"), UNLIKE)
def test_calls_that_differ_between_ranks_are_named(body, says):
    message = failing(body)
    assert says in message
    assert message.count(f"{__file__}:") == 2


def test_cores_of_a_rank_name_the_same_tensor():
    def body(rank):
        a, b = full(1, 2), full(1, 2)
        ncc.all_reduce([a if nl.program_id() else b], [hbm(1, 2)], FOUR, nl.add)

    assert "both cores of a rank must name the same" in failing(body, lnc=2)


def test_an_error_says_which_rank_and_writes_nothing():
    arrays = integers(2, 1, 2)
    before = [x.copy() for x in arrays]

    def kernel(x):
        tile = sb(1, 2)
        nisa.memset(tile, 7)
        nisa.dma_copy(dst=x, src=tile)
        if x.numpy() is not None:
            ncc.all_reduce([full(1, 2)], [hbm(1, 2)], ncc.ReplicaGroup([[0, 1]]), nl.exp)

    with pytest.raises(RuleViolation) as caught:
        launch_ranks(kernel, [(x,) for x in arrays], target="toy")
    assert caught.value.__notes__ == ["raised on rank 0"]
    assert all(np.array_equal(a, b) for a, b in zip(arrays, before, strict=True))


def test_an_unwritten_source_is_refused():
    def body(rank):
        ncc.all_reduce([hbm(1, 2)], [hbm(1, 2)], FOUR, nl.add)

    message = failing(body, error=UninitializedRead)
    assert "nki.collectives.all_reduce at" in message
    assert "srcs[0] reads 2 of 2 elements that no instruction wrote" in message


# -- rules -----------------------------------------------------------------------------------------


def filled(*shape):
    tile = sb(*shape)
    nisa.memset(tile, 0)
    return tile


def dynamic():
    register = nisa.register_alloc(0)
    return full(2, 2).ap(pattern=[[2, 1], [1, 2]], scalar_offset=register, indirect_dim=0)


R = RuleViolation
RULES: list[tuple[Any, type[NkiKernelsError], str]] = [
    (lambda: ncc.all_reduce(full(1, 2), [hbm(1, 2)], FOUR, nl.add), R, "must be a list of tensors"),
    (lambda: ncc.all_reduce([], [], FOUR, nl.add), R, "srcs=[]; it must be a list of tensors"),
    (lambda: ncc.all_reduce([3], [hbm(1, 2)], FOUR, nl.add), R, "srcs[0] is int; it must be a"),
    (lambda: reduce(op=nl.multiply), R, "op=nl.multiply; it must be nl.add, nl.minimum or nl.max"),
    (lambda: reduce(group=[[0]]), R, "replica_group=[[0]]; it must be a ReplicaGroup"),
    (
        lambda: reduce(group=ncc.ReplicaGroup([[0, 1, 2, 3, 4]])),
        KernelError,
        "rank 4 of [[0, 1, 2, 3, 4]] does not exist in a world of 4; run the kernel with",
    ),
    (
        lambda: reduce(group=ncc.ReplicaGroup([[1, 2]])),
        KernelError,
        "rank 0 is in none of the groups [[1, 2]]; add it, or leave the call out on this rank",
    ),
    (
        lambda: ncc.all_reduce([full(1, 2)], [hbm(2, 1)], FOUR, nl.add),
        R,
        "dsts[0] [2, 1]; it must be [1, 2]: the shape of its source",
    ),
    (
        lambda: ncc.all_reduce([full(1, 2)], [hbm(1, 2, dtype=nl.int32)], FOUR, nl.add),
        R,
        "srcs[0] float32, dsts[0] int32; dtypes must be equal",
    ),
    (
        lambda: ncc.all_reduce([full(1, 2)], [sb(1, 2)], FOUR, nl.add),
        R,
        "tensors in SBUF and in HBM; all must be in one of them",
    ),
    (
        lambda: ncc.all_reduce([full(1, 2)] * 2, [hbm(1, 2)], FOUR, nl.add),
        R,
        "2 srcs and 1 dsts; they must be as many",
    ),
    (
        lambda: ncc.all_reduce([filled(1, 2)] * 2, [sb(1, 2)] * 2, FOUR, nl.add),
        R,
        "2 tensors in SBUF; several at once must be in HBM",
    ),
    (
        lambda: ncc.all_reduce([ps(1, 2)], [ps(1, 2)], FOUR, nl.add),
        R,
        "srcs[0] is in PSUM; it must",
    ),
    (
        lambda: ncc.all_reduce([filled(1, 2, 2)], [sb(1, 2, 2)], FOUR, nl.add),
        R,
        "srcs[0] [1, 2, 2] in SBUF; collectives take 2-D tiles there",
    ),
    (
        lambda: ncc.all_reduce([dynamic()], [hbm(1, 2)], FOUR, nl.add),
        R,
        "srcs[0] has a run-time address; copy it with dma_copy first",
    ),
    (
        lambda: ncc.all_reduce([full(1, 2)], [hbm(1, 2)], FOUR, nl.add, priority=1),
        R,
        "priority=1 on toy; it must be None, or 0 to 3 on gen4",
    ),
    (
        lambda: ncc.all_gather([full(1, 2)], [hbm(3, 2)], FOUR, 0),
        R,
        "dsts[0] [3, 2]; it must be [4, 2]: 4 parts of [1, 2]",
    ),
    (
        lambda: ncc.all_gather([filled(1, 2)], [sb(1, 8)], FOUR, 2),
        R,
        "collective_dim=2; it must be 0 or 1 for these tensors",
    ),
    (
        lambda: ncc.reduce_scatter([full(4, 2)], [hbm(4, 2)], FOUR, 0, nl.add),
        R,
        "dsts[0] [4, 2]; it must be [1, 2]: one of 4 parts",
    ),
    (
        lambda: ncc.reduce_scatter([full(3, 2)], [hbm(1, 2)], FOUR, 0, nl.add),
        R,
        "srcs[0] [3, 2]: dimension 0 must be a multiple of the 4 ranks of the group; pad it",
    ),
    (
        lambda: ncc.all_to_all([filled(4, 2)], [sb(4, 2)], FOUR, 0),
        R,
        "srcs[0] is in SBUF; it must be in HBM: copy it",
    ),
    (
        lambda: ncc.collective_permute([full(1, 2)] * 2, [hbm(1, 2)] * 2, [(0, 1)]),
        R,
        "srcs has 2 tensors; at most 1: call it for each",
    ),
    (
        lambda: ncc.collective_permute([full(1, 2)], [hbm(1, 2)], []),
        R,
        "source_target_pairs=[]; it must be a list of (source, target)",
    ),
    (
        lambda: ncc.collective_permute([full(1, 2)], [hbm(1, 2)], [(0, 4)]),
        R,
        "pair (0, 4) of source_target_pairs; it must be two ranks of 0 to 3",
    ),
    (
        lambda: ncc.collective_permute([full(1, 2)], [hbm(1, 2)], [(0, 1), (0, 2)]),
        R,
        "((0, 1), (0, 2)): a rank is source twice; once at most",
    ),
    (
        lambda: ncc.collective_permute([full(1, 2)], [hbm(1, 2)], [(0, 1), (2, 1)]),
        R,
        "((0, 1), (2, 1)): a rank is target twice; once at most",
    ),
    (
        lambda: ncc.collective_permute_implicit([[full(1, 2)]] * 5, [[hbm(1, 2)]] * 5, FOUR),
        R,
        "it must be a list of 1 to 4 lists, one a channel",
    ),
    (
        lambda: ncc.collective_permute_implicit([[full(1, 2)]], [[hbm(1, 2)]], FOUR, [1]),
        R,
        "channel_ids=[1] for 1 channels of srcs_by_channel; it must be [0]",
    ),
    (
        lambda: ncc.collective_permute_implicit_current_processing_rank_id(-1, FOUR),
        R,
        "iteration_id=-1; it must be an int from 0 up",
    ),
    (
        lambda: ncc.collective_permute_implicit_current_processing_rank_id(0, FOUR, 4),
        R,
        "channel_id=4; it must be 0 to 3",
    ),
    (
        lambda: ncc.all_gather_v([full(1, 2)], [hbm(4, 2)], FOUR, metadata(3, 4)),
        R,
        "a group of 4 ranks on 1 core(s) each; it takes groups of 4 and launches on two cores",
    ),
    (
        lambda: ncc.all_gather_v([full(1, 2)], [hbm(4, 2)], FOUR, metadata(4, 4), has_rdispls=True),
        R,
        "has_rdispls=True is not supported yet by NKI; leave it out",
    ),
    (
        lambda: ncc.all_to_all_v([full(1, 4)], [hbm(4, 2)], FOUR, metadata(4, 4), has_rdispls=True),
        R,
        "has_rdispls=True on toy; it needs gen4: leave it out",
    ),
    (
        lambda: ncc.all_to_all_v([full(1, 4)], [hbm(4, 2)], FOUR, metadata(3, 3)),
        R,
        "metadata_tensor [3, 3] uint32 in HBM; it must be uint32, [3, 4] in HBM or [1, 3, 4] in",
    ),
    (
        lambda: ncc.all_to_all_v([full(1, 4)], [hbm(4, 2)], FOUR, None),
        R,
        "metadata_tensor=None; it must be a uint32 tensor",
    ),
    (
        lambda: ncc.all_to_all_v([full(1, 4)], [hbm(4, 2)], FOUR, hbm(3, 4, dtype=nl.uint32)),
        UninitializedRead,
        "row 0 of metadata reads 4 of 4 elements that no instruction wrote",
    ),
]


@pytest.mark.parametrize(("call", "error", "says"), RULES, ids=[r[2][:50] for r in RULES])
def test_an_illegal_call_is_named(call, error, says):
    message = failing(lambda rank: call(), error=error)
    assert says in message
    assert "nki.collectives." in message
    assert f" at {__file__}:" in message


def test_private_and_shared_memory_do_not_mix():
    def body(rank):
        mine = nl.ndarray((1, 2), nl.float32, buffer=nl.hbm)
        ncc.all_reduce([full(1, 2)], [mine], FOUR, nl.add)

    assert "tensors in private and in shared HBM; all must be in one" in failing(
        body, error=R, lnc=2
    )


def test_an_argument_is_out_of_reach():
    def kernel(x):
        ncc.all_reduce([x], [hbm(*x.shape)], ncc.ReplicaGroup([[0]]), nl.add)

    with pytest.raises(
        R, match=r"srcs\[0\] 'x' is an argument of the kernel, which collectives do"
    ):
        launch_ranks(kernel, [(np.zeros((1, 2), np.float32),)], target="toy")


GROUP_ERRORS = [
    ([], "ReplicaGroup: []; it must be a list of disjoint, non-empty lists of rank numbers"),
    (None, "ReplicaGroup: None; it must be a list of disjoint"),
    ([[]], "ReplicaGroup: group []; it must be"),
    ([0, 1], "ReplicaGroup: group 0; it must be"),
    ([[0, True]], "ReplicaGroup: rank True; ranks are ints from 0 up"),
    ([[0, -1]], "ReplicaGroup: rank -1; ranks are ints from 0 up"),
    ([[0, 1], [1]], "ReplicaGroup: rank 1 is in [[0, 1], [1]] twice; groups are disjoint"),
]


@pytest.mark.parametrize(("groups", "says"), GROUP_ERRORS, ids=lambda v: str(v)[:30])
def test_a_bad_group_is_refused(groups, says):
    with pytest.raises(R) as caught:
        ncc.ReplicaGroup(groups)
    assert str(caught.value).startswith(says)


@pytest.mark.parametrize("args", [[], None, [1], "ab"])
def test_a_world_has_arguments_per_rank(args):
    with pytest.raises(KernelError) as caught:
        launch_ranks(reduce, args)
    assert "it must be a list with a tuple of arguments per rank" in str(caught.value)
    with pytest.raises(KernelError, match="2 ranks in args, 1 in kwargs; pass as many of each"):
        launch_ranks(reduce, [(), ()], [{}])


def test_a_world_of_one_needs_nobody():
    def kernel(x):
        out = hbm(*x.shape)
        ncc.all_reduce([copied(x)], [out], ncc.ReplicaGroup([[0]]), nl.add)
        return out

    x = np.ones((1, 2), np.float32)
    (run,) = launch_ranks(kernel, [(x,)], target="toy")
    assert np.array_equal(run.result, x)


def test_default_channels_are_the_published_ones():
    assert inspect.signature(ncc.collective_permute_implicit).parameters["channel_ids"].default == [
        0
    ]
