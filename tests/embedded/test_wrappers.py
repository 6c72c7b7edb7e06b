"""nl.sum and relatives, broadcast_to, transpose, matmul, where and other wrappers."""

from __future__ import annotations

import nki.isa as nisa
import nki.language as nl
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from nki_kernels.machine.errors import KernelError, ShapeError
from tests.embedded.folds import folded, single, small
from tests.embedded.harness import (
    FLOATS,
    HOSTS,
    INTEGERS,
    PSUM,
    SBUF,
    cast,
    columns,
    data,
    ps,
    refused,
    rows,
    same,
    sb,
    tile,
    traced,
    values,
)

F32 = np.float32
kinds = st.sampled_from([*FLOATS, *INTEGERS])
seeds = st.integers(0, 2**20)
REDUCTIONS = {
    "sum": "add", "prod": "multiply", "max": "maximum", "min": "minimum", "all": "logical_and",
}  # fmt: skip


def opcodes(call, target="toy"):
    return [e.opcode for e in traced(call, target=target).trace]


# -- reductions ------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", REDUCTIONS)
@given(p=rows, free=st.lists(st.integers(1, 4), min_size=1, max_size=3), kind=kinds,
       trailing=st.integers(1, 3), keep=st.booleans(), seed=seeds)  # fmt: skip
def test_reductions(name, p, free, kind, trailing, keep, seed):
    trailing = min(trailing, len(free))
    x = small(seed, (p, *free), kind)
    axes = list(range(x.ndim - trailing, x.ndim))
    keep = keep and name != "all"
    options = {"keepdims": True} if keep else {}
    want = folded(REDUCTIONS[name], x, trailing)
    shape = (*want.shape, *[1] * trailing) if keep else want.shape
    shape = shape if len(shape) > 1 else (*shape, 1)
    got = values(lambda y: getattr(nl, name)(tile(y), axes, **options), x)
    same(got, cast(want, kind).reshape(shape))
    wide = values(lambda y: getattr(nl, name)(tile(y), axes, dtype=nl.float32, **options), x)
    same(wide, cast(want, nl.float32).reshape(shape))


@given(p=rows, n=columns, kind=kinds, keep=st.booleans(), seed=seeds)
def test_mean_divides_the_float32_sum(p, n, kind, keep, seed):
    x = small(seed, (p, 2, n), kind)
    got = values(lambda y: nl.mean(tile(y), (1, 2), keepdims=keep), x)
    total = folded("add", x, 2)
    want = [single(single(t) * single(1.0 / (2 * n))) for t in total]
    same(got, cast(want, kind).reshape((p, 1, 1) if keep else (p, 1)))


@pytest.mark.parametrize("name", [*REDUCTIONS, "mean"])
@pytest.mark.parametrize("axis", [0, (0, 1), (1,), 3, 1.5])
def test_only_trailing_free_axes_reduce(name, axis):
    refused(
        lambda: getattr(nl, name)(sb(2, 3, 4), axis), f"nl.{name}", f"axis={axis!r}",
        "last free dimensions", error=ShapeError,
    )  # fmt: skip


def test_a_reduction_is_one_instruction_from_psum_to_sbuf():
    seen = []
    assert opcodes(lambda: seen.append(nl.sum(ps(2, 3), 1))) == ["tensor_reduce"]
    assert seen[0].buffer is SBUF
    assert opcodes(lambda: nl.mean(sb(2, 3), -1)) == ["tensor_reduce", "tensor_scalar"]


# -- shapes ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(("axis", "shape"), [(1, (2, 1, 3)), (2, (2, 3, 1)), (-1, (2, 3, 1)),
                                             (-2, (2, 1, 3))])  # fmt: skip
def test_expand_dims_is_a_view(axis, shape):
    def call():
        x = sb(2, 3)
        y = nl.expand_dims(x, axis)
        assert y.shape == shape
        assert y.mem is x.mem

    assert opcodes(call) == []


def test_expand_dims_keeps_the_partition_dimension():
    refused(lambda: nl.expand_dims(sb(2, 3), 0), "expand_dim(0)", error=ShapeError)


@given(case=st.data(), target=st.sampled_from(["toy", "trn2"]), kind=kinds, seed=seeds)
def test_broadcast_to(case, target, kind, seed):
    most = 8 if target == "toy" else 128
    wanted = (case.draw(st.integers(1, most)), *case.draw(st.tuples(columns, st.integers(1, 3))))
    shape = tuple(n if case.draw(st.booleans()) else 1 for n in wanted)
    out = case.draw(st.sampled_from([None, kind, nl.float32]))
    x = data(seed, shape, kind)
    got = values(lambda y: nl.broadcast_to(tile(y), wanted, out), x, target=target)
    same(got, np.broadcast_to(cast(x, out or kind), wanted))


def test_broadcast_to_returns_a_tile_that_fits_already():
    def call():
        x = sb(2, 3)
        assert nl.broadcast_to(x, (2, 3)) is x
        assert nl.broadcast_to(x, [2, 3], nl.float32) is x
        assert nl.broadcast_to(x, (2, 3), nl.bfloat16) is not x

    assert opcodes(call) == ["tensor_copy"]


def test_partitions_are_filled_a_quadrant_at_a_time():
    found = opcodes(lambda: nl.broadcast_to(sb(1, 3), (70, 3)), "trn2")
    assert found == ["nc_stream_shuffle"] * 3


