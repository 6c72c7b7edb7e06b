"""References of `attention_decode` and of the writes to a KV cache."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from reference.attention import attention
from reference.matmul import Reference


def attention_decode(
    q: npt.NDArray[Any],
    k: npt.NDArray[Any],
    v: npt.NDArray[Any],
    lengths: npt.NDArray[Any],
    sinks: npt.NDArray[Any] | None = None,
    *,
    window: int | None = None,
    **options: Any,
) -> tuple[Reference, Reference]:
    """Attend a cache: `attention` with query t at position p = lengths - T + t.

    Query t attends key j when 0 <= j <= p, and j > p - window.

    Args:
        q: [B, H, T, D].
        k: [B, G, S, D].
        v: [B, G, S, E].
        lengths: [B].
        sinks: [H] or None.
        window: None is no limit.
        options: `scale`, `softcap` and `depth` of `attention`.

    Returns:
        (out [B, H, T, E], lse [B, H, T]), each value and magnitude.
    """
    rows, group = q.shape[2], q.shape[1] // k.shape[1]
    p = np.asarray(lengths)[:, None, None] - rows + np.arange(rows)[None, :, None]
    j = np.arange(k.shape[2])[None, None, :]
    mask = j <= p
    if window is not None:
        mask &= j > p - window
    # One key head of one sequence at a time: a long cache in float64 is large.
    parts: list[list[Reference]] = [[], []]
    for b, g in np.ndindex(k.shape[0], k.shape[1]):
        heads = slice(g * group, (g + 1) * group)
        found = attention(
            q[b : b + 1, heads],
            k[b : b + 1, g : g + 1],
            v[b : b + 1, g : g + 1],
            None if sinks is None else sinks[heads],
            mask[b : b + 1, None],
            **options,
        )
        for part, reference in zip(parts, found, strict=True):
            part.append(reference)
    out, lse = (_joined(part, q.shape[:3]) for part in parts)
    return out, lse


def _joined(parts: list[Reference], shape: tuple[int, ...]) -> Reference:
    """Join references [1, heads, T, ...] to [B, H, T, ...]."""

    def join(arrays: list[npt.NDArray[np.float64]]) -> npt.NDArray[np.float64]:
        return np.concatenate(arrays, axis=1).reshape(*shape, *arrays[0].shape[3:])

    return Reference(join([p.value for p in parts]), join([p.magnitude for p in parts]))


def gathered(pages: npt.NDArray[Any], table: npt.NDArray[Any]) -> npt.NDArray[Any]:
    """Return [B, G, W * P, D] of pages [N, G, P, D] and a table [B, W]; what is no page is 0."""
    count = pages.shape[0]
    index = np.asarray(table)
    found = pages[np.clip(index, 0, count - 1)]
    found[(index < 0) | (index >= count)] = 0
    b, w, g, p, d = found.shape
    return np.ascontiguousarray(found.transpose(0, 2, 1, 3, 4)).reshape(b, g, w * p, d)


def attention_decode_paged(
    q: npt.NDArray[Any],
    k: npt.NDArray[Any],
    v: npt.NDArray[Any],
    table: npt.NDArray[Any],
    lengths: npt.NDArray[Any],
    sinks: npt.NDArray[Any] | None = None,
    **options: Any,
) -> tuple[Reference, Reference]:
    """`attention_decode` over the pages [N, G, P, D] that the table [B, W] names."""
    return attention_decode(q, gathered(k, table), gathered(v, table), lengths, sinks, **options)


def merge_attention(
    out_a: npt.NDArray[Any],
    lse_a: npt.NDArray[Any],
    out_b: npt.NDArray[Any],
    lse_b: npt.NDArray[Any],
) -> tuple[Reference, Reference]:
    """Merge two attentions: l = log(e^la + e^lb), out = e^(la - l) a + e^(lb - l) b.

    The exponent of a part is a difference d of logarithms, rounded; so a part's relative error has
    a share |d|, which the magnitudes carry.

    Args:
        out_a: [B, H, T, E].
        lse_a: [B, H, T], -inf where nothing was attended.
        out_b: like `out_a`.
        lse_b: like `lse_a`.

    Returns:
        (out [B, H, T, E], lse [B, H, T]), each value and magnitude.
    """
    a, b, la, lb = (np.asarray(x, dtype=np.float64) for x in (out_a, out_b, lse_a, lse_b))
    lse = np.logaddexp(la, lb)
    safe = np.where(np.isinf(lse), 0.0, lse)
    value, magnitude, spread = np.zeros_like(a), np.zeros_like(a), np.zeros_like(lse)
    for out, part in ((a, la), (b, lb)):
        weight = np.exp(part - safe)
        away = np.where(weight > 0, np.abs(part - safe), 0.0)
        value += weight[..., None] * out
        magnitude += (weight * (1 + away))[..., None] * np.abs(out)
        spread += weight * (1 + away)
    most = np.where(np.isinf(lse), 0.0, np.maximum(la, lb))
    return Reference(value, magnitude), Reference(lse, np.abs(most) + spread + 1)


def mla_decode(
    q: npt.NDArray[Any],
    cache: npt.NDArray[Any],
    lengths: npt.NDArray[Any],
    value_size: int,
    **options: Any,
) -> tuple[Reference, Reference]:
    """`attention_decode` over one KV head: keys cache [B, S, D], values its first columns."""
    keys = np.asarray(cache)[:, None]
    return attention_decode(q, keys, keys[..., :value_size], lengths, **options)


def mla_decode_paged(
    q: npt.NDArray[Any],
    cache: npt.NDArray[Any],
    table: npt.NDArray[Any],
    lengths: npt.NDArray[Any],
    value_size: int,
    **options: Any,
) -> tuple[Reference, Reference]:
    """`mla_decode` over the pages [N, P, D] that the table [B, W] names."""
    rows = gathered(np.asarray(cache)[:, None], table)[:, 0]
    return mla_decode(q, rows, lengths, value_size, **options)


def attention_decode_fp8(
    q: npt.NDArray[Any],
    k: npt.NDArray[Any],
    v: npt.NDArray[Any],
    lengths: npt.NDArray[Any],
    sinks: npt.NDArray[Any] | None,
    k_scale: npt.NDArray[Any],
    v_scale: npt.NDArray[Any],
    **options: Any,
) -> tuple[Reference, Reference]:
    """`attention_decode` over k * k_scale and v * v_scale, scales [G]."""
    return attention_decode(q, _scaled(k, k_scale), _scaled(v, v_scale), lengths, sinks, **options)


def attention_decode_paged_fp8(
    q: npt.NDArray[Any],
    k: npt.NDArray[Any],
    v: npt.NDArray[Any],
    table: npt.NDArray[Any],
    lengths: npt.NDArray[Any],
    sinks: npt.NDArray[Any] | None,
    k_scale: npt.NDArray[Any],
    v_scale: npt.NDArray[Any],
    **options: Any,
) -> tuple[Reference, Reference]:
    """`attention_decode_paged` over k * k_scale and v * v_scale, scales [G]."""
    keys, values = (_scaled(gathered(x, table), s) for x, s in ((k, k_scale), (v, v_scale)))
    return attention_decode(q, keys, values, lengths, sinks, **options)


def _scaled(x: npt.NDArray[Any], scale: npt.NDArray[Any]) -> npt.NDArray[np.float64]:
    wide: npt.NDArray[np.float64] = np.asarray(x, dtype=np.float64)
    return wide * np.asarray(scale, dtype=np.float64)[None, :, None, None]
