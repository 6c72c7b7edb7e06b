"""Views against NumPy: every method, in chains that Hypothesis draws."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import nki.isa as nisa
import nki.language as nl
import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from nki_kernels.machine.errors import OutOfBounds, ShapeError
from tests.machine.kernels import counted, hbm, inside, loaded, refused, sbuf

MAX_DIMS = 5


def compare(view: Any, want: Any) -> None:
    """Check a view against the NumPy view of the same elements."""
    assert view.shape == want.shape
    assert view.ndim == want.ndim
    assert view.size == want.size
    assert np.array_equal(view.numpy(), want)
    for extent, stride, nbytes in zip(view.shape, view.strides, want.strides, strict=True):
        assert extent == 1 or stride == nbytes // want.itemsize


def draw_key(data: Any, dim: int, extent: int, on_chip: bool) -> tuple[Any, Any]:
    """One index of one dimension, for us and for NumPy."""
    start = data.draw(st.integers(0, extent - 1))
    stop = data.draw(st.integers(start + 1, extent))
    kind = data.draw(st.sampled_from(("int", "slice", "step", "ds", "from the end", "all")))
    negative = data.draw(st.booleans())
    if kind == "int":
        at = start - extent if negative else start
        return at, (slice(start, start + 1) if on_chip and dim == 0 else at)
    if kind == "step" and not (on_chip and dim == 0):
        step = data.draw(st.integers(1, 4))
        return slice(start, stop, step), slice(start, stop, step)
    if kind == "ds":
        return nl.ds(start, stop - start), slice(start, stop)
    if kind == "from the end":
        return slice(start - extent, stop), slice(start, stop)
    if kind == "all":
        return slice(None), slice(None)
    return slice(start, stop), slice(start, stop)


def widened(want: Any, least: int) -> Any:
    """A size-1 dimension at the end where indexing dropped too many."""
    return want if want.ndim >= least else want[..., None]


def index(view: Any, want: Any, data: Any, on_chip: bool) -> tuple[Any, Any]:
    count = data.draw(st.integers(1, view.ndim))
    keys = [draw_key(data, d, view.shape[d], on_chip) for d in range(count)]
    ours, theirs = (tuple(k[i] for k in keys) for i in (0, 1))
    if count == 1 and data.draw(st.booleans()):
        ours = ours[0]
    elif count == view.ndim and not on_chip and data.draw(st.booleans()):
        ours, theirs = (..., ours[-1]), (..., theirs[-1])
    return view[ours], widened(want[theirs], 2 if on_chip else 1)


def cut(view: Any, want: Any, data: Any, on_chip: bool) -> tuple[Any, Any]:
    dim = data.draw(st.integers(1 if on_chip else 0, view.ndim - 1))
    start = data.draw(st.integers(0, view.shape[dim] - 1))
    end = data.draw(st.integers(start + 1, view.shape[dim]))
    step = data.draw(st.integers(1, 3))
    key = (slice(None),) * dim + (slice(start, end, step),)
    return view.slice(dim, start, end, step), want[key]


def select(view: Any, want: Any, data: Any, on_chip: bool) -> tuple[Any, Any]:
    dim = data.draw(st.integers(0, view.ndim - 1))
    at = data.draw(st.integers(0, view.shape[dim] - 1))
    keep = slice(at, at + 1) if on_chip and dim == 0 else at
    return view.select(dim, at), widened(want[(slice(None),) * dim + (keep,)], 2 if on_chip else 1)


def permute(view: Any, want: Any, data: Any, on_chip: bool) -> tuple[Any, Any]:
    first = [0] if on_chip else []
    dims = first + data.draw(st.permutations(range(len(first), view.ndim)))
    return view.permute(dims), want.transpose(dims)


def broadcast(view: Any, want: Any, data: Any, on_chip: bool) -> tuple[Any, Any]:
    ones = [d for d, n in enumerate(view.shape) if n == 1 and not (on_chip and d == 0)]
    assume(ones)
    dim, size = data.draw(st.sampled_from(ones)), data.draw(st.integers(1, 3))
    shape = (*want.shape[:dim], size, *want.shape[dim + 1 :])
    return view.broadcast(dim, size), np.broadcast_to(want, shape)


def expand_dim(view: Any, want: Any, data: Any, on_chip: bool) -> tuple[Any, Any]:
    assume(view.ndim < MAX_DIMS)
    dim = data.draw(st.integers(1 if on_chip else 0, view.ndim))
    return view.expand_dim(dim), np.expand_dims(want, dim)


def squeeze_dim(view: Any, want: Any, data: Any, on_chip: bool) -> tuple[Any, Any]:
    ones = [d for d, n in enumerate(view.shape) if n == 1 and not (on_chip and d == 0)]
    assume(ones and view.ndim > (2 if on_chip else 1))
    dim = data.draw(st.sampled_from(ones))
    return view.squeeze_dim(dim), want.squeeze(dim)


def draw_factors(data: Any, extent: int) -> tuple[int, int]:
    inner = data.draw(st.sampled_from([n for n in range(1, extent + 1) if extent % n == 0]))
    return extent // inner, inner


def reshape_dim(view: Any, want: Any, data: Any, on_chip: bool) -> tuple[Any, Any]:
    assume(view.ndim < MAX_DIMS)
    dim = data.draw(st.integers(1 if on_chip else 0, view.ndim - 1))
    parts = draw_factors(data, view.shape[dim])
    given_ = data.draw(st.sampled_from((parts, (-1, parts[1]), (parts[0], -1))))
    shape = (*want.shape[:dim], *parts, *want.shape[dim + 1 :])
    return view.reshape_dim(dim, given_), want.reshape(shape)


def as_view(make: Callable[[], Any], want: Any, shape: tuple[int, ...]) -> tuple[Any, Any] | None:
    """A reshape exists as a view exactly where NumPy needs no copy."""
    reshaped = want.reshape(shape)
    if np.may_share_memory(reshaped, want):
        return make(), reshaped
    with pytest.raises(ShapeError, match="copy the data first"):
        make()
    return None


def flatten_dims(view: Any, want: Any, data: Any, on_chip: bool) -> tuple[Any, Any] | None:
    first = data.draw(st.integers(1 if on_chip else 0, view.ndim - 1))
    last = data.draw(st.integers(first, view.ndim - 1))
    merged = math.prod(want.shape[first : last + 1])
    shape = (*want.shape[:first], merged, *want.shape[last + 1 :])
    return as_view(lambda: view.flatten_dims(first, last), want, shape)


def reshape(view: Any, want: Any, data: Any, on_chip: bool) -> tuple[Any, Any] | None:
    fixed = want.shape[:1] if on_chip else ()
    outer, inner = draw_factors(data, math.prod(want.shape[len(fixed) :]))
    shape = (*fixed, outer, inner)
    return as_view(lambda: view.reshape(shape), want, shape)


STEPS = (
    index, cut, select, permute, broadcast, expand_dim, squeeze_dim, reshape_dim, flatten_dims,
    reshape,
)  # fmt: skip


@pytest.mark.parametrize("on_chip", [True, False])
@pytest.mark.parametrize("step", STEPS, ids=lambda f: f.__name__)
@given(data=st.data())
def test_a_view_method_is_the_numpy_view(step, on_chip, data):
    """The method after a chain of up to three others, so that strides of every kind occur."""
    sizes = st.lists(st.integers(1, 6), min_size=2 if on_chip else 1, max_size=4)
    array = counted(*data.draw(sizes))

    def body(x):
        view, want = (loaded(x) if on_chip else x), array
        before = data.draw(st.lists(st.sampled_from((index, permute, expand_dim)), max_size=3))
        for method in (*before, step):
            made = method(view, want, data, on_chip)
            if made is None:
                return
            view, want = made
            compare(view, want)

    inside(body, array)


@given(data=st.data())
def test_an_access_pattern_is_the_numpy_stride(data):
    """``.ap`` over HBM: any steps, from the view's own offset on."""
    array = counted(6, 20)
    pairs = data.draw(
        st.lists(st.tuples(st.integers(0, 7), st.integers(1, 4)), min_size=1, max_size=5)
    )
    row, offset = data.draw(st.integers(0, 5)), data.draw(st.none() | st.integers(0, 15))
    base = 20 * row + (offset or 0)
    fits = base + sum(s * (n - 1) for s, n in pairs) < array.size

    def body(x):
        pattern = [list(p) for p in pairs] if len(pairs) % 2 else tuple(pairs)
        if not fits:
            with pytest.raises(OutOfBounds, match="of a tile of 120 elements"):
                x[row].ap(pattern, offset=offset).numpy()
            return
        want = np.lib.stride_tricks.as_strided(
            array.reshape(-1)[base:], [n for _, n in pairs], [4 * s for s, _ in pairs]
        )
        view = x[row].ap(pattern, offset=offset)
        compare(view, want)
        assert view.get_pattern() == [list(p) for p in pairs]

    inside(body, array)


