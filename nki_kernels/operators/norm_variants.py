"""The norms as models use them: with the residual added on the way, and cast as theirs are cast.

`add_rms_norm`, `add_layer_norm`, `rms_norm_llama` and `rms_norm_gemma`: contracts and calls.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import numpy.typing as npt

from nki_kernels.hardware.spec import CoreSpec
from nki_kernels.kernels.norm import (
    LayerNormConfig,
    RmsNormConfig,
    rms_norm_cast,
)
from nki_kernels.kernels.norm import (
    add_layer_norm as add_layer_norm_kernel,
)
from nki_kernels.kernels.norm import (
    add_rms_norm as add_rms_norm_kernel,
)
from nki_kernels.operators import norm
from nki_kernels.operators.contract import Axes, Operand, Operator, Options

Array = npt.NDArray[Any]

_RESIDUAL = Operand("residual", ("N", "H"))
_TOTAL = Operand("total", ("N", "H"))
_WEIGHT = Operand("weight", ("H",))
#: The weight in float32 beside itself.
_WIDENED = norm.Extra(shared=4)


def _plus_one(flops: Callable[[Axes], int], axes: Axes) -> int:
    return flops(axes) + axes["N"] * axes["H"]


def _limits(
    limits: Callable[..., tuple[str, ...]],
    extra: norm.Extra,
    axes: Axes,
    dtype: str,
    spec: CoreSpec,
) -> tuple[str, ...]:
    return limits(axes, dtype, spec, extra)


def _configure(
    configure: Callable[..., Any], extra: norm.Extra, axes: Axes, dtype: str, spec: CoreSpec
) -> Any:
    return configure(axes, dtype, spec, extra)


def _arguments(
    base: str, more: tuple[Any, ...], inputs: Sequence[Any], options: Options, config: Any
) -> tuple[Any, ...]:
    eps = norm.eps_of(base, options)
    return *inputs, eps, norm.out_dtype_of(inputs, options), *more, config


def _added(base: Operator, kernel: Any, configure: Any, limits: Any) -> Operator:
    return replace(
        base,
        name=f"add_{base.name}",
        summary=f"total = x + residual; y = {base.name}(total)",
        inputs=(norm.X, _RESIDUAL, *base.inputs[1:]),
        outputs=(_TOTAL, *norm.Y),
        flops=partial(_plus_one, base.flops),
        configure=partial(_configure, configure, norm.ADDED),
        kernel=kernel,
        arguments=partial(_arguments, base.name, ()),
        limits=partial(_limits, limits, norm.ADDED),
    )


def _cast(cast: str, summary: str, roundings: int, extra: norm.Extra) -> Operator:
    return replace(
        norm.RMS_NORM,
        name=f"rms_norm_{cast}",
        summary=summary,
        inputs=(norm.X, _WEIGHT),
        roundings=roundings,
        configure=partial(_configure, norm.rms_configure, extra),
        kernel=rms_norm_cast,
        arguments=partial(_arguments, "rms_norm", (cast,)),
        limits=partial(_limits, norm.rms_limits, extra),
    )


ADD_RMS_NORM = _added(norm.RMS_NORM, add_rms_norm_kernel, norm.rms_configure, norm.rms_limits)
ADD_LAYER_NORM = _added(
    norm.LAYER_NORM, add_layer_norm_kernel, norm.layer_configure, norm.layer_limits
)
RMS_NORM_LLAMA = _cast("llama", "y = round(x / rms) * weight, rounded twice", 2, norm.PLAIN)
RMS_NORM_GEMMA = _cast("gemma", "y = x / rms * (1 + weight), rounded once", 1, _WIDENED)

#: The operators of this file.
NORM_VARIANTS = (ADD_RMS_NORM, ADD_LAYER_NORM, RMS_NORM_LLAMA, RMS_NORM_GEMMA)


def add_rms_norm(
    x: Array,
    residual: Array,
    weight: Array | None = None,
    *,
    eps: float = norm.DEFAULT_EPS["rms_norm"],
    config: RmsNormConfig | None = None,
    target: str | None = None,
) -> tuple[Array, Array]:
    """Add a residual and normalise each row of the sum by its root mean square.

    total = x + residual, rounded to the dtype of x;  y = rms_norm(total, weight, eps=eps)

    To the last bit what the two steps give one after the other, without loading the sum again.

    Args:
        x: [N, H], dense row-major, bfloat16 | float16 | float32.
        residual: [N, H], dtype of x.
        weight: [H], dtype of x, or None for ones.
        eps: added to the mean square, >= 0.
        config: tuning of the kernel; None lets the operator choose. It never changes the
            mathematics.
        target: hardware generation; None means the one in force, as for `rms_norm`.

    Returns:
        total [N, H] and y [N, H], new arrays of the dtype of x.

    Raises:
        ShapeError, DtypeError, OptionError, ConfigError: as `rms_norm` does.

    Source: the kernel is `nki_kernels.kernels.norm.add_rms_norm`.

    Example:
        >>> import numpy as np
        >>> x = np.array([[1, -1]], np.float32)
        >>> add_rms_norm(x, x, eps=0.0)
        (array([[ 2., -2.]], dtype=float32), array([[ 1., -1.]], dtype=float32))
    """
    run = ADD_RMS_NORM.launch((x, residual, weight), {"eps": eps}, config=config, target=target)
    total, y = run.result
    return total, y


def add_layer_norm(
    x: Array,
    residual: Array,
    weight: Array | None = None,
    bias: Array | None = None,
    *,
    eps: float = norm.DEFAULT_EPS["layer_norm"],
    config: LayerNormConfig | None = None,
    target: str | None = None,
) -> tuple[Array, Array]:
    """Add a residual and normalise each row of the sum to mean 0 and variance 1.

    total = x + residual, rounded to the dtype of x;  y = layer_norm(total, weight, bias, eps=eps)

    Args:
        x: [N, H], dense row-major, bfloat16 | float16 | float32.
        residual: [N, H], dtype of x.
        weight: [H], dtype of x, or None for ones.
        bias: [H], dtype of x, or None for zeros.
        eps: added to the variance, >= 0.
        config: tuning of the kernel; None lets the operator choose. It never changes the
            mathematics.
        target: hardware generation; None means the one in force, as for `layer_norm`.

    Returns:
        total [N, H] and y [N, H], new arrays of the dtype of x.

    Raises:
        ShapeError, DtypeError, OptionError, ConfigError: as `layer_norm` does.

    Source: the kernel is `nki_kernels.kernels.norm.add_layer_norm`.

    Example:
        >>> import numpy as np
        >>> x = np.array([[3, 1]], np.float32)
        >>> add_layer_norm(x, x, eps=0.0)
        (array([[6., 2.]], dtype=float32), array([[ 1., -1.]], dtype=float32))
    """
    inputs = (x, residual, weight, bias)
    run = ADD_LAYER_NORM.launch(inputs, {"eps": eps}, config=config, target=target)
    total, y = run.result
    return total, y


def rms_norm_llama(
    x: Array,
    weight: Array,
    *,
    eps: float = norm.DEFAULT_EPS["rms_norm"],
    config: RmsNormConfig | None = None,
    target: str | None = None,
) -> Array:
    """Normalise each row as Llama's module does: rounded before the weight, and after it.

    y[n, h] = round(x[n, h] / sqrt(mean_h(x[n, :]^2) + eps)) * weight[h]

    Args:
        x: [N, H], dense row-major, bfloat16 | float16 | float32.
        weight: [H], dtype of x.
        eps: added to the mean square, >= 0.
        config: tuning of the kernel; None lets the operator choose. It never changes the
            mathematics.
        target: hardware generation; None means the one in force, as for `rms_norm`.

    Returns:
        [N, H], a new array of the dtype of x.

    Raises:
        ShapeError, DtypeError, OptionError, ConfigError: as `rms_norm` does.

    Source: the kernel is `nki_kernels.kernels.norm.rms_norm_cast`; LlamaRMSNorm of transformers.

    Example:
        >>> import numpy as np
        >>> rms_norm_llama(np.array([[1, -1]], np.float32), np.full(2, 3, np.float32), eps=0.0)
        array([[ 3., -3.]], dtype=float32)
    """
    run = RMS_NORM_LLAMA.launch((x, weight), {"eps": eps}, config=config, target=target)
    result: Array = run.result
    return result


def rms_norm_gemma(
    x: Array,
    weight: Array,
    *,
    eps: float = norm.DEFAULT_EPS["rms_norm"],
    config: RmsNormConfig | None = None,
    target: str | None = None,
) -> Array:
    """Normalise each row as Gemma's module does: times 1 + weight in float32, rounded once.

    y[n, h] = x[n, h] / sqrt(mean_h(x[n, :]^2) + eps) * (1 + weight[h])

    Args:
        x: [N, H], dense row-major, bfloat16 | float16 | float32.
        weight: [H], dtype of x.
        eps: added to the mean square, >= 0.
        config: tuning of the kernel; None lets the operator choose. It never changes the
            mathematics.
        target: hardware generation; None means the one in force, as for `rms_norm`.

    Returns:
        [N, H], a new array of the dtype of x.

    Raises:
        ShapeError, DtypeError, OptionError, ConfigError: as `rms_norm` does.

    Source: the kernel is `nki_kernels.kernels.norm.rms_norm_cast`; Gemma2RMSNorm of transformers.

    Example:
        >>> import numpy as np
        >>> rms_norm_gemma(np.array([[1, -1]], np.float32), np.full(2, 3, np.float32), eps=0.0)
        array([[ 4., -4.]], dtype=float32)
    """
    run = RMS_NORM_GEMMA.launch((x, weight), {"eps": eps}, config=config, target=target)
    result: Array = run.result
    return result
