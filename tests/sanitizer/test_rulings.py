"""Accesses that look wrong and are allowed: no check may speak (the README of checks lists them).

And what a run does where a check is told to let a mistake pass.
"""

from __future__ import annotations

import nki.isa as nisa
import nki.language as nl
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from nki_kernels.machine.checks.regions import overlap
from nki_kernels.machine.launch import launch
from nki_kernels.machine.options import Options, only
from tests.sanitizer import memory
from tests.sanitizer.bug import HOSTILE, filled, hbm, loaded, ones, ps, sb, stored

X = ones(4, 4)


def one_address(x):
    ring = [sb(4, 4, address=(0, 0)) for _ in range(3)]
    outs = []
    for tile in ring:
        nisa.dma_copy(dst=tile, src=x)
        outs.append(stored(tile))
    return tuple(outs)


def column_tiles(x):
    tile = loaded(x)
    acc = ps(64, 4)
    for k in range(2):
        for c in range(2):
            nisa.nc_matmul(
                acc[32 * c : 32 * c + 4, :], tile, tile, accumulate=k > 0,
                tile_position=(0, 32 * c), tile_size=(128, 32),
            )  # fmt: skip
    return stored(acc[0:4, :]), stored(acc[32:36, :])


def partial_update(x):
    tile = loaded(x)
    acc = ps(4, 4)
    nisa.nc_matmul(acc, tile, tile)
    nisa.nc_matmul(acc[:, 0:2], tile, tile[:, 0:2])
    nisa.nc_matmul(acc, tile, tile)
    return stored(acc)


def inferred_after_memset(x):
    acc = ps(4, 4)
    nisa.memset(acc, 0.0)
    nisa.nc_matmul(acc, loaded(x), loaded(x))
    return stored(acc)


def read_then_add(x):
    return memory.read_between(True, x)


def summed_in_psum(x):
    tile, acc = loaded(x), ps(4, 4)
    for _ in nl.affine_range(3):
        nisa.nc_matmul(acc, tile, tile)
    return stored(acc)


def summed_in_sbuf(x):
    tile, total = loaded(x), filled(4, 1, value=0)
    for i in nl.affine_range(4):
        nisa.tensor_tensor(total, total, tile[:, i : i + 1], nl.add)
    return stored(total)


def fused_sum(x):
    tile, total = loaded(x), filled(4, 1, value=0)
    for i in nl.affine_range(4):
        nisa.scalar_tensor_tensor(total, tile[:, i : i + 1], nl.multiply, 2.0, nl.add, total)
    return stored(total)


def read_then_anew(x):
    tile, acc = loaded(x), ps(4, 4)
    nisa.nc_matmul(acc, tile, tile)
    before = stored(acc)
    nisa.nc_matmul(acc, tile, tile, accumulate=False)
    nisa.nc_matmul(acc, tile, tile)
    return before, stored(acc)


def scratch(x):
    tile, work, out = loaded(x), sb(4, 1), hbm(4, 4)
    for i in nl.affine_range(4):
        nisa.tensor_scalar(work, tile[:, i : i + 1], nl.multiply, 2.0)
        nisa.dma_copy(dst=out[:, i : i + 1], src=work)
    return out


def left_early(x):
    """A loop that ends by break is over: what follows it may read what it wrote."""
    tile, work = loaded(x), sb(4, 4)
    for i in nl.affine_range(4):
        nisa.tensor_copy(work[:, i : i + 1], tile[:, i : i + 1])
        if i == 1:
            break
    return stored(work[:, 0:2])


def large_integers(x):
    numbers = filled(4, 1, value=2**30, dtype=nl.int32)
    marker = filled(4, 1, value=2**32 - 1, dtype=nl.uint32)
    outs = []
    for source in (numbers, marker):
        wide = sb(4, 1)
        nisa.tensor_copy(wide, source)
        outs.append(stored(wide))
    return tuple(outs)


def broadcast_source(x):
    row = loaded(x)[:, 0:1].ap([[4, 4], [0, 4]])
    out = sb(4, 4)
    nisa.tensor_copy(out, row)
    return stored(out)


def scratch_of_one_element(x):
    waste, total = sb(4, 1), sb(4, 1)
    nisa.activation_reduce(
        waste.ap([[1, 4], [0, 4]]), nl.square, loaded(x), nl.add, reduce_res=total
    )
    return stored(total)


def names_in_a_device_loop(x):
    total = filled(4, 4, value=0, name="total")

    def body(_):
        step = sb(4, 4, name="step")
        nisa.memset(step, 1.0)
        nisa.tensor_tensor(total, total, step, nl.add)

    nl.fori_loop(0, 3, body)
    return stored(total)


def not_a_number(x):
    out = sb(4, 4)
    nisa.activation(out, nl.sqrt, loaded(x), bias=filled(4, 1, value=float("nan")))
    return stored(out)


RULINGS = [
    one_address, column_tiles, partial_update, inferred_after_memset, read_then_add,
    read_then_anew, summed_in_psum, summed_in_sbuf, fused_sum, scratch, left_early, large_integers,
    broadcast_source, scratch_of_one_element, names_in_a_device_loop, not_a_number,
]  # fmt: skip


@pytest.mark.parametrize("kernel", RULINGS, ids=lambda k: k.__name__)
def test_an_allowed_access_passes_every_check(kernel):
    launch(kernel, (X,), target="trn2", options=HOSTILE)


# -- below level "error" ---------------------------------------------------------------------------


def test_a_group_that_never_started_adds_to_what_was_written():
    def kernel(x):
        acc = ps(4, 4)
        nisa.memset(acc[:, 0:2], 10.0)
        nisa.nc_matmul(acc, loaded(x), loaded(x), accumulate=True)
        return stored(acc)

    got = launch(kernel, (X,), target="trn2", options=Options(accumulation="off")).outputs[0]
    assert np.array_equal(got, [[14, 14, 4, 4]] * 4)


def test_rows_out_of_bounds_are_skipped():
    rows = memory.padded(0, 1, 2, -1)
    kernel = memory.BOUNDS[3].bug
    got = launch(kernel, (2 * X, rows), target="trn2", options=Options(bounds="off")).outputs[0]
    assert np.array_equal(got, [[2] * 4, [2] * 4, [2] * 4, [1] * 4])


# -- which bytes an access covers ------------------------------------------------------------------


@given(data=st.data())
def test_two_accesses_overlap_exactly_when_they_share_a_byte(data):
    """Against sets of bytes, for slices with steps of a tile and of its 16-bit view."""
    found = []

    def kernel(x):
        tile = sb(4, 12)
        nisa.memset(tile, 0.0)
        views = []
        for _ in range(2):
            view = tile if data.draw(st.booleans()) else tile.view(nl.int16)
            row = data.draw(st.integers(0, 3))
            rows = data.draw(st.integers(1, 4 - row))
            first = data.draw(st.integers(0, view.shape[1] - 1))
            step = data.draw(st.integers(1, 4))
            last = data.draw(st.integers(first + 1, view.shape[1]))
            views.append(view[row : row + rows, first:last:step])
        found.append(overlap(views[0].access, views[1].access))
        covered = []
        for view in views:
            size = view.dtype.itemsize
            at = np.add.outer(
                np.arange(view.shape[0]) * view.strides[0],
                np.arange(view.shape[1]) * view.strides[1],
            )
            starts = (view.offset + at).reshape(-1) * size
            covered.append({int(s) + b for s in starts for b in range(size)})
        found.append(bool(covered[0] & covered[1]))
        return stored(tile)

    launch(kernel, (X,), target="trn2", options=only())
    assert found[0] == found[1]
