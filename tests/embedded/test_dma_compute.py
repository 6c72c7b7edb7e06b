"""dma_compute: sums, gather and scatter read-modify-write, bounds, rules, events."""

from __future__ import annotations

import nki.isa as nisa
import nki.language as nl
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from nki_kernels.machine.errors import OutOfBounds, RuleViolation, UninitializedRead
from nki_kernels.machine.launch import launch
from nki_kernels.machine.options import NkiWarning
from nki_kernels.machine.scheduler import schedule
from nki_kernels.machine.tensor import Abstract
from tests.embedded.calls import H, P, S, made
from tests.embedded.harness import (
    FLOATS,
    HBM,
    INTEGERS,
    SBUF,
    Rule,
    by_name,
    cast,
    check,
    columns,
    data,
    event,
    hbm,
    refused,
    rows,
    same,
    sb,
    tile,
    values,
)

F32 = np.float32
SKIP = nisa.oob_mode.skip
kinds = st.sampled_from([*FLOATS, *INTEGERS])
seeds = st.integers(0, 2**20)


def summed(arrays):
    """Element by element, from left to right, each step rounded to float32."""
    total = arrays[0].astype(float)
    for x in arrays[1:]:
        total = cast(total + cast(x.astype(float), nl.float32).astype(float), nl.float32)
        total = total.astype(float)
    return total


@given(p=rows, n=columns, types=st.lists(kinds, min_size=2, max_size=5), seed=seeds,
       places=st.tuples(*[st.sampled_from([SBUF, HBM])] * 2), aslist=st.booleans())  # fmt: skip
def test_a_sum_adds_in_float32_and_rounds_once(p, n, types, seed, places, aslist):
    arrays = [data(seed + i, (p, n), kind) for i, kind in enumerate(types[1:])]

    def call(*inputs):
        dst = nl.ndarray((p, n), types[0], buffer=places[0])
        srcs = [x if i % 2 and places[1] is HBM else tile(x) for i, x in enumerate(inputs)]
        nisa.dma_compute(dst, srcs if aslist else tuple(srcs), nl.add, scales=[1.0] * len(srcs))
        return dst

    same(values(call, *arrays), cast(summed(arrays), types[0]))


def test_shapes_may_differ_and_dst_may_be_a_source():
    x = np.arange(24, dtype=F32).reshape(2, 3, 4)

    def call(y):
        dst = tile(y)
        nisa.dma_compute(dst, [dst, y.reshape((4, 6))], nl.add)
        return dst

    same(values(call, x), 2 * x)


def rows_at(table, index, width, count):
    return table.ap([[width, count], [1, width]], vector_offset=index)


@given(case=st.data(), count=st.integers(1, 8), n=columns, types=st.tuples(kinds, kinds),
       skip=st.booleans(), twin_first=st.booleans(), seed=seeds)  # fmt: skip
def test_scatter_adds_rows(case, count, n, types, skip, twin_first, seed):
    size = 10
    some = st.integers(-3, size + 3) if skip else st.integers(0, size - 1)
    index = case.draw(st.lists(some, min_size=count, max_size=count, unique=True))
    table, x = data(seed, (size, n), types[0]), data(seed + 1, (count, n), types[1])
    want = table.copy()
    for row, at in enumerate(index):
        if 0 <= at < size:
            want[at] = cast(summed([want[at], x[row]]), types[0])

    def call(old, y, indices):
        where, src = tile(indices), tile(y)
        out = hbm(size, n, dtype=types[0])
        nisa.dma_copy(out, old)
        dst = rows_at(out, where, n, count)
        pair = [rows_at(out, where, n, count), src]
        nisa.dma_compute(dst, pair if twin_first else pair[::-1], nl.add,
                         oob_mode=SKIP if skip else nisa.oob_mode.error)  # fmt: skip
        return out

    same(values(call, table, x, np.array(index, np.int32)[:, None]), want)


@given(case=st.data(), count=st.integers(1, 8), n=columns, types=st.tuples(kinds, kinds),
       skip=st.booleans(), seed=seeds)  # fmt: skip
def test_gather_adds_rows(case, count, n, types, skip, seed):
    size = 10
    some = st.integers(-3, size + 3) if skip else st.integers(0, size - 1)
    index = case.draw(st.lists(some, min_size=count, max_size=count))
    table, x = data(seed, (size, n), types[0]), data(seed + 1, (count, n), types[1])
    want = x.copy()
    for row, at in enumerate(index):
        if 0 <= at < size:
            want[row] = cast(summed([x[row], table[at]]), types[1])

    def call(old, y, indices):
        where, dst = tile(indices), tile(y)
        nisa.dma_compute(dst, (dst, rows_at(old, where, n, count)), nl.add,
                         oob_mode=SKIP if skip else nisa.oob_mode.error)  # fmt: skip
        return dst

    same(values(call, table, x, np.array(index, np.int32)[:, None]), want)


