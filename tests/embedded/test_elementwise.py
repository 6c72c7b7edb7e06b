"""tensor_copy, memset, tensor_tensor, tensor_scalar against formulas on exact numbers."""

from __future__ import annotations

import itertools
import operator

import ml_dtypes
import nki.isa as nisa
import nki.language as nl
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from nki_kernels.machine.options import Options
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
    rows,
    same,
    sb,
    tile,
    values,
)

F32 = np.float32
VECTOR, SCALAR, GPSIMD = nisa.engine.vector, nisa.engine.scalar, nisa.engine.gpsimd
FP8 = (nl.float8_e4m3, nl.float8_e5m2)
ALL = (*FLOATS, *FP8, *INTEGERS)
kinds = st.sampled_from(ALL)
seeds = st.integers(0, 2**20)


def wide(array):
    return np.asarray(array).astype(np.float64)


# -- tensor_copy -----------------------------------------------------------------------------------


@given(p=rows, n=columns, src=kinds, dst=kinds, seed=seeds, places=st.tuples(
    st.sampled_from([SBUF, PSUM]), st.sampled_from([SBUF, PSUM])))  # fmt: skip
def test_a_copy_converts_through_float32(p, n, src, dst, seed, places):
    x = data(seed, (p, n), src)
    got = apply(nisa.tensor_copy, x, shape=(p, n), dtype=dst, buffers=places[:1], buffer=places[1])
    same(got, cast(wide(x), dst))


@pytest.mark.parametrize("engine", [VECTOR, SCALAR, GPSIMD])
@pytest.mark.parametrize("kind", [nl.float32, nl.bfloat16, nl.float8_e5m2, nl.int32, nl.uint16])
def test_a_copy_between_equal_dtypes_moves_bits(engine, kind):
    host = np.dtype(HOSTS[kind])
    raw = np.random.default_rng(0).integers(0, 256, (4, 8 * host.itemsize), np.uint8).view(host)

    def call(dst, src):
        nisa.tensor_copy(dst, src, engine=engine)

    got = apply(call, raw, shape=(4, 8), dtype=kind)
    assert np.array_equal(got.view(np.uint8), raw.view(np.uint8))


def test_integers_of_different_width_lose_bits_above_24():
    x = np.array([[2**24 + 1, -(2**24) - 1, 2**31 - 1]], np.int32)
    unchecked = Options(integers="off")
    got = apply(nisa.tensor_copy, x, shape=(1, 3), dtype=nl.uint32, options=unchecked)
    same(got, np.array([[2**24, 0, 2**31]], np.uint32))


@pytest.mark.parametrize(("kind", "want"), [
    (nl.int8, [-2, 0, 2, 2, 127, -128, 0]), (nl.uint8, [0, 0, 2, 2, 200, 0, 0]),
])  # fmt: skip
def test_example_36_float_to_integer(kind, want):
    x = np.array([[-1.5, 0.5, 1.5, 2.5, 200, -200, np.nan]], F32)
    got = apply(nisa.tensor_copy, x, shape=(1, 7), dtype=kind)
    same(got, np.array([want], HOSTS[kind]))


@pytest.mark.parametrize("kind", [nl.float16, nl.bfloat16, nl.float8_e5m2, nl.float8_e4m3])
def test_float32_overflows_to_infinity(kind):
    x = np.array([[3.4028235e38, -3.4028235e38]], F32)
    got = apply(nisa.tensor_copy, x, shape=(1, 2), dtype=kind)
    same(got, np.array([[np.inf, -np.inf]], HOSTS[kind]))


def test_example_38_the_last_write_to_a_stride_0_destination_stays():
    def kernel(x):
        d = sb(1, 1)
        nisa.tensor_copy(d.ap([[1, 1], [0, 3]]), tile(x))
        return d

    same(values(kernel, np.array([[1, 2, 3]], F32)), np.array([[3]], F32))


def test_free_shapes_correspond_in_row_major_order():
    x = np.arange(24, dtype=F32).reshape(2, 3, 4)
    got = apply(nisa.tensor_copy, x, shape=(2, 2, 1, 2, 3))
    same(got, x.reshape(2, 2, 1, 2, 3))


def test_a_permuted_source_is_read_in_its_own_order():
    x = np.arange(24, dtype=F32).reshape(2, 3, 4)

    def call(dst, src):
        nisa.tensor_copy(dst, src.permute([0, 2, 1]))

    same(apply(call, x, shape=(2, 4, 3)), np.ascontiguousarray(x.transpose(0, 2, 1)))


