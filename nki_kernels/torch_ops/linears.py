"""Formulas, gradients and rows of `linear` in PyTorch, in float32 (float64 for float64).

    z = scale * x·weightᵀ + bias;  y = activation(z) + residual, rounded once
    dz = dy * activation'(z);  dx = scale * dz·weight;  dweight = scale * dzᵀ·x;  dbias = sum_m dz

The gradient runs `linear_backward`, one kernel for dx, dweight and dbias; of `linear_kn`, two
products. With an activation, z is formed again: it never leaves a fused kernel.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from nki_kernels.operators import OPERATORS
from nki_kernels.torch_ops.products import wide_type
from nki_kernels.torch_ops.row import Calls, Grads, Row, Tensors

_aten = torch.ops.aten


def _silu_slope(grad: Tensor, z: Tensor) -> Tensor:
    """PyTorch's own has no derivative."""
    s = torch.sigmoid(z)
    return grad * s * (1 + z * (1 - s))


#: Value and gradient of each activation; "gelu" is the exact one.
ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "relu": torch.relu,
    "silu": torch.nn.functional.silu,
    "gelu": torch.nn.functional.gelu,
    "gelu_tanh": partial(torch.nn.functional.gelu, approximate="tanh"),
}
ACTIVATION_GRADIENTS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "relu": lambda grad, z: _aten.threshold_backward(grad, z, 0),
    "silu": _silu_slope,
    "gelu": _aten.gelu_backward,
    "gelu_tanh": lambda grad, z: _aten.gelu_backward(grad, z, approximate="tanh"),
}


def _linear(
    flip: bool,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    residual: Tensor | None = None,
    *,
    activation: str | None = None,
    scale: float = 1.0,
    out_dtype: torch.dtype | None = None,
) -> Tensors:
    weight = weight.t() if flip else weight
    if x.dtype != weight.dtype:
        torch.mm(x, weight)  # refused in PyTorch's words
    wide = wide_type(x)
    y = torch.mm(x.to(wide), weight.to(wide))
    if scale != 1.0:
        y = y * scale
    if bias is not None:
        y = y + bias.to(wide)
    if activation is not None:
        y = ACTIVATIONS[activation](y)
    if residual is not None:
        y = y + residual.to(wide)
    return (y.to(out_dtype or x.dtype),)


def linear_backward(
    dy: Tensor, x: Tensor, weight: Tensor, *, out_dtype: torch.dtype | None = None
) -> Tensors:
    """dx = dy·weight; dweight = dyᵀ·x; dbias[n] = sum_m dy[m, n]."""
    wide, out = wide_type(dy), out_dtype or dy.dtype
    rows = dy.to(wide)
    dx, dweight = torch.mm(rows, weight.to(wide)), torch.mm(rows.t(), x.to(wide))
    return dx.to(out), dweight.to(out), rows.sum(0).to(out)


def _gradient(
    flip: bool,
    call: Calls,
    needs: tuple[bool, ...],
    grads: Tensors,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    residual: Tensor | None = None,
    *,
    activation: str | None = None,
    scale: float = 1.0,
    out_dtype: torch.dtype | None = None,
) -> Grads:
    """Return the gradients of x, weight, bias and residual."""
    dy = grads[0]
    found: list[Tensor | None] = [None, None, None, dy.to(x.dtype) if needs[3] else None]
    if any(needs[:3]):
        # With an `out_dtype`, dy may be wider than x; what is narrower is widened to meet it.
        wide = torch.promote_types(dy.dtype, x.dtype)
        dz = dy.to(wide)
        if activation is not None:
            form = call["linear" if flip else "linear_kn"]
            z = form(x, weight, bias, scale=scale, out_dtype=wide_type(x))
            dz = ACTIVATION_GRADIENTS[activation](dz.to(z.dtype), z).to(wide)
        scaled = dz if scale == 1.0 else (dz.to(wide_type(dz)) * scale).to(wide)
        if flip:
            found[:3] = call(scaled, x.to(wide), weight.to(wide), out_dtype=x.dtype)
        else:
            options = {"out_dtype": x.dtype}
            found[0] = call["matmul_nt"](scaled, weight.to(wide), **options) if needs[0] else None
            found[1] = call["matmul_tn"](x.to(wide), scaled, **options) if needs[1] else None
        if needs[2] and (scale != 1.0 or not flip):
            found[2] = dz.sum(0, dtype=wide_type(dz)).to(x.dtype)
    return tuple(part if need else None for part, need in zip(found, needs, strict=True))


def _second(
    call: Calls,
    needs: tuple[bool, ...],
    grads: Tensors,
    dy: Tensor,
    x: Tensor,
    weight: Tensor,
    *,
    out_dtype: torch.dtype | None = None,
) -> Grads:
    """Return the gradients of dy, x and weight, given those of dx, dweight and dbias."""
    wide = wide_type(dy)
    of_dx, of_dweight, of_dbias = (grad.to(wide) for grad in grads)
    rows, inputs, matrix = dy.to(wide), x.to(wide), weight.to(wide)
    of_dy = of_dx @ matrix.t() + inputs @ of_dweight.t() + of_dbias
    found = (of_dy, rows @ of_dweight, rows.t() @ of_dx)
    return tuple(
        part.to(dy.dtype) if need else None for part, need in zip(found, needs, strict=True)
    )


def _batched(
    call: Calls, axes: tuple[bool, ...], x: Tensor, *others: Tensor | None, **options: Any
) -> Tensors | None:
    """Fold the batch of a vmap into the rows, where the parameters have none."""
    residual = others[2] if len(others) > 2 else None
    if not axes[0] or any(axes[1:3]) or (residual is not None and not axes[3]):
        return None
    rows = None if residual is None else residual.reshape(-1, residual.shape[-1])
    y = call(x.reshape(-1, x.shape[-1]), others[0], others[1], rows, **options)
    return (y.reshape(*x.shape[:2], -1),)


def _row(name: str, flip: bool) -> Row:
    return Row(
        op=OPERATORS[name],
        options="str? activation=None, float scale=1.0, ScalarType? out_dtype=None",
        notes=(
            f"activation: None, {', '.join(ACTIVATIONS)}.",
            "scale: factor of the product.",
            "out_dtype: dtype of the result; None means that of x.",
        ),
        plain=partial(_linear, flip),
        backward=partial(_gradient, flip),
        gradient="linear_backward" if flip else None,
        autocast="low",
        vmap=_batched,
    )


LINEAR = _row("linear", True)

ROWS = (
    LINEAR,
    _row("linear_kn", False),
    Row(
        op=OPERATORS["linear_backward"],
        options="ScalarType? out_dtype=None",
        notes=("out_dtype: dtype of the results; None means that of dy.",),
        plain=linear_backward,
        backward=_second,
    ),
)
