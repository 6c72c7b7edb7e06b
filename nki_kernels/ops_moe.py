"""The mixture of experts on NumPy arrays; `nki_kernels.ops` offers these functions."""

from __future__ import annotations

from typing import Any

import numpy.typing as npt

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
