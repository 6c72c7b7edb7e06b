"""Reference of `matmul_mx`: a product of operands quantized to MXFP8."""

from __future__ import annotations

from typing import Any

import ml_dtypes
import numpy as np
import numpy.typing as npt

from reference.matmul import Reference, matmul

#: Element types: NumPy's, and the largest exponent.
KINDS: dict[str, tuple[Any, int]] = {
    "e4m3": (ml_dtypes.float8_e4m3fn, 8),
    "e5m2": (ml_dtypes.float8_e5m2, 15),
}

#: k of a slab, quarters of one, and neighbours of each quarter in a block.
_SLAB, _QUARTERS, _NEIGHBOURS = 512, 4, 8


def quantized(x: npt.NDArray[Any], kind: str) -> npt.NDArray[np.float64]:
    """Return x [.., K] as MXFP8 holds it, in float64.

    k runs in slabs of 512 (the last may be shorter); a block is 8 neighbours from each quarter of a
    slab, 32 values. With X = 2^(floor(log2(max|block|)) + 1 - Emax), at least 2^-127, each value is
    X * round(value / X), rounded to nearest even; a block with an infinity or NaN is NaN.
    """
    host, emax = KINDS[kind]
    values = np.asarray(x, np.float64)
    parts = []
    for start in range(0, values.shape[-1], _SLAB):
        slab = values[..., start : start + _SLAB]
        blocks = slab.reshape(*slab.shape[:-1], _QUARTERS, -1, _NEIGHBOURS)
        most = np.abs(blocks).max(axis=(-3, -1), keepdims=True)
        finite = np.isfinite(most)
        exponent = np.frexp(np.where(finite & (most > 0), most, 1.0))[1] - 1
        power = np.where(most > 0, np.maximum(exponent + 1 - emax, -127), -127)
        scaled = np.ldexp(np.where(finite, blocks, 0.0), -power).astype(np.float32)
        rounded = np.ldexp(scaled.astype(host).astype(np.float64), power)
        parts.append(np.where(finite, rounded, np.nan).reshape(slab.shape))
    return np.concatenate(parts, axis=-1)


def matmul_mx(
    a: npt.NDArray[Any], b: npt.NDArray[Any], *, transpose_b: bool = False, kind: str = "e4m3"
) -> Reference:
    """c[m, n] = sum_k q(a)[m, k] * q(b)[k, n], q = `quantized`; magnitude = sum of |terms|.

    Args:
        a: [M, K], K a multiple of 32.
        b: [K, N], or [N, K] with transpose_b.
        transpose_b: how b is stored.
        kind: "e4m3" or "e5m2".

    Returns:
        value [M, N] and magnitude [M, N], both float64.
    """
    columns = b if transpose_b else np.swapaxes(np.asarray(b), 0, 1)
    return matmul(quantized(a, kind), quantized(columns, kind), transpose_b=True)
