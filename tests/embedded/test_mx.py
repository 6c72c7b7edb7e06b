"""Microscaling (gen4): blocks, scales and packing against loops written from OCP MX 1.0."""

from __future__ import annotations

import math

import ml_dtypes
import nki.isa as nisa
import nki.language as nl
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from nki_kernels.machine.errors import UninitializedRead
from nki_kernels.machine.trace import PeWork, StreamWork
from tests.embedded.calls import SITE, P, S, of
from tests.embedded.harness import Rule, check, data, event, ps, refused, same, sb, tile, values
from tests.tolerance import assert_close

F32, U8, U16, U32 = np.float32, np.uint8, np.uint16, np.uint32
E4, E5, FP4 = nl.float8_e4m3fn_x4, nl.float8_e5m2_x4, nl.float4_e2m1fn_x4
E8 = nl.float8_e8m0fnu
HOST = {E4: ml_dtypes.float8_e4m3fn, E5: ml_dtypes.float8_e5m2}
EMAX = {E4: 8, E5: 15}
seeds = st.integers(0, 2**20)
heights = st.sampled_from([32, 64, 96, 128])


def scale_row(partition):
    """Partition of the scale tile that holds the scale of a data partition."""
    return partition // 32 * 32 + partition % 32 // 8


def element(code, kind):
    """Value of a bit pattern: sign, exponent, mantissa (OCP 8-bit and MX specifications)."""
    exponent, mantissa, bias = {E4: (4, 3, 7), E5: (5, 2, 15), FP4: (2, 1, 1)}[kind]
    sign = -1.0 if code >> (exponent + mantissa) else 1.0
    field, fraction = code >> mantissa & (1 << exponent) - 1, code & (1 << mantissa) - 1
    if kind == E4 and code & 0x7F == 0x7F:
        return math.nan
    if kind == E5 and field == 31:
        return math.nan if fraction else sign * math.inf
    if field == 0:
        return sign * fraction * 2.0 ** (1 - bias - mantissa)
    return sign * (1 + fraction / 2**mantissa) * 2.0 ** (field - bias)


TABLE = {
    kind: [(element(c, kind), c) for c in range(128) if math.isfinite(element(c, kind))]
    for kind in (E4, E5)
}


def nearest_code(x, kind):
    """Code of the nearest finite element; of two equally near the even one."""
    size = abs(x)
    _, code = min(TABLE[kind], key=lambda vc: (abs(vc[0] - size), vc[1] & 1))
    return code | (128 if math.copysign(1, x) < 0 else 0)


def unpacked(word, kind):
    """The four values of an x4 element, the first in the lowest bits."""
    bits = 4 if kind == FP4 else 8
    return [element(int(word) >> bits * q & (1 << bits) - 1, kind) for q in range(4)]


# -- quantize_mx -----------------------------------------------------------------------------------


