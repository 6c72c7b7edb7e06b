"""affine_select, range_select, tensor_copy_predicated: what is chosen, and what stays."""

from __future__ import annotations

import itertools
import operator

import nki.isa as nisa
import nki.language as nl
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from nki_kernels.machine.errors import RuleViolation, UninitializedRead
from nki_kernels.machine.launch import launch
from nki_kernels.machine.tensor import Abstract
from nki_kernels.machine.trace import StreamWork
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

F32 = np.float32
FP32_MIN = -3.4028235e38
R = nisa.reduce_cmd
kinds = st.sampled_from([*FLOATS, *INTEGERS])
seeds = st.integers(0, 2**20)
COMPARE = {
    "equal": operator.eq, "not_equal": operator.ne, "less": operator.lt,
    "less_equal": operator.le, "greater": operator.gt, "greater_equal": operator.ge,
}  # fmt: skip


# -- affine_select ---------------------------------------------------------------------------------


@given(p=rows, counts=st.lists(st.integers(1, 3), min_size=1, max_size=4),
       steps=st.lists(st.integers(-3, 3), min_size=4, max_size=4), offset=st.integers(-4, 4),
       multiplier=st.integers(-2, 2), cmp=st.sampled_from(sorted(COMPARE)),
       types=st.tuples(kinds, kinds), seed=seeds)  # fmt: skip
def test_affine_select(p, counts, steps, offset, multiplier, cmp, types, seed):
    n = int(np.prod(counts))
    x = data(seed, (p, n), types[0])
    pattern = [[s, c] for s, c in zip(steps, counts, strict=False)]

    def call(dst, y):
        nisa.affine_select(dst, pattern, multiplier, y, 7.5, cmp_op=getattr(nl, cmp), offset=offset)

    got = apply(call, x, shape=(p, n), dtype=types[1], target="trn2")
    keep = types[0] == types[1]
    false = cast(7.5, types[1])
    for row in range(p):
        for at, index in enumerate(itertools.product(*[range(c) for c in counts])):
            affine = offset + row * multiplier + sum(i * s for i, (s, _) in zip(
                index, pattern, strict=True))  # fmt: skip
            if COMPARE[cmp](affine, 0):
                want = x[row, at] if keep else cast(x[row, at], types[1])
            else:
                want = false
            same(got[row, at : at + 1], np.array([want], HOSTS[types[1]]))


def test_example_20_in_place():
    f = FP32_MIN

    def call(y):
        scores = tile(y)
        nisa.affine_select(scores, [[-1, 4]], 1, scores, f, cmp_op=nl.greater_equal, offset=1)
        return scores

    got = values(call, np.ones((3, 4), F32))
    same(got, np.array([[1, 1, f, f], [1, 1, 1, f], [1, 1, 1, 1]], F32))


def test_affine_select_of_32_bit_integers_keeps_their_bits():
    x = np.array([[2**24 + 1, 2**24 + 3]], np.int32)

    def call(dst, y):
        nisa.affine_select(dst, [[1, 2]], 0, y, -1.0)

    same(apply(call, x, shape=(1, 2), dtype=nl.int32), np.array([[2**24 + 1, -1]], np.int32))


def test_affine_select_takes_its_offset_from_a_register():
    def call(y):
        scores, index = tile(y), sb(1, 1, dtype=nl.int32)
        nisa.memset(index, -2)
        register = nisa.register_alloc()
        nisa.register_load(register, index)
        nisa.affine_select(scores, [[1, 4]], 0, scores, 0.0, cmp_op=nl.less, offset=register)
        return scores

    same(values(call, np.ones((1, 4), F32)), np.array([[1, 1, 0, 0]], F32))


def test_affine_values_wrap_at_32_bits():
    def call(dst, y):
        nisa.affine_select(dst, [[1, 2]], 0, y, 0.0, cmp_op=nl.less, offset=2**31 - 1)

    same(apply(call, np.ones((1, 2), F32), shape=(1, 2)), np.array([[0, 1]], F32))


@pytest.mark.parametrize("offset", [2**31, -(2**31) - 1])
def test_an_offset_beyond_32_bits_is_refused(offset):
    def kernel(y):
        nisa.affine_select(sb(1, 2), [[1, 2]], 0, tile(y), 0.0, offset=offset)

    with pytest.raises(RuleViolation, match=rf"nisa.affine_select at .*offset={offset}; it must"):
        launch(kernel, (np.ones((1, 2), F32),), target="toy")


