"""The gradients of a linear layer y = x·weightᵀ + bias, one after the other in one kernel.

dx = dy·weight streams dy transposed; the sums over its rows, which are dbias, ride along on Vector,
idle but for evictions: 1.1 us for a slice that PE takes 1.7 us for. dweight = dyᵀ·x needs no
transpose at all. PE limits both.
"""

from __future__ import annotations

from dataclasses import dataclass

import nki
import nki.language as nl

from nki_kernels.kernels.matmul.epilogue import Epilogue
from nki_kernels.kernels.matmul.kernel import (
    Layout,
    MatmulConfig,
    product,
    product_in_passes,
)


@dataclass(frozen=True)
class LinearBackwardConfig(nl.NKIObject):
    """Tuning of the two products. No field changes dx or dweight; `dx` orders the sums of dbias.

    Attributes:
        dx: of dy·weight.
        dweight: of dyᵀ·x.
    """

    dx: MatmulConfig
    dweight: MatmulConfig


@nki.jit
def linear_backward(dy, x, weight, out_dtype, config):
    """Gradients of a linear layer, accumulated in float32, each rounded once.

    Dimensions:
        M: rows of dy and x; N: columns of dy; K: columns of x. Any size >= 1.

    Args:
        dy: [M, N] HBM, bfloat16 | float16 | float32.
        x: [M, K] HBM, dtype of dy.
        weight: [N, K] HBM, dtype of dy.
        out_dtype: dtype of the results.
        config: LinearBackwardConfig.

    Returns:
        dx [M, K] = dy·weight; dweight [N, K] = dyᵀ·x; dbias [N] = sum over the rows of dy.
    Data flow: that of the matmul kernel, twice; dbias HBM -> SBUF (transposed) -> Vector -> HBM.
    """
    dx = nl.ndarray((dy.shape[0], x.shape[1]), dtype=out_dtype, buffer=nl.shared_hbm)
    dweight = nl.ndarray((dy.shape[1], x.shape[1]), dtype=out_dtype, buffer=nl.shared_hbm)
    dbias = nl.ndarray((dy.shape[1],), dtype=out_dtype, buffer=nl.shared_hbm)
    plain = Epilogue(out_dtype)
    first = {"a": dy, "b": weight, "bias": None, "residual": None}
    product(dx, first, Layout(), plain, config.dx, sums=dbias)
    second = {"a": dy, "b": x, "bias": None, "residual": None}
    product_in_passes(dweight, second, Layout(transpose_a=True), plain, config.dweight)
    return dx, dweight, dbias
