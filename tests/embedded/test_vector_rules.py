"""Operand rules of reductions, scans, selections and searches: a legal and an illegal call each."""

from __future__ import annotations

import nki.isa as nisa
import nki.language as nl
import numpy as np
import pytest

from tests.embedded.calls import SITE, H, P, S, of
from tests.embedded.harness import Rule, by_name, check, refused, traced

R = nisa.reduce_cmd
I8, I32, U8, U16, U32 = nl.int8, nl.int32, nl.uint8, nl.uint16, nl.uint32
BF16, TF32 = nl.bfloat16, nl.tfloat32


# Every compute instruction: on chip, a start partition its size allows.
PLACES = {
    "tensor_reduce": lambda x: of("tensor_reduce")(S(4, 1), nl.add, x, 1),
    "tensor_scalar_reduce": lambda x: of("tensor_scalar_reduce")(S(4, 6), x, nl.add, 0, nl.add),
    "tensor_tensor_scan": lambda x: of("tensor_tensor_scan")(
        S(4, 6), x, S(4, 6), 0, nl.add, nl.add
    ),
    "bn_stats": lambda x: of("bn_stats")(S(4, 6), x),
    "bn_aggr": lambda x: of("bn_aggr")(S(4, 2), x),
    "select_reduce": lambda x: of("select_reduce")(S(4, 6), S(4, 6, dtype=U8), x, 0.0),
    "scalar_tensor_tensor": lambda x: of("scalar_tensor_tensor")(
        S(4, 6), x, nl.add, 0, nl.add, S(4, 6)
    ),
    "reciprocal": lambda x: of("reciprocal")(S(4, 6), x),
    "activation_reduce": lambda x: of("activation_reduce")(S(4, 6), nl.exp, x, nl.add, None),
    "affine_select": lambda x: of("affine_select")(S(4, 6), [[1, 6]], 0, x, 0.0),
    "range_select": lambda x: of("range_select")(
        S(4, 6), x, nl.less, nl.less, S(4, 1), S(4, 1)
    ),
    "tensor_copy_predicated": lambda x: of("tensor_copy_predicated")(
        S(4, 6), x, S(4, 6, dtype=U8)
    ),
    "max8": lambda x: of("max8")(S(4, 8), x),
    "nc_find_index8": lambda x: of("nc_find_index8")(S(4, 8, dtype=U32), x, S(4, 8)),
    "nc_match_replace8": lambda x: of("nc_match_replace8")(S(4, 12), x, S(4, 8), 0.0),
}  # fmt: skip
LONG = ("max8", "nc_find_index8", "nc_match_replace8")


@pytest.mark.parametrize("name", PLACES)
def test_operands_are_on_chip_and_start_where_they_may(name):
    n = 12 if name in LONG else 6
    make = PLACES[name]
    on_chip = Rule("", make(S(4, n)), make(H(4, n)), (f"[4, {n}] is in HBM", "dma_copy"))
    check(on_chip, name, SITE)
    late = make(lambda: S(8, n)()[3:7])
    aligned = make(lambda: S(8, n)()[4:8])
    check(Rule("", aligned, late, ("covers 4 partitions from 3",)), name, SITE)


@pytest.mark.parametrize("name", sorted(set(PLACES) - {"bn_stats", "bn_aggr", *LONG}))
def test_the_result_fits_the_data(name):
    message = {"tensor_reduce": "must hold [3, 1]"}.get(name, "elements per partition must agree")
    check(Rule("", PLACES[name](S(4, 6)), PLACES[name](S(3, 6)), (message,)), name, SITE)


# -- reductions ------------------------------------------------------------------------------------

