"""exponential (gen4): values, the sum in Vector's accumulator, rules, events."""

from __future__ import annotations

import nki.isa as nisa
import nki.language as nl
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from nki_kernels.machine.trace import StreamWork
from tests.embedded.calls import SITE, S, of
from tests.embedded.folds import left
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

F32 = np.float32
R = nisa.reduce_cmd
seeds = st.integers(0, 2**20)
SRC = (*FLOATS, nl.float8_e4m3, nl.float8_e5m2, *INTEGERS)
DST = [k for k in SRC if k is not nl.uint32]


def exponentials(x, most):
    """float32 exponentials of the difference rounded to float32."""
    return np.exp(cast(x.astype(float) - most.astype(float), nl.float32))


@given(p=rows, n=columns, types=st.tuples(st.sampled_from(SRC), st.sampled_from(DST)),
       vector=st.booleans(), seed=seeds,
       command=st.sampled_from(["reset_reduce", "load_reduce", "vector init"]))  # fmt: skip
def test_exponential(p, n, types, vector, command, seed):
    # Small values: the sums stay in range.
    x = (data(seed, (p, n), types[0]).astype(F32) % 5).astype(data(0, (1,), types[0]).dtype)
    most = data(seed + 1, (p, 1), nl.float32, 2) if vector else np.full((p, 1), 1.5, F32)
    init = data(seed + 2, (p, 1), nl.float32) if "vector" in command else np.full((p, 1), 5, F32)
    loads = command != "reset_reduce"

    def call(y, m, first):
        dst, total = sb(p, n, dtype=types[1]), sb(p, 1)
        start = (tile(first) if "vector" in command else 5.0) if loads else 0.0
        nisa.exponential(dst, tile(y), tile(m) if vector else 1.5, total,
                         R.load_reduce if loads else R.reset_reduce, start)  # fmt: skip
        return dst, total

    want = exponentials(x, most)
    dst, total = values(call, x, most, init, target="trn3")
    same(dst, cast(want, types[1]))
    # Adding the initial 0 changes nothing: exponentials are no negative zeros.
    lines = [[init[r, 0], *want[r]] if loads else want[r] for r in range(p)]
    same(total[:, 0], np.array([left("add", line) for line in lines], F32))


def test_the_sum_continues():
    def call(y):
        x, total = tile(y), sb(1, 1)
        nisa.exponential(sb(1, 2), x, reduce_cmd=R.reset_reduce)
        nisa.exponential(sb(1, 2), x, reduce_res=total, reduce_cmd=R.reduce)
        return total

    assert values(call, np.zeros((1, 2), F32), target="trn3").tolist() == [[4]]


def test_idle_leaves_the_sum_unknown():
    def call(y):
        x, total = tile(y), sb(1, 1)
        nisa.exponential(sb(1, 2), x, reduce_cmd=R.reset_reduce)
        nisa.exponential(sb(1, 2), x)
        nisa.exponential(sb(1, 2), x, reduce_res=total, reduce_cmd=R.reduce)
        return total

    assert np.isnan(values(call, np.zeros((1, 2), F32), target="trn3")).all()


def test_the_largest_negative_number_gives_zero():
    def call(y):
        dst = sb(1, 2)
        nisa.exponential(dst, tile(y), 3.0)
        return dst

    x = np.array([[np.finfo(F32).min, -np.inf]], F32)
    assert values(call, x, target="trn3").tolist() == [[0, 0]]


exp = of("exponential", S(2, 3), S(2, 3))


def test_event():
    found = event(exp(S(2, 3), S(2, 3), S(2, 1), S(2, 1), R.reduce), target="trn3")
    operand = ("float32", "sbuf", 4)
    assert (found.engine, len(found.reads), len(found.writes)) == (nisa.engine.vector, 2, 2)
    assert (found.hidden_reads, found.hidden_writes) == (("vector_accumulator",),) * 2
    assert found.work == StreamWork(
        "exponential", "", 3, 2, (operand,), operand, 1, reduces=True, reads_accumulator=True
    )


RULES = [
    Rule("src types", exp(), exp(S(2, 3), S(2, 3, dtype=nl.tfloat32)), ("src is tfloat32",)),
    Rule("dst types", exp(), exp(S(2, 3, dtype=nl.uint32)), ("dst is uint32",)),
    Rule("one extent", exp(), exp(S(2, 4)), ("dst [2, 4], src [2, 3]",)),
    Rule("rank", exp(S(1, 2, 3, 4), S(1, 2, 3, 4)), exp(S(1, 1, 2, 3, 4), S(1, 24)),
         ("dst [1, 1, 2, 3, 4] has 5 dimensions", "at most 4")),
    Rule("a column of maxima", exp(max_value=S(2, 1)), exp(max_value=S(2, 2)),
         ("max_value [2, 2]",)),
    Rule("float32 maxima", exp(max_value=S(2, 1)), exp(max_value=S(2, 1, dtype=nl.bfloat16)),
         ("max_value is bfloat16", "float32")),
    Rule("command", exp(), exp(reduce_cmd=R.reset), ("reduce_cmd", "load_reduce")),
    Rule("init to load", exp(reduce_cmd=R.load_reduce, reduce_init=2.0), exp(reduce_init=2.0),
         ("reduce_init=2.0 with reduce_cmd=idle",)),
    Rule("result of idle", exp(reduce_res=S(2, 1), reduce_cmd=R.reset_reduce),
         exp(reduce_res=S(2, 1)), ("reduce_res with reduce_cmd=idle",)),
    Rule("result a tile", exp(), exp(reduce_res=1.0, reduce_cmd=R.reduce), ("reduce_res=1.0",)),
    Rule("result a float", exp(reduce_res=S(2, 1, dtype=nl.bfloat16), reduce_cmd=R.reset_reduce),
         exp(reduce_res=S(2, 1, dtype=nl.int32), reduce_cmd=R.reset_reduce),
         ("reduce_res is int32",)),
]  # fmt: skip


@pytest.mark.parametrize("rule", RULES, ids=by_name)
def test_rule(rule):
    check(rule._replace(target="trn3"), "exponential", SITE)


def test_exponential_needs_gen4():
    check(Rule("gen4", lambda: None, exp(), ("exponential on toy", "gen4", "nl.exp")),
          "exponential", SITE)  # fmt: skip
