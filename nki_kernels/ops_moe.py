"""The mixture of experts on NumPy arrays; `nki_kernels.ops` offers these functions."""

from __future__ import annotations

from typing import Any

import numpy.typing as npt

from nki_kernels.operators.dispatch import COMBINE, DISPATCH, DispatchConfig
from nki_kernels.operators.experts import EXPERTS, ExpertsConfig
from nki_kernels.operators.grouped import GROUPED_MATMUL, GroupedConfig
from nki_kernels.operators.router import ROUTER, RouterConfig


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
    config: RouterConfig | None = None,
    target: str | None = None,
) -> tuple[npt.NDArray[Any], npt.NDArray[Any], npt.NDArray[Any]]:
    """Choose experts for each token, and weigh them.

    logits = x @ weight + bias;  s = score(logits) over all experts
    chosen = the top_k of (s if score_first else logits) + selection_bias, best first
    weights = s[chosen] if score_first else score(logits[chosen]);  w / sum(w) if renormalize
    weights *= scale;  counts[e] = how often e was chosen

    Of equal experts the lower comes first. With groups, only experts of a token's best `top_groups`
    groups (consecutive experts, ranked by their best one, or by the sum of their two best) are
    eligible. Everything is float32. Where nothing is added to scores the logits are compared, which
    have the same order and do not underflow.

    Dimensions:
        T: tokens, >= 1        H: hidden, >= 1        E: experts, 1 to 1024 (trn2)

    Args:
        x: [T, H], dense row-major, bfloat16 | float16 | float32.
        weight: [H, E], dtype of `x`.
        bias: [E], dtype of `x`, or None: part of the logits.
        selection_bias: [E], float32, or None: moves the choice and no weight; -inf puts an expert
            behind all others.
        top_k: experts per token, 1 to 32, at most E.
        score: "softmax" or "sigmoid".
        score_first: score all experts before the choice; else the chosen only.
        renormalize: make a token's weights sum to `scale`.
        scale: factor of all weights.
        groups: groups of E / groups experts each.
        top_groups: eligible groups of a token; None means all.
        group_score: "max" or "top2".
        config: tuning of the kernel; None lets the operator choose. It never changes the result.
        target: hardware generation; None means the one in force.

    Returns:
        indices [T, top_k] int32, weights [T, top_k] float32, counts [E] int32. A logit that is NaN
        or below float32 counts as its lowest number, one above as its largest: every index is one
        of an expert, whatever the input.

    Raises:
        ShapeError: sizes or layouts that are wrong, top_k above E, too large an E or H.
        DtypeError: a dtype that is not supported, or different ones.
        OptionError: groups that do not divide E or hold too few experts, a NaN in selection_bias.
        ConfigError: a `config` that cannot run on the target.

    Source: the kernel is `nki_kernels.kernels.moe.router`.

    Example:
        >>> import numpy as np
        >>> x, identity = np.array([[1, 4, 2, 4]], np.float32), np.eye(4, dtype=np.float32)
        >>> indices, weights, counts = router(x, identity, top_k=2, renormalize=True)
        >>> indices.tolist(), weights.tolist(), counts.tolist()
        ([[1, 3]], [[0.5, 0.5]], [0, 1, 0, 1])
    """
    options = {
        "top_k": top_k, "score": score, "score_first": score_first, "renormalize": renormalize,
        "scale": scale, "groups": groups, "top_groups": top_groups, "group_score": group_score,
    }  # fmt: skip
    inputs = (x, weight, bias, selection_bias)
    run = ROUTER.launch(inputs, options, config=config, target=target)
    indices, weights, counts = run.result
    return indices, weights, counts