@given(data=st.data())
def test_an_access_pattern_on_chip_splits_the_offset(data):
    """The flat offset is a start partition and a free offset; no pattern leaves its partition."""
    array = counted(6, 20)
    offset, partitions = data.draw(st.integers(0, 119)), data.draw(st.integers(1, 6))
    step, count = data.draw(st.integers(0, 4)), data.draw(st.integers(1, 8))
    start, free = divmod(offset, 20)
    legal = start + partitions <= 6 and free + step * (count - 1) < 20

    def body(x):
        tile = loaded(x)
        if not legal:
            with pytest.raises(OutOfBounds):
                tile.ap([[20, partitions], [step, count]], offset=offset).numpy()
            return
        view = tile.ap([[20, partitions], [step, count]], offset=offset)
        columns = [free + step * i for i in range(count)]
        compare_values(view, array[start : start + partitions, columns])
        assert view.start_partition == start

    def compare_values(view, want):
        assert view.shape == want.shape
        assert np.array_equal(view.numpy(), want)

    inside(body, array)


PAIRS = [(a, b) for a in ("float32", "int16", "uint8") for b in ("float32", "int16", "uint8")]


@pytest.mark.parametrize(("old", "new"), PAIRS)
@given(data=st.data())
def test_view_reinterprets_bytes(old, new, data):
    shape = data.draw(st.tuples(st.integers(1, 4), st.integers(1, 4), st.integers(1, 8)))
    array = np.random.default_rng(0).integers(0, 100, shape).astype(old)
    start = data.draw(st.integers(0, shape[-1] - 1))
    ratio = np.dtype(new).itemsize / np.dtype(old).itemsize
    whole = all(n % ratio == 0 for n in (shape[-1], start, shape[-1] - start)) or ratio <= 1

    def body(x):
        part = loaded(x)[:, :, start:]
        if not whole:
            with pytest.raises(ShapeError, match="do not divide it"):
                part.view(new)
            return
        got = part.view(new)
        want = array.view(new)[:, :, int(start / ratio) :]
        assert got.dtype == new
        assert np.array_equal(got.numpy(), want)
        assert np.array_equal(part.reinterpret_cast(new).numpy(), want)

    inside(body, array)


