"""Reference of the gated MLP."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import numpy.typing as npt

from reference.matmul import MAX_SLOPE, Reference, activate, matmul

#: float32 roundings of one hidden feature beyond its two sums, as in `linear`, and their product.
_FEATURE_ROUNDINGS = 17

#: Rows of a tile of the contraction: within one, sums may be formed in any order.
_TILE = 128

#: The least chain of float32 roundings any comparison allows for; see `gated_mlp`.
_LEAST_CHAIN = 16

_FLOAT32_UNIT = 2.0**-24


def gated_mlp(
    x: npt.NDArray[Any],
    gate: npt.NDArray[Any],
    up: npt.NDArray[Any],
    down: npt.NDArray[Any],
    *,
    activation: str = "silu",
    transposed: bool = True,
) -> Reference:
    """A gated MLP in float64, but for one rounding point: the hidden features.

    h = round(activation(x·gate) * (x·up)), to the dtype of x;  y = h·down

    A feature that float32 sums may put on the other side of a rounding boundary may come out one
    step away. Where that is so follows from the error of the sums; such steps, times |down|, are
    added to the magnitude, in units that any chain of at least 16 roundings allows.

    Args:
        x: [T, H].
        gate: [I, H] ([H, I] unless transposed).
        up: likewise.
        down: [H, I] ([I, H] unless transposed).
        activation: "relu", "silu", "gelu" or "gelu_tanh".
        transposed: how the weights are stored.

    Returns:
        value [T, H] and magnitude [T, H], both float64.
    """
    gates = matmul(x, gate, transpose_b=transposed)
    ups = matmul(x, up, transpose_b=transposed)
    active = activate(gates.value, activation)
    exact = active * ups.value
    width = x.shape[1]
    chain = min(width, _TILE) + math.ceil(width / _TILE) + _FEATURE_ROUNDINGS
    unit = chain * _FLOAT32_UNIT
    slack = MAX_SLOPE * gates.magnitude * (np.abs(ups.value) + unit * ups.magnitude)
    error = unit * (slack + np.abs(active) * ups.magnitude)
    hidden = _rounded(exact, x.dtype)
    step = _rounded(exact + error, x.dtype) - _rounded(exact - error, x.dtype)
    y = matmul(hidden, down, transpose_b=transposed)
    steps = matmul(step, np.abs(np.asarray(down, np.float64)), transpose_b=transposed)
    return Reference(y.value, y.magnitude + steps.value / (_LEAST_CHAIN * _FLOAT32_UNIT))


def _rounded(values: npt.NDArray[np.float64], dtype: Any) -> npt.NDArray[np.float64]:
    return values.astype(dtype).astype(np.float64)


def gated_mlp_backward(
    dy: npt.NDArray[Any],
    x: npt.NDArray[Any],
    gate: npt.NDArray[Any],
    up: npt.NDArray[Any],
    down: npt.NDArray[Any],
    x_gate: npt.NDArray[Any] | None = None,
    x_up: npt.NDArray[Any] | None = None,
    *,
    activation: str = "silu",
) -> tuple[Reference, Reference, Reference, Reference]:
    """Gradients of `gated_mlp` in float64, but for the rounding points h, da and db.

    a = x·gateᵀ, b = x·upᵀ, e = dy·down;  h = f(a) * b, da = e * b * f'(a), db = e * f(a)
    dx = da·gate + db·up;  dgate = daᵀ·x;  dup = dbᵀ·x;  ddown = dyᵀ·h

    As there, a rounded value that float32 may put on the other side of a boundary may be one step
    away; such steps are added to the magnitudes.

    Args:
        dy: [T, H], the gradient of the result.
        x: [T, H].
        gate: [I, H].
        up: likewise.
        down: [H, I].
        x_gate: [T, I], a where it is given instead, without an error of its own, or None.
        x_up: likewise, b.
        activation: "relu", "silu", "gelu" or "gelu_tanh".

    Returns:
        dx [T, H], dgate [I, H], dup [I, H] and ddown [H, I], each value and magnitude.
    """
    chain = min(x.shape[1], _TILE) + math.ceil(x.shape[1] / _TILE) + _FEATURE_ROUNDINGS
    unit = chain * _FLOAT32_UNIT
    a, b = (
        matmul(x, weight, transpose_b=True)
        if kept is None
        else Reference(np.asarray(kept, np.float64), np.zeros(kept.shape))
        for weight, kept in ((gate, x_gate), (up, x_up))
    )
    e = matmul(dy, down)
    few = _FEATURE_ROUNDINGS * _FLOAT32_UNIT
    active = (
        activate(a.value, activation),
        unit * MAX_SLOPE * a.magnitude + few * np.abs(a.value),
    )
    bend = (slope(a.value, activation), _slope_error(a.value, unit * a.magnitude, activation))
    up_sum, down_sum = ((sums.value, unit * sums.magnitude) for sums in (b, e))
    h = _feature((active, up_sum), x.dtype)
    da = _feature((down_sum, up_sum, bend), x.dtype)
    db = _feature((down_sum, active), x.dtype)
    first, second = _summed(da, gate), _summed(db, up)
    dx = Reference(first.value + second.value, first.magnitude + second.magnitude)
    dgate, dup = (_summed((part[0].T, part[1].T), x) for part in (da, db))
    turned = _summed((h[0].T, h[1].T), dy)
    return dx, dgate, dup, Reference(turned.value.T, turned.magnitude.T)


_Pair = tuple[npt.NDArray[np.float64], npt.NDArray[np.float64]]


def _feature(factors: tuple[_Pair, ...], dtype: Any) -> _Pair:
    """Return the rounded product of factors (value, error), and how far it may step."""
    exact, most = np.ones(()), np.ones(())
    for value, error in factors:
        exact, most = exact * value, most * (np.abs(value) + error)
    # To first order and beyond: |prod(v + e) - prod(v)| <= prod(|v| + e) - prod|v|.
    error = most - np.abs(exact) + 4 * _FLOAT32_UNIT * most
    return _rounded(exact, dtype), _rounded(exact + error, dtype) - _rounded(exact - error, dtype)


def _summed(features: _Pair, other: npt.NDArray[Any]) -> Reference:
    """Return features·other; steps of the features count in units that any chain allows."""
    total = matmul(features[0], other)
    steps = matmul(features[1], np.abs(np.asarray(other, np.float64)))
    return Reference(total.value, total.magnitude + steps.value / (_LEAST_CHAIN * _FLOAT32_UNIT))


_ROOT, _CUBE = math.sqrt(2 / math.pi), 0.044715


def slope(z: npt.NDArray[np.float64], activation: str) -> npt.NDArray[np.float64]:
    """Return the derivative of an activation in float64; that of relu at 0 is 0."""
    if activation == "relu":
        return (z > 0).astype(np.float64)
    if activation == "silu":
        share = (1 + np.tanh(z / 2)) / 2
        return share * (1 + z * (1 - share))
    if activation == "gelu":
        normal: npt.NDArray[np.float64] = np.vectorize(math.erf, otypes=[float])(z / math.sqrt(2))
        density: npt.NDArray[np.float64] = np.exp(-z * z / 2) / math.sqrt(2 * math.pi)
        curve: npt.NDArray[np.float64] = (1 + normal) / 2 + z * density
        return curve
    t = np.tanh(_ROOT * (z + _CUBE * z**3))
    bent: npt.NDArray[np.float64] = (1 - t * t) * _ROOT * (1 + 3 * _CUBE * z * z)
    result: npt.NDArray[np.float64] = (1 + t + z * bent) / 2
    return result


def _slope_error(
    z: npt.NDArray[np.float64], error: npt.NDArray[np.float64], activation: str
) -> npt.NDArray[np.float64]:
    """Bound the error of a slope whose argument is off by `error`; no second derivative is above 1.

    The slope of gelu_tanh is 1 + tanh minus z * u' times a difference of two numbers near 1, each
    rounded; from |z| = 6 on they are 1.
    """
    if activation == "relu":
        return (np.abs(z) <= error).astype(np.float64)
    inner = np.abs(z)
    if activation == "gelu_tanh":
        inner = np.minimum(inner, 6) * _ROOT * (1 + 3 * _CUBE * np.minimum(inner, 6) ** 2)
    return error + _FEATURE_ROUNDINGS * _FLOAT32_UNIT * (1 + inner)
