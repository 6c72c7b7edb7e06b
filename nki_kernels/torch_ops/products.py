"""Formula, gradient and rows of the matrix products, each operand stored either way.

    C = A·B;  dA = dC·Bᵀ;  dB = Aᵀ·dC

A gradient is again one of the products, the one that takes A, B and dC as they are stored, so that
nothing is transposed on the way: a few letters (`_suffix`) say which.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from nki_kernels.operators import OPERATORS
from nki_kernels.torch_ops.row import Calls, Grads, Row, Tensors

#: BLAS's letters for how A and B are stored: t is transposed.
_LAYOUTS = ("nn", "nt", "tn", "tt")


def wide_type(*tensors: Tensor | None) -> torch.dtype:
    """Return the dtype to compute in: float32, or float64 if an input is."""
    dtype = torch.float32
    for x in tensors:
        if x is not None and x.dtype.itemsize > 1:
            dtype = torch.promote_types(dtype, x.dtype)
    return dtype


def _suffix(layout: str) -> str:
    return "" if layout == "nn" else f"_{layout}"


def _stored(x: Tensor, letter: str) -> Tensor:
    return x.mT if letter == "t" else x


def _product(layout: str, a: Tensor, b: Tensor, *, out_dtype: torch.dtype | None = None) -> Tensors:
    out = out_dtype or a.dtype
    multiply: Callable[[Tensor, Tensor], Tensor] = torch.mm if a.dim() == 2 else torch.bmm
    a, b = _stored(a, layout[0]), _stored(b, layout[1])
    # Mixed dtypes go to PyTorch as they are: it refuses them, as the kernel does.
    if out == a.dtype or a.dtype != b.dtype:
        return (multiply(a, b),)
    wide = torch.promote_types(a.dtype, out)
    return (multiply(a.to(wide), b.to(wide)).to(out),)


def _swapped(letter: str) -> str:
    return "n" if letter == "t" else "t"


def _gradient(
    name: str,
    layout: str,
    call: Calls,
    needs: tuple[bool, ...],
    grads: Tensors,
    a: Tensor,
    b: Tensor,
    *,
    out_dtype: torch.dtype | None = None,
) -> Grads:
    """dA = dC·Bᵀ, dB = Aᵀ·dC, each stored as its operand is, rounded once to its dtype.

    With an `out_dtype`, dC may be wider than A and B; they are widened to meet it.
    """
    wide = torch.promote_types(grads[0].dtype, a.dtype)
    dc = grads[0].to(wide)
    da = db = None
    if needs[0]:
        right = b.to(wide)
        if layout[0] == "n":
            da = call[name + _suffix("n" + _swapped(layout[1]))](dc, right, out_dtype=a.dtype)
        else:  # dAᵀ = B·dCᵀ
            da = call[name + _suffix(layout[1] + "t")](right, dc, out_dtype=a.dtype)
    if needs[1]:
        left = a.to(wide)
        if layout[1] == "n":
            db = call[name + _suffix(_swapped(layout[0]) + "n")](left, dc, out_dtype=b.dtype)
        else:  # dBᵀ = dCᵀ·A
            db = call[name + _suffix("t" + layout[0])](dc, left, out_dtype=b.dtype)
    return da, db


def _batched(
    layout: str, call: Calls, axes: tuple[bool, ...], a: Tensor, b: Tensor, **options: Any
) -> Tensors | None:
    """Fold the batch of a vmap: one product with more rows, or products side by side."""
    if axes == (True, False) and layout[0] == "n":
        flat = call(a.reshape(-1, a.shape[-1]), b, **options)
        return (flat.reshape(*a.shape[:2], -1),)
    size = a.shape[0] if axes[0] else b.shape[0]
    a, b = (x if batch else x.expand(size, *x.shape) for x, batch in zip((a, b), axes, strict=True))
    return (call["bmm" + _suffix(layout)](a, b, **options),)


_NOTES = ("out_dtype: dtype of the result; None means that of the inputs.",)


def _row(name: str, layout: str) -> Row:
    return Row(
        op=OPERATORS[name + _suffix(layout)],
        options="ScalarType? out_dtype=None",
        notes=_NOTES,
        plain=partial(_product, layout),
        backward=partial(_gradient, name, layout),
        autocast="low",
        vmap=partial(_batched, layout) if name == "matmul" else None,
    )


def _fp8(
    layout: str,
    a: Tensor,
    b: Tensor,
    *,
    scale: float = 1.0,
    out_dtype: torch.dtype | None = None,
) -> Tensors:
    if a.dtype != b.dtype:
        torch.mm(a, _stored(b, layout[1]))  # refused in PyTorch's words
    product = torch.mm(a.to(torch.float32), _stored(b, layout[1]).to(torch.float32))
    return ((product * scale).to(out_dtype or torch.bfloat16),)


def _fp8_row(layout: str) -> Row:
    return Row(
        op=OPERATORS["matmul_fp8" + _suffix(layout)],
        options="float scale=1.0, ScalarType? out_dtype=None",
        notes=(
            "scale: factor of the sum: the product of the scales of the operands.",
            "out_dtype: dtype of the result; None means bfloat16.",
        ),
        plain=partial(_fp8, layout),
    )


MATMUL = _row("matmul", "nn")

ROWS = (
    MATMUL,
    *(_row("matmul", layout) for layout in _LAYOUTS[1:]),
    *(_row("bmm", layout) for layout in _LAYOUTS),
    _fp8_row("nn"),
    _fp8_row("nt"),
)
