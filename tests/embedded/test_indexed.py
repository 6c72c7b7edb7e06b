"""nc_n_gather and local_gather: elements by index inside a partition or a GpSimd core."""

from __future__ import annotations

import nki.isa as nisa
import nki.language as nl
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from nki_kernels.machine.errors import OutOfBounds
from nki_kernels.machine.launch import launch
from nki_kernels.machine.trace import StreamWork
from tests.embedded.calls import SITE, H, P, S, of
from tests.embedded.harness import (
    FLOATS,
    INTEGERS,
    Rule,
    by_name,
    check,
    columns,
    data,
    event,
    rows,
    same,
    sb,
    tile,
    values,
)

F32 = np.float32
U16, U32 = nl.uint16, nl.uint32
kinds = st.sampled_from([*FLOATS, *INTEGERS])
seeds = st.integers(0, 2**20)
#: Partitions of a GpSimd core.
CORES = {"toy": 4, "trn2": 16}


def Z(*shape, dtype):
    """A tile of zeros: an index that is inside."""

    def made():
        found = sb(*shape, dtype=dtype)
        nisa.memset(found, 0)
        return found

    return made


# -- nc_n_gather -----------------------------------------------------------------------------------


@given(p=rows, n=columns, m=columns, kind=kinds, seed=seeds)
def test_nc_n_gather(p, n, m, kind, seed):
    x = data(seed, (p, n), kind)
    index = np.random.default_rng(seed).integers(0, n, (p, m)).astype(np.uint32)

    def call(y, i):
        dst = sb(p, m, dtype=kind)
        nisa.nc_n_gather(dst, tile(y), tile(i))
        return dst

    want = np.array([[x[r, c] for c in line] for r, line in enumerate(index)], x.dtype)
    same(values(call, x, index), want)


def test_example_26():
    def call(y, i):
        dst = sb(1, 2, 2)
        nisa.nc_n_gather(dst, tile(y), tile(i))
        return dst

    got = values(call, np.array([[10, 20, 30]], F32), np.array([[2, 0, 2, 1]], np.uint32))
    assert got.tolist() == [[[30, 10], [30, 20]]]


def test_a_gather_in_place_reads_everything_first():
    def call(y, i):
        dst = tile(y)
        nisa.nc_n_gather(dst, dst, tile(i))
        return dst

    got = values(call, np.array([[1, 2, 3]], F32), np.array([[2, 0, 1]], np.uint32))
    assert got.tolist() == [[3, 1, 2]]


def test_an_index_outside_raises():
    def call(y, i):
        nisa.nc_n_gather(sb(1, 1), tile(y), tile(i))

    with pytest.raises(OutOfBounds, match=r"nc_n_gather at .*index 3 .*the 3 elements"):
        launch(call, (np.ones((1, 3), F32), np.array([[3]], np.uint32)), target="toy")


def test_events():
    found = event(lambda: nisa.nc_n_gather(sb(2, 5), sb(2, 3), Z(2, 5, dtype=U32)()))
    operand = ("float32", "sbuf", 4)
    assert (found.engine, len(found.reads)) == (nisa.engine.gpsimd, 2)
    assert found.work == StreamWork("nc_n_gather", "", 5, 2, (operand,), operand)
    found = event(lambda: nisa.local_gather(sb(4, 16), sb(4, 9), Z(4, 1, dtype=U16)(), 4))
    # C = (28 + 16) / 16 / min(4 / 4, 4) = 2.75; 16 / 2.75 = 5.8
    assert (found.engine, found.work.n) == (nisa.engine.gpsimd, 6)


# -- local_gather ----------------------------------------------------------------------------------


@given(case=st.data(), target=st.sampled_from(["toy", "trn2"]), kind=kinds, seed=seeds,
       run=st.sampled_from([1, 2, 4]), cut=st.booleans())  # fmt: skip
