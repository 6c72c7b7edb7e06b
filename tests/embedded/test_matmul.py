"""nc_matmul and nc_transpose: exact integers, the error rule, and cases made by hand."""

from __future__ import annotations

import itertools

import ml_dtypes
import nki.isa as nisa
import nki.language as nl
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from nki_kernels.machine.errors import RuleViolation
from nki_kernels.machine.options import Options
from reference.matmul import matmul as reference
from tests.embedded.harness import (
    HOSTS,
    PSUM,
    apply,
    back,
    cast,
    columns,
    data,
    ps,
    refused,
    rows,
    same,
    sb,
    tile,
    values,
)
from tests.strategies.matrices import small_integers
from tests.tolerance import assert_close

F32 = np.float32
MIXED = [
    (a, b)
    for a, b in itertools.product(
        (nl.bfloat16, nl.float16, nl.float8_e4m3, nl.float8_e5m2), repeat=2
    )
] + [(nl.float32, nl.float32)]


def matmul(a, b, target="toy", **options):
    """stationary.T @ moving of two arrays [K, M], [K, N]."""
    shape = (a.shape[-1], b.shape[-1])

    def call(dst, x, y):
        nisa.nc_matmul(dst, x, y, **options)

    return apply(call, a, b, shape=shape, buffer=PSUM, target=target)


# -- values ----------------------------------------------------------------------------------------


@given(k=rows, m=rows, n=columns, kinds=st.sampled_from(MIXED), seed=st.integers(0, 99))
def test_small_integers_multiply_exactly(k, m, n, kinds, seed):
    a = small_integers(seed, (k, m), HOSTS[kinds[0]], 4)
    b = small_integers(seed + 1, (k, n), HOSTS[kinds[1]], 4)
    want = a.astype(int).T @ b.astype(int)
    same(matmul(a, b), want.astype(F32))


@pytest.mark.parametrize("target", ["toy", "trn2"])
@pytest.mark.parametrize("kind", [nl.float32, nl.bfloat16, nl.float16])
@pytest.mark.parametrize("full", [False, True])
def test_a_product_of_reals_keeps_the_error_rule(kind, full, target):
    k, m, n = ((128, 128, 512) if target == "trn2" else (8, 8, 16)) if full else (5, 3, 7)
    a, b = data(1, (k, m), kind), data(2, (k, n), kind)
    ref = reference(a.T, b)
    got = matmul(a, b, target)
    # k products and k additions touch a term at most.
    assert_close(
        got, ref.value, ref.magnitude, op="nc_matmul", case=str(kind), roundings=1, chain=k + 1
    )


def test_example_8():
    got = matmul(np.array([[1, 2], [3, 4]], F32), np.array([[1, 0, 2], [0, 1, 3]], F32))
    same(got, np.array([[1, 3, 11], [2, 4, 16]], F32))


def test_operands_of_more_dimensions_are_flattened_in_row_major_order():
    a = small_integers(0, (4, 2, 3), F32, 9)
    b = small_integers(1, (4, 3, 2, 2), F32, 9)

    def call(dst, x, y):
        nisa.nc_matmul(dst, x, y)

    got = apply(call, a, b, shape=(6, 2, 6), buffer=PSUM)
    want = a.reshape(4, 6).T @ b.reshape(4, 12)
    same(got, want.reshape(6, 2, 6))


def test_strided_and_broadcast_operands_are_read_where_they_point():
    a, b = small_integers(0, (4, 6), F32, 9), small_integers(1, (4, 1), F32, 9)

    def call(dst, x, y):
        nisa.nc_matmul(dst, x[:, 1:6:2], y.broadcast(1, 5))

    got = apply(call, a, b, shape=(3, 5), buffer=PSUM)
    same(got, a[:, 1:6:2].T @ np.repeat(b, 5, axis=1))


