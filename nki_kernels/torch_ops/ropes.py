"""Formula, gradient and rows of `rope`: the gradient of a rotation is the inverse rotation."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from nki_kernels.operators import OPERATORS
from nki_kernels.torch_ops.products import wide_type
from nki_kernels.torch_ops.row import Calls, Grads, Row, Tensors


def rope(
    x: Tensor,
    cos: Tensor,
    sin: Tensor,
    *,
    interleaved: bool = False,
    inverse: bool = False,
) -> Tensors:
    """y1 = x1 * cos - x2 * sin; y2 = x2 * cos + x1 * sin on pairs of columns."""
    wide, pairs = wide_type(x), cos.shape[-1]
    cos, sin = (t.to(wide).unsqueeze(-3) for t in (cos, sin))
    sin = -sin if inverse else sin
    turned, rest = x[..., : 2 * pairs].to(wide), x[..., 2 * pairs :]
    one, two = (
        (turned[..., ::2], turned[..., 1::2])
        if interleaved
        else (turned[..., :pairs], turned[..., pairs:])
    )
    halves = one * cos - two * sin, two * cos + one * sin
    y = torch.stack(halves, -1).flatten(-2) if interleaved else torch.cat(halves, -1)
    return (torch.cat((y.to(x.dtype), rest), -1),)


def _gradient(
    call: Calls,
    needs: tuple[bool, ...],
    grads: Tensors,
    x: Tensor,
    cos: Tensor,
    sin: Tensor,
    *,
    interleaved: bool = False,
    inverse: bool = False,
) -> Grads:
    """Return the gradient of x by the op itself, and those of the angles' cosine and sine."""
    dx = call(grads[0], cos, sin, interleaved=interleaved, inverse=not inverse)
    if not any(needs[1:]):
        return dx, None, None
    pairs, wide = cos.shape[-1], wide_type(x)

    def halves(t: Tensor) -> Tensors:
        t = t[..., : 2 * pairs].to(wide)
        if interleaved:
            return t[..., ::2], t[..., 1::2]
        return t[..., :pairs], t[..., pairs:]

    (x1, x2), (d1, d2) = halves(x), halves(grads[0])
    over = tuple(range(x.dim() - cos.dim())) if cos.dim() == 2 else (1,)
    dcos = (d1 * x1 + d2 * x2).sum(over)
    dsin = (d2 * x1 - d1 * x2).sum(over) * (-1 if inverse else 1)
    return (
        dx if needs[0] else None,
        dcos.to(cos.dtype) if needs[1] else None,
        dsin.to(sin.dtype) if needs[2] else None,
    )


def _batched(
    call: Calls, axes: tuple[bool, ...], x: Tensor, cos: Tensor, sin: Tensor, **options: Any
) -> Tensors | None:
    """Fold the batch of a vmap into B, where all share the angles of one sequence."""
    if axes != (True, False, False) or cos.dim() == 3:
        return None
    return (call(x.flatten(0, 1), cos, sin, **options).reshape(x.shape),)


ROWS = tuple(
    Row(
        op=OPERATORS[name],
        options="bool interleaved=False, bool inverse=False",
        notes=(
            "interleaved: pair f is columns (2 f, 2 f + 1), not (f, F + f).",
            "inverse: rotate by the negative angle.",
        ),
        plain=rope,
        backward=_gradient,
        vmap=_batched,
    )
    for name in ("rope", "rope_batched")
)
