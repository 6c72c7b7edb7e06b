# ruff: noqa: D415, D417, E501
"""The types of `functions.py`; written by python -m nki_kernels.torch_ops.stubs."""

import torch
from torch import Tensor

__all__: list[str]

def matmul(
    a: Tensor,
    b: Tensor,
    *,
    out_dtype: torch.dtype | None = None,
    backend: str | None = None,
) -> Tensor:
    """c[m, n] = sum_k a[m, k] * b[k, n], accumulated in float32

    Args:
        a [M, K]: bfloat16 | float16 | float32; any strides.
        b [K, N]: bfloat16 | float16 | float32; any strides.
        out_dtype: dtype of the result; None means that of the inputs.
        backend: neuron, simulator, torch; None means what use() or
            NKI_SIMULATOR asks for, else the default of the tensors' device.

    Returns:
        c [M, N]; new, dense.

    Raises:
        BackendError: the backend asked for cannot run the call.
        ValueError: an unknown backend; an option or values that the contract excludes.
    """

def matmul_nt(
    a: Tensor,
    b: Tensor,
    *,
    out_dtype: torch.dtype | None = None,
    backend: str | None = None,
) -> Tensor:
    """c[m, n] = sum_k a[m, k] * b[n, k], accumulated in float32

    Args:
        a [M, K]: bfloat16 | float16 | float32; any strides.
        b [N, K]: bfloat16 | float16 | float32; any strides.
        out_dtype: dtype of the result; None means that of the inputs.
        backend: neuron, simulator, torch; None means what use() or
            NKI_SIMULATOR asks for, else the default of the tensors' device.

    Returns:
        c [M, N]; new, dense.

    Raises:
        BackendError: the backend asked for cannot run the call.
        ValueError: an unknown backend; an option or values that the contract excludes.
    """

def matmul_tn(
    a: Tensor,
    b: Tensor,
    *,
    out_dtype: torch.dtype | None = None,
    backend: str | None = None,
) -> Tensor:
    """c[m, n] = sum_k a[k, m] * b[k, n], accumulated in float32

    Args:
        a [K, M]: bfloat16 | float16 | float32; any strides.
        b [K, N]: bfloat16 | float16 | float32; any strides.
        out_dtype: dtype of the result; None means that of the inputs.
        backend: neuron, simulator, torch; None means what use() or
            NKI_SIMULATOR asks for, else the default of the tensors' device.

    Returns:
        c [M, N]; new, dense.

    Raises:
        BackendError: the backend asked for cannot run the call.
        ValueError: an unknown backend; an option or values that the contract excludes.
    """

def matmul_tt(
    a: Tensor,
    b: Tensor,
    *,
    out_dtype: torch.dtype | None = None,
    backend: str | None = None,
) -> Tensor:
    """c[m, n] = sum_k a[k, m] * b[n, k], accumulated in float32

    Args:
        a [K, M]: bfloat16 | float16 | float32; any strides.
        b [N, K]: bfloat16 | float16 | float32; any strides.
        out_dtype: dtype of the result; None means that of the inputs.
        backend: neuron, simulator, torch; None means what use() or
            NKI_SIMULATOR asks for, else the default of the tensors' device.

    Returns:
        c [M, N]; new, dense.

    Raises:
        BackendError: the backend asked for cannot run the call.
        ValueError: an unknown backend; an option or values that the contract excludes.
    """

def bmm(
    a: Tensor,
    b: Tensor,
    *,
    out_dtype: torch.dtype | None = None,
    backend: str | None = None,
) -> Tensor:
    """c[b, m, n] = sum_k a[b, m, k] * b[b, k, n], accumulated in float32

    Args:
        a [B, M, K]: bfloat16 | float16 | float32; any strides.
        b [B, K, N]: bfloat16 | float16 | float32; any strides.
        out_dtype: dtype of the result; None means that of the inputs.
        backend: neuron, simulator, torch; None means what use() or
            NKI_SIMULATOR asks for, else the default of the tensors' device.

    Returns:
        c [B, M, N]; new, dense.

    Raises:
        BackendError: the backend asked for cannot run the call.
        ValueError: an unknown backend; an option or values that the contract excludes.
    """

def bmm_nt(
    a: Tensor,
    b: Tensor,
    *,
    out_dtype: torch.dtype | None = None,
    backend: str | None = None,
) -> Tensor:
    """c[b, m, n] = sum_k a[b, m, k] * b[b, n, k], accumulated in float32

    Args:
        a [B, M, K]: bfloat16 | float16 | float32; any strides.
        b [B, N, K]: bfloat16 | float16 | float32; any strides.
        out_dtype: dtype of the result; None means that of the inputs.
        backend: neuron, simulator, torch; None means what use() or
            NKI_SIMULATOR asks for, else the default of the tensors' device.

    Returns:
        c [B, M, N]; new, dense.

    Raises:
        BackendError: the backend asked for cannot run the call.
        ValueError: an unknown backend; an option or values that the contract excludes.
    """

def bmm_tn(
    a: Tensor,
    b: Tensor,
    *,
    out_dtype: torch.dtype | None = None,
    backend: str | None = None,
) -> Tensor:
    """c[b, m, n] = sum_k a[b, k, m] * b[b, k, n], accumulated in float32

    Args:
        a [B, K, M]: bfloat16 | float16 | float32; any strides.
        b [B, K, N]: bfloat16 | float16 | float32; any strides.
        out_dtype: dtype of the result; None means that of the inputs.
        backend: neuron, simulator, torch; None means what use() or
            NKI_SIMULATOR asks for, else the default of the tensors' device.

    Returns:
        c [B, M, N]; new, dense.

    Raises:
        BackendError: the backend asked for cannot run the call.
        ValueError: an unknown backend; an option or values that the contract excludes.
    """

def bmm_tt(
    a: Tensor,
    b: Tensor,
    *,
    out_dtype: torch.dtype | None = None,
    backend: str | None = None,
) -> Tensor:
    """c[b, m, n] = sum_k a[b, k, m] * b[b, n, k], accumulated in float32

    Args:
        a [B, K, M]: bfloat16 | float16 | float32; any strides.
        b [B, N, K]: bfloat16 | float16 | float32; any strides.
        out_dtype: dtype of the result; None means that of the inputs.
        backend: neuron, simulator, torch; None means what use() or
            NKI_SIMULATOR asks for, else the default of the tensors' device.

    Returns:
        c [B, M, N]; new, dense.

    Raises:
        BackendError: the backend asked for cannot run the call.
        ValueError: an unknown backend; an option or values that the contract excludes.
    """

