"""The Vector accumulator: tensor_scalar_reduce and select_reduce, alone and in a row."""

from __future__ import annotations

import math

import nki.isa as nisa
import nki.language as nl
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from nki_kernels.machine.launch import launch
from nki_kernels.machine.trace import StreamWork
from tests.embedded.folds import left, single, small
from tests.embedded.harness import (
    FLOATS,
    HOSTS,
    INTEGERS,
    cast,
    columns,
    data,
    event,
    ps,
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
IDENTITY = {"add": 0.0, "multiply": 1.0, "maximum": -math.inf, "minimum": math.inf}
BINARY = sorted(FORMULAS)


# -- tensor_scalar_reduce --------------------------------------------------------------------------


def scaled(op, x, operand):
    return cast(each(FORMULAS[op], x, operand), nl.float32)


@given(p=rows, n=columns, op=st.sampled_from(BINARY), reduction=st.sampled_from(sorted(IDENTITY)),
       types=st.tuples(kinds, kinds), vector=st.booleans(), negate=st.booleans(),
       command=st.sampled_from(["reset_reduce", "load_reduce", "vector init"]),
       seed=seeds)  # fmt: skip
def test_tensor_scalar_reduce(p, n, op, reduction, types, vector, negate, command, seed):
    x = small(seed, (p, n), types[0])
    operand = data(seed + 1, (p, 1), nl.float32, 2) if vector else np.full((p, 1), 1.5, F32)
    init = data(seed + 2, (p, 1), nl.float32) if "vector" in command else np.full((p, 1), 5, F32)
    loads = command != "reset_reduce"

    def call(y, a, b):
        dst, total = sb(p, n, dtype=types[1]), sb(p, 1)
        given_init = tile(b) if "vector" in command else 5
        nisa.tensor_scalar_reduce(
            dst, tile(y), getattr(nl, op), tile(a) if vector else 1.5, getattr(nl, reduction),
            reduce_res=total, reduce_cmd=R.load_reduce if loads else R.reset_reduce,
            reduce_init=given_init if loads else None, reduce_res_negate=negate,
        )  # fmt: skip
        return dst, total

    dst, total = values(call, x, operand, init)
    exact = scaled(op, x, operand)
    first = init[:, 0] if loads else np.full(p, IDENTITY[reduction])
    want = [[left(reduction, [f, *line])] for f, line in zip(first, exact, strict=True)]
    same(dst, cast(exact, types[1]))
    same(total, cast(-np.array(want) if negate else want, nl.float32))


def test_example_14():
    x = np.array([[-3, 1, 2]], F32)

    def call(y):
        results = [sb(1, 1) for _ in range(3)]
        dst, src = sb(1, 3), tile(y)
        common = {"op0": nl.abs, "operand0": 0, "reduce_op": nl.maximum}
        nisa.tensor_scalar_reduce(dst, src, reduce_res=results[0], **common)
        nisa.tensor_scalar_reduce(dst, src, reduce_res=results[1], reduce_res_negate=True, **common)
        nisa.tensor_scalar_reduce(
            dst, src, reduce_res=results[2], reduce_cmd=R.load_reduce, reduce_init=5, **common
        )
        return dst, *results

    dst, plain, negated, loaded = values(call, x)
    same(dst, np.array([[3, 1, 2]], F32))
    assert [float(v[0, 0]) for v in (plain, negated, loaded)] == [3, -3, 5]


@pytest.mark.parametrize(("token", "want"), [(nl.max, 3), (nl.min, 1), (nl.add, 6)])
def test_nl_max_and_min_are_reduction_operators(token, want):
    def call(y):
        total = sb(1, 1)
        nisa.tensor_scalar_reduce(sb(1, 3), tile(y), nl.abs, None, token, total)
        return total

    assert values(call, np.array([[-3, 1, 2]], F32))[0, 0] == want


def test_the_accumulator_continues_across_calls_and_across_instructions():
    x = data(3, (4, 9), nl.float32)

    def call(y):
        src, first, second, third = tile(y), sb(4, 1), sb(4, 1), sb(4, 1)
        args = {"op0": nl.multiply, "operand0": 1.0, "reduce_op": nl.add}
        nisa.tensor_scalar_reduce(sb(4, 4), src[:, 0:4], reduce_res=first, **args)
        nisa.tensor_scalar_reduce(sb(4, 3), src[:, 4:7], reduce_cmd=R.reduce, **args)
        # The registers of one engine are shared: a maximum goes on from the sum.
        ones = sb(4, 2, dtype=nl.uint8)
        nisa.memset(ones, 1)
        nisa.select_reduce(sb(4, 2), ones, src[:, 7:9], 0.0, reduce_res=second, reduce_cmd=R.reduce)
        nisa.tensor_scalar_reduce(
            sb(2, 1), src[2:4, 0:1], reduce_cmd=R.reduce, reduce_res=third[2:4],
            reduce_res_negate=True, **args,
        )  # fmt: skip
        return first, second, third[2:4]

    first, second, third = values(call, x)
    for i, line in enumerate(x):
        assert first[i, 0] == left("add", line[:4])
        assert second[i, 0] == max(left("add", line[:7]), *line[7:])
    for i in (2, 3):
        assert third[i - 2, 0] == -single(float(second[i, 0]) + float(x[i, 0]))


def test_a_sum_begins_with_zero():
    """0 + -0 is 0, while -0 alone would stay -0."""

    def call(y):
        total = sb(1, 1)
        nisa.tensor_scalar_reduce(sb(1, 1), tile(y), nl.multiply, 1.0, nl.add, total)
        return total

    same(values(call, np.array([[-0.0]], F32)), np.array([[0.0]], F32))


def test_the_reduction_takes_values_before_they_are_rounded_to_dst():
    def call(y):
        dst, total = sb(1, 2, dtype=nl.int8), sb(1, 1)
        nisa.tensor_scalar_reduce(dst, tile(y), nl.multiply, 1.0, nl.add, total)
        return dst, total

    dst, total = values(call, np.array([[0.25, 0.25]], F32))
    same(dst, np.zeros((1, 2), np.int8))
    assert total[0, 0] == 0.5


@pytest.mark.parametrize(("command", "reads"), [
    (R.reset_reduce, ()), (R.reduce, ("vector_accumulator",)), (R.load_reduce, ()),
])  # fmt: skip
def test_tensor_scalar_reduce_event(command, reads):
    def call():
        nisa.tensor_scalar_reduce(
            sb(4, 6), sb(4, 6), nl.multiply, sb(4, 1), nl.add, sb(4, 1), reduce_cmd=command,
            reduce_init=0.0 if command is R.load_reduce else None,
        )  # fmt: skip

    found = event(call)
    assert found.engine is nisa.engine.vector
    assert (found.hidden_reads, found.hidden_writes) == (reads, ("vector_accumulator",))
    assert [a.shape for a in found.reads] == [(4, 6), (4, 1)]
    assert [a.shape for a in found.writes] == [(4, 6), (4, 1)]
    operand = ("float32", "sbuf", 4)
    assert found.work == StreamWork(
        "tensor_scalar_reduce", "multiply", 6, 4, (operand,), operand, vectors=1, reduces=True,
        reads_accumulator=True,
    )  # fmt: skip


# -- select_reduce ---------------------------------------------------------------------------------

PREDICATES = (nl.int8, nl.uint8, nl.int16, nl.uint16)
SELECTED = [k for k in (*FLOATS, *INTEGERS) if k not in (nl.int32, nl.uint32)]


def chosen(seed, shape, kind):
    return np.random.default_rng(seed).integers(0, 3, shape).astype(HOSTS[kind])


@given(p=rows, n=columns, kind=st.sampled_from(SELECTED), out=kinds,
       predicate=st.sampled_from(PREDICATES), vector=st.booleans(), reverse=st.booleans(),
       seed=seeds)  # fmt: skip
def test_select_reduce(p, n, kind, out, predicate, vector, reverse, seed):
    x, choice = data(seed, (p, n), kind), chosen(seed + 1, (p, n), predicate)
    other = data(seed + 2, (p, 1), nl.float32) if vector else np.full((p, 1), -9, F32)

    def call(y, c, o):
        dst, top = sb(p, n, dtype=out), sb(p, 1)
        nisa.select_reduce(
            dst, tile(c), tile(y), tile(o) if vector else -9.0, reduce_res=top,
            reduce_cmd=R.reset_reduce, reverse_pred=reverse,
        )  # fmt: skip
        return dst, top

    dst, top = values(call, x, choice, other)
    want = np.array([
        [float(x[i, j]) if bool(choice[i, j]) != reverse else float(other[i, 0]) for j in range(n)]
        for i in range(p)
    ])  # fmt: skip
    same(dst, cast(want, out))
    same(top, cast(want.max(axis=1, keepdims=True), nl.float32))


@pytest.mark.parametrize(("reverse", "want", "top"), [
    (False, [1, -9, 3], 3), (True, [-9, 2, -9], 2),
])  # fmt: skip
def test_example_22(reverse, want, top):
    def call(c, y):
        dst, result = sb(1, 3), sb(1, 1)
        nisa.select_reduce(
            dst, tile(c), tile(y), -9.0, result, R.reset_reduce, reverse_pred=reverse
        )
        return dst, result

    dst, result = values(call, np.array([[1, 0, 1]], np.uint8), np.array([[1, 2, 3]], F32))
    same(dst, np.array([want], F32))
    assert result[0, 0] == top


def test_idle_leaves_the_accumulator_unknown():
    x, c = np.ones((3, 4), F32), np.ones((3, 4), np.uint8)

    def call(y, choice):
        source, predicate, top = tile(y), tile(choice), sb(3, 1)
        nisa.select_reduce(sb(3, 4), predicate, source, 0.0, reduce_cmd=R.reset_reduce)
        nisa.select_reduce(sb(3, 4)[0:2], predicate[0:2], source[0:2], 0.0)
        nisa.select_reduce(sb(3, 4), predicate, source, 0.0, top, R.reduce)
        return top

    top = values(call, x, c)
    assert np.isnan(top[0:2]).all()
    assert top[2, 0] == 1


def test_the_accumulator_is_unknown_before_its_first_reset():
    def call(y):
        top = sb(2, 1)
        nisa.tensor_scalar_reduce(
            sb(2, 3), tile(y), nl.add, 0.0, nl.maximum, top, reduce_cmd=R.reduce
        )
        return top

    assert np.isnan(values(call, np.ones((2, 3), F32))).all()


@pytest.mark.parametrize(("command", "reads"), [
    (R.idle, ()), (R.reset_reduce, ()), (R.reduce, ("vector_accumulator",)),
])  # fmt: skip
def test_select_reduce_event(command, reads):
    def call():
        nisa.select_reduce(sb(4, 6), sb(4, 6, dtype=nl.uint8), ps(4, 6), 0.0, reduce_cmd=command)

    found = event(call)
    assert (found.hidden_reads, found.hidden_writes) == (reads, ("vector_accumulator",))
    assert found.work == StreamWork(
        "select_reduce", "", 6, 4, (("uint8", "sbuf", 1), ("float32", "psum", 4)),
        ("float32", "sbuf", 4), reduces=command is not R.idle,
    )  # fmt: skip


def test_nothing_of_an_accumulator_survives_a_launch():
    """A second launch on the same data starts from unknown registers again."""
    x = np.ones((1, 2), F32)

    def kernel(y):
        top = sb(1, 1)
        nisa.tensor_scalar_reduce(sb(1, 2), tile(y), nl.add, 0.0, nl.add, top, reduce_cmd=R.reduce)
        nisa.tensor_scalar_reduce(sb(1, 2), tile(y), nl.add, 0.0, nl.add)
        seen.append(float(top.numpy()[0, 0]))

    seen: list[float] = []
    for _ in range(2):
        launch(kernel, (x,), target="toy")
    assert len(seen) == 2
    assert all(math.isnan(v) for v in seen)
