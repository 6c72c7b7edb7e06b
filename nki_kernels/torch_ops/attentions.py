"""Formula, gradient and rows of `attention`, in float32 (float64 for float64), rounded once.

    s = cap(scale * q·kᵀ) + bias over the keys a query attends;  lse = log(sum_j exp(s) + exp(sink))
    p = exp(s - lse);  out = p·v
    dv = pᵀ·dout;  ds = p * (dout·vᵀ - sum_e(dout * out) + dlse);  dq = scale * cap'·ds·k, ...

The gradient is one call of `attention_backward`, on the backend of the forward pass; of the LSE and
with ALiBi it is plain PyTorch, not counted.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from nki_kernels.operators import OPERATORS
from nki_kernels.operators.attention import ALIGNMENTS, MASKED_ATTENTION
from nki_kernels.operators.attention_backward import MASKED_ATTENTION_BACKWARD
from nki_kernels.torch_ops.derivative import derivative
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
    slopes: list[float] | None = None,
) -> Tensors:
    """Return out and lse; see `nki_kernels.ops.attention`."""
    _check(q, k, v)
    s = _biased(_scores(q, k, factor_of(q, scale), softcap), bias, slopes, align)
    pattern = {"causal": causal, "align": align, "window": window}
    p, lse = softmax_of(s, _seen(mask, q, k, pattern), sinks)
    out = torch.matmul(grouped(p, k.shape[1]), v.to(p.dtype))
    return out.reshape(*q.shape[:3], v.shape[3]).to(q.dtype), lse.to(torch.float32)


def _biased(s: Tensor, bias: Tensor | None, slopes: list[float] | None, align: str) -> Tensor:
    """Add the bias and take away slopes[h] * |i - j|, where i counts as `align` says."""
    if bias is not None:
        s = s + bias.to(s.dtype)
    if slopes is None:
        return s
    rows, keys = s.shape[2:]
    i = torch.arange(rows, device=s.device)[:, None]
    places = i + (keys - rows if align == "bottom-right" else 0)
    far = (places - torch.arange(keys, device=s.device)).abs()
    each = torch.tensor(slopes, dtype=torch.float32, device=s.device).to(s.dtype)
    return s - each[:, None, None] * far


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
    scale: float | None = None,
    softcap: float | None = None,
    slopes: list[float] | None = None,
    dlse: Tensor | None = None,
    **pattern: Any,
) -> Tensors:
    """Return dq, dk, dv, and dsinks and dbias where these inputs are given.

    The LSE is formed again: the one returned is float32, whatever the inputs are. `dlse` is the
    gradient of the LSE, which the kernel does not take.
    """
    wide, heads, factor = wide_type(q), k.shape[1], factor_of(q, scale)
    capped = _scores(q, k, factor, softcap)
    s = _biased(capped, bias, slopes, pattern.get("align", ALIGNMENTS[0]))
    p, total = softmax_of(s, _seen(mask, q, k, pattern), sinks)
    do = do.to(wide)
    delta = (do * out.to(wide)).sum(-1, keepdim=True)
    if dlse is not None:
        delta = delta - dlse.to(wide)[..., None]
    flat = grouped(do, heads)
    ds = p * (torch.matmul(flat, v.to(wide).mT).reshape(s.shape) - delta)
    sloped = grouped((ds * (1 - (capped / softcap).square()) if softcap else ds) * factor, heads)
    found = [
        torch.matmul(sloped, k.to(wide)).reshape(q.shape).to(q.dtype),
        torch.matmul(sloped.mT, grouped(q.to(wide), heads)).to(k.dtype),
        torch.matmul(grouped(p, heads).mT, flat).to(v.dtype),
    ]
    if sinks is not None:
        share = torch.exp(sinks.to(wide)[None, :, None] - total)
        found.append(-(share * delta.squeeze(-1)).sum((0, 2)).to(sinks.dtype))
    if bias is not None:
        found.append(ds.sum_to_size(bias.shape).to(bias.dtype))
    return tuple(found)


def _gradient(
    call: Calls, needs: tuple[bool, ...], grads: Grads, *saved: Any, **options: Any
) -> Grads:
    """Return one gradient per input, by `attention_backward`.

    Where the LSE has a gradient or the scores have slopes, the kernel's formula is not enough: the
    gradient is plain PyTorch then, on every backend.
    """
    inputs, (out, lse) = saved[:6], saved[6:]
    q, sinks, mask, bias = inputs[0], *inputs[3:]
    do, dlse = grads
    if do is None:
        do = torch.zeros_like(out)
    form: Callable[..., Any] = call
    if dlse is not None or options.get("slopes") is not None:
        form = partial(attention_backward, dlse=dlse)
    else:
        options.pop("slopes", None)
    found = list(form(do.to(q.dtype), *inputs[:3], out, lse, sinks, mask, bias, **options))
    dsinks = None if sinks is None else found[3]
    dbias = None if bias is None else found[-1]
    every = (*found[:3], dsinks, None, dbias)
    return tuple(grad if need else None for grad, need in zip(every, needs, strict=True))


def _causal(q: Tensor, k: Tensor, v: Tensor, **options: Any) -> Tensors:
    return attention(q, k, v, causal=True, **options)


def _causal_gradient(
    call: Calls, needs: tuple[bool, ...], grads: Grads, *saved: Any, **options: Any
) -> Grads:
    every = (*saved[:3], None, None, None, *saved[3:])
    return _gradient(call, (*needs, False, False, False), grads, *every, causal=True, **options)[:3]


def _causal_backward(*inputs: Tensor, **options: Any) -> Tensors:
    return attention_backward(*inputs, causal=True, **options)


def _varlen(
    causal: bool,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens: Tensor,
    *,
    max_seqlen: int,
    window: int | None = None,
    scale: float | None = None,
    softcap: float | None = None,
) -> Tensors:
    """Attention within each sequence: `max_seqlen` bounds the kernel's work and changes nothing."""
    return attention(
        q, k, v, None, _together(q, cu_seqlens),
        causal=causal, window=window, scale=scale, softcap=softcap,
    )  # fmt: skip


