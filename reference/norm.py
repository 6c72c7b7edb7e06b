"""References of `rms_norm` and `layer_norm`."""

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
