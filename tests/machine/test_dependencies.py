"""Edges: boxes against brute force, and who waits for whom."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from nki_kernels.hardware import Engine
from nki_kernels.machine.dependencies import Dependencies, Wait, box_of, split
from nki_kernels.machine.placement import place
from nki_kernels.machine.trace import Access, Tile
from tests.machine.trace_builder import Builder, view

V, S, G = Engine.vector, Engine.scalar, Engine.gpsimd


def tile_of(rows: int, row_bytes: int) -> Tile:
    return Builder().tile(rows, row_bytes // 2, "bfloat16")


def bytes_of(access: Access) -> set[int]:
    """Every byte an access touches, one by one."""
    index = np.zeros((), np.int64) + access.offset
    for extent, stride in zip(access.shape, access.strides, strict=True):
        index = index[..., None] + np.arange(extent) * stride
    return {int(i) * access.itemsize + b for i in index.ravel() for b in range(access.itemsize)}


@st.composite
def accesses(draw: st.DrawFn, tile: Tile) -> Access:
    """Any strided pattern inside the tile, negative and zero strides included."""
    total = tile.partitions * tile.row_bytes // 2
    dims = draw(st.lists(st.integers(1, 5), min_size=1, max_size=4))
    strides = [draw(st.integers(-20, 40)) for _ in dims]
    low = sum(min(0, (n - 1) * s) for n, s in zip(dims, strides, strict=True))
    high = sum(max(0, (n - 1) * s) for n, s in zip(dims, strides, strict=True))
    assume(high - low < total)
    offset = draw(st.integers(-low, total - 1 - high))
    return Access(tile, offset, tuple(dims), tuple(strides), 2)


TILES = st.sampled_from([tile_of(8, 16), tile_of(1, 128), tile_of(64, 2), tile_of(12, 20)])


@given(st.data())
def test_boxes_that_share_a_byte_meet(data: st.DataObject) -> None:
    tile = data.draw(TILES)
    a, b = data.draw(accesses(tile)), data.draw(accesses(tile))
    if bytes_of(a) & bytes_of(b):
        assert box_of(a).meets(box_of(b))
        assert box_of(b).meets(box_of(a))


@pytest.mark.parametrize(("start", "meets"), [(4, False), (5, False), (6, True), (8, True)])
def test_runs_that_wrap_around_a_step_meet(start: int, meets: bool) -> None:
    # Runs of 3 of every 8 from 6 on reach element 8 of the next step, where runs of 4 begin.
    tile = tile_of(1, 64)
    a = Access(tile, 0, (4, 4), (8, 1), 2)
    b = Access(tile, start, (2, 3 if start == 6 else 1), (8, 1), 2)
    assert bool(bytes_of(a) & bytes_of(b)) == meets
    assert box_of(a).meets(box_of(b)) == box_of(b).meets(box_of(a)) == meets


@given(st.data())
def test_rectangles_meet_only_if_they_share_a_byte(data: st.DataObject) -> None:
    tile = tile_of(8, 32)
    spans = st.tuples(st.integers(0, 7), st.integers(1, 8)).filter(lambda s: s[0] < s[1])
    columns = st.tuples(st.integers(0, 15), st.integers(1, 16), st.integers(1, 3)).filter(
        lambda s: s[0] < s[1]
    )
    a, b = (view(tile, data.draw(spans), data.draw(columns)) for _ in range(2))
    same_step = a.strides[-1] == b.strides[-1] or 1 in (a.shape[1], b.shape[1])
    if same_step:
        assert box_of(a).meets(box_of(b)) == bool(bytes_of(a) & bytes_of(b))


@pytest.mark.parametrize("heads", [2, 4])
def test_interleaved_heads_stay_apart(heads: int) -> None:
    # [S, H, D] in HBM, one head each: rows h, h + H, h + 2H, ...
    tile = Builder().tile(16 * heads, 8, "float32", "hbm")
    parts = [Access(tile, 8 * h, (16, 8), (8 * heads, 1), 4) for h in range(heads)]
    for i, a in enumerate(parts):
        for j, b in enumerate(parts):
            assert box_of(a).meets(box_of(b)) == (i == j)


def test_an_indirect_access_meets_everything() -> None:
    tile = tile_of(8, 16)
    anywhere = Access(tile, 0, (1,), (1,), 2, True)
    last = Access(tile, 63, (1,), (1,), 2)
    assert box_of(anywhere).meets(box_of(last))


# -- who waits -------------------------------------------------------------------------------------


def waits(b: Builder, event: int, *, placed: bool = False) -> set[tuple[int, Wait]]:
    """What an event waits for."""
    placement = place(b.trace) if placed else None
    return {split(edge) for edge in Dependencies(b.trace, placement).edges[event]}


@pytest.mark.parametrize("engine", [V, S, Engine.dma])
def test_read_after_write(engine: Engine) -> None:
    b = Builder()
    h, x, y = b.tile(memory="hbm"), b.tile(), b.tile()
    first = b.dma(view(x), view(h)) if engine is Engine.dma else b.copy(x, y, engine)
    second = b.copy(y, x, V)
    assert waits(b, second) >= {(first, Wait.result)}


def test_write_after_read_and_write_after_write() -> None:
    b = Builder()
    x, y, z = b.tile(), b.tile(), b.tile()
    first = b.copy(x, z, G)
    second = b.copy(y, x, S)
    third = b.copy(x, z, V)
    assert waits(b, third) == {(second, Wait.read), (first, Wait.result)}


def test_an_engine_reads_before_it_overwrites() -> None:
    b = Builder()
    x, y, z = b.tile(), b.tile(), b.tile()
    b.copy(y, x, V)
    second = b.copy(x, z, V)
    assert waits(b, second) == set()


def test_a_dma_waits_for_a_dma_that_reads_its_target() -> None:
    b = Builder()
    h, x = b.tile(memory="hbm"), b.tile()
    first = b.dma(view(x), view(h))
    store = b.dma(view(h), view(x))
    again = b.dma(view(x), view(h))
    assert waits(b, store) == {(first, Wait.result), (first, Wait.read)}
    assert waits(b, again) == {(first, Wait.result), (store, Wait.read), (store, Wait.result)}


def test_an_event_never_waits_for_itself() -> None:
    b = Builder()
    h = b.tile(memory="hbm")
    only = b.dma(view(h), view(h))
    assert waits(b, only) == set()


def test_disjoint_columns_do_not_wait() -> None:
    b = Builder()
    x, y = b.tile(), b.tile()
    first = b.stream("memset", V, view(x, None, (0, 256, 1)))
    other = b.stream("tensor_copy", S, view(y, None, (0, 256, 1)), view(x, None, (256, 512, 1)))
    same = b.stream("tensor_copy", S, view(y, None, (256, 512, 1)), view(x, None, (0, 256, 1)))
    assert waits(b, other) == set()
    assert waits(b, same) == {(first, Wait.result)}


def test_only_the_latest_of_an_in_order_engine_and_not_twice() -> None:
    b = Builder()
    x, y, z = b.tile(), b.tile(), b.tile()
    b.stream("memset", V, view(x))
    second = b.stream("memset", V, view(y))
    third = b.stream("tensor_tensor", S, view(z), view(x), view(y))
    again = b.copy(z, y, S)
    assert waits(b, third) == {(second, Wait.result)}
    assert (second, Wait.result) not in waits(b, again)


def test_matmuls_forward_in_the_array_and_readers_wait() -> None:
    b = Builder()
    w, x, p, y = b.tile(128, 128), b.tile(), b.tile(memory="psum"), b.tile()
    b.matmul(view(p), view(w), view(x))
    second = b.matmul(view(p), view(w), view(x), accumulate=True)
    read = b.copy(y, p, V)
    again = b.matmul(view(p), view(w), view(x))
    assert waits(b, second) == set()
    assert waits(b, read) == {(second, Wait.result)}
    assert waits(b, again) == {(read, Wait.read)}


def test_registers() -> None:
    b = Builder()
    load = b.control("register_load", hidden_writes=("register:1",))
    b.control("register_move", hidden_writes=("register:2",))
    use = b.control("register_move", hidden_reads=("register:1",))
    assert waits(b, use) == {(load, Wait.result)}


def test_cores_do_not_wait_for_each_other_through_memory() -> None:
    b = Builder(lnc=2)
    h = b.tile(memory="hbm")
    b.dma(view(h), view(b.tile()))
    b.core = 1
    second = b.dma(view(b.tile()), view(h))
    assert waits(b, second) == set()


def test_reused_memory_waits_for_its_predecessor_once_per_queue() -> None:
    b = Builder()
    y = b.tile()
    for _ in range(2):
        for bank in range(8):
            p = b.tile(memory="psum")
            b.stream("memset", V, view(p, None, (0, 256, 1)))
            b.stream("memset", V, view(p, None, (256, 512, 1)))
            read = b.copy(y, p, S)
            if bank == 0 and len(b.trace.events) < 5:
                first = read
    write, later = 24, 25
    assert (first, Wait.reuse_read) in waits(b, write, placed=True)
    assert (first, Wait.reuse_read) not in waits(b, write)
    assert not {w for w in waits(b, later, placed=True) if w[1] is Wait.reuse_read}


def test_tiles_sharing_a_fixed_address_wait_for_each_other() -> None:
    b = Builder()
    x = b.tile()
    one, two = (b.tile(address=(0, 8192)) for _ in range(2))
    b.stream("memset", V, view(one))
    second = b.stream("memset", G, view(two))
    third = b.copy(x, one, S)
    assert (0, Wait.reuse_result) in waits(b, second, placed=True)
    assert (second, Wait.reuse_result) in waits(b, third, placed=True)
    assert waits(b, second) == set()


@pytest.mark.parametrize("pieces", [64, 512])
def test_work_is_linear_in_accesses(pieces: int) -> None:
    """A tensor written and read back piece by piece costs the same per piece at any length."""
    b = Builder()
    out = b.tile(128 * pieces, 64, memory="hbm")
    x = b.tile(128, 64)
    for i in range(pieces):
        b.dma(view(out, (128 * i, 128 * i + 128)), view(x))
        b.dma(view(x), view(out, (128 * i, 128 * i + 128)))
    looks = Dependencies(b.trace, None).looks
    assert looks <= 60 * len(b.trace.events)


def test_many_column_pieces_of_one_tile() -> None:
    b = Builder()
    x = b.tile(128, 4 * 1024)
    for i in range(1024):
        b.stream("memset", V, view(x, None, (4 * i, 4 * i + 4, 1)))
    dependencies = Dependencies(b.trace, None)
    assert dependencies.looks <= 60 * 1024
    assert not any(dependencies.edges)
