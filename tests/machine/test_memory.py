"""What a tile remembers: its bytes, which of them were written, which a matmul group started."""

from __future__ import annotations

import re
import warnings

import nki.isa as nisa
import nki.language as nl
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from nki_kernels.machine import dtypes
from nki_kernels.machine.errors import DoesNotFit, RuleViolation, ShapeError, UninitializedRead
from nki_kernels.machine.launch import launch
from nki_kernels.machine.options import NkiWarning, Options
from tests.machine.kernels import counted, hbm, inside, loaded, psum, refused, sbuf, stored

SIZES = {"uint8": 1, "int16": 2, "float32": 4}


def draw_view(data, tile):
    """A sub-range with a step, seen as a dtype of any size that fits."""
    start = data.draw(st.integers(0, tile.shape[1] - 1))
    stop = data.draw(st.integers(start + 1, tile.shape[1]))
    rows = data.draw(st.integers(1, tile.shape[0]))
    step = data.draw(st.integers(1, 3))
    return tile[0:rows, start:stop:step]


@pytest.mark.parametrize("dtype", SIZES)
@given(data=st.data())
def test_a_read_succeeds_exactly_where_every_byte_was_written(dtype, data):
    """Writes and reads through views of several item sizes against a NumPy map of bytes."""

    def body():
        tile = sbuf(4, 8, dtype=dtype)
        written = np.zeros((4, 8 * SIZES[dtype]), bool)
        for _ in range(data.draw(st.integers(1, 5))):
            seen = data.draw(st.sampled_from([d for d in SIZES if SIZES[d] <= SIZES[dtype]]))
            view = draw_view(data, tile.view(seen))
            size = SIZES[seen]
            columns = view.offset * size + np.arange(view.shape[1]) * view.strides[1] * size
            touched = columns[:, None] + np.arange(size)
            cells = written[: view.shape[0], touched]
            if data.draw(st.booleans()):
                nisa.memset(view, 1)
                written[: view.shape[0], touched] = True
                continue
            landed = sbuf(*view.shape, dtype=seen)
            if cells.all():
                nisa.tensor_copy(dst=landed, src=view)
                continue
            missing = int((~cells.all(axis=-1)).sum())
            text = f"src reads {missing} of {view.size} elements that no instruction wrote"
            with pytest.raises(UninitializedRead, match=text):
                nisa.tensor_copy(dst=landed, src=view)
            assert np.array_equal(view.mem.written_mask(view.region), cells.all(axis=-1))

    inside(body)


def test_an_unwritten_read_names_both_lines():
    def body():
        tile = sbuf(4, 4)
        nisa.memset(tile[:, 0:2], 1.0)
        nisa.tensor_copy(dst=sbuf(4, 4), src=tile)

    message = refused(body, UninitializedRead)
    assert re.match(
        r"nisa\.tensor_copy at \S*test_memory\.py:\d+: src reads 8 of 16 elements that no "
        r"instruction wrote \(first at index \(0, 2\)\) of the sbuf tile 't0' \[4, 4\] float32 "
        r"allocated at \S*kernels\.py:\d+; write them first",
        message,
    )


def test_a_tile_written_piece_by_piece_is_full():
    def body():
        tile = sbuf(4, 4)
        nisa.memset(tile[:, 0:2], 1.0)
        assert not tile.mem.full
        nisa.memset(tile[:, 2:4], 1.0)
        nisa.tensor_copy(dst=sbuf(4, 4), src=tile)
        assert tile.mem.full

    inside(body)


@pytest.mark.parametrize("level", ["warn", "off"])
def test_an_unwritten_read_can_be_a_warning_or_nothing(level):
    def body():
        nisa.tensor_copy(dst=sbuf(1, 1), src=sbuf(1, 1))

    options = Options(uninitialized=level)
    if level == "warn":
        with pytest.warns(NkiWarning, match="1 of 1 elements that no instruction wrote"):
            inside(body, options=options)
    else:
        inside(body, options=options)


# -- values ----------------------------------------------------------------------------------------


def test_reused_bytes_never_show_in_a_new_tile():
    """The bytes of a dead tile are used again; what they held stays invisible."""

    def body(x):
        first = loaded(x)
        where = first.mem.data.ctypes.data
        del first
        second = sbuf(4, 4)
        nisa.memset(second[:, 0:1], 5.0)
        assert second.mem.data.ctypes.data == where
        assert np.isnan(second.numpy()[:, 1:]).all()
        assert (second.numpy()[:, 0] == 5).all()
        nisa.tensor_copy(dst=sbuf(4, 4), src=second)

    refused(body, UninitializedRead, "12 of 16 elements", arrays=(counted(4, 4),))


def test_integers_show_the_documented_poison():
    assert inside(lambda: sbuf(1, 2, dtype="int32").numpy().tolist()) == [[4, 4]]


