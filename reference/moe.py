"""References of the mixture of experts."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from reference.matmul import MAX_SLOPE, Reference, activate

Array = npt.NDArray[np.float64]

#: The largest float32: logits beyond it, and infinities, count as it; NaN counts as its negative.
LARGEST = float(np.finfo(np.float32).max)


def router(
    x: npt.NDArray[Any],
    weight: npt.NDArray[Any],
    bias: npt.NDArray[Any] | None = None,
    selection_bias: npt.NDArray[Any] | None = None,
    *,
    top_k: int,
    score: str = "softmax",
    score_first: bool = True,
    renormalize: bool = False,
    scale: float = 1.0,
    groups: int = 1,
    top_groups: int | None = None,
    group_score: str = "max",
) -> tuple[Reference, Reference, Reference]:
    """Choose experts and weigh them in float64; see `nki_kernels.ops.router` for the formulas.

    The magnitude of a weight bounds what an error of one unit per term of the logits does to it:
    an error d of every logit changes a score by at most 2 d of itself, a quotient by twice that.

    Returns:
        indices [T, k] (magnitude 0), weights [T, k], counts [E] (magnitude 0).
    """
    logits, terms = _logits(x, weight, bias)
    ranked = _scores(logits, score) if score_first else logits
    if selection_bias is not None:
        ranked = np.clip(ranked + selection_bias.astype(np.float64), -LARGEST, LARGEST)
    if top_groups is not None and top_groups < groups:
        ranked = np.where(_in_best_groups(ranked, groups, top_groups, group_score), ranked, -np.inf)
    if score == "softmax" and score_first and selection_bias is None:
        # Equal scores by underflow are still ordered: the softmax is monotone.
        order = np.lexsort((np.broadcast_to(np.arange(logits.shape[1]), logits.shape), -logits,
                            -ranked), axis=1)  # fmt: skip
    else:
        order = np.argsort(-ranked, axis=1, kind="stable")
    indices = order[:, :top_k]
    chosen = np.take_along_axis(logits, indices, axis=1)
    if score_first:
        weights = np.take_along_axis(_scores(logits, score), indices, axis=1)
    else:
        weights = _scores(chosen, score)
    if renormalize:
        if score == "softmax":
            weights = _scores(chosen, score)
        else:
            with np.errstate(invalid="ignore"):
                weights = weights / weights.sum(axis=1, keepdims=True)
    weights = scale * weights
    magnitude = np.abs(weights) * (4 + 4 * terms.max(axis=1, keepdims=True))
    counts = np.bincount(indices.ravel(), minlength=logits.shape[1]).astype(np.float64)
    return (
        Reference(indices.astype(np.float64), np.zeros(indices.shape)),
        Reference(weights, magnitude),
        Reference(counts, np.zeros(counts.shape)),
    )


def _logits(
    x: npt.NDArray[Any], weight: npt.NDArray[Any], bias: npt.NDArray[Any] | None
) -> tuple[Array, Array]:
    """Return the logits and the sums of the absolute values of their terms."""
    with np.errstate(invalid="ignore"):
        x64, w64 = x.astype(np.float64), weight.astype(np.float64)
        logits, terms = x64 @ w64, np.abs(x64) @ np.abs(w64)
        if bias is not None:
            logits = logits + bias.astype(np.float64)
            terms = terms + np.abs(bias.astype(np.float64))
    logits = np.where(np.isnan(logits), -LARGEST, np.clip(logits, -LARGEST, LARGEST))
    return logits, np.where(np.isfinite(terms), terms, 0.0)


def _scores(logits: Array, score: str) -> Array:
    if score == "sigmoid":
        with np.errstate(over="ignore"):
            result: Array = 1 / (1 + np.exp(-logits))
        return result
    powers = np.exp(logits - logits.max(axis=1, keepdims=True))
    quotient: Array = powers / powers.sum(axis=1, keepdims=True)
    return quotient


def _in_best_groups(ranked: Array, groups: int, top_groups: int, group_score: str) -> Array:
    """Return [T, E], whether an expert belongs to one of the best groups of its token."""
    tokens, experts = ranked.shape
    members = -np.sort(-ranked.reshape(tokens, groups, -1), axis=2)
    value = members[:, :, 0] if group_score == "max" else members[:, :, :2].sum(axis=2)
    best = np.argsort(-value, axis=1, kind="stable")[:, :top_groups]
    inside = np.zeros((tokens, groups), bool)
    np.put_along_axis(inside, best, True, axis=1)
    return np.repeat(inside, experts // groups, axis=1)


def dispatch(
    x: npt.NDArray[Any], indices: npt.NDArray[Any], *, experts: int
) -> tuple[Reference, Reference, Reference]:
    """Sort the choices of all tokens by expert, stable; absent ones (no id of an expert) last.

    Returns:
        rows [T * K, H], the token of each sorted choice; slots [T, K], the place of each choice,
        T * K for absent ones; offsets [E], running counts of the experts. All magnitudes are 0.
    """
    flat = indices.ravel().astype(np.int64)
    absent = (flat < 0) | (flat >= experts)
    order = np.argsort(np.where(absent, experts, flat), kind="stable")
    slots = np.empty(flat.size)
    slots[order] = np.arange(flat.size)
    slots[absent] = flat.size
    rows = x.astype(np.float64)[order // indices.shape[1]]
    offsets = np.cumsum(np.bincount(flat[~absent], minlength=experts)).astype(np.float64)
    results = (rows, slots.reshape(indices.shape), offsets)
    return tuple(Reference(r, np.zeros(r.shape)) for r in results)  # type: ignore[return-value]


def combine(
    rows: npt.NDArray[Any], slots: npt.NDArray[Any], weights: npt.NDArray[Any] | None = None
) -> Reference:
    """Add up the rows of each token: y[t] = sum_k weights[t, k] * rows[slots[t, k]].

    A slot below 0 or beyond the rows contributes nothing.
    """
    size = rows.shape[1]
    value = np.zeros((slots.shape[0], size))
    magnitude = np.zeros_like(value)
    present = (slots >= 0) & (slots < rows.shape[0])
    for choice in range(slots.shape[1]):
        here = present[:, choice]
        terms = rows[slots[here, choice]].astype(np.float64)
        if weights is not None:
            terms = terms * weights[here, choice].astype(np.float64)[:, None]
        value[here] += terms
        magnitude[here] += np.abs(terms)
    return Reference(value, magnitude)


def grouped_matmul(
    a: npt.NDArray[Any], b: npt.NDArray[Any], offsets: npt.NDArray[Any]
) -> Reference:
    """Multiply each group of rows by its own matrix; rows from the last offset on are 0.

    c[m, n] = sum_k a[m, k] * b[g, k, n] for offsets[g - 1] <= m < offsets[g]
    """
    value = np.zeros((a.shape[0], b.shape[2]))
    magnitude = np.zeros_like(value)
    start = 0
    for group, stop in enumerate(offsets.tolist()):
        rows, matrix = a[start:stop].astype(np.float64), b[group].astype(np.float64)
        value[start:stop] = rows @ matrix
        magnitude[start:stop] = np.abs(rows) @ np.abs(matrix)
        start = stop
    return Reference(value, magnitude)


def experts(
    x: npt.NDArray[Any],
    indices: npt.NDArray[Any],
    scores: npt.NDArray[Any],
    up: npt.NDArray[Any],
    down: npt.NDArray[Any],
    up_bias: npt.NDArray[Any] | None = None,
    down_bias: npt.NDArray[Any] | None = None,
    *,
    activation: str = "silu",
    interleaved: bool = False,
    limit: float | None = None,
    alpha: float = 1.702,
    rounded_rows: bool | None = None,
) -> Reference:
    """Apply to each token the experts it chose, in float64 but for two rounding points.

    hidden = round(f(x·up + up_bias)); row = round(hidden·down + down_bias), both to the dtype of
    x; y[t] = sum_k scores[t, k] * row of expert indices[t, k], without ids that name no expert.

    What float32 sums may put on the other side of a rounding boundary may come out a step away:
    such steps are added to the magnitude, as in `reference.mlp`.

    Args:
        x: [T, H].
        indices: [T, K].
        scores: [T, K].
        up: [E, H, F], F = 2 I (gate and up) or I.
        down: [E, I, H].
        up_bias: [E, F] or None.
        down_bias: [E, H] or None.
        activation: "relu", "silu", "gelu" or "gelu_tanh".
        interleaved: gate and up alternate along the columns; else gate comes first.
        limit: f(g, u) = g' * sigmoid(alpha * g') * (u' + 1), both clamped; else activation(g) * u.
        alpha: see limit.
        rounded_rows: rows are rounded to the dtype of x, or stay float32 sums; None allows both.
    """
    value = np.zeros((x.shape[0], down.shape[2]))
    magnitude = np.zeros_like(value)
    for expert in range(up.shape[0]):
        token, choice = np.nonzero(indices == expert)
        if token.size == 0:
            continue
        bias = None if up_bias is None else up_bias[expert]
        features, step = _features(
            x[token], up[expert], bias, activation, interleaved, limit, alpha, down.shape[1]
        )
        rows, weights = _rounded(features, x.dtype), np.asarray(down[expert], np.float64)
        sums, terms = rows @ weights, np.abs(rows) @ np.abs(weights)
        terms = terms + step @ np.abs(weights) / _STEP_UNIT
        if down_bias is not None:
            sums = sums + down_bias[expert].astype(np.float64)
            terms = terms + np.abs(down_bias[expert].astype(np.float64))
        if rounded_rows:
            sums, terms = _round_again(sums, terms, x)
        elif rounded_rows is None:
            near, terms = _round_again(sums, terms, x)
            terms = terms + np.abs(near - sums) / _STEP_UNIT
        factor = scores[token, choice].astype(np.float64)[:, None]
        np.add.at(value, token, factor * sums)
        np.add.at(magnitude, token, np.abs(factor) * terms)
    return Reference(value, magnitude)


#: The error that `_features` gives away as magnitude, in units that any chain of 16 allows.
_STEP_UNIT = 16 * 2.0**-24


def _rounded(values: Array, dtype: Any) -> Array:
    result: Array = values.astype(dtype).astype(np.float64)
    return result


def _round_again(sums: Array, terms: Array, x: npt.NDArray[Any]) -> tuple[Array, Array]:
    """Round sums, and add to their terms the steps that their error may make."""
    error = _UNIT_CHAIN * terms
    step = _rounded(sums + error, x.dtype) - _rounded(sums - error, x.dtype)
    return _rounded(sums, x.dtype), terms + step / _STEP_UNIT


#: float32 roundings of a sum of up to some thousand terms, in tiles of 128, and what follows it.
_UNIT_CHAIN = (128 + 64 + 24) * 2.0**-24


def _features(
    x: npt.NDArray[Any],
    up: npt.NDArray[Any],
    bias: npt.NDArray[Any] | None,
    activation: str,
    interleaved: bool,
    limit: float | None,
    alpha: float,
    inner: int,
) -> tuple[Array, Array]:
    """Return the hidden features before they are rounded, and the step their error may make."""
    x64, w64 = x.astype(np.float64), up.astype(np.float64)
    sums, terms = x64 @ w64, np.abs(x64) @ np.abs(w64)
    if bias is not None:
        sums, terms = sums + bias.astype(np.float64), terms + np.abs(bias.astype(np.float64))
    unit = _UNIT_CHAIN
    if up.shape[1] == inner:
        exact = activate(sums, activation)
        error = unit * MAX_SLOPE * terms
    else:
        half = sums.shape[1] // 2
        pick = (slice(0, None, 2), slice(1, None, 2)) if interleaved else None
        first, second = pick or (slice(0, half), slice(half, None))
        gate, other = sums[:, first], sums[:, second]
        gate_terms, other_terms = terms[:, first], terms[:, second]
        if limit is not None:
            gate, other = np.minimum(gate, limit), np.clip(other, -limit, limit) + 1
            active = gate / (1 + np.exp(-alpha * gate))
            other_terms = other_terms + 1
        else:
            active = activate(gate, activation)
        exact = active * other
        slack = MAX_SLOPE * gate_terms * (np.abs(other) + unit * other_terms)
        error = unit * (slack + np.abs(active) * other_terms)
    return exact, _rounded(exact + error, x.dtype) - _rounded(exact - error, x.dtype)
