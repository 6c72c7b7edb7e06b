"""What `torch.autocast` does to an op's inputs.

Products, attention and MLPs compute in autocast's dtype, as PyTorch's own do. Norms, rotations and
the rest, whose sums are float32 in any case, take their operands in the widest dtype among them.
Operands with a dtype of their own (statistics, indices, masks), float64 and fp8 stay as they are.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from nki_kernels.torch_ops.row import Inputs, Row

#: Device types with their dispatch keys; a NeuronCore is PrivateUse1.
_KEYS = {"cpu": "AutocastCPU", "privateuseone": "AutocastPrivateUse1"}
_CAST = (torch.bfloat16, torch.float16, torch.float32)


def register(row: Row) -> None:
    """Give the op of a row its rules for autocast."""
    for device, key in _KEYS.items():
        torch.library.impl(f"nki_kernels::{row.op.name}", key)(_rule(row, device))


def _rule(row: Row, device: str) -> Callable[..., Any]:
    def autocast(*inputs: Tensor | None, **options: Any) -> Any:
        op = getattr(torch.ops.nki_kernels, row.op.name)
        if device != "cpu":  # under its own name, which PrivateUse1 has only when TorchNeuron runs
            device_type = row.present(row.complete(inputs))[0][1].device.type
        else:
            device_type = device
        low = torch.get_autocast_dtype(device_type)
        with torch.autocast(device_type, enabled=False):
            return op(*_cast(row, row.complete(inputs), low), **options)

    return autocast


def _cast(row: Row, inputs: Inputs, low: torch.dtype) -> Inputs:
    shared = [
        value is not None and operand.dtype is None and value.dtype in _CAST
        for operand, value in zip(row.op.inputs, inputs, strict=True)
    ]
    dtype = low
    if row.autocast == "widest":
        given = [x.dtype for x, cast in zip(inputs, shared, strict=True) if cast and x is not None]
        dtype = given[0] if given else low
        for other in given:
            dtype = torch.promote_types(dtype, other)
    return tuple(
        x.to(dtype) if cast and x is not None else x for x, cast in zip(inputs, shared, strict=True)
    )
