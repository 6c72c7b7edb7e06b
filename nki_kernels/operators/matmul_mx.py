"""Products of operands that are quantized to MXFP8 on chip: gen4, four times the rate of bfloat16.

Not in `OPERATORS`: the default target and the toy core, on which those are tested and timed, have
no MX data.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import partial
from typing import Any

import numpy.typing as npt

from nki_kernels.hardware.spec import CoreSpec
from nki_kernels.kernels.matmul.mx import PACKED, MatmulMxConfig
from nki_kernels.kernels.matmul.mx import matmul_mx as kernel
from nki_kernels.machine.dtypes import as_dtype
from nki_kernels.operators import matmul as products
from nki_kernels.operators.contract import Axes, Operand, Operator, Options

__all__ = ["MATMUL_MXS", "MatmulMxConfig", "matmul_mx"]

#: What an element type is called in the kernel.
_KINDS = {"e4m3": "float8_e4m3fn_x4", "e5m2": "float8_e5m2_x4"}

#: Values that share a scale.
_BLOCK = 32

#: Shares of SBUF for the quantized rows of A and for one of up to three panels of B, and bytes of
#: 4 values with their scale.
_HELD_SHARE, _PANEL_SHARE, _PACKED_BYTES = 0.4, 0.18, 5

#: Column tiles of a panel, and row tiles loaded ahead: 28 us of PE, a panel's load
#: and the time to quantize it (4096^3: 579 us with 4, 533 with 8).
_PANEL_TILES, _AHEAD = 2, 8


def _chain(axes: Axes, spec: CoreSpec) -> int:
    """As matmul's, with four products in each row of the array."""
    return products.chain(axes, spec) + (PACKED - 1) * min(axes["K"], spec.partitions)