reduce = of("tensor_reduce")
REDUCE = [
    Rule("trailing axes", reduce(S(4, 3), nl.add, S(4, 3, 2), (2,)),
         reduce(S(4, 2), nl.add, S(4, 3, 2), (1,)),
         ("axis=(1,) of data [4, 3, 2]", "last free dimensions, up to and with 2", "permute")),
    Rule("no partition axis", reduce(S(4, 1), nl.add, S(4, 3), 1),
         reduce(S(4, 1), nl.add, S(4, 3), (0, 1)), ("axis=(0, 1)", "without the partition")),
    Rule("an axis", reduce(S(4, 1), nl.add, S(4, 3), [1]), reduce(S(4, 1), nl.add, S(4, 3), []),
         ("axis=()", "last free dimensions")),
    Rule("integer axes", reduce(S(4, 1), nl.add, S(4, 3), np.int64(1)),
         reduce(S(4, 1), nl.add, S(4, 3), 1.0), ("axis=1.0",)),
    Rule("axes in range", reduce(S(4, 1), nl.add, S(4, 3), -1),
         reduce(S(4, 1), nl.add, S(4, 3), 2), ("axis=2",)),
    Rule("dst holds what is kept", reduce(S(4, 2, 1), nl.add, S(4, 2, 3), 2, keepdims=True),
         reduce(S(4, 3), nl.add, S(4, 2, 3), 2),
         ("dst [4, 3] for data [4, 2, 3] reduced over [2]", "must hold [4, 2]")),
    Rule("a reduction operator", reduce(S(4, 1), nl.subtract, S(4, 3), 1),
         reduce(S(4, 1), nl.equal, S(4, 3), 1),
         ("op=nl.equal is no reduction", "nl.add", "nl.logical_xor")),
    Rule("an ALU operator", reduce(S(4, 1), nl.maximum, S(4, 3), 1),
         reduce(S(4, 1), nl.exp, S(4, 3), 1), ("nl.exp is no ALU operator",)),
    Rule("bits of integers", reduce(S(4, 1, dtype=I8), nl.bitwise_or, S(4, 3, dtype=I8), 1),
         reduce(S(4, 1), nl.bitwise_or, S(4, 3), 1), ("data float32, dst float32", "integers")),
    Rule("bits of one width", reduce(S(4, 1, dtype=U8), nl.bitwise_or, S(4, 3, dtype=I8), 1),
         reduce(S(4, 1, dtype=I32), nl.bitwise_or, S(4, 3, dtype=I8), 1), ("different widths",)),
    Rule("negate arithmetic", reduce(S(4, 1), nl.add, S(4, 3), 1, negate=True),
         reduce(S(4, 1, dtype=I8), nl.bitwise_or, S(4, 3, dtype=I8), 1, negate=True),
         ("negate with bitvec nl.bitwise_or", "drop it")),
]  # fmt: skip


@pytest.mark.parametrize("rule", REDUCE, ids=by_name)
def test_tensor_reduce_rule(rule):
    check(rule, "tensor_reduce", SITE)


tsr = of("tensor_scalar_reduce", S(4, 6), S(4, 6), nl.multiply, 2.0, nl.add)