def matmul_fp8(
    a: Tensor,
    b: Tensor,
    *,
    scale: float = 1.0,
    out_dtype: torch.dtype | None = None,
    backend: str | None = None,
) -> Tensor:
    """c[m, n] = scale * sum_k a[m, k] * b[k, n] of fp8 operands

    Args:
        a [M, K]: float8_e4m3 | float8_e5m2; any strides.
        b [K, N]: float8_e4m3 | float8_e5m2; any strides.
        scale: factor of the sum: the product of the scales of the operands.
        out_dtype: dtype of the result; None means bfloat16.
        backend: neuron, simulator, torch; None means what use() or
            NKI_SIMULATOR asks for, else the default of the tensors' device.

    Returns:
        c [M, N]; new, dense.

    Raises:
        BackendError: the backend asked for cannot run the call.
        ValueError: an unknown backend; an option or values that the contract excludes.
    """

def matmul_fp8_nt(
    a: Tensor,
    b: Tensor,
    *,
    scale: float = 1.0,
    out_dtype: torch.dtype | None = None,
    backend: str | None = None,
) -> Tensor:
    """c[m, n] = scale * sum_k a[m, k] * b[n, k] of fp8 operands

    Args:
        a [M, K]: float8_e4m3 | float8_e5m2; any strides.
        b [N, K]: float8_e4m3 | float8_e5m2; any strides.
        scale: factor of the sum: the product of the scales of the operands.
        out_dtype: dtype of the result; None means bfloat16.
        backend: neuron, simulator, torch; None means what use() or
            NKI_SIMULATOR asks for, else the default of the tensors' device.

    Returns:
        c [M, N]; new, dense.

    Raises:
        BackendError: the backend asked for cannot run the call.
        ValueError: an unknown backend; an option or values that the contract excludes.
    """

def linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    residual: Tensor | None = None,
    *,
    activation: str | None = None,
    scale: float = 1.0,
    out_dtype: torch.dtype | None = None,
    backend: str | None = None,
) -> Tensor:
    """y[m, n] = activation(scale * sum_k x[m, k] * weight[n, k] + bias[n]) + residual[m, n]

    Args:
        x [M, K]: bfloat16 | float16 | float32; any strides.
        weight [N, K]: bfloat16 | float16 | float32; any strides.
        bias [N]: bfloat16 | float16 | float32; any strides.
        residual [M, N]: bfloat16 | float16 | float32; any strides.
        activation: None, relu, silu, gelu, gelu_tanh.
        scale: factor of the product.
        out_dtype: dtype of the result; None means that of x.
        backend: neuron, simulator, torch; None means what use() or
            NKI_SIMULATOR asks for, else the default of the tensors' device.

    Returns:
        y [M, N]; new, dense.

    Raises:
        BackendError: the backend asked for cannot run the call.
        ValueError: an unknown backend; an option or values that the contract excludes.
    """

def linear_kn(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    residual: Tensor | None = None,
    *,
    activation: str | None = None,
    scale: float = 1.0,
    out_dtype: torch.dtype | None = None,
    backend: str | None = None,
) -> Tensor:
    """y[m, n] = activation(scale * sum_k x[m, k] * weight[k, n] + bias[n]) + residual[m, n]

    Args:
        x [M, K]: bfloat16 | float16 | float32; any strides.
        weight [K, N]: bfloat16 | float16 | float32; any strides.
        bias [N]: bfloat16 | float16 | float32; any strides.
        residual [M, N]: bfloat16 | float16 | float32; any strides.
        activation: None, relu, silu, gelu, gelu_tanh.
        scale: factor of the product.
        out_dtype: dtype of the result; None means that of x.
        backend: neuron, simulator, torch; None means what use() or
            NKI_SIMULATOR asks for, else the default of the tensors' device.

    Returns:
        y [M, N]; new, dense.

    Raises:
        BackendError: the backend asked for cannot run the call.
        ValueError: an unknown backend; an option or values that the contract excludes.
    """

