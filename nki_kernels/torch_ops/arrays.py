"""Tensors as the kernels see them, and back. No value is copied on the way in.

| PyTorch | kernel |
|---|---|
| bool, where the contract has uint8 (a mask) | uint8 |
| float8_e4m3fn, where the contract has float8_e4m3 | the same bits: they agree up to 240 |
| every other dtype | the same |
"""

from __future__ import annotations

from typing import Any

import ml_dtypes
import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from nki_kernels.machine.dtypes import as_dtype
from nki_kernels.machine.tensor import Abstract
from nki_kernels.operators.contract import Operand
from nki_kernels.torch_ops.row import Inputs, Row

#: The kernel's 8-bit float that has the bits of PyTorch's, and no number beyond 240.
E4M3 = "float8_e4m3"
#: The bits, without the sign, of 240, the largest number of float8_e4m3; and of NaN in both types.
_MOST, _NAN = 0x77, 0x7F

#: dtypes that NumPy has not: PyTorch's type of the same bits, and ml_dtypes'.
_EXTENDED: dict[torch.dtype, tuple[torch.dtype, Any]] = {
    torch.bfloat16: (torch.int16, ml_dtypes.bfloat16),
    torch.float8_e4m3fn: (torch.uint8, ml_dtypes.float8_e4m3fn),
    torch.float8_e5m2: (torch.uint8, ml_dtypes.float8_e5m2),
}
#: NumPy's type of PyTorch's, for the same bits.
E4M3_OF_TORCH = np.dtype(ml_dtypes.float8_e4m3fn)
_FROM_EXTENDED = {np.dtype(host): (bits, dtype) for dtype, (bits, host) in _EXTENDED.items()}


def takes_e4m3(row: Row, operand: Operand) -> bool:
    """Tell whether an operand is float8_e4m3, which PyTorch has under float8_e4m3fn's bits."""
    return E4M3 in ((operand.dtype,) if operand.dtype else row.op.dtypes)


def as_seen(row: Row, inputs: Inputs) -> list[Any]:
    """Return the inputs with the dtypes a kernel sees; values are not read."""
    return [
        value if value is None else _seen(row, operand, value)
        for operand, value in zip(row.op.inputs, inputs, strict=True)
    ]


def kernel_dtype(row: Row, inputs: Inputs) -> str:
    """Return the dtype that the operands without one of their own share, as a kernel sees it."""
    return as_dtype(row.present(as_seen(row, inputs))[0][1].dtype)


def _seen(row: Row, operand: Operand, value: Tensor) -> Any:
    if value.dtype == torch.bool and operand.dtype == "uint8":
        return value.view(torch.uint8)
    if value.dtype == torch.float8_e4m3fn and takes_e4m3(row, operand):
        return Abstract(tuple(value.shape), E4M3)
    return value


def as_arrays(row: Row, inputs: Inputs) -> list[npt.NDArray[Any] | None]:
    """Return dense CPU tensors as the NumPy arrays a kernel takes, on the same memory."""
    return [
        None if value is None else _array(row, operand, value)
        for operand, value in zip(row.op.inputs, inputs, strict=True)
    ]


def _array(row: Row, operand: Operand, value: Tensor) -> npt.NDArray[Any]:
    array = to_array(value)
    if value.dtype == torch.bool and operand.dtype == "uint8":
        return array.view(np.uint8)
    if value.dtype == torch.float8_e4m3fn and takes_e4m3(row, operand):
        return array.view(ml_dtypes.float8_e4m3)
    return array


def too_large(row: Row, inputs: Inputs) -> list[str]:
    """Return which float8_e4m3fn inputs have numbers that the kernels' float8_e4m3 has not."""
    found = []
    for operand, value in zip(row.op.inputs, inputs, strict=True):
        if value is None or value.dtype != torch.float8_e4m3fn or not takes_e4m3(row, operand):
            continue
        bits = to_array(value).view(np.uint8) & 0x7F
        beyond = (bits > _MOST) & (bits != _NAN)
        if beyond.any():
            worst = float(to_array(value)[beyond].astype(np.float32).flat[0])
            found.append(
                f"{operand.name} has {worst:g}; the hardware's float8_e4m3 ends at 240; scale the "
                "values into -240 .. 240 before they become float8_e4m3fn"
            )
    return found


def to_array(value: Tensor) -> npt.NDArray[Any]:
    """Return a CPU tensor as a NumPy array on the same memory."""
    value = value.detach()
    extended = _EXTENDED.get(value.dtype)
    if extended is None:
        plain: npt.NDArray[Any] = value.numpy()
        return plain
    bits, host = extended
    array: npt.NDArray[Any] = value.view(bits).numpy().view(host)
    return array


def to_tensor(array: npt.NDArray[Any]) -> Tensor:
    """Return a NumPy array as a CPU tensor on the same memory."""
    extended = _FROM_EXTENDED.get(array.dtype)
    if extended is None:
        return torch.from_numpy(array)
    bits, dtype = extended
    host = np.int16 if bits == torch.int16 else np.uint8
    return torch.from_numpy(array.view(host)).view(dtype)