@pytest.mark.parametrize("level", ["warn", "off"])
@pytest.mark.parametrize("kind", dtypes.ALL, ids=str)
@pytest.mark.parametrize("wide", [False, True])
def test_a_read_that_passes_sees_poison(kind, level, wide):
    """Not what a dead tile of the same size left in the pool."""

    def body():
        first = sbuf(2, 2, dtype=kind)
        nisa.memset(first.view(f"uint{8 * kind.itemsize}") if kind.kind == "packed" else first, 1)
        del first
        second, third = sbuf(2, 2, dtype=kind), sbuf(2, 2, dtype=kind)
        nisa.dma_copy(dst=third, src=second)
        assert third.mem.full
        return third.numpy()

    options = Options(uninitialized=level, precise_fp=not wide)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", NkiWarning)
        got = inside(body, options=options)
    expected = np.full((2, 2), kind.poison).astype(got.dtype)
    assert got.tobytes() == expected.tobytes()


def test_an_output_that_may_be_unwritten_shows_poison():
    def kernel(x):
        tile = loaded(x)
        out = hbm(4, 4)
        nisa.dma_copy(dst=out[0:2], src=tile[0:2])
        return out

    array = counted(4, 4)
    found = launch(kernel, (array,), target="toy", options=Options(outputs="off"))
    assert np.array_equal(found.result[:2], array[:2])
    assert np.isnan(found.result[2:]).all()


def test_the_callers_array_is_borrowed_until_a_write():
    array = counted(4, 4)

    def body(x):
        assert np.shares_memory(x.mem.data, array)
        tile = loaded(x)
        nisa.memset(tile[0:1], 9.0)
        nisa.dma_copy(dst=x[0:1], src=tile[0:1])
        assert not np.shares_memory(x.mem.data, array)
        assert array[0, 0] == 0
        assert x.numpy()[0].tolist() == [9, 9, 9, 9]
        assert np.array_equal(x.numpy()[1:], array[1:])

    inside(body, array)
    assert array[0].tolist() == [9, 9, 9, 9]


def test_numpy_returns_a_copy():
    def body(x):
        tile = loaded(x)
        tile.numpy()[...] = -1
        return tile.numpy()

    assert np.array_equal(inside(body, counted(2, 3)), counted(2, 3))


def test_precise_fp_off_holds_narrow_floats_as_float32():
    third = np.float32(1) / np.float32(3)

    def kernel(x):
        wide = sbuf(1, 1, dtype=nl.bfloat16)
        nisa.memset(wide, float(third))
        assert wide.numpy() == third
        with pytest.raises(RuleViolation, match="its bits as int16 while NKI_PRECISE_FP=0"):
            wide.view("int16").numpy()
        with pytest.raises(RuleViolation, match="its bits as uint8 while NKI_PRECISE_FP=0"):
            wide.view("uint8").numpy()
        tile = sbuf(1, 1, dtype=nl.bfloat16)
        nisa.dma_copy(dst=tile, src=x)
        return stored(wide)

    given_ = np.ones((1, 1), "bfloat16")
    off = launch(kernel, (given_,), target="toy", options=Options(precise_fp=False)).result
    assert off.dtype == given_.dtype
    assert off == third.astype(given_.dtype)


# -- allocation ------------------------------------------------------------------------------------

ALLOCATIONS = [
    (sbuf, ShapeError, "shape []; allowed are 1 to 5 dimensions (more in HBM) of size >= 1"),
    (lambda: sbuf(1, 1, 1, 1, 1, 1), ShapeError, "allowed are 1 to 5 dimensions"),
    (lambda: sbuf(2, 0), ShapeError, "shape [2, 0]; allowed are"),
    (
        lambda: sbuf(4),
        ShapeError,
        "shape [4] in sbuf; a tile has a partition and at least one free",
    ),
    (lambda: sbuf(9, 1), ShapeError, "dimension 0 is the partition and holds at most 8 on toy"),
    (lambda: nl.ndarray(3, "float32"), ShapeError, "shape=3; it must be a tuple of positive int"),
    (lambda: nl.ndarray((1, 2.5), "float32"), ShapeError, "shape=(1, 2.5); it must be a tuple"),
    (lambda: nl.ndarray(("a", 1), "float32"), ShapeError, "shape=('a', 1); it must be a tuple"),
    (lambda: nl.ndarray((1, 1), "float32", buffer="sbuf"), RuleViolation, "buffer='sbuf'; allowed"),
    (
        lambda: sbuf(1, 1025),
        DoesNotFit,
        "4100 bytes per partition at offset 0; sbuf has 4096 bytes",
    ),
    (lambda: psum(1, 65), DoesNotFit, "260 bytes per partition at offset 0; psum has 256 bytes"),
    (
        lambda: nl.ndarray((2, 1), "float32", address=(7, 0)),
        RuleViolation,
        "address=(7, 0) puts 2 partitions outside 0 to 7",
    ),
    (
        lambda: nl.ndarray((2, 1), "float32", address=(0,)),
        RuleViolation,
        "address=(0,); it must be two ints (start partition, bytes in the partition)",
    ),
    (
        lambda: nl.ndarray((2, 1), "float32", address=(0, 1.5)),
        RuleViolation,
        "address=(0, 1.5); it must be two ints",
    ),
    (
        lambda: nl.ndarray((2, 1), "float32", address=5),
        RuleViolation,
        "address=5; it must be two ints",
    ),
    (
        lambda: nl.ndarray((2, 1), "float32", address=(0, -4)),
        RuleViolation,
        "the address is (start partition, bytes in the partition)",
    ),
    (
        lambda: nl.ndarray((2, 1), "float32", buffer=nl.psum, address=(0, 4)),
        RuleViolation,
        "address=(0, 4) is inside a PSUM bank; byte offsets are multiples of 64",
    ),
]


