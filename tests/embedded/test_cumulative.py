"""tensor_scalar_cumulative and tensor_partition_reduce."""

from __future__ import annotations

import math

import nki.isa as nisa
import nki.language as nl
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from nki_kernels.machine.trace import StreamWork
from tests.embedded.calls import SITE, P, S, of
from tests.embedded.folds import left, single, small
from tests.embedded.harness import (
    FLOATS,
    INTEGERS,
    Rule,
    by_name,
    cast,
    check,
    columns,
    data,
    event,
    rows,
    same,
    sb,
    tile,
    values,
)
from tests.embedded.test_elementwise import FORMULAS, each

F32 = np.float32
R = nisa.reduce_cmd
NARROW = (*FLOATS, nl.int8, nl.int16, nl.uint8, nl.uint16)
START = {"add": 0.0, "subtract": 0.0, "multiply": 1.0, "maximum": -math.inf, "minimum": math.inf}
kinds = st.sampled_from(NARROW)
seeds = st.integers(0, 2**20)


# -- tensor_scalar_cumulative ----------------------------------------------------------------------


def running(x, op, start):
    """Element by element, each step rounded to float32; returns what is written."""
    out = np.empty(x.shape)
    for row, line in enumerate(x):
        state = start[row]
        for i, element in enumerate(line):
            state = single(FORMULAS[op](float(element), state))
            out[row, i] = state
    return out


@given(p=rows, n=columns, op=st.sampled_from(sorted(START)), types=st.tuples(kinds, kinds),
       vector=st.booleans(), init=st.sampled_from(["reset", "number", "vector"]),
       seed=seeds)  # fmt: skip
def test_tensor_scalar_cumulative(p, n, op, types, vector, init, seed):
    x = small(seed, (p, n), types[0])
    by = data(seed + 1, (p, 1), nl.float32, 1) if vector else np.full((p, 1), 0.5, F32)
    begin = {"reset": np.full(p, START[op]), "number": np.full(p, 3.0),
             "vector": data(seed + 2, (p,), nl.float32).astype(float)}[init]  # fmt: skip

    def call(y, a, b):
        dst = sb(p, n, dtype=types[1])
        imm1 = {"reset": None, "number": 3.0, "vector": tile(b) if init == "vector" else None}
        nisa.tensor_scalar_cumulative(
            dst, tile(y), nl.multiply, getattr(nl, op), tile(a) if vector else 0.5, imm1[init],
            R.reset_reduce if init == "reset" else R.load_reduce,
        )  # fmt: skip
        return dst

    first = cast(each(FORMULAS["multiply"], x, by), nl.float32)
    want = cast(running(first, op, begin), types[1])
    same(values(call, x, by, begin.astype(F32)[:, None]), want)


def test_example_15():
    def call(op, imm1=None):
        def kernel(y):
            dst = sb(1, 3)
            command = R.reset_reduce if imm1 is None else R.load_reduce
            nisa.tensor_scalar_cumulative(dst, tile(y), nl.multiply, op, 2.0, imm1, command)
            return dst

        return values(kernel, np.array([[1, 2, 3]], F32))[0].tolist()

    assert call(nl.add) == [2, 6, 12]
    assert call(nl.subtract) == [2, 2, 4]
    assert call(nl.add, 10.0) == [12, 16, 22]


def test_the_accumulator_is_shared_with_reductions():
    def call(y):
        x, dst, total = tile(y), sb(2, 3), sb(2, 1)
        nisa.tensor_scalar_cumulative(dst, x, nl.add, nl.add, 0.0)
        nisa.tensor_scalar_cumulative(dst, x, nl.add, nl.add, 0.0, reduce_cmd=R.reduce)
        nisa.tensor_scalar_reduce(sb(2, 3), x, nl.add, 0.0, nl.add, total, reduce_cmd=R.reduce)
        return dst, total

    dst, total = values(call, np.array([[1, 2, 3], [4, 5, 6]], F32))
    assert dst.tolist() == [[7, 9, 12], [19, 24, 30]]
    assert total.tolist() == [[18], [45]]


def test_the_state_is_not_rounded_to_dst():
    def call(y):
        dst = sb(1, 2, dtype=nl.int8)
        nisa.tensor_scalar_cumulative(dst, tile(y), nl.add, nl.add, 0.0)
        return dst

    assert values(call, np.array([[1.4, 1.4]], F32)).tolist() == [[1, 3]]


def test_cumulative_events():
    call = of("tensor_scalar_cumulative", S(2, 6), S(2, 6), nl.multiply, nl.add, S(2, 1))
    found = event(call())
    operand = ("float32", "sbuf", 4)
    assert (found.hidden_reads, found.hidden_writes) == ((), ("vector_accumulator",))
    want = StreamWork(
        "tensor_scalar_cumulative", "multiply", 6, 2, (operand,), operand, 1, reduces=True
    )
    assert (found.engine, found.work) == (nisa.engine.vector, want)
    assert event(call(reduce_cmd=R.reduce)).hidden_reads == ("vector_accumulator",)


# -- tensor_partition_reduce -----------------------------------------------------------------------


