"""tensor_reduce, tensor_tensor_scan, bn_stats, bn_aggr, against folds in Python."""

from __future__ import annotations

import nki.isa as nisa
import nki.language as nl
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from nki_kernels.machine.errors import UninitializedRead
from nki_kernels.machine.trace import StreamWork
from tests.embedded.folds import at_least_2d, folded, left, single, small
from tests.embedded.harness import (
    FLOATS,
    HOSTS,
    INTEGERS,
    PSUM,
    SBUF,
    apply,
    cast,
    columns,
    data,
    event,
    ps,
    refused,
    rows,
    same,
    sb,
    tile,
    values,
)
from tests.embedded.test_elementwise import BITS, FORMULAS
from tests.tolerance import assert_close

F32 = np.float32
kinds = st.sampled_from([*FLOATS, *INTEGERS])
seeds = st.integers(0, 2**20)
REDUCTIONS = (
    "add", "subtract", "multiply", "maximum", "minimum", "logical_and", "logical_or", "logical_xor",
)  # fmt: skip
BINARY = sorted(FORMULAS)


# -- tensor_reduce ---------------------------------------------------------------------------------

frees = st.lists(st.integers(1, 4), min_size=1, max_size=3)


@pytest.mark.parametrize("name", REDUCTIONS)
@given(p=rows, free=frees, types=st.tuples(kinds, kinds), trailing=st.integers(1, 3),
       negate=st.booleans(), as_list=st.booleans(), seed=seeds)  # fmt: skip
def test_tensor_reduce_folds_from_left_to_right(name, p, free, types, trailing, negate, as_list,
                                                seed):  # fmt: skip
    trailing = min(trailing, len(free))
    x = small(seed, (p, *free), types[0])
    axes = list(range(x.ndim - trailing, x.ndim))
    want = folded(name, x, trailing)
    want = want.reshape(at_least_2d(want.shape))

    def call(dst, y):
        axis = axes if as_list else tuple(axes) if trailing > 1 else axes[0]
        nisa.tensor_reduce(dst, getattr(nl, name), y, axis, negate=negate)

    got = apply(call, x, shape=want.shape, dtype=types[1])
    same(got, cast(-want if negate else want, types[1]))


@given(n=st.integers(1, 700), seed=seeds, kind=st.sampled_from(FLOATS))
def test_a_long_sum_is_sequential_and_not_pairwise(n, seed, kind):
    x = np.random.default_rng(seed).standard_normal((2, n)).astype(HOSTS[kind])

    def call(dst, y):
        nisa.tensor_reduce(dst, nl.add, y, 1)

    got = apply(call, x, shape=(2, 1), target="trn2")
    same(got, cast(folded("add", x, 1)[:, None], nl.float32))


def test_the_order_of_a_sum_shows():
    """Pairs would give 2; from the left 2^24 swallows each 1."""
    x = np.array([[2**24, 1, -(2**24), 1] * 8], F32)

    def call(dst, y):
        nisa.tensor_reduce(dst, nl.add, y, 1)

    assert apply(call, x, shape=(1, 1))[0, 0] == left("add", x[0]) != np.sum(x)


@pytest.mark.parametrize("name", sorted(BITS))
@pytest.mark.parametrize("kind", INTEGERS)
@given(p=rows, n=columns, seed=seeds)
def test_bit_reductions_work_on_raw_bits(name, kind, p, n, seed):
    x = data(seed, (p, n), kind)

    def call(dst, y):
        nisa.tensor_reduce(dst, getattr(nl, name), y, -1)

    want = []
    for line in x.tolist():
        state = line[0]
        for element in line[1:]:
            state = BITS[name](state, element)
        want.append([state])
    same(apply(call, x, shape=(p, 1), dtype=kind), np.array(want, HOSTS[kind]))


def test_a_bit_reduction_between_signed_and_unsigned():
    x = np.array([[-1, -2]], np.int8)

    def call(dst, y):
        nisa.tensor_reduce(dst, nl.bitwise_and, y, 1)

    same(apply(call, x, shape=(1, 1), dtype=nl.uint8), np.array([[254]], np.uint8))


