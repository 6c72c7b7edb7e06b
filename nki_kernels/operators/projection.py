"""Projections fused with their neighbours: `norm_linear` and `qkv_projection`.

Both take the weight as PyTorch stores it; the `_kn` forms take the contraction outermost, which
streams faster when few rows leave nothing but the weights to wait for.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import partial
from typing import Any

import numpy.typing as npt

from nki_kernels.hardware.spec import CoreSpec
from nki_kernels.kernels.matmul.kernel import Layout
from nki_kernels.kernels.projection import ProjectionConfig
from nki_kernels.kernels.projection import norm_linear as norm_linear_kernel
from nki_kernels.kernels.projection import qkv_projection as qkv_projection_kernel
from nki_kernels.machine.dtypes import as_dtype
from nki_kernels.operators import matmul as products
from nki_kernels.operators.contract import Axes, Operand, Operator, Options
from nki_kernels.operators.norm import DEFAULT_EPS, option_problems

__all__ = ["NORM_LINEARS", "QKV_PROJECTIONS", "ProjectionConfig", "norm_linear", "qkv_projection"]

#: x * gain is formed before the row's factor is known: float16 would overflow or lose small rows.
_DTYPES = ("bfloat16", "float32")

_EPS = DEFAULT_EPS["rms_norm"]

#: Columns of x per instruction of the row statistics; 4096 columns take Scalar 3.5 us.
_CHUNK = 4096

#: Slices run tile by tile at the end of a wave: an eviction takes up to 0.9 us, 4 slices.
_TAIL = 4

#: float32 roundings of the factor of a row beyond its sum (mean, eps, root, two products), and of
#: the bias.
_FACTOR_ROUNDINGS = 8

#: The same for the norm of a head, and of its rotation: two products and a sum.
_HEAD_ROUNDINGS = 10


def _configure(layout: Layout, axes: Axes, dtype: str, spec: CoreSpec) -> ProjectionConfig:
    """Choose a config for the axes of a product, N as whole column tiles."""
    return ProjectionConfig(
        product=products.configure(layout, axes, dtype, spec, tail=_TAIL),
        chunk=min(axes["K"], _CHUNK),
        pool=True,
    )


def _config_problems(layout: Layout, config: Any, dtype: str, spec: CoreSpec) -> tuple[str, ...]:
    if not isinstance(config, ProjectionConfig):
        return (f"config is {config!r}; a ProjectionConfig is needed; pass one, or None",)
    reasons = [
        f"product: {reason}"
        for reason in products.config_problems(layout, config.product, dtype, spec)
    ]
    if type(config.chunk) is not int or config.chunk < 1:
        reasons.append(f"config.chunk is {config.chunk!r}; it must be an int of at least 1")
    return tuple(reasons)


def _eps(options: Options) -> float:
    eps = options.get("eps")
    return _EPS if eps is None else float(eps)


def _out_dtype(options: Options, x: Any) -> str:
    return str(as_dtype(options.get("out_dtype") or x.dtype))


# -- norm and linear -------------------------------------------------------------------------------


def _linear_chain(axes: Axes, spec: CoreSpec) -> int:
    """The product's, and that of the sum of squares, which enters by its root: half of it."""
    return products.chain(axes, spec) + math.ceil(axes["K"] / 2) + _FACTOR_ROUNDINGS


def _linear_arguments(
    transposed: bool, inputs: Sequence[Any], options: Options, config: ProjectionConfig
) -> tuple[Any, ...]:
    x, gain, weight, bias = inputs
    return x, gain, weight, bias, _eps(options), transposed, _out_dtype(options, x), config


def _linear_reduced(axes: Axes, config: ProjectionConfig, spec: CoreSpec) -> dict[str, int]:
    return products.reduced(axes, config.product, spec)


def _norm_linear(transposed: bool) -> Operator:
    layout = Layout(transpose_b=transposed)
    weight = products.stored("KN", transposed)
    letters = ", ".join(weight).lower()
    return Operator(
        name="norm_linear" if transposed else "norm_linear_kn",
        summary=(
            f"y[m, n] = sum_k x[m, k] * norm_weight[k] * weight[{letters}] / "
            "sqrt(mean_k(x[m, :]^2) + eps) + bias[n]"
        ),
        inputs=(
            Operand("x", ("M", "K")),
            Operand("norm_weight", ("K",), optional=True),
            Operand("weight", weight),
            Operand("bias", ("N",), optional=True),
        ),
        outputs=(Operand("y", ("M", "N")),),
        axis_order=("M", "N", "K"),
        dtypes=_DTYPES,
        flops=products.flops,
        roundings=1,
        chain=_linear_chain,
        configure=partial(_configure, layout),
        reduced=_linear_reduced,
        kernel=norm_linear_kernel,
        arguments=partial(_linear_arguments, transposed),
        option_problems=option_problems,
        config_problems=partial(_config_problems, layout),
    )