REARRANGE = {
    "split and reorder": (
        ("p", ("h", "w")),
        ("p", "w", "h"),
        {"w": 3},
        lambda a: a.reshape(4, 4, 3).transpose(0, 2, 1),
    ),
    "one size inferred": (
        ("p", ("h", "w")),
        ("p", "h", "w"),
        {"h": 2},
        lambda a: a.reshape(4, 2, 6),
    ),
    "nothing": (("p", "f"), ("p", "f"), None, lambda a: a),
    "split and merge": (("p", ("h", "w")), ("p", ("h", "w")), {"w": 3}, lambda a: a),
    "three parts": (
        ("p", ("a", "b", "c")),
        ("p", "c", "a", "b"),
        {"a": 2, "b": 3},
        lambda a: a.reshape(4, 2, 3, 2).transpose(0, 3, 1, 2),
    ),
}


@pytest.mark.parametrize("name", REARRANGE)
def test_rearrange(name):
    src, dst, sizes, numpy = REARRANGE[name]
    array = counted(4, 12)
    inside(lambda x: compare(loaded(x).rearrange(src, dst, sizes), numpy(array)), array)


# -- the worked examples of the documents ----------------------------------------------------------


def test_documented_indexing():
    def body():
        t = nl.ndarray((64, 64, 64), nl.float32)
        assert (t[:, 0, 10].shape, t[:, 0, 10].offset) == ((64, 1), 10)
        assert t[0, 0, 10].shape == (1, 1)
        assert t[0].shape == (1, 64, 64)
        assert t[:, :, ::2].shape == (64, 64, 32)
        assert nl.ndarray((64, 64), nl.float32)[:, 3].shape == (64, 1)
        assert nl.ndarray((64, 64), nl.float32)[0, 0].shape == (1, 1)
        assert nl.ndarray((4,), nl.float32, buffer=nl.hbm)[3].shape == (1,)
        assert nl.ndarray((4, 5), nl.float32, buffer=nl.hbm)[3].shape == (5,)

    inside(body, target="trn2")


