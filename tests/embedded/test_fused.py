"""scalar_tensor_tensor, reciprocal, activation_reduce: two steps in one instruction."""

from __future__ import annotations

import itertools
import math

import nki.isa as nisa
import nki.language as nl
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from nki_kernels.machine.trace import StreamWork
from tests.embedded.folds import left
from tests.embedded.harness import (
    FLOATS,
    INTEGERS,
    PSUM,
    SBUF,
    apply,
    cast,
    columns,
    data,
    event,
    rows,
    same,
    sb,
    tile,
    values,
)
from tests.embedded.test_elementwise import FORMULAS, each

F32 = np.float32
R = nisa.reduce_cmd
kinds = st.sampled_from([*FLOATS, *INTEGERS])
seeds = st.integers(0, 2**20)
BINARY = sorted(FORMULAS)


def step(op, x, y, reverse):
    """One operator in float32."""
    return cast(each(FORMULAS[op], *((y, x) if reverse else (x, y))), nl.float32)


# -- scalar_tensor_tensor --------------------------------------------------------------------------


@given(p=rows, n=columns, ops=st.tuples(st.sampled_from(BINARY), st.sampled_from(BINARY)),
       reverse=st.tuples(st.booleans(), st.booleans()), types=st.tuples(kinds, kinds, kinds),
       vector=st.sampled_from([None, nl.float32, nl.bfloat16]), seed=seeds)  # fmt: skip
def test_scalar_tensor_tensor(p, n, ops, reverse, types, vector, seed):
    x, y = data(seed, (p, n), types[0]), data(seed + 1, (p, n), types[1])
    column = data(seed + 2, (p, 1), vector or nl.float32)

    def call(dst, a, b, c):
        nisa.scalar_tensor_tensor(
            dst, a, getattr(nl, ops[0]), c if vector else -1.5, getattr(nl, ops[1]), b,
            reverse0=reverse[0], reverse1=reverse[1],
        )  # fmt: skip

    got = apply(call, x, y, column, shape=(p, n), dtype=types[2])
    operand = column if vector else np.full((p, 1), -1.5)
    middle = step(ops[0], x, operand, reverse[0])
    same(got, cast(step(ops[1], middle, y, reverse[1]), types[2]))


@pytest.mark.parametrize(("reverse1", "want"), [(False, [-7, -4]), (True, [7, 4])])
def test_example_13(reverse1, want):
    x, y = np.array([[1, 2]], F32), np.full((1, 2), 10, F32)

    def call(dst, a, b):
        nisa.scalar_tensor_tensor(dst, a, nl.multiply, 3, nl.subtract, b, reverse1=reverse1)

    same(apply(call, x, y, shape=(1, 2)), np.array([want], F32))


def test_the_first_result_is_not_rounded_to_dst():
    x, y = np.array([[1.0]], F32), np.array([[256.0]], F32)

    def call(dst, a, b):
        nisa.scalar_tensor_tensor(dst, a, nl.add, 256.0, nl.subtract, b)

    same(apply(call, x, y, shape=(1, 1), dtype=nl.bfloat16), cast([[1.0]], nl.bfloat16))


def test_a_unary_first_operator():
    x, y = np.array([[-3, 2]], F32), np.array([[1, 1]], F32)

    def call(dst, a, b):
        nisa.scalar_tensor_tensor(dst, a, nl.abs, None, nl.add, b)

    same(apply(call, x, y, shape=(1, 2)), np.array([[4, 3]], F32))


PLACES = [p for p in itertools.product([SBUF, PSUM], repeat=4) if p[:2] != (PSUM, PSUM)]


@pytest.mark.parametrize("places", PLACES)
def test_one_operand_may_be_in_psum(places):
    x, y, c = (data(i, (3, n), nl.float32) for i, n in enumerate((4, 4, 1)))

    def call(dst, a, b, column):
        nisa.scalar_tensor_tensor(dst, a, nl.multiply, column, nl.add, b)

    got = apply(call, x, y, c, shape=(3, 4), buffer=places[3], buffers=places[:3])
    same(got, step("add", step("multiply", x, c, False), y, False))


def test_scalar_tensor_tensor_in_place():
    x, y = data(1, (3, 4), nl.bfloat16), data(2, (3, 4), nl.float32)

    def call(a, b):
        dst = tile(a)
        nisa.scalar_tensor_tensor(dst, dst, nl.multiply, 2.0, nl.subtract, tile(b), reverse1=True)
        return dst

    want = step("subtract", step("multiply", x, np.full((3, 1), 2.0), False), y, True)
    same(values(call, x, y), cast(want, nl.bfloat16))


@pytest.mark.parametrize("vector", [False, True])
def test_scalar_tensor_tensor_event(vector):
    def call():
        operand0 = sb(4, 1) if vector else 2.0
        nisa.scalar_tensor_tensor(
            sb(4, 6, dtype=nl.bfloat16), sb(4, 6), nl.multiply, operand0, nl.add, sb(4, 6)
        )

    found = event(call)
    operand = ("float32", "sbuf", 4)
    assert (found.engine, found.hidden_writes) == (nisa.engine.vector, ())
    assert len(found.reads) == 2 + vector
    assert found.work == StreamWork(
        "scalar_tensor_tensor", "multiply", 6, 4, (operand, operand), ("bfloat16", "sbuf", 2),
        vectors=int(vector), joins="add",
    )  # fmt: skip


