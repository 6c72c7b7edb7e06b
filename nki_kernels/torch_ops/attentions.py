"""Formula, gradient and rows of `attention`, in float32 (float64 for float64), rounded once.

    s = cap(scale * q·kᵀ) + bias over the keys a query attends;  lse = log(sum_j exp(s) + exp(sink))
    p = exp(s - lse);  out = p·v
    dv = pᵀ·dout;  ds = p * (dout·vᵀ - sum_e(dout * out) + dlse);  dq = scale * cap'·ds·k, ...

The gradient is plain PyTorch on every backend, not counted, and forms all scores of a head at once.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from nki_kernels.operators import OPERATORS
from nki_kernels.operators.attention import ALIGNMENTS, MASKED_ATTENTION
from nki_kernels.torch_ops.products import wide_type
from nki_kernels.torch_ops.row import Calls, Grads, Row, Tensors

_INFINITY = float("inf")


def attended(
    rows: int,
    keys: int,
    device: torch.device,
    *,
    causal: bool = False,
    align: str = ALIGNMENTS[0],
    window: int | None = None,
) -> Tensor | None:
    """Return bool [rows, keys], whether query i attends key j; None if every one does."""
    if not causal and window is None:
        return None
    shift = keys - rows if align == "bottom-right" else 0
    i = torch.arange(rows, device=device)[:, None] + shift
    j = torch.arange(keys, device=device)[None, :]
    seen = j <= i if causal else j < i + (window or 0)
    return seen if window is None else seen & (j > i - window)


def grouped(x: Tensor, heads: int) -> Tensor:
    """Return [B, H, M, D] as [B, G, H / G * M, D]: the rows that meet one key head."""
    rows = x.shape[1] // max(heads, 1) * x.shape[2]
    return x.reshape(x.shape[0], heads, rows, x.shape[-1])


def softmax_of(s: Tensor, seen: Tensor | None, sinks: Tensor | None) -> tuple[Tensor, Tensor]:
    """Return the probabilities and the LSE [B, H, M] of scores [B, H, M, N], a sink included.

    A row that attends nothing has 0 and, without a sink, -inf.
    """
    if seen is not None:
        s = s.masked_fill(~seen, -_INFINITY)
    none = s.new_full((*s.shape[:-1], 1), -_INFINITY)
    top = s.amax(-1, keepdim=True) if s.shape[-1] else none
    sink = None if sinks is None else sinks.to(s.dtype)[None, :, None, None]
    if sink is not None:
        top = torch.maximum(top, sink)
    top = top.masked_fill(top == -_INFINITY, 0.0)
    weight = torch.exp(s - top)
    total = weight.sum(-1, keepdim=True)
    if sink is not None:
        total = total + torch.exp(sink - top)
    p = weight / total.masked_fill(total == 0, 1.0)
    return p, (total.log() + top).squeeze(-1)


def factor_of(q: Tensor, scale: float | None) -> float:
    """Return the factor of q·k: 1 / sqrt(D) by default."""
    return float(max(q.shape[3], 1) ** -0.5) if scale is None else scale


def _scores(q: Tensor, k: Tensor, factor: float, softcap: float | None) -> Tensor:
    wide, heads = wide_type(q), k.shape[1]
    s = torch.matmul(grouped(q.to(wide), heads), k.to(wide).mT)
    s = s.reshape(*q.shape[:3], k.shape[2]) * factor
    return softcap * torch.tanh(s / softcap) if softcap else s


def _seen(mask: Tensor | None, q: Tensor, k: Tensor, pattern: dict[str, Any]) -> Tensor | None:
    seen = attended(q.shape[2], k.shape[2], q.device, **pattern)
    if mask is None:
        return seen
    return mask != 0 if seen is None else (mask != 0) & seen


def _check(q: Tensor, k: Tensor, v: Tensor) -> None:
    if q.dtype != k.dtype or k.dtype != v.dtype or q.shape[1] % max(k.shape[1], 1):
        raise ValueError(
            f"attention: q is {q.dtype} with {q.shape[1]} heads, k {k.dtype} with {k.shape[1]}, v "
            f"{v.dtype}; one dtype and a multiple of the key heads are needed; cast or repeat"
        )


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    sinks: Tensor | None = None,
    mask: Tensor | None = None,
    bias: Tensor | None = None,
    *,
    causal: bool = False,
    align: str = ALIGNMENTS[0],
    window: int | None = None,
    scale: float | None = None,
    softcap: float | None = None,
) -> Tensors:
    """Return out and lse; see `nki_kernels.ops.attention`."""
    _check(q, k, v)
    s = _scores(q, k, factor_of(q, scale), softcap)
    if bias is not None:
        s = s + bias.to(s.dtype)
    pattern = {"causal": causal, "align": align, "window": window}
    p, lse = softmax_of(s, _seen(mask, q, k, pattern), sinks)
    out = torch.matmul(grouped(p, k.shape[1]), v.to(p.dtype))
    return out.reshape(*q.shape[:3], v.shape[3]).to(q.dtype), lse.to(torch.float32)


def gradients(
    needs: tuple[bool, ...],
    grads: Grads,
    inputs: tuple[Tensor | None, ...],
    outputs: Tensors,
    scale: float | None,
    softcap: float | None,
    pattern: dict[str, Any],
) -> Grads:
    """Return the gradients of q, k, v, sinks and bias in closed form (None for the mask)."""
    q, k, v = (x for x in inputs[:3] if x is not None)
    sinks, mask, bias = inputs[3:]
    wide, heads = wide_type(q), k.shape[1]
    factor = factor_of(q, scale)
    capped = _scores(q, k, factor, softcap)
    s = capped if bias is None else capped + bias.to(wide)
    # The LSE is formed again: the one returned is float32, whatever the inputs are.
    p, lse = softmax_of(s, _seen(mask, q, k, pattern), sinks)
    dout, dlse = (None if g is None else g.to(wide) for g in grads)
    if dout is None:
        dout = torch.zeros_like(outputs[0], dtype=wide)
    inner = (dout * outputs[0].to(wide)).sum(-1, keepdim=True)
    delta = inner if dlse is None else inner - dlse[..., None]
    flat = grouped(dout, heads)
    dp = torch.matmul(flat, v.to(wide).mT).reshape(s.shape)
    ds = p * (dp - delta)
    draw = (ds * (1 - (capped / softcap).square()) if softcap else ds) * factor
    flat_s = grouped(draw, heads)
    dq = torch.matmul(flat_s, k.to(wide)).reshape(q.shape)
    dk = torch.matmul(flat_s.mT, grouped(q.to(wide), heads))
    dv = torch.matmul(grouped(p, heads).mT, flat)
    dsinks = None
    if sinks is not None and needs[3]:
        share = torch.exp(sinks.to(wide)[None, :, None] - lse)
        dsinks = -(share * delta.squeeze(-1)).sum((0, 2)).to(sinks.dtype)
    dbias = None
    if bias is not None and needs[5]:
        dbias = ds.sum_to_size(bias.shape).to(bias.dtype)
    firsts = (g.to(q.dtype) if need else None for g, need in zip((dq, dk, dv), needs, strict=False))
    return (*firsts, dsinks, None, dbias)


def _gradient(
    call: Calls,
    needs: tuple[bool, ...],
    grads: Grads,
    *saved: Any,
    scale: float | None = None,
    softcap: float | None = None,
    **pattern: Any,
) -> Grads:
    """Return one gradient per input of `attention`."""
    return gradients(needs, grads, saved[:6], saved[6:], scale, softcap, pattern)


def _causal(q: Tensor, k: Tensor, v: Tensor, **options: Any) -> Tensors:
    return attention(q, k, v, causal=True, **options)


def _causal_gradient(
    call: Calls,
    needs: tuple[bool, ...],
    grads: Grads,
    *saved: Any,
    scale: float | None = None,
    softcap: float | None = None,
    **pattern: Any,
) -> Grads:
    inputs = (*saved[:3], None, None, None)
    every = gradients(
        (*needs, False, False, False), grads, inputs, saved[3:], scale, softcap,
        {"causal": True, **pattern},
    )  # fmt: skip
    return every[:3]


_OPTIONS = f"str align='{ALIGNMENTS[0]}', int? window=None, float? scale=None, float? softcap=None"
_NOTES = (
    f"align: {' or '.join(ALIGNMENTS)}: where the causal diagonal begins.",
    "window: attend only keys j > i - window, and, without causal, j < i + window.",
    "scale: None is 1 / sqrt(D).",
    "softcap: scores become softcap * tanh(score / softcap); None is no cap.",
)

ROWS = (
    Row(
        op=MASKED_ATTENTION,
        options=f"bool causal=False, {_OPTIONS}",
        notes=(
            "mask: may be bool as well: True to attend.",
            "causal: attend keys j <= i.",
            *_NOTES,
        ),
        plain=attention,
        backward=_gradient,
        keeps_outputs=True,
        autocast="low",
    ),
    Row(
        op=OPERATORS["causal_attention"],
        options=_OPTIONS,
        notes=_NOTES,
        plain=_causal,
        backward=_causal_gradient,
        keeps_outputs=True,
        autocast="low",
    ),
)
