"""References of `norm_linear` and `qkv_projection`."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from reference.matmul import Reference, matmul
from reference.rope import rope

Array = npt.NDArray[Any]


def norm_linear(
    x: Array,
    norm_weight: Array | None,
    weight: Array,
    bias: Array | None = None,
    *,
    eps: float | None = 1e-6,
    transpose_weight: bool = True,
) -> Reference:
    """rms_norm and a linear layer in float64, but for one rounding point: x * norm_weight.

    y[m, n] = r[m] * sum_k round(x[m, k] * norm_weight[k]) * weight[n, k] + bias[n]
    r[m] = 1 / sqrt(mean_k(x[m, :]^2) + eps), 1 for an eps of None

    Every term of the mean square is positive: the relative error of r is that of a sum without
    cancellation. The magnitude is r * sum|terms| + |bias|.

    Args:
        x: [M, K].
        norm_weight: [K] or None.
        weight: [N, K], or [K, N] without transpose_weight.
        bias: [N] or None.
        eps: added to the mean square.
        transpose_weight: how the weight is stored.

    Returns:
        value [M, N] and magnitude [M, N], both float64.
    """
    x64 = np.asarray(x, np.float64)
    entering = x64
    if norm_weight is not None:
        product = x64 * np.asarray(norm_weight, np.float64)  # exact: 48 bits at most
        entering = product.astype(x.dtype).astype(np.float64)
    total, magnitude = matmul(entering, weight, transpose_b=transpose_weight)
    if eps is not None:
        factor = 1.0 / np.sqrt(np.mean(x64 * x64, axis=1, keepdims=True) + eps)
        total, magnitude = factor * total, factor * magnitude
    if bias is not None:
        shift = np.asarray(bias, np.float64)
        total, magnitude = total + shift, magnitude + np.abs(shift)
    return Reference(total, magnitude)


def head_norm(z: Reference, gain: Array, eps: float) -> Reference:
    """Normalise the last axis by its root mean square: y = z * r * gain, r = (mean z^2 + eps)^-1/2.

    An error u * magnitude of z moves r relatively by u * mean(|z| * magnitude) * r^2, so that to
    first order magnitude(y) = |gain| * r * (magnitude + |z| * (1 + mean(|z| * magnitude) * r^2)).
    """
    value, magnitude = z
    scale = np.asarray(gain, np.float64)
    r = 1.0 / np.sqrt(np.mean(value * value, axis=-1, keepdims=True) + eps)
    moved = np.mean(np.abs(value) * magnitude, axis=-1, keepdims=True) * r * r
    return Reference(
        value * r * scale, np.abs(scale) * r * (magnitude + np.abs(value) * (1.0 + moved))
    )


def qkv_projection(
    x: Array,
    weight: Array,
    bias: Array | None = None,
    norm_weight: Array | None = None,
    q_norm: Array | None = None,
    k_norm: Array | None = None,
    cos: Array | None = None,
    sin: Array | None = None,
    *,
    heads: int,
    kv_heads: int,
    eps: float = 1e-6,
    transpose_weight: bool = True,
) -> tuple[Reference, Reference, Reference]:
    """Queries, keys and values: `norm_linear`, then `head_norm` and `rope` of q and k.

    Args:
        x: [T, H].
        weight: [C, D, H], C = heads + 2 kv_heads; [H, C, D] without transpose_weight.
        bias: [C, D] or None.
        norm_weight: [H], or None for no norm of x.
        q_norm: [D], or None for no norm of the heads of q.
        k_norm: likewise, of k.
        cos: [T, F], or None for no rotation.
        sin: likewise.
        heads: heads of q.
        kv_heads: heads of k, and of v.
        eps: added to every mean square.
        transpose_weight: how the weight is stored.

    Returns:
        q [T, heads, D], k and v [T, kv_heads, D], each value and magnitude.
    """
    size = weight.shape[1 if transpose_weight else 2]
    flat = weight.reshape(-1, x.shape[1]) if transpose_weight else weight.reshape(x.shape[1], -1)
    shift = None if bias is None else bias.reshape(-1)
    inner = None if norm_weight is None else eps
    z = norm_linear(
        x, norm_weight, flat, shift, eps=inner, transpose_weight=transpose_weight
    )  # fmt: skip
    parts = [part.reshape(x.shape[0], -1, size) for part in z]
    cuts = (0, heads, heads + kv_heads, heads + 2 * kv_heads)
    results = []
    for number, gain in enumerate((q_norm, k_norm, None)):
        here = slice(cuts[number], cuts[number + 1])
        part = Reference(parts[0][:, here], parts[1][:, here])
        if gain is not None:
            part = head_norm(part, gain, eps)
        if cos is not None and sin is not None and number < 2:
            part = _rotated(part, cos, sin)
        results.append(part)
    q, k, v = results
    return q, k, v


def _rotated(z: Reference, cos: Array, sin: Array) -> Reference:
    """Rotate heads [T, heads, D]: `rope` of the value; of the magnitude, with absolute terms."""

    def as_heads(values: Array) -> Array:
        return values.transpose(1, 0, 2)[None]

    value = rope(as_heads(z.value), cos, sin).value
    magnitude = rope(as_heads(z.magnitude), cos, sin).magnitude
    return Reference(value[0].transpose(1, 0, 2), magnitude[0].transpose(1, 0, 2))
