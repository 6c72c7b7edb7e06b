"""Operand rules of the elementwise instructions and of activation: legal, illegal, message."""

from __future__ import annotations

import nki.isa as nisa
import nki.language as nl
import numpy as np
import pytest

from nki_kernels.machine.errors import UninitializedRead
from tests.embedded.harness import Rule, by_name, check, hbm, ps, refused, sb, traced

VECTOR, SCALAR, GPSIMD = nisa.engine.vector, nisa.engine.scalar, nisa.engine.gpsimd
I8, I16, I32, U32, BF16 = nl.int8, nl.int16, nl.int32, nl.uint32, nl.bfloat16


def S(*shape, dtype=nl.float32):
    return lambda: sb(*shape, dtype=dtype)


def P(*shape, dtype=nl.float32):
    return lambda: ps(*shape, dtype=dtype)


def H(*shape):
    return lambda: hbm(*shape)


def later(value):
    """A tile that is allocated inside the kernel, or the value itself."""
    return value() if callable(value) and not hasattr(value, "nki_op") else value


def call(instruction, *operands, **options):
    return lambda: instruction(
        *[later(v) for v in operands], **{k: later(v) for k, v in options.items()}
    )


def copy(*operands, **options):
    return call(nisa.tensor_copy, *operands, **options)


COPY = [
    Rule("equal extents", copy(S(4, 6), S(4, 2, 3)), copy(S(4, 6), S(4, 5)),
         ("dst [4, 6], src [4, 5]", "elements per partition must agree", "slice or reshape")),
    Rule("equal partitions", copy(S(4, 6), S(4, 6)), copy(S(2, 6), S(4, 3)),
         ("dst [2, 6], src [4, 3]", "partitions")),
    Rule("no HBM source", copy(S(4, 6), P(4, 6)), copy(S(4, 6), H(4, 6)),
         ("src [4, 6] is in HBM", "SBUF and PSUM only", "dma_copy")),
    Rule("no HBM destination", copy(P(4, 6), S(4, 6)), copy(H(4, 6), S(4, 6)),
         ("dst [4, 6] is in HBM", "dma_copy")),
    Rule("GpSimd not from PSUM", copy(S(4, 6), S(4, 6), engine=GPSIMD),
         copy(S(4, 6), P(4, 6), engine=GPSIMD),
         ("src is in PSUM and the engine is gpsimd", "SBUF only", "vector or scalar engine")),
    Rule("GpSimd not to PSUM", copy(P(4, 6), P(4, 6), engine=VECTOR),
         copy(P(4, 6), S(4, 6), engine=GPSIMD), ("dst is in PSUM",)),
    Rule("engines", copy(S(4, 6), S(4, 6), engine=SCALAR),
         copy(S(4, 6), S(4, 6), engine=nisa.engine.tensor),
         ("engine=tensor", "runs on vector, scalar, gpsimd", "choose one")),
    Rule("a member of engine", copy(S(4, 6), S(4, 6), engine=VECTOR),
         copy(S(4, 6), S(4, 6), engine="vector"), ("engine='vector'", "nisa.engine")),
    Rule("no Scalar copy on gen2", copy(S(4, 6), S(4, 6), engine=VECTOR),
         copy(S(4, 6), S(4, 6), engine=SCALAR),
         ("engine=scalar on trn1", "vector engine, or activation"), "trn1"),
    Rule("a tensor", copy(S(4, 6), S(4, 6)), copy(None, S(4, 6)),
         ("dst is NoneType None", "must be a tensor", "nl.ndarray")),
    Rule("start of two", copy(lambda: sb(8, 6)[2:4], S(2, 6)), copy(lambda: sb(8, 6)[3:5], S(2, 6)),
         ("dst covers 2 partitions from 3", "start at 0, 2, 4, 6", "DMA")),
    Rule("start of four", copy(lambda: sb(8, 6)[4:8], S(4, 6)),
         copy(lambda: sb(8, 6)[2:6], S(4, 6)),
         ("dst covers 4 partitions from 2", "start at 0, 4")),
    Rule("start of more", copy(S(5, 6), S(5, 6)), copy(lambda: sb(8, 6)[2:7], S(5, 6)),
         ("dst covers 5 partitions from 2", "start at 0:")),
    Rule("start of an address",
         copy(lambda: nl.ndarray((2, 6), nl.float32, buffer=nl.sbuf, address=(4, 0)), S(2, 6)),
         copy(lambda: nl.ndarray((2, 6), nl.float32, buffer=nl.sbuf, address=(5, 0)), S(2, 6)),
         ("dst covers 2 partitions from 5",)),
    Rule("quadrants of trn2", copy(lambda: sb(128, 6)[96:128], S(32, 6)),
         copy(lambda: sb(128, 6)[16:48], S(32, 6)),
         ("dst covers 32 partitions from 16", "start at 0, 32, 64, 96"), "trn2"),
]  # fmt: skip


