"""The public operations on NumPy arrays. Each runs its NKI kernel, or raises with all reasons."""

from __future__ import annotations

from typing import Any

import numpy.typing as npt

from nki_kernels.operators.attention_chunk import (
    attention_chunked_prefill as attention_chunked_prefill,
)
from nki_kernels.operators.attention_decode import attention_decode as attention_decode
from nki_kernels.operators.attention_varlen import attention_varlen as attention_varlen
from nki_kernels.operators.group_norm import group_norm as group_norm
from nki_kernels.operators.kv_cache import kv_cache_write as kv_cache_write
from nki_kernels.operators.linear import (
    LINEAR,
    LINEAR_BACKWARD,
    LINEAR_KN,
    LinearBackwardConfig,
)
from nki_kernels.operators.matmul import MATMULS, MatmulConfig
from nki_kernels.operators.matmul_fp8 import matmul_fp8 as matmul_fp8
from nki_kernels.operators.matmul_mx import matmul_mx as matmul_mx
from nki_kernels.operators.merge import merge_attention as merge_attention
from nki_kernels.operators.mla import mla_decode as mla_decode
from nki_kernels.operators.mlp import gated_mlp as gated_mlp
from nki_kernels.operators.mlp_backward import gated_mlp_backward as gated_mlp_backward
from nki_kernels.operators.norm import (
    DEFAULT_EPS,
    LAYER_NORM,
    RMS_NORM,
    LayerNormConfig,
    RmsNormConfig,
)
from nki_kernels.operators.norm_backward import (
    LAYER_NORM_BACKWARD,
    RMS_NORM_BACKWARD,
    LayerNormBackwardConfig,
    RmsNormBackwardConfig,
)
from nki_kernels.operators.norm_variants import add_layer_norm as add_layer_norm
from nki_kernels.operators.norm_variants import add_rms_norm as add_rms_norm
from nki_kernels.operators.norm_variants import rms_norm_gemma as rms_norm_gemma
from nki_kernels.operators.norm_variants import rms_norm_llama as rms_norm_llama
from nki_kernels.operators.projection import norm_linear as norm_linear
from nki_kernels.operators.projection import qkv_projection as qkv_projection
from nki_kernels.operators.rope import rope as rope
from nki_kernels.ops_attention import attention as attention
from nki_kernels.ops_attention import attention_backward as attention_backward
from nki_kernels.ops_moe import combine as combine
from nki_kernels.ops_moe import dispatch as dispatch
from nki_kernels.ops_moe import experts as experts
from nki_kernels.ops_moe import grouped_matmul as grouped_matmul
from nki_kernels.ops_moe import router as router


def matmul(
    a: npt.NDArray[Any],
    b: npt.NDArray[Any],
    *,
    transpose_a: bool = False,
    transpose_b: bool = False,
    out_dtype: Any = None,
    config: MatmulConfig | None = None,
    target: str | None = None,
) -> npt.NDArray[Any]:
    """Matrix product, of two matrices or of two batches of them.

    c[m, n] = sum_k a[m, k] * b[k, n]

    Products are accumulated in float32 and rounded once, to nearest even, to the output dtype.

    Dimensions:
        M: rows of A and C, >= 1        N: columns of B and C, >= 1        K: contraction, >= 1
        B: batch, >= 1, in front of all three or of none

    Args:
        a: [M, K], dense row-major, bfloat16 | float16 | float32; or [B, M, K].
        b: [K, N], likewise, dtype of `a`; or [B, K, N].
        transpose_a: `a` is stored [K, M]; nothing is copied, and it is the faster way.
        transpose_b: `b` is stored [N, K], as PyTorch stores weights; nothing is copied.
        out_dtype: dtype of the result, one of the same three; None means the dtype of `a`.
        config: tuning of the kernel; None lets the operator choose. It never changes the result.
        target: hardware generation ("trn2", "trn3", ...). None reads
            NEURON_PLATFORM_TARGET_OVERRIDE and, when that is unset, means trn2.

    Returns:
        [M, N] or [B, M, N], a new array of dtype `out_dtype`.

    Raises:
        ShapeError: sizes that differ, a rank other than 2 or 3, a zero size, a strided array.
        DtypeError: a dtype that is not supported (float64, integers), or two different ones.
        ConfigError: a `config` that cannot run on the target or with the dtype.
        ValueError: an unknown target; the message lists the known ones.

    Source: the kernel is `nki_kernels.kernels.matmul.kernel`.

    Example:
        >>> import numpy as np
        >>> matmul(np.ones((2, 3), np.float32), np.ones((3, 2), np.float32))
        array([[3., 3.],
               [3., 3.]], dtype=float32)
    """
    op = MATMULS[getattr(a, "ndim", 2) == 3, bool(transpose_a), bool(transpose_b)]
    run = op.launch((a, b), {"out_dtype": out_dtype}, config=config, target=target)
    result: npt.NDArray[Any] = run.result
    return result


