"""Reference of `matmul`."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt


class Reference(NamedTuple):
    """The exact result and, per element, the sum of the absolute values of its terms."""

    value: npt.NDArray[np.float64]
    magnitude: npt.NDArray[np.float64]


def matmul(
    a: npt.NDArray[Any],
    b: npt.NDArray[Any],
    *,
    transpose_a: bool = False,
    transpose_b: bool = False,
) -> Reference:
    """Multiply two matrices, or two batches of them, in float64.

    c[m, n] = sum_k a[m, k] * b[k, n];  magnitude[m, n] = sum_k |a[m, k] * b[k, n]|

    Args:
        a: [M, K], any float or integer dtype exact in float64.
        b: [K, N], likewise; with a batch, both have it in front.
        transpose_a: a is [K, M].
        transpose_b: b is [N, K].

    Returns:
        value [M, N] and magnitude [M, N], both float64.
    """
    a64 = np.asarray(a, dtype=np.float64)
    b64 = np.asarray(b, dtype=np.float64)
    a64 = a64.swapaxes(-1, -2) if transpose_a else a64
    b64 = b64.swapaxes(-1, -2) if transpose_b else b64
    return Reference(a64 @ b64, np.abs(a64) @ np.abs(b64))
