"""Bugs of memory: bounds, unwritten bytes, capacity, shared addresses, accumulation groups."""

from __future__ import annotations

import nki.isa as nisa
import nki.language as nl
import numpy as np

from tests.sanitizer.bug import Bug, filled, hbm, loaded, ones, pair, ps, sb, stored

X = (ones(4, 4),)
SKIP, ERROR = nisa.oob_mode.skip, nisa.oob_mode.error


# -- bounds ----------------------------------------------------------------------------------------


def sliced(stop, x):
    return stored(loaded(x)[:, 0:stop])


def indexed(row, x):
    return stored(loaded(x)[:, row : row + 1])


def window(offset, x):
    return stored(loaded(x).ap([[4, 4], [1, 2]], offset=offset))


def gathered(mode, x, rows):
    index = loaded(rows)
    tile = filled(4, 4)
    nisa.dma_copy(
        dst=tile, src=x.ap([[4, 4], [1, 4]], vector_offset=index, indirect_dim=0), oob_mode=mode
    )
    return stored(tile)


def scattered(mode, x, rows):
    index = loaded(rows)
    out = hbm(4, 4)
    nisa.dma_copy(dst=out, src=filled(4, 4))
    target = out.ap([[4, 4], [1, 4]], vector_offset=index, indirect_dim=0)
    nisa.dma_copy(dst=target, src=loaded(x), oob_mode=mode)
    return out


def padded(*rows):
    return np.array([[r] for r in rows], np.int32)


BOUNDS = [
    Bug("a slice past the end", "bounds", *pair(sliced, 5, 4),
        ("index 0:5 is outside dimension 1 of size 4",), X, stops=True),
    Bug("an index past the end", "bounds", *pair(indexed, 4, 3),
        ("is outside dimension 1 of size 4",), X, stops=True),
    Bug("a pattern past the row", "bounds", *pair(window, 3, 2),
        ("ap reaches element 16 of a tile of 16 elements",), X, stops=True),
    Bug("a gather by a padding index", "bounds", *pair(gathered, ERROR, SKIP),
        ("row 3 of its run-time addresses", "oob_mode=nisa.oob_mode.skip"),
        (*X, padded(0, 1, 2, -1))),
    Bug("a scatter past the tensor", "bounds", *pair(scattered, ERROR, SKIP),
        ("row 2 of its run-time addresses starts at element 16",), (*X, padded(0, 1, 4, 2))),
]  # fmt: skip


# -- uninitialized and outputs ---------------------------------------------------------------------


def partly_written(columns, x):
    tile = sb(4, 4)
    nisa.dma_copy(dst=tile[:, 0:columns], src=x[:, 0:columns])
    return stored(tile)


def reused_body(inside, x):
    total = filled(4, 4, value=0)
    carried = sb(4, 4)
    out = hbm(4, 4)

    def body(_):
        scratch = sb(4, 4) if inside else carried
        if not inside:
            nisa.memset(scratch, 1.0)
        nisa.tensor_tensor(total, total, scratch, nl.add)

    nl.fori_loop(0, 2, body)
    nisa.dma_copy(dst=out, src=total)
    return out


def accumulator(clears, x):
    total = filled(4, 4, value=0)
    if clears:
        nisa.memset(first := sb(4, 1), 1.0)
    else:
        first = sb(4, 1)
    nisa.tensor_scalar(total, loaded(x), nl.add, first)
    return stored(total)


def output_rows(rows, x):
    out = hbm(4, 4)
    nisa.dma_copy(dst=out[0:rows, :], src=loaded(x)[0:rows, :])
    return out


def remainder(stop, x):
    out = hbm(4, 5)
    for start in range(0, stop, 2):
        width = min(2, 5 - start)
        nisa.dma_copy(dst=out[:, start : start + width], src=loaded(x)[:, 0:width])
    return out


WRITTEN = [
    Bug("a tail nobody loaded", "uninitialized", *pair(partly_written, 3, 4),
        ("src reads 4 of 16 elements that no instruction wrote", "first at index (0, 3)"), X),
    Bug("last iteration's memory", "uninitialized", *pair(reused_body, True, False),
        ("data2 reads 16 of 16 elements",), X),
    Bug("a vector operand nobody set", "uninitialized", *pair(accumulator, False, True),
        ("operand0 reads 4 of 4 elements",), X),
    Bug("output rows nobody wrote", "outputs", *pair(output_rows, 3, 4),
        ("has 4 of 16 elements that no instruction wrote",), X),
    Bug("a remainder left out", "outputs", *pair(remainder, 4, 5),
        ("has 4 of 20 elements that no instruction wrote", "first at [0, 4]"), X),
]  # fmt: skip


# -- capacity and alias ----------------------------------------------------------------------------


def held(count, x):
    tiles = [filled(128, 16384) for _ in range(count)]
    out = hbm(128, 16384)
    for tile in tiles:
        nisa.dma_copy(dst=out, src=tile)
    return out