def linear(
    x: npt.NDArray[Any],
    weight: npt.NDArray[Any],
    bias: npt.NDArray[Any] | None = None,
    residual: npt.NDArray[Any] | None = None,
    *,
    activation: str | None = None,
    scale: float = 1.0,
    transpose_weight: bool = True,
    out_dtype: Any = None,
    config: MatmulConfig | None = None,
    target: str | None = None,
) -> npt.NDArray[Any]:
    """Linear layer with what follows it, in one pass.

    y[m, n] = activation(scale * sum_k x[m, k] * weight[n, k] + bias[n]) + residual[m, n]

    Everything is float32 until the one rounding, to nearest even, to the output dtype. What is left
    out costs nothing.

    Dimensions:
        M: rows of x, >= 1        N: features of y, >= 1        K: features of x, >= 1

    Args:
        x: [M, K], dense row-major, bfloat16 | float16 | float32.
        weight: [N, K], dtype of `x`, as `torch.nn.Linear` stores it.
        bias: [N], dtype of `x`, or None.
        residual: [M, N], dtype of `x`, or None.
        activation: None, "relu", "gelu" (exact), "gelu_tanh" or "silu".
        scale: factor of the sum, before bias and activation; the kernel has it in float32.
        transpose_weight: False if `weight` is stored [K, N], which is faster for few rows: 94
            instead of 86 % of the memory's bandwidth (modelled, trn2).
        out_dtype: dtype of the result, one of the same three; None means the dtype of `x`.
        config: see `matmul`.
        target: see `matmul`.

    Returns:
        [M, N], a new array of dtype `out_dtype`.

    Raises:
        ShapeError, DtypeError, ConfigError, ValueError: see `matmul`.
        OptionError: an unknown activation, or a scale that float32 does not hold.

    Source: the kernel is `nki_kernels.kernels.matmul.kernel`.

    Example:
        >>> import numpy as np
        >>> x, weight = np.array([[1, 2]], np.float32), np.array([[1, 1], [-1, 0]], np.float32)
        >>> linear(x, weight, np.array([1, 0], np.float32), activation="relu")
        array([[4., 0.]], dtype=float32)
    """
    options = {"activation": activation, "scale": scale, "out_dtype": out_dtype}
    op = LINEAR if transpose_weight else LINEAR_KN
    run = op.launch((x, weight, bias, residual), options, config=config, target=target)
    result: npt.NDArray[Any] = run.result
    return result


