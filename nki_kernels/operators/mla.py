"""The operators `mla_decode` and `mla_decode_paged`: absorbed latent attention over its cache."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import numpy.typing as npt

from nki_kernels.hardware.spec import CoreSpec
from nki_kernels.kernels.attention.decode_steps import DecodeConfig, DecodeRule
from nki_kernels.kernels.attention.mla import mla_decode as mla_kernel
from nki_kernels.operators.attention_decode import (
    DECODES,
    DTYPES,
    keys_of,
    option_problems,
    value_problems,
)
from nki_kernels.operators.contract import Axes, Operand, Operator, Options

__all__ = ["MLA_DECODES", "mla_decode"]


def _as_decode(axes: Axes) -> dict[str, int]:
    """Return the axes of the same problem with one KV head."""
    return {**axes, "G": 1}


def _configure(paged: bool, axes: Axes, dtype: str, spec: CoreSpec) -> Any:
    return DECODES[paged, False].configure(_as_decode(axes), dtype, spec)


def _limits(paged: bool, axes: Axes, dtype: str, spec: CoreSpec) -> tuple[str, ...]:
    reasons = []
    if axes["E"] > axes["D"]:
        reasons.append(
            f"value_size is {axes['E']} and rows of the cache have {axes['D']} columns; at most "
            "that many are values; pass 512 of 576"
        )
    return *reasons, *DECODES[paged, False].limits(_as_decode(axes), dtype, spec)


def _option_problems(options: Options) -> tuple[str, ...]:
    size = options.get("value_size")
    if type(size) is int and size >= 1:
        return option_problems(options)
    reason = f"value_size is {size!r}; an int of at least 1 is needed; pass 512"
    return reason, *option_problems(options)


def _value_problems(paged: bool, inputs: Sequence[Any], options: Options) -> tuple[str, ...]:
    q, cache, *rest = inputs
    # As keys of one head: only their number matters here.
    four = _Shaped((cache.shape[0], 1, *cache.shape[1:]))
    return value_problems(paged, (q, four, four, *rest), options)


class _Shaped:
    def __init__(self, shape: tuple[int, ...]) -> None:
        self.shape = shape


def _arguments(
    paged: bool, inputs: Sequence[Any], options: Options, config: DecodeConfig
) -> tuple[Any, ...]:
    q, cache, *rest = inputs
    scale, size = options.get("scale"), int(options["value_size"])
    factor = float(q.shape[3] ** -0.5 if scale is None else scale)
    rule = DecodeRule(scale=factor, window=int(options.get("window") or 0), softcap=0.0)
    return q, cache, *([] if paged else [None]), *rest, size, rule, config


def _reduced(paged: bool, axes: Axes, config: DecodeConfig, spec: CoreSpec) -> dict[str, int]:
    small = DECODES[paged, False].reduced(_as_decode(axes), config, spec)
    return {letter: size for letter, size in small.items() if letter != "G"}


def _flops(axes: Axes) -> int:
    pairs = axes["B"] * axes["H"] * axes["T"] * keys_of(axes)
    return 2 * pairs * (axes["D"] + axes["E"])


def _operator(paged: bool) -> Operator:
    decode = DECODES[paged, False]
    return Operator(
        name="mla_decode" + "_paged" * paged,
        summary="out = softmax(scale * q.c) c[:E] over the first rows of a cache; lse",
        inputs=(
            Operand("q", ("B", "H", "T", "D")),
            Operand("cache", ("N", "P", "D") if paged else ("B", "S", "D")),
            *([Operand("table", ("B", "W"), dtype="int32")] if paged else []),
            Operand("lengths", ("B",), dtype="int32"),
        ),
        outputs=decode.outputs,
        axis_order=tuple("BHTWPNDE" if paged else "BHTSDE"),
        dtypes=DTYPES,
        flops=_flops,
        roundings=decode.roundings,
        chain=decode.chain,
        configure=partial(_configure, paged),
        reduced=partial(_reduced, paged),
        kernel=mla_kernel,
        arguments=partial(_arguments, paged),
        limits=partial(_limits, paged),
        option_problems=_option_problems,
        config_problems=decode.config_problems,
        value_problems=partial(_value_problems, paged),
        option_axes={"E": "value_size"},
    )


#: By whether the cache is paged.
MLA_DECODES: dict[bool, Operator] = {paged: _operator(paged) for paged in (False, True)}


def mla_decode(
    q: npt.NDArray[Any],
    cache: npt.NDArray[Any],
    lengths: npt.NDArray[Any],
    value_size: int,
    *,
    table: npt.NDArray[Any] | None = None,
    scale: float | None = None,
    window: int | None = None,
    config: DecodeConfig | None = None,
    target: str | None = None,
) -> tuple[npt.NDArray[Any], npt.NDArray[Any]]:
    """Multi-head latent attention over its cache, with the up-projections absorbed.

    out[b, h, t] = sum_j softmax_j(scale * q[b, h, t] . c[j]) * c[j, :value_size], over
    j <= lengths[b] - T + t, c = cache[b]. All heads share the cache, which is read once.

    Dimensions:
        B: sequences    H: heads    T: new queries    S: rows of the cache    D: row length
        E: value_size    N, P: pages and their rows    W: pages of a sequence

    Args:
        q: [B, H, T, D], bfloat16 | float16 | float32; the last T positions of each sequence.
        cache: [B, S, D], dtype of `q`: latents beside rotary keys; or, with a table, pages
            [N, P, D], P a power of 2.
        lengths: [B] int32, rows of each sequence, those of the new queries included.
        value_size: columns of a row that are its value; 512 of 576 in DeepSeek's models.
        table: [B, W] int32: page `table[b, j // P]` holds row j.
        scale: None is D ** -0.5, which is not what models use: they scale by the unabsorbed size.
        window: rows a query attends, counted back from its own; None is no limit.
        config: tuning of the kernel, a DecodeConfig; None lets the operator choose.
        target: hardware generation; None means the one in force, as for `matmul`.

    Returns:
        out [B, H, T, E], dtype of `q`, and lse [B, H, T] float32, as of `attention_decode`.

    Raises:
        ShapeError, DtypeError, OptionError, ConfigError: as of `attention_decode`, and for a
            value_size that is no int of 1 to D.

    Source: the kernel is `nki_kernels.kernels.attention.mla`.

    Example:
        >>> import numpy as np
        >>> q, cache = np.zeros((1, 1, 1, 2), np.float32), np.ones((1, 2, 2), np.float32)
        >>> mla_decode(q, cache, np.array([2], np.int32), 1)[0]
        array([[[[1.]]]], dtype=float32)
    """
    options = {"scale": scale, "window": window, "value_size": value_size}
    inputs = [q, cache, *([] if table is None else [table]), lengths]
    op = MLA_DECODES[table is not None]
    out, lse = op.launch(inputs, options, config=config, target=target).result
    return out, lse