def test_affine_select_event():
    found = event(lambda: nisa.affine_select(sb(4, 6), [[1, 6]], 0, sb(4, 6), 0.0))
    operand = ("float32", "sbuf", 4)
    assert (found.engine, found.hidden_writes) == (nisa.engine.gpsimd, ())
    assert found.work == StreamWork("affine_select", "", 6, 4, (operand,), operand)


# -- range_select ----------------------------------------------------------------------------------

RANGE = sorted(set(COMPARE) - {"not_equal"})


@given(p=rows, n=columns, ops=st.tuples(st.sampled_from(RANGE), st.sampled_from(RANGE)),
       start=st.integers(-5, 5), kind=st.sampled_from(FLOATS), out=kinds,
       source=st.sampled_from([SBUF, PSUM]), seed=seeds)  # fmt: skip
def test_range_select(p, n, ops, start, kind, out, source, seed):
    x = data(seed, (p, n), kind)
    rng = np.random.default_rng(seed)
    # Halves as well: a bound need not be an index.
    bounds = [(rng.integers(-12, 24, (p, 1)) / 2).astype(F32) for _ in range(2)]

    def call(y, b0, b1):
        dst, top = sb(p, n, dtype=out), sb(p, 1)
        nisa.range_select(
            dst, tile(y, source), getattr(nl, ops[0]), getattr(nl, ops[1]), tile(b0), tile(b1),
            reduce_res=top, range_start=start,
        )  # fmt: skip
        return dst, top

    dst, top = values(call, x, *bounds)
    want = np.full((p, n), FP32_MIN)
    for i, j in itertools.product(range(p), range(n)):
        tests = [
            COMPARE[op](float(start + j), float(b[i, 0])) for op, b in zip(ops, bounds, strict=True)
        ]
        if all(tests):
            want[i, j] = float(x[i, j])
    same(dst, cast(want, out))
    same(top, cast(want.max(axis=1, keepdims=True), nl.float32))


def ranged(y, bounds, dst_type=nl.float32, result_type=nl.float32):
    dst, top = sb(1, 4, dtype=dst_type), sb(1, 1, dtype=result_type)
    low, high = sb(1, 1), sb(1, 1)
    nisa.memset(low, float(bounds[0]))
    nisa.memset(high, float(bounds[1]))
    nisa.range_select(
        dst, tile(y), nl.greater_equal, nl.less, low, high, range_start=10, reduce_res=top,
        on_false_value=FP32_MIN,
    )  # fmt: skip
    return dst, top


def test_example_21():
    x = np.array([[5, 6, 7, 8]], F32)
    dst, top = values(lambda y: ranged(y, (11, 13)), x)
    same(dst, np.array([[FP32_MIN, 6, 7, FP32_MIN]], F32))
    assert top[0, 0] == 7


def test_a_narrow_dst_stores_minus_infinity_where_the_accumulator_holds_the_lowest_float():
    x = np.array([[5, 6, 7, 8]], F32)
    dst, top = values(lambda y: ranged(y, (20, 20), nl.bfloat16), x)
    assert np.isneginf(dst.astype(F32)).all()
    assert top[0, 0] == np.finfo(F32).min
    # What the stability note warns of: a bfloat16 result is -inf as well.
    assert np.isneginf(values(lambda y: ranged(y, (20, 20), nl.bfloat16, nl.bfloat16), x)[1])


@pytest.mark.parametrize(("command", "want"), [
    (R.reset_reduce, 4.0), (R.reduce, 9.0), (R.reset, -np.inf), (R.idle, np.nan),
])  # fmt: skip
def test_commands_of_range_select(command, want):
    def call(y):
        src, low, high, top = tile(y), sb(1, 1), sb(1, 1), sb(1, 1)
        nisa.memset(low, 0.0)
        nisa.memset(high, 99.0)
        args = (nl.greater_equal, nl.less, low, high)
        nisa.range_select(sb(1, 1), src[:, 0:1], *args)
        nisa.range_select(sb(1, 1), src[:, 1:2], *args, reduce_cmd=command)
        nisa.range_select(sb(1, 1), src[:, 2:3], *args, reduce_cmd=R.reduce, reduce_res=top)
        return top

    got = values(call, np.array([[9, 4, -50]], F32))[0, 0]
    same(np.array([got]), np.array([max(want, -50) if want == want else want], F32))


@pytest.mark.parametrize("target", ["trn2", "trn3"])
def test_range_select_event(target):
    def call():
        nisa.range_select(
            sb(4, 6, dtype=nl.bfloat16), ps(4, 6), nl.less, nl.less, sb(4, 1), sb(4, 1),
            reduce_res=sb(4, 1),
        )  # fmt: skip

    found = event(call, target=target)
    assert found.engine is nisa.engine.vector
    assert (found.hidden_reads, found.hidden_writes) == ((), ("vector_accumulator",))
    assert [a.shape for a in found.reads] == [(4, 6), (4, 1), (4, 1)]
    assert found.work == StreamWork(
        "range_select", "", 6, 4, (("float32", "psum", 4),), ("bfloat16", "sbuf", 2), vectors=2,
        reduces=True, reads_accumulator=True,
    )  # fmt: skip