def linear_backward(
    dy: npt.NDArray[Any],
    x: npt.NDArray[Any],
    weight: npt.NDArray[Any],
    *,
    out_dtype: Any = None,
    config: LinearBackwardConfig | None = None,
    target: str | None = None,
) -> tuple[npt.NDArray[Any], npt.NDArray[Any], npt.NDArray[Any]]:
    """Gradients of `linear` without an activation, given dy, the gradient of its result.

    dx[m, k] = sum_n dy[m, n] * weight[n, k];  dweight[n, k] = sum_m dy[m, n] * x[m, k];
    dbias[n] = sum_m dy[m, n]

    The gradient of a residual is dy itself. Sums are float32, rounded once.

    Dimensions, errors: those of `linear`.

    Args:
        dy: [M, N], dense row-major, bfloat16 | float16 | float32.
        x: [M, K], dtype of `dy`: the input of the forward pass.
        weight: [N, K], dtype of `dy`.
        out_dtype: dtype of the results, one of the same three; None means the dtype of `dy`.
        config: tuning of the two products; it orders the sums of dbias, and changes nothing else.
        target: see `matmul`.

    Returns:
        dx [M, K], dweight [N, K] and dbias [N], new arrays of dtype `out_dtype`.

    Source: the kernel is `nki_kernels.kernels.matmul.linear_backward`.

    Example:
        >>> import numpy as np
        >>> one = np.ones((2, 2), np.float32)
        >>> dx, dweight, dbias = linear_backward(one, one, 3 * one)
        >>> dx[0], dweight[0], dbias
        (array([6., 6.], dtype=float32), array([2., 2.], dtype=float32), \
array([2., 2.], dtype=float32))
    """
    options = {"out_dtype": out_dtype}
    run = LINEAR_BACKWARD.launch((dy, x, weight), options, config=config, target=target)
    dx, dweight, dbias = run.result
    return dx, dweight, dbias


def rms_norm(
    x: npt.NDArray[Any],
    weight: npt.NDArray[Any] | None = None,
    *,
    eps: float = DEFAULT_EPS["rms_norm"],
    out_dtype: Any = None,
    config: RmsNormConfig | None = None,
    target: str | None = None,
) -> npt.NDArray[Any]:
    """Normalise each row by its root mean square.

    y[n, h] = x[n, h] / sqrt(mean_h(x[n, :]^2) + eps) * weight[h]

    Everything is float32 until the one rounding, to nearest even, to the output dtype: as
    `torch.nn.functional.rms_norm` does, and not as modules that round before they multiply by the
    weight.

    Dimensions:
        N: rows, >= 1        H: row length, >= 1, at most what SBUF holds (see Raises)

    Args:
        x: [N, H], dense row-major, bfloat16 | float16 | float32.
        weight: [H], dtype of `x`, or None for ones.
        eps: added to the mean square, >= 0; the kernel has it in float32.
        out_dtype: dtype of the result, one of the same three; None means the dtype of `x`.
        config: tuning of the kernel; None lets the operator choose. It never changes the
            mathematics.
        target: hardware generation ("trn2", "trn3", ...). None reads
            NEURON_PLATFORM_TARGET_OVERRIDE and, when that is unset, means trn2.

    Returns:
        [N, H], a new array of dtype `out_dtype`. A row with a NaN is NaN, and a row of zeros
        with an eps of 0; a row with an infinity, or whose squares float32 does not hold, is 0, and
        NaN where `x` is infinite.

    Raises:
        ShapeError: sizes that differ, a wrong rank, a zero size, a strided array, or an H too
            large for SBUF; the message names the largest. On trn2 it is above 16384 for each dtype.
        DtypeError: a dtype that is not supported (float64, integers), or two different ones.
        OptionError: an `eps` that is negative, or that float32 does not hold.
        ConfigError: a `config` that cannot run on the target.
        ValueError: an unknown target; the message lists the known ones.

    Source: the kernel is `nki_kernels.kernels.norm.rms_norm`.

    Example:
        >>> import numpy as np
        >>> rms_norm(np.array([[1, -1, 1, -1]], np.float32), eps=0.0)
        array([[ 1., -1.,  1., -1.]], dtype=float32)
    """
    options = {"eps": eps, "out_dtype": out_dtype}
    run = RMS_NORM.launch((x, weight), options, config=config, target=target)
    result: npt.NDArray[Any] = run.result
    return result


