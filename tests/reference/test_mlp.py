from __future__ import annotations

import math

import ml_dtypes
import numpy as np
import pytest

from reference.mlp import gated_mlp
from tests.strategies.matrices import normal


def scalar_formula(x, gate, up, down):
    """Return the sums written out, in float64, with SwiGLU and features rounded to x's dtype."""
    tokens, width = x.shape
    result = np.zeros((tokens, down.shape[0]))
    for t in range(tokens):
        for i in range(gate.shape[0]):
            z = math.fsum(float(x[t, h]) * float(gate[i, h]) for h in range(width))
            u = math.fsum(float(x[t, h]) * float(up[i, h]) for h in range(width))
            hidden = float(np.asarray(z / (1 + math.exp(-z)) * u).astype(x.dtype))
            for n in range(down.shape[0]):
                result[t, n] += hidden * float(down[n, i])
    return result


@pytest.mark.parametrize("dtype", [np.float32, np.float16, ml_dtypes.bfloat16])
def test_it_is_the_formula_within_its_own_magnitude(dtype):
    shapes = (3, 4), (6, 4), (6, 4), (4, 6)
    x, gate, up, down = (normal(seed, shape, dtype) for seed, shape in enumerate(shapes))
    ref = gated_mlp(x, gate, up, down)
    want = scalar_formula(x, gate, up, down)
    # What a chain of 16 float32 roundings allows: a feature may sit on a rounding boundary.
    assert (np.abs(ref.value - want) <= 16 * 2.0**-24 * ref.magnitude).all()
    same = gated_mlp(x, gate.T, up.T, down.T, transposed=False)
    assert (same.value == ref.value).all()
    assert (same.magnitude == ref.magnitude).all()


def test_a_feature_on_a_boundary_widens_the_magnitude_and_no_other_does():
    one = np.ones((1, 1), ml_dtypes.bfloat16)
    exact = gated_mlp(one, one, one, one, activation="relu")
    assert exact.value.item() == exact.magnitude.item() == 1
    # 1.0078125 * 1.5 = 1.51171875 lies halfway between two bfloat16 numbers.
    gate, up = one * 1.0078125, one * 1.5
    tie = gated_mlp(one, gate.astype(one.dtype), up.astype(one.dtype), one, activation="relu")
    step = 2.0**-7
    assert tie.magnitude.item() == tie.value.item() + step / (16 * 2.0**-24)
