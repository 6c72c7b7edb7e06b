"""Operators on tiles name the function that does it."""

from __future__ import annotations

import operator

import nki.language as nl
import numpy as np
import pytest

from nki_kernels.machine.errors import KernelError
from nki_kernels.machine.launch import launch

BINARY = {
    operator.add: "nl.add(x, y)", operator.sub: "nl.subtract(x, y)",
    operator.mul: "nl.multiply(x, y)", operator.truediv: "nl.reciprocal(y)",
    operator.floordiv: "nl.floor", operator.mod: "nl.floor and nl.subtract",
    operator.pow: "nl.power(x, y)", operator.matmul: "nisa.nc_matmul",
    operator.and_: "nl.bitwise_and", operator.or_: "nl.bitwise_or",
    operator.xor: "nl.bitwise_xor", operator.lshift: "nl.left_shift",
    operator.rshift: "nl.right_shift", operator.lt: "nl.less(x, y)",
    operator.le: "nl.less_equal", operator.gt: "nl.greater(x, y)",
    operator.ge: "nl.greater_equal",
}  # fmt: skip
UNARY = {
    operator.neg: "nl.negative(x)", operator.pos: "the tile itself",
    operator.invert: "nl.invert(x)", abs: "nl.abs(x)",
}  # fmt: skip


def message(call):
    def kernel():
        call(nl.ndarray((2, 3), nl.float32, name="tile"))

    with pytest.raises(KernelError) as caught:
        launch(kernel, target="toy")
    return str(caught.value)


@pytest.mark.parametrize("function", BINARY, ids=lambda f: f.__name__)
@pytest.mark.parametrize("left", [None, 2, np.float32(2), np.ones((2, 3))],
                         ids=["tile", "int", "scalar", "array"])  # fmt: skip
def test_two_operands(function, left):
    def call(t):
        return function(t, t) if left is None else function(left, t)

    if left is not None and function in (operator.lt, operator.le, operator.gt, operator.ge):
        mirrored = {"lt": "greater", "le": "greater_equal", "gt": "less", "ge": "less_equal"}
        says = f"nl.{mirrored[function.__name__]}"  # Python asks the right operand the other way
    else:
        says = BINARY[function]
    found = message(call)
    assert says in found
    assert "<NkiTensor 'tile' [2, 3] float32 in sbuf>: the operator" in found


@pytest.mark.parametrize("function", UNARY, ids=lambda f: f.__name__)
def test_one_operand(function):
    assert UNARY[function] in message(function)


def test_the_right_operand_may_be_a_number():
    assert "the operator *" in message(lambda t: t * 2)


def test_in_place_is_no_exception():
    def call(t):
        t += 1

    assert "nl.add(x, y)" in message(call)
