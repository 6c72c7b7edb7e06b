"""Instructions of the fourth generation against the naive machine, and AWS's corrections of MX."""

from __future__ import annotations

from typing import Any

import ml_dtypes
import nki.isa as nisa
import nki.language as nl
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.embedded.harness import FLOATS, INTEGERS, PSUM, sb, tile, values
from tests.semantics.both import (
    CORE,
    TOY4,
    Base,
    Call,
    Indirect,
    Operand,
    agree,
    operand,
    vector,
)
from tests.semantics.naive_compute import EXACT

PAIRS = (
    ("multiply", "add"), ("multiply", "subtract"), ("multiply", "bypass"), ("add", "bypass"),
    ("subtract", "bypass"), ("bypass", "bypass"),
)  # fmt: skip
FP8X4 = (nl.float8_e4m3fn_x4, nl.float8_e5m2_x4)
flags = st.booleans()
kinds = st.sampled_from([*FLOATS, *INTEGERS])


@given(st.data(), st.integers(1, 8), st.integers(1, 12), st.sampled_from(PAIRS))
def test_activate2(d: Any, p: int, n: int, pair: tuple[str, str]) -> None:
    function = d.draw(st.sampled_from([*(f for f in EXACT if f != "sqrt"), "prelu"]))
    data = operand(d.draw, p, n, d.draw(kinds))
    dst = operand(d.draw, p, n, d.draw(kinds), written=True)
    res = vector(d.draw, p, d.draw(st.sampled_from(FLOATS)), written=True)

    def number() -> Any:
        one = st.sampled_from([1.0, -2.5, 0.25, 3])
        return vector(d.draw, p) if d.draw(flags, label="vector") else d.draw(one)

    reduce_op = d.draw(st.sampled_from(["add", "maximum", "minimum", "abs_max", "abs_min"]))
    commands = ["reset_reduce", "reduce", "idle", "reset"][: d.draw(st.integers(1, 4))]
    if function == "reciprocal":
        commands = commands[:1]  # a sum of infinities of both signs is no number
    calls = []
    for command in commands:
        arguments = {
            "dst": dst, "op": function, "data": data, "imm0": number(), "imm1": number(),
            "op0": pair[0], "op1": pair[1], "relu_param": number(),
            "reverse0": pair[0] != "bypass" and d.draw(flags),
            "reverse1": pair[1] != "bypass" and d.draw(flags),
            "reduce_op": reduce_op, "reduce_res": res, "reduce_cmd": command,
        }  # fmt: skip
        calls.append(Call("activate2", arguments))
    agree(*calls, target=TOY4, signed_zeros=False)


# -- tensor indirection: groups of CORE partitions share a list of offsets -------------------------


