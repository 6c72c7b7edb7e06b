"""activate2 (gen4): the three stages element by element, the accumulator, rules, events."""

from __future__ import annotations

import math

import nki.isa as nisa
import nki.language as nl
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from nki_kernels.machine.trace import StreamWork
from tests.embedded.calls import SITE, S, of
from tests.embedded.folds import single
from tests.embedded.harness import (
    FLOATS,
    INTEGERS,
    Rule,
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

F32 = np.float32
R = nisa.reduce_cmd
STAGE = {
    "multiply": lambda a, b: a * b, "add": lambda a, b: a + b, "subtract": lambda a, b: a - b,
}  # fmt: skip
PAIRS = [("multiply", "add"), ("multiply", "subtract"), ("multiply", "bypass"),
         ("add", "bypass"), ("subtract", "bypass"), ("bypass", "bypass")]  # fmt: skip
#: Functions whose float32 result is exact, or correctly rounded.
FUNCTIONS = {
    "copy": lambda x, slope: x,
    "square": lambda x, slope: x * x,
    "relu": lambda x, slope: max(x, 0.0),
    "abs": lambda x, slope: abs(x),
    "prelu": lambda x, slope: x if x >= 0 else slope * x,
}
REDUCE = {
    "add": (0.0, lambda a, b: a + b),
    "maximum": (-math.inf, max),
    "minimum": (math.inf, min),
    "abs_max": (0.0, lambda a, b: a if abs(a) > abs(b) else b),
    "abs_min": (math.inf, lambda a, b: a if abs(a) < abs(b) else b),
}
seeds = st.integers(0, 2**20)
kinds = st.sampled_from([*FLOATS, *INTEGERS])


def evaluated(x, op, stages, slope):
    """One element after the other, each operation rounded to float32."""
    out = np.empty(x.shape, F32)
    for (p, f), value in np.ndenumerate(x.astype(float)):
        v = value
        for name, imm, reverse in stages:
            if name != "bypass":
                a, b = (float(imm[p, 0]), v) if reverse else (v, float(imm[p, 0]))
                v = single(STAGE[name](a, b))
        out[p, f] = single(FUNCTIONS[op](v, float(slope[p, 0])))
    return out


def reduced(out, op, start):
    function = REDUCE[op][1]
    sums = []
    for p, line in enumerate(out.astype(float)):
        state = float(start[p])
        for v in line:
            state = single(function(state, float(v)))
        sums.append([state])
    return np.array(sums, F32)


@given(p=rows, n=columns, op=st.sampled_from(sorted(FUNCTIONS)), names=st.sampled_from(PAIRS),
       types=st.tuples(kinds, kinds),
       reverse=st.tuples(st.booleans(), st.booleans()), vector=st.booleans(),
       reduce=st.sampled_from(sorted(REDUCE)), seed=seeds)  # fmt: skip
def test_activate2(p, n, op, names, types, reverse, vector, reduce, seed):
    x = data(seed, (p, n), types[0])
    imm = [data(seed + i, (p, 1), nl.float32) if vector else np.full((p, 1), i + 0.5, F32)
           for i in (1, 2, 3)]  # fmt: skip
    reverse = [r and name != "bypass" for r, name in zip(reverse, names, strict=True)]

    def call(y, *tiles):
        dst, total = sb(p, n, dtype=types[1]), sb(p, 1)
        a, b, slope = (tile(t) for t in tiles) if vector else (1.5, 2.5, 3.5)
        nisa.activate2(
            dst, getattr(nl, op), tile(y), a, b, *(getattr(nl, s) for s in names), slope, *reverse,
            getattr(nl, reduce), total, R.reset_reduce,
        )  # fmt: skip
        return dst, total

    want = evaluated(x, op, list(zip(names, imm, reverse, strict=False)), imm[2])
    dst, total = values(call, x, *imm, target="trn3")
    same(dst, cast(want, types[1]))
    same(total, reduced(want, reduce, np.full(p, REDUCE[reduce][0])))


def test_the_accumulator_continues_and_is_activations_too():
    def call(y):
        x, dst, total = tile(y), sb(2, 2), [sb(2, 1) for _ in range(4)]

        def add(command, result):
            nisa.activate2(dst, nl.copy, x, 2.0, None, nl.multiply, nl.bypass, reduce_op=nl.add,
                           reduce_res=result, reduce_cmd=command)  # fmt: skip

        nisa.activation(dst, nl.copy, x, reduce_op=nl.add, reduce_cmd=R.reset_reduce)
        add(R.reduce, total[0])
        add(R.idle, total[1])
        add(R.reset, total[2])
        add(R.reduce, None)
        nisa.activation(dst, nl.copy, x, reduce_op=nl.add, reduce_res=total[3], reduce_cmd=R.reduce)
        return tuple(total)

    found = values(call, np.array([[1, 2], [3, 4]], F32), target="trn3")
    assert [t[:, 0].tolist() for t in found] == [[9, 21], [9, 21], [0, 0], [9, 21]]


@pytest.mark.parametrize(("op", "want"), [("abs_max", -1.0), ("abs_min", -1.0)])
def test_of_equal_magnitudes_the_later_wins(op, want):
    def call(y):
        total = sb(1, 1)
        nisa.activate2(sb(1, 2), nl.copy, tile(y), None, None, nl.bypass, nl.bypass,
                       reduce_op=getattr(nl, op), reduce_res=total,
                       reduce_cmd=R.reset_reduce)  # fmt: skip
        return total

    assert values(call, np.array([[1, -1]], F32), target="trn3").tolist() == [[want]]


def test_sums_are_taken_before_rounding():
    def call(y):
        dst, total = sb(1, 2, dtype=nl.int8), sb(1, 1)
        nisa.activate2(dst, nl.copy, tile(y), None, None, nl.bypass, nl.bypass, reduce_op=nl.add,
                       reduce_res=total, reduce_cmd=R.reset_reduce)  # fmt: skip
        return dst, total

    dst, total = values(call, np.array([[0.25, 1.25]], F32), target="trn3")
    assert (dst.tolist(), total.tolist()) == ([[0, 1]], [[1.5]])


def test_the_result_may_replace_the_data():
    def call(y):
        x = tile(y)
        nisa.activate2(x, nl.relu, x, -1.0, 1.0, nl.multiply, nl.add)
        return x

    assert values(call, np.array([[3, -1]], F32), target="trn3").tolist() == [[0, 2]]


BYPASS = (None, None, nl.bypass, nl.bypass)
act = of("activate2", S(2, 3), nl.exp, S(2, 3), 2.0, 1.0, nl.multiply, nl.add)


def test_event():
    call = act(S(2, 3), nl.exp, S(2, 3), S(2, 1), S(2, 1), reduce_op=nl.maximum,
               reduce_res=S(2, 1), reduce_cmd=R.reduce)  # fmt: skip
    found = event(call, target="trn3")
    operand = ("float32", "sbuf", 4)
    assert (found.engine, len(found.reads), len(found.writes)) == (nisa.engine.scalar, 3, 2)
    assert found.hidden_reads == ("act_table", "act_accumulator")
    assert found.hidden_writes == ("act_accumulator",)
    assert found.work == StreamWork(
        "activate2", "exp", 3, 2, (operand,), operand, 2, reduces=True, reads_accumulator=True
    )


def test_gpsimd_has_it_without_reductions():
    found = event(act(engine=nisa.engine.gpsimd), target="trn3")
    assert (found.engine, found.hidden_reads, found.hidden_writes) == (nisa.engine.gpsimd, (), ())


def pairs(op0, op1, **options):
    return act(S(2, 3), nl.exp, S(2, 3), 2.0, 1.0, op0, op1, **options)


BF16 = S(2, 1, dtype=nl.bfloat16)
RULES = [
    Rule("an activation", act(), act(S(2, 3), nl.add), ("nl.add is no activation function",)),
    Rule("a pair", pairs(nl.multiply, nl.subtract), pairs(nl.add, nl.multiply),
         ("(nl.add, nl.multiply)", "(nl.multiply, nl.bypass)")),
    Rule("nothing to reverse", pairs(nl.add, nl.bypass, reverse0=True),
         pairs(nl.add, nl.bypass, reverse1=True), ("reverse1 with op1=nl.bypass",)),
    Rule("a flag", act(reverse0=True), act(reverse0=2), ("reverse0=2", "True or False")),
    Rule("an immediate", act(S(2, 3), nl.exp, S(2, 3), *BYPASS),
         act(S(2, 3), nl.exp, S(2, 3), 1.0, None), ("imm1=None", "number")),
    Rule("columns", act(S(2, 3), nl.exp, S(2, 3), S(2, 1)),
         act(S(2, 3), nl.exp, S(2, 3), S(2, 2)), ("imm0 [2, 2]",)),
    Rule("float immediates", act(S(2, 3), nl.exp, S(2, 3), BF16),
         act(S(2, 3), nl.exp, S(2, 3), S(2, 1, dtype=nl.int32)), ("imm0 is int32", "float")),
    Rule("one dtype", act(S(2, 3), nl.exp, S(2, 3), BF16, BF16),
         act(S(2, 3), nl.exp, S(2, 3), BF16, S(2, 1)), ("imm0 bfloat16, imm1 float32",)),
    Rule("a slope", act(relu_param=S(2, 1)), act(relu_param=None), ("relu_param=None",)),
    Rule("one extent", act(), act(S(2, 4)), ("dst [2, 4], data [2, 3]",)),
    Rule("command", act(), act(reduce_cmd=R.load_reduce), ("reduce_cmd", "reset_reduce")),
    Rule("a reduction", act(reduce_op=nl.minimum, reduce_cmd=R.reset),
         act(reduce_cmd=R.reset), ("reduce_cmd=reset without reduce_op",)),
    Rule("its operator", act(reduce_op=nl.abs_max), act(reduce_op=nl.multiply),
         ("reduce_op=nl.multiply", "nl.abs_min")),
    Rule("its result", act(reduce_res=S(2, 1)), act(reduce_res=1.0), ("reduce_res=1.0",)),
    Rule("no reduction on gpsimd", act(engine=nisa.engine.gpsimd),
         act(engine=nisa.engine.gpsimd, reduce_op=nl.add, reduce_cmd=R.reset_reduce),
         ("a reduction with engine=gpsimd",)),
    Rule("a float result", act(reduce_res=BF16), act(reduce_res=S(2, 1, dtype=nl.int32)),
         ("reduce_res is int32",)),
]  # fmt: skip


@pytest.mark.parametrize("rule", RULES, ids=lambda r: r.name)
def test_rule(rule):
    check(rule._replace(target="trn3"), "activate2", SITE)


def test_activate2_needs_gen4():
    check(Rule("gen4", lambda: None, act(), ("activate2 on toy", "gen4", "nisa.activation")),
          "activate2", SITE)  # fmt: skip
