"""max8, nc_find_index8, nc_match_replace8, against scans in Python."""

from __future__ import annotations

import nki.isa as nisa
import nki.language as nl
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from nki_kernels.machine.trace import StreamWork
from tests.embedded.harness import (
    FLOATS,
    HOSTS,
    INTEGERS,
    PSUM,
    SBUF,
    apply,
    cast,
    data,
    event,
    rows,
    same,
    sb,
    tile,
    values,
)

F32 = np.float32
kinds = st.sampled_from([*FLOATS, *INTEGERS])
seeds = st.integers(0, 2**20)
lengths = st.integers(8, 24)
#: Few distinct values: rows full of ties.
few = st.integers(1, 12)
EIGHT = 8


def tied(seed, shape, kind, distinct):
    return np.random.default_rng(seed).integers(0, distinct, shape).astype(HOSTS[kind])


@given(p=rows, n=lengths, types=st.tuples(kinds, kinds), distinct=few, ties=st.booleans(),
       buffer=st.sampled_from([SBUF, PSUM]), seed=seeds)  # fmt: skip
def test_max8(p, n, types, distinct, ties, buffer, seed):
    x = tied(seed, (p, n), types[0], distinct) if ties else data(seed, (p, n), types[0])
    got = apply(nisa.max8, x, shape=(p, EIGHT), dtype=types[1], buffers=[buffer])
    want = np.array([sorted((float(v) for v in line), reverse=True)[:EIGHT] for line in x])
    same(got, cast(want, types[1]))


def find(line, vals, order):
    """Index of each value, columns in `order`; each occurrence is used once; -1 is a miss."""
    used, found = set(), [-1] * EIGHT
    for k in order:
        for at, element in enumerate(line):
            if at not in used and float(element) == float(vals[k]):
                used.add(at)
                found[k] = at
                break
    return found


@given(p=rows, n=lengths, types=st.tuples(kinds, kinds),
       index=st.sampled_from([nl.uint16, nl.uint32]), distinct=few, seed=seeds)  # fmt: skip
def test_nc_find_index8(p, n, types, index, distinct, seed):
    x = tied(seed, (p, n), types[0], distinct)
    vals = tied(seed + 1, (p, EIGHT), types[1], distinct + 2)
    got = apply(nisa.nc_find_index8, x, vals, shape=(p, EIGHT), dtype=index)
    want = [find(line, v, range(EIGHT)) for line, v in zip(x, vals, strict=True)]
    same(got, np.array(want, np.int64).astype(HOSTS[index]))


@given(p=rows, n=st.integers(1, 24), types=st.tuples(kinds, kinds, kinds),
       index=st.sampled_from([nl.uint16, nl.uint32, None]), distinct=few,
       in_place=st.booleans(), seed=seeds)  # fmt: skip
def test_nc_match_replace8(p, n, types, index, distinct, in_place, seed):
    x = tied(seed, (p, n), types[0], distinct)
    vals = tied(seed + 1, (p, EIGHT), types[1], distinct + 2)
    out = types[0] if in_place else types[2]

    def call(y, v):
        src = tile(y)
        dst = src if in_place else sb(p, n, dtype=out)
        where = None if index is None else sb(p, EIGHT, dtype=index)
        nisa.nc_match_replace8(dst, src, tile(v), 99.5, where)
        return dst if index is None else (dst, where)

    got = values(call, x, vals)
    dst, where = (got, None) if index is None else got
    places = [find(line, v, range(EIGHT - 1, -1, -1)) for line, v in zip(x, vals, strict=True)]
    want = x.astype(np.float64)
    for line, found in zip(want, places, strict=True):
        line[[at for at in found if at >= 0]] = 99.5
    same(dst, cast(want, out))
    if where is not None:
        same(where, np.array(places, np.int64).astype(HOSTS[index]))


def search(y):
    src, top = tile(y), sb(1, EIGHT)
    first, second = sb(1, EIGHT, dtype=nl.uint32), sb(1, EIGHT, dtype=nl.uint32)
    nisa.max8(top, src)
    nisa.nc_find_index8(first, src, top)
    nisa.nc_match_replace8(src, src, top, float("-inf"), second)
    return top, first, second, src


def test_example_23():
    x = np.array([[3, 9, 9, 1, 5, 2, 8, 7, 0, 4]], F32)
    top, first, second, left = values(search, x)
    same(top, np.array([[9, 9, 8, 7, 5, 4, 3, 2]], F32))
    same(first, np.array([[1, 2, 6, 7, 4, 9, 0, 5]], np.uint32))
    same(second, np.array([[2, 1, 6, 7, 4, 9, 0, 5]], np.uint32))
    assert np.flatnonzero(np.isfinite(left[0])).tolist() == [3, 8]