def test_documented_access_patterns():
    array = counted(16, 16)

    def body(x):
        tile = loaded(x)
        part = tile.ap([[16, 16], [1, 8]], offset=8)
        assert part.shape == (16, 8)
        assert part.numpy()[3, 2] == 58
        compare(tile.ap([[16, 4], [1, 16]], offset=8 * 16), array[8:12])

    inside(body, array, target="trn2")


def test_documented_reinterpretation():
    array = np.array([[0x40003F80, 0xC0404080]], np.uint32).view(np.int32)

    def body(x):
        tile = loaded(x)
        by_pattern = tile.ap([[4, 1], [1, 4]], dtype=nl.bfloat16)
        by_view = tile.view(nl.bfloat16)
        for view in (by_pattern, by_view):
            assert view.numpy().astype(np.float32).tolist() == [[1, 2, 4, -3]]

    inside(body, array)


def test_documented_scalar_offset():
    def body(a, index):
        s = loaded(index)
        view = a.ap([[2, 1], [1, 2]], offset=6, scalar_offset=s, indirect_dim=1)
        landed = sbuf(1, 2)
        nisa.dma_copy(dst=landed, src=view)
        assert view.is_indirect()
        return view.numpy().tolist(), landed.numpy().tolist()

    got = inside(body, counted(4, 3, 2), np.array([[2]], np.int32))
    assert got == ([[10, 11]], [[10, 11]])


def gathered(rows: list[int], mode: nisa.oob_mode) -> Any:
    def body(a, index):
        v = loaded(index)
        landed = sbuf(2, 2)
        nisa.memset(landed, 7.0)
        # The leading step has no meaning here.
        view = a.ap([[99, 2], [1, 2]], offset=1, vector_offset=v)
        nisa.dma_copy(dst=landed, src=view, oob_mode=mode)
        return landed.numpy().tolist(), view

    return inside(body, counted(4, 3), np.array(rows, np.int32).reshape(-1, 1))


def test_documented_vector_offset():
    values, view = gathered([2, 0], nisa.oob_mode.error)
    assert values == [[7, 8], [1, 2]]
    assert view.numpy().tolist() == values


def test_documented_gather_with_skipped_rows():
    assert gathered([-1, 3], nisa.oob_mode.skip)[0] == [[7, 7], [10, 11]]
    with pytest.raises(OutOfBounds, match="row 0 of its run-time addresses starts at element -2"):
        gathered([-1, 3], nisa.oob_mode.error)