@pytest.mark.parametrize(("make", "error", "says"), ALLOCATIONS, ids=[a[2] for a in ALLOCATIONS])
def test_an_illegal_allocation_says_what_fits(make, error, says):
    assert refused(make, error, says).startswith("nl.ndarray")


# -- matmul groups ---------------------------------------------------------------------------------


def times(tile, columns, value, accumulate):
    """Write or add `value` to the columns of a one-row PSUM tile with a 1 x 1 contraction."""
    width = columns.stop - columns.start
    one, data = sbuf(1, 1), sbuf(1, width)
    nisa.memset(one, 1.0)
    nisa.memset(data, value)
    nisa.nc_matmul(tile[:, columns], one, data, accumulate=accumulate)


@given(data=st.data())
def test_inferred_accumulation_is_per_element(data):
    """None overwrites what no matmul wrote since the last other write, and adds to the rest."""
    width = 5

    def body():
        tile = psum(1, width)
        want, started = np.zeros(width), np.zeros(width, bool)
        nisa.memset(tile, 0.0)
        for number in range(1, data.draw(st.integers(2, 6))):
            start = data.draw(st.integers(0, width - 1))
            stop = data.draw(st.integers(start + 1, width))
            columns, value = slice(start, stop), float(10**number)
            kind = data.draw(st.sampled_from(("None", "False", "True", "memset")))
            if kind == "memset":
                nisa.memset(tile[:, columns], value)
                want[columns], started[columns] = value, False
            elif kind == "True" and not started[columns].all():
                with pytest.raises(RuleViolation, match="accumulate=True on elements of tile"):
                    times(tile, columns, value, True)
            else:
                adds = started[columns] & (kind != "False")
                times(tile, columns, value, {"None": None, "False": False, "True": True}[kind])
                want[columns] = np.where(adds, want[columns], 0) + value
                started[columns] = True
            assert tile.numpy().reshape(-1).tolist() == want.tolist()

    inside(body, options=Options(interleave="off"))


def test_documented_overlap():
    def body():
        tile = psum(1, 3)
        times(tile, slice(0, 2), 1.0, None)
        times(tile, slice(1, 3), 10.0, None)
        return tile.numpy().tolist()

    assert inside(body) == [[1, 11, 10]]


def test_a_new_tile_starts_a_new_group():
    def body():
        for _ in range(2):
            tile = psum(1, 1)
            times(tile, slice(0, 1), 3.0, None)
        return tile.numpy().tolist()

    assert inside(body) == [[3]]


def test_groups_of_views_of_another_item_size():
    """A 16-bit write into a float32 tile ends the group of the bytes it touches only."""

    def body():
        tile = psum(1, 2)
        times(tile, slice(0, 2), 1.0, None)
        nisa.memset(tile.view("uint16")[:, 0:2], 0)
        times(tile, slice(0, 2), 10.0, None)
        return tile.numpy().tolist()

    assert inside(body) == [[10, 11]]


def test_inference_inside_a_device_loop_needs_a_tile_of_its_body():
    def older():
        tile = psum(1, 1)
        nl.fori_loop(0, 2, lambda i: times(tile, slice(0, 1), 1.0, None))

    refused(older, RuleViolation, "accumulate=None inside a device loop on tile")

    def own():
        seen = []

        def body(i):
            tile = psum(1, 1)
            times(tile, slice(0, 1), 1.0, None)
            times(tile, slice(0, 1), 1.0, None)
            seen.append(tile.numpy().item())

        nl.fori_loop(0, 2, body)
        return seen

    assert inside(own) == [2, 2]


def test_an_output_in_pieces_is_whole():
    def kernel(x):
        result = hbm(4, 6)
        for start in range(0, 6, 2):
            nisa.dma_copy(dst=result[:, start : start + 2], src=x[:, start : start + 2])
        return result

    assert np.array_equal(launch(kernel, (counted(4, 6),), target="toy").result, counted(4, 6))
