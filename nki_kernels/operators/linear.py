"""Linear layers: a product with its epilogue in the same pass, and its gradients in one launch.

`linear` takes the weight as PyTorch stores it, [N, K]; `linear_kn` takes [K, N], which streams
faster when few rows leave nothing but the weights to wait for (see kernels/matmul/kernel.py).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import partial
from typing import Any

from nki_kernels.hardware.spec import CoreSpec
from nki_kernels.kernels.matmul.epilogue import Epilogue
from nki_kernels.kernels.matmul.kernel import Layout, MatmulConfig, matmul
from nki_kernels.kernels.matmul.linear_backward import LinearBackwardConfig, linear_backward
from nki_kernels.machine.dtypes import as_dtype
from nki_kernels.operators import matmul as products
from nki_kernels.operators.contract import Axes, Operand, Operator, Options

__all__ = ["ACTIVATIONS", "LINEAR", "LINEAR_BACKWARD", "LINEAR_KN", "LinearBackwardConfig"]

#: Activations an epilogue knows; "gelu" is the exact one.
ACTIVATIONS = ("relu", "gelu", "gelu_tanh", "silu")

#: float32 roundings of an epilogue: the scale itself, its product, bias, residual, and those
#: inside an activation, each at most a unit of its argument (gelu's cube, tanh and products: 12).
EPILOGUE_ROUNDINGS = 16

#: Slices run tile by tile at the end of a wave: an eviction in two passes of Vector takes 1.3 us,
#: 6 slices, or the next wave waits for its first bank (4096^3 with bias and residual: 1992 us with
#: a tail of 2, 1786 with 8; without an epilogue 1784).
_TAIL = 8

_DTYPES = ("bfloat16", "float16", "float32")


def epilogue_problems(options: Options) -> tuple[str, ...]:
    """Return why activation or scale is wrong, in words."""
    reasons = []
    activation, scale = options.get("activation"), options.get("scale", 1.0)
    if activation is not None and activation not in ACTIVATIONS:
        reasons.append(
            f"activation is {activation!r}; allowed are None, {', '.join(ACTIVATIONS)}; choose one"
        )
    is_number = isinstance(scale, int | float) and not isinstance(scale, bool)
    if not (is_number and _fits_float32(float(scale))):
        reasons.append(
            f"scale is {scale!r}; a number that float32 holds is needed, 0 or from 1.2e-38 to "
            "3.4e38 in size; scale the inputs instead"
        )
    return tuple(reasons)


def _fits_float32(value: float) -> bool:
    return value == 0 or 2.0**-126 <= abs(value) < 2.0**128 * (1 - 2.0**-25)


def epilogue_of(options: Options, dtype: Any) -> Epilogue:
    """Return the kernel's epilogue; `dtype` is that of the result unless `out_dtype` says so."""
    return Epilogue(
        out_dtype=str(as_dtype(options.get("out_dtype") or dtype)),
        activation=options.get("activation"),
        scale=float(options.get("scale", 1.0)),
    )


def _chain(axes: Axes, spec: CoreSpec) -> int:
    return products.chain(axes, spec) + EPILOGUE_ROUNDINGS


def _arguments(
    layout: Layout, inputs: Sequence[Any], options: Options, config: MatmulConfig
) -> tuple[Any, ...]:
    x, weight, bias, residual = inputs
    return x, weight, bias, residual, layout, epilogue_of(options, x.dtype), config


def _operator(name: str, transpose_b: bool) -> Operator:
    layout = Layout(transpose_b=transpose_b)
    weight = products.stored("KN", transpose_b)
    letters = ", ".join(weight).lower()
    return Operator(
        name=name,
        summary=(
            f"y[m, n] = activation(scale * sum_k x[m, k] * weight[{letters}] + bias[n]) + "
            "residual[m, n]"
        ),
        inputs=(
            Operand("x", ("M", "K")),
            Operand("weight", weight),
            Operand("bias", ("N",), optional=True),
            Operand("residual", ("M", "N"), optional=True),
        ),
        outputs=(Operand("y", ("M", "N")),),
        axis_order=("M", "N", "K"),
        dtypes=_DTYPES,
        flops=products.flops,
        roundings=1,
        chain=_chain,
        configure=partial(products.configure, layout, tail=_TAIL),
        reduced=products.reduced,
        kernel=matmul,
        arguments=partial(_arguments, layout),
        option_problems=epilogue_problems,
        config_problems=partial(products.config_problems, layout),
    )


