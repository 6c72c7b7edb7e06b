"""with_schedule: which edges a trace gets, and which are refused."""

from __future__ import annotations

from itertools import pairwise

import nki
import nki.isa as nisa
import nki.language as nl
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from nki_kernels.machine.errors import KernelError, RuleViolation
from nki_kernels.machine.launch import launch
from tests.machine.kernels import counted, hbm, loaded, sbuf

pytestmark = pytest.mark.usefixtures("toy")


def fill(name):
    return nisa.memset(sbuf(1, 1), 0, name=name)


def edges(run):
    return {(consumer, producer) for producer, consumer in run.trace.orders}


@nki.jit
def named(x):
    """The scheduling guide's example: recip and plus1 do not depend on each other."""
    tile = loaded(x)
    a, b = sbuf(*x.shape), sbuf(*x.shape)
    nisa.reciprocal(dst=a, data=tile, name="recip")
    nisa.tensor_scalar(dst=b, data=tile, op0=nl.add, operand0=1.0, name="plus1")
    nisa.tensor_tensor(dst=a, data1=a, data2=b, op=nl.add, name="sum")
    out = hbm(*x.shape)
    nisa.dma_copy(dst=out, src=a)
    return out


X = 1 + counted(2, 2)


@pytest.mark.parametrize("schedule", [[("plus1", "recip")], [("plus1", ["recip"])]])
def test_names_become_edges_on_every_core(schedule):
    scheduled = named.with_schedule(schedule)
    assert edges(launch(scheduled, (X,))) == {(2, 1)}
    assert edges(launch(scheduled[2], (X,))) == {(2, 1), (7, 6)}
    assert np.array_equal(scheduled(X), named(X))
    assert edges(launch(named, (X,))) == set()


def test_schedules_add_up():
    both = named.with_schedule([("plus1", "recip")]).with_schedule([("sum", ["recip", "plus1"])])
    assert edges(launch(both, (X,))) == {(2, 1), (3, 1), (3, 2)}


MALFORMED = [
    (3, "with_schedule: 3; it must be a list of"),
    ([("a",)], "with_schedule: edge ('a',); it must be a list of"),
    (["ab c"], "with_schedule: edge 'ab c'; it must be a list of"),
    ([("a", 1)], "with_schedule: edge ('a', 1); it must be"),
    ([("a", ["b", 1])], "with_schedule: edge ('a', ['b', 1]); it must be"),
    ([("a", "a")], "with_schedule: a after a; no order has each after the next"),
    ([("a", "b"), ("b", ["c"]), ("c", "a")], "no order has each after the next: remove an edge"),
]


@pytest.mark.parametrize(("schedule", "says"), MALFORMED, ids=lambda v: str(v)[:30])
def test_a_malformed_schedule_is_refused(schedule, says):
    with pytest.raises(KernelError) as caught:
        named.with_schedule(schedule)
    assert str(caught.value).startswith("kernel 'named'.with_schedule: ")
    assert says in str(caught.value)


@given(st.lists(st.tuples(st.integers(0, 4), st.integers(0, 4)), max_size=8))
def test_a_circle_is_found_exactly_if_there_is_one(pairs):
    reach = np.zeros((5, 5), bool)
    for consumer, producer in pairs:
        reach[consumer, producer] = True
    for middle in range(5):
        reach |= reach[:, [middle]] & reach[[middle], :]
    schedule = [(str(a), str(b)) for a, b in pairs]
    if reach.diagonal().any():
        with pytest.raises(KernelError) as caught:
            named.with_schedule(schedule)
        circle = str(caught.value).split("with_schedule: ")[1].split(";")[0].split(" after ")
        assert circle[0] == circle[-1]
        assert all(step in schedule for step in pairwise(circle))
    else:
        named.with_schedule(schedule)


def test_names_must_be_there_once():
    with pytest.raises(KernelError) as caught:
        named.with_schedule([("plus1", "plus2")])(X)
    assert "has the name 'plus2'; names are plus1, recip, sum: pass name=" in str(caught.value)

    @nki.jit
    def twice():
        fill("a")
        fill("b")
        fill("a")

    with pytest.raises(KernelError) as caught:
        twice.with_schedule([("b", "a")])()
    assert "with_schedule: 'a' names 2 instructions, the first two at " in str(caught.value)
    assert str(caught.value).count(f"{__file__}:") == 2


def test_a_schedule_against_program_order_is_refused():
    with pytest.raises(KernelError) as caught:
        named.with_schedule([("recip", "plus1")])(X)
    assert str(caught.value).startswith("with_schedule: 'recip' <1 reciprocal on vector at ")
    assert "it comes first in program order" in str(caught.value)


def test_an_order_does_not_leave_a_loop():
    @nki.jit
    def kernel():
        def body(i):
            fill("inside")

        nl.fori_loop(0, 1, body)
        fill("outside")

    with pytest.raises(KernelError, match=r"with_schedule: 'outside' .* inside a device loop"):
        kernel.with_schedule([("outside", "inside")])()


def test_a_name_is_a_string():
    with pytest.raises(RuleViolation, match=r"name=3 at .*; an instruction's name is a string"):
        launch(lambda: fill(3))