@pytest.mark.parametrize("shape", [(2, 4), (4, 3), (2, 3, 1), (2,)])
def test_broadcast_to_a_shape_that_does_not_fit(shape):
    refused(
        lambda: nl.broadcast_to(sb(2, 3), shape), "a tile [2, 3]", f"to {list(shape)}",
        error=ShapeError,
    )  # fmt: skip


@pytest.mark.parametrize("target", ["trn1", "trn2", "trn3"])
@pytest.mark.parametrize("kind", [nl.float32, nl.bfloat16])
@pytest.mark.parametrize("dtype", [None, nl.float32])
def test_transpose_lands_in_psum(kind, dtype, target):
    x = data(1, (5, 7), kind)
    seen = []

    def call(y):
        seen.append(nl.transpose(tile(y), dtype))
        return seen[0]

    same(values(call, x, target=target), cast(x, dtype or kind).T)
    assert seen[0].buffer is PSUM


def test_transpose_takes_two_dimensions():
    refused(lambda: nl.transpose(sb(2, 3, 4)), "of 3 dimensions", "must have 2", error=ShapeError)


@pytest.mark.parametrize("target", ["trn1", "trn2", "trn3"])
@pytest.mark.parametrize("kind", [nl.float32, nl.bfloat16])
def test_matmul_takes_either_layout(kind, target):
    x, y = (np.arange(n, dtype=HOSTS[kind]).reshape(3, -1) for n in (6, 12))
    seen = []

    def call(a, b, transposed):
        seen.append(nl.matmul(tile(a), tile(b), transpose_x=transposed))
        return seen[-1]

    want = x.T.astype(F32) @ y.astype(F32)
    same(values(lambda a, b: call(a, b, True), x, y, target=target), want)
    turned = np.ascontiguousarray(x.T)
    same(values(lambda a, b: call(a, b, False), turned, y, target=target), want)
    assert {t.buffer for t in seen} == {PSUM}
    assert {t.dtype for t in seen} == {nl.float32}


def test_matmul_contracts_equal_sizes():
    refused(lambda: nl.matmul(nl.zeros((2, 3), nl.float32), sb(4, 5)), "stationary", "moving")
    refused(lambda: nl.matmul(sb(2, 3), 4), "nl.matmul: y is int 4", "must be a tile")


@pytest.mark.parametrize("dtype", [None, nl.float32])
@pytest.mark.parametrize("kind", [nl.float32, nl.bfloat16, nl.int16])
def test_load_transpose2d(kind, dtype):
    x = data(2, (5, 7), kind)
    same(values(lambda y: nl.load_transpose2d(y, dtype), x), cast(x, dtype or kind).T)


def test_load_transpose2d_takes_two_dimensions():
    def call():
        nl.load_transpose2d(nl.ndarray((2, 3, 4), nl.float32, buffer=nl.hbm))

    refused(call, "of 3 dimensions", "must have 2", error=ShapeError)


# -- elementwise -----------------------------------------------------------------------------------


@given(p=rows, n=columns, kind=kinds, other=kinds, out=st.sampled_from([None, nl.float32]),
       seed=seeds)  # fmt: skip
def test_where(p, n, kind, other, out, seed):
    x, y = data(seed, (p, n), kind), data(seed + 1, (p, n), other)
    choice = np.random.default_rng(seed).choice([0.0, 1.0, -0.5], (p, n)).astype(F32)
    got = values(lambda c, a, b: nl.where(tile(c), tile(a), tile(b), out), choice, x, y)
    result = out or kind
    want = np.where(choice != 0, cast(x, result), cast(y, result))
    same(got, want)


@given(p=rows, n=columns, kind=kinds, out=st.sampled_from([None, nl.float32]), seed=seeds)
def test_negative(p, n, kind, out, seed):
    x = data(seed, (p, n), kind)
    got = values(lambda y: nl.negative(tile(y), out), x)
    same(got, cast(-x.astype(np.float64), out or kind))


def test_rsqrt_runs_on_gpsimd_and_not_from_psum():
    x = np.array([[4, 16, 0.25]], F32)
    same(values(lambda y: nl.rsqrt(tile(y)), x), np.array([[0.5, 0.25, 2]], F32))
    found = traced(lambda: nl.rsqrt(sb(2, 3))).trace.events[-1]
    assert (found.opcode, found.engine) == ("tensor_scalar", nisa.engine.gpsimd)
    refused(lambda: nl.rsqrt(ps(2, 3)), "data is in PSUM and the engine is gpsimd")


WRAPPERS = {
    "sum": lambda: nl.sum(None, 1), "max": lambda: nl.max(None, 1),
    "mean": lambda: nl.mean(None, 1), "expand_dims": lambda: nl.expand_dims(None, 1),
    "broadcast_to": lambda: nl.broadcast_to(None, (1,)), "transpose": lambda: nl.transpose(None),
    "matmul": lambda: nl.matmul(None, None), "where": lambda: nl.where(None, None, None),
    "load_transpose2d": lambda: nl.load_transpose2d(None),
}  # fmt: skip


@pytest.mark.parametrize("name", WRAPPERS)
def test_wrappers_outside_a_kernel_say_so(name):
    with pytest.raises(KernelError, match=rf"nl.{name} outside a kernel"):
        WRAPPERS[name]()
