"""nonzero_with_count, topk and sequence_bounds."""

from __future__ import annotations

import nki.isa as nisa
import nki.language as nl
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from nki_kernels.machine.errors import RuleViolation, UninitializedRead
from nki_kernels.machine.launch import launch
from nki_kernels.machine.trace import StreamWork
from tests.embedded.calls import SITE, P, S, of
from tests.embedded.harness import (
    HOSTS,
    Rule,
    by_name,
    check,
    columns,
    event,
    rows,
    same,
    sb,
    tile,
    values,
)

F32, I32 = np.float32, np.int32
BF16, U32 = nl.bfloat16, nl.uint32
seeds = st.integers(0, 2**20)
CORES = {"toy": 4, "trn2": 16}


# -- nonzero_with_count ----------------------------------------------------------------------------


@given(target=st.sampled_from(["toy", "trn2"]), p=rows, n=columns, seed=seeds,
       kind=st.sampled_from([F32, I32]), offset=st.integers(-5, 500),
       pad=st.integers(-3, 3))  # fmt: skip
def test_nonzero_with_count(target, p, n, kind, offset, pad, seed):
    rng = np.random.default_rng(seed)
    x = (rng.integers(-2, 3, (p, n)) * rng.integers(0, 2, (p, n))).astype(kind)
    old = rng.integers(0, 9, (p, n + 1)).astype(I32)
    want = old.copy()
    for row in range(0, p, CORES[target]):
        found = [i + offset for i in range(n) if x[row, i] != 0]
        want[row] = found + [pad] * (n - len(found)) + [len(found)]

    def call(y, before):
        dst = tile(before)
        nisa.nonzero_with_count(dst, tile(y), offset, pad)
        return dst

    same(values(call, x, old, target=target), want)


def test_the_documented_example():
    def call(y):
        dst = sb(1, 9, dtype=nl.int32)
        nisa.nonzero_with_count(dst=dst, src=tile(y), index_offset=16)
        return dst

    got = values(call, np.array([[[0, 1], [1, 0], [0, 1], [0, 0]]], F32))
    assert got.tolist() == [[17, 18, 21, -1, -1, -1, -1, -1, 3]]


def test_other_rows_do_not_count_as_written():
    def call(y):
        dst = sb(8, 3, dtype=nl.int32)
        nisa.nonzero_with_count(dst, tile(y))
        nisa.tensor_copy(sb(1, 3), dst[4:5])
        nisa.tensor_copy(sb(2, 3), dst[4:6])

    with pytest.raises(UninitializedRead, match=r"reads 3 of 6 elements .*first at index \(1, 0\)"):
        launch(call, (np.ones((8, 2), F32),), target="toy")


def test_nonzero_event():
    found = event(lambda: nisa.nonzero_with_count(sb(4, 6, dtype=nl.int32), sb(4, 5)))
    sizes = ("float32", "sbuf", 4), ("int32", "sbuf", 4)
    assert found.engine is nisa.engine.gpsimd
    assert found.work == StreamWork("nonzero_with_count", "", 5, 4, sizes[:1], sizes[1])


# -- topk ------------------------------------------------------------------------------------------