@pytest.mark.parametrize("rule", COPY, ids=by_name)
def test_copy_rule(rule):
    check(rule, "tensor_copy", __file__)


def memset(*operands, **options):
    return call(nisa.memset, *operands, **options)


MEMSET = [
    Rule("an int for integers", memset(S(4, 6, dtype=I32), 3), memset(S(4, 6, dtype=I32), 3.0),
         ("value 3.0 is a float and dst is int32", "write an int")),
    Rule("zero for packed types", memset(S(4, 6, dtype=nl.float8_e5m2_x4), 0),
         memset(S(4, 6, dtype=nl.float8_e5m2_x4), 1),
         ("value 1 into float8_e5m2_x4", "only be filled with 0")),
    Rule("an int the type holds", memset(S(4, 6, dtype=nl.uint8), 255),
         memset(S(4, 6, dtype=nl.uint8), 256),
         ("value 256 into uint8", "it holds 0 to 255", "write one of those")),
    Rule("no negative int in an unsigned type", memset(S(4, 6, dtype=I8), -1),
         memset(S(4, 6, dtype=U32), -1), ("value -1 into uint32", "it holds 0 to 4294967295")),
    Rule("an int that float32 holds", memset(S(4, 6), 2**127), memset(S(4, 6), 10**400),
         ("into float32", "it holds -340282346638528859811704183484516925440 to")),
    Rule("a number", memset(S(4, 6), np.float32(1)), memset(S(4, 6), "1"),
         ("value '1'", "a number known when the kernel is built")),
    Rule("engines", memset(S(4, 6), 0, engine=GPSIMD), memset(S(4, 6), 0, engine=SCALAR),
         ("engine=scalar", "runs on vector, gpsimd")),
    Rule("not HBM", memset(P(4, 6), 0), memset(H(4, 6), 0), ("dst [4, 6] is in HBM",)),
]  # fmt: skip


@pytest.mark.parametrize("rule", MEMSET, ids=by_name)
def test_memset_rule(rule):
    check(rule, "memset", __file__)


def tt(dst, a, b, op=nl.add, **options):
    return call(nisa.tensor_tensor, dst, a, b, op, **options)


TENSOR_TENSOR = [
    Rule("equal extents", tt(S(4, 6), S(4, 2, 3), S(4, 6)), tt(S(4, 6), S(4, 6), S(4, 1)),
         ("dst [4, 6], data1 [4, 6], data2 [4, 1]", "must agree", "slice or reshape")),
    Rule("one input in PSUM", tt(S(4, 6), P(4, 6), S(4, 6)), tt(S(4, 6), P(4, 6), P(4, 6)),
         ("data1 and data2 are all in PSUM", "at most 1 may be", "tensor_copy")),
    Rule("bits of integers", tt(*[S(4, 6, dtype=I8)] * 3, nl.bitwise_and),
         tt(S(4, 6, dtype=I32), S(4, 6, dtype=I32), S(4, 6), nl.bitwise_and),
         ("nl.bitwise_and with data2 float32", "must be integers")),
    Rule("bits into integers", tt(S(4, 6, dtype=U32), *[S(4, 6, dtype=I32)] * 2, nl.bitwise_or),
         tt(S(4, 6), *[S(4, 6, dtype=I32)] * 2, nl.bitwise_or), ("dst float32",)),
    Rule("bits of one width", tt(*[S(4, 6, dtype=I16)] * 3, nl.bitwise_xor),
         tt(S(4, 6, dtype=I16), *[S(4, 6, dtype=I8)] * 2, nl.bitwise_xor),
         ("nl.bitwise_xor on different widths", "never converted")),
    Rule("bits on Vector", tt(*[S(4, 6, dtype=I32)] * 3, nl.left_shift, engine=VECTOR),
         tt(*[S(4, 6, dtype=I32)] * 3, nl.left_shift, engine=GPSIMD),
         ("nl.left_shift on gpsimd", "runs on the vector engine")),
    Rule("two operands", tt(*[S(4, 6)] * 3, nl.maximum), tt(*[S(4, 6)] * 3, nl.abs),
         ("nl.abs takes one operand", "tensor_scalar or activation")),
    Rule("ALU operators", tt(*[S(4, 6)] * 3, nl.logical_xor), tt(*[S(4, 6)] * 3, nl.exp),
         ("nl.exp is no ALU operator", "nisa.activation")),
    Rule("power on GpSimd", tt(*[S(4, 6)] * 3, nl.power), tt(*[S(4, 6)] * 3, nl.power,
                                                             engine=VECTOR),
         ("nl.power runs on gpsimd", "SBUF")),
    Rule("power in SBUF", tt(*[S(4, 6)] * 3, nl.power), tt(S(4, 6), P(4, 6), S(4, 6), nl.power),
         ("data1 is in PSUM and the engine is gpsimd",)),
    Rule("engines", tt(*[S(4, 6)] * 3, engine=GPSIMD), tt(*[S(4, 6)] * 3, engine=SCALAR),
         ("engine=scalar", "runs on vector, gpsimd")),
]  # fmt: skip


