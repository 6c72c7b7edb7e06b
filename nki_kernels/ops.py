"""The public operations on NumPy arrays. Each runs its NKI kernel, or raises with all reasons."""

from __future__ import annotations

from typing import Any

import numpy.typing as npt

from nki_kernels.operators.matmul import MATMUL, MatmulConfig


def matmul(
    a: npt.NDArray[Any],
    b: npt.NDArray[Any],
    *,
    out_dtype: Any = None,
    config: MatmulConfig | None = None,
    target: str | None = None,
) -> npt.NDArray[Any]:
    """Matrix product.

    c[m, n] = sum_k a[m, k] * b[k, n]

    Products are accumulated in float32 and rounded once, to nearest even, to the output dtype.

    Dimensions:
        M: rows of A and C, >= 1        N: columns of B and C, >= 1        K: contraction, >= 1

    Args:
        a: [M, K], dense row-major, bfloat16 | float16 | float32.
        b: [K, N], likewise, dtype of `a`.
        out_dtype: dtype of the result, one of the same three; None means the dtype of `a`.
        config: tuning of the kernel; None lets the operator choose. It never changes the result.
        target: hardware generation ("trn2", "trn3", ...). None reads
            NEURON_PLATFORM_TARGET_OVERRIDE and, when that is unset, means trn2.

    Returns:
        [M, N], a new array of dtype `out_dtype`.

    Raises:
        ShapeError: contraction sizes that differ, a rank other than 2, a zero size, a strided
            array.
        DtypeError: a dtype that is not supported (float64, integers), or two different ones.
        ConfigError: a `config` that cannot run on the target or with the dtype.
        ValueError: an unknown target; the message lists the known ones.

    Source: the kernel is `nki_kernels.kernels.matmul.kernel`.

    Example:
        >>> import numpy as np
        >>> matmul(np.ones((2, 3), np.float32), np.ones((3, 2), np.float32))
        array([[3., 3.],
               [3., 3.]], dtype=float32)
    """
    run = MATMUL.launch((a, b), {"out_dtype": out_dtype}, config=config, target=target)
    result: npt.NDArray[Any] = run.result
    return result