def layer_norm(
    x: npt.NDArray[Any],
    weight: npt.NDArray[Any] | None = None,
    bias: npt.NDArray[Any] | None = None,
    *,
    eps: float = DEFAULT_EPS["layer_norm"],
    out_dtype: Any = None,
    config: LayerNormConfig | None = None,
    target: str | None = None,
) -> npt.NDArray[Any]:
    """Normalise each row to mean 0 and variance 1.

    y[n, h] = (x[n, h] - mean[n]) / sqrt(var[n] + eps) * weight[h] + bias[h]

    mean[n] = mean_h(x[n, :]), var[n] = mean_h((x[n, :] - mean[n])^2), the population's variance.
    Everything is float32 until the one rounding, to nearest even, to the output dtype. The variance
    is centred: a mean far larger than the spread does not cancel it away.

    Dimensions:
        N: rows, >= 1        H: row length, >= 1, at most what SBUF holds (see Raises)

    Args:
        x: [N, H], dense row-major, bfloat16 | float16 | float32.
        weight: [H], dtype of `x`, or None for ones.
        bias: [H], dtype of `x`, or None for zeros.
        eps: added to the variance, >= 0; the kernel has it in float32. With 0 a row of equal values
            is NaN where its mean is exact, and anything where it is rounded.
        out_dtype: dtype of the result, one of the same three; None means the dtype of `x`.
        config: tuning of the kernel; None lets the operator choose. It never changes the
            mathematics, but the order of sums, hence the last bits; so does a row's place among
            the first rows or after them.
        target: hardware generation ("trn2", "trn3", ...). None reads
            NEURON_PLATFORM_TARGET_OVERRIDE and, when that is unset, means trn2.

    Returns:
        [N, H], a new array of dtype `out_dtype`. A row with a NaN or an infinity is NaN;
        one whose squares float32 does not hold is the bias, or 0.

    Raises:
        ShapeError: sizes that differ, a wrong rank, a zero size, a strided array, or an H too
            large for SBUF; the message names the largest. On trn2 it is above 16384 for each dtype.
        DtypeError: a dtype that is not supported (float64, integers), or two different ones.
        OptionError: an `eps` that is negative, or that float32 does not hold.
        ConfigError: a `config` that cannot run on the target.
        ValueError: an unknown target; the message lists the known ones.

    Source: the kernel is `nki_kernels.kernels.norm.layer_norm`.

    Example:
        >>> import numpy as np
        >>> layer_norm(np.array([[3, 1, 3, 1]], np.float32), eps=0.0)
        array([[ 1., -1.,  1., -1.]], dtype=float32)
    """
    options = {"eps": eps, "out_dtype": out_dtype}
    run = LAYER_NORM.launch((x, weight, bias), options, config=config, target=target)
    result: npt.NDArray[Any] = run.result
    return result