def dispatch(
    x: npt.NDArray[Any],
    indices: npt.NDArray[Any],
    *,
    experts: int,
    config: DispatchConfig | None = None,
    target: str | None = None,
) -> tuple[npt.NDArray[Any], npt.NDArray[Any], npt.NDArray[Any]]:
    """Sort the choices of all tokens by expert, and copy each token's row to its places.

    rows[slots[t, k]] = x[t];  offsets[e] = number of choices of experts 0 .. e

    The sort is stable: within an expert choices keep the order (t, k). No choice is dropped. An id
    below 0 or from `experts` on is absent (an expert of another device, say): its rows come after
    those of all experts, and its slot is T * K, which `combine` skips.

    Dimensions:
        T: tokens, >= 1        H: row length, >= 1        K: choices, >= 1; T * K below 2^24

    Args:
        x: [T, H], dense row-major, bfloat16 | float16 | float32.
        indices: [T, K], int32, between -2^24 and 2^24.
        experts: E, 1 to 3583 (trn2).
        config: tuning of the kernel; None lets the operator choose. It never changes the result.
        target: hardware generation; None means the one in force.

    Returns:
        rows [T * K, H] of the dtype of `x`, slots [T, K] int32, offsets [E] int32.

    Raises:
        ShapeError: sizes or layouts that are wrong, or too large for SBUF.
        DtypeError: a dtype that is not supported.
        OptionError: `experts` is no positive int, or an id is beyond 2^24.
        ConfigError: a `config` that cannot run on the target.

    Source: the kernel is `nki_kernels.kernels.moe.dispatch`.

    Example:
        >>> import numpy as np
        >>> x, ids = np.array([[1.0], [2.0]], np.float32), np.array([[1, 0], [7, 1]], np.int32)
        >>> rows, slots, offsets = dispatch(x, ids, experts=2)
        >>> rows.ravel().tolist(), slots.tolist(), offsets.tolist()
        ([1.0, 1.0, 2.0, 2.0], [[1, 0], [4, 2]], [1, 3])
    """
    run = DISPATCH.launch((x, indices), {"experts": experts}, config=config, target=target)
    rows, slots, offsets = run.result
    return rows, slots, offsets


def combine(
    rows: npt.NDArray[Any],
    slots: npt.NDArray[Any],
    weights: npt.NDArray[Any] | None = None,
    *,
    out_dtype: Any = None,
    config: DispatchConfig | None = None,
    target: str | None = None,
) -> npt.NDArray[Any]:
    """Add up the rows of each token, weighted: the way back from `dispatch`.

    y[t] = sum_k weights[t, k] * rows[slots[t, k]]

    A slot below 0 or from S on contributes nothing, whatever its weight, if that is finite. Sums
    are float32, in the order of k, and rounded once.

    Dimensions:
        S: rows, >= 1    H: row length, >= 1    T: tokens, >= 1    K: choices, >= 1

    Args:
        rows: [S, H], dense row-major, bfloat16 | float16 | float32.
        slots: [T, K], int32.
        weights: [T, K], float32, or None for ones.
        out_dtype: dtype of the result; None means the dtype of `rows`.
        config: tuning of the kernel; None lets the operator choose. It never changes the result.
        target: hardware generation; None means the one in force.

    Returns:
        [T, H], a new array of dtype `out_dtype`.

    Raises:
        ShapeError: sizes or layouts that are wrong, or rows too long for SBUF.
        DtypeError: a dtype that is not supported.
        ConfigError: a `config` that cannot run on the target.

    Source: the kernel is `nki_kernels.kernels.moe.combine`.

    Example:
        >>> import numpy as np
        >>> rows = np.array([[1.0], [10.0], [100.0]], np.float32)
        >>> combine(rows, np.array([[0, 2], [1, 3]], np.int32)).ravel().tolist()
        [101.0, 10.0]
    """
    options = {"out_dtype": out_dtype}
    run = COMBINE.launch((rows, slots, weights), options, config=config, target=target)
    result: npt.NDArray[Any] = run.result
    return result