@pytest.mark.parametrize("shift", [(0, 1), (1, 0)])
def test_a_copy_onto_itself_reads_before_it_writes(shift):
    x = np.arange(5, dtype=F32)[None]

    def kernel(source):
        t = tile(source)
        nisa.tensor_copy(t[:, shift[0] : shift[0] + 4], t[:, shift[1] : shift[1] + 4])
        return t

    want = x.copy()
    want[:, shift[0] : shift[0] + 4] = x[:, shift[1] : shift[1] + 4]
    same(values(kernel, x), want)


def test_lanes_move_between_start_partitions():
    x = np.arange(6, dtype=F32).reshape(2, 3)

    def kernel(source):
        t = sb(8, 3)
        nisa.tensor_copy(t[6:8], tile(source))
        return t[6:8]

    same(values(kernel, x), x)


@pytest.mark.parametrize("index", [0, 2])
def test_a_copy_from_a_run_time_address(index):
    x = np.arange(12, dtype=F32).reshape(3, 4)

    def call(dst, src):
        at = nisa.register_alloc(index)
        nisa.tensor_copy(dst, src.ap([[4, 3], [1, 2]], scalar_offset=at, indirect_dim=1))

    same(apply(call, x, shape=(3, 2)), x[:, index : index + 2])


# -- memset ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("engine", [VECTOR, GPSIMD])
@given(kind=st.sampled_from([*FLOATS, *FP8]), value=st.floats(-100, 100))
def test_memset_rounds_to_the_destination(engine, kind, value):
    def call(dst):
        nisa.memset(dst, value, engine=engine)

    want = cast(np.full((2, 3), value), kind)
    same(apply(call, shape=(2, 3), dtype=kind), want)


@given(kind=st.sampled_from(INTEGERS), draw=st.data())
def test_memset_of_an_integer_is_exact(kind, draw):
    info = np.iinfo(HOSTS[kind])
    value = draw.draw(st.integers(int(info.min), int(info.max)))

    def call(dst):
        nisa.memset(dst, value)

    same(apply(call, shape=(2, 3), dtype=kind), np.full((2, 3), value, HOSTS[kind]))


def test_memset_of_packed_types_and_psum():
    def kernel():
        packed, filled = sb(2, 3, dtype=nl.float8_e4m3fn_x4), ps(2, 3)
        nisa.memset(packed, 0)
        nisa.memset(filled, 7)
        return packed.view(nl.uint32), filled

    zeros, sevens = values(kernel)
    same(zeros, np.zeros((2, 3), np.uint32))
    same(sevens, np.full((2, 3), 7, F32))


# -- tensor_tensor ---------------------------------------------------------------------------------


def logical(function):
    return lambda x, y: function(x != 0, y != 0)


FORMULAS = {
    "add": operator.add, "subtract": operator.sub, "multiply": operator.mul,
    "maximum": max, "minimum": min,
    "equal": operator.eq, "not_equal": operator.ne, "less": operator.lt,
    "less_equal": operator.le, "greater": operator.gt, "greater_equal": operator.ge,
    "logical_and": logical(operator.and_), "logical_or": logical(operator.or_),
    "logical_xor": logical(operator.xor),
}  # fmt: skip
GEN4 = {
    "abs_max": lambda x, y: x if abs(x) > abs(y) else y,
    "abs_min": lambda x, y: x if abs(x) < abs(y) else y,
}


def each(function, x, y):
    """The function of every pair of elements, in Python floats."""
    pairs = np.broadcast_arrays(wide(x), wide(y))
    flat = [
        float(function(float(a), float(b))) for a, b in zip(*(p.flat for p in pairs), strict=True)
    ]
    return np.array(flat).reshape(pairs[0].shape)


@pytest.mark.parametrize("name", [*FORMULAS, *GEN4])
@given(p=rows, n=columns, types=st.tuples(kinds, kinds, kinds), seed=seeds)
def test_tensor_tensor_computes_in_float32(name, p, n, types, seed):
    a, b = data(seed, (p, n), types[0]), data(seed + 1, (p, n), types[1])
    if types[0] == types[1]:
        b[0, 0] = a[0, 0]

    def call(dst, x, y):
        nisa.tensor_tensor(dst, x, y, getattr(nl, name), engine=VECTOR)

    target = "trn3" if name in GEN4 else "toy"
    unchecked = Options(integers="off")
    got = apply(call, a, b, shape=(p, n), dtype=types[2], target=target, options=unchecked)
    same(got, cast(each((FORMULAS | GEN4)[name], a, b), types[2]))