def test_tfloat32_operands_are_rounded_to_ten_bits():
    # 1 + 2^-10 is representable, 1 + 2^-11 is a tie that goes to the even 1.
    a = np.array([[1 + 2.0**-10, 1 + 2.0**-11, 1 + 3 * 2.0**-11]], F32)

    def call(dst, x, y):
        nisa.nc_matmul(dst, x.view(nl.tfloat32), y.view(nl.tfloat32))

    got = apply(call, a, np.array([[1.0]], F32), shape=(3, 1), buffer=PSUM)
    same(got, np.array([[1 + 2.0**-10], [1], [1 + 2.0**-9]], F32))


def test_float32_operands_are_not_rounded():
    a = np.array([[1 + 2.0**-11, 1 + 2.0**-23]], F32)
    same(matmul(a, np.array([[1.0]], F32)), a.T.copy())


# -- accumulation ----------------------------------------------------------------------------------


def test_example_9_accumulation_is_inferred_element_by_element():
    def kernel(one, ten):
        total = ps(1, 3)
        nisa.nc_matmul(total[:, 0:2], tile(one)[:, 0:1], tile(one))
        nisa.nc_matmul(total[:, 1:3], tile(one)[:, 0:1], tile(ten))
        return total

    got = values(kernel, np.ones((1, 2), F32), np.full((1, 2), 10, F32))
    same(got, np.array([[1, 11, 10]], F32))


@pytest.mark.parametrize("flags", list(itertools.product([None, False, True], repeat=3)))
def test_accumulate_flags(flags):
    """None: overwrite the first time, add afterwards. True on what no matmul wrote is an error."""
    total: float | None = None
    for step, flag in enumerate(flags, 1):
        if flag is True and total is None:
            break
        adds = total is not None and flag is not False
        total = step + (total if adds and total is not None else 0)
    else:
        step = 0

    def kernel(ones, steps):
        x, y, acc = tile(ones), tile(steps), ps(1, 1)
        for number, flag in enumerate(flags):
            nisa.nc_matmul(acc, x, y[:, number : number + 1], accumulate=flag)
        return acc

    arrays = np.ones((1, 1), F32), np.array([[1, 2, 3]], F32)
    if step:
        with pytest.raises(RuleViolation, match="accumulate=True on elements of tile"):
            values(kernel, *arrays)
    else:
        same(values(kernel, *arrays), np.array([[total]], F32))


def test_a_write_that_is_no_matmul_ends_the_group():
    def kernel(ones):
        x, acc = tile(ones), ps(1, 2)
        nisa.nc_matmul(acc, x[:, 0:1], x)
        nisa.memset(acc[:, 0:1], 5.0)
        nisa.nc_matmul(acc, x[:, 0:1], x)
        return acc

    # Column 0 was set and is overwritten; column 1 still belongs to the group and adds up.
    same(values(kernel, np.ones((1, 2), F32)), np.array([[1, 2]], F32))


def test_reading_does_not_end_the_group():
    def kernel(ones):
        x, acc, seen = tile(ones), ps(1, 1), sb(1, 1)
        nisa.nc_matmul(acc, x, x)
        nisa.tensor_copy(seen, acc)
        nisa.nc_matmul(acc, x, x)
        return acc

    got = values(kernel, np.ones((1, 1), F32), options=Options(accumulation="off"))
    same(got, np.array([[2]], F32))


def test_a_new_tile_starts_a_new_group():
    def kernel(ones):
        x = tile(ones)
        for _ in range(2):
            acc = nl.ndarray((1, 1), nl.float32, buffer=PSUM, address=(0, 0))
            nisa.nc_matmul(acc, x, x)
        return acc

    same(values(kernel, np.ones((1, 1), F32)), np.array([[1]], F32))


