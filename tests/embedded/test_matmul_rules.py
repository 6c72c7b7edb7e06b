"""Operand rules of nc_matmul and nc_transpose: a legal and an illegal call each."""

from __future__ import annotations

import nki.isa as nisa
import nki.language as nl
import pytest

from nki_kernels.machine.errors import RuleViolation
from tests.embedded.harness import Rule, by_name, check, hbm, ps, refused, sb, traced

E4M3, E4M3FN, E5M2 = nl.float8_e4m3, nl.float8_e4m3fn, nl.float8_e5m2
DOUBLE = nisa.matmul_perf_mode.double_row


def mm(dst, stationary, moving, **options):
    return lambda: nisa.nc_matmul(dst(), stationary(), moving(), **options)


def S(*shape, dtype=nl.float32):
    return lambda: sb(*shape, dtype=dtype)


def P(*shape, dtype=nl.float32):
    return lambda: ps(*shape, dtype=dtype)


def tiled(position, size, dst=lambda: ps(2, 2), k=2, m=2):
    return mm(dst, S(k, m), S(k, 2), tile_position=position, tile_size=size)


def bank(start):
    """A destination of 8 float32 from column `start`; a toy bank holds 16."""
    return lambda: ps(4, 32)[:, start : start + 8]


LEGAL = mm(P(4, 5), S(3, 4), S(3, 5))

