"""One row per op: what its contract does not say, because it is about PyTorch.

Names, ranks, dtypes, limits and output shapes come from `nki_kernels.operators`; `registration.py`
makes the custom op from the two. To add an op, add its row to `ROWS`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
from torch import Tensor

from nki_kernels.operators import OPERATORS
from nki_kernels.operators.contract import Operator
from nki_kernels.operators.norm import DEFAULT_EPS
from nki_kernels.torch_ops import linears, norms

Tensors: TypeAlias = tuple[Tensor, ...]
#: The inputs of a call, one per operand of the contract; None where an optional one is left out.
Inputs: TypeAlias = tuple[Tensor | None, ...]
Options: TypeAlias = Mapping[str, Any]
Grads: TypeAlias = tuple[Tensor | None, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """The PyTorch side of one operator.

    Attributes:
        op: the operator.
        options: the keyword-only options, in the language of `torch.library` schemas.
        notes: what a user must know of the options, for the docstring; one line each.
        plain: the formula in PyTorch: (*inputs, **options) -> outputs; also for zero-size inputs.
        backward: the gradient in closed form, made of ops that can be traced (ours or PyTorch's);
            None if the op has no gradient. (call, needs, grads, *inputs, **options) -> one gradient
            per input, None where `needs` is False. `call` is the op of `gradient`, on the backend
            of the forward pass; `grads` has one per output. Statistics are computed anew from the
            inputs.
        gradient: name of the op the gradient is made of; None means the op itself.
    """

    op: Operator
    options: str
    notes: tuple[str, ...]
    plain: Callable[..., Tensors]
    backward: Callable[..., Grads] | None = None
    gradient: str | None = None

    def complete(self, inputs: Inputs) -> Inputs:
        """Return one input per operand: PyTorch leaves optional ones off the end."""
        return inputs + (None,) * (len(self.op.inputs) - len(inputs))

    def present(self, inputs: Inputs) -> list[tuple[str, Tensor]]:
        """Return name and tensor of every input that is there."""
        pairs = zip(self.op.inputs, inputs, strict=True)
        return [(operand.name, value) for operand, value in pairs if value is not None]


def _matmul(a: Tensor, b: Tensor, *, out_dtype: torch.dtype | None = None) -> Tensors:
    out = out_dtype or a.dtype
    # Mixed dtypes go to torch.mm as they are: it refuses them, as the kernel does.
    if out == a.dtype or a.dtype != b.dtype:
        return (torch.mm(a, b),)
    wide = torch.promote_types(a.dtype, out)
    return (torch.mm(a.to(wide), b.to(wide)).to(out),)


def _matmul_backward(
    call: Callable[..., Tensor],
    needs: tuple[bool, ...],
    grads: Tensors,
    a: Tensor,
    b: Tensor,
    *,
    out_dtype: torch.dtype | None = None,
) -> Grads:
    """dA = dC·Bᵀ, dB = Aᵀ·dC, by the op itself; the transposes are copied when a kernel runs.

    With an `out_dtype`, dC may be wider than A and B; they are widened to meet it, and the
    gradient is rounded once, to the dtype of its input.
    """
    wide = torch.promote_types(grads[0].dtype, a.dtype)
    dc = grads[0].to(wide)
    da = call(dc, b.t().to(wide), out_dtype=a.dtype) if needs[0] else None
    db = call(a.t().to(wide), dc, out_dtype=b.dtype) if needs[1] else None
    return da, db


MATMUL = Row(
    op=OPERATORS["matmul"],
    options="ScalarType? out_dtype=None",
    notes=("out_dtype: dtype of the result; None means that of the inputs.",),
    plain=_matmul,
    backward=_matmul_backward,
)

LINEAR = Row(
    op=OPERATORS["linear"],
    options="ScalarType? out_dtype=None",
    notes=("out_dtype: dtype of the result; None means that of x.",),
    plain=linears.linear,
    backward=linears.linear_gradient,
    gradient="linear_backward",
)

LINEAR_BACKWARD = Row(
    op=OPERATORS["linear_backward"],
    options="ScalarType? out_dtype=None",
    notes=("out_dtype: dtype of the results; None means that of dy.",),
    plain=linears.linear_backward,
    backward=linears.linear_second,
)

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
)

LAYER_NORM = Row(
    op=OPERATORS["layer_norm"],
    options=_norm_options("layer_norm"),
    notes=_NORM_NOTES,
    plain=norms.layer_norm,
    backward=norms.layer_norm_gradient,
    gradient="layer_norm_backward",
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
        MATMUL,
        LINEAR,
        LINEAR_BACKWARD,
        RMS_NORM,
        LAYER_NORM,
        RMS_NORM_BACKWARD,
        LAYER_NORM_BACKWARD,
    )
}