def test_example_30():
    def call(table, x, index):
        out = hbm(4, 1)
        nisa.dma_copy(out, table)
        dst = rows_at(out, tile(index), 1, 2)
        nisa.dma_compute(dst, [dst, tile(x)], nl.add)
        return out

    table, x = np.array([[1], [2], [3], [4]], F32), np.array([[10], [20]], F32)
    index = np.array([[3], [1]], np.int32)
    assert values(call, table, x, index)[:, 0].tolist() == [1, 22, 3, 14]


def scatter(index, table, x, repeat=False):
    def call(old, y, indices):
        out = hbm(4, 2)
        nisa.dma_copy(out, old)
        dst = rows_at(out, tile(indices), 2, 2)
        other = rows_at(out, tile(indices), 2, 2) if repeat else dst
        nisa.dma_compute(dst, [other, tile(y)], nl.add)
        return out

    return values(call, table, x, np.array(index, np.int32)[:, None])


ONES = np.ones((2, 2), F32)


def test_repeated_indices_warn():
    with pytest.warns(NkiWarning, match="1 of 2 indices repeat another; .* undefined"):
        got = scatter([1, 1], np.zeros((4, 2), F32), ONES)
    assert got[:, 0].tolist() == [0, 2, 0, 0]


def test_an_index_outside_raises():
    with pytest.raises(OutOfBounds, match=r"dma_compute at .* dst: row 1 .*oob_mode.skip"):
        scatter([1, 4], np.zeros((4, 2), F32), ONES)

    def gather(table, y, index):
        dst = tile(y)
        nisa.dma_compute(dst, [dst, rows_at(table, tile(index), 2, 2)], nl.add)

    with pytest.raises(OutOfBounds, match="srcs: row 0 "):
        launch(gather, (np.zeros((4, 2), F32), ONES, np.array([[-1], [0]], np.int32)))


def test_rows_must_have_been_written():
    def call(y, index):
        dst = rows_at(hbm(4, 2), tile(index), 2, 2)
        nisa.dma_compute(dst, [dst, tile(y)], nl.add)

    with pytest.raises(UninitializedRead, match=r"dma_compute at .*row 0 reads"):
        launch(call, (ONES, np.array([[1], [0]], np.int32)), target="toy")


def test_the_source_that_stands_for_dst_is_dst():
    with pytest.raises(RuleViolation, match=r"different views; .*pass the same view twice"):
        scatter([1, 2], np.zeros((4, 2), F32), ONES, repeat=True)

    def gather(table, y, index):
        nisa.dma_compute(tile(y), [tile(y), rows_at(table, tile(index), 2, 2)], nl.add)

    with pytest.raises(RuleViolation, match="different views"):
        launch(gather, (np.zeros((4, 2), F32), ONES, np.array([[1], [0]], np.int32)))


def test_events_and_time_are_the_same_without_values():
    def kernel(table, y, index):
        dst = rows_at(table, tile(index), 2, 2)
        nisa.dma_compute(dst, [dst, tile(y)], nl.add)
        total = sb(4, 2)
        nisa.dma_compute(total, [table, table], nl.add)

    arrays = (np.zeros((4, 2), F32), ONES, np.array([[1], [0]], np.int32))
    runs = [launch(kernel, args, target="toy")
            for args in (arrays, [Abstract(a.shape, str(a.dtype)) for a in arrays])]  # fmt: skip
    update, total = (e.work for e in runs[0].trace.events[-2:])
    assert (update.kind, update.mode, update.queue) == ("compute", "dge_sw", nisa.engine.gpsimd)
    assert (total.kind, total.mode, total.queue) == ("compute", "static", nisa.engine.sync)
    assert (update.nbytes, update.hbm_read_bytes, update.hbm_write_bytes) == (32, 16, 16)
    assert (total.nbytes, total.hbm_read_bytes, total.hbm_write_bytes) == (64, 64, 0)
    assert sum(c * b for _, shares in total.descriptors for c, b in shares) == total.nbytes
    last = runs[0].trace.events[-2]
    assert (last.opcode, last.engine) == ("dma_compute", nisa.engine.dma)
    assert [a.whole for a in last.reads] == [True, False, False, False]
    assert last.writes[0].whole
    assert [e.work for e in runs[0].trace] == [e.work for e in runs[1].trace]
    assert schedule(runs[0].trace).total_ns == schedule(runs[1].trace).total_ns


# -- rules -----------------------------------------------------------------------------------------


def add(dst, *srcs, op=nl.add, **options):
    return lambda: nisa.dma_compute(made(dst), [made(s) for s in srcs], op, **options)


def update(change=None, dst_in=HBM, index=nl.int32, **options):
    """A scatter of two rows (or a gather), changed in one point."""

    def call():
        table, where = hbm(4, 2), sb(2, 1, dtype=index)
        nisa.iota(where, [[1, 1]], channel_multiplier=1)
        view = rows_at(table, where, 2, 2)
        dst, srcs = (view, [view, sb(2, 2)]) if dst_in is HBM else (s := sb(2, 2), [s, view])
        if change is not None:
            dst, srcs = change(dst, srcs)
        nisa.dma_compute(dst, srcs, nl.add, **options)

    return call