def grouped_matmul(
    a: npt.NDArray[Any],
    b: npt.NDArray[Any],
    offsets: npt.NDArray[Any],
    *,
    out_dtype: Any = None,
    config: GroupedConfig | None = None,
    target: str | None = None,
) -> npt.NDArray[Any]:
    """Multiply consecutive groups of rows, each by its own matrix.

    c[m, n] = sum_k a[m, k] * b[g, k, n] for offsets[g - 1] <= m < offsets[g]

    `torch.nn.functional.grouped_mm` of a matrix and a batch of matrices. Groups may be empty, and
    one may have every row. Rows from the last offset on belong to no group and are 0. Products are
    accumulated in float32 and rounded once.

    Dimensions:
        M: rows, below 2^22    K: contraction, >= 1    N: columns, >= 1    G: groups, >= 1

    Args:
        a: [M, K], dense row-major, bfloat16 | float16 | float32.
        b: [G, K, N], dtype of `a`.
        offsets: [G], int32, the end of each group.
        out_dtype: dtype of the result; None means the dtype of `a`.
        config: tuning of the kernel; None lets the operator choose. It never changes the result.
        target: hardware generation; None means the one in force.

    Returns:
        [M, N], a new array of dtype `out_dtype`.

    Raises:
        ShapeError: sizes or layouts that are wrong, or too large for SBUF.
        DtypeError: a dtype that is not supported, or different ones.
        OptionError: offsets that decrease, or end beyond M.
        ConfigError: a `config` that cannot run on the target.

    Source: the kernel is `nki_kernels.kernels.moe.grouped`.

    Example:
        >>> import numpy as np
        >>> a, b = np.ones((4, 1), np.float32), np.array([[[1.0]], [[2.0]]], np.float32)
        >>> grouped_matmul(a, b, np.array([1, 3], np.int32)).ravel().tolist()
        [1.0, 2.0, 2.0, 0.0]
    """
    options = {"out_dtype": out_dtype}
    run = GROUPED_MATMUL.launch((a, b, offsets), options, config=config, target=target)
    result: npt.NDArray[Any] = run.result
    return result


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
    out_dtype: Any = None,
    config: ExpertsConfig | None = None,
    target: str | None = None,
) -> npt.NDArray[Any]:
    """Apply to each token the experts it chose, weighted: a mixture of experts after its router.

    y[t] = sum_k scores[t, k] * (hidden·down[e] + down_bias[e]), e = indices[t, k]
    hidden = activation(g) * u, (g, u) = x[t]·up[e] + up_bias[e]   (activation(u) if F is I)
    hidden = g' * sigmoid(alpha * g') * (u' + 1) with a limit: g' = min(g, limit), u' = clip(u)

    One kernel sorts the choices, gathers rows, multiplies and adds up; no token is dropped. Up to a
    tile of tokens, only the weights of experts that somebody chose leave HBM. Sums are float32;
    hidden features are rounded to the dtype of `x`, and so is each expert's row, where there are
    more tokens than a tile.

    Dimensions:
        T: tokens, to 32768 (trn2)    H: hidden    I: features    K: choices    E: experts
        F: 2 I columns of gate and up, or I

    Args:
        x: [T, H], dense row-major, bfloat16 | float16 | float32.
        indices: [T, K], int32; an id below 0 or from E on contributes nothing.
        scores: [T, K], float32.
        up: [E, H, F], dtype of `x`; gate before up, or up alone.
        down: [E, I, H], dtype of `x`.
        up_bias: [E, F], dtype of `x`, or None.
        down_bias: [E, H], dtype of `x`, or None.
        activation: "silu", "gelu", "gelu_tanh" or "relu".
        interleaved: gate and up alternate, as GPT-OSS stores them.
        limit: clamp of GPT-OSS's form, 7.0 there; None for the others.
        alpha: slope inside that form's sigmoid.
        out_dtype: dtype of the result; None means the dtype of `x`.
        config: tuning of the kernel; None lets the operator choose. It never changes the result.
        target: hardware generation; None means the one in force.

    Returns:
        [T, H], a new array of dtype `out_dtype`.

    Raises:
        ShapeError: sizes or layouts that are wrong, or too large for SBUF.
        DtypeError: a dtype that is not supported, or different ones.
        OptionError: an unknown activation, or a form of gate and up where there is no gate.
        ConfigError: a `config` that cannot run on the target.

    Source: the kernel is `nki_kernels.kernels.moe.experts`.

    Example:
        >>> import numpy as np
        >>> x, up = np.ones((1, 1), np.float32), np.array([[[1.0]], [[2.0]]], np.float32)
        >>> chosen, scores = np.array([[0, 1]], np.int32), np.array([[1.0, 10.0]], np.float32)
        >>> experts(x, chosen, scores, up, up, activation="relu")
        array([[41.]], dtype=float32)
    """
    options = {
        "activation": activation, "interleaved": interleaved, "limit": limit,
        "alpha": alpha, "out_dtype": out_dtype,
    }  # fmt: skip
    inputs = (x, indices, scores, up, down, up_bias, down_bias)
    run = EXPERTS.launch(inputs, options, config=config, target=target)
    result: npt.NDArray[Any] = run.result
    return result
