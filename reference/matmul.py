"""Reference of `matmul`."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt


class Reference(NamedTuple):
    """The exact result and, per element, the sum of the absolute values of its terms."""

    value: npt.NDArray[np.float64]
    magnitude: npt.NDArray[np.float64]


def matmul(
    a: npt.NDArray[Any],
    b: npt.NDArray[Any],
    *,
    transpose_a: bool = False,
    transpose_b: bool = False,
) -> Reference:
    """Multiply two matrices, or two batches of them, in float64.

    c[m, n] = sum_k a[m, k] * b[k, n];  magnitude[m, n] = sum_k |a[m, k] * b[k, n]|

    Args:
        a: [M, K], any float or integer dtype exact in float64.
        b: [K, N], likewise; with a batch, both have it in front.
        transpose_a: a is [K, M].
        transpose_b: b is [N, K].

    Returns:
        value [M, N] and magnitude [M, N], both float64.
    """
    a64 = np.asarray(a, dtype=np.float64)
    b64 = np.asarray(b, dtype=np.float64)
    a64 = a64.swapaxes(-1, -2) if transpose_a else a64
    b64 = b64.swapaxes(-1, -2) if transpose_b else b64
    return Reference(a64 @ b64, np.abs(a64) @ np.abs(b64))


#: The largest slope of every activation here is gelu's, 1.1290; relu's is 1, silu's 1.0998.
MAX_SLOPE = 1.13

_ERF = np.vectorize(math.erf, otypes=[np.float64])


def activate(z: npt.NDArray[np.float64], activation: str | None) -> npt.NDArray[np.float64]:
    """Apply an activation in float64.

    relu: max(z, 0);  silu: z / (1 + e^-z);  gelu: z * (1 + erf(z / sqrt 2)) / 2;
    gelu_tanh: z * (1 + tanh(sqrt(2 / pi) * (z + 0.044715 z^3))) / 2
    """
    if activation is None:
        return z
    if activation == "relu":
        # NaN stays NaN, as in PyTorch.
        return np.where(z < 0, 0.0, z)
    share: npt.NDArray[np.float64]
    if activation == "silu":
        share = np.tanh(z / 2)
    elif activation == "gelu":
        share = _ERF(z / math.sqrt(2))
    elif activation == "gelu_tanh":
        share = np.tanh(math.sqrt(2 / math.pi) * (z + 0.044715 * z**3))
    else:
        raise ValueError(f"activation is {activation!r}; allowed are relu, silu, gelu, gelu_tanh")
    return z * (1 + share) / 2


def linear(
    x: npt.NDArray[Any],
    weight: npt.NDArray[Any],
    bias: npt.NDArray[Any] | None = None,
    residual: npt.NDArray[Any] | None = None,
    *,
    activation: str | None = None,
    scale: float = 1.0,
    transpose_weight: bool = True,
) -> Reference:
    """A linear layer in float64.

    y[m, n] = activation(scale * sum_k x[m, k] * weight[n, k] + bias[n]) + residual[m, n]

    The magnitude is that of the argument, times the activation's largest slope, plus |residual|: an
    error of the sum reaches the result multiplied by a slope.

    Args:
        x: [M, K].
        weight: [N, K], or [K, N] without transpose_weight.
        bias: [N] or None.
        residual: [M, N] or None.
        activation: None, "relu", "gelu", "gelu_tanh" or "silu".
        scale: factor of the sum.
        transpose_weight: how the weight is stored.

    Returns:
        value [M, N] and magnitude [M, N], both float64.
    """
    total, magnitude = matmul(x, weight, transpose_b=transpose_weight)
    total, magnitude = scale * total, abs(scale) * magnitude
    if bias is not None:
        total = total + np.asarray(bias, np.float64)
        magnitude = magnitude + np.abs(np.asarray(bias, np.float64))
    value = activate(total, activation)
    if activation is not None:
        magnitude = MAX_SLOPE * magnitude
    if residual is not None:
        value = value + np.asarray(residual, np.float64)
        magnitude = magnitude + np.abs(np.asarray(residual, np.float64))
    return Reference(value, magnitude)


def linear_backward(
    dy: npt.NDArray[Any], x: npt.NDArray[Any], weight: npt.NDArray[Any]
) -> tuple[Reference, Reference, Reference]:
    """Return dx = dy·weight, dweight = dyᵀ·x and dbias[n] = sum_m dy[m, n] in float64."""
    rows = np.asarray(dy, np.float64)
    dbias = Reference(rows.sum(0), np.abs(rows).sum(0))
    return matmul(dy, weight), matmul(dy, x, transpose_a=True), dbias