@given(p=rows, n=columns, op=st.sampled_from(["add", "average", "maximum"]),
       types=st.tuples(*[st.sampled_from([*FLOATS, *INTEGERS])] * 2), seed=seeds)  # fmt: skip
def test_tensor_partition_reduce(p, n, op, types, seed):
    x = data(seed, (p, n), types[0])
    lines = [left("add" if op == "average" else op, line) for line in x.astype(F32).T]
    want = [total / p if op == "average" else total for total in lines]

    def call(y):
        dst = sb(1, n, dtype=types[1])
        nisa.tensor_partition_reduce(dst, getattr(nl, op), tile(y))
        return dst

    same(values(call, x), cast(np.array([want]), types[1]))


@pytest.mark.parametrize("op", ["bitwise_or", "bitwise_and"])
def test_bits_across_partitions(op):
    x = np.array([[0x7FFFFFFF, 5], [-1, 6], [0x1234567, 12]], np.int32)
    fold = {"bitwise_or": lambda a, b: a | b, "bitwise_and": lambda a, b: a & b}[op]

    def call(y):
        dst = sb(1, 2, dtype=nl.int32)
        nisa.tensor_partition_reduce(dst, getattr(nl, op), tile(y))
        return dst

    want = [[fold(fold(int(a), int(b)), int(c)) for a, b, c in x.T]]
    assert values(call, x).tolist() == want


def test_partition_reduce_event():
    found = event(lambda: nisa.tensor_partition_reduce(sb(1, 2, 3), nl.average, sb(4, 6)))
    operand = ("float32", "sbuf", 4)
    assert found.engine is nisa.engine.gpsimd
    assert found.work == StreamWork("tensor_partition_reduce", "average", 6, 1, (operand,), operand)


# -- rules -----------------------------------------------------------------------------------------

running_of = of("tensor_scalar_cumulative", S(2, 3), S(2, 3), nl.multiply, nl.add, 1.0)
across = of("tensor_partition_reduce", S(1, 3), nl.add, S(4, 3))
I32 = nl.int32
CUMULATIVE = [
    Rule("running operator", running_of(), running_of(S(2, 3), S(2, 3), nl.add, nl.equal),
         ("op1=nl.equal", "nl.subtract")),
    Rule("arithmetic op0", running_of(), running_of(S(2, 3), S(2, 3), nl.bitwise_or),
         ("op0=nl.bitwise_or", "arithmetic")),
    Rule("no int32 src", running_of(), running_of(S(2, 3), S(2, 3, dtype=I32)),
         ("src is int32", "8- and 16-bit")),
    Rule("no int32 dst", running_of(), running_of(S(2, 3, dtype=I32)), ("dst is int32",)),
    Rule("one extent", running_of(), running_of(S(2, 4)), ("dst [2, 4], src [2, 3]",)),
    Rule("command", running_of(), running_of(reduce_cmd=R.idle), ("reduce_cmd", "load_reduce")),
    Rule("imm1 to load", running_of(imm1=1.0, reduce_cmd=R.load_reduce),
         running_of(reduce_cmd=R.load_reduce), ("imm1=None with reduce_cmd=load_reduce",)),
    Rule("imm1 only to load", running_of(), running_of(imm1=1.0),
         ("imm1=1.0 with reduce_cmd=reset_reduce",)),
    Rule("float32 imm0", running_of(S(2, 3), S(2, 3), nl.add, nl.add, S(2, 1)),
         running_of(S(2, 3), S(2, 3), nl.add, nl.add, S(2, 1, dtype=nl.bfloat16)),
         ("imm0 is bfloat16", "float32")),
    Rule("a column of imm0", running_of(S(2, 3), S(2, 3), nl.add, nl.add, S(2, 1)),
         running_of(S(2, 3), S(2, 3), nl.add, nl.add, S(2, 2)), ("imm0 [2, 2]", "[2, 1]")),
]  # fmt: skip
ACROSS = [
    Rule("operator", across(), across(S(1, 3), nl.minimum), ("op=nl.minimum", "nl.average")),
    Rule("one partition", across(), across(S(2, 3)), ("dst [2, 3] for data [4, 3]", "[1, 3]")),
    Rule("columns", across(), across(S(1, 4)), ("dst [1, 4] for data [4, 3]",)),
    Rule("bits of integers", across(S(1, 3, dtype=I32), nl.bitwise_or, S(4, 3, dtype=I32)),
         across(S(1, 3), nl.bitwise_or), ("dst float32, data float32", "integers")),
    Rule("bits of one width", across(S(1, 3, dtype=I32), nl.bitwise_or, S(4, 3, dtype=I32)),
         across(S(1, 3, dtype=nl.int16), nl.bitwise_or, S(4, 3, dtype=I32)), ("widths",)),
    Rule("no PSUM", across(), across(S(1, 3), nl.add, P(4, 3)), ("data is in PSUM", "gpsimd")),
]  # fmt: skip


@pytest.mark.parametrize("rule", CUMULATIVE, ids=by_name)
def test_tensor_scalar_cumulative_rule(rule):
    check(rule, "tensor_scalar_cumulative", SITE)


@pytest.mark.parametrize("rule", ACROSS, ids=by_name)
def test_tensor_partition_reduce_rule(rule):
    check(rule, "tensor_partition_reduce", SITE)
