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
