"""One row per op: what its contract does not say, because it is about PyTorch.

Names, ranks, dtypes, limits and output shapes come from `nki_kernels.operators`; `registration.py`
makes the custom op from the two. To add an op, add its row to `ROWS`.
"""

from __future__ import annotations

from nki_kernels.operators import OPERATORS
from nki_kernels.operators.norm import DEFAULT_EPS
from nki_kernels.torch_ops import (
    attentions,
    caches,
    experts,
    linears,
    mixtures,
    mlps,
    norm_variants,
    norms,
    products,
    projections,
    ropes,
)
from nki_kernels.torch_ops.row import Row

__all__ = ["ROWS"]

_NORM_NOTES = (
    "eps: added to the mean square or the variance.",
    "out_dtype: dtype of the result; None means that of x.",
)

_NORM_GRADIENT_NOTES = (
    "eps: added to the mean square or the variance.",
    "out_dtype: dtype of the results; None means that of dy.",
)


def _norm_options(name: str) -> str:
    return f"float eps={DEFAULT_EPS[name]}, ScalarType? out_dtype=None"


RMS_NORM = Row(
    op=OPERATORS["rms_norm"],
    options=_norm_options("rms_norm"),
    notes=_NORM_NOTES,
    plain=norms.rms_norm,
    backward=norms.rms_norm_gradient,
    gradient="rms_norm_backward",
    vmap=norms.batched,
)

LAYER_NORM = Row(
    op=OPERATORS["layer_norm"],
    options=_norm_options("layer_norm"),
    notes=_NORM_NOTES,
    plain=norms.layer_norm,
    backward=norms.layer_norm_gradient,
    gradient="layer_norm_backward",
    vmap=norms.batched,
)

RMS_NORM_BACKWARD = Row(
    op=OPERATORS["rms_norm_backward"],
    options=_norm_options("rms_norm"),
    notes=_NORM_GRADIENT_NOTES,
    plain=norms.rms_norm_backward,
    backward=norms.rms_norm_second,
)

LAYER_NORM_BACKWARD = Row(
    op=OPERATORS["layer_norm_backward"],
    options=_norm_options("layer_norm"),
    notes=_NORM_GRADIENT_NOTES,
    plain=norms.layer_norm_backward,
    backward=norms.layer_norm_second,
)

#: Every op by name.
ROWS: dict[str, Row] = {
    row.op.name: row
    for row in (
        *products.ROWS,
        *linears.ROWS,
        *mlps.ROWS,
        *projections.ROWS,
        RMS_NORM,
        LAYER_NORM,
        RMS_NORM_BACKWARD,
        LAYER_NORM_BACKWARD,
        *norm_variants.ROWS,
        *attentions.ROWS,
        *caches.ROWS,
        *ropes.ROWS,
        *experts.ROWS,
        *mixtures.ROWS,
    )
}
