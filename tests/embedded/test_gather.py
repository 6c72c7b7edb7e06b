"""nc_stream_shuffle: rows within a quadrant, kept rows, start partitions."""

from __future__ import annotations

import nki.isa as nisa
import nki.language as nl
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from nki_kernels.machine.errors import UninitializedRead
from nki_kernels.machine.launch import launch
from nki_kernels.machine.trace import StreamWork
from tests.embedded.harness import (
    FLOATS,
    INTEGERS,
    PSUM,
    SBUF,
    Rule,
    by_name,
    check,
    columns,
    data,
    event,
    hbm,
    ps,
    refused,
    same,
    sb,
    tile,
    values,
)

F32 = np.float32
KEEP = 255
QUADRANTS = {"toy": 2, "trn2": 32}
kinds = st.sampled_from([*FLOATS, *INTEGERS])
seeds = st.integers(0, 2**20)


def shuffled(dst, src, mask):
    """The rows one by one, in Python."""
    out = dst.copy()
    size = len(mask)
    for row in range(dst.shape[0]):
        if mask[row % size] != KEEP:
            out[row] = src[row // size * size + mask[row % size]]
    return out


@st.composite
def masks(draw, target, sources, rows):
    """A mask whose entries lie in src for every row of dst."""
    size = QUADRANTS[target]
    mask = []
    for i in range(size):
        bases = [row - i for row in range(i, rows, size)]
        highest = min([size, *[sources - base for base in bases]])
        mask.append(draw(st.sampled_from([KEEP, *range(max(0, highest))])))
    return mask


@given(case=st.data(), target=st.sampled_from(["toy", "trn2"]), n=columns, kind=kinds,
       places=st.tuples(*[st.sampled_from([SBUF, PSUM])] * 2), seed=seeds)  # fmt: skip
def test_nc_stream_shuffle(case, target, n, kind, places, seed):
    most = 8 if target == "toy" else 128
    sources, rows = (case.draw(st.integers(1, most)) for _ in range(2))
    mask = case.draw(masks(target, sources, rows))
    x, old = data(seed, (sources, n), kind), data(seed + 1, (rows, n), kind)

    def call(y, before):
        dst = tile(before, places[0])
        nisa.nc_stream_shuffle(dst, tile(y, places[1]), mask)
        return dst

    same(values(call, x, old, target=target), shuffled(old, x, mask))


@given(case=st.data(), target=st.sampled_from(["toy", "trn2"]), seed=seeds)
def test_a_shuffle_in_place_reads_everything_first(case, target, seed):
    rows = case.draw(st.integers(1, 8))
    mask = case.draw(masks(target, rows, rows))
    x = data(seed, (rows, 3), nl.float32)

    def call(y):
        dst = tile(y)
        nisa.nc_stream_shuffle(dst, dst, mask)
        return dst

    same(values(call, x, target=target), shuffled(x, x, mask))


def shuffle(rows, mask, in_place=False):
    def call(y, before):
        dst = tile(before)
        nisa.nc_stream_shuffle(dst, dst if in_place else tile(y), mask)
        return dst

    return lambda src, dst: values(call, src, dst, target="trn2")[:, 0].tolist()


def test_example_27():
    partitions = np.arange(32, dtype=F32)[:, None]
    got = shuffle(32, [(i - 1) % 32 for i in range(32)])(partitions, partitions)
    assert got == [31, *range(31)]
    assert shuffle(32, [0] * 32)(np.full((1, 1), 5, F32), partitions) == [5] * 32
    got = shuffle(32, [16] + [KEEP] * 31, in_place=True)(partitions, partitions)
    assert got == [16, *range(1, 32)]


def test_quadrants_are_counted_from_the_start_of_the_views():
    x = np.arange(128, dtype=F32)[:, None]

    def call(y):
        dst, src = sb(128, 1), tile(y)
        nisa.nc_stream_shuffle(dst[32:64], src[96:128], [31 - i for i in range(32)])
        return dst[32:64]

    assert values(call, x, target="trn2")[:, 0].tolist() == list(range(127, 95, -1))


def test_free_shapes_may_differ():
    x = data(1, (2, 6), nl.int16)

    def call(y):
        dst = sb(2, 3, 2, dtype=nl.int16)
        nisa.nc_stream_shuffle(dst, tile(y), [1, 0])
        return dst

    same(values(call, x), x[::-1].reshape(2, 3, 2))


def test_kept_rows_do_not_count_as_written():
    x = np.ones((2, 3), F32)

    def fill(y):
        dst = sb(2, 3)
        nisa.nc_stream_shuffle(dst, tile(y), [1, KEEP])
        return dst

    same(values(lambda y: fill(y)[0:1], x), np.ones((1, 3), F32))

    def reads_the_kept_row(y):
        nisa.tensor_copy(sb(2, 3), fill(y))

    with pytest.raises(UninitializedRead, match=r"reads 3 of 6 elements .*first at index \(1, 0\)"):
        launch(reads_the_kept_row, (x,), target="toy")


def test_a_mask_that_keeps_everything_changes_nothing():
    x = data(2, (2, 3), nl.float32)

    def call(y):
        dst = tile(y)
        nisa.nc_stream_shuffle(dst, tile(y)[0:1], [KEEP, KEEP])
        return dst

    same(values(call, x), x)


def test_nc_stream_shuffle_event():
    found = event(lambda: nisa.nc_stream_shuffle(sb(2, 6), sb(2, 6), [0, 1]))
    operand = ("float32", "sbuf", 4)
    assert (found.opcode, found.engine) == ("nc_stream_shuffle", nisa.engine.vector)
    assert (found.hidden_reads, found.hidden_writes) == ((), ("shuffle_mask",))
    assert found.work == StreamWork("nc_stream_shuffle", "", 6, 2, (operand,), operand)


# -- rules -----------------------------------------------------------------------------------------


def move(dst, src, mask):
    return lambda: nisa.nc_stream_shuffle(dst(), src(), mask)


def rows_of(tile_rows, start, stop):
    return lambda: sb(tile_rows, 3)[start:stop]


LEGAL = move(lambda: sb(2, 3), lambda: ps(2, 3), [0, 1])
RULES = [
    Rule("no HBM operand", LEGAL, move(lambda: sb(2, 3), lambda: hbm(2, 3), [0, 1]),
         ("src [2, 3] is in HBM", "dma_copy")),
    Rule("one dtype", LEGAL, move(lambda: sb(2, 3, dtype=nl.int8), lambda: sb(2, 3), [0, 1]),
         ("dst int8, src float32", "dtypes must be equal")),
    Rule("equal columns", LEGAL, move(lambda: sb(2, 3), lambda: sb(2, 4), [0, 1]),
         ("src [2, 4] and dst [2, 3]", "elements per partition must be equal")),
    Rule("mask of the quadrant's size", LEGAL, move(lambda: sb(2, 3), lambda: sb(2, 3), [0]),
         ("shuffle_mask=(0,)", "list of 2 ints")),
    Rule("mask of ints", LEGAL, move(lambda: sb(2, 3), lambda: sb(2, 3), [0, 1.0]),
         ("shuffle_mask=(0, 1.0)", "ints")),
    Rule("mask is a list", LEGAL, move(lambda: sb(2, 3), lambda: sb(2, 3), 1),
         ("shuffle_mask=1", "list of 2 ints")),
    Rule("entries of the quadrant", move(lambda: sb(2, 3), lambda: sb(2, 3), [0, KEEP]),
         move(lambda: sb(2, 3), lambda: sb(2, 3), [0, 2]),
         ("shuffle_mask entry 2", "0 to 1", "255 to keep")),
    Rule("no negative entry", LEGAL, move(lambda: sb(2, 3), lambda: sb(2, 3), [-1, 0]),
         ("shuffle_mask entry -1",)),
    Rule("src has the row", move(lambda: sb(4, 3), lambda: sb(3, 3), [0, KEEP]),
         move(lambda: sb(4, 3), lambda: sb(3, 3), [1, KEEP]),
         ("dst partition 2 takes src partition 3", "which has 3", "shuffle_mask[0]")),
    Rule("start of one quadrant", move(rows_of(8, 2, 4), rows_of(8, 6, 7), [0, 0]),
         move(rows_of(8, 3, 4), rows_of(8, 6, 7), [0, 0]),
         ("dst starts at partition 3", "2 active partitions", "0, 2, 4, 6", "DMA")),
    Rule("the larger operand decides", move(rows_of(8, 0, 4), rows_of(8, 4, 5), [KEEP, KEEP]),
         move(rows_of(8, 0, 4), rows_of(8, 2, 3), [KEEP, KEEP]),
         ("src starts at partition 2", "4 active partitions", "0, 4")),
    Rule("three quadrants start at 0", move(rows_of(8, 0, 5), rows_of(8, 0, 1), [KEEP, KEEP]),
         move(rows_of(8, 0, 5), rows_of(8, 4, 5), [KEEP, KEEP]),
         ("src starts at partition 4", "6 active partitions", "may start at 0:")),
]  # fmt: skip


@pytest.mark.parametrize("rule", RULES, ids=by_name)
def test_nc_stream_shuffle_rule(rule):
    check(rule, "nc_stream_shuffle", __file__)


def test_a_remembered_verdict_is_not_that_of_an_equal_list_of_another_type():
    def kernel():
        dst, src = sb(2, 3), ps(2, 3)
        nisa.memset(src, 0.0)
        nisa.nc_stream_shuffle(dst, src, [0, 1])
        nisa.nc_stream_shuffle(dst, src, [0, 1.0])

    refused(kernel, "shuffle_mask=(0, 1.0)")


def test_an_address_counts_as_a_start():
    def at(start):
        def call():
            dst = nl.ndarray((2, 3), nl.float32, buffer=SBUF, address=(start, 0))
            nisa.nc_stream_shuffle(dst=dst, src=sb(2, 3), shuffle_mask=[0, 1])

        return call

    rule = Rule("address", at(2), at(3), ("dst starts at partition 3",))
    check(rule, "nc_stream_shuffle", __file__)
