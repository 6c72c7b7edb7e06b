"""Formula and gradient of `rms_norm` and `layer_norm` in PyTorch.

Both compute in float32 (float64 for float64 inputs) and round once, as the kernels do. The
gradients are closed forms in plain PyTorch on every backend: there are no backward kernels.

With s = x - mean (layer_norm) or s = x (rms_norm), r = 1 / sqrt(mean_h(s^2) + eps), n = s * r:

    y = n * weight + bias
    g = dy * weight
    dx = r * (g - n * mean_h(g * n) [- mean_h(g), layer_norm])
    dweight = sum_n(dy * n)
    dbias = sum_n(dy)
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional

from nki_kernels.operators.norm import DEFAULT_EPS


def _wide(x: Tensor) -> torch.dtype:
    return torch.promote_types(x.dtype, torch.float32)


def _as(x: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    return None if x is None else x.to(dtype)


def rms_norm(
    x: Tensor,
    weight: Tensor | None = None,
    *,
    eps: float = DEFAULT_EPS["rms_norm"],
    out_dtype: torch.dtype | None = None,
) -> tuple[Tensor, ...]:
    """y[n, h] = x[n, h] / sqrt(mean_h(x[n, :]^2) + eps) * weight[h]."""
    wide = _wide(x)
    y = functional.rms_norm(x.to(wide), x.shape[-1:], _as(weight, wide), eps)
    return (y.to(out_dtype or x.dtype),)


def layer_norm(
    x: Tensor,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    *,
    eps: float = DEFAULT_EPS["layer_norm"],
    out_dtype: torch.dtype | None = None,
) -> tuple[Tensor, ...]:
    """y[n, h] = (x[n, h] - mean[n]) / sqrt(var[n] + eps) * weight[h] + bias[h]."""
    wide = _wide(x)
    y = functional.layer_norm(x.to(wide), x.shape[-1:], _as(weight, wide), _as(bias, wide), eps)
    return (y.to(out_dtype or x.dtype),)


def rms_norm_backward(
    call: Callable[..., Tensor],
    needs: tuple[bool, ...],
    grads: tuple[Tensor, ...],
    x: Tensor,
    weight: Tensor | None = None,
    *,
    eps: float = DEFAULT_EPS["rms_norm"],
    out_dtype: torch.dtype | None = None,
) -> tuple[Tensor | None, ...]:
    """Return the gradients of x and weight."""
    dy, n, r = _normalized(x, grads[0], eps, centre=False)
    return (
        _input_grad(dy, n, r, weight, centre=False).to(x.dtype) if needs[0] else None,
        _row_sum(dy * n, weight) if needs[1] else None,
    )


def layer_norm_backward(
    call: Callable[..., Tensor],
    needs: tuple[bool, ...],
    grads: tuple[Tensor, ...],
    x: Tensor,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    *,
    eps: float = DEFAULT_EPS["layer_norm"],
    out_dtype: torch.dtype | None = None,
) -> tuple[Tensor | None, ...]:
    """Return the gradients of x, weight and bias."""
    dy, n, r = _normalized(x, grads[0], eps, centre=True)
    return (
        _input_grad(dy, n, r, weight, centre=True).to(x.dtype) if needs[0] else None,
        _row_sum(dy * n, weight) if needs[1] else None,
        _row_sum(dy, bias) if needs[2] else None,
    )


def _normalized(x: Tensor, dy: Tensor, eps: float, *, centre: bool) -> tuple[Tensor, ...]:
    """Return dy, n and r in the wide dtype."""
    wide = _wide(x)
    s = x.to(wide)
    if centre:
        s = s - s.mean(-1, keepdim=True)
    r = (s.square().mean(-1, keepdim=True) + eps).rsqrt()
    return dy.to(wide), s * r, r


def _input_grad(dy: Tensor, n: Tensor, r: Tensor, weight: Tensor | None, *, centre: bool) -> Tensor:
    g = dy if weight is None else dy * weight.to(dy.dtype)
    inner = g - n * (g * n).mean(-1, keepdim=True)
    return r * (inner - g.mean(-1, keepdim=True) if centre else inner)


def _row_sum(terms: Tensor, like: Tensor | None) -> Tensor:
    """Sum over all rows, rounded to the dtype of the parameter."""
    total = terms.sum(tuple(range(terms.dim() - 1)))
    return total if like is None else total.to(like.dtype)