MATMUL = [
    Rule("dst in PSUM", LEGAL, mm(S(4, 5), S(3, 4), S(3, 5)),
         ("dst is in SBUF", "must be in PSUM", "allocate it with buffer=nl.psum")),
    Rule("stationary in SBUF", LEGAL, mm(P(4, 5), P(3, 4), S(3, 5)),
         ("stationary is in PSUM", "must be in SBUF", "tensor_copy")),
    Rule("moving in SBUF", LEGAL, mm(P(4, 5), S(3, 4), P(3, 5)),
         ("moving is in PSUM", "must be in SBUF", "tensor_copy")),
    Rule("no HBM operand", LEGAL, mm(P(4, 5), S(3, 4), lambda: hbm(3, 5)),
         ("moving [3, 5] is in HBM", "SBUF and PSUM only", "dma_copy")),
    Rule("equal contraction", LEGAL, mm(P(4, 5), S(3, 4), S(2, 5)),
         ("stationary [3, 4], moving [2, 5]", "3 against 2", "slice or pad")),
    Rule("dst [M, N]", LEGAL, mm(P(5, 4), S(3, 4), S(3, 5)),
         ("dst [5, 4]", "must be [4, 5]", "slice dst")),
    Rule("stationary columns", mm(P(8, 5), S(3, 8), S(3, 5)),
         mm(lambda: ps(8, 5), S(3, 3, 3), S(3, 5)),
         ("dst must be [9, 5]",)),
    Rule("moving columns", mm(P(4, 16), S(3, 4), S(3, 16)),
         mm(lambda: ps(4, 20), S(3, 4), S(3, 20)),
         ("20 moving columns", "at most 16 on toy", "tile the matmul")),
    Rule("float32 meets float32", mm(P(4, 5), S(3, 4), S(3, 5, dtype=nl.tfloat32)),
         mm(P(4, 5), S(3, 4), S(3, 5, dtype=nl.bfloat16)),
         ("stationary float32 with moving bfloat16", "only with each other", "convert one")),
    Rule("input dtypes", mm(P(4, 5), S(3, 4, dtype=E5M2), S(3, 5, dtype=nl.bfloat16)),
         mm(P(4, 5), S(3, 4, dtype=nl.int8), S(3, 5, dtype=nl.int8)),
         ("stationary is int8", "allowed are float8_e4m3", "convert it first")),
    Rule("e4m3fn from gen4", mm(P(4, 5), S(3, 4, dtype=E4M3FN), S(3, 5, dtype=E5M2)),
         mm(P(4, 5), S(3, 4, dtype=E4M3FN), S(3, 5, dtype=E4M3FN)),
         ("float8_e4m3fn on trn2", "needs gen4", "use float8_e4m3"), "trn3/trn2"),
    Rule("one e4m3", mm(P(4, 5), S(3, 4, dtype=E4M3FN), S(3, 5, dtype=E4M3FN)),
         mm(P(4, 5), S(3, 4, dtype=E4M3FN), S(3, 5, dtype=E4M3)),
         ("float8_e4m3 with float8_e4m3fn", "cannot meet", "convert one"), "trn3"),
    Rule("dst float32 before gen4", mm(P(4, 5, dtype=nl.bfloat16), S(3, 4), S(3, 5)),
         mm(P(4, 5, dtype=nl.bfloat16), S(3, 4), S(3, 5)),
         ("dst is bfloat16", "float32 on trn2"), "trn3/trn2"),
    Rule("dst float16 never", mm(P(4, 5), S(3, 4), S(3, 5)),
         mm(P(4, 5, dtype=nl.float16), S(3, 4), S(3, 5)),
         ("dst is float16", "float32 or bfloat16 on trn3"), "trn3"),
    Rule("transpose keeps the dtype",
         mm(P(4, 3, dtype=nl.bfloat16), S(3, 4, dtype=nl.bfloat16), S(3, 3, dtype=nl.bfloat16)),
         mm(P(4, 3), S(3, 4, dtype=nl.bfloat16), S(3, 3, dtype=nl.bfloat16), is_transpose=True),
         ("is_transpose writes float32", "the data's type bfloat16"), "trn3/trn2"),
    Rule("double_row shape", mm(P(4, 5), S(3, 2, 4, dtype=E4M3), S(3, 2, 5, dtype=E5M2),
                                perf_mode=DOUBLE),
         mm(P(4, 5), S(3, 4, dtype=E4M3), S(3, 2, 5, dtype=E4M3), perf_mode=DOUBLE),
         ("stationary [3, 4]", "double_row operands are [K, 2, columns]", "reshape")),
    Rule("double_row fp8", mm(P(4, 5), S(3, 2, 4, dtype=E4M3), S(3, 2, 5, dtype=E4M3),
                              perf_mode=DOUBLE),
         mm(P(4, 5), S(3, 2, 4), S(3, 2, 5), perf_mode=DOUBLE),
         ("double_row with float32 and float32", "needs fp8")),
    Rule("double_row from gen3", mm(P(4, 5), S(3, 2, 4, dtype=E4M3), S(3, 2, 5, dtype=E4M3),
                                    perf_mode=DOUBLE),
         mm(P(4, 5), S(3, 2, 4, dtype=E4M3), S(3, 2, 5, dtype=E4M3), perf_mode=DOUBLE),
         ("double_row on trn1", "needs gen3"), "trn2/trn1"),
    Rule("tile_position of ints", mm(P(2, 5), S(2, 2), S(2, 5), tile_position=(0, 0),
                                     tile_size=(8, 2)),
         mm(P(2, 5), S(2, 2), S(2, 5), tile_position=(False, 0), tile_size=(8, 2)),
         ("tile_position (False, 0)", "each is two ints")),
    Rule("double_row without column tiles",
         mm(P(2, 5), S(2, 2, 2, dtype=E4M3), S(2, 2, 5, dtype=E4M3), perf_mode=DOUBLE,
            tile_position=(2, 0), tile_size=(2, 8)),
         mm(P(2, 5), S(2, 2, 2, dtype=E4M3), S(2, 2, 5, dtype=E4M3), perf_mode=DOUBLE,
            tile_position=(0, 0), tile_size=(8, 2)),
         ("double_row with tile_size (8, 2)", "no column tiles")),
    Rule("double_row without transpose", mm(P(4, 5), S(3, 2, 4, dtype=E4M3),
                                            S(3, 2, 5, dtype=E4M3), perf_mode=DOUBLE),
         mm(P(4, 5, dtype=E4M3), S(3, 2, 4, dtype=E4M3), S(3, 2, 5, dtype=E4M3), perf_mode=DOUBLE,
            is_transpose=True),
         ("double_row with is_transpose", "cannot be combined")),
    Rule("perf_mode", mm(P(4, 5), S(3, 4), S(3, 5), perf_mode="none"),
         mm(P(4, 5), S(3, 4), S(3, 5), perf_mode="fast"),
         ("perf_mode='fast'", "nisa.matmul_perf_mode")),
    Rule("accumulate", mm(P(4, 5), S(3, 4), S(3, 5), accumulate=False),
         mm(P(4, 5), S(3, 4), S(3, 5), accumulate="yes"),
         ("accumulate='yes'", "True, False or None")),
    Rule("one PSUM bank", mm(bank(8), S(3, 4), S(3, 8)), mm(bank(12), S(3, 4), S(3, 8)),
         ("bytes 48 to 79", "PSUM banks of 64 bytes", "align the tile")),
    Rule("tile position and size together", tiled((2, 0), (2, 8)), tiled((2, 0), ()),
         ("tile_position and tile_size go together", "both or neither")),
    Rule("two numbers", tiled((2, 0), (2, 8)), tiled((2,), (2,)),
         ("tile_position (2,)", "tile_size (2,)", "two ints")),
    Rule("tile sizes", tiled((4, 0), (4, 8)), tiled((3, 0), (3, 8)),
         ("tile_size (3, 8)", "one of 2, 4, 8")),
    Rule("tile positions", tiled((4, 0), (4, 8)), tiled((2, 0), (4, 8)),
         ("tile_position (2, 0)", "multiple of tile_size (4, 8)")),
    Rule("inside the array", tiled((6, 0), (2, 8)), tiled((8, 0), (2, 8)),
         ("tile_position (8, 0)", "0 to 6")),
    Rule("not before the array", tiled((0, 0), (2, 8)), tiled((-2, 0), (2, 8)),
         ("tile_position (-2, 0)", "0 to 6")),
    Rule("rows within the tile", tiled((0, 0), (4, 8), k=4), tiled((0, 0), (2, 8), k=3),
         ("3 contraction rows", "at most 2")),
    Rule("columns within the tile", tiled((0, 0), (8, 2)),
         tiled((0, 0), (8, 2), dst=lambda: ps(3, 2), m=3),
         ("3 stationary columns", "at most 2")),
    Rule("column tile and dst", tiled((0, 4), (8, 2), dst=lambda: ps(8, 2)[4:6]),
         tiled((0, 4), (8, 2), dst=lambda: ps(8, 2)[2:4]),
         ("dst starts at partition 2 with start column 4", "slice dst there")),
    Rule("quadrant tiles from gen3", tiled((32, 0), (32, 128)), tiled((32, 0), (32, 128)),
         ("tile_size (32, 128)", "one of 64, 128 on trn1"), "trn2/trn1"),
    Rule("start partition", mm(P(4, 5), lambda: sb(8, 4)[2:4], lambda: sb(8, 5)[2:4]),
         mm(P(4, 5), lambda: sb(8, 4)[1:3], S(2, 5)),
         ("stationary covers 2 partitions from 1", "start at 0, 2, 4, 6", "move the data")),
]  # fmt: skip


