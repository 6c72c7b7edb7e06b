"""shared_constant: data that is part of the program."""

from __future__ import annotations

import os
from typing import Any

import numpy as np
from nki.language.tensors import shared_hbm

from nki_kernels.machine.core import current
from nki_kernels.machine.dtypes import Array, as_dtype
from nki_kernels.machine.errors import DtypeError, KernelError, RuleViolation
from nki_kernels.machine.tensor import NkiTensor

_TYPES = (
    "float32", "float16", "bfloat16", "int32", "int16", "int8", "uint32", "uint16", "uint8",
    "float8_e4m3fn", "float8_e5m2", "float8_e8m0fnu",
)  # fmt: skip


def shared_constant(constant: Any) -> NkiTensor:
    """Return a tensor in shared HBM that holds a NumPy array or the content of an ``.npy`` file.

    It takes part in the program, not in its run: no instruction and no time, as the device loads
    it with the program. Under LNC2 both cores get one tensor and must pass equal data.

    Args:
        constant: an array of float32, float16, bfloat16, (u)int32, (u)int16, (u)int8,
            float8_e4m3fn, float8_e5m2 or float8_e8m0fnu, or the path of a file that holds one.

    Raises:
        RuleViolation: neither an array nor the path of a readable file.
        DtypeError: another dtype.
        KernelError: the cores of an LNC2 launch pass different data.
    """
    run = current("nl.shared_constant")
    array = _array(constant)
    kind = as_dtype(array.dtype)
    if str(kind) not in _TYPES:
        raise DtypeError(
            f"nl.shared_constant: dtype {kind}; allowed are {', '.join(_TYPES)}: convert the array"
        )
    result = run.allocate(array.shape, kind, shared_hbm)
    mem = result.mem
    target = mem.array(result.region, kind.host)
    wanted = array.astype(target.dtype, copy=False)
    if mem.full and not np.array_equal(_bits(target), _bits(wanted)):
        raise KernelError(
            f"nl.shared_constant: core {run.core} passes other data for {result!r} than core 0; "
            "both cores share one constant: index it with nl.program_id instead"
        )
    np.copyto(target, wanted)
    mem.fill()
    return result


def _array(constant: Any) -> Array:
    if isinstance(constant, (str, os.PathLike)):
        try:
            constant = np.load(constant)
        except (OSError, ValueError) as error:
            raise RuleViolation(
                f"nl.shared_constant: {os.fspath(constant)!r} cannot be read ({error}); it must be "
                "the path of an .npy file"
            ) from None
    if not isinstance(constant, np.ndarray):
        raise RuleViolation(
            f"nl.shared_constant: constant is {type(constant).__name__}; it must be a NumPy array "
            "or the path of an .npy file"
        )
    return constant


def _bits(array: Array) -> Array:
    return np.ascontiguousarray(array).reshape(-1).view(np.uint8)