def test_abs_max_and_abs_min_vectors():
    a, b = np.array([[-5, 1, -1]], F32), np.array([[3, -1, 1]], F32)
    for op, want in ((nl.abs_max, [-5, -1, 1]), (nl.abs_min, [3, -1, 1])):

        def call(dst, x, y, op=op):
            nisa.tensor_tensor(dst, x, y, op)

        same(apply(call, a, b, shape=(1, 3), target="trn3"), np.array([want], F32))


@given(base=st.integers(1, 9), exponent=st.integers(0, 5), kind=st.sampled_from(FLOATS))
def test_power_on_gpsimd(base, exponent, kind):
    def call(dst, x, y):
        nisa.tensor_tensor(dst, x, y, nl.power)

    a, b = np.array([[base]], HOSTS[kind]), np.array([[exponent]], HOSTS[kind])
    same(apply(call, a, b, shape=(1, 1)), np.array([[base**exponent]], F32))


def test_power_of_integers_goes_through_float32():
    def call(dst, x, y):
        nisa.tensor_tensor(dst, x, y, nl.power)

    a, b = np.array([[2, 3, 1, -2, 2]], np.int32), np.array([[-1, 2, -3, 3, 30]], np.int32)
    same(
        apply(call, a, b, shape=(1, 5), dtype=nl.int32), np.array([[0, 9, 1, -8, 2**30]], np.int32)
    )


WRAPPING = {"add": operator.add, "subtract": operator.sub, "multiply": operator.mul,
            "maximum": max, "minimum": min, "equal": operator.eq, "less": operator.lt}  # fmt: skip


@pytest.mark.parametrize("name", WRAPPING)
@given(types=st.tuples(*[st.sampled_from([nl.int32, nl.uint32])] * 3), draw=st.data())
def test_32_bit_integers_are_exact_and_wrap_on_gpsimd(name, types, draw):
    arrays = []
    for kind in types[:2]:
        info = np.iinfo(HOSTS[kind])
        drawn = draw.draw(
            st.lists(st.integers(int(info.min), int(info.max)), min_size=4, max_size=4)
        )
        arrays.append(np.array([drawn], HOSTS[kind]))
    exact = [
        int(WRAPPING[name](int(x), int(y))) for x, y in zip(*(a[0] for a in arrays), strict=True)
    ]
    host = HOSTS[types[2]]
    want = np.array([[v % 2**32 for v in exact]], np.uint32).view(host)

    def call(dst, x, y):
        nisa.tensor_tensor(dst, x, y, getattr(nl, name))

    same(apply(call, *arrays, shape=(1, 4), dtype=types[2]), want)


def test_the_same_integers_lose_bits_on_vector():
    a = np.array([[2**24 + 1, 2**30 + 1, -(2**24) - 1]], np.int32)
    b = np.zeros((1, 3), np.int32)

    def call(dst, x, y):
        nisa.tensor_tensor(dst, x, y, nl.add, engine=VECTOR)

    same(apply(call, a, b, shape=(1, 3), dtype=nl.int32, options=Options(integers="off")),
         np.array([[2**24, 2**30, -(2**24)]], np.int32))  # fmt: skip


BITS = {"bitwise_and": operator.and_, "bitwise_or": operator.or_, "bitwise_xor": operator.xor}


@pytest.mark.parametrize("name", [*BITS, "left_shift", "right_shift"])
@pytest.mark.parametrize("kind", INTEGERS)
@given(seed=seeds)
def test_bit_operators_work_on_raw_bits(name, kind, seed):
    host = np.dtype(HOSTS[kind])
    width = 8 * host.itemsize
    a, b = (
        np.random.default_rng(seed + i)
        .integers(0, 256, (3, 4 * host.itemsize), np.uint8)
        .view(host)
        for i in range(2)
    )
    if name not in BITS:
        b = (wide(b).astype(np.int64) % width).astype(host)
    unsigned = [[int(v) % 2**width for v in x.flat] for x in (a, b)]
    shift = {"left_shift": operator.lshift, "right_shift": operator.rshift}
    function = (BITS | shift)[name]
    exact = [function(x, y) % 2**width for x, y in zip(*unsigned, strict=True)]
    want = np.array(exact, f"u{host.itemsize}").view(host).reshape(3, 4)

    def both(dst, x, y):
        nisa.tensor_tensor(dst, x, y, getattr(nl, name))

    same(apply(both, a, b, shape=(3, 4), dtype=kind), want)