def test_example_17():
    x = np.arange(1, 7, dtype=F32).reshape(1, 2, 3)

    def call(y):
        last, both = sb(1, 2), sb(1, 1)
        nisa.tensor_reduce(last, nl.add, tile(y), 2)
        nisa.tensor_reduce(both, nl.add, tile(y), (1, 2), negate=True)
        return last, both

    last, both = values(call, x)
    same(last, np.array([[6, 15]], F32))
    same(both, np.array([[-21]], F32))


@pytest.mark.parametrize("places", [(SBUF, PSUM), (PSUM, SBUF), (PSUM, PSUM)])
def test_tensor_reduce_in_psum(places):
    x = data(1, (3, 4), nl.float32)

    def call(dst, y):
        nisa.tensor_reduce(dst, nl.maximum, y, 1)

    got = apply(call, x, shape=(3, 1), buffer=places[1], buffers=places[:1])
    same(got, x.max(axis=1, keepdims=True))


def test_tensor_reduce_over_windows_of_a_view():
    """2 x 2 pooling: the window dimensions of a strided view are reduced."""
    x = data(2, (3, 4, 6), nl.float32)

    def call(dst, y):
        pool = y.ap([[24, 3], [12, 2], [2, 3], [6, 2], [1, 2]])
        nisa.tensor_reduce(dst, nl.add, pool, [3, 4])

    windows = x.reshape(3, 2, 2, 3, 2).transpose(0, 1, 3, 2, 4)
    want = folded("add", windows, 2)
    same(apply(call, x, shape=(3, 2, 3)), cast(want, nl.float32))


def test_tensor_reduce_event_counts_the_elements_read():
    def call():
        nisa.tensor_reduce(sb(4, 2), nl.maximum, ps(4, 2, 3, dtype=nl.float32), 2)

    found = event(call)
    assert (found.opcode, found.engine) == ("tensor_reduce", nisa.engine.vector)
    assert (found.hidden_reads, found.hidden_writes) == ((), ())
    assert found.work == StreamWork(
        "tensor_reduce", "maximum", 6, 4, (("float32", "psum", 4),), ("float32", "sbuf", 4)
    )


# -- tensor_tensor_scan ----------------------------------------------------------------------------


def scanned(d0, d1, initial, ops, reverse):
    first, second = (FORMULAS[op] for op in ops)
    out = np.zeros(d0.shape)
    for p in range(d0.shape[0]):
        state = float(initial[p])
        for i in range(d0.shape[1]):
            x, y = float(d0[p, i]), float(d1[p, i])
            middle = single(first(state, x) if reverse[0] else first(x, state))
            state = single(second(y, middle) if reverse[1] else second(middle, y))
            out[p, i] = state
    return out


@given(p=rows, n=columns, ops=st.tuples(st.sampled_from(BINARY), st.sampled_from(BINARY)),
       reverse=st.tuples(st.booleans(), st.booleans()), types=st.tuples(kinds, kinds, kinds),
       vector=st.booleans(), seed=seeds)  # fmt: skip
def test_tensor_tensor_scan(p, n, ops, reverse, types, vector, seed):
    d0, d1 = small(seed, (p, n), types[0]), small(seed + 1, (p, n), types[1])
    initial = data(seed + 2, (p, 1), nl.float32) if vector else np.full((p, 1), 1.25, F32)

    def call(dst, x, y, start):
        nisa.tensor_tensor_scan(
            dst, x, y, start if vector else 1.25, getattr(nl, ops[0]), getattr(nl, ops[1]),
            reverse0=reverse[0], reverse1=reverse[1],
        )  # fmt: skip

    got = apply(call, d0, d1, initial, shape=(p, n), dtype=types[2])
    same(got, cast(scanned(d0, d1, initial[:, 0], ops, reverse), types[2]))