@pytest.mark.parametrize("rule", MATMUL, ids=by_name)
def test_matmul_rule(rule):
    """A target "a/b" runs the legal call on a and the illegal one on b."""
    first, _, second = rule.target.partition("/")
    check(rule._replace(target=second or first, legal=lambda: None), "nc_matmul", __file__)
    traced(rule.legal, target=first)


@pytest.mark.parametrize("size", [(0, 8), (-8, 8), (3, 8)])
def test_a_tile_that_cannot_be_limits_nothing_else(size):
    with pytest.raises(RuleViolation) as caught:
        traced(tiled((0, 0), size, k=4))
    assert f"tile_size {size}" in str(caught.value)
    assert "contraction rows" not in str(caught.value)


def test_moving_columns_may_fill_all_of_psum_on_gen4():
    wide = mm(P(4, 4096), S(3, 4), S(3, 4096))
    traced(wide, target="trn3")
    refused(wide, "4096 moving columns", "at most 512 on trn2", target="trn2")


def test_a_matmul_has_no_engine_and_needs_tensors():
    refused(lambda: nisa.nc_matmul(ps(2, 2), None, sb(2, 2)), "stationary is NoneType None",
            "must be a tensor")  # fmt: skip


def transpose(dst, data, **options):
    return lambda: nisa.nc_transpose(dst(), data(), **options)