LOAD = {"reduce_cmd": R.load_reduce, "reduce_init": 0.0}
SCALAR_REDUCE = [
    Rule("float32 operand0", tsr(S(4, 6), S(4, 6), nl.add, P(4, 1)),
         tsr(S(4, 6), S(4, 6), nl.add, S(4, 1, dtype=BF16)),
         ("operand0 is bfloat16", "must be float32", "tensor_copy")),
    Rule("a column of operands", tsr(S(4, 6), S(4, 6), nl.add, S(4, 1)),
         tsr(S(4, 6), S(4, 6), nl.add, S(4, 2)), ("operand0 [4, 2]", "[4, 1]")),
    Rule("operand0 is a number", tsr(S(4, 6), S(4, 6), nl.add, 3),
         tsr(S(4, 6), S(4, 6), nl.add, None), ("operand0=None", "a number or a float32 [P, 1]")),
    Rule("unary without operand", tsr(S(4, 6), S(4, 6), nl.abs, 0.0),
         tsr(S(4, 6), S(4, 6), nl.abs, 2.0), ("operand0 for unary nl.abs", "None or 0")),
    Rule("no bits", tsr(), tsr(S(4, 6), S(4, 6), nl.bitwise_and, 1),
         ("op0=nl.bitwise_and is a bitvec operator", "tensor_scalar_reduce takes arithmetic")),
    Rule("ALU operators", tsr(), tsr(S(4, 6), S(4, 6), nl.exp, 1), ("nl.exp is no ALU operator",)),
    Rule("square on gen4", tsr(S(4, 6), S(4, 6), nl.square, None),
         tsr(S(4, 6), S(4, 6), nl.square, None),
         ("op0=nl.square on toy", "needs gen4")),
    Rule("no rsqrt", tsr(), tsr(S(4, 6), S(4, 6), nl.rsqrt, None),
         ("op0=nl.rsqrt", "no rsqrt", "nisa.activation")),
    Rule("abs_max on gen4", tsr(), tsr(S(4, 6), S(4, 6), nl.abs_max, 1),
         ("nl.abs_max on toy", "needs gen4")),
    Rule("no reverse0", tsr(reverse0=False), tsr(reverse0=True),
         ("reverse0=True", "not supported yet")),
    Rule("reductions", tsr(S(4, 6), S(4, 6), nl.add, 1, nl.minimum),
         tsr(S(4, 6), S(4, 6), nl.add, 1, nl.subtract),
         ("reduce_op=nl.subtract", "nl.add, nl.multiply, nl.maximum, nl.minimum")),
    Rule("commands", tsr(reduce_cmd=R.reduce), tsr(reduce_cmd=R.idle),
         ("reduce_cmd=", "allowed are reset_reduce, reduce, load_reduce")),
    Rule("a command", tsr(**LOAD), tsr(reduce_cmd=3), ("reduce_cmd=3", "allowed are")),
    Rule("load needs a value", tsr(**LOAD), tsr(reduce_cmd=R.load_reduce),
         ("reduce_init=None with reduce_cmd=load_reduce", "only then")),
    Rule("a value needs load", tsr(), tsr(reduce_init=1.0),
         ("reduce_init=1.0 with reduce_cmd=reset_reduce",)),
    Rule("a float32 start", tsr(reduce_cmd=R.load_reduce, reduce_init=S(4, 1)),
         tsr(reduce_cmd=R.load_reduce, reduce_init=S(4, 1, dtype=BF16)),
         ("reduce_init is bfloat16", "must be float32")),
    Rule("a start that is a number", tsr(**LOAD),
         tsr(reduce_cmd=R.load_reduce, reduce_init="0"), ("reduce_init='0'", "a number")),
    Rule("a column of starts", tsr(reduce_cmd=R.load_reduce, reduce_init=P(4, 1)),
         tsr(reduce_cmd=R.load_reduce, reduce_init=S(4, 2)), ("reduce_init [4, 2]",)),
    Rule("a column of results", tsr(reduce_res=P(4, 1)), tsr(reduce_res=S(4, 6)),
         ("reduce_res [4, 6]", "[4, 1]")),
    Rule("a tile of results", tsr(reduce_res=S(4, 1, dtype=I32)), tsr(reduce_res=0.0),
         ("reduce_res=0.0", "a [P, 1] tile or None")),
]  # fmt: skip


@pytest.mark.parametrize("rule", SCALAR_REDUCE, ids=by_name)
def test_tensor_scalar_reduce_rule(rule):
    if rule.name == "square on gen4":
        traced(rule.legal, target="trn3")
        refused(rule.illegal, *rule.says)
    else:
        check(rule, "tensor_scalar_reduce", SITE)


scan = of("tensor_tensor_scan", S(4, 6), S(4, 6), S(4, 6), 0.0, nl.multiply, nl.add)

SCAN = [
    Rule("not both in PSUM", scan(S(4, 6), P(4, 6), S(4, 6)), scan(S(4, 6), P(4, 6), P(4, 6)),
         ("data0 and data1 are all in PSUM", "tensor_copy")),
    Rule("equal sizes", scan(P(4, 6), S(4, 3, 2), S(4, 6)), scan(S(4, 6), S(4, 6), S(4, 5)),
         ("data1 [4, 5]", "must agree")),
    Rule("a column of seeds", scan(S(4, 6), S(4, 6), S(4, 6), P(4, 1, dtype=BF16)),
         scan(S(4, 6), S(4, 6), S(4, 6), S(4, 6)), ("initial [4, 6]", "[4, 1]")),
    Rule("a seed", scan(), scan(S(4, 6), S(4, 6), S(4, 6), None),
         ("initial=None", "a number or a [P, 1] tile")),
    Rule("binary op0", scan(), scan(S(4, 6), S(4, 6), S(4, 6), 0, nl.abs, nl.add),
         ("op0=nl.abs takes one operand", "for example nl.add")),
    Rule("binary op1", scan(), scan(S(4, 6), S(4, 6), S(4, 6), 0, nl.add, nl.reciprocal),
         ("op1=nl.reciprocal takes one operand",)),
    Rule("no power", scan(), scan(S(4, 6), S(4, 6), S(4, 6), 0, nl.power, nl.add),
         ("op0=nl.power", "gpsimd")),
    Rule("no bits", scan(), scan(S(4, 6), S(4, 6), S(4, 6), 0, nl.add, nl.bitwise_or),
         ("op1=nl.bitwise_or is a bitvec",)),
]  # fmt: skip