# -- reciprocal ------------------------------------------------------------------------------------


def inverse(x):
    return math.copysign(math.inf, x) if x == 0 else 1 / x


@given(p=rows, n=columns, types=st.tuples(kinds, kinds), seed=seeds,
       places=st.tuples(*[st.sampled_from([SBUF, PSUM])] * 2))  # fmt: skip
def test_reciprocal(p, n, types, seed, places):
    x = data(seed, (p, n), types[0])
    got = apply(
        nisa.reciprocal, x, shape=(p, n), dtype=types[1], buffer=places[0], buffers=places[1:]
    )
    exact = np.array([[inverse(float(v)) for v in line] for line in x])
    same(got, cast(exact, types[1]))


def test_reciprocal_of_zeros_and_infinities():
    x = np.array([[0.0, -0.0, np.inf, -np.inf, np.nan]], F32)
    got = apply(nisa.reciprocal, x, shape=(1, 5))
    same(got, np.array([[np.inf, -np.inf, 0.0, -0.0, np.nan]], F32))


def test_reciprocal_event():
    found = event(lambda: nisa.reciprocal(sb(4, 6), sb(4, 6)))
    operand = ("float32", "sbuf", 4)
    assert found.engine is nisa.engine.vector
    assert found.work == StreamWork("reciprocal", "", 6, 4, (operand,), operand)


# -- activation_reduce -----------------------------------------------------------------------------


@given(p=rows, n=columns, types=st.tuples(st.sampled_from(FLOATS), kinds), vector=st.booleans(),
       result=st.sampled_from(FLOATS), seed=seeds)  # fmt: skip
def test_activation_reduce_sums_what_it_computes(p, n, types, vector, result, seed):
    x = data(seed, (p, n), types[0])
    scale, bias = (data(seed + i, (p, 1), nl.float32) for i in (1, 2))
    if not vector:
        scale, bias = np.full((p, 1), 0.5, F32), np.full((p, 1), -1, F32)

    def call(y, s, b):
        dst, total = sb(p, n, dtype=types[1]), sb(p, 1, dtype=result)
        nisa.activation_reduce(
            dst, nl.abs, tile(y), nl.add, total, bias=tile(b) if vector else -1.0,
            scale=tile(s) if vector else 0.5,
        )  # fmt: skip
        return dst, total

    dst, total = values(call, x, scale, bias)
    exact = np.abs(step("add", step("multiply", x, scale, False), bias, False))
    same(dst, cast(exact, types[1]))
    same(total, cast([[left("add", line)] for line in exact], result))


@pytest.mark.parametrize("op", [nl.exp, nl.square, nl.rsqrt])
def test_activation_reduce_is_activation_with_reset_reduce(op):
    x = np.abs(data(3, (5, 7), nl.float32)) + F32(0.5)

    def call(y):
        src, a, b, s, t = tile(y), sb(5, 7), sb(5, 7), sb(5, 1), sb(5, 1)
        nisa.activation_reduce(a, op, src, nl.add, s)
        nisa.activation(b, op, src, reduce_op=nl.add, reduce_res=t, reduce_cmd=R.reset_reduce)
        return a, s, b, t

    a, s, b, t = values(call, x)
    same(a, b)
    same(s, t)


def test_a_sum_may_stay_in_the_accumulator():
    def call(y):
        src, total = tile(y), sb(1, 1)
        nisa.activation_reduce(sb(1, 2), nl.copy, src[:, 0:2], nl.add, None)
        nisa.activation(
            sb(1, 1), nl.copy, src[:, 2:3], reduce_op=nl.add, reduce_res=total, reduce_cmd=R.reduce
        )
        return total

    same(values(call, np.array([[1, 2, 4]], F32)), np.array([[7]], F32))


def test_a_scratch_of_stride_zero_when_only_the_sum_is_wanted():
    """As a published RMS normalization does."""

    def call(y):
        scratch, total = sb(2, 1), sb(2, 1)
        nisa.activation_reduce(scratch.ap([[1, 2], [0, 3]]), nl.square, tile(y), nl.add, total)
        return scratch, total

    scratch, total = values(call, np.array([[1, 2, 3], [4, 5, 6]], F32))
    same(scratch, np.array([[9], [36]], F32))
    same(total, np.array([[14], [77]], F32))


def test_activation_reduce_event():
    def call():
        nisa.activation_reduce(sb(4, 6), nl.exp, sb(4, 6), nl.add, sb(4, 1), bias=sb(4, 1))

    found = event(call)
    operand = ("float32", "sbuf", 4)
    assert (found.opcode, found.engine) == ("activation_reduce", nisa.engine.scalar)
    assert found.hidden_reads == ("act_table",)
    assert found.hidden_writes == ("act_accumulator",)
    assert [a.shape for a in found.writes] == [(4, 6), (4, 1)]
    assert found.work == StreamWork(
        "activation_reduce", "exp", 6, 4, (operand,), operand, vectors=1, reduces=True,
        reads_accumulator=True,
    )  # fmt: skip
