"""iota against nested loops of Python integers, the wrap at 32 bits, and the cast."""

from __future__ import annotations

import itertools

import nki.isa as nisa
import nki.language as nl
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from nki_kernels.machine.errors import AbstractValue
from tests.embedded.harness import FLOATS, HOSTS, INTEGERS, apply, cast, rows, same, sb, values

pairs = st.tuples(st.integers(-9, 9), st.integers(1, 3))
int32 = st.integers(-(2**31), 2**31 - 1)


def naive(partitions, pattern, offset, multiplier):
    """The loops of the documents, in integers of any size, wrapped to int32."""
    steps = [step for step, _ in pattern]
    return np.array([
        [
            (offset + p * multiplier + sum(s * i for s, i in zip(steps, index, strict=True))
             + 2**31) % 2**32 - 2**31
            for index in itertools.product(*[range(count) for _, count in pattern])
        ]
        for p in range(partitions)
    ])  # fmt: skip


def iota(partitions, pattern, dtype, **options):
    count = int(np.prod([n for _, n in pattern]))

    def call(dst):
        nisa.iota(dst, pattern, **options)

    return apply(call, shape=(partitions, count), dtype=dtype)


@given(p=rows, pattern=st.lists(pairs, min_size=1, max_size=4), offset=int32, multiplier=int32)
def test_iota_wraps_at_32_bits(p, pattern, offset, multiplier):
    lists = [list(pair) for pair in pattern]
    got = iota(p, lists, nl.int32, offset=offset, channel_multiplier=multiplier)
    same(got, naive(p, pattern, offset, multiplier).astype(np.int32))


@pytest.mark.parametrize("kind", [*FLOATS, *INTEGERS])
@given(p=rows, pattern=st.lists(pairs, min_size=1, max_size=3), offset=st.integers(-300, 300))
def test_iota_casts_once(kind, p, pattern, offset):
    want = naive(p, pattern, offset, 7)
    same(iota(p, pattern, kind, offset=offset, channel_multiplier=7), cast(want, kind))


def test_large_integers_reach_int32_exactly_and_bfloat16_rounded():
    got = iota(1, [[1, 3]], nl.int32, offset=2**30 + 1)
    same(got, np.array([[2**30 + 1, 2**30 + 2, 2**30 + 3]], np.int32))
    rounded = iota(1, [[1, 2]], nl.bfloat16, offset=255)
    same(rounded, np.array([[255, 256]], HOSTS[nl.bfloat16]))


def test_example_19():
    got = iota(2, [[10, 2], [1, 3]], nl.int32, offset=100, channel_multiplier=1000)
    first = np.array([100, 101, 102, 110, 111, 112], np.int32)
    same(got, np.stack([first, first + 1000]))


def test_partitions_count_from_the_start_of_the_view():
    def kernel():
        t = sb(8, 2, dtype=nl.int32)
        nisa.iota(t[4:8], [[1, 2]], channel_multiplier=10)
        return t[4:8]

    same(values(kernel), np.array([[0, 1], [10, 11], [20, 21], [30, 31]], np.int32))


def test_the_offset_may_be_a_register():
    def kernel():
        t, at = sb(2, 2, dtype=nl.int32), nisa.register_alloc(40)
        nisa.iota(t, [[1, 2]], offset=at, channel_multiplier=2)
        return t

    same(values(kernel), np.array([[40, 41], [42, 43]], np.int32))


def test_a_register_without_a_value_is_refused():
    def kernel():
        nisa.iota(sb(2, 2), [[1, 2]], offset=nisa.register_alloc())

    with pytest.raises(AbstractValue, match="read before a value was moved or loaded"):
        values(kernel)


def test_a_destination_of_several_dimensions():
    def call(dst):
        nisa.iota(dst, [[4, 6]], offset=1)

    got = apply(call, shape=(1, 2, 3), dtype=nl.float32)
    same(got, np.array([[[1, 5, 9], [13, 17, 21]]], np.float32))
