"""Operand rules of affine_select, range_select, tensor_copy_predicated and the searches."""

from __future__ import annotations

import nki.isa as nisa
import nki.language as nl
import pytest

from tests.embedded.calls import SITE, P, S, of
from tests.embedded.harness import Rule, by_name, check, refused, traced

R = nisa.reduce_cmd
BF16, I32, U8, U16, U32 = nl.bfloat16, nl.int32, nl.uint8, nl.uint16, nl.uint32
FP32_MIN = -3.4028235e38


affine = of("affine_select", S(4, 6), [[1, 6]], 0, S(4, 6), 0.0)

AFFINE = [
    Rule("dst in SBUF", affine(), affine(P(4, 6)), ("dst is in PSUM", "must be in SBUF")),
    Rule("data in SBUF", affine(), affine(S(4, 6), [[1, 6]], 0, P(4, 6)),
         ("on_true_tile is in PSUM", "copy it there")),
    Rule("counts", affine(S(4, 6), [[1, 2], [0, 3]]), affine(S(4, 6), [[1, 5]]),
         ("makes 5 values", "holds 6")),
    Rule("pairs", affine(S(4, 6), [(-1, 6)]), affine(S(4, 6), [6]), ("1 to 4 pairs",)),
    Rule("an int offset", affine(offset=2), affine(offset=2.0), ("offset=2.0", "must be an int")),
    Rule("an int multiplier", affine(S(4, 6), [[1, 6]], -1), affine(S(4, 6), [[1, 6]], 0.5),
         ("channel_multiplier=0.5",)),
    Rule("a number for false", affine(), affine(S(4, 6), [[1, 6]], 0, S(4, 6), S(4, 1)),
         ("on_false_value=<NkiTensor", "must be a number")),
    Rule("a comparison", affine(cmp_op=nl.not_equal), affine(cmp_op=nl.add),
         ("cmp_op=nl.add", "nl.equal", "nl.greater_equal")),
]  # fmt: skip


@pytest.mark.parametrize("rule", AFFINE, ids=by_name)
def test_affine_select_rule(rule):
    check(rule, "affine_select", SITE)


ranged = of("range_select", S(4, 6), S(4, 6), nl.greater_equal, nl.less, S(4, 1), S(4, 1))

RANGE = [
    Rule("float data", ranged(S(4, 6, dtype=I32), P(4, 6)),
         ranged(S(4, 6), S(4, 6, dtype=I32)), ("on_true_tile is int32", "a float type")),
    Rule("float32 bounds", ranged(),
         ranged(S(4, 6), S(4, 6), nl.less, nl.less, S(4, 1), S(4, 1, dtype=BF16)),
         ("bound1 is bfloat16", "float32")),
    Rule("bounds are tiles", ranged(), ranged(S(4, 6), S(4, 6), nl.less, nl.less, 3.0),
         ("bound0 is float 3.0; it must be a tensor",)),
    Rule("a bound per partition", ranged(),
         ranged(S(4, 6), S(4, 6), nl.less, nl.less, S(4, 2)), ("bound0 [4, 2]", "[4, 1]")),
    Rule("comparisons", ranged(S(4, 6), S(4, 6), nl.equal), ranged(S(4, 6), S(4, 6), nl.not_equal),
         ("comp_op0=nl.not_equal", "nl.equal")),
    Rule("two comparisons", ranged(), ranged(S(4, 6), S(4, 6), nl.less, nl.maximum),
         ("comp_op1=nl.maximum",)),
    Rule("the lowest float", ranged(on_false_value=FP32_MIN), ranged(on_false_value=-1e30),
         ("on_false_value=-1e+30", "only -3.4028235e+38", "leave it out")),
    Rule("a start that is an int", ranged(range_start=-3), ranged(range_start=1.0),
         ("range_start=1.0", "must be an int")),
    Rule("exact indices", ranged(range_start=2**24 - 5), ranged(range_start=2**24 - 4),
         ("indices 16777212 to 16777217", "up to 16777216", "shift the bounds")),
    Rule("exact negative indices", ranged(range_start=-(2**24)),
         ranged(range_start=-(2**24) - 1), ("indices -16777217",)),
    Rule("only maximum", ranged(reduce_op=nl.max), ranged(reduce_op=nl.minimum),
         ("reduce_op=nl.minimum", "allowed: nl.maximum")),
    Rule("commands", ranged(reduce_cmd=R.idle), ranged(reduce_cmd=R.load_reduce),
         ("allowed are idle, reset, reduce, reset_reduce",)),
    Rule("no result of idle", ranged(reduce_res=S(4, 1)),
         ranged(reduce_cmd=R.idle, reduce_res=S(4, 1)), ("unknown after idle",)),
]  # fmt: skip


@pytest.mark.parametrize("rule", RANGE, ids=by_name)
def test_range_select_rule(rule):
    check(rule, "range_select", SITE)


def test_range_select_needs_gen3():
    traced(ranged(), target="trn2")
    refused(ranged(), "range_select on trn1", "needs gen3: use affine_select", target="trn1")


copy = of("tensor_copy_predicated", S(4, 6), S(4, 6), S(4, 6, dtype=U8))

