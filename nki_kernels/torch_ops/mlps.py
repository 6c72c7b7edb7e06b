"""Formula, gradient and rows of the gated MLP.

    g = x·gate, u = x·up, h = activation(g) * u, rounded to the dtype of x;  y = h·down
    dh = dy·downᵀ;  du = dh * activation(g);  dg = dh * u * activation'(g)
    dx = dg·gateᵀ + du·upᵀ;  dgate = xᵀ·dg;  dup = xᵀ·du;  ddown = hᵀ·dy

The gradient is one call of `gated_mlp_backward`, which forms g and u again, on the backend of the
forward pass.
"""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from nki_kernels.operators import OPERATORS
from nki_kernels.torch_ops.derivative import derivative
from nki_kernels.torch_ops.linears import ACTIVATION_GRADIENTS, ACTIVATIONS
from nki_kernels.torch_ops.products import wide_type
from nki_kernels.torch_ops.row import Calls, Grads, Row, Tensors


def _gated_mlp(
    flip: bool,
    x: Tensor,
    gate: Tensor,
    up: Tensor,
    down: Tensor,
    *,
    activation: str = "silu",
    out_dtype: torch.dtype | None = None,
) -> Tensors:
    wide = wide_type(x)
    gate, up, down = (w.t() if flip else w for w in (gate, up, down))
    for weight in (gate, up, down):
        if weight.dtype != x.dtype:
            torch.mm(x, weight)  # refused in PyTorch's words
    hidden = ACTIVATIONS[activation](torch.mm(x.to(wide), gate.to(wide)))
    hidden = hidden * torch.mm(x.to(wide), up.to(wide))
    y = torch.mm(hidden.to(x.dtype).to(wide), down.to(wide))
    return (y.to(out_dtype or x.dtype),)


def gated_mlp_backward(
    dy: Tensor,
    x: Tensor,
    gate: Tensor,
    up: Tensor,
    down: Tensor,
    x_gate: Tensor | None = None,
    x_up: Tensor | None = None,
    *,
    activation: str = "silu",
    out_dtype: torch.dtype | None = None,
) -> Tensors:
    """dx, dgate, dup and ddown of `gated_mlp`, rounded as the kernel does.

    `x_gate` and `x_up` are x·gateᵀ and x·upᵀ, where they were kept.
    """
    narrow, wide = x.dtype, wide_type(x)
    g, u = (
        torch.mm(x.to(wide), weight.to(wide).t()) if kept is None else kept.to(wide)
        for weight, kept in ((gate, x_gate), (up, x_up))
    )
    dh, active = torch.mm(dy.to(wide), down.to(wide)), ACTIVATIONS[activation](g)
    hidden, du = ((part * active).to(narrow).to(wide) for part in (u, dh))
    dg = ACTIVATION_GRADIENTS[activation](dh * u, g).to(narrow).to(wide)
    found = (
        torch.mm(dg, gate.to(wide)) + torch.mm(du, up.to(wide)),
        torch.mm(dg.t(), x.to(wide)),
        torch.mm(du.t(), x.to(wide)),
        torch.mm(dy.to(wide).t(), hidden),
    )
    return tuple(part.to(out_dtype or narrow) for part in found)


def _gradient(
    flip: bool,
    call: Calls,
    needs: tuple[bool, ...],
    grads: Tensors,
    x: Tensor,
    gate: Tensor,
    up: Tensor,
    down: Tensor,
    *,
    activation: str = "silu",
    out_dtype: torch.dtype | None = None,
) -> Grads:
    """Return all gradients by one call; weights stored the other way are transposed for it."""
    weights = (gate, up, down) if flip else (gate.t(), up.t(), down.t())
    dx, *others = call(grads[0].to(x.dtype), x, *weights, activation=activation)
    found = (dx, *(others if flip else (w.t().contiguous() for w in others)))
    return tuple(part if need else None for part, need in zip(found, needs, strict=True))


def _row(name: str, flip: bool) -> Row:
    return Row(
        op=OPERATORS[name],
        options="str activation='silu', ScalarType? out_dtype=None",
        notes=(
            f"activation: {', '.join(ACTIVATIONS)}.",
            "out_dtype: dtype of the result; None means that of x.",
        ),
        plain=partial(_gated_mlp, flip),
        backward=partial(_gradient, flip),
        gradient="gated_mlp_backward",
        autocast="low",
    )


def _backward_row(name: str) -> Row:
    return Row(
        op=OPERATORS[name],
        options="str activation='silu', ScalarType? out_dtype=None",
        notes=(
            f"activation: {', '.join(ACTIVATIONS)}.",
            "out_dtype: dtype of the results; None means that of x.",
        ),
        plain=gated_mlp_backward,
        backward=derivative(gated_mlp_backward),
    )


ROWS = (
    _row("gated_mlp", True),
    _row("gated_mlp_kn", False),
    *(_backward_row(name) for name in ("gated_mlp_backward", "gated_mlp_backward_kept")),
)
