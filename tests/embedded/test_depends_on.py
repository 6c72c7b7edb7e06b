"""NkiInstruction.depends_on (NKI 0.7): what is noted, what cannot be ordered."""

from __future__ import annotations

import nki.isa as nisa
import nki.language as nl
import pytest

from nki_kernels.machine.errors import KernelError, RuleViolation
from tests.embedded.harness import refused, sb, traced

D = nisa.dependency


def fill(value=0.0):
    return nisa.memset(sb(2, 2), value)


def test_runtime_orders_are_noted_and_calls_compose():
    def kernel():
        a, b, c = fill(1.0), fill(2.0), fill(3.0)
        assert c.depends_on(b, a, kind=D.runtime) is c
        c.depends_on(a).depends_on(b, kind=D.schedule)

    trace = traced(kernel).trace
    assert trace.orders == [(1, 2), (0, 2), (0, 2)]


def test_an_instruction_in_a_loop_may_follow_one_before_it():
    def kernel():
        a = fill()
        nl.fori_loop(0, 2, lambda i: (fill().depends_on(a, kind=D.runtime), None)[1])

    (first, second), (again, third) = traced(kernel).trace.orders
    assert first == again == 0
    assert second < third


def test_a_handle_says_what_it_is():
    def kernel():
        assert "memset" in repr(fill())

    traced(kernel)


def out_of_a_loop():
    inside = []
    nl.fori_loop(0, 1, lambda i: inside.append(fill()))
    fill().depends_on(inside[0], kind=D.runtime)


def backwards():
    a, b = fill(), fill()
    a.depends_on(b, kind=D.schedule)


@pytest.mark.parametrize(("call", "says"), [
    (lambda: fill().depends_on(3), "producer 3; it must be what an instruction call returned"),
    (lambda: fill().depends_on(fill(), kind="runtime"), "kind='runtime'; it must be nisa.dep"),
    (backwards, "it comes first in program order"),
    (out_of_a_loop, "inside a device loop that the other is not in"),
])  # fmt: skip
def test_refused(call, says):
    message = refused(call, "depends_on at", says, error=RuleViolation)
    assert __file__ in message


def test_outside_a_kernel():
    held = []
    traced(lambda: held.append(fill()))
    with pytest.raises(KernelError, match="depends_on outside a kernel"):
        held[0].depends_on(held[0])
