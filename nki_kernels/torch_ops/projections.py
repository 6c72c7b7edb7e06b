"""Formulas, gradients and rows of `norm_linear` and `qkv_projection`.

    y = r * (x * norm_weight)·weightᵀ + bias,  r = 1 / sqrt(mean(x^2) + eps)
    [q | k | v] = y, head by head;  q = rope(norm(q)), k = rope(norm(k))

The gradients are made of the ops of the parts: the normalized rows are formed again by `rms_norm`,
the product is taken back by `linear_backward`, a rotation by `rope`, a norm by `rms_norm_backward`.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor

from nki_kernels.machine.errors import OptionError
from nki_kernels.operators import OPERATORS
from nki_kernels.operators.norm import DEFAULT_EPS
from nki_kernels.torch_ops.products import wide_type
from nki_kernels.torch_ops.ropes import rope
from nki_kernels.torch_ops.row import Calls, Grads, Row, Tensors

_EPS = DEFAULT_EPS["rms_norm"]


def _product(
    x: Tensor, norm_weight: Tensor | None, weight: Tensor, bias: Tensor | None, eps: float | None
) -> Tensor:
    """Return the wide result; x * norm_weight is rounded to the dtype of x, as in the kernel."""
    if x.dtype != weight.dtype:
        torch.mm(x, weight)  # refused in PyTorch's words
    wide = wide_type(x)
    entering = x if norm_weight is None else (x.to(wide) * norm_weight.to(wide)).to(x.dtype)
    y = torch.mm(entering.to(wide), weight.to(wide))
    if eps is not None:
        y = y * (x.to(wide).square().mean(-1, keepdim=True) + eps).rsqrt()
    return y if bias is None else y + bias.to(wide)


def _unproduct(
    call: Calls,
    dy: Tensor,
    x: Tensor,
    norm_weight: Tensor | None,
    weight: Tensor,
    eps: float | None,
) -> tuple[Tensor, Tensor | None, Tensor, Tensor]:
    """Return the gradients of x, norm_weight, weight [N, K] and bias, given that of the result."""
    rows = x if eps is None else call["rms_norm"](x, norm_weight, eps=eps)
    dz, dweight, dbias = call["linear_backward"](dy, rows, weight)
    if eps is None:
        return dz, None, dweight, dbias
    dx, dgain = call["rms_norm_backward"](dz, x, norm_weight, eps=eps)
    return dx, dgain, dweight, dbias


def _norm_linear(
    flip: bool,
    x: Tensor,
    norm_weight: Tensor | None,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    eps: float = _EPS,
    out_dtype: torch.dtype | None = None,
) -> Tensors:
    y = _product(x, norm_weight, weight.t() if flip else weight, bias, eps)
    return (y.to(out_dtype or x.dtype),)


def _norm_linear_gradient(
    flip: bool,
    call: Calls,
    needs: tuple[bool, ...],
    grads: Tensors,
    x: Tensor,
    norm_weight: Tensor | None,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    eps: float = _EPS,
    out_dtype: torch.dtype | None = None,
) -> Grads:
    dy = grads[0].to(x.dtype)
    stored = weight if flip else weight.t()
    dx, dgain, dweight, dbias = _unproduct(call, dy, x, norm_weight, stored, eps)
    found = (dx, dgain, dweight if flip else dweight.t().contiguous(), dbias)
    return tuple(part if need else None for part, need in zip(found, needs, strict=True))


# -- queries, keys and values ----------------------------------------------------------------------


def _by_rows(flip: bool, weight: Tensor) -> Tensor:
    """Return [C, D, H], or [H, C, D], as [C * D, H]."""
    return weight.flatten(0, 1) if flip else weight.flatten(1).t()


def _normed(x: Tensor, gain: Tensor, eps: float) -> Tensor:
    """rms_norm of the last axis of wide values."""
    return x * (x.square().mean(-1, keepdim=True) + eps).rsqrt() * gain.to(x.dtype)


def _qkv(
    flip: bool,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    norm_weight: Tensor | None = None,
    q_norm: Tensor | None = None,
    k_norm: Tensor | None = None,
    cos: Tensor | None = None,
    sin: Tensor | None = None,
    *,
    heads: int,
    kv_heads: int,
    eps: float = _EPS,
    out_dtype: torch.dtype | None = None,
) -> Tensors:
    size = weight.shape[1] if flip else weight.shape[2]
    row = None if bias is None else bias.flatten()
    used = None if norm_weight is None else eps
    y = _product(x, norm_weight, _by_rows(flip, weight).t(), row, used)
    sizes = [heads, kv_heads, kv_heads]
    parts = list(torch.split(y.reshape(x.shape[0], sum(sizes), size), sizes, dim=1))
    for at, gain in enumerate((q_norm, k_norm)):
        if gain is not None:
            parts[at] = _normed(parts[at], gain, eps)
        if cos is not None and sin is not None:
            (turned,) = rope(parts[at].transpose(0, 1)[None], cos, sin)
            parts[at] = turned[0].transpose(0, 1)
    return tuple(part.to(out_dtype or x.dtype) for part in parts)


def _qkv_gradient(
    flip: bool,
    call: Calls,
    needs: tuple[bool, ...],
    grads: Tensors,
    *inputs: Any,
    heads: int,
    kv_heads: int,
    eps: float = _EPS,
    out_dtype: torch.dtype | None = None,
) -> Grads:
    """Return the gradients; the angles have none.

    Raises:
        OptionError: the gradient of an angle is needed.
    """
    x, weight, bias, norm_weight, q_norm, k_norm, cos, sin = inputs
    if any(needs[6:]):
        raise OptionError(
            "qkv_projection: cos or sin requires a gradient, which the op has not; detach them, or "
            "use norm_linear and rope"
        )
    matrix = _by_rows(flip, weight)
    used = None if norm_weight is None else eps
    ends = [grad.to(x.dtype) for grad in grads]
    gains = (q_norm, k_norm)
    dgains: list[Tensor | None] = [None, None]
    size, before = ends[0].shape[2], list(ends)
    if any(gain is not None for gain in gains):  # what entered the norms of the heads
        rows = x if used is None else call["rms_norm"](x, norm_weight, eps=eps)
        y = call["linear"](rows, matrix, None if bias is None else bias.flatten())
        sizes = [heads, kv_heads, kv_heads]
        before = list(torch.split(y.reshape(x.shape[0], sum(sizes), size), sizes, dim=1))
    for at, gain in enumerate(gains):
        if cos is not None and sin is not None:
            turned = call["rope"](ends[at].transpose(0, 1)[None], cos, sin, inverse=True)
            ends[at] = turned[0].transpose(0, 1)
        if gain is not None:
            pair = (part.reshape(-1, size) for part in (ends[at], before[at]))
            dpart, dgains[at] = call["rms_norm_backward"](*pair, gain, eps=eps)
            ends[at] = dpart.reshape(ends[at].shape)
    dy = torch.cat(ends, dim=1).flatten(1)
    dx, dnorm, dmatrix, dbias = _unproduct(call, dy, x, norm_weight, matrix, used)
    dweight = (dmatrix if flip else dmatrix.t()).reshape(weight.shape)
    found = (dx, dweight, dbias.reshape(-1, size), dnorm, *dgains, None, None)
    return tuple(part if need else None for part, need in zip(found, needs, strict=True))


_OPTIONS = f"float eps={_EPS}, ScalarType? out_dtype=None"
_NOTES = (
    "eps: added to each mean square.",
    "out_dtype: dtype of the results; None means that of x.",
)


def _norm_linear_row(name: str, flip: bool) -> Row:
    return Row(
        op=OPERATORS[name],
        options=_OPTIONS,
        notes=_NOTES,
        plain=partial(_norm_linear, flip),
        backward=partial(_norm_linear_gradient, flip),
        autocast="low",
    )


def _qkv_row(name: str, flip: bool) -> Row:
    return Row(
        op=OPERATORS[name],
        options=f"int heads, int kv_heads, {_OPTIONS}",
        notes=("heads: heads of q.", "kv_heads: heads of k and of v.", *_NOTES),
        plain=partial(_qkv, flip),
        backward=partial(_qkv_gradient, flip),
        autocast="low",
    )


ROWS = (
    _norm_linear_row("norm_linear", True),
    _norm_linear_row("norm_linear_kn", False),
    _qkv_row("qkv_projection", True),
    _qkv_row("qkv_projection_kn", False),
)
