"""Formulas and rows of decoding over a KV cache and of writes to it: ops without gradients."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor

from nki_kernels.operators import OPERATORS
from nki_kernels.operators.attention_decode import DECODES
from nki_kernels.operators.contract import Operator
from nki_kernels.operators.kv_cache import KV_CACHE_WRITE, KV_CACHE_WRITE_PAGED
from nki_kernels.torch_ops.attentions import factor_of, grouped, softmax_of
from nki_kernels.torch_ops.products import wide_type
from nki_kernels.torch_ops.row import Row, Tensors


def _pages(cache: Tensor, table: Tensor) -> Tensor:
    """Return the pages of each sequence as its cache [B, G, W * P, D].

    What the table holds behind a sequence's end may be anything.
    """
    if cache.shape[0] == 0:
        return cache.new_zeros(table.shape[0], cache.shape[1], 0, cache.shape[3])
    held = cache[table.long().clamp(0, cache.shape[0] - 1)]
    return held.transpose(1, 2).flatten(2, 3)


def _factors(scales: Tensor | None, wide: torch.dtype) -> Tensor:
    if scales is None:
        raise ValueError("attention_decode: a scale of the fp8 cache is None; pass ones [G]")
    return scales.to(wide)[:, None, None]


def _decode(
    paged: bool,
    quantized: bool,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *others: Tensor | None,
    scale: float | None = None,
    window: int | None = None,
    softcap: float | None = None,
) -> Tensors:
    rest = list(others)
    table = rest.pop(0) if paged else None
    lengths = rest.pop(0)
    sinks = rest.pop(0) if rest else None
    if lengths is None:
        raise ValueError("attention_decode: lengths is None; int32 [B] is needed; pass it")
    if table is not None:
        k, v = _pages(k, table), _pages(v, table)
    wide, heads, tokens = wide_type(q), k.shape[1], q.shape[2]
    k, v = k.to(wide), v.to(wide)
    if quantized:
        k, v = (x * _factors(f, wide) for x, f in zip((k, v), rest, strict=True))
    factor = factor_of(q, scale)
    s = torch.matmul(grouped(q.to(wide), heads), k.mT).reshape(*q.shape[:3], k.shape[2]) * factor
    if softcap:
        s = softcap * torch.tanh(s / softcap)
    last = lengths[:, None] - tokens + torch.arange(tokens, device=q.device)
    j = torch.arange(k.shape[2], device=q.device)
    seen = j <= last[..., None]
    if window is not None:
        seen = seen & (j > last[..., None] - window)
    p, lse = softmax_of(s, seen[:, None], sinks)
    out = torch.matmul(grouped(p, heads), v).reshape(*q.shape[:3], v.shape[3])
    return out.to(q.dtype), lse.to(torch.float32)


def _mla(
    paged: bool,
    q: Tensor,
    cache: Tensor,
    *others: Tensor,
    value_size: int,
    scale: float | None = None,
    window: int | None = None,
) -> Tensors:
    """Decode over one KV head whose values are the first columns of its keys."""
    rows = cache.unsqueeze(1)
    values = rows[..., :value_size]
    return _decode(paged, False, q, rows, values, *others, scale=scale, window=window)


def _merge(out_a: Tensor, lse_a: Tensor, out_b: Tensor, lse_b: Tensor) -> Tensors:
    """Merge the attentions of the same queries over two sets of keys; -inf attends nothing."""
    wide = wide_type(out_a)
    logs = torch.stack((lse_a.to(wide), lse_b.to(wide)))
    top = logs.amax(0)
    shifted = torch.exp(logs - top.masked_fill(top == -float("inf"), 0.0))
    total = shifted.sum(0)
    a, b = (shifted / total.masked_fill(total == 0, 1.0)).unsqueeze(-1)
    lse = total.log() + top
    out = a * out_a.to(wide) + b * out_b.to(wide)
    return out.to(out_a.dtype), lse.to(torch.float32)


def _write(k: Tensor, v: Tensor, k_cache: Tensor, v_cache: Tensor, starts: Tensor) -> Tensors:
    sequence = torch.arange(k.shape[0], device=k.device)[:, None]
    at = starts.long()[:, None] + torch.arange(k.shape[2], device=k.device)
    for cache, new in ((k_cache, k), (v_cache, v)):
        cache[sequence, :, at] = new.transpose(1, 2)
    return ()


def _write_paged(k: Tensor, v: Tensor, k_cache: Tensor, v_cache: Tensor, slots: Tensor) -> Tensors:
    if k.is_meta:
        return ()
    used = slots >= 0
    numbers, size = slots[used].long(), k_cache.shape[2]
    for cache, new in ((k_cache, k), (v_cache, v)):
        cache[numbers // size, :, numbers % size] = new.transpose(1, 2)[used]
    return ()


_NOTES = (
    "scale: None is 1 / sqrt(D).",
    "window: keys a query attends, counted back from its own; None is no limit.",
)


def _decode_row(op: Operator, paged: bool, quantized: bool = False) -> Row:
    return Row(
        op=op,
        options="float? scale=None, int? window=None, float? softcap=None",
        notes=(
            *_NOTES, "softcap: scores become softcap * tanh(score / softcap); None is no cap.",
        ),
        plain=partial(_decode, paged, quantized),
    )  # fmt: skip


def _mla_row(name: str, paged: bool) -> Row:
    return Row(
        op=OPERATORS[name],
        options="int value_size, float? scale=None, int? window=None",
        notes=("value_size: columns of a row of the cache that are its value.", *_NOTES),
        plain=partial(_mla, paged),
    )


def _write_row(op: Any, plain: Any) -> Row:
    return Row(op=op, options="", notes=(), plain=plain, mutates=("k_cache", "v_cache"))


ROWS = (
    *(_decode_row(op, *kind) for kind, op in DECODES.items()),
    _decode_row(OPERATORS["attention_chunked_prefill"], paged=True),
    _mla_row("mla_decode", paged=False),
    _mla_row("mla_decode_paged", paged=True),
    Row(op=OPERATORS["merge_attention"], options="", notes=(), plain=_merge),
    _write_row(KV_CACHE_WRITE, _write),
    _write_row(KV_CACHE_WRITE_PAGED, _write_paged),
)
