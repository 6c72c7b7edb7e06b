"""The derivative of a formula, by PyTorch: for the gradients of gradients."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from nki_kernels.torch_ops.row import Calls, Grads, Tensors


def derivative(formula: Callable[..., Tensors]) -> Callable[..., Grads]:
    """Return the `Row.backward` of an op with this formula: plain PyTorch on every backend."""

    def backward(
        call: Calls, needs: tuple[bool, ...], grads: Tensors, *inputs: Tensor | None, **options: Any
    ) -> Grads:
        at = [i for i, x in enumerate(inputs) if x is not None and x.is_floating_point()]

        def function(*values: Tensor) -> Tensors:
            full = list(inputs)
            for i, value in zip(at, values, strict=True):
                full[i] = value
            return formula(*full, **options)

        pull = torch.func.vjp(function, *(inputs[i] for i in at))[1]
        found: dict[int, Tensor] = dict(zip(at, pull(tuple(grads)), strict=True))
        return tuple(found.get(i) if need else None for i, need in enumerate(needs))

    return backward