def sums_held(count, x):
    tiles = [ps(4, 512) for _ in range(count)]
    for tile in tiles:
        nisa.memset(tile, 0.0)
    return tuple(stored(tile) for tile in tiles)


def two_at(addresses, x):
    a = sb(4, 4, address=(0, addresses[0]))
    b = sb(4, 4, address=(0, addresses[1]))
    nisa.dma_copy(dst=a, src=x)
    nisa.memset(b, 0.0)
    return stored(a)


def rotated(buffers, x):
    ring = [sb(4, 4, address=(0, 16 * (i % buffers))) for i in range(3)]
    for tile in ring:
        nisa.dma_copy(dst=tile, src=x)
    return tuple(stored(tile) for tile in ring)


def banks_at(banks, x):
    a, b = (ps(4, 4, address=(0, 2048 * bank)) for bank in banks)
    for tile in (a, b):
        nisa.nc_matmul(tile, loaded(x), loaded(x), accumulate=False)
    return stored(a)


PLACES = [
    Bug("four tiles of 64 KiB", "capacity", *pair(held, 4, 3),
        ("does not fit", "3 live tiles hold"), X),
    Bug("nine PSUM banks", "capacity", *pair(sums_held, 9, 8),
        ("needs 1 banks and does not fit: 8 banks exist",), X),
    Bug("two tiles at overlapping addresses", "alias", *pair(two_at, (0, 8), (0, 16)),
        ("last written through tile",), X),
    Bug("a ring one buffer short", "alias", *pair(rotated, 2, 3),
        ("last written through tile",), X),
    Bug("a PSUM bank reused before it is read", "alias", *pair(banks_at, (0, 0), (0, 1)),
        ("reads bytes of the psum tile",), X),
]  # fmt: skip


# -- accumulation and interleave -------------------------------------------------------------------


def summed(flags, x):
    acc = ps(4, 4)
    tile = loaded(x)
    for flag in flags:
        nisa.nc_matmul(acc, tile, tile, accumulate=flag)
    return stored(acc)


def on_memset(flag, x):
    acc = ps(4, 4)
    nisa.memset(acc, 0.0)
    nisa.nc_matmul(acc, loaded(x), loaded(x), accumulate=flag)
    return stored(acc)


def read_between(flag, x):
    acc = ps(4, 4)
    tile = loaded(x)
    nisa.nc_matmul(acc, tile, tile)
    first = stored(acc)
    nisa.nc_matmul(acc, tile, tile, accumulate=flag)
    return first, stored(acc)


def in_a_loop(inside, x):
    tile = loaded(x)
    outer = ps(4, 4)
    total = filled(4, 4, value=0)

    def body(_):
        acc = ps(4, 4) if inside else outer
        nisa.nc_matmul(acc, tile, tile)
        nisa.tensor_tensor(total, total, acc, nl.add)

    nl.fori_loop(0, 2, body)
    return stored(total)


def two_groups(apart, x):
    tile = loaded(x)
    whole = ps(4, 1024)
    second = 512 if apart else 4
    views = (whole[:, 0:4], whole[:, second : second + 4])
    for k in range(2):
        for view in views:
            nisa.nc_matmul(view, tile, tile, accumulate=k > 0)
    return tuple(stored(view) for view in views)


def groups_in_turn(turn, x):
    tile = loaded(x)
    acc = ps(4, 8)
    views = (acc[:, 0:4], acc[:, 4:8])
    order = (
        [(v, k) for v in views for k in range(2)]
        if turn
        else [(v, k) for k in range(2) for v in views]
    )
    for view, k in order:
        nisa.nc_matmul(view, tile, tile, accumulate=None if k else False)
    return stored(acc)


GROUPS = [
    Bug("a group that never started", "accumulation",
        *pair(summed, (True, True), (False, True)),
        ("accumulate=True on elements of tile", "pass accumulate=(k > 0)"), X),
    Bug("adding to what memset wrote", "accumulation", *pair(on_memset, True, None),
        ("that no matmul of the tile has written",), X),
    Bug("inferred sums go on after a read", "accumulation", *pair(read_between, None, True),
        ("accumulate=None adds to elements", "pass accumulate=True to go on"), X),
    Bug("the first write of every iteration", "accumulation", *pair(in_a_loop, False, True),
        ("accumulate=None inside a device loop",), X),
    Bug("two groups alternate in a bank", "interleave", *pair(two_groups, False, True),
        ("continues the accumulation group", "began another group in the same PSUM bank"), X),
    Bug("inferred groups alternate in a bank", "interleave", *pair(groups_in_turn, False, True),
        ("continues the accumulation group", "give each a bank of its own"), X),
]  # fmt: skip

BUGS = [*BOUNDS, *WRITTEN, *PLACES, *GROUPS]
