"""Collectives whose sizes are data: all_gather_v and all_to_all_v, against NumPy."""

from __future__ import annotations

from typing import Any

import nki.collectives as ncc
import nki.isa as nisa
import nki.language as nl
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from nki_kernels.machine.errors import (
    OutOfBounds,
    RuleViolation,
)
from nki_kernels.machine.ranks import launch_ranks
from tests.embedded.harness import hbm, sb
from tests.embedded.world import FOUR, copied, integers, metadata


def sized(call, table, arrays, room, *, lnc, target="toy", sbuf=False, **options):
    """Per rank, (dst, metadata) after an all_*_v; dst starts as -1."""
    rows, ranks = table[0].shape

    def kernel(x, numbers, blank):
        src, dst, meta = copied(x), copied(blank), copied(numbers)
        used = meta
        if sbuf:
            used = sb(1, rows, ranks, dtype=nl.uint32)
            nisa.dma_copy(dst=used, src=numbers.reshape((1, rows, ranks)))
            meta = hbm(rows, ranks, dtype=nl.uint32)
        call([src], [dst], FOUR, used, **options)
        if sbuf:
            nisa.dma_copy(dst=meta.reshape((1, rows, ranks)), src=used)
        return dst, meta

    blank = -np.ones(room, np.float32)
    arguments = [(x, t.astype(np.uint32), blank) for x, t in zip(arrays, table, strict=True)]
    return [run.result for run in launch_ranks(kernel, arguments, target=target, lnc=lnc)]


@given(
    sends=st.lists(st.tuples(st.integers(0, 3), st.integers(0, 3)), min_size=4, max_size=4),
    known=st.booleans(),
    sbuf=st.booleans(),
)
def test_all_gather_v(sends, known, sbuf):
    arrays = integers(4, 2, 3)
    table = [np.array([[n] * 4, [at] * 4, [77] * 4]) for n, at in sends]
    found = sized(
        ncc.all_gather_v, table, arrays, (4, 3), lnc=2, sbuf=sbuf, recv_counts_known=known
    )
    want = -np.ones((4, 3), np.float32)
    for row, (array, (n, at)) in enumerate(zip(arrays, sends, strict=True)):
        want[row, :n] = array.reshape(-1)[at : at + n]
    for dst, meta in found:
        assert np.array_equal(dst, want)
        assert meta[2].tolist() == ([77] * 4 if known else [n for n, _ in sends])


@pytest.mark.parametrize("moved", [False, True], ids=["slots", "rdispls"])
@pytest.mark.parametrize("lnc", [1, 2])
def test_all_to_all_v(lnc, moved):
    arrays = integers(4, 2, 4)
    counts = np.array([[1, 2, 0, 2], [0, 0, 1, 1], [2, 2, 2, 2], [1, 0, 0, 0]])
    starts = np.cumsum(counts, 1) - counts
    places = [[3 * s for s in (3, 1, 0, 2)] for _ in range(4)]
    table = [
        np.array([counts[r], starts[r], [0] * 4] + ([places[r]] if moved else [])) for r in range(4)
    ]
    options: dict[str, Any] = {"has_rdispls": True, "target": "trn3"} if moved else {}
    if moved and lnc == 1:
        with pytest.raises(RuleViolation, match="a launch on one core; on gen4 it takes two"):
            sized(ncc.all_to_all_v, table, arrays, (12,), lnc=lnc, **options)
        return
    found = sized(ncc.all_to_all_v, table, arrays, (12,), lnc=lnc, **options)
    for rank, (dst, meta) in enumerate(found):
        want = -np.ones(12, np.float32)
        for sender in range(4):
            n, at = counts[sender, rank], starts[sender, rank]
            place = places[rank][sender] if moved else 3 * sender
            want[place : place + n] = arrays[sender].reshape(-1)[at : at + n]
        assert np.array_equal(dst, want)
        assert meta[2].tolist() == counts[:, rank].tolist()


BAD_SIZES = [
    ((7, 0), (4, 8), "sends elements 0 to 6 of its src, which has 6"),
    ((3, 4), (4, 8), "sends elements 4 to 6 of its src, which has 6"),
    ((3, 0), (4, 2), "3 elements of the 0. rank of the group arrive at element 0 of a dst of 8"),
]


@pytest.mark.parametrize(("send", "room", "says"), BAD_SIZES, ids=lambda v: str(v)[:20])
def test_chunks_must_fit(send, room, says):
    table = [np.array([[n] * 4 for n in (*send, 0)])] * 4
    with pytest.raises(OutOfBounds) as caught:
        sized(ncc.all_gather_v, table, integers(4, 2, 3), room, lnc=2)
    assert says in str(caught.value)


@pytest.mark.parametrize("known", [True, False])
def test_the_counts_written_are_in_the_event(known):
    def kernel(x):
        table = metadata(3, 4)
        ncc.all_gather_v([copied(x)], [hbm(4, 2)], FOUR, table, recv_counts_known=known)
        return table

    arrays = [(x,) for x in integers(4, 1, 2)]
    for run in launch_ranks(kernel, arrays, target="toy", lnc=2):
        for event in (e for e in run.trace if e.opcode == "all_gather_v"):
            assert [a.tile.dtype for a in event.reads] == ["float32", "uint32"]
            assert [a.tile.dtype for a in event.writes] == ["float32", "uint32"][: 2 - known]
