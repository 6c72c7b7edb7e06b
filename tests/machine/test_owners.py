"""The map of who wrote what, against a plain dictionary of bytes."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nki_kernels.machine.checks.independence import _Owners
from nki_kernels.machine.trace import Access, Tile

ROWS, ROW_BYTES = 3, 16
TILE = Tile(0, "t", "hbm", (ROWS, 4), "float32", 4, ROW_BYTES, ROWS, None, 0, 0, ())


@st.composite
def accesses(draw):
    itemsize = draw(st.sampled_from([2, 4]))
    size = ROWS * ROW_BYTES // itemsize
    shape = tuple(draw(st.lists(st.integers(1, 3), min_size=1, max_size=3)))
    strides = tuple(draw(st.integers(0, 4)) for _ in shape)
    reach = sum((n - 1) * s for n, s in zip(shape, strides, strict=True))
    if reach >= size:
        shape, strides, reach = (1,), (1,), 0
    return Access(TILE, draw(st.integers(0, size - 1 - reach)), shape, strides, itemsize)


def bytes_of(access):
    for index in itertools.product(*map(range, access.shape)):
        at = access.offset + sum(i * s for i, s in zip(index, access.strides, strict=True))
        yield from range(at * access.itemsize, (at + 1) * access.itemsize)


@pytest.mark.parametrize("most", [0, 3, 64])
@given(steps=st.lists(st.tuples(st.booleans(), st.integers(0, 3), accesses()), max_size=12))
def test_who_wrote_what(most, steps):
    owners, naive = _Owners(TILE, 2, 4), {}
    owners._MOST = most
    for writes, iteration, access in steps:
        touched = set(bytes_of(access))
        if writes:
            owners.take(access, iteration)
            naive.update(dict.fromkeys(touched, iteration))
            continue
        others = {naive[b] for b in touched if b in naive} - {iteration}
        found = owners.foreign(access, iteration)
        assert found in others if others else found is None