@pytest.mark.parametrize("rule", TENSOR_TENSOR, ids=by_name)
def test_tensor_tensor_rule(rule):
    check(rule, "tensor_tensor", __file__)


@pytest.mark.parametrize("op", [nl.abs_max, nl.abs_min])
def test_abs_max_needs_gen4(op):
    traced(tt(*[S(4, 6)] * 3, op), target="trn3")
    refused(tt(*[S(4, 6)] * 3, op), f"{op!r} on trn2", "needs gen4", target="trn2")


def ts(dst, data, op0, operand0, **options):
    return call(nisa.tensor_scalar, dst, data, op0, operand0, **options)


FUSED = {"op1": nl.add, "operand1": 1.0}
TENSOR_SCALAR = [
    Rule("equal extents", ts(S(4, 6), S(4, 3, 2), nl.add, 1), ts(S(4, 6), S(4, 5), nl.add, 1),
         ("dst [4, 6], data [4, 5]",)),
    Rule("a column", ts(S(4, 6), S(4, 6), nl.add, P(4, 1)), ts(S(4, 6), S(4, 6), nl.add, S(4, 6)),
         ("operand0 [4, 6]", "vector operand is [4, 1]", "use tensor_tensor")),
    Rule("a column of the same partitions", ts(S(4, 6), S(4, 6), nl.add, 1, op1=nl.add,
                                               operand1=S(4, 1)),
         ts(S(4, 6), S(4, 6), nl.add, 1, op1=nl.add, operand1=S(2, 1)), ("operand1 [2, 1]",)),
    Rule("a float32 column", ts(S(4, 6), S(4, 6, dtype=BF16), nl.add, S(4, 1)),
         ts(S(4, 6), S(4, 6, dtype=BF16), nl.add, S(4, 1, dtype=BF16)),
         ("operand0 is bfloat16", "must be float32")),
    Rule("an integer for bits", ts(*[S(4, 6, dtype=I32)] * 2, nl.left_shift, 2),
         ts(*[S(4, 6, dtype=I32)] * 2, nl.left_shift, 2.0),
         ("operand0=2.0 for bitvec nl.left_shift", "must be an integer")),
    Rule("an integer of the data's width", ts(*[S(4, 6, dtype=I32)] * 2, nl.bitwise_and, 2**32 - 1),
         ts(*[S(4, 6, dtype=I32)] * 2, nl.bitwise_and, 2**32),
         ("operand0=4294967296 for nl.bitwise_and of int32 data", "it must be -2147483648 to")),
    Rule("a shift within the width", ts(*[S(4, 6, dtype=I16)] * 2, nl.left_shift, 15),
         ts(*[S(4, 6, dtype=I16)] * 2, nl.left_shift, 16),
         ("operand0=16 for nl.left_shift of int16 data", "it must be 0 to 15", "write one")),
    Rule("no negative shift", ts(*[S(4, 6, dtype=I32)] * 2, nl.right_shift, -1, reverse0=True),
         ts(*[S(4, 6, dtype=I32)] * 2, nl.right_shift, -1),
         ("operand0=-1 for nl.right_shift of int32 data",)),
    Rule("no bool", ts(S(4, 6), S(4, 6), nl.add, 1), ts(S(4, 6), S(4, 6), nl.add, True),
         ("operand0=True", "a number or a float32")),
    Rule("a number", ts(S(4, 6), S(4, 6), nl.add, 1), ts(S(4, 6), S(4, 6), nl.add, None),
         ("operand0=None", "a number or a float32 [P, 1] tile")),
    Rule("nothing for unary", ts(S(4, 6), S(4, 6), nl.abs, None), ts(S(4, 6), S(4, 6), nl.abs, 2),
         ("operand0 for unary nl.abs", "None or 0")),
    Rule("op1 with operand1", ts(S(4, 6), S(4, 6), nl.add, 1, **FUSED),
         ts(S(4, 6), S(4, 6), nl.add, 1, op1=nl.add),
         ("op1=nl.add with operand1=None", "both or neither")),
    Rule("operand1 with op1", ts(S(4, 6), S(4, 6), nl.add, 1),
         ts(S(4, 6), S(4, 6), nl.add, 1, operand1=1.0), ("op1=None with operand1=1.0",)),
    Rule("one kind", ts(*[S(4, 6, dtype=I32)] * 2, nl.bitwise_and, 1, op1=nl.bitwise_or,
                        operand1=2),
         ts(*[S(4, 6, dtype=I32)] * 2, nl.bitwise_and, 1, op1=nl.add, operand1=2),
         ("both bitvec or both arithmetic", "split")),
    Rule("bits on Vector", ts(*[S(4, 6, dtype=I32)] * 2, nl.bitwise_and, 1, engine=VECTOR),
         ts(*[S(4, 6, dtype=I32)] * 2, nl.bitwise_and, 1, engine=SCALAR),
         ("nl.bitwise_and on scalar", "vector engine")),
    Rule("bits of integers", ts(*[S(4, 6, dtype=I32)] * 2, nl.invert, None),
         ts(*[S(4, 6)] * 2, nl.invert, None), ("nl.invert with data float32, dst float32",)),
    Rule("multiply-add on Scalar", ts(S(4, 6), S(4, 6), nl.multiply, 2, **FUSED, engine=SCALAR),
         ts(S(4, 6), S(4, 6), nl.subtract, 2, engine=SCALAR),
         ("operators ['subtract'] on the scalar engine of toy", "multiply-add", "vector engine")),
    Rule("no add-multiply on Scalar", ts(S(4, 6), S(4, 6), nl.add, 2, engine=SCALAR),
         ts(S(4, 6), S(4, 6), nl.add, 2, op1=nl.multiply, operand1=2, engine=SCALAR),
         ("operators ['add', 'multiply']",)),
    Rule("rsqrt on GpSimd", ts(S(4, 6), S(4, 6), nl.rsqrt, None, engine=GPSIMD),
         ts(S(4, 6), S(4, 6), nl.add, 1, engine=GPSIMD),
         ("operators ['add'] on gpsimd", "only nl.rsqrt")),
    Rule("no rsqrt on Vector", ts(S(4, 6), S(4, 6), nl.rsqrt, None),
         ts(S(4, 6), S(4, 6), nl.rsqrt, None, engine=VECTOR),
         ("nl.rsqrt on the vector engine", "gpsimd or scalar")),
    Rule("ALU operators", ts(S(4, 6), S(4, 6), nl.minimum, 1), ts(S(4, 6), S(4, 6), nl.tanh, 1),
         ("nl.tanh is no ALU operator", "nisa.activation")),
    Rule("not HBM", ts(S(4, 6), P(4, 6), nl.add, 1), ts(S(4, 6), S(4, 6), nl.add, H(4, 1)),
         ("operand0 [4, 1] is in HBM",)),
]  # fmt: skip