def test_a_bfloat16_destination_rounds_after_every_addition():
    def kernel(x, y):
        a, b, acc = tile(x), tile(y), ps(1, 1, dtype=nl.bfloat16)
        for column in range(3):
            nisa.nc_matmul(acc, a, b[:, column : column + 1])
        return acc

    steps = [256.0, 1.0, 1.0]
    got = values(kernel, np.ones((1, 1), F32), np.array([steps], F32), target="trn3")
    # 256 + 1 is a tie in 8 bits and falls back to 256, twice.
    same(got, np.array([[256]], ml_dtypes.bfloat16))


# -- modes -----------------------------------------------------------------------------------------


def test_example_10_double_row_contracts_both_planes():
    e4m3 = ml_dtypes.float8_e4m3
    a = np.array([[[2], [3]]], e4m3)
    b = np.array([[[1, 2], [10, 20]]], e4m3)
    got = matmul(a, b, perf_mode=nisa.matmul_perf_mode.double_row)
    same(got, np.array([[32, 64]], F32))


@given(k=rows, m=rows, n=columns, seed=st.integers(0, 99))
def test_double_row_is_two_matmuls(k, m, n, seed):
    a = small_integers(seed, (k, 2, m), ml_dtypes.float8_e4m3, 4)
    b = small_integers(seed, (k, 2, n), ml_dtypes.float8_e5m2, 4)
    want = sum(a[:, j].astype(int).T @ b[:, j].astype(int) for j in range(2))
    # The string is what published kernels pass.
    same(matmul(a, b, perf_mode="double_row"), np.asarray(want).astype(F32))


@pytest.mark.parametrize(
    ("position", "size"), [((0, 0), (2, 8)), ((6, 0), (2, 8)), ((4, 0), (4, 8)), ((0, 0), (8, 8))]
)
def test_row_tiles_do_not_change_the_result(position, size):
    a, b = small_integers(0, (2, 5), F32, 9), small_integers(1, (2, 3), F32, 9)
    same(matmul(a, b, tile_position=position, tile_size=size), a.T @ b)


def test_a_column_tile_writes_the_partitions_of_its_column():
    def kernel(x, y):
        acc = ps(8, 3)
        for start in (2, 6):
            nisa.nc_matmul(
                acc[start : start + 2], tile(x), tile(y), tile_position=(0, start), tile_size=(8, 2)
            )
        return acc[2:4], acc[6:8]

    a, b = small_integers(0, (4, 2), F32, 9), small_integers(1, (4, 3), F32, 9)
    for got in values(kernel, a, b):
        same(got, a.T @ b)


# -- transposes ------------------------------------------------------------------------------------

BITS = [nl.float32, nl.bfloat16, nl.float16]


def special(dtype, shape):
    """Random bits: NaN payloads, infinities and subnormals, all of which a copy keeps."""
    host = np.dtype(HOSTS[dtype])
    return (
        np.random.default_rng(5)
        .integers(0, 256, (*shape, host.itemsize), np.uint8)
        .view(host)[..., 0]
    )


@pytest.mark.parametrize("kind", BITS)
def test_a_matmul_transpose_moves_bits(kind):
    raw = special(kind, (6, 5))

    def kernel(x):
        # A DMA moves the bits in and out; the identity has the type of the data.
        acc = ps(5, 6, dtype=kind)
        eye = nl.shared_identity_matrix(6, kind)
        nisa.nc_matmul(acc, tile(x), eye, is_transpose=True)
        return acc

    got = values(kernel, raw)
    width = f"u{raw.dtype.itemsize}"
    assert np.array_equal(got.view(width), np.ascontiguousarray(raw.T).view(width))


def test_a_matmul_transpose_overwrites_and_starts_no_group():
    def kernel(x):
        data1, acc = tile(x), ps(2, 2)
        eye = nl.shared_identity_matrix(2, nl.float32)
        for _ in range(2):
            nisa.nc_matmul(acc, data1, eye, is_transpose=True)
        return acc

    x = np.array([[1, 2], [3, 4]], F32)
    same(values(kernel, x), x.T.copy())