LINEAR = _operator("linear", True)
LINEAR_KN = _operator("linear_kn", False)


# -- gradients -------------------------------------------------------------------------------------

#: dx = dy·weight is the plain product; dweight = dyᵀ·x has both operands with the contraction (the
#: rows) on partitions already.
_DX, _DWEIGHT = Layout(), Layout(transpose_a=True)


def _as_products(axes: Axes) -> tuple[Axes, Axes]:
    """Return the axes of dx and of dweight as those of a product."""
    m, n, k = axes["M"], axes["N"], axes["K"]
    return {"M": m, "N": k, "K": n}, {"M": n, "N": k, "K": m}


def _backward_flops(axes: Axes) -> int:
    return 2 * products.flops(axes)


def _backward_chain(axes: Axes, spec: CoreSpec) -> int:
    """The longest of three: dx, dweight, and dbias, summed in order over the rows of a wave."""
    rows = min(axes["M"], spec.psum_banks * spec.stationary_fmax)
    dbias = rows + math.ceil(axes["M"] / spec.stationary_fmax)
    return max(dbias, *(products.chain(part, spec) for part in _as_products(axes)))


def _backward_configure(axes: Axes, dtype: str, spec: CoreSpec) -> LinearBackwardConfig:
    dx, dweight = _as_products(axes)
    return LinearBackwardConfig(
        dx=products.configure(_DX, dx, dtype, spec),
        dweight=products.configure(_DWEIGHT, dweight, dtype, spec),
    )


def _backward_config_problems(config: Any, dtype: str, spec: CoreSpec) -> tuple[str, ...]:
    if not isinstance(config, LinearBackwardConfig):
        return (f"config is {config!r}; a LinearBackwardConfig is needed; pass one, or None",)
    return tuple(
        f"{name}: {reason}"
        for name, layout, part in (("dx", _DX, config.dx), ("dweight", _DWEIGHT, config.dweight))
        for reason in products.config_problems(layout, part, dtype, spec)
    )


def _backward_reduced(axes: Axes, config: LinearBackwardConfig, spec: CoreSpec) -> dict[str, int]:
    dx, dweight = _as_products(axes)
    first = products.reduced(dx, config.dx, spec)
    second = products.reduced(dweight, config.dweight, spec)
    # Each axis appears in both products; the larger of its two reduced sizes serves both.
    return {
        "M": max(first["M"], second["K"]),
        "N": max(first["K"], second["M"]),
        "K": max(first["N"], second["N"]),
    }


def _backward_arguments(
    inputs: Sequence[Any], options: Options, config: LinearBackwardConfig
) -> tuple[Any, ...]:
    dy, x, weight = inputs
    return dy, x, weight, str(as_dtype(options.get("out_dtype") or dy.dtype)), config


LINEAR_BACKWARD = Operator(
    name="linear_backward",
    summary="dx = dy·weight; dweight = dyᵀ·x; dbias[n] = sum_m dy[m, n]",
    inputs=(
        Operand("dy", ("M", "N")),
        Operand("x", ("M", "K")),
        Operand("weight", ("N", "K")),
    ),
    outputs=(
        Operand("dx", ("M", "K")),
        Operand("dweight", ("N", "K")),
        Operand("dbias", ("N",)),
    ),
    axis_order=("M", "N", "K"),
    dtypes=_DTYPES,
    flops=_backward_flops,
    roundings=1,
    chain=_backward_chain,
    configure=_backward_configure,
    reduced=_backward_reduced,
    kernel=linear_backward,
    arguments=_backward_arguments,
    config_problems=_backward_config_problems,
)
