"""Formulas, gradients and rows of the norms with a residual, and of those cast as models cast them.

    total = x + residual, rounded;  y = norm(total)
    dx = dresidual = dtotal + the gradient through the norm, by the op of that norm's gradient

`rms_norm_llama` rounds the normalized row before the weight, `rms_norm_gemma` multiplies by
1 + weight in float32. The gradients of both are `rms_norm_backward`; rounding has none. That of
`group_norm` is PyTorch's derivative of the formula, on every backend and not counted.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor

from nki_kernels.operators import OPERATORS
from nki_kernels.operators.norm import DEFAULT_EPS
from nki_kernels.torch_ops import norms
from nki_kernels.torch_ops.derivative import derivative
from nki_kernels.torch_ops.products import wide_type
from nki_kernels.torch_ops.row import Calls, Grads, Row, Tensors

_EPS = DEFAULT_EPS["rms_norm"]
_FORMULAS = {"rms_norm": norms.rms_norm, "layer_norm": norms.layer_norm}


def _add_norm(name: str, x: Tensor, residual: Tensor, *parameters: Any, eps: float) -> Tensors:
    total = (x.to(wide_type(x)) + residual.to(wide_type(x))).to(x.dtype)
    return (total, *_FORMULAS[name](total, *parameters, eps=eps))


def _add_rms_norm(
    x: Tensor, residual: Tensor, weight: Tensor | None = None, *, eps: float = _EPS
) -> Tensors:
    return _add_norm("rms_norm", x, residual, weight, eps=eps)


def _add_layer_norm(
    x: Tensor,
    residual: Tensor,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    *,
    eps: float = DEFAULT_EPS["layer_norm"],
) -> Tensors:
    return _add_norm("layer_norm", x, residual, weight, bias, eps=eps)


def _add_gradient(
    name: str, call: Calls, needs: tuple[bool, ...], grads: Grads, *saved: Any, **options: Any
) -> Grads:
    """Return the gradients of x, residual and the parameters; the sum is the one that was kept."""
    parameters, total = saved[2 : len(needs)], saved[len(needs)]
    dtotal, dy = grads
    found: tuple[Tensor | None, ...] = (dtotal, *(None for _ in parameters))
    if dy is not None:
        dx, *others = call[f"{name}_backward"](dy, total, parameters[0], **options)
        found = (dx if dtotal is None else dx + dtotal, *others)
    every = (found[0], *found)
    return tuple(grad if need else None for grad, need in zip(every, needs, strict=True))


def _llama(x: Tensor, weight: Tensor, *, eps: float = _EPS) -> Tensors:
    (normalized,) = norms.rms_norm(x, eps=eps)
    wide = wide_type(x)
    return ((normalized.to(wide) * weight.to(wide)).to(x.dtype),)


def _gemma(x: Tensor, weight: Tensor, *, eps: float = _EPS) -> Tensors:
    wide = wide_type(x)
    (y,) = norms.rms_norm(x.to(wide), 1 + weight.to(wide), eps=eps)
    return (y.to(x.dtype),)


def _llama_gradient(
    call: Calls, needs: tuple[bool, ...], grads: Tensors, x: Tensor, weight: Tensor, **options: Any
) -> Grads:
    found = call["rms_norm_backward"](grads[0], x, weight, **options)
    return tuple(grad if need else None for grad, need in zip(found, needs, strict=True))


def _gemma_gradient(
    call: Calls, needs: tuple[bool, ...], grads: Tensors, x: Tensor, weight: Tensor, **options: Any
) -> Grads:
    """In float32, which 1 + weight needs."""
    wide = wide_type(x)
    gain = 1 + weight.to(wide)
    found = call["rms_norm_backward"](grads[0].to(wide), x.to(wide), gain, **options)
    return tuple(
        grad.to(x.dtype) if need else None for grad, need in zip(found, needs, strict=True)
    )


def _group_norm(
    x: Tensor,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    *,
    num_groups: int,
    eps: float = DEFAULT_EPS["layer_norm"],
    out_dtype: torch.dtype | None = None,
) -> Tensors:
    wide = wide_type(x)
    gain, shift = (None if p is None else p.to(wide) for p in (weight, bias))
    y = torch.nn.functional.group_norm(x.to(wide), num_groups, gain, shift, eps)
    return (y.to(out_dtype or x.dtype),)


_NOTES = ("eps: added to the mean square or the variance.",)


def _add_row(name: str, plain: Any) -> Row:
    return Row(
        op=OPERATORS[f"add_{name}"],
        options=f"float eps={DEFAULT_EPS[name]}",
        notes=_NOTES,
        plain=plain,
        backward=partial(_add_gradient, name),
        keeps_outputs=True,
    )


def _cast_row(cast: str, plain: Any, backward: Any) -> Row:
    return Row(
        op=OPERATORS[f"rms_norm_{cast}"],
        options=f"float eps={_EPS}",
        notes=_NOTES,
        plain=plain,
        backward=backward,
        vmap=norms.batched,
    )


ROWS = (
    _add_row("rms_norm", _add_rms_norm),
    _add_row("layer_norm", _add_layer_norm),
    Row(
        op=OPERATORS["group_norm"],
        options=(
            f"int num_groups, float eps={DEFAULT_EPS['layer_norm']}, ScalarType? out_dtype=None"
        ),
        notes=(
            "num_groups: groups of neighbouring channels; it divides C.",
            *_NOTES,
            "out_dtype: dtype of the result; None means that of x.",
        ),
        plain=_group_norm,
        backward=derivative(_group_norm),
    ),
    _cast_row("llama", _llama, _llama_gradient),
    _cast_row("gemma", _gemma, _gemma_gradient),
)