def test_documented_scatter_with_a_skipped_row():
    def body(rows, index):
        s, values = loaded(index), loaded(rows)
        target, zeros = hbm(3, 2), sbuf(3, 2)
        nisa.memset(zeros, 0.0)
        nisa.dma_copy(dst=target, src=zeros)
        view = target.ap([[2, 2], [1, 2]], scalar_offset=s)
        nisa.dma_copy(dst=view, src=values, oob_mode=nisa.oob_mode.skip)
        return target.numpy().tolist()

    rows = np.array([[1, 2], [3, 4]], np.float32)
    assert inside(body, rows, np.array([[2]], np.int32)) == [[0, 0], [0, 0], [1, 2]]


# -- run-time indices ------------------------------------------------------------------------------


@pytest.mark.parametrize("register", [False, True])
@pytest.mark.parametrize("on_chip", [False, True])
@given(data=st.data())
def test_select_at_run_time_is_select(register, on_chip, data):
    shape = data.draw(st.tuples(*[st.integers(1, 4)] * data.draw(st.integers(2, 4))))
    dim = data.draw(st.integers(1, len(shape) - 1))
    at = data.draw(st.integers(0, shape[dim] - 1))
    array = counted(*shape)

    def body(x, index):
        source, choice = (loaded(x) if on_chip else x), loaded(index)
        if register:
            choice = nisa.register_alloc(at)
        view = source.select(dim, choice)
        want = widened(array[(slice(None),) * dim + (at,)], 2 if on_chip else 1)
        compare(view, want)
        landed = nl.ndarray(view.shape, view.dtype, buffer=source.buffer)
        (nisa.tensor_copy if on_chip else nisa.dma_copy)(dst=landed, src=view)
        assert np.array_equal(landed.numpy(), want)

    inside(body, array, np.array([[at]], np.uint32))


def test_a_vector_select_gathers_rows():
    array = counted(4, 2, 3)

    def body(x, index):
        rows = x.vector_select(0, loaded(index))
        landed = sbuf(3, 2, 3)
        nisa.dma_copy(dst=landed, src=rows)
        assert np.array_equal(landed.numpy(), array[[3, 0, 3]])
        part = rows[:, 1, 0:2]
        assert np.array_equal(part.numpy(), array[[3, 0, 3], 1, 0:2])

    inside(body, array, np.array([[3], [0], [3]], np.int32))


@pytest.mark.parametrize("instruction", [nisa.tensor_copy, nisa.dma_copy])
def test_a_run_time_index_may_not_leave_its_partition(instruction):
    """The next partition follows in the tile's bytes, but no address reaches it."""

    def body(x):
        source, landed = loaded(x), sbuf(1, 1)
        view = source[0:1].select(1, nisa.register_alloc(4))
        instruction(dst=landed, src=view)

    refused(body, OutOfBounds, "test_views.py:", arrays=(counted(4, 4),))


def test_a_run_time_index_may_not_leave_its_tile():
    def body(x):
        source, landed = loaded(x), sbuf(1, 1)
        nisa.tensor_copy(dst=landed, src=source[2:3].select(1, nisa.register_alloc(8)))

    says = ("nisa.tensor_copy src at", "reaches element 16 of a tile of 16 elements")
    refused(body, OutOfBounds, *says, arrays=(counted(4, 4),))


def test_queries():
    def body(x):
        t = loaded(x)
        assert not t.is_indirect()
        assert t.is_contiguous()
        assert t[:, 0:3].is_contiguous()  # the step from partition to partition does not count
        assert not t[:, ::2].is_contiguous()
        assert not x[:, 0:3].is_contiguous()
        assert x[1:3].is_contiguous()
        assert t.get_pattern() == [[6, 4], [1, 6]]

    inside(body, counted(4, 6))


def test_a_view_of_a_view_has_the_partition_step_of_its_tile():
    """``.ap`` accepts the free size of the view it was called on as one partition."""
    array = counted(4, 6)

    def body(x):
        compare(loaded(x)[:, 3:6].ap([[3, 4], [1, 3]]), array[:, 3:6])

    inside(body, array)
