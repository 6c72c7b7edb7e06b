"""Worked examples of views: indexing, access patterns and run-time addresses, with their results.

Source: the language guide, its page on access patterns, and the docstring of `NkiTensor.ap`.
"""

from __future__ import annotations

from typing import Any

import nki.isa as nisa
import nki.language as nl
import numpy as np
import pytest

from nki_kernels.machine.errors import OutOfBounds
from nki_kernels.machine.launch import launch
from tests.embedded.harness import HBM, sb, tile, values
from tests.semantics.test_vectors import F32, on, row


@pytest.mark.parametrize(
    ("key", "shape"),
    [
        ((slice(None), 0, 10), (64, 1)),
        ((0, 0, 10), (1, 1)),
        ((0,), (1, 64, 64)),
        ((slice(None), slice(None), slice(None, None, 2)), (64, 64, 32)),
    ],
)
def test_indexing_on_chip(key: Any, shape: tuple[int, ...]) -> None:
    seen: list[Any] = []

    def kernel() -> None:
        seen.append(sb(64, 64, 64)[key])

    launch(kernel, target="trn2")
    assert seen[0].shape == shape


def counted(*shape: int) -> Any:
    return np.arange(np.prod(shape), dtype=F32).reshape(shape)


def test_access_pattern_in_sbuf() -> None:
    def call(x: Any) -> Any:
        t = tile(x)
        one, two = sb(16, 8), sb(4, 16)
        nisa.tensor_copy(dst=one, src=t.ap([[16, 16], [1, 8]], offset=8))
        nisa.dma_copy(dst=two, src=t.ap([[16, 4], [1, 16]], offset=8 * 16))
        return one, two

    one, two = values(call, counted(16, 16), target="trn2")
    assert one[3, 2] == 58
    assert np.array_equal(two, counted(16, 16)[8:12])


@pytest.mark.parametrize("through", ["ap", "view"])
def test_bits_seen_as_another_type_are_little_endian(through: str) -> None:
    def call(x: Any) -> Any:
        t, dst = tile(x), sb(1, 4, dtype=nl.bfloat16)
        seen = t.view(nl.bfloat16)
        if through == "ap":
            seen = t.ap([[4, 1], [1, 4]], dtype=nl.bfloat16)
        nisa.tensor_copy(dst=dst, src=seen)
        return dst

    assert on(call, row(0x40003F80, 0xC0404080 - 2**32, dtype=np.int32)) == [[1, 2, 4, -3]]


def test_scalar_offset_counts_in_units_of_its_dimension() -> None:
    def call(x: Any) -> Any:
        s, dst = sb(1, 1, dtype=nl.int32), sb(1, 2)
        nisa.memset(dst=s, value=2)
        pattern = [[2, 1], [1, 2]]
        nisa.dma_copy(dst=dst, src=x.ap(pattern, offset=6, scalar_offset=s, indirect_dim=1))
        return dst

    assert on(call, counted(4, 3, 2)) == [[10, 11]]


def test_scalar_offset_of_whole_rows() -> None:
    def call(x: Any) -> Any:
        s, dst = sb(1, 1, dtype=nl.int32), sb(128, 256)
        nisa.memset(dst=s, value=3 * 128)
        nisa.dma_copy(dst=dst, src=x.ap([[512, 128], [1, 256]], scalar_offset=s, indirect_dim=0))
        return dst

    table = counted(512, 512)
    assert np.array_equal(values(call, table, target="trn2"), table[384:, :256])


def gather(index: list[int], mode: Any, fill: float = 7) -> Any:
    def call(x: Any, i: Any) -> Any:
        dst = sb(2, 2)
        nisa.memset(dst=dst, value=fill)
        view = x.ap([[99, 2], [1, 2]], offset=1, vector_offset=tile(i))
        nisa.dma_copy(dst=dst, src=view, oob_mode=mode)
        return dst

    return on(call, counted(4, 3), np.array(index, np.int32).reshape(2, 1))


def test_vector_offset_ignores_the_first_step() -> None:
    assert gather([2, 0], nisa.oob_mode.error) == [[7, 8], [1, 2]]


def test_vector_offset_out_of_bounds() -> None:
    assert gather([-1, 3], nisa.oob_mode.skip) == [[7, 7], [10, 11]]
    with pytest.raises(OutOfBounds):
        gather([-1, 3], nisa.oob_mode.error)


def test_every_second_row() -> None:
    def call(x: Any) -> Any:
        index, dst = sb(64, 1, dtype=nl.int32), sb(64, 512)
        nisa.iota(dst=index, pattern=[[0, 1]], channel_multiplier=2)
        nisa.dma_copy(dst=dst, src=x.ap([[512, 64], [1, 512]], vector_offset=index))
        return dst

    table = counted(128, 512)
    assert np.array_equal(values(call, table, target="trn2"), table[::2])


def test_scatter_drops_the_rows_past_the_end() -> None:
    def call(x: Any) -> Any:
        table = nl.ndarray((3, 2), nl.float32, buffer=HBM)
        s, zero = sb(1, 1, dtype=nl.int32), sb(3, 2)
        nisa.memset(dst=s, value=2)
        nisa.memset(dst=zero, value=0.0)
        nisa.dma_copy(dst=table, src=zero)
        nisa.dma_copy(
            dst=table.ap([[2, 2], [1, 2]], scalar_offset=s), src=tile(x),
            oob_mode=nisa.oob_mode.skip,
        )  # fmt: skip
        return table

    assert on(call, np.array([[1, 2], [3, 4]], F32)) == [[0, 0], [0, 0], [1, 2]]


def test_a_destination_of_step_zero_keeps_the_last_element() -> None:
    def call(x: Any) -> Any:
        d = sb(1, 1)
        nisa.tensor_copy(dst=d.ap([[1, 1], [0, 3]]), src=tile(x))
        return d

    assert on(call, row(1, 2, 3)) == [[3]]