def linear_backward(
    dy: Tensor,
    x: Tensor,
    weight: Tensor,
    *,
    out_dtype: torch.dtype | None = None,
    backend: str | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """dx = dy·weight; dweight = dyᵀ·x; dbias[n] = sum_m dy[m, n]

    Args:
        dy [M, N]: bfloat16 | float16 | float32; any strides.
        x [M, K]: bfloat16 | float16 | float32; any strides.
        weight [N, K]: bfloat16 | float16 | float32; any strides.
        out_dtype: dtype of the results; None means that of dy.
        backend: neuron, simulator, torch; None means what use() or
            NKI_SIMULATOR asks for, else the default of the tensors' device.

    Returns:
        dx [M, K], dweight [N, K], dbias [N]; new, dense.

    Raises:
        BackendError: the backend asked for cannot run the call.
        ValueError: an unknown backend; an option or values that the contract excludes.
    """

def gated_mlp(
    x: Tensor,
    gate: Tensor,
    up: Tensor,
    down: Tensor,
    *,
    activation: str = "silu",
    out_dtype: torch.dtype | None = None,
    backend: str | None = None,
) -> Tensor:
    """y = (activation(x·gate) * (x·up))·down

    Args:
        x [T, H]: bfloat16 | float16 | float32; any strides.
        gate [I, H]: bfloat16 | float16 | float32; any strides.
        up [I, H]: bfloat16 | float16 | float32; any strides.
        down [H, I]: bfloat16 | float16 | float32; any strides.
        activation: relu, silu, gelu, gelu_tanh.
        out_dtype: dtype of the result; None means that of x.
        backend: neuron, simulator, torch; None means what use() or
            NKI_SIMULATOR asks for, else the default of the tensors' device.

    Returns:
        y [T, H]; new, dense.

    Raises:
        BackendError: the backend asked for cannot run the call.
        ValueError: an unknown backend; an option or values that the contract excludes.
    """

def gated_mlp_kn(
    x: Tensor,
    gate: Tensor,
    up: Tensor,
    down: Tensor,
    *,
    activation: str = "silu",
    out_dtype: torch.dtype | None = None,
    backend: str | None = None,
) -> Tensor:
    """y = (activation(x·gate) * (x·up))·down

    Args:
        x [T, H]: bfloat16 | float16 | float32; any strides.
        gate [H, I]: bfloat16 | float16 | float32; any strides.
        up [H, I]: bfloat16 | float16 | float32; any strides.
        down [I, H]: bfloat16 | float16 | float32; any strides.
        activation: relu, silu, gelu, gelu_tanh.
        out_dtype: dtype of the result; None means that of x.
        backend: neuron, simulator, torch; None means what use() or
            NKI_SIMULATOR asks for, else the default of the tensors' device.

    Returns:
        y [T, H]; new, dense.

    Raises:
        BackendError: the backend asked for cannot run the call.
        ValueError: an unknown backend; an option or values that the contract excludes.
    """

def gated_mlp_backward(
    dy: Tensor,
    x: Tensor,
    gate: Tensor,
    up: Tensor,
    down: Tensor,
    *,
    activation: str = "silu",
    out_dtype: torch.dtype | None = None,
    backend: str | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """gradients of y = (activation(x·gateᵀ) * (x·upᵀ))·downᵀ

    Args:
        dy [T, H]: bfloat16 | float16 | float32; any strides.
        x [T, H]: bfloat16 | float16 | float32; any strides.
        gate [I, H]: bfloat16 | float16 | float32; any strides.
        up [I, H]: bfloat16 | float16 | float32; any strides.
        down [H, I]: bfloat16 | float16 | float32; any strides.
        activation: relu, silu, gelu, gelu_tanh.
        out_dtype: dtype of the results; None means that of x.
        backend: neuron, simulator, torch; None means what use() or
            NKI_SIMULATOR asks for, else the default of the tensors' device.

    Returns:
        dx [T, H], dgate [I, H], dup [I, H], ddown [H, I]; new, dense.

    Raises:
        BackendError: the backend asked for cannot run the call.
        ValueError: an unknown backend; an option or values that the contract excludes.
    """

def gated_mlp_backward_kept(
    dy: Tensor,
    x: Tensor,
    gate: Tensor,
    up: Tensor,
    down: Tensor,
    x_gate: Tensor,
    x_up: Tensor,
    *,
    activation: str = "silu",
    out_dtype: torch.dtype | None = None,
    backend: str | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """gradients of y = (activation(x·gateᵀ) * (x·upᵀ))·downᵀ, from x_gate = x·gateᵀ and x_up = x·upᵀ

    Args:
        dy [T, H]: bfloat16 | float16 | float32; any strides.
        x [T, H]: bfloat16 | float16 | float32; any strides.
        gate [I, H]: bfloat16 | float16 | float32; any strides.
        up [I, H]: bfloat16 | float16 | float32; any strides.
        down [H, I]: bfloat16 | float16 | float32; any strides.
        x_gate [T, I]: bfloat16 | float16 | float32; any strides.
        x_up [T, I]: bfloat16 | float16 | float32; any strides.
        activation: relu, silu, gelu, gelu_tanh.
        out_dtype: dtype of the results; None means that of x.
        backend: neuron, simulator, torch; None means what use() or
            NKI_SIMULATOR asks for, else the default of the tensors' device.

    Returns:
        dx [T, H], dgate [I, H], dup [I, H], ddown [H, I]; new, dense.

    Raises:
        BackendError: the backend asked for cannot run the call.
        ValueError: an unknown backend; an option or values that the contract excludes.
    """

def norm_linear(
    x: Tensor,
    norm_weight: Tensor | None,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    eps: float = 1e-06,
    out_dtype: torch.dtype | None = None,
    backend: str | None = None,
) -> Tensor:
    """y[m, n] = sum_k x[m, k] * norm_weight[k] * weight[n, k] / sqrt(mean_k(x[m, :]^2) + eps) + bias[n]

    Args:
        x [M, K]: bfloat16 | float32; any strides.
        norm_weight [K]: bfloat16 | float32; any strides.
        weight [N, K]: bfloat16 | float32; any strides.
        bias [N]: bfloat16 | float32; any strides.
        eps: added to each mean square.
        out_dtype: dtype of the results; None means that of x.
        backend: neuron, simulator, torch; None means what use() or
            NKI_SIMULATOR asks for, else the default of the tensors' device.

    Returns:
        y [M, N]; new, dense.

    Raises:
        BackendError: the backend asked for cannot run the call.
        ValueError: an unknown backend; an option or values that the contract excludes.
    """

def norm_linear_kn(
    x: Tensor,
    norm_weight: Tensor | None,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    eps: float = 1e-06,
    out_dtype: torch.dtype | None = None,
    backend: str | None = None,
) -> Tensor:
    """y[m, n] = sum_k x[m, k] * norm_weight[k] * weight[k, n] / sqrt(mean_k(x[m, :]^2) + eps) + bias[n]

    Args:
        x [M, K]: bfloat16 | float32; any strides.
        norm_weight [K]: bfloat16 | float32; any strides.
        weight [K, N]: bfloat16 | float32; any strides.
        bias [N]: bfloat16 | float32; any strides.
        eps: added to each mean square.
        out_dtype: dtype of the results; None means that of x.
        backend: neuron, simulator, torch; None means what use() or
            NKI_SIMULATOR asks for, else the default of the tensors' device.

    Returns:
        y [M, N]; new, dense.

    Raises:
        BackendError: the backend asked for cannot run the call.
        ValueError: an unknown backend; an option or values that the contract excludes.
    """

def qkv_projection(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    norm_weight: Tensor | None = None,
    q_norm: Tensor | None = None,
    k_norm: Tensor | None = None,
    cos: Tensor | None = None,
    sin: Tensor | None = None,
    *,
    heads: int,
    kv_heads: int,
    eps: float = 1e-06,
    out_dtype: torch.dtype | None = None,
    backend: str | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """q, k, v = heads of norm(x)·weight + bias; q and k normalised by head and rotated

    Args:
        x [T, H]: bfloat16 | float32; any strides.
        weight [C, D, H]: bfloat16 | float32; any strides.
        bias [C, D]: bfloat16 | float32; any strides.
        norm_weight [H]: bfloat16 | float32; any strides.
        q_norm [D]: bfloat16 | float32; any strides.
        k_norm [D]: bfloat16 | float32; any strides.
        cos [T, F]: float32; any strides.
        sin [T, F]: float32; any strides.
        heads: heads of q.
        kv_heads: heads of k and of v.
        eps: added to each mean square.
        out_dtype: dtype of the results; None means that of x.
        backend: neuron, simulator, torch; None means what use() or
            NKI_SIMULATOR asks for, else the default of the tensors' device.

    Returns:
        q [T, Q, D], k [T, G, D], v [T, G, D]; new, dense.

    Raises:
        BackendError: the backend asked for cannot run the call.
        ValueError: an unknown backend; an option or values that the contract excludes.
    """

def qkv_projection_kn(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    norm_weight: Tensor | None = None,
    q_norm: Tensor | None = None,
    k_norm: Tensor | None = None,
    cos: Tensor | None = None,
    sin: Tensor | None = None,
    *,
    heads: int,
    kv_heads: int,
    eps: float = 1e-06,
    out_dtype: torch.dtype | None = None,
    backend: str | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """q, k, v = heads of norm(x)·weight + bias; q and k normalised by head and rotated

    Args:
        x [T, H]: bfloat16 | float32; any strides.
        weight [H, C, D]: bfloat16 | float32; any strides.
        bias [C, D]: bfloat16 | float32; any strides.
        norm_weight [H]: bfloat16 | float32; any strides.
        q_norm [D]: bfloat16 | float32; any strides.
        k_norm [D]: bfloat16 | float32; any strides.
        cos [T, F]: float32; any strides.
        sin [T, F]: float32; any strides.
        heads: heads of q.
        kv_heads: heads of k and of v.
        eps: added to each mean square.
        out_dtype: dtype of the results; None means that of x.
        backend: neuron, simulator, torch; None means what use() or
            NKI_SIMULATOR asks for, else the default of the tensors' device.

    Returns:
        q [T, Q, D], k [T, G, D], v [T, G, D]; new, dense.

    Raises:
        BackendError: the backend asked for cannot run the call.
        ValueError: an unknown backend; an option or values that the contract excludes.
    """

def rms_norm(
    x: Tensor,
    weight: Tensor | None = None,
    *,
    eps: float = 1e-06,
    out_dtype: torch.dtype | None = None,
    backend: str | None = None,
) -> Tensor:
    """y[n, h] = x[n, h] / sqrt(mean_h(x[n, :]^2) + eps) * weight[h]

    Args:
        x [N, H]: bfloat16 | float16 | float32; any strides.
        weight [H]: bfloat16 | float16 | float32; any strides.
        eps: added to the mean square or the variance.
        out_dtype: dtype of the result; None means that of x.
        backend: neuron, simulator, torch; None means what use() or
            NKI_SIMULATOR asks for, else the default of the tensors' device.

    Returns:
        y [N, H]; new, dense.

    Raises:
        BackendError: the backend asked for cannot run the call.
        ValueError: an unknown backend; an option or values that the contract excludes.
    """

def layer_norm(
    x: Tensor,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    *,
    eps: float = 1e-05,
    out_dtype: torch.dtype | None = None,
    backend: str | None = None,
) -> Tensor:
    """y[n, h] = (x[n, h] - mean[n]) / sqrt(var[n] + eps) * weight[h] + bias[h]

    Args:
        x [N, H]: bfloat16 | float16 | float32; any strides.
        weight [H]: bfloat16 | float16 | float32; any strides.
        bias [H]: bfloat16 | float16 | float32; any strides.
        eps: added to the mean square or the variance.
        out_dtype: dtype of the result; None means that of x.
        backend: neuron, simulator, torch; None means what use() or
            NKI_SIMULATOR asks for, else the default of the tensors' device.

    Returns:
        y [N, H]; new, dense.

    Raises:
        BackendError: the backend asked for cannot run the call.
        ValueError: an unknown backend; an option or values that the contract excludes.
    """

def rms_norm_backward(
    dy: Tensor,
    x: Tensor,
    weight: Tensor | None = None,
    *,
    eps: float = 1e-06,
    out_dtype: torch.dtype | None = None,
    backend: str | None = None,
) -> tuple[Tensor, Tensor]:
    """dx, dweight of rms_norm: dx = r * (g - n * mean_h(g * n)), dweight = sum_n(dy * n)

    Args:
        dy [N, H]: bfloat16 | float16 | float32; any strides.
        x [N, H]: bfloat16 | float16 | float32; any strides.
        weight [H]: bfloat16 | float16 | float32; any strides.
        eps: added to the mean square or the variance.
        out_dtype: dtype of the results; None means that of dy.
        backend: neuron, simulator, torch; None means what use() or
            NKI_SIMULATOR asks for, else the default of the tensors' device.

    Returns:
        dx [N, H], dweight [H]; new, dense.

    Raises:
        BackendError: the backend asked for cannot run the call.
        ValueError: an unknown backend; an option or values that the contract excludes.
    """

def layer_norm_backward(
    dy: Tensor,
    x: Tensor,
    weight: Tensor | None = None,
    *,
    eps: float = 1e-05,
    out_dtype: torch.dtype | None = None,
    backend: str | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """dx, dweight, dbias of layer_norm: dx = r * (g - mean_h(g) - n * mean_h(g * n))

    Args:
        dy [N, H]: bfloat16 | float16 | float32; any strides.
        x [N, H]: bfloat16 | float16 | float32; any strides.
        weight [H]: bfloat16 | float16 | float32; any strides.
        eps: added to the mean square or the variance.
        out_dtype: dtype of the results; None means that of dy.
        backend: neuron, simulator, torch; None means what use() or
            NKI_SIMULATOR asks for, else the default of the tensors' device.

    Returns:
        dx [N, H], dweight [H], dbias [H]; new, dense.

    Raises:
        BackendError: the backend asked for cannot run the call.
        ValueError: an unknown backend; an option or values that the contract excludes.
    """

def add_rms_norm(
    x: Tensor,
    residual: Tensor,
    weight: Tensor | None = None,
    *,
    eps: float = 1e-06,
    backend: str | None = None,
) -> tuple[Tensor, Tensor]:
    """total = x + residual; y = rms_norm(total)

    Args:
        x [N, H]: bfloat16 | float16 | float32; any strides.
        residual [N, H]: bfloat16 | float16 | float32; any strides.
        weight [H]: bfloat16 | float16 | float32; any strides.
        eps: added to the mean square or the variance.
        backend: neuron, simulator, torch; None means what use() or
            NKI_SIMULATOR asks for, else the default of the tensors' device.

    Returns:
        total [N, H], y [N, H]; new, dense.

    Raises:
        BackendError: the backend asked for cannot run the call.
        ValueError: an unknown backend; an option or values that the contract excludes.
    """

def add_layer_norm(
    x: Tensor,
    residual: Tensor,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    *,
    eps: float = 1e-05,
    backend: str | None = None,
) -> tuple[Tensor, Tensor]:
    """total = x + residual; y = layer_norm(total)

    Args:
        x [N, H]: bfloat16 | float16 | float32; any strides.
        residual [N, H]: bfloat16 | float16 | float32; any strides.
        weight [H]: bfloat16 | float16 | float32; any strides.
        bias [H]: bfloat16 | float16 | float32; any strides.
        eps: added to the mean square or the variance.
        backend: neuron, simulator, torch; None means what use() or
            NKI_SIMULATOR asks for, else the default of the tensors' device.

    Returns:
        total [N, H], y [N, H]; new, dense.

    Raises:
        BackendError: the backend asked for cannot run the call.
        ValueError: an unknown backend; an option or values that the contract excludes.
    """

def group_norm(
    x: Tensor,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    *,
    num_groups: int,
    eps: float = 1e-05,
    out_dtype: torch.dtype | None = None,
    backend: str | None = None,
) -> Tensor:
    """y[n, c, s] = (x[n, c, s] - mean) / sqrt(var + eps) * weight[c] + bias[c], by group

    Args:
        x [N, C, S]: bfloat16 | float16 | float32; any strides.
        weight [C]: bfloat16 | float16 | float32; any strides.
        bias [C]: bfloat16 | float16 | float32; any strides.
        num_groups: groups of neighbouring channels; it divides C.
        eps: added to the mean square or the variance.
        out_dtype: dtype of the result; None means that of x.
        backend: neuron, simulator, torch; None means what use() or
            NKI_SIMULATOR asks for, else the default of the tensors' device.

    Returns:
        y [N, C, S]; new, dense.

    Raises:
        BackendError: the backend asked for cannot run the call.
        ValueError: an unknown backend; an option or values that the contract excludes.
    """

def rms_norm_llama(
    x: Tensor,
    weight: Tensor,
    *,
    eps: float = 1e-06,
    backend: str | None = None,
) -> Tensor:
    """y = round(x / rms) * weight, rounded twice

    Args:
        x [N, H]: bfloat16 | float16 | float32; any strides.
        weight [H]: bfloat16 | float16 | float32; any strides.
        eps: added to the mean square or the variance.
        backend: neuron, simulator, torch; None means what use() or
            NKI_SIMULATOR asks for, else the default of the tensors' device.

    Returns:
        y [N, H]; new, dense.

    Raises:
        BackendError: the backend asked for cannot run the call.
        ValueError: an unknown backend; an option or values that the contract excludes.
    """

def rms_norm_gemma(
    x: Tensor,
    weight: Tensor,
    *,
    eps: float = 1e-06,
    backend: str | None = None,
) -> Tensor:
    """y = x / rms * (1 + weight), rounded once

    Args:
        x [N, H]: bfloat16 | float16 | float32; any strides.
        weight [H]: bfloat16 | float16 | float32; any strides.
        eps: added to the mean square or the variance.
        backend: neuron, simulator, torch; None means what use() or
            NKI_SIMULATOR asks for, else the default of the tensors' device.

    Returns:
        y [N, H]; new, dense.

    Raises:
        BackendError: the backend asked for cannot run the call.
        ValueError: an unknown backend; an option or values that the contract excludes.
    """

def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    sinks: Tensor | None = None,
    mask: Tensor | None = None,
    bias: Tensor | None = None,
    *,
    causal: bool = False,
    align: str = "top-left",
    window: int | None = None,
    scale: float | None = None,
    softcap: float | None = None,
    slopes: list[float] | None = None,
    backend: str | None = None,
) -> tuple[Tensor, Tensor]:
    """out[i] = sum_j softmax_j(scale * q[i].k[j]) * v[j]; lse[i] = log sum_j exp

    Args:
        q [B, H, M, D]: bfloat16 | float16 | float32; any strides.
        k [B, G, N, D]: bfloat16 | float16 | float32; any strides.
        v [B, G, N, E]: bfloat16 | float16 | float32; any strides.
        sinks [H]: float32; any strides.
        mask [P, Q, M, N]: uint8; any strides.
        bias [R, S, M, N]: bfloat16 | float16 | float32; any strides.
        mask: may be bool as well: True to attend.
        causal: attend keys j <= i.
        align: top-left or bottom-right: where the causal diagonal begins.
        window: attend only keys j > i - window, and, without causal, j < i + window.
        scale: None is 1 / sqrt(D).
        softcap: scores become softcap * tanh(score / softcap); None is no cap.
        backend: neuron, simulator, torch; None means what use() or
            NKI_SIMULATOR asks for, else the default of the tensors' device.

    Returns:
        out [B, H, M, E], lse [B, H, M]; new, dense.

    Raises:
        BackendError: the backend asked for cannot run the call.
        ValueError: an unknown backend; an option or values that the contract excludes.
    """

def causal_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    align: str = "top-left",
    window: int | None = None,
    scale: float | None = None,
    softcap: float | None = None,
    slopes: list[float] | None = None,
    backend: str | None = None,
) -> tuple[Tensor, Tensor]:
    """out[i] = sum_j softmax_j(scale * q[i].k[j]) * v[j]; lse[i] = log sum_j exp

    Args:
        q [B, H, M, D]: bfloat16 | float16 | float32; any strides.
        k [B, G, N, D]: bfloat16 | float16 | float32; any strides.
        v [B, G, N, E]: bfloat16 | float16 | float32; any strides.
        align: top-left or bottom-right: where the causal diagonal begins.
        window: attend only keys j > i - window, and, without causal, j < i + window.
        scale: None is 1 / sqrt(D).
        softcap: scores become softcap * tanh(score / softcap); None is no cap.
        slopes: ALiBi: one number per query head; scores lose slope * |i - j|.
        backend: neuron, simulator, torch; None means what use() or
            NKI_SIMULATOR asks for, else the default of the tensors' device.

    Returns:
        out [B, H, M, E], lse [B, H, M]; new, dense.

    Raises:
        BackendError: the backend asked for cannot run the call.
        ValueError: an unknown backend; an option or values that the contract excludes.
    """

def attention_varlen(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens: Tensor,
    *,
    max_seqlen: int,
    window: int | None = None,
    scale: float | None = None,
    softcap: float | None = None,
    backend: str | None = None,
) -> tuple[Tensor, Tensor]:
    """out[i] = sum_j softmax_j(scale * q[i].k[j]) * v[j]; lse[i] = log sum_j exp

    Args:
        q [B, H, M, D]: bfloat16 | float16 | float32; any strides.
        k [B, G, M, D]: bfloat16 | float16 | float32; any strides.
        v [B, G, M, E]: bfloat16 | float16 | float32; any strides.
        cu_seqlens [C]: int32; any strides.
        max_seqlen: a number that no length exceeds; cost grows with it.
        window: attend only keys j > i - window, and, without causal, j < i + window.
        scale: None is 1 / sqrt(D).
        softcap: scores become softcap * tanh(score / softcap); None is no cap.
        backend: neuron, simulator, torch; None means what use() or
            NKI_SIMULATOR asks for, else the default of the tensors' device.

    Returns:
        out [B, H, M, E], lse [B, H, M]; new, dense.

    Raises:
        BackendError: the backend asked for cannot run the call.
        ValueError: an unknown backend; an option or values that the contract excludes.
    """

def causal_attention_varlen(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens: Tensor,
    *,
    max_seqlen: int,
    window: int | None = None,
    scale: float | None = None,
    softcap: float | None = None,
    backend: str | None = None,
) -> tuple[Tensor, Tensor]:
    """out[i] = sum_j softmax_j(scale * q[i].k[j]) * v[j]; lse[i] = log sum_j exp

    Args:
        q [B, H, M, D]: bfloat16 | float16 | float32; any strides.
        k [B, G, M, D]: bfloat16 | float16 | float32; any strides.
        v [B, G, M, E]: bfloat16 | float16 | float32; any strides.
        cu_seqlens [C]: int32; any strides.
        max_seqlen: a number that no length exceeds; cost grows with it.
        window: attend only keys j > i - window, and, without causal, j < i + window.
        scale: None is 1 / sqrt(D).
        softcap: scores become softcap * tanh(score / softcap); None is no cap.
        backend: neuron, simulator, torch; None means what use() or
            NKI_SIMULATOR asks for, else the default of the tensors' device.

    Returns:
        out [B, H, M, E], lse [B, H, M]; new, dense.

    Raises:
        BackendError: the backend asked for cannot run the call.
        ValueError: an unknown backend; an option or values that the contract excludes.
    """

def attention_backward(
    do: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    sinks: Tensor | None = None,
    mask: Tensor | None = None,
    bias: Tensor | None = None,
    *,
    causal: bool = False,
    align: str = "top-left",
    window: int | None = None,
    scale: float | None = None,
    softcap: float | None = None,
    backend: str | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """dq, dk, dv of attention: ds = p * (do.v - do.out), p = exp(scale * q.k - lse)

    Args:
        do [B, H, M, E]: bfloat16 | float16 | float32; any strides.
        q [B, H, M, D]: bfloat16 | float16 | float32; any strides.
        k [B, G, N, D]: bfloat16 | float16 | float32; any strides.
        v [B, G, N, E]: bfloat16 | float16 | float32; any strides.
        out [B, H, M, E]: bfloat16 | float16 | float32; any strides.
        lse [B, H, M]: float32; any strides.
        sinks [H]: float32; any strides.
        mask [P, Q, M, N]: uint8; any strides.
        bias [R, S, M, N]: bfloat16 | float16 | float32; any strides.
        mask: may be bool as well: True to attend.
        causal: attend keys j <= i.
        align: top-left or bottom-right: where the causal diagonal begins.
        window: attend only keys j > i - window, and, without causal, j < i + window.
        scale: None is 1 / sqrt(D).
        softcap: scores become softcap * tanh(score / softcap); None is no cap.
        backend: neuron, simulator, torch; None means what use() or
            NKI_SIMULATOR asks for, else the default of the tensors' device.

    Returns:
        dq [B, H, M, D], dk [B, G, N, D], dv [B, G, N, E], dsinks [H], dbias [R, S, M, N]; new, dense.

    Raises:
        BackendError: the backend asked for cannot run the call.
        ValueError: an unknown backend; an option or values that the contract excludes.
    """

def causal_attention_backward(
    do: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    *,
    align: str = "top-left",
    window: int | None = None,
    scale: float | None = None,
    softcap: float | None = None,
    backend: str | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """dq, dk, dv of attention: ds = p * (do.v - do.out), p = exp(scale * q.k - lse)

    Args:
        do [B, H, M, E]: bfloat16 | float16 | float32; any strides.
        q [B, H, M, D]: bfloat16 | float16 | float32; any strides.
        k [B, G, N, D]: bfloat16 | float16 | float32; any strides.
        v [B, G, N, E]: bfloat16 | float16 | float32; any strides.
        out [B, H, M, E]: bfloat16 | float16 | float32; any strides.
        lse [B, H, M]: float32; any strides.
        align: top-left or bottom-right: where the causal diagonal begins.
        window: attend only keys j > i - window, and, without causal, j < i + window.
        scale: None is 1 / sqrt(D).
        softcap: scores become softcap * tanh(score / softcap); None is no cap.
        backend: neuron, simulator, torch; None means what use() or
            NKI_SIMULATOR asks for, else the default of the tensors' device.

    Returns:
        dq [B, H, M, D], dk [B, G, N, D], dv [B, G, N, E]; new, dense.

    Raises:
        BackendError: the backend asked for cannot run the call.
        ValueError: an unknown backend; an option or values that the contract excludes.
    """

def attention_decode(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    lengths: Tensor,
    sinks: Tensor | None = None,
    *,
    scale: float | None = None,
    window: int | None = None,
    softcap: float | None = None,
    backend: str | None = None,
) -> tuple[Tensor, Tensor]:
    """out = softmax(scale * q.k) v over the first keys of a cache; lse = log sum exp

    Args:
        q [B, H, T, D]: bfloat16 | float16 | float32; any strides.
        k [B, G, S, D]: bfloat16 | float16 | float32; any strides.
        v [B, G, S, E]: bfloat16 | float16 | float32; any strides.
        lengths [B]: int32; any strides.
        sinks [H]: float32; any strides.
        scale: None is 1 / sqrt(D).
        window: keys a query attends, counted back from its own; None is no limit.
        softcap: scores become softcap * tanh(score / softcap); None is no cap.
        backend: neuron, simulator, torch; None means what use() or
            NKI_SIMULATOR asks for, else the default of the tensors' device.

    Returns:
        out [B, H, T, E], lse [B, H, T]; new, dense.

    Raises:
        BackendError: the backend asked for cannot run the call.
        ValueError: an unknown backend; an option or values that the contract excludes.
    """

def attention_decode_fp8(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    lengths: Tensor,
    sinks: Tensor | None,
    k_scale: Tensor,
    v_scale: Tensor,
    *,
    scale: float | None = None,
    window: int | None = None,
    softcap: float | None = None,
    backend: str | None = None,
) -> tuple[Tensor, Tensor]:
    """out = softmax(scale * q.k) v over the first keys of a cache; lse = log sum exp

    Args:
        q [B, H, T, D]: bfloat16 | float16; any strides.
        k [B, G, S, D]: float8_e4m3; any strides.
        v [B, G, S, E]: float8_e4m3; any strides.
        lengths [B]: int32; any strides.
        sinks [H]: float32; any strides.
        k_scale [G]: float32; any strides.
        v_scale [G]: float32; any strides.
        scale: None is 1 / sqrt(D).
        window: keys a query attends, counted back from its own; None is no limit.
        softcap: scores become softcap * tanh(score / softcap); None is no cap.
        backend: neuron, simulator, torch; None means what use() or
            NKI_SIMULATOR asks for, else the default of the tensors' device.

    Returns:
        out [B, H, T, E], lse [B, H, T]; new, dense.

    Raises:
        BackendError: the backend asked for cannot run the call.
        ValueError: an unknown backend; an option or values that the contract excludes.
    """

def attention_decode_paged(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    table: Tensor,
    lengths: Tensor,
    sinks: Tensor | None = None,
    *,
    scale: float | None = None,
    window: int | None = None,
    softcap: float | None = None,
    backend: str | None = None,
) -> tuple[Tensor, Tensor]:
    """out = softmax(scale * q.k) v over the first keys of a cache; lse = log sum exp

    Args:
        q [B, H, T, D]: bfloat16 | float16 | float32; any strides.
        k [N, G, P, D]: bfloat16 | float16 | float32; any strides.
        v [N, G, P, E]: bfloat16 | float16 | float32; any strides.
        table [B, W]: int32; any strides.
        lengths [B]: int32; any strides.
        sinks [H]: float32; any strides.
        scale: None is 1 / sqrt(D).
        window: keys a query attends, counted back from its own; None is no limit.
        softcap: scores become softcap * tanh(score / softcap); None is no cap.
        backend: neuron, simulator, torch; None means what use() or
            NKI_SIMULATOR asks for, else the default of the tensors' device.

    Returns:
        out [B, H, T, E], lse [B, H, T]; new, dense.

    Raises:
        BackendError: the backend asked for cannot run the call.
        ValueError: an unknown backend; an option or values that the contract excludes.
    """

def attention_decode_paged_fp8(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    table: Tensor,
    lengths: Tensor,
    sinks: Tensor | None,
    k_scale: Tensor,
    v_scale: Tensor,
    *,
    scale: float | None = None,
    window: int | None = None,
    softcap: float | None = None,
    backend: str | None = None,
) -> tuple[Tensor, Tensor]:
    """out = softmax(scale * q.k) v over the first keys of a cache; lse = log sum exp

    Args:
        q [B, H, T, D]: bfloat16 | float16; any strides.
        k [N, G, P, D]: float8_e4m3; any strides.
        v [N, G, P, E]: float8_e4m3; any strides.
        table [B, W]: int32; any strides.
        lengths [B]: int32; any strides.
        sinks [H]: float32; any strides.
        k_scale [G]: float32; any strides.
        v_scale [G]: float32; any strides.
        scale: None is 1 / sqrt(D).
        window: keys a query attends, counted back from its own; None is no limit.
        softcap: scores become softcap * tanh(score / softcap); None is no cap.
        backend: neuron, simulator, torch; None means what use() or
            NKI_SIMULATOR asks for, else the default of the tensors' device.

    Returns:
        out [B, H, T, E], lse [B, H, T]; new, dense.

    Raises:
        BackendError: the backend asked for cannot run the call.
        ValueError: an unknown backend; an option or values that the contract excludes.
    """

def attention_chunked_prefill(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    table: Tensor,
    lengths: Tensor,
    sinks: Tensor | None = None,
    *,
    scale: float | None = None,
    window: int | None = None,
    softcap: float | None = None,
    backend: str | None = None,
) -> tuple[Tensor, Tensor]:
    """out = softmax(scale * q.k) v over the first keys of a paged cache; many queries

    Args:
        q [B, H, T, D]: bfloat16 | float16 | float32; any strides.
        k [N, G, P, D]: bfloat16 | float16 | float32; any strides.
        v [N, G, P, E]: bfloat16 | float16 | float32; any strides.
        table [B, W]: int32; any strides.
        lengths [B]: int32; any strides.
        sinks [H]: float32; any strides.
        scale: None is 1 / sqrt(D).
        window: keys a query attends, counted back from its own; None is no limit.
        softcap: scores become softcap * tanh(score / softcap); None is no cap.
        backend: neuron, simulator, torch; None means what use() or
            NKI_SIMULATOR asks for, else the default of the tensors' device.

    Returns:
        out [B, H, T, E], lse [B, H, T]; new, dense.

    Raises:
        BackendError: the backend asked for cannot run the call.
        ValueError: an unknown backend; an option or values that the contract excludes.
    """

def mla_decode(
    q: Tensor,
    cache: Tensor,
    lengths: Tensor,
    *,
    value_size: int,
    scale: float | None = None,
    window: int | None = None,
    backend: str | None = None,
) -> tuple[Tensor, Tensor]:
    """out = softmax(scale * q.c) c[:E] over the first rows of a cache; lse

    Args:
        q [B, H, T, D]: bfloat16 | float16 | float32; any strides.
        cache [B, S, D]: bfloat16 | float16 | float32; any strides.
        lengths [B]: int32; any strides.
        value_size: columns of a row of the cache that are its value.
        scale: None is 1 / sqrt(D).
        window: keys a query attends, counted back from its own; None is no limit.
        backend: neuron, simulator, torch; None means what use() or
            NKI_SIMULATOR asks for, else the default of the tensors' device.

    Returns:
        out [B, H, T, E], lse [B, H, T]; new, dense.

    Raises:
        BackendError: the backend asked for cannot run the call.
        ValueError: an unknown backend; an option or values that the contract excludes.
    """

def mla_decode_paged(
    q: Tensor,
    cache: Tensor,
    table: Tensor,
    lengths: Tensor,
    *,
    value_size: int,
    scale: float | None = None,
    window: int | None = None,
    backend: str | None = None,
) -> tuple[Tensor, Tensor]:
    """out = softmax(scale * q.c) c[:E] over the first rows of a cache; lse

    Args:
        q [B, H, T, D]: bfloat16 | float16 | float32; any strides.
        cache [N, P, D]: bfloat16 | float16 | float32; any strides.
        table [B, W]: int32; any strides.
        lengths [B]: int32; any strides.
        value_size: columns of a row of the cache that are its value.
        scale: None is 1 / sqrt(D).
        window: keys a query attends, counted back from its own; None is no limit.
        backend: neuron, simulator, torch; None means what use() or
            NKI_SIMULATOR asks for, else the default of the tensors' device.

    Returns:
        out [B, H, T, E], lse [B, H, T]; new, dense.

    Raises:
        BackendError: the backend asked for cannot run the call.
        ValueError: an unknown backend; an option or values that the contract excludes.
    """

def merge_attention(
    out_a: Tensor,
    lse_a: Tensor,
    out_b: Tensor,
    lse_b: Tensor,
    *,
    backend: str | None = None,
) -> tuple[Tensor, Tensor]:
    """out = e^(la - l) a + e^(lb - l) b, l = log(e^la + e^lb), by row

    Args:
        out_a [B, H, T, E]: bfloat16 | float16 | float32; any strides.
        lse_a [B, H, T]: float32; any strides.
        out_b [B, H, T, E]: bfloat16 | float16 | float32; any strides.
        lse_b [B, H, T]: float32; any strides.
        backend: neuron, simulator, torch; None means what use() or
            NKI_SIMULATOR asks for, else the default of the tensors' device.

    Returns:
        out [B, H, T, E], lse [B, H, T]; new, dense.

    Raises:
        BackendError: the backend asked for cannot run the call.
        ValueError: an unknown backend; an option or values that the contract excludes.
    """

def kv_cache_write(
    k: Tensor,
    v: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    starts: Tensor,
    *,
    backend: str | None = None,
) -> None:
    """the rows of new tokens of k and v, written into a cache

    Args:
        k [B, G, T, D]: bfloat16 | float16 | float32 | float8_e4m3 | float8_e5m2; any strides.
        v [B, G, T, E]: bfloat16 | float16 | float32 | float8_e4m3 | float8_e5m2; any strides.
        k_cache [B, G, S, D]: bfloat16 | float16 | float32 | float8_e4m3 | float8_e5m2; written.
        v_cache [B, G, S, E]: bfloat16 | float16 | float32 | float8_e4m3 | float8_e5m2; written.
        starts [B]: int32; any strides.
        backend: neuron, simulator, torch; None means what use() or
            NKI_SIMULATOR asks for, else the default of the tensors' device.

    Raises:
        BackendError: the backend asked for cannot run the call.
        ValueError: an unknown backend; an option or values that the contract excludes.
    """

def kv_cache_write_paged(
    k: Tensor,
    v: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    slots: Tensor,
    *,
    backend: str | None = None,
) -> None:
    """the rows of new tokens of k and v, written into a cache

    Args:
        k [B, G, T, D]: bfloat16 | float16 | float32 | float8_e4m3 | float8_e5m2; any strides.
        v [B, G, T, E]: bfloat16 | float16 | float32 | float8_e4m3 | float8_e5m2; any strides.
        k_cache [N, G, P, D]: bfloat16 | float16 | float32 | float8_e4m3 | float8_e5m2; written.
        v_cache [N, G, P, E]: bfloat16 | float16 | float32 | float8_e4m3 | float8_e5m2; written.
        slots [B, T]: int32; any strides.
        backend: neuron, simulator, torch; None means what use() or
            NKI_SIMULATOR asks for, else the default of the tensors' device.

    Raises:
        BackendError: the backend asked for cannot run the call.
        ValueError: an unknown backend; an option or values that the contract excludes.
    """

def rope(
    x: Tensor,
    cos: Tensor,
    sin: Tensor,
    *,
    interleaved: bool = False,
    inverse: bool = False,
    backend: str | None = None,
) -> Tensor:
    """y1 = x1 * cos - x2 * sin, y2 = x2 * cos + x1 * sin on pairs of columns

    Args:
        x [B, H, S, D]: bfloat16 | float16 | float32; any strides.
        cos [S, F]: float32; any strides.
        sin [S, F]: float32; any strides.
        interleaved: pair f is columns (2 f, 2 f + 1), not (f, F + f).
        inverse: rotate by the negative angle.
        backend: neuron, simulator, torch; None means what use() or
            NKI_SIMULATOR asks for, else the default of the tensors' device.

    Returns:
        y [B, H, S, D]; new, dense.

    Raises:
        BackendError: the backend asked for cannot run the call.
        ValueError: an unknown backend; an option or values that the contract excludes.
    """

def rope_batched(
    x: Tensor,
    cos: Tensor,
    sin: Tensor,
    *,
    interleaved: bool = False,
    inverse: bool = False,
    backend: str | None = None,
) -> Tensor:
    """y1 = x1 * cos - x2 * sin, y2 = x2 * cos + x1 * sin on pairs of columns

    Args:
        x [B, H, S, D]: bfloat16 | float16 | float32; any strides.
        cos [B, S, F]: float32; any strides.
        sin [B, S, F]: float32; any strides.
        interleaved: pair f is columns (2 f, 2 f + 1), not (f, F + f).
        inverse: rotate by the negative angle.
        backend: neuron, simulator, torch; None means what use() or
            NKI_SIMULATOR asks for, else the default of the tensors' device.

    Returns:
        y [B, H, S, D]; new, dense.

    Raises:
        BackendError: the backend asked for cannot run the call.
        ValueError: an unknown backend; an option or values that the contract excludes.
    """

def router(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    selection_bias: Tensor | None = None,
    *,
    top_k: int,
    score: str = "softmax",
    score_first: bool = True,
    renormalize: bool = False,
    scale: float = 1.0,
    groups: int = 1,
    top_groups: int | None = None,
    group_score: str = "max",
    backend: str | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """the top_k experts of each token by x @ weight + bias, their weights, and counts

    Args:
        x [T, H]: bfloat16 | float16 | float32; any strides.
        weight [H, E]: bfloat16 | float16 | float32; any strides.
        bias [E]: bfloat16 | float16 | float32; any strides.
        selection_bias [E]: float32; any strides.
        the options are those of `nki_kernels.ops.router`.
        backend: neuron, simulator, torch; None means what use() or
            NKI_SIMULATOR asks for, else the default of the tensors' device.

    Returns:
        indices [T, K], weights [T, K], counts [E]; new, dense.

    Raises:
        BackendError: the backend asked for cannot run the call.
        ValueError: an unknown backend; an option or values that the contract excludes.
    """

def dispatch(
    x: Tensor,
    indices: Tensor,
    *,
    experts: int,
    backend: str | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """rows[slots[t, k]] = x[t], sorted by expert; offsets[e] = choices of experts 0 .. e

    Args:
        x [T, H]: bfloat16 | float16 | float32; any strides.
        indices [T, K]: int32; any strides.
        experts: number of experts; other ids are absent.
        backend: neuron, simulator, torch; None means what use() or
            NKI_SIMULATOR asks for, else the default of the tensors' device.

    Returns:
        rows [T*K, H], slots [T, K], offsets [E]; new, dense.

    Raises:
        BackendError: the backend asked for cannot run the call.
        ValueError: an unknown backend; an option or values that the contract excludes.
    """

def combine(
    rows: Tensor,
    slots: Tensor,
    weights: Tensor | None = None,
    *,
    out_dtype: torch.dtype | None = None,
    backend: str | None = None,
) -> Tensor:
    """y[t] = sum_k weights[t, k] * rows[slots[t, k]], absent slots left out

    Args:
        rows [S, H]: bfloat16 | float16 | float32; any strides.
        slots [T, K]: int32; any strides.
        weights [T, K]: float32; any strides.
        out_dtype: dtype of the result; None means that of rows.
        backend: neuron, simulator, torch; None means what use() or
            NKI_SIMULATOR asks for, else the default of the tensors' device.

    Returns:
        y [T, H]; new, dense.

    Raises:
        BackendError: the backend asked for cannot run the call.
        ValueError: an unknown backend; an option or values that the contract excludes.
    """

def grouped_matmul(
    a: Tensor,
    b: Tensor,
    offsets: Tensor,
    *,
    out_dtype: torch.dtype | None = None,
    backend: str | None = None,
) -> Tensor:
    """c[m, n] = sum_k a[m, k] * b[g, k, n] for offsets[g - 1] <= m < offsets[g]

    Args:
        a [M, K]: bfloat16 | float16 | float32; any strides.
        b [G, K, N]: bfloat16 | float16 | float32; any strides.
        offsets [G]: int32; any strides.
        out_dtype: dtype of the result; None means that of a.
        backend: neuron, simulator, torch; None means what use() or
            NKI_SIMULATOR asks for, else the default of the tensors' device.

    Returns:
        c [M, N]; new, dense.

    Raises:
        BackendError: the backend asked for cannot run the call.
        ValueError: an unknown backend; an option or values that the contract excludes.
    """

def experts(
    x: Tensor,
    indices: Tensor,
    scores: Tensor,
    up: Tensor,
    down: Tensor,
    up_bias: Tensor | None = None,
    down_bias: Tensor | None = None,
    *,
    activation: str = "silu",
    interleaved: bool = False,
    limit: float | None = None,
    alpha: float = 1.702,
    out_dtype: torch.dtype | None = None,
    backend: str | None = None,
) -> Tensor:
    """y[t] = sum_k scores[t, k] * down(f(up(x[t]))) of expert indices[t, k]

    Args:
        x [T, H]: bfloat16 | float16 | float32; any strides.
        indices [T, K]: int32; any strides.
        scores [T, K]: float32; any strides.
        up [E, H, F]: bfloat16 | float16 | float32; any strides.
        down [E, I, H]: bfloat16 | float16 | float32; any strides.
        up_bias [E, F]: bfloat16 | float16 | float32; any strides.
        down_bias [E, H]: bfloat16 | float16 | float32; any strides.
        the options are those of `nki_kernels.ops.experts`.
        backend: neuron, simulator, torch; None means what use() or
            NKI_SIMULATOR asks for, else the default of the tensors' device.

    Returns:
        y [T, H]; new, dense.

    Raises:
        BackendError: the backend asked for cannot run the call.
        ValueError: an unknown backend; an option or values that the contract excludes.
    """