#: By whether the weight is stored as PyTorch does.
NORM_LINEARS: dict[bool, Operator] = {stored: _norm_linear(stored) for stored in (True, False)}


def norm_linear(
    x: npt.NDArray[Any],
    norm_weight: npt.NDArray[Any] | None,
    weight: npt.NDArray[Any],
    bias: npt.NDArray[Any] | None = None,
    *,
    eps: float = _EPS,
    transpose_weight: bool = True,
    out_dtype: Any = None,
    config: ProjectionConfig | None = None,
    target: str | None = None,
) -> npt.NDArray[Any]:
    """rms_norm and the linear layer behind it, in one kernel.

    y[m, n] = r[m] * sum_k x[m, k] * norm_weight[k] * weight[n, k] + bias[n]
    r[m] = 1 / sqrt(mean_k(x[m, :]^2) + eps)

    x * norm_weight is rounded once, to the dtype of `x`; sums, r and bias are float32, and the
    result is rounded once. Rows whose mean square overflows float32 give the bias.

    Dimensions:
        M: rows, >= 1        N: columns of the result, >= 1        K: row length, >= 1

    Args:
        x: [M, K], dense row-major, bfloat16 | float32. Not float16: x * norm_weight may lie far
            from 1, where that has no range; use `rms_norm` and `linear`.
        norm_weight: [K], dtype of `x`, or None for ones; then nothing but the result is rounded.
        weight: [N, K], dtype of `x`, as `torch.nn.Linear` stores it.
        bias: [N], dtype of `x`, or None.
        eps: added to the mean square, not negative.
        transpose_weight: False if `weight` is stored [K, N], which is faster for few rows.
        out_dtype: dtype of the result, one of the same two; None means the dtype of `x`.
        config: tuning of the kernel; None lets the operator choose. It orders the sums of squares,
            and changes nothing else.
        target: hardware generation; see `nki_kernels.ops.matmul`.

    Returns:
        [M, N], a new array of dtype `out_dtype`.

    Raises:
        ShapeError: sizes that differ, a wrong rank, a zero size, a strided array.
        DtypeError: a dtype that is not supported, or different ones.
        OptionError: an eps that is not such a number.
        ConfigError: a `config` that cannot run on the target or with the dtype.

    Source: the kernel is `nki_kernels.kernels.projection.norm_linear`.

    Example:
        >>> import numpy as np
        >>> x = np.array([[3, 3]], np.float32)
        >>> norm_linear(x, None, np.array([[1, 2], [0, 1]], np.float32), eps=0.0)
        array([[3., 1.]], dtype=float32)
    """
    op = NORM_LINEARS[bool(transpose_weight)]
    options = {"eps": eps, "out_dtype": out_dtype}
    run = op.launch((x, norm_weight, weight, bias), options, config=config, target=target)
    result: npt.NDArray[Any] = run.result
    return result


# -- queries, keys and values ----------------------------------------------------------------------