@pytest.mark.parametrize("rule", SCAN, ids=by_name)
def test_tensor_tensor_scan_rule(rule):
    check(rule, "tensor_tensor_scan", SITE)


STATS = [
    Rule("at most a tile", of("bn_stats")(S(4, 6), S(4, 16)), of("bn_stats")(S(4, 6), S(4, 17)),
         ("data [4, 17] has 17 elements per partition", "at most 16 on toy")),
    Rule("six results", of("bn_stats")(P(4, 2, 3), P(4, 5)), of("bn_stats")(S(4, 5), S(4, 5)),
         ("dst [4, 5] for data [4, 5]", "must hold [4, 6]")),
    Rule("the same rows", of("bn_stats")(S(4, 6), S(4, 5)), of("bn_stats")(S(3, 6), S(4, 5)),
         ("dst [3, 6]", "must hold [4, 6]")),
]  # fmt: skip
AGGREGATES = [
    Rule("triples", of("bn_aggr")(P(4, 2), P(4, 9)), of("bn_aggr")(S(4, 2), S(4, 8)),
         ("data [4, 8] has 8 elements", "multiple of 3")),
    Rule("two results", of("bn_aggr")(S(4, 2), S(4, 6)), of("bn_aggr")(S(4, 3), S(4, 6)),
         ("dst [4, 3]", "must hold [4, 2]")),
]  # fmt: skip


@pytest.mark.parametrize("rule", STATS, ids=by_name)
def test_bn_stats_rule(rule):
    check(rule, "bn_stats", SITE)


@pytest.mark.parametrize("rule", AGGREGATES, ids=by_name)
def test_bn_aggr_rule(rule):
    check(rule, "bn_aggr", SITE)


select = of("select_reduce", S(4, 6), S(4, 6, dtype=U8), S(4, 6), 0.0)

RESET = {"reduce_cmd": R.reset_reduce}
SELECT = [
    Rule("8 and 16-bit predicates", select(S(4, 6), S(4, 6, dtype=nl.int16)),
         select(S(4, 6), S(4, 6, dtype=I32)),
         ("predicate is int32", "int8, uint8, int16, uint16", "convert it")),
    Rule("no float predicate", select(), select(S(4, 6), S(4, 6)), ("predicate is float32",)),
    Rule("one of two in PSUM", select(P(4, 6), P(4, 6, dtype=U8), S(4, 6)),
         select(S(4, 6), P(4, 6, dtype=U8), P(4, 6)), ("predicate and on_true are all in PSUM",)),
    Rule("no 32-bit integers", select(S(4, 6), S(4, 6, dtype=U8), S(4, 6, dtype=U16)),
         select(S(4, 6), S(4, 6, dtype=U8), S(4, 6, dtype=U32)),
         ("on_true is uint32", "int32, uint32 and tfloat32", "tensor_copy")),
    Rule("no tfloat32", select(), select(S(4, 6), S(4, 6, dtype=U8), S(4, 6, dtype=TF32)),
         ("on_true is tfloat32",)),
    Rule("a column for false", select(S(4, 6), S(4, 6, dtype=U8), S(4, 6), S(4, 1)),
         select(S(4, 6), S(4, 6, dtype=U8), S(4, 6), S(4, 6)), ("on_false [4, 6]", "[4, 1]")),
    Rule("a number for false", select(), select(S(4, 6), S(4, 6, dtype=U8), S(4, 6), None),
         ("on_false=None", "a number or a [P, 1] tile")),
    Rule("only maximum", select(**RESET, reduce_op=nl.max), select(**RESET, reduce_op=nl.add),
         ("reduce_op=nl.add", "allowed: nl.maximum")),
    Rule("commands", select(reduce_cmd=R.reduce), select(reduce_cmd=R.reset),
         ("reduce_cmd=", "idle, reduce, reset_reduce")),
    Rule("no result of idle", select(**RESET, reduce_res=S(4, 1)), select(reduce_res=S(4, 1)),
         ("reduce_res with reduce_cmd=idle", "unknown after idle", "reset_reduce")),
    Rule("a float result", select(**RESET, reduce_res=P(4, 1)),
         select(**RESET, reduce_res=S(4, 1, dtype=I32)), ("reduce_res is int32", "a float type")),
]  # fmt: skip


