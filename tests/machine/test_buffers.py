"""Memory that launches hand on: reused, bounded, and never while somebody looks at it."""

from __future__ import annotations

import nki
import nki.isa as nisa
import nki.language as nl
import numpy as np
import pytest

from nki_kernels.machine import buffers


@pytest.fixture(autouse=True)
def empty(monkeypatch):
    monkeypatch.setattr(buffers, "_spare", {})


def given(nbytes):
    data = buffers.take(nbytes)
    buffers.give(data)
    return id(data)


def test_a_buffer_is_handed_on_to_the_next_of_its_size():
    first = given(4096)
    assert id(buffers.take(4096)) == first
    assert buffers.take(8192).nbytes == 8192


def test_a_buffer_that_is_still_looked_at_is_not_handed_on():
    data = buffers.take(4096)
    view = data.view(np.float32)[3:5]
    buffers.give(data)
    assert not buffers._spare
    del view
    buffers.give(data)
    assert len(buffers._spare[4096]) == 1


def test_what_is_kept_is_bounded(monkeypatch):
    monkeypatch.setattr(buffers, "LARGEST", 100)
    monkeypatch.setattr(buffers, "PER_SIZE", 250)
    monkeypatch.setattr(buffers, "SIZES", 3)
    several = [buffers.take(100) for _ in range(4)]
    while several:
        data = several.pop()
        buffers.give(data)
    given(101)
    assert {size: len(spare) for size, spare in buffers._spare.items()} == {100: 2}
    for size in (10, 20):
        given(size)
    assert set(buffers._spare) == {100, 10, 20}
    given(30)
    assert set(buffers._spare) == {30}


LOOKS: list[np.ndarray] = []


@nki.jit
def scaled(x):
    out = nl.ndarray(x.shape, dtype=x.dtype, buffer=nl.shared_hbm)
    tile = nl.ndarray(x.shape, dtype=x.dtype, buffer=nl.sbuf)
    nisa.dma_copy(tile, x)
    nisa.tensor_scalar(tile, tile, nl.multiply, 2.0)
    LOOKS.append(tile.numpy())
    nisa.dma_copy(out, tile)
    return out


def test_results_and_looks_of_one_launch_outlive_the_next():
    LOOKS.clear()
    x = np.arange(12.0, dtype=np.float32).reshape(3, 4)
    first = scaled(x)
    second = scaled(-x)
    assert np.array_equal(first, 2 * x)
    assert np.array_equal(second, -2 * x)
    assert np.array_equal(LOOKS[0], 2 * x)
    assert np.array_equal(LOOKS[1], -2 * x)