def test_the_documents_example_of_duplicates():
    x = np.array([[1, 2, 3, 4, *[8] * 7]], F32)
    vals = np.array([[3, *[8] * 7]], F32)

    def call(y, v):
        src, first, second = tile(y), sb(1, 8, dtype=nl.uint32), sb(1, 8, dtype=nl.uint32)
        nisa.nc_find_index8(first, src, tile(v))
        nisa.nc_match_replace8(sb(1, 11), src, tile(v), 0.0, second)
        return first, second

    first, second = values(call, x, vals)
    same(first, np.array([[2, 4, 5, 6, 7, 8, 9, 10]], np.uint32))
    same(second, np.array([[2, 10, 9, 8, 7, 6, 5, 4]], np.uint32))


@pytest.mark.parametrize("index", [nl.uint16, nl.uint32])
def test_a_value_that_is_not_there_is_all_ones(index):
    x, vals = np.zeros((1, 8), F32), np.arange(1, 9, dtype=F32)[None]

    def call(y, v):
        first, second = sb(1, 8, dtype=index), sb(1, 8, dtype=index)
        dst = sb(1, 8)
        nisa.nc_find_index8(first, tile(y), tile(v))
        nisa.nc_match_replace8(dst, tile(y), tile(v), 5.0, second)
        return first, second, dst

    first, second, dst = values(call, x, vals)
    ones = np.full((1, 8), np.iinfo(HOSTS[index]).max, HOSTS[index])
    same(first, ones)
    same(second, ones)
    same(dst, x)


def test_a_broadcast_column_finds_the_first_occurrences():
    """Values as a view of stride 0, as published kernels pass them."""
    x = np.array([[0, 4, 1, 4, 2, 3, 5, 6]], F32)

    def call(y):
        found, four = sb(1, 8, dtype=nl.uint32), sb(1, 1)
        nisa.memset(four, 4.0)
        nisa.nc_find_index8(found, tile(y), four.ap([[1, 1], [0, 8]]))
        return found

    same(values(call, x), np.array([[1, 3, *[2**32 - 1] * 6]], np.uint32))


def test_nan_is_the_largest_and_equals_nothing():
    x = np.array([[np.nan, *range(8)]], F32)
    top, first, _, left = values(search, x)
    assert np.isnan(top[0, 0])
    assert top[0, 1:].tolist() == [7, 6, 5, 4, 3, 2, 1]
    assert first[0, 0] == 2**32 - 1
    assert np.isnan(left[0, 0])


def test_three_dimensional_rows_are_flattened():
    x = data(3, (4, 3, 5), nl.float32)
    got = apply(nisa.max8, x, shape=(4, EIGHT))
    same(got, -np.sort(-x.reshape(4, 15), axis=1)[:, :EIGHT])


def test_the_longest_row():
    x = np.random.default_rng(0).permutation(16384).astype(F32)[None]
    top, first, second, _ = values(search, x, target="trn2")
    assert top[0].tolist() == list(range(16383, 16375, -1))
    want = [x[0].tolist().index(v) for v in top[0]]
    assert first[0].tolist() == second[0].tolist() == want


@pytest.mark.parametrize("name", ["max8", "nc_find_index8", "nc_match_replace8"])
def test_search_events_count_the_elements_read(name):
    calls = {
        "max8": lambda: nisa.max8(sb(4, 8), sb(4, 12)),
        "nc_find_index8": lambda: nisa.nc_find_index8(
            sb(4, 8, dtype=nl.uint32), sb(4, 12), sb(4, 8)
        ),
        "nc_match_replace8": lambda: nisa.nc_match_replace8(
            sb(4, 12), sb(4, 12), sb(4, 8), 0.0, sb(4, 8, dtype=nl.uint32)
        ),
    }
    found = event(calls[name])
    assert (found.opcode, found.engine) == (name, nisa.engine.vector)
    assert [a.shape for a in found.reads] == [(4, 12)] + [(4, 8)] * (name != "max8")
    assert len(found.writes) == 1 + (name == "nc_match_replace8")
    work = found.work
    assert isinstance(work, StreamWork)
    assert (work.law, work.n, work.sources) == (name, 12, (("float32", "sbuf", 4),))
