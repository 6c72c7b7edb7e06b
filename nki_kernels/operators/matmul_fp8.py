"""Products of fp8 operands at twice the rate of bfloat16: double row, gen3 and later.

The result has 2 or 4 bytes and a scale, for operands that were scaled into the range of fp8.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import numpy.typing as npt

from nki_kernels.hardware.spec import CoreSpec
from nki_kernels.kernels.matmul.kernel import Layout, MatmulConfig, matmul
from nki_kernels.operators import matmul as products
from nki_kernels.operators.contract import Axes, Operand, Operator, Options
from nki_kernels.operators.linear import epilogue_of, epilogue_problems

__all__ = ["MATMUL_FP8", "MATMUL_FP8_NT", "matmul_fp8"]

#: What a product is configured and judged as: its pairs of rows move as elements of 2 bytes.
_AS = "bfloat16"


def _as_pairs(axes: Axes) -> dict[str, int]:
    return {**axes, "K": axes["K"] // 2}


def _chain(axes: Axes, spec: CoreSpec) -> int:
    """As matmul's, for two rows in each row of the array, and two roundings of the scale."""
    return products.chain(axes, spec) + min(axes["K"], spec.partitions) + 2


def _configure(layout: Layout, axes: Axes, dtype: str, spec: CoreSpec) -> MatmulConfig:
    return products.configure(layout, _as_pairs(axes), _AS, spec)


def _config_problems(layout: Layout, config: Any, dtype: str, spec: CoreSpec) -> tuple[str, ...]:
    reasons = products.config_problems(layout, config, _AS, spec)
    if not reasons and config.transpose == "pe":
        reasons = ("config.transpose is 'pe'; pairs of fp8 are transposed by DMA; use 'dma'",)
    return reasons


def _limits(axes: Axes, dtype: str, spec: CoreSpec) -> tuple[str, ...]:
    reasons = []
    if axes["K"] % 2:
        reasons.append(
            f"K is {axes['K']}; double row contracts pairs of rows, K must be even; append a row "
            "of zeros to both operands"
        )
    if spec.generation < 3:
        reasons.append(
            f"{spec.name} is gen{spec.generation}; double row needs gen3; cast to bfloat16 and "
            "use matmul"
        )
    return tuple(reasons)


def _reduced(axes: Axes, config: MatmulConfig, spec: CoreSpec) -> dict[str, int]:
    small = products.reduced(_as_pairs(axes), config, spec)
    return {**small, "K": 2 * small["K"]}


def _option_problems(options: Options) -> tuple[str, ...]:
    return epilogue_problems({"scale": options.get("scale", 1.0)})


def _arguments(
    layout: Layout, inputs: Sequence[Any], options: Options, config: MatmulConfig
) -> tuple[Any, ...]:
    a, b = inputs
    return a, b, None, None, layout, epilogue_of(options, "bfloat16"), config


def _operator(name: str, transpose_b: bool) -> Operator:
    layout = Layout(transpose_b=transpose_b, double_row=True)
    b = products.stored("KN", transpose_b)
    letters = ", ".join(b).lower()
    return Operator(
        name=name,
        summary=f"c[m, n] = scale * sum_k a[m, k] * b[{letters}] of fp8 operands",
        inputs=(Operand("a", ("M", "K")), Operand("b", b)),
        outputs=(Operand("c", ("M", "N")),),
        axis_order=("M", "N", "K"),
        dtypes=("float8_e4m3", "float8_e5m2"),
        out_dtypes=("bfloat16", "float16", "float32"),
        flops=products.flops,
        roundings=1,
        chain=_chain,
        configure=partial(_configure, layout),
        reduced=_reduced,
        kernel=matmul,
        arguments=partial(_arguments, layout),
        limits=_limits,
        option_problems=_option_problems,
        config_problems=partial(_config_problems, layout),
    )


MATMUL_FP8 = _operator("matmul_fp8", False)
MATMUL_FP8_NT = _operator("matmul_fp8_nt", True)


def matmul_fp8(
    a: npt.NDArray[Any],
    b: npt.NDArray[Any],
    *,
    transpose_b: bool = False,
    scale: float = 1.0,
    out_dtype: Any = None,
    config: MatmulConfig | None = None,
    target: str | None = None,
) -> npt.NDArray[Any]:
    """Matrix product of fp8 operands at twice the rate of bfloat16 (double row).

    c[m, n] = scale * sum_k a[m, k] * b[k, n]

    Products are accumulated in float32, scaled, and rounded once, to nearest even.

    Dimensions:
        M: rows of A and C, >= 1        N: columns of B and C, >= 1        K: contraction, even

    Args:
        a: [M, K], dense row-major, float8_e4m3 | float8_e5m2 (those of ml_dtypes).
        b: [K, N], dtype of `a`.
        transpose_b: `b` is stored [N, K], as PyTorch stores weights.
        scale: factor of the sum: the product of the scales of the operands.
        out_dtype: bfloat16 (None), float16 or float32.
        config: tuning of the kernel; None lets the operator choose. It never changes the result.
        target: hardware generation, from gen3 on; see `nki_kernels.ops.matmul`.

    Returns:
        [M, N], a new array of dtype `out_dtype`.

    Raises:
        ShapeError: sizes that differ, a rank other than 2, a zero size, a strided array, an odd K,
            a generation without double row.
        DtypeError: a dtype that is not supported, or two different ones.
        OptionError: a scale that float32 does not hold.
        ConfigError: a `config` that cannot run.

    Source: the kernel is `nki_kernels.kernels.matmul.kernel`.

    Example:
        >>> import ml_dtypes, numpy as np
        >>> one = np.ones((2, 2), ml_dtypes.float8_e4m3)
        >>> matmul_fp8(one, one, scale=0.5, out_dtype="float32")
        array([[1., 1.],
               [1., 1.]], dtype=float32)
    """
    op = MATMUL_FP8_NT if transpose_b else MATMUL_FP8
    options = {"scale": scale, "out_dtype": out_dtype}
    run = op.launch((a, b), options, config=config, target=target)
    result: npt.NDArray[Any] = run.result
    return result
