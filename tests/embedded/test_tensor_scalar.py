"""tensor_scalar: both operators and orders, scalar and vector operands, unary and bit operators."""

from __future__ import annotations

import itertools

import nki.isa as nisa
import nki.language as nl
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

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
    ps,
    rows,
    same,
    sb,
    tile,
    values,
)
from tests.embedded.test_elementwise import BITS, FORMULAS, each

F32 = np.float32
kinds = st.sampled_from([*FLOATS, *INTEGERS])
seeds = st.integers(0, 2**20)
ARITHMETIC = sorted(FORMULAS)


def one(op, x, operand, reverse):
    """op of float32 values, rounded to float32; a vector [P, 1] meets every element of its row."""
    pair = (operand, x) if reverse else (x, operand)
    return cast(each(FORMULAS[op], *pair), nl.float32)


@given(p=rows, n=columns, op=st.sampled_from(ARITHMETIC), types=st.tuples(kinds, kinds),
       reverse=st.booleans(), number=st.integers(-5, 5), seed=seeds)  # fmt: skip
def test_one_operator_with_a_number(p, n, op, types, reverse, number, seed):
    x = data(seed, (p, n), types[0])

    def call(dst, y):
        nisa.tensor_scalar(dst, y, getattr(nl, op), number, reverse0=reverse)

    got = apply(call, x, shape=(p, n), dtype=types[1])
    same(got, cast(one(op, x, float(number), reverse), types[1]))


@given(p=rows, n=columns, ops=st.tuples(st.sampled_from(ARITHMETIC), st.sampled_from(ARITHMETIC)),
       reverse=st.tuples(st.booleans(), st.booleans()), seed=seeds, kind=kinds,
       places=st.tuples(*[st.sampled_from([SBUF, PSUM])] * 3))  # fmt: skip
def test_two_operators_with_vectors(p, n, ops, reverse, seed, kind, places):
    x, a, b = (
        data(seed, (p, n), kind), data(seed + 1, (p, 1), nl.float32),
        data(seed + 2, (p, 1), nl.float32),
    )  # fmt: skip

    def call(dst, y, first, second):
        nisa.tensor_scalar(
            dst, y, getattr(nl, ops[0]), first, reverse0=reverse[0],
            op1=getattr(nl, ops[1]), operand1=second, reverse1=reverse[1],
        )  # fmt: skip

    got = apply(call, x, a, b, shape=(p, n), buffers=places)
    same(got, one(ops[1], one(ops[0], x, a, reverse[0]), b, reverse[1]))


@pytest.mark.parametrize(("options", "want"), [
    ({}, [2, -1]),
    ({"op1": nl.multiply, "operand1": 2}, [4, -2]),
    ({"op1": nl.subtract, "operand1": 1, "reverse1": True}, [-1, 2]),
])  # fmt: skip
def test_example_12(options, want):
    def call(dst, x):
        nisa.tensor_scalar(dst, x, nl.subtract, 3, reverse0=True, **options)

    same(apply(call, np.array([[1, 4]], F32), shape=(1, 2)), np.array([want], F32))


def test_a_vector_meets_every_free_dimension_of_its_partition():
    x, v = data(0, (3, 2, 2), nl.float32), np.array([[1], [10], [100]], F32)

    def call(dst, y, operand):
        nisa.tensor_scalar(dst, y, nl.multiply, operand)

    same(apply(call, x, v, shape=(3, 4)), (x * v[:, :, None]).reshape(3, 4))


@pytest.mark.parametrize("kind", [nl.int32, nl.uint32])
def test_a_float32_column_is_added_to_integers(kind):
    x, v = np.array([[3, 5], [7, 9]], HOSTS[kind]), np.array([[10], [20]], F32)

    def call(dst, y, operand):
        nisa.tensor_scalar(dst, y, nl.add, operand)

    same(apply(call, x, v, shape=(2, 2), dtype=kind), np.array([[13, 15], [27, 29]], HOSTS[kind]))


def test_immediates_are_float32():
    def call(dst, x):
        nisa.tensor_scalar(dst, x, nl.add, 2**24 + 1)

    same(apply(call, np.zeros((1, 1), F32), shape=(1, 1)), np.array([[2**24]], F32))


