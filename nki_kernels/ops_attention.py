"""The public attention calls on NumPy arrays; `nki_kernels.ops` offers them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, TypedDict, Unpack

import numpy.typing as npt

from nki_kernels.operators.attention import (
    ATTENTION,
    CAUSAL_ATTENTION,
    MASKED_ATTENTION,
    AttentionConfig,
    mask_bits,
)
from nki_kernels.operators.attention_backward import (
    ATTENTION_BACKWARD,
    CAUSAL_ATTENTION_BACKWARD,
    MASKED_ATTENTION_BACKWARD,
    AttentionBackwardConfig,
)

Array = npt.NDArray[Any]


def attention(
    q: Array,
    k: Array,
    v: Array,
    *,
    causal: bool = False,
    align: str = "top-left",
    window: int | None = None,
    sinks: Array | None = None,
    mask: Array | None = None,
    bias: Array | None = None,
    slopes: Sequence[float] | None = None,
    scale: float | None = None,
    softcap: float | None = None,
    config: AttentionConfig | None = None,
    target: str | None = None,
) -> tuple[Array, Array]:
    """Softmax attention over whole sequences.

    s[i, j] = scale * q[i]·k[j], capped to softcap * tanh(s / softcap), plus bias[i, j], and less
    slopes[h] * |i - j|
    lse[i] = log(sum_j exp(s[i, j]) + exp(sink));  out[i] = sum_j exp(s[i, j] - lse[i]) * v[j]

    over the keys j that query i attends. Scores and sums are float32; the probabilities of 2-byte
    inputs are rounded to bfloat16 before they meet v, out once. Exact in meaning for any scores
    below 1e30 in magnitude: where an exponential leaves the range of float32, a slower path with
    shifted exponentials computes everything again, on the device.

    Dimensions:
        B: batch    H: query heads    G: key heads, H a multiple; head h reads key head h * G // H
        M: queries    N: keys    D: head size, <= 512    E: head size of v, <= 512

    Args:
        q: [B, H, M, D], dense row-major, bfloat16 | float16 | float32.
        k: [B, G, N, D], dtype of `q`.
        v: [B, G, N, E], dtype of `q`.
        causal: query i attends keys j <= i.
        align: "top-left", or "bottom-right", where i counts as i + N - M: the last query meets the
            last key.
        window: attend only keys j > i - window, and, without `causal`, j < i + window.
        sinks: [H] float32, one more logit per head, without a value.
        mask: bool, [B, H, M, N], B and H may be 1: True to attend.
        bias: likewise of the dtype of `q`: added to the scores. A mask costs three quarters, a
            bias a third; a mask with a softcap takes the slower path.
        slopes: ALiBi: a number per query head, constants of the kernel; `align` says what i is.
            Causal without sinks it costs 16 % at slopes to 0.11, 68 % to 0.46; else slow.
        scale: None is 1 / sqrt(D).
        softcap: None is no cap.
        config: tuning of the kernel; None lets the operator choose. It never changes the
            mathematics.
        target: hardware generation; None means the one in force, as for `matmul`.

    Returns:
        out [B, H, M, E] of the dtype of `q`, and lse [B, H, M] float32. A query that attends
        nothing has 0 and -inf.

    Raises:
        ShapeError: sizes that differ, a wrong rank, a zero size, a strided array, heads that do not
            divide, a head size above 512.
        DtypeError: a dtype that is not supported, or two different ones; a mask that is not bool.
        OptionError: an option out of its range.
        ConfigError: a `config` that cannot run on the target.

    Source: the kernel is `nki_kernels.kernels.attention.forward`.

    Example:
        >>> import numpy as np
        >>> x = np.ones((1, 1, 2, 4), np.float32)
        >>> out, lse = attention(x, x, x, causal=True)
        >>> out[0, 0, 0], lse.round(3)
        (array([1., 1., 1., 1.], dtype=float32), array([[[2.   , 2.693]]], dtype=float32))
    """
    options = {"causal": causal, "align": align, "window": window}
    options |= {"scale": scale, "softcap": softcap, "slopes": slopes}
    arrays: tuple[Any, ...] = (q, k, v)
    op = CAUSAL_ATTENTION if causal else ATTENTION
    if sinks is not None or mask is not None or bias is not None:
        op, arrays = MASKED_ATTENTION, (q, k, v, sinks, mask_bits(mask), bias)
    out, lse = op.launch(arrays, options, config=config, target=target).result
    return out, lse


class Pattern(TypedDict, total=False):
    """Options of `attention` that its gradients take as well."""

    causal: bool
    align: str
    window: int | None
    scale: float | None
    softcap: float | None
    slopes: Sequence[float] | None


def attention_backward(
    do: Array,
    q: Array,
    k: Array,
    v: Array,
    out: Array,
    lse: Array,
    *,
    sinks: Array | None = None,
    mask: Array | None = None,
    bias: Array | None = None,
    config: AttentionBackwardConfig | None = None,
    target: str | None = None,
    **options: Unpack[Pattern],
) -> tuple[Array, ...]:
    """Gradients of `attention` with the same options, from what it returned.

    p[i, j] = exp(s[i, j] - lse[i]);  ds[i, j] = p[i, j] * (do[i]·v[j] - do[i]·out[i])
    dq[i] = scale * sum_j ds[i, j] k[j];  dk[j] = scale * sum_i ds[i, j] q[i]
    dv[j] = sum_i p[i, j] do[i];  dsinks = -sum_i exp(sink - lse[i]) do[i]·out[i];  dbias = ds

    with the slope of the softcap in the ds of dq and dk. Key heads add up over their query heads, a
    bias over the batches and heads that share it, always in the same order: runs repeat to the bit.
    Sums are float32; p and ds of 2-byte inputs are rounded to bfloat16 before they are multiplied,
    results once.

    Args:
        do: [B, H, M, E], the gradient of out, dense row-major, dtype of `q`.
        q: [B, H, M, D], bfloat16 | float16 | float32.
        k: [B, G, N, D], dtype of `q`.
        v: [B, G, N, E], dtype of `q`.
        out: [B, H, M, E], dtype of `q`, from `attention`.
        lse: [B, H, M] float32, from `attention`.
        sinks: as in `attention`.
        mask: likewise.
        bias: likewise.
        config: tuning of the kernel; None lets the operator choose. It never changes the
            mathematics.
        target: hardware generation; None means the one in force, as for `matmul`.
        **options: causal, align, window, scale, softcap and slopes of `attention`.

    Returns:
        dq, dk and dv, in shape and dtype of q, k and v; then dsinks [H] float32 if there are
        sinks; then dbias, in shape and dtype of the bias, if there is one. What attends nothing
        has 0.

    Raises:
        ShapeError: as `attention`; heads too large for PSUM: a bank for every 128 of D and of E,
            one bank less than there are, and D at most 512.
        DtypeError: a dtype that is not supported, or two different ones; a mask that is not bool.
        OptionError: an option out of its range.
        ConfigError: a `config` that cannot run on the target.
        TypeError: an option of another name.

    Source: the kernel is `nki_kernels.kernels.attention.backward`.

    Example:
        >>> import numpy as np
        >>> x = np.ones((1, 1, 2, 4), np.float32)
        >>> out, lse = attention(x, x, x, causal=True)
        >>> attention_backward(x, x, x, x, out, lse, causal=True)[2][0, 0, :, 0]
        array([1.5, 0.5], dtype=float32)
    """
    unknown = sorted(set(options) - set(Pattern.__annotations__))
    if unknown:
        raise TypeError(
            f"attention_backward: the option {unknown[0]!r} is none; allowed are "
            f"{', '.join(Pattern.__annotations__)}; use one of these"
        )
    arrays: tuple[Any, ...] = (do, q, k, v, out, lse)
    op = CAUSAL_ATTENTION_BACKWARD if options.get("causal") else ATTENTION_BACKWARD
    if sinks is not None or mask is not None or bias is not None:
        op, arrays = MASKED_ATTENTION_BACKWARD, (*arrays, sinks, mask_bits(mask), bias)
    gradients: tuple[Array, ...] = op.launch(
        arrays, {**options}, config=config, target=target
    ).result
    return gradients