def test_a_matmul_transpose_needs_an_identity():
    def call():
        ones = sb(2, 2)
        nisa.memset(ones, 1.0)
        nisa.nc_matmul(ps(2, 2), ones, ones, is_transpose=True)

    refused(
        call,
        "nisa.nc_matmul",
        "test_matmul.py:",
        "moving operand [2, 2] that is no identity",
        "pass an identity matrix",
    )


def test_gen2_transposes_into_float32():
    def kernel(x):
        acc = ps(3, 2)
        eye = nl.shared_identity_matrix(2, nl.bfloat16)
        nisa.nc_matmul(acc, tile(x), eye, is_transpose=True)
        other = ps(3, 2)
        nisa.nc_transpose(other, tile(x))
        return acc, other

    x = data(0, (2, 3), nl.bfloat16)
    for got in values(kernel, x, target="trn1"):
        same(got, x.T.astype(F32))


@pytest.mark.parametrize("kind", [*BITS, nl.int32, nl.int16, nl.uint16])
@given(p=rows, f=rows)
def test_nc_transpose_on_the_tensor_engine_moves_bits(kind, p, f):
    raw = special(kind, (p, f))
    got = apply(nisa.nc_transpose, raw, shape=(f, p), dtype=kind, buffer=PSUM)
    width = f"u{raw.dtype.itemsize}"
    assert np.array_equal(got.view(width), np.ascontiguousarray(raw.T).view(width))


@pytest.mark.parametrize("kind", [nl.int8, nl.float8_e4m3, nl.bfloat16, nl.int32])
@pytest.mark.parametrize(
    ("src", "dst"), list(itertools.product([nl.sbuf, nl.psum], [nl.sbuf, nl.psum]))
)
def test_nc_transpose_on_the_vector_engine_moves_bits_between_any_tiles(kind, src, dst):
    raw = data(3, (2, 1), kind)

    def call(out, x):
        nisa.nc_transpose(out, x, engine=nisa.engine.vector)

    got = apply(call, raw, shape=(1, 2), dtype=kind, buffer=dst, buffers=[src])
    same(got, raw.T.copy())


def test_nc_transpose_flattens_free_dimensions_and_reads_broadcasts():
    x = np.arange(2 * 2 * 3, dtype=F32).reshape(2, 2, 3)
    got = apply(nisa.nc_transpose, x, shape=(6, 2), buffer=PSUM)
    same(got, x.reshape(2, 6).T.copy())

    def call(dst, y):
        nisa.nc_transpose(dst, y.broadcast(1, 4))

    column = np.array([[1], [2], [3]], F32)
    same(apply(call, column, shape=(4, 3), buffer=PSUM), np.tile(column.T, (4, 1)))


def test_one_byte_results_take_sixteen_bits_in_psum():
    def kernel(x):
        wide = ps(3, 2, 2, dtype=nl.float8_e4m3)
        nisa.nc_transpose(wide[:, :, 0], tile(x))
        return wide[:, :, 0], wide[:, :, 1].view(nl.uint8)

    x = data(0, (2, 3), nl.float8_e4m3)
    low, high = values(kernel, x)
    same(low, x.T.copy())
    same(high, np.zeros((3, 2), np.uint8))


def test_nc_transpose_ends_a_matmul_group_and_always_overwrites():
    def kernel(x):
        acc, source = ps(2, 2), tile(x)
        nisa.nc_matmul(acc, source, source)
        nisa.nc_transpose(acc, source)
        nisa.nc_matmul(acc, source, source)
        return acc

    x = np.array([[1, 2], [3, 4]], F32)
    same(values(kernel, x), x.T @ x)


def test_the_result_survives_the_way_to_hbm():
    def kernel(x):
        acc = ps(2, 2)
        nisa.nc_matmul(acc, tile(x), tile(x))
        return back(acc)

    x = np.array([[1, 2], [3, 4]], F32)
    same(values(kernel, x), cast(x.astype(float).T @ x, nl.float32))