@pytest.mark.parametrize("places", list(itertools.product([SBUF, PSUM], repeat=3)))
def test_tensor_tensor_reads_one_operand_from_psum(places):
    if places[:2] == (PSUM, PSUM):
        return

    def call(dst, x, y):
        nisa.tensor_tensor(dst, x, y, nl.subtract)

    a, b = data(0, (2, 3), nl.float32), data(1, (2, 3), nl.float32)
    same(apply(call, a, b, shape=(2, 3), buffers=places[:2], buffer=places[2]), a - b)


def test_operands_of_different_rank_and_in_place():
    a, b = data(0, (2, 2, 3), nl.float32), data(1, (2, 6), nl.float32)

    def kernel(x, y):
        t, u = tile(x), tile(y)
        nisa.tensor_tensor(u, t, u, nl.subtract)
        return u

    same(values(kernel, a, b), a.reshape(2, 6) - b)


def test_a_stride_0_destination_keeps_the_last_result():
    def kernel(x):
        t, d = tile(x), sb(1, 1)
        nisa.tensor_tensor(d.ap([[1, 1], [0, 20]]), t, t, nl.add)
        return d

    x = np.arange(20, dtype=F32)[None]
    same(values(kernel, x), np.array([[38]], F32))


@pytest.mark.parametrize(("call", "engine"), [
    (lambda: nisa.tensor_tensor(sb(2, 2), sb(2, 2), sb(2, 2), nl.add), VECTOR),
    (lambda: nisa.tensor_tensor(*[sb(2, 2, dtype=nl.int32) for _ in range(3)], nl.add), GPSIMD),
    (lambda: nisa.tensor_tensor(*[sb(2, 2, dtype=nl.uint32) for _ in range(3)], nl.less), GPSIMD),
    (lambda: nisa.tensor_tensor(*[sb(2, 2, dtype=nl.int32) for _ in range(3)], nl.bitwise_or),
     VECTOR),
    (lambda: nisa.tensor_tensor(ps(2, 2, dtype=nl.int32), sb(2, 2, dtype=nl.int32),
                                sb(2, 2, dtype=nl.int32), nl.add), VECTOR),
    (lambda: nisa.tensor_tensor(sb(2, 2), *[sb(2, 2, dtype=nl.int32)] * 2, nl.add), VECTOR),
    (lambda: nisa.tensor_tensor(*[sb(2, 2, dtype=nl.int32) for _ in range(3)], nl.add,
                                engine=VECTOR), VECTOR),
    (lambda: nisa.tensor_tensor(sb(2, 2), sb(2, 2), sb(2, 2), nl.power), GPSIMD),
    (lambda: nisa.tensor_copy(sb(2, 2), sb(2, 2)), VECTOR),
    (lambda: nisa.tensor_copy(sb(2, 2), ps(2, 2), engine=SCALAR), SCALAR),
    (lambda: nisa.memset(sb(2, 2), 0.0), VECTOR),
    (lambda: nisa.memset(sb(2, 2), 0.0, engine=GPSIMD), GPSIMD),
    (lambda: nisa.tensor_scalar(sb(2, 2), sb(2, 2), nl.add, 1.0), VECTOR),
    (lambda: nisa.tensor_scalar(sb(2, 2), sb(2, 2), nl.rsqrt, None), GPSIMD),
    (lambda: nisa.tensor_scalar(sb(2, 2), ps(2, 2), nl.rsqrt, 0), SCALAR),
])  # fmt: skip
def test_default_engines(call, engine):
    assert event(call).engine is engine


def test_bfloat16_is_rounded_once_and_not_per_operand():
    # In bfloat16, 256 + 1 is 256; through float32, (256 + 1) * 2 keeps the 1 until the write.
    def call(dst, x):
        nisa.tensor_scalar(dst, x, nl.add, 1.0, op1=nl.multiply, operand1=0.5)

    x = np.array([[257 - 1]], ml_dtypes.bfloat16)
    same(apply(call, x, shape=(1, 1)), np.array([[128.5]], F32))
