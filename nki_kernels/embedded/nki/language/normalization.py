"""Wrappers that combine a row's statistics with its elements: var, softmax, rms_norm."""

from __future__ import annotations

from typing import Any

from nki import isa
from nki.language.math import fresh, require_tile
from nki.language.reductions import reduce, spread_over

from nki_kernels.machine import dtypes
from nki_kernels.machine.errors import RuleViolation, ShapeError
from nki_kernels.machine.layout import is_int
from nki_kernels.machine.operators import OPS
from nki_kernels.machine.tensor import NkiTensor


def _combined(x: NkiTensor, stat: NkiTensor, op: str, dtype: Any, what: str) -> NkiTensor:
    """Return x op stat in a new tile; the reduced dimensions of `stat` are read with stride 0."""
    result = fresh(x, dtype, what)
    isa.tensor_tensor(dst=result, data1=x, data2=spread_over(stat, x), op=OPS[op])
    return result


def var(x: NkiTensor, axis: Any, dtype: Any = None, keepdims: bool = False) -> NkiTensor:
    """Return mean((x - mean(x))^2) over the last free axes, in float32, in two passes.

    The reduced axes always stay as axes of size 1: the documents say that `keepdims` is ignored.
    """
    what = "nl.var"
    require_tile(x, what)
    mean = reduce("add", x, axis, dtypes.float32, True, what)
    share = mean.size / x.size
    isa.tensor_scalar(dst=mean, data=mean, op0=OPS["multiply"], operand0=share)
    apart = _combined(x, mean, "subtract", dtypes.float32, what)
    isa.tensor_tensor(dst=apart, data1=apart, data2=apart, op=OPS["multiply"])
    total = reduce("add", apart, axis, dtypes.float32, True, what)
    result = fresh(total, dtype or x.dtype, what)
    isa.tensor_scalar(dst=result, data=total, op0=OPS["multiply"], operand0=share)
    return result


def softmax(x: NkiTensor, axis: Any = -1, dtype: Any = None) -> NkiTensor:
    """Return exp(x - max(x)) / sum(exp(x - max(x))) over the last free axes, in float32.

    The division is a product with the reciprocal. The result has x's shape; its dtype is `dtype`
    or x's.
    """
    what = "nl.softmax"
    require_tile(x, what)
    top = reduce("maximum", x, axis, dtypes.float32, True, what)
    powers = _combined(x, top, "subtract", dtypes.float32, what)
    isa.activation(dst=powers, op=OPS["exp"], data=powers)
    total = reduce("add", powers, axis, dtypes.float32, True, what)
    isa.reciprocal(dst=total, data=total)
    return _combined(powers, total, "multiply", dtype or x.dtype, what)


def rms_norm(
    x: NkiTensor,
    w: NkiTensor,
    axis: Any,
    n: int,
    epsilon: float = 1e-06,
    dtype: Any = None,
    compute_dtype: Any = None,
) -> NkiTensor:
    """Return x / sqrt(sum(x^2) / n + epsilon) * w over the last free axes.

    Args:
        x: a tile.
        w: weights of x's shape (no document says that they broadcast: use nl.broadcast_to).
        axis: the last free axes.
        n: how many values the mean square counts.
        epsilon: added to the mean square.
        dtype: of the result; x's by default.
        compute_dtype: of every intermediate tile; float32 by default (undocumented).

    Raises:
        ShapeError: w of another shape.
        RuleViolation: n below 1.
    """
    what = "nl.rms_norm"
    require_tile(x, what)
    require_tile(w, what, "w")
    if w.shape != x.shape:
        raise ShapeError(
            f"{what}: w {list(w.shape)} and x {list(x.shape)}; shapes must be equal: spread the "
            "weights with nl.broadcast_to"
        )
    if not is_int(n) or n < 1:
        raise RuleViolation(f"{what}: n={n!r}; it must be a positive int, the size of the axes")
    inner = compute_dtype or dtypes.float32
    squares = fresh(x, inner, what)
    isa.activation(dst=squares, op=OPS["square"], data=x)
    scale = reduce("add", squares, axis, inner, True, what)
    isa.tensor_scalar(
        dst=scale, data=scale, op0=OPS["multiply"], operand0=1.0 / n, op1=OPS["add"],
        operand1=epsilon,
    )  # fmt: skip
    isa.activation(dst=scale, op=OPS["rsqrt"], data=scale)
    scaled = _combined(x, scale, "multiply", inner, what)
    result = fresh(x, dtype, what)
    isa.tensor_tensor(dst=result, data1=scaled, data2=w, op=OPS["multiply"])
    return result
