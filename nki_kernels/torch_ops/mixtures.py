"""Formula, gradient and row of `experts`, a mixture of experts after its router, in one kernel.

    y[t] = sum_k scores[t, k] * (hidden·down[e] + down_bias[e]), e = indices[t, k]

Its gradient is PyTorch's derivative of the formula, on every backend and not counted. It applies
every expert to every token: right for tests and small models. To train with kernels, use
`dispatch`, `grouped_matmul` and `combine`, whose gradients are theirs.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor

from nki_kernels.operators import OPERATORS
from nki_kernels.torch_ops.derivative import derivative
from nki_kernels.torch_ops.linears import ACTIVATIONS
from nki_kernels.torch_ops.products import wide_type
from nki_kernels.torch_ops.row import Row, Tensors


def _hidden(z: Tensor, inner: int, options: dict[str, Any]) -> Tensor:
    """Return f(g, u) of the columns of gate and up."""
    activation, limit = ACTIVATIONS[options["activation"]], options["limit"]
    if z.shape[1] == inner:
        return activation(z)
    if options["interleaved"]:
        gate, up = z[:, ::2], z[:, 1::2]
    else:
        gate, up = z[:, :inner], z[:, inner:]
    if limit is None:
        return activation(gate) * up
    gate, up = gate.clamp(max=limit), up.clamp(-limit, limit)
    return gate * torch.sigmoid(options["alpha"] * gate) * (up + 1)


def _experts(
    every: bool,
    x: Tensor,
    indices: Tensor,
    scores: Tensor,
    up: Tensor,
    down: Tensor,
    up_bias: Tensor | None = None,
    down_bias: Tensor | None = None,
    *,
    activation: str = "silu",
    interleaved: bool = False,
    limit: float | None = None,
    alpha: float = 1.702,
    out_dtype: torch.dtype | None = None,
) -> Tensors:
    """Apply each expert to the tokens that chose it; to every token, weighted by 0, if `every`."""
    if x.dtype != up.dtype:
        torch.mm(x, up[0])  # refused in PyTorch's words
    options = {
        "activation": activation, "interleaved": interleaved, "limit": limit, "alpha": alpha,
    }  # fmt: skip
    wide = wide_type(x)
    y = x.new_zeros((x.shape[0], down.shape[2]), dtype=wide)
    for expert in range(up.shape[0]):
        weight = ((indices == expert) * scores.to(wide)).sum(1, keepdim=True)
        tokens: Any = slice(None)
        if not every and not x.is_meta:
            tokens = (indices == expert).any(1)
            if not tokens.any():
                continue
        z = torch.mm(x[tokens].to(wide), up[expert].to(wide))
        z = z if up_bias is None else z + up_bias[expert].to(wide)
        hidden = _hidden(z, down.shape[1], options).to(x.dtype)
        row = torch.mm(hidden.to(wide), down[expert].to(wide))
        row = row if down_bias is None else row + down_bias[expert].to(wide)
        if every:
            y = y + weight * row
        else:
            y[tokens] += weight[tokens] * row
    return (y.to(out_dtype or x.dtype),)


ROWS = (
    Row(
        op=OPERATORS["experts"],
        options=(
            "str activation='silu', bool interleaved=False, float? limit=None, float alpha=1.702, "
            "ScalarType? out_dtype=None"
        ),
        notes=("the options are those of `nki_kernels.ops.experts`.",),
        plain=partial(_experts, False),
        backward=derivative(partial(_experts, True)),
        autocast="low",
    ),
)
