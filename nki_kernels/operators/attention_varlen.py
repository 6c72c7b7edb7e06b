"""The operator `attention_varlen`: sequences of several lengths packed one behind the other.

Boundaries are values on the device and not constants of the kernel: a kernel compiles for minutes,
and every batch has other boundaries. Only the longest length is a constant; scores of tokens
further apart are never computed. What lies between is computed and set to 0, so the cost is that of
a window of the longest length, whatever the others are: sort batches by length.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
import numpy.typing as npt

from nki_kernels.kernels.attention.forward import AttentionConfig
from nki_kernels.kernels.attention.forward import attention_varlen as kernel
from nki_kernels.machine.dtypes import as_dtype
from nki_kernels.operators.attention import ATTENTION, CAUSAL_ATTENTION, rule_of
from nki_kernels.operators.contract import Axes, Operand, Operator, Options

#: Token numbers are compared as float32.
_MOST_TOKENS = 2**24


def _flops(causal: bool, axes: Axes) -> int:
    """Count as if all sequences were of the longest length; causal counts half."""
    pairs = axes["M"] * min(axes["L"], axes["M"])
    whole = 2 * axes["B"] * axes["H"] * pairs * (axes["D"] + axes["E"])
    return whole // 2 if causal else whole


def _configure(axes: Axes, dtype: str, spec: Any) -> AttentionConfig:
    return ATTENTION.configure({**axes, "N": axes["M"]}, dtype, spec)  # type: ignore[no-any-return]


def _reduced(axes: Axes, config: AttentionConfig, spec: Any) -> Axes:
    small = dict(ATTENTION.reduced({**axes, "N": axes["M"]}, config, spec))
    small.pop("N")
    return small


def _limits(axes: Axes, dtype: str, spec: Any) -> tuple[str, ...]:
    reasons = list(ATTENTION.limits({**axes, "N": axes["M"]}, dtype, spec))
    if axes["M"] > _MOST_TOKENS:
        reasons.append(
            f"{axes['M']} tokens; at most {_MOST_TOKENS}, whose numbers float32 holds; split the "
            "batch between two sequences"
        )
    return tuple(reasons)


def _option_problems(options: Options) -> tuple[str, ...]:
    reasons = list(ATTENTION.option_problems(options))
    longest = options.get("max_seqlen")
    whole = isinstance(longest, (int, np.integer)) and not isinstance(longest, bool)
    if not whole or longest < 1:  # type: ignore[operator]
        reasons.append(
            f"max_seqlen is {longest!r}; an int of at least 1 is needed; pass the longest length"
        )
    return tuple(reasons)


def _value_problems(inputs: Sequence[Any], options: Options) -> tuple[str, ...]:
    cuts, tokens = inputs[3], inputs[0].shape[2]
    if not isinstance(cuts, np.ndarray):
        return ()
    lengths = np.diff(cuts.astype(np.int64), append=tokens)
    reasons = []
    if cuts[0] != 0 or lengths.min() < 0:
        reasons.append(
            f"cu_seqlens is {cuts.tolist()}; it must begin with 0, never fall and end by {tokens}, "
            "the number of tokens; pass running sums of the lengths"
        )
    elif lengths.max() > options["max_seqlen"]:
        at = int(lengths.argmax())
        reasons.append(
            f"sequence {at} has {lengths[at]} tokens and max_seqlen is {options['max_seqlen']}; no "
            "sequence, nor the tokens behind the last one, may be longer; pass the longest length"
        )
    return tuple(reasons)


def _arguments(
    causal: bool, inputs: Sequence[Any], options: Options, config: AttentionConfig
) -> tuple[Any, ...]:
    q, k, v, cuts = inputs
    axes = {"D": q.shape[3], "M": q.shape[2], "N": q.shape[2]}
    rule = rule_of(axes, options, causal)
    rule = replace(rule, longest=int(options["max_seqlen"]))
    return q, k, v, cuts, rule, str(as_dtype(options.get("out_dtype") or q.dtype)), config


def _operator(name: str, causal: bool) -> Operator:
    return replace(
        CAUSAL_ATTENTION if causal else ATTENTION,
        name=name,
        inputs=(
            Operand("q", ("B", "H", "M", "D")),
            Operand("k", ("B", "G", "M", "D")),
            Operand("v", ("B", "G", "M", "E")),
            Operand("cu_seqlens", ("C",), dtype="int32"),
        ),
        axis_order=("B", "H", "G", "M", "D", "E", "C", "L"),
        option_axes={"L": "max_seqlen"},
        flops=partial(_flops, causal),
        configure=_configure,
        reduced=_reduced,
        kernel=kernel,
        arguments=partial(_arguments, causal),
        limits=_limits,
        option_problems=_option_problems,
        value_problems=_value_problems,
    )


ATTENTION_VARLEN = _operator("attention_varlen", causal=False)
CAUSAL_ATTENTION_VARLEN = _operator("causal_attention_varlen", causal=True)

Array = npt.NDArray[Any]


def attention_varlen(
    q: Array,
    k: Array,
    v: Array,
    cu_seqlens: Array,
    *,
    max_seqlen: int,
    causal: bool = False,
    window: int | None = None,
    scale: float | None = None,
    softcap: float | None = None,
    config: AttentionConfig | None = None,
    target: str | None = None,
) -> tuple[Array, Array]:
    """Attention within each of several sequences that stand one behind the other.

    As `nki_kernels.ops.attention`, where a query attends keys of its own sequence only.

    Dimensions:
        B: batch    H: query heads    G: key heads, H a multiple    M: tokens of all sequences
        D: head size    E: head size of v    C: sequences and one

    Args:
        q: [B, H, M, D]; every batch has the same boundaries, usually there is one.
        k: [B, G, M, D].
        v: [B, G, M, E].
        cu_seqlens: [C] int32, values of the device: sequence n is the tokens cu_seqlens[n] to
            cu_seqlens[n + 1] - 1; the first is 0. Tokens behind the last boundary (padding) are
            one more sequence.
        max_seqlen: a constant of the kernel that no length exceeds. Cost grows with it, not with
            the lengths.
        causal: see `nki_kernels.ops.attention`, as for the rest.
        window: within a sequence.
        scale: None is 1 / sqrt(D).
        softcap: None is no cap.
        config: tuning of the kernel; None lets the operator choose.
        target: hardware generation.

    Returns:
        out [B, H, M, E] of the dtype of `q`, and lse [B, H, M] float32.

    Raises:
        ShapeError, DtypeError, ConfigError: see `nki_kernels.ops.attention`.
        OptionError: an option out of its range; boundaries that fall, or a longer sequence.

    Source: the kernel is `nki_kernels.kernels.attention.forward`.

    Example:
        >>> import numpy as np
        >>> x = np.ones((1, 1, 4, 4), np.float32)
        >>> cuts = np.array([0, 1, 4], np.int32)
        >>> attention_varlen(x, x, x, cuts, max_seqlen=3)[1].round(3)
        array([[[2.   , 3.099, 3.099, 3.099]]], dtype=float32)
    """
    options = {"window": window, "scale": scale, "softcap": softcap, "max_seqlen": max_seqlen}
    op = CAUSAL_ATTENTION_VARLEN if causal else ATTENTION_VARLEN
    out, lse = op.launch((q, k, v, cu_seqlens), options, config=config, target=target).result
    return out, lse
