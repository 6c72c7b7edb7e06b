"""Formula and gradient of `linear` in PyTorch, in float32 (float64 for float64), rounded once.

    y = x·weightᵀ + bias + residual
    dx = dy·weight;  dweight = dyᵀ·x;  dbias = sum_m dy;  dresidual = dy

The gradient runs `linear_backward`, one kernel for dx, dweight and dbias. Scale and activation are
left to PyTorch: the argument that their gradient needs never leaves a fused kernel.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor


def _wide(*tensors: Tensor) -> torch.dtype:
    dtype = torch.float32
    for x in tensors:
        dtype = torch.promote_types(dtype, x.dtype)
    return dtype


def linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    residual: Tensor | None = None,
    *,
    out_dtype: torch.dtype | None = None,
) -> tuple[Tensor, ...]:
    """y[m, n] = sum_k x[m, k] * weight[n, k] + bias[n] + residual[m, n]."""
    if x.dtype != weight.dtype:
        torch.mm(x, weight.t())  # refused in PyTorch's words
    wide = _wide(x)
    y = torch.mm(x.to(wide), weight.to(wide).t())
    for addend in (bias, residual):
        if addend is not None:
            y = y + addend.to(wide)
    return (y.to(out_dtype or x.dtype),)


def linear_backward(
    dy: Tensor, x: Tensor, weight: Tensor, *, out_dtype: torch.dtype | None = None
) -> tuple[Tensor, ...]:
    """dx = dy·weight; dweight = dyᵀ·x; dbias[n] = sum_m dy[m, n]."""
    wide, out = _wide(dy), out_dtype or dy.dtype
    rows = dy.to(wide)
    dx, dweight = torch.mm(rows, weight.to(wide)), torch.mm(rows.t(), x.to(wide))
    return dx.to(out), dweight.to(out), rows.sum(0).to(out)


def linear_gradient(
    call: Callable[..., tuple[Tensor, ...]],
    needs: tuple[bool, ...],
    grads: tuple[Tensor, ...],
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    residual: Tensor | None = None,
    *,
    out_dtype: torch.dtype | None = None,
) -> tuple[Tensor | None, ...]:
    """Return the gradients of x, weight, bias and residual."""
    dy = grads[0]
    found: list[Tensor | None] = [None, None, None, dy.to(x.dtype) if needs[3] else None]
    if any(needs[:3]):
        # With an `out_dtype`, dy may be wider than x; what is narrower is widened to meet it.
        wide = torch.promote_types(dy.dtype, x.dtype)
        found[:3] = call(dy.to(wide), x.to(wide), weight.to(wide), out_dtype=x.dtype)
    return tuple(part if need else None for part, need in zip(found, needs, strict=True))


def linear_second(
    call: Callable[..., tuple[Tensor, ...]],
    needs: tuple[bool, ...],
    grads: tuple[Tensor, ...],
    dy: Tensor,
    x: Tensor,
    weight: Tensor,
    *,
    out_dtype: torch.dtype | None = None,
) -> tuple[Tensor | None, ...]:
    """Return the gradients of dy, x and weight, given those of dx, dweight and dbias."""
    wide = _wide(dy)
    of_dx, of_dweight, of_dbias = (grad.to(wide) for grad in grads)
    rows, inputs, matrix = dy.to(wide), x.to(wide), weight.to(wide)
    of_dy = of_dx @ matrix.t() + inputs @ of_dweight.t() + of_dbias
    found = (of_dy, rows @ of_dweight, rows.t() @ of_dx)
    return tuple(
        part.to(dy.dtype) if need else None for part, need in zip(found, needs, strict=True)
    )