@pytest.mark.parametrize("rule", TENSOR_SCALAR, ids=by_name)
def test_tensor_scalar_rule(rule):
    check(rule, "tensor_scalar", __file__)


@pytest.mark.parametrize("op", [nl.square, nl.relu])
def test_square_and_relu_need_gen4(op):
    unary = ts(S(4, 6), S(4, 6), op, None)
    traced(unary, target="trn3")
    refused(unary, f"{op!r} on trn2", "needs gen4: use nisa.activation", target="trn2")


def test_gen4_scalar_takes_more_operators_and_gen2_none():
    minimum = ts(S(4, 6), S(4, 6), nl.minimum, 1, engine=SCALAR)
    traced(minimum, target="trn3")
    refused(minimum, "scalar engine of trn2", target="trn2")
    refused(ts(S(4, 6), S(4, 6), nl.add, 1, engine=SCALAR), "scalar engine of trn1", target="trn1")


def act(dst, op, data, **options):
    return call(nisa.activation, dst, op, data, **options)


REDUCE = nisa.reduce_cmd.reset_reduce
ACTIVATION = [
    Rule("equal extents", act(S(4, 6), nl.exp, S(4, 3, 2)), act(S(4, 6), nl.exp, S(4, 5)),
         ("dst [4, 6], data [4, 5]",)),
    Rule("a function", act(S(4, 6), nl.gelu, S(4, 6)), act(S(4, 6), nl.add, S(4, 6)),
         ("nl.add is no activation function", "tensor_scalar or tensor_tensor")),
    Rule("a float32 scale", act(S(4, 6), nl.exp, S(4, 6), scale=P(4, 1)),
         act(S(4, 6), nl.exp, S(4, 6), scale=S(4, 1, dtype=BF16)),
         ("scale is bfloat16", "must be float32")),
    Rule("a column of scales", act(S(4, 6), nl.exp, S(4, 6), scale=S(4, 1)),
         act(S(4, 6), nl.exp, S(4, 6), scale=S(4, 2)), ("scale [4, 2]", "[4, 1]")),
    Rule("a number", act(S(4, 6), nl.exp, S(4, 6), scale=2), act(S(4, 6), nl.exp, S(4, 6),
                                                                 scale=None),
         ("scale=None", "a number or a float32 [P, 1] tile")),
    Rule("a bias of floats", act(S(4, 6), nl.exp, S(4, 6), bias=S(4, 1, dtype=BF16)),
         act(S(4, 6), nl.exp, S(4, 6), bias=S(4, 1, dtype=nl.tfloat32)),
         ("bias is tfloat32", "other than tfloat32")),
    Rule("a column of biases", act(S(4, 6), nl.exp, S(4, 6), bias=P(4, 1)),
         act(S(4, 6), nl.exp, S(4, 6), bias=S(3, 1)), ("bias [3, 1]", "[4, 1]")),
    Rule("no number as bias on gen2", act(S(4, 6), nl.exp, S(4, 6), bias=S(4, 1)),
         act(S(4, 6), nl.exp, S(4, 6), bias=1.0),
         ("bias=1.0 is a number", "on trn1 it must be a [P, 1] tile"), "trn1"),
    Rule("no bias in reciprocal on gen2", act(S(4, 6), nl.reciprocal, S(4, 6)),
         act(S(4, 6), nl.reciprocal, S(4, 6), bias=S(4, 1)),
         ("nl.reciprocal with a bias on trn1", "add the bias first"), "trn1"),
    Rule("only sums", act(S(4, 6), nl.exp, S(4, 6), reduce_op=nl.add, reduce_cmd=REDUCE),
         act(S(4, 6), nl.exp, S(4, 6), reduce_op=nl.maximum, reduce_cmd=REDUCE),
         ("reduce_op=nl.maximum", "pass nl.add")),
    Rule("an operator to reduce with", act(S(4, 6), nl.exp, S(4, 6)),
         act(S(4, 6), nl.exp, S(4, 6), reduce_cmd=REDUCE),
         ("reduce_cmd=reset_reduce without reduce_op", "pass reduce_op=nl.add")),
    Rule("no load_reduce", act(S(4, 6), nl.exp, S(4, 6), reduce_cmd=nisa.reduce_cmd.reset),
         act(S(4, 6), nl.exp, S(4, 6), reduce_op=nl.add, reduce_cmd=nisa.reduce_cmd.load_reduce),
         ("load_reduce", "allowed are idle, reset, reduce, reset_reduce")),
    Rule("a column of sums", act(S(4, 6), nl.exp, S(4, 6), reduce_op=nl.add, reduce_cmd=REDUCE,
                                 reduce_res=P(4, 1)),
         act(S(4, 6), nl.exp, S(4, 6), reduce_op=nl.add, reduce_cmd=REDUCE, reduce_res=S(4, 6)),
         ("reduce_res [4, 6]", "[4, 1]")),
    Rule("sums are floats", act(S(4, 6), nl.exp, S(4, 6), reduce_op=nl.add, reduce_cmd=REDUCE,
                                reduce_res=S(4, 1, dtype=BF16)),
         act(S(4, 6), nl.exp, S(4, 6), reduce_op=nl.add, reduce_cmd=REDUCE,
             reduce_res=S(4, 1, dtype=I32)),
         ("reduce_res is int32", "a float type")),
    Rule("not HBM", act(P(4, 6), nl.exp, P(4, 6)), act(S(4, 6), nl.exp, H(4, 6)),
         ("data [4, 6] is in HBM",)),
]  # fmt: skip