def _qkv_product(axes: Axes, spec: CoreSpec) -> dict[str, int]:
    """Return the axes of the product, with N as if every column tile were full."""
    each = max(1, spec.moving_fmax // axes["D"])
    tiles = math.ceil(axes["Q"] / each) + 2 * math.ceil(axes["G"] / each)
    return {"M": axes["T"], "N": tiles * spec.moving_fmax, "K": axes["H"]}


def _qkv_flops(axes: Axes) -> int:
    return 2 * axes["T"] * axes["H"] * axes["C"] * axes["D"]


def _qkv_chain(axes: Axes, spec: CoreSpec) -> int:
    """As norm_linear's, and the same again for the norm of a head."""
    inner = {"M": 1, "N": 1, "K": axes["H"]}
    return _linear_chain(inner, spec) + axes["D"] + _HEAD_ROUNDINGS


def _qkv_limits(axes: Axes, dtype: str, spec: CoreSpec) -> tuple[str, ...]:
    heads, others, size = axes["Q"], axes["G"], axes["D"]
    reasons = []
    if axes["C"] != heads + 2 * others:
        reasons.append(
            f"the weight has {axes['C']} heads, heads is {heads} and kv_heads {others}; heads + 2 "
            f"kv_heads = {heads + 2 * others} are needed; pass the numbers the weight was made for"
        )
    if size > spec.moving_fmax:
        reasons.append(
            f"D is {size}; a head must fit one bank of PSUM, at most D = {spec.moving_fmax} on "
            f"{spec.name}; use linear, rms_norm and rope"
        )
    if 2 * axes.get("F", 0) > size:
        reasons.append(
            f"F is {axes['F']}, {2 * axes['F']} columns in pairs, and D is {size}; at most F = "
            f"D / 2 = {size // 2} pairs are in a head; cut cos and sin"
        )
    return tuple(reasons)


def _qkv_option_problems(options: Options) -> tuple[str, ...]:
    reasons = list(option_problems(options))
    for name in ("heads", "kv_heads"):
        value = options.get(name)
        if type(value) is not int or value < 1:
            reasons.append(f"{name} is {value!r}; it must be an int of at least 1")
    return tuple(reasons)


def _qkv_value_problems(inputs: Sequence[Any], options: Options) -> tuple[str, ...]:
    cos, sin = inputs[-2:]
    if (cos is None) == (sin is None):
        return ()
    return ("one of cos and sin is None; a rotation takes both; pass both, or none",)


def _qkv_configure(layout: Layout, axes: Axes, dtype: str, spec: CoreSpec) -> ProjectionConfig:
    return _configure(layout, _qkv_product(axes, spec), dtype, spec)


def _qkv_reduced(axes: Axes, config: ProjectionConfig, spec: CoreSpec) -> dict[str, int]:
    """Fewer heads of each kind, two waves in all; fewer rows and slices."""
    small = products.reduced(_qkv_product(axes, spec), config.product, spec)
    each = max(1, spec.moving_fmax // axes["D"])
    most = (config.product.wave_n + 1) * each
    q, g = min(axes["Q"], most), min(axes["G"], each + 1)
    return {**axes, "T": small["M"], "H": small["K"], "C": q + 2 * g, "Q": q, "G": g}


def _qkv_arguments(
    transposed: bool, inputs: Sequence[Any], options: Options, config: ProjectionConfig
) -> tuple[Any, ...]:
    heads, out_dtype = options["heads"], _out_dtype(options, inputs[0])
    return *inputs, heads, _eps(options), transposed, out_dtype, config


def _qkv_projection(transposed: bool) -> Operator:
    layout = Layout(transpose_b=transposed)
    return Operator(
        name="qkv_projection" if transposed else "qkv_projection_kn",
        summary="q, k, v = heads of norm(x)·weight + bias; q and k normalised by head and rotated",
        inputs=(
            Operand("x", ("T", "H")),
            Operand("weight", ("C", "D", "H") if transposed else ("H", "C", "D")),
            Operand("bias", ("C", "D"), optional=True),
            Operand("norm_weight", ("H",), optional=True),
            Operand("q_norm", ("D",), optional=True),
            Operand("k_norm", ("D",), optional=True),
            Operand("cos", ("T", "F"), optional=True, dtype="float32"),
            Operand("sin", ("T", "F"), optional=True, dtype="float32"),
        ),
        outputs=(
            Operand("q", ("T", "Q", "D")),
            Operand("k", ("T", "G", "D")),
            Operand("v", ("T", "G", "D")),
        ),
        axis_order=("T", "H", "C", "Q", "G", "D", "F"),
        option_axes={"Q": "heads", "G": "kv_heads"},
        dtypes=_DTYPES,
        flops=_qkv_flops,
        roundings=1,
        chain=_qkv_chain,
        configure=partial(_qkv_configure, layout),
        reduced=_qkv_reduced,
        kernel=qkv_projection_kernel,
        arguments=partial(_qkv_arguments, transposed),
        limits=_qkv_limits,
        option_problems=_qkv_option_problems,
        value_problems=_qkv_value_problems,
        config_problems=partial(_config_problems, layout),
    )


#: By whether the weight is stored as PyTorch does.
QKV_PROJECTIONS: dict[bool, Operator] = {
    stored: _qkv_projection(stored) for stored in (True, False)
}


def qkv_projection(
    x: npt.NDArray[Any],
    weight: npt.NDArray[Any],
    bias: npt.NDArray[Any] | None = None,
    *,
    heads: int,
    kv_heads: int,
    norm_weight: npt.NDArray[Any] | None = None,
    q_norm: npt.NDArray[Any] | None = None,
    k_norm: npt.NDArray[Any] | None = None,
    rope: tuple[npt.NDArray[Any], npt.NDArray[Any]] | None = None,
    eps: float = _EPS,
    transpose_weight: bool = True,
    out_dtype: Any = None,
    config: ProjectionConfig | None = None,
    target: str | None = None,
) -> tuple[npt.NDArray[Any], npt.NDArray[Any], npt.NDArray[Any]]:
    """Queries, keys and values of attention from the residual stream, in one kernel.

    [q | k | v] = norm(x)·weightᵀ + bias;  q = rope(norm(q)), k = rope(norm(k)), head by head

    Each step is left out where its operands are None. `norm` is rms_norm, of x with `norm_weight`,
    of each head with `q_norm` or `k_norm`; `rope` is that of `nki_kernels.ops.rope`, half-split.
    x * norm_weight is rounded once to the dtype of `x`, the results once; all else is float32.

    Dimensions:
        T: tokens, >= 1        H: width, >= 1        Q, G: `heads`, `kv_heads`, >= 1; C = Q + 2 G
        D: size of a head, 1 to 512        F: pairs of columns that are rotated, 1 to D / 2

    Args:
        x: [T, H], dense row-major, bfloat16 | float32 (see `norm_linear` for the reason).
        weight: [C, D, H], dtype of `x`: the rows of `torch.nn.Linear` for all heads of q, then of
            k, then of v. [C * D, H] is reshaped.
        bias: [C, D] or [C * D], dtype of `x`, or None.
        heads: Q.
        kv_heads: G.
        norm_weight: [H], dtype of `x`, or None for no norm of x.
        q_norm: [D], dtype of `x`, or None for no norm of the heads of q.
        k_norm: likewise, of k.
        rope: (cos, sin), [T, F] float32 each, or None for no rotation.
        eps: added to each mean square, not negative.
        transpose_weight: False if `weight` is [H, C, D], which is faster for few tokens.
        out_dtype: dtype of the results, one of the same two; None means the dtype of `x`.
        config: tuning of the kernel; None lets the operator choose. It orders the sums of squares,
            and changes nothing else.
        target: hardware generation; see `nki_kernels.ops.matmul`.

    Returns:
        q [T, Q, D], k [T, G, D], v [T, G, D], new arrays of dtype `out_dtype`.

    Raises:
        ShapeError: sizes that differ, heads that are not the weight's, a D or F too large, a wrong
            rank, a zero size, a strided array.
        DtypeError: a dtype that is not supported, or different ones.
        OptionError: an eps or a number of heads that is none.
        ConfigError: a `config` that cannot run on the target or with the dtype.

    Source: the kernel is `nki_kernels.kernels.projection.qkv`.

    Example:
        >>> import numpy as np
        >>> weight = np.arange(12, dtype=np.float32).reshape(6, 2)
        >>> q, k, v = qkv_projection(np.ones((1, 2), np.float32), weight, heads=1, kv_heads=1)
        >>> v.tolist()
        [[[17.0, 21.0]]]
    """
    total = heads + 2 * kv_heads if type(heads) is type(kv_heads) is int else 1
    weight, bias = _by_heads(weight, bias, max(1, total), transpose_weight)
    op = QKV_PROJECTIONS[bool(transpose_weight)]
    cos, sin = (None, None) if rope is None else rope
    inputs = (x, weight, bias, norm_weight, q_norm, k_norm, cos, sin)
    options = {"heads": heads, "kv_heads": kv_heads, "eps": eps, "out_dtype": out_dtype}
    run = op.launch(inputs, options, config=config, target=target)
    q, k, v = run.result
    return q, k, v


def _by_heads(weight: Any, bias: Any, total: int, transposed: bool) -> tuple[Any, Any]:
    """Return weight and bias with the heads as an axis of their own, where that is possible."""
    axis = 0 if transposed else 1
    if getattr(weight, "ndim", 0) == 2 and weight.shape[axis] % total == 0:
        size = weight.shape[axis] // total
        width = weight.shape[1 - axis]
        weight = weight.reshape((total, size, width) if transposed else (width, total, size))
    if getattr(bias, "ndim", 0) == 1 and bias.shape[0] % total == 0:
        bias = bias.reshape(total, bias.shape[0] // total)
    return weight, bias