VECTOR = {"engine": nisa.engine.vector}
TRANSPOSE = [
    Rule("dst [F, P]", transpose(P(5, 3), S(3, 5)), transpose(P(3, 5), S(3, 5)),
         ("data [3, 5] into dst [3, 5]", "dst must be [5, 3]")),
    Rule("Tensor reads SBUF", transpose(P(5, 3), S(3, 5)), transpose(P(5, 3), P(3, 5)),
         ("data in PSUM to dst in PSUM", "reads SBUF and writes PSUM", "nisa.engine.vector")),
    Rule("Tensor writes PSUM", transpose(S(1, 2), S(2, 1)),
         transpose(S(5, 3), S(3, 5), engine=nisa.engine.tensor),
         ("to dst in SBUF on the tensor engine", "copy the data")),
    Rule("one quadrant on Vector", transpose(S(2, 2), S(2, 2), **VECTOR),
         transpose(S(2, 3), S(3, 2), **VECTOR),
         ("data [3, 2] on the vector engine", "at most [2, 2]", "tile it")),
    Rule("Vector is the default in SBUF", transpose(S(2, 2), S(2, 2)), transpose(S(2, 3), S(3, 2)),
         ("on the vector engine", "at most [2, 2]")),
    Rule("equal dtypes", transpose(P(5, 3), S(3, 5)),
         transpose(P(5, 3), S(3, 5, dtype=nl.bfloat16)),
         ("data bfloat16 into dst float32", "dst must be bfloat16 on toy")),
    Rule("gen2 writes float32", transpose(P(5, 3), S(3, 5, dtype=nl.bfloat16)),
         transpose(P(5, 3, dtype=nl.bfloat16), S(3, 5, dtype=nl.bfloat16)),
         ("dst must be float32 on trn1",), "trn1"),
    Rule("one byte in two",
         transpose(lambda: ps(4, 3, 2, dtype=E4M3)[:, :, 0], S(3, 4, dtype=E4M3)),
         transpose(P(4, 3, dtype=E4M3), S(3, 4, dtype=E4M3)),
         ("1-byte float8_e4m3 with a dst step of 1 bytes", "16 bits in PSUM", "[..., 0]")),
    Rule("engines", transpose(P(5, 3), S(3, 5), engine=nisa.engine.tensor),
         transpose(P(5, 3), S(3, 5), engine=nisa.engine.gpsimd),
         ("engine=gpsimd", "runs on tensor, vector", "choose one")),
    Rule("a tile on chip", transpose(P(5, 3), S(3, 5)), transpose(P(5, 3), lambda: hbm(3, 5)),
         ("data [3, 5] is in HBM", "dma_copy")),
    Rule("free size on Tensor", transpose(P(8, 3), S(3, 8)), transpose(P(8, 3), S(3, 3, 3)),
         ("data [3, 3, 3]", "dst must be [9, 3]")),
    Rule("one PSUM bank", transpose(bank(8), S(8, 4)), transpose(bank(12), S(8, 4)),
         ("bytes 48 to 79", "PSUM banks of 64 bytes")),
]  # fmt: skip


@pytest.mark.parametrize("rule", TRANSPOSE, ids=by_name)
def test_transpose_rule(rule):
    check(rule, "nc_transpose", __file__)


def test_transposes_on_trn2_take_one_full_tile_and_no_more():
    traced(transpose(P(128, 128), S(128, 128)), target="trn2")
    traced(transpose(S(32, 32), S(32, 32)), target="trn2")
    refused(transpose(S(33, 32), S(32, 33)), "at most [32, 32]", target="trn2")
    refused(transpose(P(128, 2), S(2, 129)), "dst must be [129, 2]", target="trn2")
