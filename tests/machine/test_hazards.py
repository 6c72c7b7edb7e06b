"""Two tiles at one fixed address: a read of what the other one overwrote is refused."""

from __future__ import annotations

import nki.isa as nisa
import nki.language as nl
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from nki_kernels.machine.errors import KernelError
from nki_kernels.machine.launch import launch
from nki_kernels.machine.options import NkiWarning, Options
from nki_kernels.machine.tensor import Abstract
from tests.machine.kernels import counted, hbm, stored

pytestmark = pytest.mark.usefixtures("toy")


def at(address, *shape, dtype=nl.float32, buffer=nl.sbuf):
    return nl.ndarray(shape, dtype, buffer=buffer, address=address)


def clobbered(x, y):
    """Loads x, overwrites it through another tile, and stores what was x."""
    one, two = at((0, 64), 2, 4), at((0, 64), 2, 4)
    nisa.dma_copy(dst=one, src=x)
    nisa.dma_copy(dst=two, src=y)
    return stored(one)


def test_a_read_through_the_tile_that_was_overwritten_names_both_tiles():
    with pytest.raises(KernelError) as caught:
        launch(clobbered, (counted(2, 4), counted(2, 4)))
    message = str(caught.value)
    assert message.startswith("nisa.dma_copy at ")
    for text in (
        "reads bytes of the sbuf tile 't2' [2, 4] float32 at address (0, 64) (allocated at ",
        "that were last written through tile 't3' [2, 4] float32 at address (0, 64)",
        "on the device they hold the other tile's values",
        "finish reading before the other tile is written, or give the two different addresses",
        f"{__file__}:",
    ):
        assert text in message


def test_it_needs_no_values():
    with pytest.raises(KernelError, match="last written through tile 't3'"):
        launch(clobbered, (Abstract((2, 4), "float32"), Abstract((2, 4), "float32")))


def test_it_warns_or_is_silent_when_told_to():
    arrays = (counted(2, 4), -counted(2, 4))
    with pytest.warns(NkiWarning, match="last written through"):
        launch(clobbered, arrays, options=Options(alias="warn"))
    result = launch(clobbered, arrays, options=Options(alias="off")).result
    assert np.array_equal(result, arrays[0])


def test_nothing_is_written_back_when_it_is_found():
    def kernel(x):
        one, two = at((0, 0), 2, 4), at((0, 0), 2, 4)
        nisa.dma_copy(dst=one, src=x)
        nisa.memset(two, 1.0)
        nisa.dma_copy(dst=x, src=one)

    array = counted(2, 4)
    with pytest.raises(KernelError, match="last written through"):
        launch(kernel, (array,))
    assert np.array_equal(array, counted(2, 4))


def test_using_one_tile_after_the_other_is_normal():
    def kernel(x, y):
        tiles = [at((0, 0), 2, 4) for _ in range(2)]
        results = []
        for tile, source in zip(tiles, (x, y), strict=True):
            nisa.dma_copy(dst=tile, src=source)
            results.append(stored(tile))
        nisa.dma_copy(dst=tiles[0], src=x)
        results.append(stored(tiles[0]))
        return tuple(results)

    x, y = counted(2, 4), -counted(2, 4)
    for got, want in zip(launch(kernel, (x, y)).result, (x, y, x), strict=True):
        assert np.array_equal(got, want)


def test_a_matmul_that_adds_to_overwritten_sums_reads_them():
    def kernel():
        ones = nl.ndarray((2, 4), nl.float32)
        nisa.memset(ones, 1.0)
        one = at((0, 0), 4, 4, buffer=nl.psum)
        two = at((0, 0), 4, 4, buffer=nl.psum)
        nisa.nc_matmul(one, ones, ones, accumulate=False)
        nisa.nc_matmul(two, ones, ones, accumulate=False)
        nisa.nc_matmul(one, ones, ones, accumulate=True)

    with pytest.raises(KernelError, match=r"nisa.nc_matmul at .* the psum tile"):
        launch(kernel)


@given(
    one=st.tuples(st.integers(0, 3), st.integers(0, 6), st.integers(1, 4), st.integers(1, 6)),
    two=st.tuples(st.integers(0, 3), st.integers(0, 6), st.integers(1, 4), st.integers(1, 6)),
    wide=st.booleans(),
)
def test_it_is_found_exactly_when_the_bytes_meet(one, two, wide):
    """Against sets of (partition, byte): write one, write two, read one."""

    def tile_bytes(row, column, rows, columns, size):
        start = 2 * column
        return {
            (r, c) for r in range(row, row + rows) for c in range(start, start + columns * size)
        }

    def kernel():
        tiles = [
            at((row, 2 * column), rows, columns, dtype=dtype)
            for (row, column, rows, columns), dtype in zip((one, two), dtypes, strict=True)
        ]
        for tile in tiles:
            source = hbm(*tile.shape, dtype=tile.dtype)
            filler = nl.ndarray(tile.shape, tile.dtype)
            nisa.memset(filler, 1.0)
            nisa.dma_copy(dst=source, src=filler)
            nisa.dma_copy(dst=tile, src=source)
        return stored(tiles[0])

    dtypes = (nl.float32 if wide else nl.bfloat16, nl.bfloat16)
    meets = tile_bytes(*one, 4 if wide else 2) & tile_bytes(*two, 2)
    if not meets:
        launch(kernel)
        return
    with pytest.raises(KernelError, match="last written through"):
        launch(kernel)