def _configure(axes: Axes, dtype: str, spec: CoreSpec) -> MatmulMxConfig:
    slabs = math.ceil(axes["K"] / (PACKED * spec.partitions))
    column = slabs * _PACKED_BYTES
    most = int(spec.sbuf_usable_bytes * _HELD_SHARE) // column
    tile, wide = spec.stationary_fmax, spec.moving_fmax
    most = most // wide * wide if most >= wide else max(1, most // tile) * tile
    # Equal blocks: b passes once for each.
    block = math.ceil(axes["M"] / math.ceil(axes["M"] / most))
    panel = int(spec.sbuf_usable_bytes * _PANEL_SHARE) // column
    columns = min(_PANEL_TILES, panel // wide) * wide or max(1, panel)
    return MatmulMxConfig(
        rows=min(most, math.ceil(block / tile) * tile),
        columns=columns,
        # No more than two panels beside the one in use.
        ahead=min(_AHEAD, 2 * math.ceil(block / tile)),
        hwdge=spec.generation >= 3,
    )


def _config_problems(config: Any, dtype: str, spec: CoreSpec) -> tuple[str, ...]:
    if not isinstance(config, MatmulMxConfig):
        return (f"config is {config!r}; a MatmulMxConfig is needed; pass one, or None",)
    least = {"rows": 1, "columns": 1, "ahead": 0}
    return tuple(
        f"config.{name} is {getattr(config, name)!r}; it must be an int of at least {bound}"
        for name, bound in least.items()
        if type(getattr(config, name)) is not int or getattr(config, name) < bound
    )


def _limits(axes: Axes, dtype: str, spec: CoreSpec) -> tuple[str, ...]:
    reasons = []
    if axes["K"] % _BLOCK:
        reasons.append(
            f"K is {axes['K']}; values share a scale in blocks of {_BLOCK}, K must be a multiple "
            "of it; append zeros to both operands"
        )
    if spec.generation < 4:
        reasons.append(
            f"{spec.name} is gen{spec.generation}; MX data needs gen4; use matmul or matmul_fp8"
        )
    return tuple(reasons)


def _option_problems(options: Options) -> tuple[str, ...]:
    kind = options.get("kind", "e4m3")
    if kind in _KINDS:
        return ()
    return (f"kind is {kind!r}; allowed are {', '.join(_KINDS)}; choose one",)


def _reduced(axes: Axes, config: MatmulMxConfig, spec: CoreSpec) -> dict[str, int]:
    blocks = {"M": config.rows, "N": spec.moving_fmax, "K": PACKED * spec.partitions}
    return {letter: products.two_blocks(axes[letter], block) for letter, block in blocks.items()}


def _arguments(
    transposed: bool, inputs: Sequence[Any], options: Options, config: MatmulMxConfig
) -> tuple[Any, ...]:
    a, b = inputs
    packed = _KINDS[options.get("kind", "e4m3")]
    return a, b, transposed, packed, str(as_dtype(options.get("out_dtype") or "bfloat16")), config


def _operator(transposed: bool) -> Operator:
    b = products.stored("KN", transposed)
    letters = ", ".join(b).lower()
    return Operator(
        name="matmul_mx_nt" if transposed else "matmul_mx",
        summary=f"c[m, n] = sum_k q(a)[m, k] * q(b)[{letters}], q = quantization to MXFP8",
        inputs=(Operand("a", ("M", "K")), Operand("b", b)),
        outputs=(Operand("c", ("M", "N")),),
        axis_order=("M", "N", "K"),
        dtypes=("bfloat16", "float16"),
        out_dtypes=("bfloat16", "float16", "float32"),
        flops=products.flops,
        roundings=1,
        chain=_chain,
        configure=_configure,
        reduced=_reduced,
        kernel=kernel,
        arguments=partial(_arguments, transposed),
        limits=_limits,
        option_problems=_option_problems,
        config_problems=_config_problems,
    )


#: By whether b is stored [N, K].
MATMUL_MXS: dict[bool, Operator] = {stored: _operator(stored) for stored in (False, True)}


def matmul_mx(
    a: npt.NDArray[Any],
    b: npt.NDArray[Any],
    *,
    transpose_b: bool = False,
    kind: str = "e4m3",
    out_dtype: Any = None,
    config: MatmulMxConfig | None = None,
    target: str | None = None,
) -> npt.NDArray[Any]:
    """Matrix product of operands quantized to MXFP8 on chip, at four times the rate of bfloat16.

    c[m, n] = sum_k q(a)[m, k] * q(b)[k, n]

    q scales blocks of 32 values of k by a power of two and rounds each to 8 bits, to nearest even.
    Within slabs of 512 of k a block is 8 neighbours from each quarter of the slab; a block with an
    infinity or NaN becomes NaN. Sums are float32, rounded once.

    Dimensions:
        M: rows of A and C, >= 1    N: columns of B and C, >= 1    K: contraction, a multiple of 32

    Args:
        a: [M, K], dense row-major, bfloat16 | float16.
        b: [K, N], dtype of `a`.
        transpose_b: `b` is stored [N, K], as PyTorch stores weights.
        kind: "e4m3" (3 bits of mantissa) or "e5m2" (2 bits, more range within a block).
        out_dtype: bfloat16 (None), float16 or float32.
        config: tuning of the kernel; None lets the operator choose. It never changes the result.
        target: hardware generation, from gen4 on ("trn3"); see `nki_kernels.ops.matmul`.

    Returns:
        [M, N], a new array of dtype `out_dtype`.

    Raises:
        ShapeError: sizes that differ, a rank other than 2, a zero size, a strided array, a K that
            is no multiple of 32, a generation without MX data.
        DtypeError: a dtype that is not supported, or two different ones.
        OptionError: an unknown kind.
        ConfigError: a `config` that cannot run.

    Source: the kernel is `nki_kernels.kernels.matmul.mx`.

    Example:
        >>> import ml_dtypes, numpy as np
        >>> one = np.ones((2, 32), ml_dtypes.bfloat16)
        >>> matmul_mx(one, one, transpose_b=True, out_dtype="float32", target="trn3")
        array([[32., 32.],
               [32., 32.]], dtype=float32)
    """
    op = MATMUL_MXS[bool(transpose_b)]
    options = {"kind": kind, "out_dtype": out_dtype}
    run = op.launch((a, b), options, config=config, target=target)
    result: npt.NDArray[Any] = run.result
    return result