@pytest.mark.parametrize(("ops", "reverse0", "want"), [
    (("multiply", "add"), False, [3, 10, 11]),
    (("subtract", "add"), False, [2, 2, 0]),
    (("subtract", "add"), True, [0, -2, -2]),
])  # fmt: skip
def test_example_16(ops, reverse0, want):
    d0, d1 = np.array([[2, 3, 1]], F32), np.ones((1, 3), F32)

    def call(dst, x, y):
        nisa.tensor_tensor_scan(
            dst, x, y, 1, getattr(nl, ops[0]), getattr(nl, ops[1]), reverse0=reverse0
        )

    same(apply(call, d0, d1, shape=(1, 3)), np.array([want], F32))


@pytest.mark.parametrize("places", [(SBUF, PSUM), (PSUM, SBUF)])
def test_a_scan_with_one_operand_in_psum_over_two_free_axes(places):
    d0, d1 = data(4, (3, 2, 4), nl.float32), data(5, (3, 2, 4), nl.float32)

    def call(dst, x, y):
        nisa.tensor_tensor_scan(dst, x, y, 0.0, nl.multiply, nl.add)

    got = apply(call, d0, d1, shape=(3, 8), buffers=places)
    flat = [d.reshape(3, 8) for d in (d0, d1)]
    want = scanned(*flat, np.zeros(3), ("multiply", "add"), (False, False))
    same(got, cast(want, nl.float32))


def test_a_scan_in_place_keeps_its_state_in_float32():
    """Rounded to bfloat16 on the way, 256 + 1 would stay 256."""
    ones = np.ones((2, 16), HOSTS[nl.bfloat16])
    start = np.full((2, 1), 256, F32)

    def call(y, s):
        line, factor = tile(y), sb(2, 16)
        nisa.memset(factor, 1.0)
        nisa.tensor_tensor_scan(line, factor, line, tile(s), nl.multiply, nl.add)
        return line

    want = np.tile(256 + np.arange(1.0, 17), (2, 1))
    same(values(call, ones, start), cast(want, nl.bfloat16))


@pytest.mark.parametrize("vector", [False, True])
def test_tensor_tensor_scan_event(vector):
    def call():
        initial = sb(4, 1) if vector else 0.0
        nisa.tensor_tensor_scan(sb(4, 6), sb(4, 6), sb(4, 6), initial, nl.multiply, nl.add)

    found = event(call)
    operand = ("float32", "sbuf", 4)
    assert found.engine is nisa.engine.vector
    assert len(found.reads) == 2 + vector
    assert found.work == StreamWork(
        "tensor_tensor_scan", "multiply", 6, 4, (operand, operand), operand, vectors=int(vector)
    )


# -- bn_stats, bn_aggr -----------------------------------------------------------------------------


def moments(line):
    """(count, mean, variance * count) in float64."""
    exact = line.astype(np.float64)
    if not exact.size:
        return [0.0, 0.0, 0.0]
    return [exact.size, exact.mean(), float(np.square(exact - exact.mean()).sum())]