@pytest.mark.parametrize(("op", "target", "engine", "want"), [
    (nl.abs, "toy", nisa.engine.vector, [4, 1, 0.25]),
    (nl.abs, "trn1", nisa.engine.vector, [4, 1, 0.25]),
    (nl.square, "trn3", nisa.engine.vector, [16, 1, 0.0625]),
    (nl.relu, "trn3", nisa.engine.vector, [4, 0, 0.25]),
])  # fmt: skip
@pytest.mark.parametrize("operand", [None, 0, 0.0])
def test_unary_operators(op, target, engine, want, operand):
    def call(dst, x):
        nisa.tensor_scalar(dst, x, op, operand, engine=engine)

    x = np.array([[4, -1, 0.25]], F32)
    same(apply(call, x, shape=(1, 3), target=target), np.array([want], F32))


@pytest.mark.parametrize("engine", [nisa.engine.gpsimd, nisa.engine.scalar, nisa.engine.unknown])
def test_rsqrt(engine):
    def call(dst, x):
        nisa.tensor_scalar(dst, x, nl.rsqrt, None, engine=engine)

    x = np.array([[4, 1, 0.25, 2.0**-60]], F32)
    same(apply(call, x, shape=(1, 4)), np.array([[0.5, 1, 2, 2.0**30]], F32))


@pytest.mark.parametrize("options", [
    {"op0": nl.multiply, "operand0": 3.0, "op1": nl.add, "operand1": 1.0},
    {"op0": nl.multiply, "operand0": 3.0}, {"op0": nl.add, "operand0": 3.0},
])  # fmt: skip
def test_scalar_engine_combinations_of_gen3(options):
    def call(engine):
        return lambda dst, x: nisa.tensor_scalar(dst, x, engine=engine, **options)

    x = data(0, (2, 3), nl.float32)
    got = [apply(call(e), x, shape=(2, 3)) for e in (nisa.engine.scalar, nisa.engine.vector)]
    same(*got)


@pytest.mark.parametrize("name", [*BITS, "left_shift", "right_shift"])
@pytest.mark.parametrize(("kind", "reverse"), list(itertools.product(INTEGERS, [False, True])))
def test_bit_operators_with_a_number_and_with_a_vector(name, kind, reverse):
    host = np.dtype(HOSTS[kind])
    width = 8 * host.itemsize
    x = np.array([[1, 2, 3, 5]], host)
    functions = BITS | {"left_shift": lambda a, b: a << b, "right_shift": lambda a, b: a >> b}
    pairs = [(3, int(v)) if reverse else (int(v), 3) for v in x[0]]
    want = np.array([[functions[name](a, b) % 2**width for a, b in pairs]], f"u{host.itemsize}")

    def kernel(y):
        t, v = tile(y), sb(1, 1, dtype=kind)
        nisa.memset(v, 3)
        out = []
        for operand in (3, v):
            d = sb(1, 4, dtype=kind)
            nisa.tensor_scalar(d, t, getattr(nl, name), operand, reverse0=reverse)
            out.append(d)
        return tuple(out)

    for got in values(kernel, x):
        same(got, want.view(host))


def test_example_37_right_shift_is_logical():
    def call(dst, x):
        nisa.tensor_scalar(dst, x, nl.right_shift, 1)

    x = np.array([[-8]], np.int32)
    same(apply(call, x, shape=(1, 1), dtype=nl.int32), np.array([[0x7FFFFFFC]], np.int32))


def test_invert_and_a_chain_of_bit_operators():
    def call(dst, x):
        nisa.tensor_scalar(dst, x, nl.invert, None, op1=nl.bitwise_and, operand1=0x0F)

    x = np.array([[0x55, 0xFF]], np.uint8)
    same(apply(call, x, shape=(1, 2), dtype=nl.uint8), np.array([[0x0A, 0x00]], np.uint8))


def test_bits_keep_their_width_where_the_sign_changes():
    def call(dst, x):
        nisa.tensor_scalar(dst, x, nl.bitwise_or, 0)

    x = np.array([[-1, 5]], np.int16)
    same(apply(call, x, shape=(1, 2), dtype=nl.uint16), np.array([[0xFFFF, 5]], np.uint16))


def test_in_place_in_psum_with_an_operand_inside_the_data():
    def kernel(x):
        t = ps(2, 3)
        nisa.tensor_copy(t, tile(x))
        nisa.tensor_scalar(t, t, nl.subtract, t[:, 0:1])
        return t

    x = data(0, (2, 3), nl.float32)
    same(values(kernel, x), x - x[:, :1])