def chosen(d: Any, p: int, columns: int, kind: Any, *, written: bool = False) -> Indirect:
    """`columns` columns of a tile by offsets; those of a written operand differ."""
    held = columns + d.draw(st.integers(0, 4), label="more columns")
    base = operand(d.draw, p, held, kind, start=0, written=True)
    rng = np.random.default_rng(d.draw(st.integers(0, 2**16)))
    width = -(-columns // CORE)
    bits = np.zeros((p, width), np.uint32)
    for first in range(0, p, CORE):
        picked = rng.permutation(held) if written else rng.integers(0, held, held)
        for i in range(columns):
            bits[first + i % CORE, i // CORE] = picked[i]
    index = Operand(Base(bits, nl.uint32), (slice(0, p), slice(0, width)))
    return Indirect(base, index, columns)


@given(
    st.data(),
    st.sampled_from([CORE, 2 * CORE]),
    st.integers(2, 8),
    st.sampled_from(["tensor_copy", "tensor_scalar", "tensor_tensor", "activation"]),
)
def test_indirect_operands(d: Any, p: int, n: int, name: str) -> None:
    """A gather, a scatter or both, in instructions of each kind."""
    gathers, scatters = d.draw(st.sampled_from([(True, False), (False, True), (True, True)]))
    source, target = d.draw(kinds), d.draw(kinds)
    data = chosen(d, p, n, source) if gathers else operand(d.draw, p, n, source, start=0)
    dst: Any = operand(d.draw, p, n, target, start=0, written=True)
    if scatters:
        dst = chosen(d, p, n, target, written=True)
    arguments: dict[str, Any] = {
        "tensor_copy": {"src": data},
        "tensor_scalar": {"data": data, "op0": "subtract", "operand0": 1.5},
        "tensor_tensor": {
            "data1": data, "data2": operand(d.draw, p, n, nl.float32, start=0), "op": "add",
        },
        "activation": {"op": "square", "data": data, "scale": -0.5},
    }[name]  # fmt: skip
    only = {"engine": nisa.engine.vector} if name.startswith("tensor") else {}
    agree(Call(name, {"dst": dst, **arguments}, only), target=TOY4)


# -- microscaling, on the real sizes: a block has 8 partitions -------------------------------------


def at_zero(bits: Any, dtype: Any, start: int = 0, buffer: Any = nl.sbuf) -> Operand:
    """All columns of a tile from a partition on."""
    key = (slice(start, bits.shape[0]), slice(0, bits.shape[1]))
    return Operand(Base(bits, dtype, buffer), key)


def scales(rng: Any, columns: int, start: int, low: int = 126, high: int = 129) -> Operand:
    bits = rng.integers(low, high, (128, columns)).astype(np.uint8)
    return at_zero(bits, nl.uint8, start)


quadrants = st.sampled_from([32, 64, 96, 128])
seeds = st.integers(0, 2**16).map(np.random.default_rng)
starts = st.sampled_from([0, 4, 8, 12])


@given(quadrants, st.integers(1, 3), st.sampled_from(FP8X4), starts, seeds, flags)
def test_quantize_mx(p: int, columns: int, kind: Any, start: int, rng: Any, half: bool) -> None:
    """Also blocks of zeros, and scale tiles that begin inside a quadrant."""
    host = np.float16 if half else ml_dtypes.bfloat16
    values_of = rng.standard_normal((p, 4 * columns)) * 2.0 ** rng.integers(-8, 8)
    values_of[: 8 * int(rng.integers(0, 3))] = 0
    src = at_zero(values_of.astype(host), nl.float16 if half else nl.bfloat16)
    dst = at_zero(rng.integers(0, 2**32, (p, columns), dtype=np.uint32), kind)
    scale = scales(rng, columns, start)
    call = Call("quantize_mx", {"dst": dst, "src": src, "dst_scale": scale})
    agree(call, target="trn3")


def packed(rng: Any, p: int, columns: int, kind: Any) -> Operand:
    """Small integers, four to an element: their sums are exact in any order."""
    if kind == nl.float4_e2m1fn_x4:
        return at_zero(rng.integers(0, 2**16, (p, columns)).astype(np.uint16), kind)
    host = ml_dtypes.float8_e4m3fn if kind == nl.float8_e4m3fn_x4 else ml_dtypes.float8_e5m2
    numbers = rng.integers(-4, 5, (p, 4 * columns)).astype(host)
    return at_zero(np.ascontiguousarray(numbers).view(np.uint32), kind)


@given(
    st.data(),
    quadrants,
    st.sampled_from([2, 4]),
    st.integers(1, 4),
    starts,
    seeds,
)
def test_nc_matmul_mx(d: Any, p: int, m: int, n: int, start: int, rng: Any) -> None:
    every = st.sampled_from([*FP8X4, nl.float4_e2m1fn_x4])
    bits = rng.standard_normal((m, n)).astype(np.float32)
    dst = at_zero(np.rint(bits), nl.float32, buffer=PSUM)
    calls = []
    for _ in range(d.draw(st.integers(1, 2), label="matmuls")):
        arguments = {
            "dst": dst, "stationary": packed(rng, p, m, d.draw(every)),
            "moving": packed(rng, p, n, d.draw(every)),
            "stationary_scale": scales(rng, m, start), "moving_scale": scales(rng, n, 0),
            "accumulate": d.draw(st.sampled_from([None, False])),
        }  # fmt: skip
        calls.append(Call("nc_matmul_mx", arguments))
    agree(*calls, target="trn3", signed_zeros=False)


# -- corrections of AWS's simulator ----------------------------------------------------------------


def test_0_4_quantize_to_e4m3fn() -> None:
    """A block whose maximum is 1: scale 2^-7, so that 1 becomes 128."""

    def call(x: Any) -> Any:
        dst, scale = sb(32, 1, dtype=nl.float8_e4m3fn_x4), sb(4, 1, dtype=nl.uint8)
        nisa.quantize_mx(dst=dst, src=tile(x), dst_scale=scale)
        return dst, scale

    numbers = np.zeros((32, 4), ml_dtypes.bfloat16)
    numbers[0] = [1, 0.3, -0.75, 0.001]
    codes, scale = values(call, numbers, target="trn3")
    assert int(codes[0, 0]) == 0x20EC6270
    assert scale.reshape(-1).tolist() == [120, 0, 0, 0]


@pytest.mark.parametrize("kind", FP8X4)
def test_0_4_packed_types_keep_their_bits_on_trn3(kind: Any) -> None:
    def call(x: Any) -> Any:
        copy = sb(2, 2, dtype=kind)
        nisa.tensor_copy(dst=copy, src=tile(x, dtype=kind))
        return copy

    bits = np.array([[0xFFFFFFFF, 0x7FC00001], [0, 0xFF800000]], np.uint32)
    assert np.array_equal(values(call, bits, target="trn3"), bits)


def test_0_6_quantize_into_a_slice_of_a_scale_tile_leaves_the_rest() -> None:
    def call(x: Any) -> Any:
        dst, scale = sb(32, 1, dtype=nl.float8_e5m2_x4), sb(128, 2, dtype=nl.uint8)
        nisa.memset(dst=scale, value=77)
        nisa.quantize_mx(dst=dst, src=tile(x), dst_scale=scale[4:, 1:2])
        return scale

    numbers = np.ones((32, 4), ml_dtypes.bfloat16)
    got = values(call, numbers, target="trn3")
    want = np.full((128, 2), 77, np.uint8)
    want[4:8, 1] = 127 - 14
    assert np.array_equal(got, want)


def test_0_6_matmul_with_slices_of_one_scale_tile() -> None:
    """Two scale tensors packed at partitions 0 and 4 of one tile."""

    def call(ones: Any, packed_scales: Any) -> Any:
        data = tile(ones, dtype=nl.float8_e4m3fn_x4)
        both = tile(packed_scales)
        dst = nl.ndarray((2, 2), nl.float32, buffer=PSUM)
        nisa.nc_matmul_mx(
            dst=dst, stationary=data, moving=data, stationary_scale=both[0:, :],
            moving_scale=both[4:, :],
        )  # fmt: skip
        return dst

    one = int(np.float32(1).astype(ml_dtypes.float8_e4m3fn).view(np.uint8))
    ones = np.full((32, 2), one * 0x01010101, np.uint32)
    packed_scales = np.full((128, 2), 1, np.uint8)
    packed_scales[0:4], packed_scales[4:8] = 128, 126
    got = values(call, ones, packed_scales, target="trn3")
    assert got.tolist() == [[32 * 4 * 2 * 0.5] * 2] * 2