def test_local_gather(case, target, kind, seed, run, cut):
    per = CORES[target]
    cores, n, m = (case.draw(st.integers(*r)) for r in ((1, 2), (run, 8), (1, 3)))
    x = data(seed, (cores * per, n), kind)
    index = np.random.default_rng(seed).integers(0, n - run + 1, (cores * per, m))
    count = case.draw(st.integers(1, per * m)) if cut else per * m
    want = []
    for row in range(cores * per):
        core = row // per
        line = []
        for k in range(count):
            at = index[core * per + k % per, k // per]
            line.extend(x[row, at : at + run])
        want.append(line)

    def call(y, i):
        dst = sb(cores * per, count * run, dtype=kind)
        nisa.local_gather(dst, tile(y), tile(i), run, count if cut else None)
        return dst

    same(values(call, x, index.astype(np.uint16), target=target), np.array(want, x.dtype))


def test_examples_24_and_25():
    x = (10 * np.arange(16)[:, None] + np.arange(4)).astype(F32)

    def gather(indices, run):
        index = np.zeros((16, 1), np.uint16)
        index[: len(indices), 0] = indices

        def call(y, i):
            dst = sb(16, len(indices) * run)
            nisa.local_gather(dst, tile(y), tile(i), run, len(indices))
            return dst

        return values(call, x, index, target="trn2")[1].tolist()

    assert gather([3, 1, 0], 1) == [13, 11, 10]
    assert gather([2, 0], 2) == [12, 13, 10, 11]

    order = np.arange(32, dtype=np.uint16).reshape(16, 2)

    def partitions_first(y, i):
        dst = sb(16, 32)
        nisa.local_gather(dst, tile(y), tile(i))
        return dst

    got = values(partitions_first, np.tile(np.arange(32, dtype=F32), (16, 1)), order, target="trn2")
    assert got[0].tolist() == [*range(0, 32, 2), *range(1, 32, 2)]


def test_a_run_past_the_partition_raises():
    def call(y, i):
        nisa.local_gather(sb(4, 8), tile(y), tile(i), 2)

    with pytest.raises(OutOfBounds, match=r"local_gather at .*index 2 with 2 element.*the 3 "):
        launch(call, (np.ones((4, 3), F32), np.full((4, 1), 2, np.uint16)), target="toy")


# -- rules -----------------------------------------------------------------------------------------

by_n = of("nc_n_gather", S(2, 5), S(2, 3), Z(2, 5, dtype=U32))
local = of("local_gather", S(4, 4), S(4, 6), Z(4, 1, dtype=U16))
N_RULES = [
    Rule("one dtype", by_n(), by_n(S(2, 5, dtype=nl.int32)), ("dst int32, data float32",)),
    Rule("uint32 indices", by_n(), by_n(S(2, 5), S(2, 3), S(2, 5, dtype=nl.int32)),
         ("indices is int32", "uint32")),
    Rule("an index an element", by_n(), by_n(S(2, 4)), ("dst [2, 4], indices [2, 5]",)),
    Rule("as many partitions", by_n(), by_n(S(2, 5), S(4, 3)), ("dst [2, 5] and data [4, 3]",)),
    Rule("no PSUM", by_n(), by_n(S(2, 5), P(2, 3)), ("data is in PSUM", "gpsimd")),
    Rule("no HBM", by_n(), by_n(S(2, 5), H(2, 3)), ("data [2, 3] is in HBM",)),
]  # fmt: skip
LOCAL_RULES = [
    Rule("one dtype", local(), local(S(4, 4, dtype=nl.int32)), ("dst int32, src_buffer float32",)),
    Rule("uint16 indices", local(), local(S(4, 4), S(4, 6), Z(4, 1, dtype=U32)),
         ("index is uint32", "uint16")),
    Rule("partitions of index", local(), local(S(4, 4), S(4, 6), Z(8, 1, dtype=U16)),
         ("src_buffer [4, 6] and index [8, 1]",)),
    Rule("partitions of dst", local(), local(S(8, 4)), ("dst [8, 4] and src_buffer [4, 6]",)),
    Rule("whole cores", local(), local(S(2, 2), S(2, 6), Z(2, 1, dtype=U16)),
         ("src_buffer [2, 6] has 2 partitions", "serves 4")),
    Rule("run length", local(S(4, 8), num_elem_per_idx=2), local(S(4, 12), num_elem_per_idx=3),
         ("num_elem_per_idx=3", "1, 2, 4")),
    Rule("enough indices", local(S(4, 4), num_valid_indices=4),
         local(S(4, 5), num_valid_indices=5), ("num_valid_indices=5", "1 to 4")),
    Rule("a count of ints", local(), local(num_valid_indices=4.0), ("num_valid_indices=4.0",)),
    Rule("dst of the size", local(), local(S(4, 5)),
         ("dst [4, 5] for 4 indices of 1 elements", "hold 4")),
    Rule("at most 4096", local(),
         local(S(16, 4112, dtype=nl.int8), S(16, 6, dtype=nl.int8), Z(16, 257, dtype=U16)),
         ("4112 indices a core; at most 4096",), "trn2"),
]  # fmt: skip


@pytest.mark.parametrize("rule", N_RULES, ids=by_name)
def test_nc_n_gather_rule(rule):
    check(rule, "nc_n_gather", SITE)


@pytest.mark.parametrize("rule", LOCAL_RULES[:-1], ids=by_name)
def test_local_gather_rule(rule):
    check(rule, "local_gather", SITE)


def test_local_gather_holds_at_most_4096_indices():
    rule = LOCAL_RULES[-1]
    legal = local(S(16, 16), S(16, 6), Z(16, 1, dtype=U16))
    check(rule._replace(legal=legal), "local_gather", SITE)
