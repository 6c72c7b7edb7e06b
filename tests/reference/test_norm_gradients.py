"""The references of the norms' gradients against derivatives of the references themselves."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from reference import norm
from tests.strategies.matrices import normal, seeds

SIZES = {"n": st.integers(1, 4), "h": st.integers(1, 6)}
EPS = np.finfo(np.float64).eps


def inputs(op, n, h, seed, shift, weighted):
    dy, x = normal(seed, (n, h), np.float64), normal(seed + 1, (n, h), np.float64) + shift
    weight = normal(seed + 2, (h,), np.float64) if weighted else None
    return dy, x, weight


def loss(op, dy, x, weight, eps, bias=0.0):
    """sum(dy * y) as an analytic function: without an absolute value, so that x may be complex."""
    s = x - x.mean(-1, keepdims=True) if op == "layer_norm" else x
    y = s / np.sqrt((s * s).mean(-1, keepdims=True) + eps) * weight + bias
    return (dy * y).sum()


@pytest.mark.parametrize("op", ["rms_norm", "layer_norm"])
@given(
    seed=seeds(), eps=st.sampled_from([1e-5, 0.25, 3.0]), shift=st.integers(-4, 4),
    weighted=st.booleans(), **SIZES,
)  # fmt: skip
def test_gradients_are_derivatives_of_the_formula(op, n, h, seed, eps, shift, weighted):
    """A complex step of 1e-30: f(x + ih) = f(x) + ih f'(x), with nothing subtracted."""
    dy, x, weight = inputs(op, n, h, seed, shift, weighted)
    refs = getattr(norm, f"{op}_backward")(dy, x, weight, eps)
    full = {"x": x, "weight": np.ones(h) if weight is None else weight, "bias": np.zeros(h)}
    # The value of the loss is that of the forward reference.
    forward = getattr(norm, op)(x, weight, eps=eps)
    assert abs((dy * forward.value).sum() - loss(op, dy, eps=eps, **full)) <= (
        64 * (h + n) * EPS * (np.abs(dy) * forward.magnitude).sum()
    )
    for name, ref in zip(full, refs, strict=False):
        for at in np.ndindex(full[name].shape):
            moved = {key: value.astype(np.complex128) for key, value in full.items()}
            moved[name][at] += 1e-30j
            slope = loss(op, dy, eps=eps, **moved).imag / 1e-30
            assert abs(ref.value[at] - slope) <= 64 * (h + n) * EPS * ref.magnitude[at] + 1e-300


@pytest.mark.parametrize("op", ["rms_norm", "layer_norm"])
@given(
    seed=seeds(), shift=st.integers(-30, 30), h=st.integers(2, 40),
    signs=st.tuples(*[st.sampled_from([-1.0, 1.0])] * 4),
)  # fmt: skip
def test_the_magnitudes_cover_statistics_that_are_slightly_off(op, seed, shift, h, signs):
    """Disturb mean, r and row sums as far as float32 may; nothing moves further than allowed."""
    dy, x, weight = inputs(op, 3, h, seed, shift, True)
    eps, off = 1e-5, 2.0**-24
    refs = getattr(norm, f"{op}_backward")(dy, x, weight, eps)
    typical = np.abs(x).mean(-1, keepdims=True)
    centre = (op == "layer_norm") * (x.mean(-1, keepdims=True) + signs[0] * off * typical)
    s, exact = x - centre, x - (op == "layer_norm") * x.mean(-1, keepdims=True)
    g = dy * weight
    r = 1 / np.sqrt((exact * exact).mean(-1, keepdims=True) + eps) * (1 + signs[1] * off)
    n = s * r
    inner = (g * n).mean(-1, keepdims=True)
    inner = inner + signs[2] * off * np.abs(g * n).mean(-1, keepdims=True)
    mean = g.mean(-1, keepdims=True) + signs[3] * off * np.abs(g).mean(-1, keepdims=True)
    dx = r * (g - n * inner - (op == "layer_norm") * mean)
    assert (np.abs(dx - refs[0].value) <= 1.01 * off * refs[0].magnitude).all()
    moved = np.abs((dy * n).sum(0) - refs[1].value)
    assert (moved <= 1.01 * off * refs[1].magnitude).all()


def test_known_values():
    x = np.array([[1.0, -1.0, 1.0, -1.0]])
    dx, dweight = norm.rms_norm_backward(np.array([[4.0, 0, 0, 0]]), x, eps=0.0)
    assert dx.value.tolist() == [[3, 1, -1, 1]]
    assert dweight.value.tolist() == [4, 0, 0, 0]
    dx, dweight, dbias = norm.layer_norm_backward(x, x + 2, np.full(4, 3.0), eps=0.0)
    assert dx.value.tolist() == [[0, 0, 0, 0]]
    assert dweight.value.tolist() == [1, 1, 1, 1]
    assert dbias.value.tolist() == x[0].tolist()
