"""Inputs, calls and comparison shared by the tests of the norms' gradients."""

from __future__ import annotations

import numpy as np

import reference.norm
from nki_kernels import ops
from nki_kernels.hardware import spec_for
from nki_kernels.operators import OPERATORS
from tests.operators.norms import DTYPES
from tests.strategies.matrices import normal
from tests.tolerance import assert_close

BACKWARD = ("rms_norm_backward", "layer_norm_backward")
EVERY = [(op, weighted) for op in BACKWARD for weighted in (True, False)]


def operands(op, n, h, dtype, seed=0, weighted=True, make=normal):
    """Return (dy, x, weight or None)."""
    host = DTYPES[dtype]
    weight = normal(seed + 2, (h,), host) if weighted else None
    return normal(seed + 1, (n, h), host), make(seed, (n, h), host), weight


def call(op, inputs, **keywords):
    """Run the public operation of that name."""
    return getattr(ops, op)(*inputs, **keywords)


def expected(op, inputs, **eps):
    """Return the references of all outputs."""
    with np.errstate(invalid="ignore"):  # infinities are part of some tests
        return getattr(reference.norm, op)(*inputs, **eps)


def compare(op, got, inputs, target, case, rows=None, **eps):
    """Hold the results to the error rule; `rows` limits dx to some, and leaves out the sums."""
    contract, refs = OPERATORS[op], expected(op, inputs, **eps)
    n, h = inputs[1].shape
    bound = {
        "roundings": contract.roundings,
        "chain": contract.chain({"N": n, "H": h}, spec_for(target)),
    }
    if rows is not None:
        keywords = {"op": op, "case": f"{case} dx", **bound}
        assert_close(got[0][rows], refs[0].value[rows], refs[0].magnitude[rows], **keywords)
        return
    for operand, result, ref in zip(contract.outputs, got, refs, strict=True):
        keywords = {"op": op, "case": f"{case} {operand.name}", **bound}
        assert_close(result, ref.value, ref.magnitude, **keywords)