# -- tensor_copy_predicated ------------------------------------------------------------------------

PREDICATES = (nl.uint8, nl.uint16, nl.uint32)


@given(p=rows, n=columns, kind=kinds, predicate=st.sampled_from(PREDICATES),
       reverse=st.booleans(), number=st.booleans(), places=st.tuples(*[st.booleans()] * 3),
       seed=seeds)  # fmt: skip
def test_tensor_copy_predicated(p, n, kind, predicate, reverse, number, places, seed):
    x, old = data(seed, (p, n), kind), data(seed + 1, (p, n), kind)
    # The highest bit alone: a predicate is true if any bit is set.
    high = 2 ** (8 * np.dtype(HOSTS[predicate]).itemsize - 1)
    choice = np.random.default_rng(seed).choice([0, 1, high], (p, n)).astype(HOSTS[predicate])
    source, mask, target = (PSUM if b else SBUF for b in places)
    if source is PSUM:
        mask = SBUF

    def call(y, before, c):
        dst = tile(before, target)
        src = 3 if number else tile(y, source)
        nisa.tensor_copy_predicated(dst, src, tile(c, mask), reverse_pred=reverse)
        return dst

    got = values(call, x, old, choice)
    new = np.full((p, n), 3).astype(HOSTS[kind]) if number else x
    want = old.copy()
    for i, j in itertools.product(range(p), range(n)):
        if (int(choice[i, j]) != 0) != reverse:
            want[i, j] = new[i, j]
    same(got, want)


def test_only_elements_that_were_copied_count_as_written():
    choice = np.array([[1, 0, 1]], np.uint8)

    def fill(y, c):
        dst = sb(1, 3)
        nisa.tensor_copy_predicated(dst, tile(y), tile(c))
        return dst

    x = np.array([[1, 2, 3]], F32)
    got = values(lambda y, c: fill(y, c)[:, 0:3:2], x, choice)
    same(got, np.array([[1, 3]], F32))

    def reads_the_hole(y, c):
        nisa.tensor_copy(sb(1, 3), fill(y, c))

    with pytest.raises(UninitializedRead, match=r"reads 1 of 3 elements .*first at index \(0, 1\)"):
        launch(reads_the_hole, (x, choice), target="toy")

    def fills_the_hole(y, c):
        dst = fill(y, c)
        nisa.tensor_copy_predicated(dst, 0.0, tile(c), reverse_pred=True)
        return dst

    same(values(fills_the_hole, x, choice), np.array([[1, 0, 3]], F32))


def test_without_values_every_element_counts_as_written():
    def kernel(y, c):
        dst = sb(1, 3)
        nisa.tensor_copy_predicated(dst, tile(y), tile(c))
        nisa.tensor_copy(sb(1, 3), dst)

    arguments = (Abstract((1, 3), "float32"), Abstract((1, 3), "uint8"))
    assert len(launch(kernel, arguments, target="toy").trace) == 4


def test_an_update_of_a_tile_without_values_has_none():
    def kernel(y, x, c):
        dst = tile(y)
        nisa.tensor_copy_predicated(dst, tile(x), tile(c))
        seen.append(dst.mem.abstract)

    seen: list[bool] = []
    x, choice = np.ones((1, 3), F32), np.ones((1, 3), np.uint8)
    launch(kernel, (Abstract((1, 3), "float32"), x, choice), target="toy")
    assert seen == [True]


@pytest.mark.parametrize("number", [False, True])
def test_tensor_copy_predicated_event(number):
    def call():
        src = 1.0 if number else sb(4, 6)
        nisa.tensor_copy_predicated(sb(4, 6), src, sb(4, 6, dtype=nl.uint8))

    found = event(call)
    operand, mask = ("float32", "sbuf", 4), ("uint8", "sbuf", 1)
    assert found.engine is nisa.engine.vector
    sources = (mask,) if number else (operand, mask)
    assert found.work == StreamWork("tensor_copy_predicated", "", 6, 4, sources, operand)


def test_a_number_needs_a_place_to_go():
    refused(
        lambda: nisa.tensor_copy_predicated(1.0, 1.0, sb(1, 1, dtype=nl.uint8)),
        "dst is float 1.0; it must be a tensor",
    )
