"""Pending matmuls: whatever the order of links, reads and overwritten operands, sums are exact."""

from __future__ import annotations

import ml_dtypes
import nki.isa as nisa
import nki.language as nl
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import nki_kernels.machine.products as products
from nki_kernels.machine.launch import launch
from nki_kernels.machine.products import MAX_LINKS

ROWS, COLUMNS, DEPTH = 3, 5, 4
EXTENT = {"w": ROWS, "d": COLUMNS}
KS = (0, 1)
GRID = [(m, n) for m in range(2) for n in range(2)]

STEPS = st.one_of(
    st.tuples(st.just("wave"), st.integers(1, 3)),
    st.tuples(st.just("link"), st.sampled_from(GRID), st.integers(0, 1), st.booleans()),
    st.tuples(st.just("rewrite"), st.sampled_from(["w", "d"]), st.integers(0, 1)),
    st.tuples(st.just("read"), st.sampled_from(GRID)),
    st.tuples(st.just("fill"), st.sampled_from(GRID)),
)


class Both:
    """The machine and plain arrays, doing the same."""

    def __init__(self, x, values):
        self.x, self.values = x, values
        self.source = iter(range(x.shape[0]))
        self.tiles = {(name, k, i): _tile(EXTENT[name]) for name in "wd" for k in KS for i in KS}
        self.arrays = {}
        self.accumulators = {
            at: nl.ndarray((ROWS, COLUMNS), nl.float32, buffer=nl.psum) for at in GRID
        }
        self.sums = {}
        self.seen, self.wanted = [], []
        for key in self.tiles:
            self.load(key)

    def load(self, key):
        row, extent = next(self.source), EXTENT[key[0]]
        nisa.dma_copy(dst=self.tiles[key], src=self.x[row, :, 0:extent])
        self.arrays[key] = self.values[row, :, :extent].astype(np.float64)

    def wave(self, times):
        for step in range(2 * times):
            for at in GRID:
                self.link(at, step % 2, step > 0)

    def link(self, at, k, adds):
        adds = adds and at in self.sums
        w, d = ("w", k, at[0]), ("d", k, at[1])
        nisa.nc_matmul(self.accumulators[at], self.tiles[w], self.tiles[d], accumulate=adds)
        product = self.arrays[w].T @ self.arrays[d]
        self.sums[at] = self.sums[at] + product if adds else product

    def rewrite(self, name, i):
        for k in KS:
            self.load((name, k, i))

    def fill(self, at):
        nisa.memset(dst=self.accumulators[at], value=0.0)
        self.sums.pop(at, None)

    def read(self, at):
        if at in self.sums:
            self.seen.append(self.accumulators[at].numpy())
            self.wanted.append(self.sums[at])


def run(steps, values):
    """Run `steps` both ways; return what the reads saw, and should have seen."""
    both = []

    def kernel(x):
        both.append(Both(x, values))
        for kind, *rest in steps:
            getattr(both[0], kind)(*rest)
        for at in GRID:
            both[0].read(at)

    launch(kernel, (values,), target="toy")
    return both[0].seen, both[0].wanted


def _tile(columns):
    return nl.ndarray((DEPTH, columns), nl.bfloat16)


def integers(steps, seed):
    rows = 8 + 2 * sum(step[0] == "rewrite" for step in steps)
    return np.random.default_rng(seed).integers(-3, 4, (rows, DEPTH, COLUMNS)).astype(np.float32)


@given(steps=st.lists(STEPS, max_size=12), seed=st.integers(0, 2**32 - 1))
def test_every_read_sees_the_sum_so_far(steps, seed):
    values = integers(steps, seed).astype(ml_dtypes.bfloat16)
    seen, wanted = run(steps, values)
    assert len(seen) == len(wanted)
    for got, want in zip(seen, wanted, strict=True):
        assert np.array_equal(got, want)


def test_a_grid_is_formed_in_one_product(monkeypatch):
    formed = []
    original = products.Products._form_grid

    def spy(self, grid, depth):
        formed.append(([len(row) for row in grid], depth))
        original(self, grid, depth)

    monkeypatch.setattr(products.Products, "_form_grid", spy)
    steps = [("wave", 3)]
    seen, wanted = run(steps, integers(steps, 0))
    assert formed == [([2, 2], 6)]
    assert all(np.array_equal(g, w) for g, w in zip(seen, wanted, strict=True))


@pytest.mark.parametrize("links", [MAX_LINKS - 1, MAX_LINKS, MAX_LINKS + 1, 3 * MAX_LINKS])
def test_long_chains_are_formed_on_the_way(links):
    steps = [("link", (0, 0), i % 2, i > 0) for i in range(links)]
    seen, wanted = run(steps, integers(steps, links))
    assert np.array_equal(seen[0], wanted[0])
