"""Formula and gradient of `rms_norm` and `layer_norm` in PyTorch.

Both compute in float32 (float64 for float64 inputs) and round once, as the kernels do. The
gradients are ops of their own, with kernels; gradients of these are plain PyTorch on every backend.

With s = x - mean (layer_norm) or s = x (rms_norm), r = 1 / sqrt(mean_h(s^2) + eps), n = s * r:

    y = n * weight + bias
    g = dy * weight
    dx = r * (g - n * mean_h(g * n) [- mean_h(g), layer_norm])
    dweight = sum_n(dy * n)
    dbias = sum_n(dy)
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

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
    dy: Tensor,
    x: Tensor,
    weight: Tensor | None = None,
    *,
    eps: float = DEFAULT_EPS["rms_norm"],
    out_dtype: torch.dtype | None = None,
) -> tuple[Tensor, ...]:
    """dx and dweight of `rms_norm`."""
    wide, n, r = _normalized(x, dy, eps, centre=False)
    dx = _input_grad(wide, n, r, weight, centre=False)
    return _rounded((dx, (wide * n).sum(0)), out_dtype or dy.dtype)


def layer_norm_backward(
    dy: Tensor,
    x: Tensor,
    weight: Tensor | None = None,
    *,
    eps: float = DEFAULT_EPS["layer_norm"],
    out_dtype: torch.dtype | None = None,
) -> tuple[Tensor, ...]:
    """dx, dweight and dbias of `layer_norm`."""
    wide, n, r = _normalized(x, dy, eps, centre=True)
    dx = _input_grad(wide, n, r, weight, centre=True)
    return _rounded((dx, (wide * n).sum(0), wide.sum(0)), out_dtype or dy.dtype)


def _rounded(values: tuple[Tensor, ...], dtype: torch.dtype) -> tuple[Tensor, ...]:
    return tuple(value.to(dtype) for value in values)


def rms_norm_gradient(
    call: Callable[..., tuple[Tensor, ...]],
    needs: tuple[bool, ...],
    grads: tuple[Tensor, ...],
    x: Tensor,
    weight: Tensor | None = None,
    *,
    eps: float = DEFAULT_EPS["rms_norm"],
    out_dtype: torch.dtype | None = None,
) -> tuple[Tensor | None, ...]:
    """Return the gradients of x and weight, by one call of `rms_norm_backward`."""
    return _gradients(call, needs, grads[0], (x, weight), eps)


def layer_norm_gradient(
    call: Callable[..., tuple[Tensor, ...]],
    needs: tuple[bool, ...],
    grads: tuple[Tensor, ...],
    x: Tensor,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    *,
    eps: float = DEFAULT_EPS["layer_norm"],
    out_dtype: torch.dtype | None = None,
) -> tuple[Tensor | None, ...]:
    """Return the gradients of x, weight and bias, by one call of `layer_norm_backward`."""
    return _gradients(call, needs, grads[0], (x, weight, bias), eps)


def _gradients(
    call: Callable[..., tuple[Tensor, ...]],
    needs: tuple[bool, ...],
    dy: Tensor,
    inputs: tuple[Tensor | None, ...],
    eps: float,
) -> tuple[Tensor | None, ...]:
    """Call the op of the gradients; each is rounded once, to the dtype of its input.

    With an `out_dtype`, dy may be wider than the inputs; they are widened to meet it. Parameters of
    another dtype than x, which only the backend "torch" takes, round a wide gradient.
    """
    given = [value.dtype for value in inputs if value is not None]
    mixed = any(dtype != given[0] for dtype in given)
    wide = dy.dtype
    for dtype in given:
        wide = torch.promote_types(wide, dtype)
    x, weight = inputs[0], inputs[1]
    found = call(
        dy.to(wide), _as(x, wide), _as(weight, wide),
        eps=eps, out_dtype=wide if mixed else given[0],
    )  # fmt: skip
    return tuple(
        grad.to(value.dtype) if needed and value is not None else None
        for needed, grad, value in zip(needs, found, inputs, strict=True)
    )


def batched(
    call: Callable[..., Tensor],
    axes: tuple[bool, ...],
    x: Tensor,
    *parameters: Tensor | None,
    **options: Any,
) -> tuple[Tensor, ...] | None:
    """Fold the batch of a vmap into the rows, where the parameters have none."""
    if not axes[0] or any(axes[1:]):
        return None
    return (call(x.reshape(-1, x.shape[-1]), *parameters, **options).reshape(x.shape),)


def rms_norm_second(
    call: Callable[..., tuple[Tensor, ...]],
    needs: tuple[bool, ...],
    grads: tuple[Tensor, ...],
    *inputs: Tensor | None,
    **options: Any,
) -> tuple[Tensor | None, ...]:
    """Return the gradients of dy, x and weight in `rms_norm_backward`."""
    return _second(rms_norm_backward, needs, grads, inputs, options)


def layer_norm_second(
    call: Callable[..., tuple[Tensor, ...]],
    needs: tuple[bool, ...],
    grads: tuple[Tensor, ...],
    *inputs: Tensor | None,
    **options: Any,
) -> tuple[Tensor | None, ...]:
    """Return the gradients of dy, x and weight in `layer_norm_backward`."""
    return _second(layer_norm_backward, needs, grads, inputs, options)


def _second(
    formula: Callable[..., tuple[Tensor, ...]],
    needs: tuple[bool, ...],
    grads: tuple[Tensor, ...],
    inputs: tuple[Tensor | None, ...],
    options: dict[str, Any],
) -> tuple[Tensor | None, ...]:
    """Differentiate the formula of a gradient with PyTorch."""
    given = [value for value in inputs if value is not None]

    def function(*values: Tensor) -> tuple[Tensor, ...]:
        return formula(*values, **options)

    pull = torch.func.vjp(function, *given)[1]
    found = iter(pull(tuple(grads)))
    every = [None if value is None else next(found) for value in inputs]
    return tuple(value if needed else None for needed, value in zip(needs, every, strict=True))


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
