"""The gradients of the gated MLP against finite differences of its float64 reference."""

from __future__ import annotations

import numpy as np
import pytest

from reference.matmul import activate
from reference.mlp import gated_mlp, gated_mlp_backward, slope

STEP = 2.0**-17


@pytest.mark.parametrize("activation", ["relu", "silu", "gelu", "gelu_tanh"])
def test_gradients_are_those_of_finite_differences(activation):
    rng = np.random.default_rng(5)
    inputs = [rng.standard_normal(shape) for shape in ((3, 4), (5, 4), (5, 4), (4, 5))]
    dy = rng.standard_normal((3, 4))

    def loss(changed):
        return float(np.sum(dy * gated_mlp(*changed, activation=activation).value))

    for at, found in enumerate(gated_mlp_backward(dy, *inputs, activation=activation)):
        for index in np.ndindex(inputs[at].shape):
            sides = []
            for sign in (1, -1):
                changed = [array.copy() for array in inputs]
                changed[at][index] += sign * STEP
                sides.append(loss(changed))
            slope_here = (sides[0] - sides[1]) / (2 * STEP)
            # The third derivative of a term of size 10 times STEP^2, and 2^-53 of it over STEP.
            assert abs(slope_here - found.value[index]) < 100 * STEP**2 + 100 * 2.0**-53 / STEP


@pytest.mark.parametrize("activation", ["silu", "gelu", "gelu_tanh"])
def test_a_slope_is_that_of_its_activation(activation):
    z = np.linspace(-9, 9, 181)
    numeric = (activate(z + STEP, activation) - activate(z - STEP, activation)) / (2 * STEP)
    assert np.abs(slope(z, activation) - numeric).max() < 2.0**-30


def test_the_slope_of_relu_at_zero_is_zero():
    assert slope(np.array([-1.0, 0.0, 2.0]), "relu").tolist() == [0, 0, 1]
