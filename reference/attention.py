"""Reference of `attention`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from reference.matmul import Reference

#: Roundings of a distance to a reference that is worth at most e^30, there and back.
_REFERENCE = 4 * 30

#: Half a unit in the last place of bfloat16, in units of 2^-24.
_BFLOAT16 = 2.0**16


def attends(
    rows: int,
    keys: int,
    *,
    causal: bool = False,
    align: str = "top-left",
    window: int | None = None,
) -> npt.NDArray[np.bool_]:
    """Return [rows, keys]: whether query i attends key j.

    With p = i, or p = i + keys - rows where the last query meets the last key (bottom-right):
    causal j <= p; window j > p - window, and without causal also j < p + window.
    """
    shift = keys - rows if align == "bottom-right" else 0
    i, j = np.arange(rows)[:, None] + shift, np.arange(keys)[None, :]
    found = np.ones((rows, keys), dtype=np.bool_)
    if causal:
        found &= j <= i
    if window is not None:
        found &= j > i - window
        if not causal:
            found &= j < i + window
    return found


def attention(
    q: npt.NDArray[Any],
    k: npt.NDArray[Any],
    v: npt.NDArray[Any],
    sinks: npt.NDArray[Any] | None = None,
    mask: npt.NDArray[Any] | None = None,
    bias: npt.NDArray[Any] | None = None,
    *,
    scale: float | None = None,
    softcap: float | None = None,
    slopes: Sequence[float] | None = None,
    depth: int = 128,
    **pattern: Any,
) -> tuple[Reference, Reference]:
    """Softmax attention in float64.

    s[i, j] = scale * q[i]·k[j], capped to softcap * tanh(s / softcap), plus bias[i, j], less
        slopes[h] * |i - j|, where i counts as `align` says
    p[i, j] = exp(s[i, j] - lse[i]) where i attends j; lse[i] = log(sum_j exp(s[i, j]) + exp(sink))
    out[i] = sum_j p[i, j] * v[j]. A query that attends nothing, no sink either: 0 and -inf.

    The magnitudes are in float32 roundings (2^-24). A score is off by e = (its sum's chain) * scale
    * sum_d|q k| and a few roundings of itself and of the shifted exponent; the probabilities of
    2-byte inputs are rounded to bfloat16 before they meet v and are summed. To first order

    magnitude(out) = sum_j p |v - out| (e + b) + chain * sum_j p |v| + chain * |out|
    magnitude(lse) = sum_j p (e + b) + chain + 4 |lse|

    Args:
        q: [B, H, Sq, D].
        k: [B, G, Sk, D]; query head h reads head h * G // H.
        v: [B, G, Sk, E].
        sinks: [H], one more logit per head, without a value, or None.
        mask: [1 | B, 1 | H, Sq, Sk], nonzero to attend, or None.
        bias: of the mask's shape, added to the scores, or None.
        scale: None is 1 / sqrt(D).
        softcap: None is no cap.
        slopes: [H], rounded to float32, or None.
        depth: terms the array sums in one pass.
        pattern: `causal`, `align` and `window` of `attends`.

    Returns:
        (out [B, H, Sq, E], lse [B, H, Sq]), each value and magnitude.
    """
    rounded = 0.0 if np.asarray(q).dtype == np.float32 else _BFLOAT16
    group = q.shape[1] // k.shape[1]
    q64 = np.asarray(q, dtype=np.float64)
    k64, v64 = (np.repeat(np.asarray(x, dtype=np.float64), group, axis=1) for x in (k, v))
    factor = q.shape[3] ** -0.5 if scale is None else scale
    s = q64 @ k64.swapaxes(2, 3) * factor
    terms = np.abs(q64) @ np.abs(k64).swapaxes(2, 3) * abs(factor)
    if softcap:
        s = softcap * np.tanh(s / softcap)
        # tanh shortens errors; its result and the cap round once more, counted with |s| below.
    far: Any = 0.0
    if slopes is not None:
        far = _distances(q.shape[2], k.shape[2], slopes, pattern.get("align"))
        s = s - far
    if bias is not None:
        s = s + np.asarray(bias, dtype=np.float64)
    seen = attends(q.shape[2], k.shape[2], **pattern)[None, None]
    if mask is not None:
        seen = seen & (np.asarray(mask) != 0)
    kept = np.where(seen, s, -np.inf)
    none = np.full(q.shape[1], -np.inf)
    extra = np.asarray(none if sinks is None else sinks, dtype=np.float64)[None, :, None, None]
    top = np.maximum(np.max(kept, axis=3, keepdims=True), extra)
    top = np.where(np.isfinite(top), top, 0.0)
    weight = np.exp(kept - top)
    total = np.sum(weight, axis=3, keepdims=True) + np.exp(extra - top)
    p = weight / np.where(total > 0, total, 1.0)
    out = p @ v64
    with np.errstate(divide="ignore"):
        lse = np.log(total[..., 0]) + top[..., 0]
    error = _score_error(q.shape[3], depth) * terms + 6 * (np.abs(s) + np.abs(top)) + 4 + rounded
    # A distance may be counted from a place near the query, and that part taken back later.
    error = error + 4 * np.abs(far) + (0 if slopes is None else _REFERENCE)
    # A ratio of two exponentials, each off by up to e in its exponent: beyond the first order.
    error = np.expm1(np.minimum(2 * error * 2.0**-24, 80.0)) * 2.0**23
    return _magnitudes(p, v64, out, lse, np.where(seen, error, 0.0), k.shape[2], depth)


def attention_varlen(
    q: npt.NDArray[Any],
    k: npt.NDArray[Any],
    v: npt.NDArray[Any],
    cu_seqlens: npt.NDArray[Any],
    *,
    max_seqlen: int | None = None,
    **options: Any,
) -> tuple[Reference, Reference]:
    """`attention` where query and key belong to one sequence.

    Sequence n is the tokens cu_seqlens[n] .. cu_seqlens[n + 1] - 1; those behind the last boundary
    are one more. `max_seqlen` changes nothing.
    """
    number = np.searchsorted(cu_seqlens, np.arange(q.shape[2]), side="right")
    same = number[:, None] == number
    return attention(q, k, v, None, same[None, None], None, **options)


def _distances(
    rows: int, keys: int, slopes: Sequence[float], align: str | None
) -> npt.NDArray[np.float64]:
    """Return slopes[h] * |i - j|, [H, rows, keys]."""
    shift = keys - rows if align == "bottom-right" else 0
    places = np.abs(np.arange(rows)[:, None] + shift - np.arange(keys))
    factors = np.asarray(slopes, dtype=np.float32).astype(np.float64)
    return np.asarray(factors[:, None, None] * places)


def _chain(terms: int, depth: int) -> int:
    """Roundings one of `terms` summed passes through: in the array, then from tile to tile."""
    return 1 + min(terms, depth) + -(-terms // depth)


def _score_error(size: int, depth: int) -> int:
    return _chain(size, depth) + 2


def _magnitudes(
    p: npt.NDArray[np.float64],
    v: npt.NDArray[np.float64],
    out: npt.NDArray[np.float64],
    lse: npt.NDArray[np.float64],
    error: npt.NDArray[np.float64],
    keys: int,
    depth: int,
) -> tuple[Reference, Reference]:
    # sum_j p e |v - out| <= sum_j p e |v| + |out| sum_j p e would be far too wide where v is
    # constant, so it is formed as it stands, one column of v at a time.
    spread = np.empty_like(out)
    weighted = p * error
    for column in range(v.shape[3]):
        distance = np.abs(v[:, :, None, :, column] - out[:, :, :, None, column])
        spread[..., column] = np.sum(weighted * distance, axis=3)
    chain = _chain(keys, depth) + 4
    # A sink takes part of the sum, and its share moves with it as well.
    magnitude = spread + chain * (p @ np.abs(v) + np.abs(out))
    finite = np.where(np.isfinite(lse), np.abs(lse), 0.0)
    return (
        Reference(out, magnitude),
        Reference(lse, np.sum(weighted, axis=3) + chain + 4 * finite),
    )
