"""Inputs, calls and comparison shared by the tests of the normalizations."""

from __future__ import annotations

import ml_dtypes
import numpy as np

import reference.norm
from nki_kernels import ops
from nki_kernels.hardware import spec_for
from nki_kernels.operators import OPERATORS
from tests.strategies.matrices import normal
from tests.tolerance import assert_close

NORMS = ("rms_norm", "layer_norm")
DTYPES = {"bfloat16": ml_dtypes.bfloat16, "float16": np.float16, "float32": np.float32}
TOY, TRN2 = spec_for("toy"), spec_for("trn2")

#: Which of the optional operands are given, per operator.
PARAMETERS = {
    "rms_norm": [(), ("weight",)],
    "layer_norm": [(), ("weight",), ("bias",), ("weight", "bias")],
}
EVERY = [(op, given) for op in NORMS for given in PARAMETERS[op]]
ALL = ("weight", "bias")


def operands(op, n, h, dtype, seed=0, given=ALL, make=normal):
    """Return (x, weight[, bias]) of the operator; what is not `given` is None."""
    host = DTYPES[dtype]
    names = [operand.name for operand in OPERATORS[op].inputs[1:]]
    vectors = [
        normal(seed + 1 + i, (h,), host) if name in given else None for i, name in enumerate(names)
    ]
    return (make(seed, (n, h), host), *vectors)


def call(op, inputs, **keywords):
    """Run the public operation of that name."""
    return getattr(ops, op)(*inputs, **keywords)


def expected(op, inputs, **eps):
    """Return value and magnitude of the reference of that name."""
    return getattr(reference.norm, op)(*inputs, **eps)


def compare(op, got, inputs, target, case, value=None, **eps):
    """Hold a result to the error rule; `value` stands in for the reference's own."""
    ref = expected(op, inputs, **eps)
    contract = OPERATORS[op]
    n, h = inputs[0].shape
    keywords = {
        "op": op,
        "case": case,
        "roundings": contract.roundings,
        "chain": contract.chain({"N": n, "H": h}, spec_for(target)),
    }
    assert_close(got, ref.value if value is None else value, ref.magnitude, **keywords)