def quantized(x, kind, scale_kind=E8, start=0):
    """Words and scale bytes (all rows of the scale view) that quantize_mx writes."""

    def call(y):
        p, n = y.shape
        dst, scale = sb(p, n // 4, dtype=kind), sb(128, n // 4, dtype=scale_kind)
        nisa.memset(scale.view(nl.uint8), 77)
        nisa.quantize_mx(dst, tile(y), scale[start:])
        return dst.view(nl.uint32), scale.view(nl.uint8)

    return values(call, x, target="trn3")


def blocks(x):
    """Every block of 8 partitions by 4 elements: (first partition, x4 column, its 32 values)."""
    for p in range(0, x.shape[0], 8):
        for c in range(x.shape[1] // 4):
            yield p, c, x[p : p + 8, 4 * c : 4 * c + 4].astype(float)


@given(p=heights, columns=st.integers(1, 3), kind=st.sampled_from([E4, E5]),
       source=st.sampled_from([nl.bfloat16, nl.float16]), start=st.sampled_from([0, 4, 8, 12]),
       scale_kind=st.sampled_from([E8, nl.uint8]), spread=st.integers(0, 12),
       seed=seeds)  # fmt: skip
def test_quantize_mx(p, columns, kind, source, start, scale_kind, spread, seed):
    x = data(seed, (p, 4 * columns), nl.float32)
    x = x * np.exp2(np.random.default_rng(seed).integers(-spread, spread + 1, x.shape))
    x = np.ldexp(x, -2).astype(np.float16 if source is nl.float16 else ml_dtypes.bfloat16)
    words, scales = quantized(x, kind, scale_kind, start)
    untouched = np.ones(scales.shape, bool)
    for first, column, block in blocks(x):
        most = np.abs(block).max()
        exponent = math.frexp(most)[1] - 1 - (EMAX[kind] - 1) if most else -127
        row = start + scale_row(first)
        assert scales[row, column] == exponent + 127
        untouched[row, column] = False
        for i, line in enumerate(block):
            want = [nearest_code(v * 2.0**-exponent, kind) for v in line]
            word = int(words[first + i, column])
            assert [word >> 8 * q & 255 for q in range(4)] == want
    assert (scales[untouched] == 77).all()


@pytest.mark.parametrize(
    ("values_of", "kind", "scale", "codes"),
    [
        ([1.0, 0.3, -0.75, 0.001], E4, 120, [0x70, 0x62, 0xEC, 0x20]),
        ([1.0, 0.3, -0.75, 0.001], E5, 113, [0x74, 0x6D, 0xF2, 0x4C]),
        ([1.9, 0.3, 0, 0], E4, 120, [0x77, 0x62, 0, 0]),
        ([1.9, 0.3, 0, 0], E5, 113, [0x78, 0x6D, 0, 0]),
        ([0, 0, 0, 0], E4, 0, [0, 0, 0, 0]),
        ([2.0**-130, -(2.0**-133), 0, 0], E4, 0, None),
        ([3.0e38, 0, 0, 0], E5, 127 + 127 - 14, [0x77, 0, 0, 0]),
        ([math.inf, 1, 0, 0], E4, 255, [0x7F, 0x7F, 0x7F, 0x7F]),
        ([math.nan, 1, 0, 0], E4, 255, [0x7F, 0x7F, 0x7F, 0x7F]),
    ],
)
def test_examples_31_and_32_and_the_ends(values_of, kind, scale, codes):
    x = np.zeros((32, 4), ml_dtypes.bfloat16)
    x[0] = values_of
    words, scales = quantized(x, kind)
    assert scales[0, 0] == scale
    found = [int(words[0, 0]) >> 8 * q & 255 for q in range(4)]
    if codes is None:  # 2**-130 / 2**-127 and 2**-133 / 2**-127
        assert [element(c, kind) for c in found] == [2.0**-3, -(2.0**-6), 0, 0]
    elif scale == 255:
        assert [c & 0x7F for c in found] == codes
    else:
        assert found == codes


def test_free_dimensions_are_flattened():
    x = data(0, (32, 2, 2, 4), nl.bfloat16)

    def call(y):
        dst, scale = sb(32, 2, 2, dtype=E4), sb(4, 4, dtype=E8)
        nisa.quantize_mx(dst, tile(y), scale)
        return dst.view(nl.uint32)

    words, _ = quantized(x.reshape(32, 16), E4)
    same(values(call, x, target="trn3").reshape(32, 4), words)


# -- nc_matmul_mx ----------------------------------------------------------------------------------


def packed(seed, shape, kind):
    """Random x4 elements without infinities and NaN."""
    rng = np.random.default_rng(seed)
    if kind == FP4:
        return rng.integers(0, 2**16, shape).astype(U16)
    codes = np.array([c for _, c in TABLE[kind]], U8)
    chosen = rng.choice(codes, (*shape, 4)) | rng.choice(np.array([0, 128], U8), (*shape, 4))
    return np.ascontiguousarray(chosen).view(U32)[..., 0]


def scale_bytes(seed, partitions, columns):
    """Scales 2**-3 ... 2**3 where they belong, and a NaN in every row that nothing may read."""
    found = np.full((partitions - 32 + 4, columns), 255, U8)
    rng = np.random.default_rng(seed)
    for p in range(0, partitions, 8):
        found[scale_row(p)] = rng.integers(124, 131, columns)
    return found


def multiplied(a, b, x, y, kinds, dst_kind=nl.float32, **options):
    """Result of nc_matmul_mx for words a, b and scale bytes x, y."""

    def call(a_, b_, x_, y_):
        acc = ps(a.shape[1], b.shape[1], dtype=dst_kind)
        nisa.nc_matmul_mx(acc, tile(a_, dtype=kinds[0]), tile(b_, dtype=kinds[1]),
                          tile(x_, dtype=E8), tile(y_), **options)  # fmt: skip
        return acc

    return values(call, a, b, x, y, target="trn3")


def reference(a, b, x, y, kinds):
    """Sums of products and of their magnitudes in float64."""

    def scaled(words, scales, kind):
        return np.array([[[v * 2.0 ** (int(scales[scale_row(p), c]) - 127) for v in
                           unpacked(words[p, c], kind)] for c in range(words.shape[1])]
                         for p in range(words.shape[0])])  # fmt: skip

    left, right = scaled(a, x, kinds[0]), scaled(b, y, kinds[1])
    exact = np.einsum("kmq,knq->mn", left, right)
    return exact, np.einsum("kmq,knq->mn", np.abs(left), np.abs(right))


@given(k=heights, m=st.sampled_from([2, 4]), n=st.integers(1, 3), seed=seeds,
       kinds=st.tuples(*[st.sampled_from([E4, E5, FP4])] * 2),
       bf16=st.booleans())  # fmt: skip
def test_nc_matmul_mx(k, m, n, seed, kinds, bf16):
    a, b = packed(seed, (k, m), kinds[0]), packed(seed + 1, (k, n), kinds[1])
    x, y = scale_bytes(seed + 2, k, m), scale_bytes(seed + 3, k, n)
    exact, magnitude = reference(a, b, x, y, kinds)
    dst = nl.bfloat16 if bf16 else nl.float32
    got = multiplied(a, b, x, y, kinds, dst)
    assert_close(got, exact, magnitude, op="nc_matmul_mx", case=f"{k} {kinds}", roundings=1,
                 chain=4 * k)  # fmt: skip


def test_example_33():
    one, half = int.from_bytes(b"\x38" * 4, "little"), int.from_bytes(b"\x30" * 4, "little")
    a, b = np.full((32, 2), one, U32), np.full((32, 3), half, U32)
    x, y = np.full((4, 2), 128, U8), np.full((4, 3), 127, U8)
    same(multiplied(a, b, x, y, (E4, E4)), np.full((2, 3), 128, F32))


def test_the_lowest_nibble_is_the_first_element():
    # One nonzero element q in the stationary operand meets the q-th of the moving operand.
    for q in range(4):
        a, b = np.zeros((32, 2), U16), np.zeros((32, 1), U16)
        a[5, 0] = 2 << 4 * q  # 1.0
        b[5, 0] = 0x7531  # 0.5, 1.5, 3, 6
        x = np.full((4, 2), 127, U8)
        got = multiplied(a, b, x, x[:, :1], (FP4, FP4))
        assert got[0, 0] == [0.5, 1.5, 3, 6][q]


def test_groups_accumulate():
    a, b = packed(0, (32, 2), FP4), packed(1, (32, 3), FP4)
    ones = np.full((4, 3), 127, U8)
    once = multiplied(a, b, ones[:, :2], ones, (FP4, FP4))

    def call(a_, b_, x_, y_):
        acc = ps(2, 3)
        operands = (tile(a_, dtype=FP4), tile(b_, dtype=FP4), tile(x_), tile(y_))
        for accumulate in (None, None, True):
            nisa.nc_matmul_mx(acc, *operands, accumulate=accumulate)
        other = ps(2, 3)
        nisa.nc_matmul_mx(other, *operands)
        nisa.nc_matmul_mx(other, *operands, accumulate=False)
        return acc, other

    three, one = values(call, a, b, ones[:, :2], ones, target="trn3")
    # Small integers of halves: every sum is exact.
    same(three, 3 * once)
    same(one, once)


@pytest.mark.parametrize("position", [(0, 0), (32, 0), (96, 0)])
def test_row_tiles_do_not_change_the_result(position):
    a, b = packed(0, (32, 2), FP4), packed(1, (32, 3), FP4)
    ones = np.full((4, 3), 127, U8)
    got = multiplied(a, b, ones[:, :2], ones, (FP4, FP4), tile_position=position,
                     tile_size=(32, 128))  # fmt: skip
    same(got, multiplied(a, b, ones[:, :2], ones, (FP4, FP4)))


def test_a_product_of_quantized_tiles():
    left, right = data(3, (64, 8), nl.bfloat16), data(4, (64, 12), nl.bfloat16)

    def call(a, b):
        def quantize(x):
            words = sb(64, x.shape[1] // 4, dtype=E5)
            scale = sb(64, x.shape[1] // 4, dtype=E8)
            nisa.quantize_mx(words, tile(x), scale)  # leaves rows of scale unwritten
            return words, scale

        (s, x), (m, y) = quantize(a), quantize(b)
        acc = ps(2, 3)
        nisa.nc_matmul_mx(acc, s, m, x, y)
        return acc, s.view(nl.uint32), m.view(nl.uint32), x.view(nl.uint8), y.view(nl.uint8)

    got, *operands = values(call, left, right, target="trn3")
    exact, magnitude = reference(*operands, (E5, E5))
    assert_close(got, exact, magnitude, op="nc_matmul_mx", case="quantized", roundings=1,
                 chain=4 * 64)  # fmt: skip
    plain = left.astype(float).T.reshape(2, -1) @ right.astype(float).T.reshape(3, -1).T
    # An element of 2 mantissa bits is off by at most 2**-3 of itself, or of what its block can
    # hold least; both together stay below a third of the sum of magnitudes.
    assert (np.abs(got - plain) < magnitude / 3).all()


def test_scales_nothing_wrote():
    def call():
        words, scale = sb(64, 2, dtype=E4), sb(64, 2, dtype=nl.uint8)
        nisa.memset(words, 0)
        nisa.memset(scale[0:32], 127)  # the second quadrant is missing
        nisa.nc_matmul_mx(ps(2, 2), words, words, scale, scale)

    refused(call, "stationary_scale reads", "8 of 8", target="trn3", error=UninitializedRead)


# -- events ----------------------------------------------------------------------------------------


def test_events():
    found = event(
        lambda: nisa.quantize_mx(sb(64, 2, dtype=E4), sb(64, 8, dtype=nl.bfloat16),
                                 sb(64, 2, dtype=E8)), target="trn3")  # fmt: skip
    assert (found.engine, len(found.reads), len(found.writes)) == (nisa.engine.vector, 1, 2)
    assert found.work == StreamWork(
        "quantize_mx", "", 2, 64, (("bfloat16", "sbuf", 2),), ("float8_e4m3fn_x4", "sbuf", 4)
    )
    found = event(of_mx(tile_position=(64, 0), tile_size=(64, 128)), target="trn3")
    assert (found.engine, len(found.reads), len(found.writes)) == (nisa.engine.tensor, 4, 1)
    assert found.work == PeWork(64, 2, 3, "float8_e4m3fn_x4", "matmul", 4, 4, row_start=64,
                                tile_rows=64, tile_cols=128, inferred=True)  # fmt: skip
    assert found.work.macs == 4 * 64 * 2 * 3


# -- rules -----------------------------------------------------------------------------------------

BF = nl.bfloat16
quant = of("quantize_mx", S(64, 2, dtype=E4), S(64, 8, dtype=BF), S(64, 2, dtype=E8))
of_mx = of("nc_matmul_mx", P(2, 3), S(64, 2, dtype=E4), S(64, 3, dtype=E4), S(64, 2, dtype=E8),
           S(64, 3, dtype=E8))  # fmt: skip


def at(start, shape):
    return lambda: sb(128, shape[1], dtype=E8)[start : start + shape[0]]


QUANTIZE = [
    Rule("source types", quant(), quant(S(64, 2, dtype=E4), S(64, 8)), ("src is float32",)),
    Rule("result types", quant(), quant(S(64, 2, dtype=FP4)), ("dst is float4_e2m1fn_x4",)),
    Rule("scale types", quant(), quant(S(64, 2, dtype=E4), S(64, 8, dtype=BF), S(64, 2)),
         ("dst_scale is float32",)),
    Rule("SBUF", quant(), quant(S(64, 2, dtype=E4), P(64, 8, dtype=BF)), ("src is in PSUM",)),
    Rule("quadrants", quant(), quant(S(48, 2, dtype=E4), S(48, 8, dtype=BF)),
         ("src [48, 8]", "multiples of 32")),
    Rule("blocks", quant(), quant(S(64, 2, dtype=E4), S(64, 6, dtype=BF)), ("multiples of 4",)),
    Rule("a quarter", quant(), quant(S(64, 8, dtype=E4)), ("dst [64, 8] for src [64, 8]",)),
    Rule("scale rows", quant(S(64, 2, dtype=E4), S(64, 8, dtype=BF), S(36, 2, dtype=E8)),
         quant(S(64, 2, dtype=E4), S(64, 8, dtype=BF), S(35, 2, dtype=E8)),
         ("dst_scale [35, 2]", "[at least 36, 2]")),
    Rule("scale columns", quant(), quant(S(64, 2, dtype=E4), S(64, 8, dtype=BF),
         S(64, 3, dtype=E8)), ("dst_scale [64, 3]", "[at least 36, 2]")),
    Rule("scale start", quant(S(64, 2, dtype=E4), S(64, 8, dtype=BF), at(12, (64, 2))),
         quant(S(64, 2, dtype=E4), S(64, 8, dtype=BF), at(16, (64, 2))),
         ("dst_scale starts at partition 16", "0, 4, 8 or 12")),
    Rule("data start", quant(), quant(S(64, 2, dtype=E4), lambda: sb(128, 8, dtype=BF)[32:96]),
         ("src covers 64 partitions from 32",)),
]  # fmt: skip
MATMUL = [
    Rule("packed types", of_mx(), of_mx(P(2, 3), S(64, 2, dtype=nl.float8_e4m3fn)),
         ("stationary is float8_e4m3fn;",)),
    Rule("scale types", of_mx(), of_mx(P(2, 3), S(64, 2, dtype=E4), S(64, 3, dtype=E4), S(64, 2)),
         ("stationary_scale is float32",)),
    Rule("PSUM", of_mx(), of_mx(S(2, 3)), ("dst is in SBUF",)),
    Rule("dst types", of_mx(P(2, 3, dtype=BF)), of_mx(P(2, 3, dtype=nl.float16)),
         ("dst is float16",)),
    Rule("one contraction", of_mx(), of_mx(P(2, 3), S(32, 2, dtype=E4)), ("equally many",)),
    Rule("quadrants", of_mx(), of_mx(P(2, 3), S(40, 2, dtype=E4), S(40, 3, dtype=E4)),
         ("a multiple of 32",)),
    Rule("even columns", of_mx(), of_mx(P(3, 3), S(64, 3, dtype=E4)), ("an even number",)),
    Rule("dst extent", of_mx(), of_mx(P(2, 4)), ("dst [2, 4]", "[2, 3]")),
    Rule("scale columns", of_mx(), of_mx(P(2, 3), S(64, 2, dtype=E4), S(64, 3, dtype=E4),
         S(64, 2, dtype=E8), S(64, 2, dtype=E8)), ("moving_scale [64, 2]", "[at least 36, 3]")),
    Rule("scale start", of_mx(P(2, 3), S(64, 2, dtype=E4), S(64, 3, dtype=E4), at(8, (64, 2))),
         of_mx(P(2, 3), S(64, 2, dtype=E4), S(64, 3, dtype=E4), at(5, (64, 2))),
         ("stationary_scale starts at partition 5",)),
    Rule("row tiles", of_mx(tile_position=(64, 0), tile_size=(64, 128)),
         of_mx(tile_position=(0, 0), tile_size=(64, 64)), ("tiles rows only", "128")),
    Rule("within the tile", of_mx(tile_position=(0, 0), tile_size=(64, 128)),
         of_mx(tile_position=(0, 0), tile_size=(32, 128)), ("at most 32 partitions",)),
    Rule("accumulate", of_mx(), of_mx(accumulate=1), ("accumulate=1", "None")),
]  # fmt: skip


@pytest.mark.parametrize("rule", QUANTIZE, ids=lambda r: r.name)
def test_quantize_mx_rule(rule):
    check(rule._replace(target="trn3"), "quantize_mx", SITE)


@pytest.mark.parametrize("rule", MATMUL, ids=lambda r: r.name)
def test_nc_matmul_mx_rule(rule):
    check(rule._replace(target="trn3"), "nc_matmul_mx", SITE)


@pytest.mark.parametrize(("call", "opcode"), [(quant(), "quantize_mx"), (of_mx(), "nc_matmul_mx")])
def test_microscaling_needs_gen4(call, opcode):
    says = (f"{opcode} on trn2", "gen4")
    check(Rule("gen4", lambda: None, call, says, "trn2"), opcode, SITE)


def test_adding_to_what_no_matmul_wrote():
    def call():
        words, scale = sb(32, 2, dtype=E4), sb(4, 2, dtype=nl.uint8)
        nisa.memset(words, 0)
        nisa.memset(scale, 127)
        nisa.nc_matmul_mx(ps(2, 2), words, words, scale, scale, accumulate=True)

    refused(call, "nisa.nc_matmul_mx at", "accumulate=True", target="trn3")
