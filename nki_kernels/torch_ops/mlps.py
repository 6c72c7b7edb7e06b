"""Formula, gradient and rows of the gated MLP.

    g = x·gate, u = x·up, h = activation(g) * u, rounded to the dtype of x;  y = h·down
    dh = dy·downᵀ;  du = dh * activation(g);  dg = dh * u * activation'(g)
    dx = dg·gateᵀ + du·upᵀ;  dgate = xᵀ·dg;  dup = xᵀ·du;  ddown = hᵀ·dy

The gradient forms g and u again and is made of the products, on the backend of the forward pass;
what lies between them is plain PyTorch in float32.
"""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from nki_kernels.operators import OPERATORS
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
    """Return the gradients of x, gate, up and down."""
    narrow, wide = x.dtype, wide_type(x)
    # The letters of the products: weights stored [I, H] and [H, I], or the other way round.
    into, back = ("matmul_nt", "matmul") if flip else ("matmul", "matmul_nt")
    g, u = call[into](x, gate, out_dtype=wide), call[into](x, up, out_dtype=wide)
    dy = grads[0].to(narrow)
    active = ACTIVATIONS[activation](g)
    dh = call[back](dy, down, out_dtype=wide)
    du = (dh * active).to(narrow)
    dg = ACTIVATION_GRADIENTS[activation](dh * u, g).to(narrow)

    def weight_gradient(inner: Tensor, outer: Tensor) -> Tensor:
        pair = (outer, inner) if flip else (inner, outer)
        found: Tensor = call["matmul_tn"](*pair)
        return found

    dx = None
    if needs[0]:
        through = call[back](dg, gate, out_dtype=wide) + call[back](du, up, out_dtype=wide)
        dx = through.to(narrow)
    return (
        dx,
        weight_gradient(x, dg) if needs[1] else None,
        weight_gradient(x, du) if needs[2] else None,
        weight_gradient((active * u).to(narrow), dy) if needs[3] else None,
    )


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
        autocast="low",
    )


ROWS = (_row("gated_mlp", True), _row("gated_mlp_kn", False))