@pytest.mark.parametrize("rule", ACTIVATION, ids=by_name)
def test_activation_rule(rule):
    check(rule, "activation", __file__)


def test_activation_reduce_takes_no_engine():
    with pytest.raises(TypeError, match="engine"):
        nisa.activation_reduce(None, nl.exp, None, nl.add, None, engine=SCALAR)


def iota(dst, pattern, **options):
    return call(nisa.iota, dst, pattern, **options)


IOTA = [
    Rule("in SBUF", iota(S(4, 6, dtype=I32), [[1, 6]]), iota(P(4, 6, dtype=I32), [[1, 6]]),
         ("dst is in PSUM", "must be in SBUF")),
    Rule("counts fill dst", iota(S(4, 6), [[1, 2], [1, 3]]), iota(S(4, 6), [[1, 5]]),
         ("pattern [[1, 5]] makes 5 values", "dst [4, 6] holds 6", "multiply to that")),
    Rule("pairs", iota(S(4, 6), [(1, 6)]), iota(S(4, 6), [1, 6]),
         ("pattern (1, 6)", "1 to 4 pairs [step, count]")),
    Rule("at most four pairs", iota(S(4, 16), [[1, 2]] * 4), iota(S(4, 32), [[1, 2]] * 5),
         ("1 to 4 pairs",)),
    Rule("positive counts", iota(S(4, 6), [[-1, 6]]), iota(S(4, 6), [[1, -6], [1, -1]]),
         ("pattern [[1, -6], [1, -1]]", "the counts must multiply to that")),
    Rule("an int offset", iota(S(4, 6), [[1, 6]], offset=3), iota(S(4, 6), [[1, 6]], offset=3.0),
         ("offset=3.0", "must be an int")),
    Rule("an int multiplier", iota(S(4, 6), [[1, 6]], channel_multiplier=-1),
         iota(S(4, 6), [[1, 6]], channel_multiplier=0.5),
         ("channel_multiplier=0.5", "must be an int")),
    Rule("32-bit steps", iota(S(4, 6), [[2**31 - 1, 6]]), iota(S(4, 6), [[2**31, 6]]),
         ("pattern [[2147483648, 6]]", "32 bits")),
    Rule("a 32-bit offset", iota(S(4, 6), [[1, 6]], offset=-(2**31)),
         iota(S(4, 6), [[1, 6]], offset=2**31), ("offset=2147483648", "32 bits")),
    Rule("a 32-bit multiplier", iota(S(4, 6), [[1, 6]], channel_multiplier=2**31 - 1),
         iota(S(4, 6), [[1, 6]], channel_multiplier=2**70), ("channel_multiplier=", "32 bits")),
]  # fmt: skip


@pytest.mark.parametrize("rule", IOTA, ids=by_name)
def test_iota_rule(rule):
    check(rule, "iota", __file__)


def test_every_broken_rule_is_listed_with_the_source():
    message = refused(copy(lambda: sb(8, 6)[3:5], lambda: hbm(3, 5)))
    assert "; and " in message
    for text in ("src [3, 5] is in HBM", "dst covers 2 partitions from 3", "must agree"):
        assert text in message
    assert message.endswith("]")
    assert "[nki.isa.tensor_copy" in message


@pytest.mark.parametrize("wrong", [np.add, "add", None])
def test_an_operator_must_be_one_of_nl(wrong):
    refused(tt(*[S(4, 6)] * 3, lambda: wrong), "operator", "a function of nki.language")


def test_a_read_of_memory_never_written_names_both_lines():
    def kernel():
        t = sb(2, 4)
        nisa.memset(t[:, 0:3], 0.0)
        nisa.tensor_copy(sb(2, 4), t)

    refused(
        kernel, "nisa.tensor_copy at", "test_elementwise_rules.py", "src reads 2 of 8 elements",
        "first at index (0, 3)", "allocated at", "write them first", error=UninitializedRead,
    )  # fmt: skip
