"""Placement: nothing alive overlaps, capacity holds, fixed addresses stay, rotation, messages."""

from __future__ import annotations

import re
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nki_kernels.hardware import TOY, TRN2, CoreSpec, Engine
from nki_kernels.machine.errors import DoesNotFit
from nki_kernels.machine.placement import Placement, place
from nki_kernels.machine.trace import ControlWork, Tile, Trace
from tests.machine.trace_builder import Builder, view


def touch(b: Builder, *tiles: Tile) -> None:
    """Record an event that reads `tiles`."""
    b.event("use", Engine.vector, ControlWork("register_move"), tuple(view(t) for t in tiles))


def lives(trace: Trace) -> dict[int, tuple[int, int]]:
    """First and last event of every tile's life; fixed addresses live from their first use."""
    found: dict[int, tuple[int, int]] = {}
    for event in trace.events:
        for access in (*event.reads, *event.writes):
            tile = access.tile
            start = tile.seq if tile.address is None else event.seq
            found[tile.id] = (found.get(tile.id, (start, 0))[0], event.seq)
    return found


def span(tile: Tile, placement: Placement, spec: CoreSpec) -> tuple[int, int]:
    """Bytes of a partition that a tile owns: in PSUM, whole banks."""
    low = placement.addresses[tile.id][1]
    if tile.memory == "sbuf":
        return low, low + tile.row_bytes
    bank = spec.psum_bank_bytes
    return low, low + -(-tile.row_bytes // bank) * bank


def check(trace: Trace) -> Placement:
    """Place a trace and check every promise of a placement against brute force."""
    placement, spec, alive = place(trace), trace.spec, lives(trace)
    tiles = [t for t in trace.tiles if t.id in alive and t.memory != "hbm"]
    assert set(placement.addresses) == {t.id for t in tiles}
    capacity = {"sbuf": spec.sbuf_usable_bytes, "psum": spec.psum_banks * spec.psum_bank_bytes}
    for tile in tiles:
        low, high = span(tile, placement, spec)
        assert 0 <= low < high <= capacity[tile.memory]
        if tile.address is not None:
            assert placement.addresses[tile.id] == tile.address
        if tile.memory == "psum":
            assert low % spec.psum_bank_bytes == 0
    for a in tiles:
        for b in tiles:
            if a.id >= b.id or (a.memory, a.core) != (b.memory, b.core):
                continue
            (a0, a1), (b0, b1) = span(a, placement, spec), span(b, placement, spec)
            shared = a0 < b1 and b0 < a1
            together = alive[a.id][0] <= alive[b.id][1] and alive[b.id][0] <= alive[a.id][1]
            if shared and together and rows_meet(a, b):
                assert a.address is not None
                assert b.address is not None
                assert b.id in placement.aliases[a.id]
                assert a.id in placement.aliases[b.id]
    check_predecessors(placement, tiles, alive, spec)
    return placement


def check_predecessors(
    placement: Placement, tiles: list[Tile], alive: dict[int, tuple[int, int]], spec: CoreSpec
) -> None:
    """Whoever owned a byte before is a predecessor, or was waited for by one."""
    by_id = {t.id: t for t in tiles}
    ancestors: dict[int, set[int]] = {}
    for tile in sorted(tiles, key=lambda t: (alive[t.id][0], t.id)):
        before = placement.predecessors.get(tile.id, ())
        for p in before:
            assert alive[p][1] < alive[tile.id][0]
            assert by_id[p].memory == tile.memory
        # An alias that came first waited too, and its uses are waited for.
        through = [*before, *(a for a in placement.aliases.get(tile.id, ()) if a in ancestors)]
        ancestors[tile.id] = set(before).union(*(ancestors[p] for p in through))
        for other in tiles:
            if (other.memory, other.core) != (tile.memory, tile.core):
                continue
            (a0, a1), (b0, b1) = span(tile, placement, spec), span(other, placement, spec)
            fixed_apart = (
                tile.address is not None
                and other.address is not None
                and not rows_meet(tile, other)
            )
            if alive[other.id][1] < alive[tile.id][0] and a0 < b1 and b0 < a1 and not fixed_apart:
                assert other.id in ancestors[tile.id]


def rows_meet(a: Tile, b: Tile) -> bool:
    if a.address is None or b.address is None:
        return True
    (ra, _), (rb, _) = a.address, b.address
    return ra < rb + b.partitions and rb < ra + a.partitions


@st.composite
def traces(draw: st.DrawFn, fixed: bool) -> Trace:
    """A trace on the toy core: tiles of random size, allocated and used in random order."""
    b = Builder(TOY)
    pool: list[Tile] = []
    for _ in range(draw(st.integers(1, 30))):
        b.core = draw(st.integers(0, 1))
        memory = draw(st.sampled_from(["sbuf", "psum"]))
        widths = (
            st.integers(1, 200)
            if memory == "sbuf"
            else st.sampled_from([1, 16, 32] if fixed else [1, 16])
        )
        address = None
        cols, rows = draw(widths), draw(st.integers(1, 8))
        if fixed and draw(st.booleans()):
            row = draw(st.integers(0, 8 - rows))
            unit = 4 if memory == "sbuf" else 64
            address = (row, unit * draw(st.integers(0, 3)))
            cols = min(cols, 16)
        pool.append(b.tile(rows, cols, memory=memory, address=address))  # type: ignore[arg-type]
        mine = [t for t in pool if t.core == b.core][-3:]
        used = draw(st.lists(st.sampled_from(mine), max_size=3, unique_by=lambda t: t.id))
        touch(b, *used)
    return b.trace


@given(traces(fixed=False))
def test_automatic_tiles(trace: Trace) -> None:
    check(trace)


@given(traces(fixed=True))
def test_fixed_and_automatic_tiles(trace: Trace) -> None:
    try:
        check(trace)
    except DoesNotFit:
        # Around fixed addresses the toy's small memories can run out; without them they cannot.
        assert any(t.address is not None for t in trace.tiles)


def test_unused_tiles_are_dropped() -> None:
    b = Builder()
    b.tile()
    used = b.tile()
    touch(b, used)
    assert set(place(b.trace).addresses) == {used.id}


def test_the_memory_free_the_longest_goes_first() -> None:
    b = Builder(TOY)
    for _ in range(12):
        touch(b, b.tile(8, 256))
    placement = place(b.trace)
    assert placement.strategies == {(0, "sbuf"): "rotation"}
    offsets = [placement.addresses[t.id][1] for t in b.trace.tiles]
    assert offsets == [0, 1024, 2048, 3072] * 3
    assert placement.predecessors == {i: (i - 4,) for i in range(4, 12)}


def test_oldest_free_memory_is_taken_before_newer() -> None:
    b = Builder(TOY)
    a, c, d, e = (b.tile(8, 256) for _ in range(4))
    for order in (c, a, e, d):
        touch(b, order)
    new = [b.tile(8, 256) for _ in range(4)]
    touch(b, *new)
    placement = place(b.trace)
    where = [placement.addresses[t.id] for t in new]
    assert where == [placement.addresses[t.id] for t in (c, a, e, d)]


def test_fragmentation_falls_back_to_first_fit() -> None:
    b = Builder(TOY)
    # Rotation walks on through memory and leaves long-lived tiles scattered over it.
    keep = []
    for _ in range(4):
        keep.append(b.tile(8, 16))
        touch(b, b.tile(8, 240), keep[-1])
    big = b.tile(8, 960)
    touch(b, big, *keep)
    placement = check(b.trace)
    assert placement.strategies == {(0, "sbuf"): "first fit"}
    assert placement.peak_sbuf_bytes == 4 * 64 + 3840
    assert set(placement.peak_sbuf_tiles) == {big.id, *(t.id for t in keep)}


def test_peak_and_live_set() -> None:
    b = Builder(TRN2)
    a, c = b.tile(128, 100), b.tile(128, 50)
    touch(b, a, c)
    d = b.tile(128, 120)
    touch(b, a, d)
    p, q = b.tile(128, 512, memory="psum"), b.tile(128, 600, memory="psum")
    touch(b, p, q)
    placement = place(b.trace)
    assert placement.peak_sbuf_bytes == 880
    assert placement.peak_sbuf_tiles == (a.id, d.id)
    assert placement.peak_psum_banks == 3
    assert placement.peak_psum_tiles == (p.id, q.id)


def test_many_tiles_declared_over_one_address_up_front() -> None:
    b = Builder()
    tiles = [b.tile(memory="psum", address=(0, 2048)) for _ in range(6)]
    for tile in tiles:
        touch(b, tile)
    placement = check(b.trace)
    assert placement.aliases == {}
    assert placement.predecessors == {b.id: (a.id,) for a, b in pairwise(tiles)}
    assert placement.peak_psum_banks == 1


def test_fixed_tiles_in_other_partitions_do_not_meet() -> None:
    b = Builder()
    low, high = b.tile(64, 512, address=(0, 0)), b.tile(64, 512, address=(64, 0))
    touch(b, low)
    touch(b, high)
    assert place(b.trace).predecessors == {}


def test_automatic_tiles_keep_out_of_later_fixed_addresses() -> None:
    b = Builder(TOY)
    early = b.tile(8, 256)
    touch(b, early)
    fixed = b.tile(8, 256, address=(0, 0))
    touch(b, early, fixed)
    placement = check(b.trace)
    assert placement.addresses[early.id] == (0, 1024)


def test_memory_of_a_dead_fixed_tile_serves_when_space_is_short() -> None:
    b = Builder(TOY)
    fixed = b.tile(8, 768, address=(0, 0))
    touch(b, fixed)
    big = b.tile(8, 1024)
    touch(b, big)
    placement = check(b.trace)
    assert placement.addresses[big.id] == (0, 0)
    assert placement.predecessors == {big.id: (fixed.id,)}


def test_does_not_fit_names_the_live_tiles() -> None:
    b = Builder(TOY)
    code = compile("x = 1\n", "kernel.py", "exec")
    held = [b.tile(8, 300, site=((code, 2),)) for _ in range(2)]
    last = b.tile(8, 500)
    touch(b, last, *held)
    with pytest.raises(DoesNotFit) as caught:
        place(b.trace)
    text = str(caught.value)
    assert re.search(r"SBUF tile 't2' \[8, 500\] float32 needs 2,000 B per partition", text)
    assert "4,096 B are usable, and 2 live tiles hold 2,400 B" in text
    assert "Use smaller tiles, or finish with some of these before it is allocated" in text
    assert "1 x 1,200 B: SBUF tile 't0' [8, 300] float32, allocated at kernel.py:1" in text


def test_does_not_fit_psum() -> None:
    b = Builder(TOY)
    tiles = [b.tile(8, 16, memory="psum") for _ in range(5)]
    touch(b, *tiles)
    with pytest.raises(DoesNotFit, match=r"needs 1 banks and does not fit: 4 banks exist, and 4"):
        place(b.trace)


def test_does_not_fit_alone() -> None:
    b = Builder(TOY)
    touch(b, b.tile(8, 2000))
    with pytest.raises(DoesNotFit, match="none: the tile alone is too large"):
        place(b.trace)


def test_a_long_list_of_live_tiles_is_cut() -> None:
    b = Builder(TOY)
    tiles = [b.tile(8, 60 + i) for i in range(20)]
    touch(b, *tiles)
    with pytest.raises(DoesNotFit, match=r"and \d+ more lines"):
        place(b.trace)


@pytest.mark.parametrize("address", [(0, 4000), (1, 0)])
def test_fixed_address_outside(address: tuple[int, int]) -> None:
    b = Builder(TOY)
    touch(b, b.tile(8, 64, address=address))
    with pytest.raises(DoesNotFit, match=r"at address \(\d, \d+\) reaches partition .* move it"):
        place(b.trace)


def test_placement_repeats() -> None:
    def once() -> Placement:
        b = Builder()
        tiles = [b.tile(128, 100 + 7 * (i % 5)) for i in range(200)]
        for i in range(200):
            touch(b, tiles[i], tiles[i // 2])
        return place(b.trace)

    assert once() == once()