@given(case=st.data(), target=st.sampled_from(["toy", "trn2"]), seed=seeds)
def test_topk(case, target, seed):
    per = CORES[target]
    cores, n = case.draw(st.integers(1, 2)), case.draw(st.integers(8, 40))
    k = case.draw(st.integers(1, n))
    width = -(-n // per) + case.draw(st.integers(0, 1))
    rng = np.random.default_rng(seed)
    size = per * width
    # Distinct, and exact in bfloat16.
    x = np.stack([rng.permutation(np.arange(size) - size // 2) for _ in range(cores)])
    snake = x.reshape(cores, width, per).transpose(0, 2, 1).reshape(cores * per, width)

    def call(y):
        vals, idx = sb(cores * per, k, dtype=BF16), sb(cores * per, k, dtype=U32)
        nisa.topk(vals, idx, tile(y), n)
        return vals, idx

    got, at = values(call, snake.astype(HOSTS[BF16]), target=target)
    for row in range(cores * per):
        line = x[row // per, :n].tolist()
        best = sorted(line)[-k:]
        assert got[row].astype(float).tolist() == best
        assert at[row].tolist() == [line.index(v) for v in best]


def test_equal_values_of_topk_stand_in_reverse_order_of_position():
    x = np.array([[1, 5, 5, 1], [5, 0, 1, 0], [0, 0, 0, 0], [0, 0, 0, 0]]).T

    def call(y):
        vals, idx = sb(4, 3, dtype=BF16), sb(4, 3, dtype=U32)
        nisa.topk(vals, idx, tile(y), 8)
        return vals, idx

    got, at = values(call, x.astype(HOSTS[BF16]))
    assert (got[0].astype(int).tolist(), at[0].tolist()) == ([5, 5, 5], [4, 2, 1])


def test_topk_event():
    found = event(
        lambda: nisa.topk(sb(4, 5, dtype=BF16), sb(4, 5, dtype=U32), sb(4, 3, dtype=BF16), 10)
    )
    operands = ("bfloat16", "sbuf", 2), ("uint32", "sbuf", 4)
    assert len(found.writes) == 2
    assert found.work == StreamWork("topk", "", 12, 4, operands[:1], operands[1])  # 10 + 5 / 4


# -- sequence_bounds -------------------------------------------------------------------------------


def bounds(ids, kind=nl.int32):
    def call(y):
        dst = sb(1, 2, ids.size, dtype=kind)
        nisa.sequence_bounds(dst, tile(y))
        return dst

    return values(call, ids.reshape(1, -1))[0]


@given(ids=st.lists(st.integers(0, 3), min_size=1, max_size=20), kind=st.sampled_from([F32, I32]),
       to=st.sampled_from([nl.float32, nl.int32]))  # fmt: skip
def test_sequence_bounds(ids, kind, to):
    starts, ends = [], []
    for i, x in enumerate(ids):
        first = last = i
        while first > 0 and ids[first - 1] == x:
            first -= 1
        while last + 1 < len(ids) and ids[last + 1] == x:
            last += 1
        starts.append(first if x else len(ids))
        ends.append(last + 1 if x else -1)
    same(bounds(np.array(ids, kind), to), np.array([starts, ends], HOSTS[to]))


def test_example_35():
    assert bounds(np.array([0, 1, 1, 2, 2, 2, 0, 3, 3], I32)).tolist() == [
        [9, 1, 1, 3, 3, 3, 9, 7, 7], [-1, 3, 3, 6, 6, 6, -1, 9, 9],
    ]  # fmt: skip
    assert bounds(np.array([1, 1, 2, 0], F32)).tolist() == [[0, 0, 2, 4], [2, 2, 3, -1]]


def test_ids_are_not_negative():
    with pytest.raises(RuleViolation, match=r"sequence_bounds at .*segment id -1; ids are 0"):
        bounds(np.array([1, -1], I32))


# -- rules -----------------------------------------------------------------------------------------

nonzero = of("nonzero_with_count", S(2, 5, dtype=nl.int32), S(2, 4))
top = of("topk", S(4, 5, dtype=BF16), S(4, 5, dtype=U32), S(4, 3, dtype=BF16), 10)


def zeros():
    ids = sb(1, 4)
    nisa.memset(ids, 0.0)
    return ids


sequences = of("sequence_bounds", S(1, 2, 4), zeros)
RULES = [
    ("nonzero_with_count", Rule("float32 or int32", nonzero(),
     nonzero(S(2, 5, dtype=nl.int32), S(2, 4, dtype=BF16)), ("src is bfloat16",))),
    ("nonzero_with_count", Rule("to int32", nonzero(), nonzero(S(2, 5)), ("dst is float32",))),
    ("nonzero_with_count", Rule("room for the count", nonzero(), nonzero(S(2, 4, dtype=nl.int32)),
     ("dst [2, 4] for src [2, 4]", "[2, 5]"))),
    ("nonzero_with_count", Rule("int offset", nonzero(index_offset=3), nonzero(index_offset=3.0),
     ("index_offset=3.0", "32 bits"))),
    ("nonzero_with_count", Rule("int padding", nonzero(padding_val=7), nonzero(padding_val=2**31),
     ("padding_val=2147483648",))),
    ("nonzero_with_count", Rule("no PSUM", nonzero(),
     nonzero(S(2, 5, dtype=nl.int32), P(2, 4)), ("src is in PSUM",))),
    ("topk", Rule("bfloat16", top(), top(S(4, 5)), ("val_dst is float32",))),
    ("topk", Rule("uint32", top(), top(S(4, 5, dtype=BF16), S(4, 5)), ("idx_dst is float32",))),
    ("topk", Rule("bfloat16 src", top(), top(S(4, 5, dtype=BF16), S(4, 5, dtype=U32), S(4, 3)),
     ("src is float32",))),
    ("topk", Rule("whole cores", top(),
     top(S(2, 5, dtype=BF16), S(2, 5, dtype=U32), S(2, 3, dtype=BF16)), ("serves 4",))),
    ("topk", Rule("n from 8", top(), top(S(4, 5, dtype=BF16), S(4, 5, dtype=U32),
     S(4, 3, dtype=BF16), 7), ("n=7", "8 to 65535"))),
    ("topk", Rule("n elements", top(), top(S(4, 5, dtype=BF16), S(4, 5, dtype=U32),
     S(4, 3, dtype=BF16), 13), ("holds 12 elements a core for n=13", "4 elements"))),
    ("topk", Rule("equal results", top(), top(S(4, 6, dtype=BF16)),
     ("val_dst [4, 6] and idx_dst [4, 5]",))),
    ("topk", Rule("k up to n", top(), top(S(4, 11, dtype=BF16), S(4, 11, dtype=U32)),
     ("for n=10", "k at most n"))),
    ("sequence_bounds", Rule("one partition", sequences(), sequences(S(2, 2, 4), S(2, 4)),
     ("segment_ids [2, 4]", "one partition"))),
    ("sequence_bounds", Rule("pairs", sequences(), sequences(S(1, 8)),
     ("dst [1, 8]", "[1, 2, 4]"))),
    ("sequence_bounds", Rule("types of ids", sequences(),
     sequences(S(1, 2, 4), S(1, 4, dtype=BF16)), ("segment_ids is bfloat16",))),
    ("sequence_bounds", Rule("types of dst", sequences(), sequences(S(1, 2, 4, dtype=BF16)),
     ("dst is bfloat16",))),
]  # fmt: skip


@pytest.mark.parametrize(("opcode", "rule"), RULES, ids=[f"{o} {r.name}" for o, r in RULES])
def test_rule(opcode, rule):
    check(rule, opcode, SITE)


def test_nonzero_needs_gen3():
    rule = Rule("gen3", nonzero(), nonzero(), ("nonzero_with_count on trn1", "gen3"), "trn1")
    check(rule._replace(legal=lambda: None), "nonzero_with_count", SITE)


def test_names_of_rules():
    assert len({(o, by_name(r)) for o, r in RULES}) == len(RULES)