COPY = [
    Rule("unsigned predicates", copy(S(4, 6), S(4, 6), S(4, 6, dtype=U32)),
         copy(S(4, 6), S(4, 6), S(4, 6, dtype=nl.int8)),
         ("predicate is int8", "uint8, uint16, uint32")),
    Rule("one dtype", copy(S(4, 6, dtype=BF16), S(4, 6, dtype=BF16)), copy(S(4, 6, dtype=BF16)),
         ("src float32, dst bfloat16", "tensor_copy")),
    Rule("one of two in PSUM", copy(P(4, 6), P(4, 6)), copy(S(4, 6), P(4, 6), P(4, 6, dtype=U8)),
         ("src and predicate are all in PSUM",)),
    Rule("a number", copy(S(4, 6), 1), copy(S(4, 6), None),
         ("src=None", "a tile or a number")),
    Rule("an int for integers", copy(S(4, 6, dtype=I32), 1), copy(S(4, 6, dtype=I32), 1.0),
         ("src=1.0 is a float and dst is int32", "write an int")),
]  # fmt: skip


@pytest.mark.parametrize("rule", COPY, ids=by_name)
def test_tensor_copy_predicated_rule(rule):
    check(rule, "tensor_copy_predicated", SITE)


# -- searches --------------------------------------------------------------------------------------

MAX8 = [
    Rule("eight elements", of("max8")(P(4, 8), P(4, 8)), of("max8")(S(4, 8), S(4, 7)),
         ("src [4, 7] has 7 elements per partition", "8 to 16384")),
    Rule("a row is not too long", of("max8")(S(1, 8), S(1, 16384, dtype=U8)),
         of("max8")(S(1, 8), S(1, 16385, dtype=U8)), ("has 16385",), "trn2"),
    Rule("three dimensions", of("max8")(S(4, 8), S(4, 2, 4)), of("max8")(S(4, 8), S(4, 2, 2, 2)),
         ("src [4, 2, 2, 2] has 4 dimensions", "at most 3")),
    Rule("eight results", of("max8")(S(4, 8), S(4, 9)), of("max8")(S(4, 9), S(4, 9)),
         ("dst [4, 9] for src [4, 9]", "must hold [4, 8]")),
    Rule("a flat result", of("max8")(S(4, 8), S(4, 9)), of("max8")(S(4, 2, 4), S(4, 9)),
         ("dst [4, 2, 4]", "at most 2 dimensions")),
    Rule("the same rows", of("max8")(S(4, 8), S(4, 9)), of("max8")(S(3, 8), S(4, 9)),
         ("dst [3, 8]", "must hold [4, 8]")),
]  # fmt: skip


@pytest.mark.parametrize("rule", MAX8, ids=by_name)
def test_max8_rule(rule):
    check(rule, "max8", SITE)


index = of("nc_find_index8", S(4, 8, dtype=U32), S(4, 12), S(4, 8))

FIND = [
    Rule("unsigned indices", index(P(4, 8, dtype=U16)), index(S(4, 8, dtype=I32)),
         ("dst is int32", "uint16, uint32")),
    Rule("eight values", index(S(4, 8, dtype=U32), P(4, 12), P(4, 2, 4)),
         index(S(4, 8, dtype=U32), S(4, 12), S(4, 9)),
         ("vals [4, 9] for data [4, 12]", "must hold [4, 8]")),
    Rule("eight indices", index(), index(S(4, 4, dtype=U32)), ("dst [4, 4]", "[4, 8]")),
    Rule("eight elements", index(), index(S(4, 8, dtype=U32), S(4, 7)), ("has 7 elements",)),
    Rule("three dimensions", index(S(4, 8, dtype=U32), S(4, 2, 4)),
         index(S(4, 8, dtype=U32), S(4, 2, 2, 2)), ("has 4 dimensions",)),
]  # fmt: skip


@pytest.mark.parametrize("rule", FIND, ids=by_name)
def test_nc_find_index8_rule(rule):
    check(rule, "nc_find_index8", SITE)


replace = of("nc_match_replace8", S(4, 12), S(4, 12), S(4, 8), 0.0)

MATCH = [
    Rule("eight values", replace(), replace(S(4, 12), S(4, 12), S(4, 7)), ("vals [4, 7]",)),
    Rule("equal sizes", replace(P(4, 3, 4)), replace(S(4, 11)), ("dst [4, 11]", "must agree")),
    Rule("a row is not too long", replace(S(1, 16384, dtype=U8), S(1, 16384, dtype=U8), S(1, 8)),
         replace(S(1, 16385, dtype=U8), S(1, 16385, dtype=U8), S(1, 8)),
         ("data [1, 16385] has 16385", "1 to 16384"), "trn2"),
    Rule("a number", replace(S(4, 12), S(4, 12), S(4, 8), float("-inf")),
         replace(S(4, 12), S(4, 12), S(4, 8), S(4, 1)), ("imm=<NkiTensor", "must be a number")),
    Rule("unsigned indices", replace(S(4, 12), S(4, 12), S(4, 8), 0.0, S(4, 8, dtype=U16)),
         replace(S(4, 12), S(4, 12), S(4, 8), 0.0, S(4, 8)), ("dst_idx is float32",)),
    Rule("eight indices", replace(S(4, 12), S(4, 12), S(4, 8), 0.0, None),
         replace(S(4, 12), S(4, 12), S(4, 8), 0.0, S(4, 9, dtype=U32)), ("dst_idx [4, 9]",)),
]  # fmt: skip


@pytest.mark.parametrize("rule", MATCH, ids=by_name)
def test_nc_match_replace8_rule(rule):
    check(rule, "nc_match_replace8", SITE)


def test_the_searches_run_on_vector_only():
    with pytest.raises(TypeError, match="engine"):
        nisa.max8(None, None, engine=nisa.engine.vector)
