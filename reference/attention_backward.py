"""Reference of `attention_backward`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from reference.attention import attends, attention
from reference.matmul import Reference

_UNIT = 2.0**-24
_BFLOAT16 = 2.0**-8

Array = npt.NDArray[np.float64]


def attention_backward(
    do: npt.NDArray[Any],
    q: npt.NDArray[Any],
    k: npt.NDArray[Any],
    v: npt.NDArray[Any],
    out: npt.NDArray[Any],
    lse: npt.NDArray[Any],
    sinks: npt.NDArray[Any] | None = None,
    mask: npt.NDArray[Any] | None = None,
    bias: npt.NDArray[Any] | None = None,
    *,
    scale: float | None = None,
    softcap: float | None = None,
    slopes: Sequence[float] | None = None,
    depth: int = 128,
    **pattern: Any,
) -> tuple[Reference, ...]:
    """Gradients of `attention` in float64, from the out and lse given.

    p = exp(s - lse), delta_i = do_i·out_i, ds_ij = p_ij * (do_i·v_j - delta_i)
    dv_j = sum_i p_ij do_i; dk_j = scale * sum_i ds'_ij q_i; dq_i = scale * sum_j ds'_ij k_j
    dsinks = -sum_i exp(sink - lse_i) * delta_i; dbias = ds

    with ds' = ds * (1 - tanh^2) behind a softcap, else ds. A row whose lse is -inf has p = 0.

    A score is off as in `attention`, p by its exponent's error, and p and ds of 2-byte inputs are
    rounded to bfloat16 before they are multiplied (ds of dbias only through p). do·v and delta are
    off by their chain times their absolute terms, which p scales, and every sum by its own chain.

    Args:
        do: [B, H, M, E].
        q: [B, H, M, D].
        k: [B, G, N, D].
        v: [B, G, N, E].
        out: [B, H, M, E].
        lse: [B, H, M].
        sinks: [H], or None.
        mask: [1 | B, 1 | H, M, N], nonzero to attend, or None.
        bias: likewise.
        scale: None is 1 / sqrt(D).
        softcap: None is no cap.
        slopes: [H], rounded to float32, or None.
        depth: terms the array sums in one pass.
        pattern: `causal`, `align` and `window` of `attends`.

    Returns:
        dq, dk, dv, and dsinks and dbias where sinks and bias are given; magnitudes in 2^-24.
    """
    rounded = 0.0 if np.asarray(q).dtype == np.float32 else _BFLOAT16
    group = q.shape[1] // k.shape[1]
    do64, q64, out64 = (np.asarray(x, dtype=np.float64) for x in (do, q, out))
    k64, v64 = (np.repeat(np.asarray(x, dtype=np.float64), group, axis=1) for x in (k, v))
    factor = q.shape[3] ** -0.5 if scale is None else scale
    seen = attends(q.shape[2], k.shape[2], **pattern)[None, None] & np.isfinite(lse)[..., None]
    if mask is not None:
        seen = seen & (np.asarray(mask) != 0)
    s, off, slope, slope_off = _scores(q64, k64, factor, softcap, depth)
    far = _distances(slopes, q.shape[2], k.shape[2], pattern)
    s = s - far if bias is None else s - far + np.asarray(bias, dtype=np.float64)
    shift = np.where(np.isfinite(lse), np.asarray(lse, dtype=np.float64), 0.0)[..., None]
    p = np.exp(np.where(seen, s - shift, -np.inf))
    exponent = np.where(seen, off + 6 * (np.abs(s) + np.abs(shift) + np.abs(far)) + 6, 0.0)
    p_off = np.exp(np.minimum(exponent * _UNIT, 80.0)) * (1 + rounded) - 1
    delta, delta_off, inner, inner_off = _inner(do64, v64, out64, depth)
    ds = p * inner
    ds_off = p * ((1 + p_off) * inner_off + np.abs(inner) * (p_off + 3 * _UNIT * (1 + p_off)))
    steep = ds * slope
    steep_off = ds_off * (slope + slope_off * _UNIT) + np.abs(ds) * slope_off * _UNIT
    steep_off = steep_off * (1 + rounded) + np.abs(steep) * (rounded + 2 * _UNIT)
    rows = q.shape[2] * group
    found = [
        _sum("bhmn,bhnd->bhmd", steep, steep_off, k64, k.shape[2], depth, factor),
        _sum("bhmn,bhmd->bhnd", steep, steep_off, q64, rows, depth, factor, group),
        _sum("bhmn,bhmd->bhnd", p, p * p_off, do64, rows, depth, 1.0, group),
    ]
    if sinks is not None:
        found.append(_dsinks(np.asarray(sinks, dtype=np.float64), lse, delta, delta_off, depth))
    if bias is not None:
        found.append(_dbias(ds, ds_off, np.asarray(bias).shape))
    return tuple(found)


def _scores(
    q: Array, k: Array, factor: float, softcap: float | None, depth: int
) -> tuple[Array, Array, Array, Array]:
    """Return the scores and how far they are off, and so the slope of the softcap."""
    s = _swapped(q, k) * factor
    off = _chain(q.shape[3], depth) * _swapped(np.abs(q), np.abs(k)) * abs(factor)
    if not softcap:
        return s, off, np.ones_like(s), np.zeros_like(s)
    t = np.tanh(s / softcap)
    slope = 1 - t * t
    slope_off = 2 * np.abs(t) * (slope * off / softcap + 2) + 6
    return softcap * t, off, slope, slope_off


def _distances(
    slopes: Sequence[float] | None, rows: int, keys: int, pattern: dict[str, Any]
) -> Array:
    """Return what a score loses by slopes, [H, M, N]."""
    shift = keys - rows if pattern.get("align") == "bottom-right" else 0
    places = np.abs(np.arange(rows)[:, None] + shift - np.arange(keys)).astype(np.float64)
    listed = np.zeros(1) if slopes is None else np.asarray(slopes, np.float32)
    far: Array = listed.astype(np.float64)[:, None, None] * places
    return far


def _inner(do: Array, v: Array, out: Array, depth: int) -> tuple[Array, Array, Array, Array]:
    """Return delta and do·v - delta, each with how far it is off: in roundings, and relative."""
    size = do.shape[3]
    delta = np.sum(do * out, axis=3)
    delta_off = (_chain(size, depth) + size) * np.sum(np.abs(do * out), axis=3)
    terms = _chain(size, depth) * _swapped(np.abs(do), np.abs(v))
    inner_off = (terms + delta_off[..., None]) * _UNIT
    return delta, delta_off, _swapped(do, v) - delta[..., None], inner_off


def inputs_of(
    do: npt.NDArray[Any],
    q: npt.NDArray[Any],
    k: npt.NDArray[Any],
    v: npt.NDArray[Any],
    *extras: npt.NDArray[Any] | None,
    **options: Any,
) -> tuple[npt.NDArray[Any], ...]:
    """Return (do, q, k, v, out, lse) with out and lse of the reference, rounded as a kernel would.

    Args:
        do: [B, H, M, E], handed through.
        q: [B, H, M, D].
        k: [B, G, N, D].
        v: [B, G, N, E].
        extras: sinks, mask and bias.
        options: those of `attention`.
    """
    out, lse = attention(q, k, v, *extras, **options)
    return do, q, k, v, out.value.astype(q.dtype), lse.value.astype(np.float32)


def _chain(terms: int, depth: int) -> int:
    """Roundings one of `terms` summed passes through: in the array, from tile to tile, after."""
    return 3 + min(terms, depth) + 2 * -(-terms // depth)


def _swapped(a: Array, b: Array) -> Array:
    return a @ b.swapaxes(2, 3)


def _sum(
    axes: str,
    weights: Array,
    off: Array,
    values: Array,
    terms: int,
    depth: int,
    factor: float,
    group: int = 1,
) -> Reference:
    """Contract weights, each off by `off`, with values; add up the heads of a group."""
    size, chain = np.abs(values), _chain(terms, depth) * _UNIT
    total = np.einsum(axes, weights, values, optimize=True) * factor
    spread = off + chain * (np.abs(weights) + off)
    error = np.einsum(axes, spread, size, optimize=True) * abs(factor) / _UNIT
    if group > 1:
        shape = (total.shape[0], total.shape[1] // group, group, *total.shape[2:])
        total, error = total.reshape(shape).sum(axis=2), error.reshape(shape).sum(axis=2)
    return Reference(total, error)


def _dsinks(
    sinks: Array, lse: npt.NDArray[Any], delta: Array, delta_off: Array, depth: int
) -> Reference:
    shift = np.asarray(lse, dtype=np.float64)
    some = np.isfinite(shift)
    shift = np.where(some, shift, 0.0)
    logits = sinks[None, :, None]
    share = np.where(some, np.exp(np.where(some, logits - shift, 0.0)), 0.0)
    chain = _chain(delta.shape[0] * delta.shape[2], depth) + delta.shape[0] * delta.shape[2]
    relative = 6 + 6 * (np.abs(logits) + np.abs(shift)) + chain
    error = np.sum(share * (delta_off + np.abs(delta) * relative), axis=(0, 2))
    return Reference(-np.sum(share * delta, axis=(0, 2)), error)


def _dbias(ds: Array, off: Array, shape: tuple[int, ...]) -> Reference:
    """Sum ds over the batches and heads that share a bias."""
    shared = tuple(axis for axis in (0, 1) if shape[axis] == 1)
    count = ds.shape[0] * ds.shape[1]
    total = np.sum(ds, axis=shared, keepdims=True)
    error = np.sum(off + count * _UNIT * (np.abs(ds) + off), axis=shared, keepdims=True)
    return Reference(total, error / _UNIT)