LEGAL = add(S(2, 3), H(2, 3), S(2, 3))
RMW = update(unique_indices=True, oob_mode=SKIP)
RULES = [
    Rule("some sources", LEGAL, add(S(2, 3)), ("srcs holds 0 tensors", "1 to 16")),
    Rule("a list", LEGAL, lambda: nisa.dma_compute(sb(2, 3), sb(2, 3), nl.add),
         ("srcs holds 0 tensors", "must be a list")),
    Rule("of tensors", LEGAL, lambda: nisa.dma_compute(sb(2, 3), [sb(2, 3), 1.0], nl.add),
         ("srcs[1] is float 1.0", "must be a tensor")),
    Rule("at most 16", add(S(2, 3), *[S(2, 3)] * 16), add(S(2, 3), *[S(2, 3)] * 17),
         ("srcs holds 17 tensors",)),
    Rule("addition only", LEGAL, add(S(2, 3), S(2, 3), op=nl.maximum), ("nl.maximum", "only add")),
    Rule("scales of 1", add(S(2, 3), S(2, 3), scales=(1.0,)),
         add(S(2, 3), S(2, 3), scales=[2.0]), ("scales=(2.0,)", "None or 1 times 1.0")),
    Rule("a scale per source", LEGAL, add(S(2, 3), S(2, 3), scales=[1.0, 1.0]), ("scales=",)),
    Rule("equal counts", add(S(2, 3), H(6)), add(S(2, 3), S(2, 3), H(7)),
         ("srcs[1] [7] has 7 elements, dst [2, 3] 6",)),
    Rule("no PSUM source", LEGAL, add(S(2, 3), P(2, 3)), ("srcs[0] is in PSUM", "tensor_copy")),
    Rule("no PSUM dst", LEGAL, add(P(2, 3), S(2, 3)), ("dst is in PSUM",)),
    Rule("no packed types", LEGAL, add(S(2, 3), S(2, 3, dtype=nl.float8_e5m2_x4)),
         ("srcs[0] is float8_e5m2_x4", "have no sum")),
    Rule("oob_mode", RMW, add(S(2, 3), S(2, 3), oob_mode=1), ("oob_mode=1",)),
    Rule("skip needs indices", RMW, add(S(2, 3), S(2, 3), oob_mode=SKIP),
         ("oob_mode=skip without a vector_offset",)),
    Rule("no scalar_offset", LEGAL, lambda: nisa.dma_compute(sb(1, 3), [hbm(4, 3).ap(
        [[3, 1], [1, 3]], scalar_offset=nisa.register_alloc(1))], nl.add),
         ("srcs[0] has a scalar_offset", "dma_copy first")),
    Rule("indices of 32 bits", RMW, update(index=nl.int16),
         ("the vector_offset of dst is int16",), ),
    Rule("unique indices", RMW, update(unique_indices=False), ("unique_indices=False",)),
    Rule("two sources", RMW, update(lambda d, s: (d, [*s, sb(2, 2)])), ("3 srcs", "exactly 2")),
    Rule("dst among them", RMW, update(lambda d, s: (d, [s[1], s[1]])), ("0 of 2 srcs",)),
    Rule("one gather", update(dst_in=SBUF), update(lambda d, s: (d, [s[1], s[1]]), SBUF),
         ("2 of 2 srcs",)),
    Rule("of dst's view", update(dst_in=SBUF),
         update(lambda d, s: (d, [sb(4, 1), s[1]]), SBUF), ("dst [2, 2] float32 is none",)),
    Rule("data in SBUF", RMW, update(lambda d, s: (d, [s[0], hbm(2, 2)])),
         ("[2, 2] in HBM beside indexed rows", "load it")),
    Rule("as many rows", RMW, update(lambda d, s: (d, [s[0], sb(4, 1)])),
         ("2 indexed rows beside [4, 1]",)),
]  # fmt: skip


@pytest.mark.parametrize("rule", RULES, ids=by_name)
def test_dma_compute_rule(rule):
    check(rule, "dma_compute", __file__)


def test_the_index_of_a_scatter_lies_in_sbuf():
    def call():
        table = hbm(4, 2)
        dst = rows_at(table, hbm(2, 1, dtype=nl.int32), 2, 2)
        nisa.dma_compute(dst, [dst, sb(2, 2)], nl.add)

    refused(call, "vector_offset", error=RuleViolation)


def test_one_event():
    found = event(lambda: nisa.dma_compute(dst=sb(2, 3), srcs=[hbm(2, 3)], reduce_op=nl.add))
    assert (found.hidden_reads, found.hidden_writes, found.work.casts) == ((), (), False)