@given(p=rows, n=columns, kind=kinds, seed=seeds)
def test_bn_stats_of_small_integers_is_exact_where_the_mean_is(p, n, kind, seed):
    half = np.random.default_rng(seed).integers(0, 9, (p, n))
    # Each half is one repeated value and its mirror: the mean is a small integer.
    half[:, 2::4] = 8 - half[:, 0::4][:, : half[:, 2::4].shape[1]]
    x = half.astype(HOSTS[kind])

    def call(dst, y):
        nisa.bn_stats(dst, y)

    got = apply(call, x, shape=(p, 6))
    assert np.array_equal(got[:, 0], np.full(p, (n + 1) // 2))
    assert np.array_equal(got[:, 3], np.full(p, n // 2))
    for line, found in zip(x, got, strict=True):
        for start in (0, 1):
            count, mean, spread = moments(line[start::2])
            if mean == int(mean):
                assert list(found[3 * start : 3 * start + 3]) == [count, mean, spread]


@given(p=rows, n=columns, seed=seeds, chunks=st.integers(1, 4))
def test_bn_aggr_of_chunks_is_the_mean_and_variance_of_all(p, n, seed, chunks):
    x = data(seed, (p, n * chunks), nl.float32)

    def call(y):
        stats, result = sb(p, 6 * chunks), sb(p, 2)
        for c in range(chunks):
            nisa.bn_stats(stats[:, 6 * c : 6 * c + 6], tile(y)[:, n * c : n * c + n])
        nisa.bn_aggr(result, stats)
        return result

    got = values(call, x)
    exact = x.astype(np.float64)
    # A term of the mean passes the sum of its half (n), a division, a product, the sum of the
    # triples (2 chunks) and a division.
    chain = n + 2 * chunks + 3
    size = np.abs(exact).mean(axis=1)
    assert_close(got[:, 0], exact.mean(axis=1), size, op="bn_aggr", case="mean", roundings=1,
                 chain=chain)  # fmt: skip
    # Deviations are as exact as the mean they are from; their squares twice so, and once more for
    # the part within and the part between the halves. Their terms: (|x| + |mean|)^2.
    terms = np.square(np.abs(exact) + np.abs(exact).max(axis=1, keepdims=True)).mean(axis=1)
    assert_close(got[:, 1], exact.var(axis=1), terms, op="bn_aggr", case="variance", roundings=1,
                 chain=4 * chain)  # fmt: skip


@pytest.mark.parametrize(("line", "stats", "result"), [
    ([1, 2, 3, 4, 5], [3, 3, 8, 2, 3, 2], [3, 2]),
    ([1, 3, 2, 8], [2, 1.5, 0.5, 2, 5.5, 12.5], [3.5, 7.25]),
    ([7], [1, 7, 0, 0, 0, 0], [7, 0]),
])  # fmt: skip
def test_example_18(line, stats, result):
    def call(y):
        held, pair = sb(1, 6), sb(1, 2)
        nisa.bn_stats(held, tile(y))
        nisa.bn_aggr(pair, held)
        return held, pair

    held, pair = values(call, np.array([line], F32))
    same(held, np.array([stats], F32))
    same(pair, np.array([result], F32))


def test_bn_aggr_of_no_elements_is_zero_and_keeps_the_other_rows():
    x = np.array([[0, 5, 7], [2, 3, 8]], F32)

    def call(dst, y):
        nisa.bn_aggr(dst, y)

    same(apply(call, x, shape=(2, 2)), np.array([[0, 0], [3, 4]], F32))


def test_bn_aggr_does_not_cancel():
    """Mean 4096, variance 1: the difference of mean squares would be lost in float32."""
    x = np.array([[4, 4095, 0, 4, 4097, 0]], F32)

    def call(dst, y):
        nisa.bn_aggr(dst, y)

    same(apply(call, x, shape=(1, 2)), np.array([[4096, 1]], F32))


@pytest.mark.parametrize("target", ["trn2", "trn3"])
def test_bn_stats_of_a_full_tile(target):
    x = data(6, (128, 512), nl.bfloat16)

    def call(dst, y):
        nisa.bn_stats(dst, y)

    got = apply(call, x, shape=(128, 6), target=target)
    exact = x.astype(np.float64)
    for start in (0, 1):
        half = exact[:, start::2]
        assert_close(got[:, 3 * start + 1], half.mean(axis=1), np.abs(half).mean(axis=1),
                     op="bn_stats", case=target, roundings=1, chain=258)  # fmt: skip


@pytest.mark.parametrize(("name", "n", "result"), [("bn_stats", 12, 6), ("bn_aggr", 12, 2)])
def test_statistics_events_count_the_elements_read(name, n, result):
    found = event(lambda: getattr(nisa, name)(sb(4, result), sb(4, n)))
    assert (found.opcode, found.engine) == (name, nisa.engine.vector)
    operand = ("float32", "sbuf", 4)
    assert found.work == StreamWork(name, "", n, 4, (operand,), operand)


def test_a_reduction_of_a_tile_nothing_wrote_is_refused():
    refused(
        lambda: nisa.tensor_reduce(sb(2, 1), nl.add, sb(2, 3), 1), "data reads 6 of 6",
        error=UninitializedRead,
    )  # fmt: skip