@pytest.mark.parametrize("rule", SELECT, ids=by_name)
def test_select_reduce_rule(rule):
    check(rule, "select_reduce", SITE)


# -- fused -----------------------------------------------------------------------------------------


stt = of("scalar_tensor_tensor", S(4, 6), S(4, 6), nl.multiply, 2.0, nl.add, S(4, 6))

FUSED = [
    Rule("not both in PSUM", stt(P(4, 6), P(4, 6), nl.add, P(4, 1), nl.add, S(4, 6)),
         stt(S(4, 6), P(4, 6), nl.add, 0, nl.add, P(4, 6)),
         ("data and operand1 are all in PSUM",)),
    Rule("operand1 is a full tile", stt(), stt(S(4, 6), S(4, 6), nl.add, 0, nl.add, S(4, 1)),
         ("operand1 [4, 1]", "must agree")),
    Rule("operand1 is a tile", stt(), stt(S(4, 6), S(4, 6), nl.add, 0, nl.add, 2.0),
         ("operand1 is float 2.0; it must be a tensor",)),
    Rule("a column of operands", stt(S(4, 6), S(4, 6), nl.add, S(4, 1, dtype=BF16)),
         stt(S(4, 6), S(4, 6), nl.add, S(4, 6)), ("operand0 [4, 6]", "[4, 1]")),
    Rule("operand0 is a number", stt(), stt(S(4, 6), S(4, 6), nl.add, "2"), ("operand0='2'",)),
    Rule("arithmetic", stt(), stt(S(4, 6), S(4, 6), nl.left_shift, 1),
         ("op0=nl.left_shift is a bitvec operator",)),
    Rule("a binary op1", stt(S(4, 6), S(4, 6), nl.abs, None),
         stt(S(4, 6), S(4, 6), nl.add, 0, nl.abs), ("op1=nl.abs takes one operand",)),
]  # fmt: skip


@pytest.mark.parametrize("rule", FUSED, ids=by_name)
def test_scalar_tensor_tensor_rule(rule):
    check(rule, "scalar_tensor_tensor", SITE)


act = of("activation_reduce", S(4, 6), nl.exp, S(4, 6), nl.add, S(4, 1))

ACTIVATION = [
    Rule("a function", act(), act(S(4, 6), nl.add), ("nl.add is no activation function",)),
    Rule("only sums", act(), act(S(4, 6), nl.exp, S(4, 6), nl.maximum), ("reduce_op=nl.maximum",)),
    Rule("an operator", act(), act(S(4, 6), nl.exp, S(4, 6), None),
         ("without reduce_op", "reduce_op=nl.add")),
    Rule("a column of sums", act(S(4, 6), nl.exp, S(4, 6), nl.add, None),
         act(S(4, 6), nl.exp, S(4, 6), nl.add, S(4, 2)), ("reduce_res [4, 2]",)),
    Rule("a tile of sums", act(), act(S(4, 6), nl.exp, S(4, 6), nl.add, 0.0),
         ("reduce_res=0.0", "a [P, 1] tile or None")),
    Rule("a float32 scale", act(scale=S(4, 1)), act(scale=S(4, 1, dtype=BF16)),
         ("scale is bfloat16",)),
]  # fmt: skip


@pytest.mark.parametrize("rule", ACTIVATION, ids=by_name)
def test_activation_reduce_rule(rule):
    check(rule, "activation_reduce", SITE)