def rms_norm_backward(
    dy: npt.NDArray[Any],
    x: npt.NDArray[Any],
    weight: npt.NDArray[Any] | None = None,
    *,
    eps: float = DEFAULT_EPS["rms_norm"],
    out_dtype: Any = None,
    config: RmsNormBackwardConfig | None = None,
    target: str | None = None,
) -> tuple[npt.NDArray[Any], npt.NDArray[Any]]:
    """Gradients of `rms_norm`, given dy, the gradient of its result.

    dx[n, h] = r[n] * (g[n, h] - n[n, h] * mean_h(g[n, :] * n[n, :]))
    dweight[h] = sum_n(dy[n, h] * n[n, h])

    r[n] = 1 / sqrt(mean_h(x[n, :]^2) + eps), n = x * r, g = dy * weight. Everything is float32
    until the one rounding, to nearest even, to the output dtype. Both gradients are formed, without
    a weight too: dweight is then that of a weight of ones.

    Dimensions:
        N: rows, >= 1        H: row length, >= 1, at most what SBUF holds (see Raises)

    Args:
        dy: [N, H], dense row-major, bfloat16 | float16 | float32.
        x: [N, H], dtype of `dy`: the input of the forward pass.
        weight: [H], dtype of `dy`, or None for ones.
        eps: added to the mean square, >= 0; the kernel has it in float32.
        out_dtype: dtype of the results, one of the same three; None means the dtype of `dy`.
        config: tuning of the kernel; None lets the operator choose. It never changes the
            mathematics, but the order of sums, hence the last bits.
        target: hardware generation ("trn2", "trn3", ...). None reads
            NEURON_PLATFORM_TARGET_OVERRIDE and, when that is unset, means trn2.

    Returns:
        dx [N, H] and dweight [H], new arrays of dtype `out_dtype`. A NaN in a row of `x` makes that
        row of dx and all of dweight NaN.

    Raises:
        ShapeError: sizes that differ, a wrong rank, a zero size, a strided array, or an H too
            large for SBUF; the message names the largest. On trn2 it is above 16384 for each dtype.
        DtypeError: a dtype that is not supported (float64, integers), or two different ones.
        OptionError: an `eps` that is negative, or that float32 does not hold.
        ConfigError: a `config` that cannot run on the target.
        ValueError: an unknown target; the message lists the known ones.

    Source: the kernel is `nki_kernels.kernels.norm.rms_norm_backward`.

    Example:
        >>> import numpy as np
        >>> x = np.array([[1, -1, 1, -1]], np.float32)
        >>> rms_norm_backward(np.array([[4, 0, 0, 0]], np.float32), x, eps=0.0)
        (array([[ 3.,  1., -1.,  1.]], dtype=float32), array([4., 0., 0., 0.], dtype=float32))
    """
    options = {"eps": eps, "out_dtype": out_dtype}
    run = RMS_NORM_BACKWARD.launch((dy, x, weight), options, config=config, target=target)
    dx, dweight = run.result
    return dx, dweight


def layer_norm_backward(
    dy: npt.NDArray[Any],
    x: npt.NDArray[Any],
    weight: npt.NDArray[Any] | None = None,
    *,
    eps: float = DEFAULT_EPS["layer_norm"],
    out_dtype: Any = None,
    config: LayerNormBackwardConfig | None = None,
    target: str | None = None,
) -> tuple[npt.NDArray[Any], npt.NDArray[Any], npt.NDArray[Any]]:
    """Gradients of `layer_norm`, given dy, the gradient of its result; the bias has no part in it.

    dx[n, h] = r[n] * (g[n, h] - mean_h(g[n, :]) - n[n, h] * mean_h(g[n, :] * n[n, :]))
    dweight[h] = sum_n(dy[n, h] * n[n, h]);  dbias[h] = sum_n(dy[n, h])

    r[n] = 1 / sqrt(var_h(x[n, :]) + eps), n = (x - mean_h(x)) * r, g = dy * weight. Everything is
    float32, and centred before it is multiplied, until the one rounding, to nearest even, to the
    output dtype. All gradients are formed, without a weight too: dweight is then that of a weight
    of ones.

    Dimensions, arguments, errors: those of `rms_norm_backward`, except that float32 rows end a
    little below 16384 on trn2.

    Returns:
        dx [N, H], dweight [H] and dbias [H], new arrays of dtype `out_dtype`. A NaN or an infinity
        in a row of `x` makes that row of dx and all of dweight NaN.

    Source: the kernel is `nki_kernels.kernels.norm.layer_norm_backward`.

    Example:
        >>> import numpy as np
        >>> x = np.array([[3, 1, 3, 1]], np.float32)
        >>> dx, dweight, dbias = layer_norm_backward(x, x, eps=0.0)
        >>> dx
        array([[0., 0., 0., 0.]], dtype=float32)
        >>> dweight, dbias
        (array([ 3., -1.,  3., -1.], dtype=float32), array([3., 1., 3., 1.], dtype=float32))
    """
    options = {"eps": eps, "out_dtype": out_dtype}
    run = LAYER_NORM_BACKWARD.launch((dy, x, weight), options, config=config, target=target)
    dx, dweight, dbias = run.result
    return dx, dweight, dbias
