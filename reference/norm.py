"""References of `rms_norm` and `layer_norm`, and of their gradients."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from reference.matmul import Reference


def rms_norm(
    x: npt.NDArray[Any], weight: npt.NDArray[Any] | None = None, eps: float = 1e-6
) -> Reference:
    """Normalise rows by their root mean square, in float64.

    y[n, h] = x[n, h] / sqrt(mean_h(x[n, :]^2) + eps) * weight[h];  magnitude = |y|

    Every term of the mean square is positive, so its relative error is that of a sum without
    cancellation, and the result inherits it: |y| is the magnitude.

    Args:
        x: [N, H].
        weight: [H], or None for ones.
        eps: added to the mean square.

    Returns:
        value [N, H] and magnitude [N, H], both float64.
    """
    x64 = np.asarray(x, dtype=np.float64)
    scale = 1.0 if weight is None else np.asarray(weight, dtype=np.float64)
    mean_square = np.mean(x64 * x64, axis=-1, keepdims=True)
    value = x64 / np.sqrt(mean_square + eps) * scale
    return Reference(value, np.abs(value))


def layer_norm(
    x: npt.NDArray[Any],
    weight: npt.NDArray[Any] | None = None,
    bias: npt.NDArray[Any] | None = None,
    eps: float = 1e-5,
) -> Reference:
    """Normalise rows to mean 0 and variance 1, in float64.

    y[n, h] = (x[n, h] - mean[n]) * r[n] * weight[h] + bias[h],  r = 1 / sqrt(var + eps)

    The magnitude follows the first-order error of centred statistics. With a = mean_h |x| and
    d = x - mean, the mean is off by u * a, hence d by u * (a + |d|), and var by
    2 * u * a * sqrt(var) beside its own relative error, which moves r by u * a * sqrt(var) * r^2
    relatively:

    magnitude = |weight| * r * (a + |d| * (1 + a * sqrt(var) * r^2)) + |bias| + |y|

    Args:
        x: [N, H].
        weight: [H], or None for ones.
        bias: [H], or None for zeros.
        eps: added to the variance.

    Returns:
        value [N, H] and magnitude [N, H], both float64.
    """
    x64 = np.asarray(x, dtype=np.float64)
    scale = np.ones(()) if weight is None else np.asarray(weight, dtype=np.float64)
    shift = np.zeros(()) if bias is None else np.asarray(bias, dtype=np.float64)
    mean = np.mean(x64, axis=-1, keepdims=True)
    centred = x64 - mean
    variance = np.mean(centred * centred, axis=-1, keepdims=True)
    factor = 1.0 / np.sqrt(variance + eps)
    value = centred * factor * scale + shift
    typical = np.mean(np.abs(x64), axis=-1, keepdims=True)
    sensitivity = 1.0 + typical * np.sqrt(variance) * factor**2
    spread = typical + np.abs(centred) * sensitivity
    magnitude = np.abs(scale) * factor * spread + np.abs(shift) + np.abs(value)
    return Reference(value, magnitude)


def group_norm(
    x: npt.NDArray[Any],
    weight: npt.NDArray[Any] | None = None,
    bias: npt.NDArray[Any] | None = None,
    eps: float = 1e-5,
    *,
    num_groups: int,
) -> Reference:
    """Normalise groups of neighbouring channels to mean 0 and variance 1, in float64.

    A group is a row of `layer_norm`, as is the error of its statistics; weight and bias belong to
    channels. With a and r those of the row, x * (r * weight) and mean * r * weight are rounded
    before they cancel, each at most (a + |d|) * r * |weight|, which the magnitude of `layer_norm`
    has once: here it counts twice.

    Args:
        x: [N, C, S].
        weight: [C], or None for ones.
        bias: [C], or None for zeros.
        eps: added to the variance.
        num_groups: a divisor of C.

    Returns:
        value [N, C, S] and magnitude [N, C, S], both float64.
    """
    batch, channels = x.shape[:2]
    rows = layer_norm(np.reshape(x, (batch * num_groups, -1)), eps=eps)
    value, magnitude = (part.reshape(x.shape) for part in rows)
    column = (1, channels, 1)
    scale = np.ones(column) if weight is None else np.asarray(weight, np.float64).reshape(column)
    shift = np.zeros(column) if bias is None else np.asarray(bias, np.float64).reshape(column)
    result = value * scale + shift
    spread = 2.0 * np.abs(scale) * magnitude + np.abs(shift) + np.abs(result)
    return Reference(result, spread)


def _added(x: npt.NDArray[Any], residual: npt.NDArray[Any]) -> tuple[npt.NDArray[Any], Reference]:
    """Return the sum with its rounding point, float32 to the dtype of x, and as a reference."""
    total = (np.asarray(x, np.float32) + np.asarray(residual, np.float32)).astype(x.dtype)
    exact = np.asarray(x, np.float64) + np.asarray(residual, np.float64)
    return total, Reference(exact, np.abs(exact))


def add_rms_norm(
    x: npt.NDArray[Any],
    residual: npt.NDArray[Any],
    weight: npt.NDArray[Any] | None = None,
    eps: float = 1e-6,
) -> tuple[Reference, ...]:
    """total = x + residual;  y = rms_norm(round(total)), rounded as it is stored.

    Args:
        x: [N, H].
        residual: [N, H].
        weight: [H], or None for ones.
        eps: added to the mean square.

    Returns:
        total [N, H] and y [N, H].
    """
    total, exact = _added(x, residual)
    return exact, rms_norm(total, weight, eps)


def add_layer_norm(
    x: npt.NDArray[Any],
    residual: npt.NDArray[Any],
    weight: npt.NDArray[Any] | None = None,
    bias: npt.NDArray[Any] | None = None,
    eps: float = 1e-5,
) -> tuple[Reference, ...]:
    """total = x + residual;  y = layer_norm(round(total)), rounded as it is stored.

    Args:
        x: [N, H].
        residual: [N, H].
        weight: [H], or None for ones.
        bias: [H], or None for zeros.
        eps: added to the variance.

    Returns:
        total [N, H] and y [N, H].
    """
    total, exact = _added(x, residual)
    return exact, layer_norm(total, weight, bias, eps)


def rms_norm_llama(x: npt.NDArray[Any], weight: npt.NDArray[Any], eps: float = 1e-6) -> Reference:
    """The value of `rms_norm`; the rounding before the weight counts among the roundings.

    Args:
        x: [N, H].
        weight: [H].
        eps: added to the mean square.

    Returns:
        value [N, H] and magnitude [N, H].
    """
    return rms_norm(x, weight, eps)


def rms_norm_gemma(x: npt.NDArray[Any], weight: npt.NDArray[Any], eps: float = 1e-6) -> Reference:
    """y[n, h] = x[n, h] / sqrt(mean_h(x[n, :]^2) + eps) * (1 + weight[h]).

    1 + weight is rounded to float32 relative to itself: |y| is the magnitude.

    Args:
        x: [N, H].
        weight: [H].
        eps: added to the mean square.

    Returns:
        value [N, H] and magnitude [N, H].
    """
    return rms_norm(x, 1.0 + np.asarray(weight, np.float64), eps)


def rms_norm_backward(
    dy: npt.NDArray[Any],
    x: npt.NDArray[Any],
    weight: npt.NDArray[Any] | None = None,
    eps: float = 1e-6,
) -> tuple[Reference, ...]:
    """Gradients of `rms_norm`, in float64.

    With r = 1 / sqrt(mean_h(x^2) + eps), n = x * r, g = dy * weight, m = mean_h(g * n):

    dx = r * (g - n * m);  dweight[h] = sum_n(dy[n, h] * n[n, h])

    r carries the relative error of a sum of squares, m that of its absolute terms, and dx has r
    three times in its second term:

    magnitude(dx) = r * (|g| + 4 * |n| * mean_h|g * n|);  magnitude(dweight) = 2 * sum_n|dy * n|

    Args:
        dy: [N, H], the gradient of the result.
        x: [N, H].
        weight: [H], or None for ones.
        eps: added to the mean square.

    Returns:
        dx [N, H] and dweight [H].
    """
    d, x64 = np.asarray(dy, dtype=np.float64), np.asarray(x, dtype=np.float64)
    g = d if weight is None else d * np.asarray(weight, dtype=np.float64)
    r = 1.0 / np.sqrt(np.mean(x64 * x64, axis=-1, keepdims=True) + eps)
    n = x64 * r
    dx = r * (g - n * np.mean(g * n, axis=-1, keepdims=True))
    inner = np.mean(np.abs(g * n), axis=-1, keepdims=True)
    return (
        Reference(dx, r * (np.abs(g) + 4.0 * np.abs(n) * inner)),
        Reference(np.sum(d * n, axis=0), 2.0 * np.sum(np.abs(d * n), axis=0)),
    )


def layer_norm_backward(
    dy: npt.NDArray[Any],
    x: npt.NDArray[Any],
    weight: npt.NDArray[Any] | None = None,
    eps: float = 1e-5,
) -> tuple[Reference, ...]:
    """Gradients of `layer_norm`, in float64.

    With s = x - mean_h(x), r = 1 / sqrt(mean_h(s^2) + eps), n = s * r, g = dy * weight:

    dx = r * (g - mean_h(g) - n * m), m = mean_h(g * n)
    dweight[h] = sum_n(dy[n, h] * n[n, h]);  dbias[h] = sum_n(dy[n, h])

    As in `layer_norm` the mean is off by u * a, a = mean_h|x|, and r relatively by u * (k - 1) with
    k = 2 + a * sqrt(var) * r^2; hence n by u * e with e = a * r + |n| * k. The product rule over
    the terms of dx, and of dweight, gives

    magnitude(dx) = r * (k * (|g| + mean_h|g| + |n| * q) + e * q + |n| * mean_h(|g| * e)),
    q = mean_h|g * n|;  magnitude(dweight) = sum_n(|dy| * (|n| + e))

    Args:
        dy: [N, H], the gradient of the result.
        x: [N, H].
        weight: [H], or None for ones.
        eps: added to the variance.

    Returns:
        dx [N, H], dweight [H] and dbias [H].
    """
    d, x64 = np.asarray(dy, dtype=np.float64), np.asarray(x, dtype=np.float64)
    g = d if weight is None else d * np.asarray(weight, dtype=np.float64)
    s = x64 - np.mean(x64, axis=-1, keepdims=True)
    variance = np.mean(s * s, axis=-1, keepdims=True)
    r = 1.0 / np.sqrt(variance + eps)
    n = s * r
    dx = r * (g - _mean(g) - n * _mean(g * n))
    typical = _mean(np.abs(x64))
    relative = 2.0 + typical * np.sqrt(variance) * r**2
    off = typical * r + np.abs(n) * relative
    inner = _mean(np.abs(g * n))
    terms = np.abs(g) + _mean(np.abs(g)) + np.abs(n) * inner
    moved = off * inner + np.abs(n) * _mean(np.abs(g) * off)
    return (
        Reference(dx, r * (relative * terms + moved)),
        Reference(np.sum(d * n, axis=0), np.sum(np.abs(d) * (np.abs(n) + off), axis=0)),
        Reference(np.sum(d, axis=0), np.sum(np.abs(d), axis=0)),
    )


def _mean(values: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    mean: npt.NDArray[np.float64] = np.mean(values, axis=-1, keepdims=True)
    return mean
