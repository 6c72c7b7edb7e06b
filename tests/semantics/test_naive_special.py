"""Infinities, NaN, signed zeros, subnormals and overflow against the naive machine."""

from __future__ import annotations

from typing import Any

import nki.isa as nisa
import nki.language as nl
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.embedded.harness import FLOATS, HOSTS, INTEGERS
from tests.semantics.both import Base, Call, Operand, agree

KINDS = (*FLOATS, nl.float8_e4m3, nl.float8_e5m2, *INTEGERS)
#: Every power of two from the subnormals of float32 up, halfway cases, and what is no number.
NUMBERS = np.array(
    [0.0, -0.0, np.inf, -np.inf, np.nan, 3.4028235e38, -3.4028235e38, 1e-45, -1e-45, 65504, 65520,
     240, 248, 256, 57344, 61440, 0.5, 1.5, 2.5, -0.5, 127.5, 128.5, 255.5, 32767.5, 65535.5,
     2147483520.0, 2147483648.0, 4294967296.0, -2147483648.0, -2147483904.0, 1 + 2.0**-8,
     1 + 3 * 2.0**-8, 2.0**-133, 2.0**-134, 3 * 2.0**-134, 2.0**-24, 2.0**-25, 3 * 2.0**-25,
     *(2.0**e for e in range(-149, 128, 9))],
    np.float32,
)  # fmt: skip


def whole(bits: Any, dtype: Any) -> Operand:
    return Operand(Base(bits, dtype), (slice(0, bits.shape[0]), slice(0, bits.shape[1])))


def special(dtype: Any) -> Any:
    """The numbers in a type (integers: their ends), [1, n]."""
    host = np.dtype(HOSTS[dtype])
    if host.kind in "iu":
        info = np.iinfo(host)
        return np.array([[info.min, info.max, 0, 1, info.max // 2, info.max - 1]], host)
    with np.errstate(over="ignore"):
        return NUMBERS.astype(host)[None, :]


@pytest.mark.parametrize("target", KINDS)
@pytest.mark.parametrize("source", KINDS)
@pytest.mark.parametrize("name", ["tensor_copy", "dma_copy"])
def test_conversions(name: str, source: Any, target: Any) -> None:
    bits = special(source)
    dst = whole(np.zeros(bits.shape, HOSTS[target]), target)
    only = {"engine": nisa.engine.vector} if name == "tensor_copy" else {}
    agree(Call(name, {"dst": dst, "src": whole(bits, source)}, only))


OPERATORS = (
    "add", "subtract", "multiply", "equal", "not_equal", "less", "less_equal", "greater",
    "greater_equal", "logical_and", "logical_or", "logical_xor",
)  # fmt: skip


@given(
    st.sampled_from(OPERATORS),
    st.lists(st.sampled_from(range(len(NUMBERS))), min_size=1, max_size=16),
    st.sampled_from(KINDS),
    st.randoms(use_true_random=False),
)
def test_operators(op: str, chosen: list[int], target: Any, random: Any) -> None:
    """Pairs of special numbers; the result converted to every type."""
    left = NUMBERS[chosen][None, :]
    right = NUMBERS[[random.randrange(len(NUMBERS)) for _ in chosen]][None, :]
    dst = whole(np.zeros(left.shape, HOSTS[target]), target)
    arguments = {"data1": whole(left, nl.float32), "data2": whole(right, nl.float32), "op": op}
    agree(Call("tensor_tensor", {"dst": dst, **arguments}))


def test_reciprocal() -> None:
    bits = special(nl.float32)
    dst = whole(np.zeros(bits.shape, np.float32), nl.float32)
    agree(Call("reciprocal", {"dst": dst, "data": whole(bits, nl.float32)}))


@pytest.mark.parametrize("number", [np.inf, -np.inf, 3.4028235e38, 1e-45, -0.0])
@pytest.mark.parametrize("op", ["add", "multiply", "less"])
def test_immediates(op: str, number: float) -> None:
    bits = special(nl.float32)
    dst = whole(np.zeros(bits.shape, np.float32), nl.float32)
    arguments = {"data": whole(bits, nl.float32), "op0": op, "operand0": number}
    agree(Call("tensor_scalar", {"dst": dst, **arguments}))