def _together(q: Tensor, cu_seqlens: Tensor) -> Tensor:
    """Return [1, 1, M, M], whether two tokens are of one sequence; the last one is the padding."""
    places = torch.arange(q.shape[2], device=q.device, dtype=cu_seqlens.dtype)
    number = torch.searchsorted(cu_seqlens.contiguous(), places, right=True)
    return (number[:, None] == number)[None, None]


def _varlen_gradient(
    causal: bool, call: Calls, needs: tuple[bool, ...], grads: Grads, *saved: Any, **options: Any
) -> Grads:
    """By `attention_backward` with a mask: the kernel visits every pair of tokens."""
    options.pop("max_seqlen")
    mask = _together(saved[0], saved[3])
    every = (*saved[:3], None, mask, None, *saved[4:])
    wanted = (*needs[:3], False, False, False)
    found = _gradient(call, wanted, grads, *every, causal=causal, **options)
    return (*found[:3], None)


def _varlen_row(name: str, causal: bool) -> Row:
    return Row(
        op=OPERATORS[name],
        options="int max_seqlen, int? window=None, float? scale=None, float? softcap=None",
        notes=("max_seqlen: a number that no length exceeds; cost grows with it.", *_NOTES[1:]),
        plain=partial(_varlen, causal),
        backward=partial(_varlen_gradient, causal),
        gradient="attention_backward",
        keeps_outputs=True,
        autocast="low",
    )


_OPTIONS = f"str align='{ALIGNMENTS[0]}', int? window=None, float? scale=None, float? softcap=None"
_SLOPES = "float[]? slopes=None"
_NOTES = (
    f"align: {' or '.join(ALIGNMENTS)}: where the causal diagonal begins.",
    "window: attend only keys j > i - window, and, without causal, j < i + window.",
    "scale: None is 1 / sqrt(D).",
    "softcap: scores become softcap * tanh(score / softcap); None is no cap.",
)

_MASK_NOTE = "mask: may be bool as well: True to attend."
_SLOPES_NOTE = "slopes: ALiBi: one number per query head; scores lose slope * |i - j|."

ROWS = (
    Row(
        op=MASKED_ATTENTION,
        options=f"bool causal=False, {_OPTIONS}, {_SLOPES}",
        notes=(
            "mask: may be bool as well: True to attend.",
            "causal: attend keys j <= i.",
            *_NOTES,
        ),
        plain=attention,
        backward=_gradient,
        gradient="attention_backward",
        keeps_outputs=True,
        autocast="low",
    ),
    Row(
        op=OPERATORS["causal_attention"],
        options=f"{_OPTIONS}, {_SLOPES}",
        notes=(*_NOTES, _SLOPES_NOTE),
        plain=_causal,
        backward=_causal_gradient,
        gradient="attention_backward",
        keeps_outputs=True,
        autocast="low",
    ),
    _varlen_row("attention_varlen", False),
    _varlen_row("causal_attention_varlen", True),
    Row(
        op=MASKED_ATTENTION_BACKWARD,
        options=f"bool causal=False, {_OPTIONS}",
        notes=(_MASK_NOTE, "causal: attend keys j <= i.", *_NOTES),
        plain=attention_backward,
        backward=derivative(attention_backward),
    ),
    Row(
        op=OPERATORS["causal_attention_backward"],
        options=_OPTIONS,
        notes=_NOTES,
        plain=_causal_backward,
        backward=derivative(_causal_backward),
    ),
)
