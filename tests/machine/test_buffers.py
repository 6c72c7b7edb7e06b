"""Memory that launches hand on: reused, bounded, and never while somebody looks at it."""

from __future__ import annotations

import ml_dtypes
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


@nki.jit
def multiplied_then_changed(a, b, dies):
    """C = a.T @ b, looked at when its operands are no longer what they were."""
    out = nl.ndarray((a.shape[1], b.shape[1]), dtype=nl.float32, buffer=nl.shared_hbm)
    acc = nl.ndarray(out.shape, dtype=nl.float32, buffer=nl.psum)
    for half in range(2):
        weights = nl.ndarray(a.shape, dtype=a.dtype, buffer=nl.sbuf)
        data = nl.ndarray(b.shape, dtype=b.dtype, buffer=nl.sbuf)
        nisa.dma_copy(weights, a)
        nisa.dma_copy(data, b)
        nisa.nc_matmul(acc, weights, data, accumulate=half > 0)
        if dies:
            del weights, data
            for shape in (a.shape, b.shape):
                nisa.memset(nl.ndarray(shape, dtype=a.dtype, buffer=nl.sbuf), 99.0)
        else:
            nisa.memset(weights, 99.0)
            nisa.tensor_copy(data, data)
            nisa.memset(data[:, 0:1], 99.0)
    result = nl.ndarray(out.shape, dtype=nl.float32, buffer=nl.sbuf)
    nisa.tensor_copy(result, acc)
    nisa.dma_copy(out, result)
    return out


@pytest.mark.parametrize("dies", [False, True])
@pytest.mark.parametrize("dtype", [np.float32, ml_dtypes.bfloat16])
def test_a_matmul_has_the_operands_of_its_time(dtype, dies):
    a = np.arange(12).reshape(3, 4).astype(dtype)
    b = np.arange(15).reshape(3, 5).astype(dtype)
    exact = 2 * (a.astype(np.float32).T @ b.astype(np.float32))
    assert np.array_equal(multiplied_then_changed(a, b, dies), exact)
