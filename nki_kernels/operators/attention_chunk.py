"""The operator `attention_chunked_prefill`: a chunk of a prompt over a paged KV cache."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import partial
from typing import Any

import numpy.typing as npt

from nki_kernels.hardware.spec import CoreSpec
from nki_kernels.kernels.attention.chunked import ChunkConfig
from nki_kernels.kernels.attention.chunked import attention_chunked_prefill as chunk_kernel
from nki_kernels.kernels.attention.decode_steps import DecodeRule
from nki_kernels.machine.dtypes import as_dtype
from nki_kernels.operators.attention_decode import (
    DECODES,
    DTYPES,
    keys_of,
    option_problems,
    value_problems,
)
from nki_kernels.operators.contract import Axes, Operand, Operator, Options

__all__ = ["ATTENTION_CHUNKED_PREFILL", "ChunkConfig", "attention_chunked_prefill"]

#: Keys of a head that a partition holds: 4 KiB a descriptor at depth 128.
_TOKENS = 16

#: Blocks whose products are summed in PSUM: PE waits 1.9 us for their eviction (model).
_BLOCKS = 2

#: Groups between exponentials and products; see `attention`.
_LAG = 3

#: The share of SBUF to plan with: tiles of several sizes leave gaps.
_PACKED = 0.9


def _bytes(axes: Axes, dtype: str, tokens: int, blocks: int, banks: int, spec: CoreSpec) -> int:
    """Bytes of a partition that two sections and all the rest take, masks kept for heads aside."""
    size, group = as_dtype(dtype).itemsize, axes["H"] // axes["G"]
    slices, width = math.ceil(axes["D"] / spec.partitions), spec.moving_fmax
    turned = tokens * spec.partitions * slices
    block = (turned + tokens * (axes["D"] + 2 * axes["E"] + 1)) * size
    queries = 2 * group * slices * width * size
    weights = banks * width * ((_LAG + 3) * size + 2 * 4)
    sums = group * width // spec.stationary_fmax * (axes["E"] + 1) * (2 * 4 + 2 * size)
    positions = 4 * math.ceil(keys_of(axes) / spec.partitions + tokens)
    constants = 8 * spec.partitions + 4 * axes["T"] + 4 * axes["H"] + 8 * width + 8 * axes["B"]
    return (2 * blocks + 1) * block + queries + weights + sums + positions + constants


def _shape(axes: Axes, dtype: str, spec: CoreSpec) -> tuple[int, int, int, int]:
    """Return (tokens, blocks, banks, masks): the largest that fit."""
    room = int(spec.sbuf_usable_bytes * _PACKED)
    banks = max(1, (spec.psum_banks - spec.moving_fmax // spec.stationary_fmax) // 2)
    least = max(1, axes["P"] // spec.partitions)
    tokens = max(least, min(axes["P"], _TOKENS))
    mask = spec.moving_fmax * as_dtype(dtype).itemsize
    while True:
        for blocks in range(_BLOCKS, 0, -1):
            taken = _bytes(axes, dtype, tokens, blocks, banks, spec)
            if taken <= room:
                return tokens, blocks, banks, (room - taken) // mask
        if tokens == least:
            return tokens, 1, banks, 0
        tokens //= 2


def _configure(axes: Axes, dtype: str, spec: CoreSpec) -> ChunkConfig:
    tokens, blocks, banks, masks = _shape(axes, dtype, spec)
    exact = DECODES[True, False].configure(axes, dtype, spec)
    return ChunkConfig(tokens, blocks, banks, masks, _LAG, spec.generation >= 3, exact)


def _limits(axes: Axes, dtype: str, spec: CoreSpec) -> tuple[str, ...]:
    reasons = list(DECODES[True, False].limits(axes, dtype, spec))
    most = spec.psum_bank_bytes // 4 - 1
    if axes["E"] > most:
        reasons.append(
            f"the head size of v is {axes['E']}; an output row and its sum must fit a PSUM bank, "
            f"at most {most} on {spec.name}; use attention_decode, or split v along its last axis"
        )
    room = int(spec.sbuf_usable_bytes * _PACKED)
    tokens = max(1, axes["P"] // spec.partitions)
    if not reasons and _bytes(axes, dtype, tokens, 1, 1, spec) > room:
        reasons.append(
            f"the queries and sums of a key head take {_bytes(axes, dtype, tokens, 1, 1, spec)} "
            f"bytes of a partition, {spec.name} has {room}; use attention_decode, which takes "
            "queries in parts"
        )
    return tuple(reasons)


def _config_problems(config: Any, dtype: str, spec: CoreSpec) -> tuple[str, ...]:
    if not isinstance(config, ChunkConfig):
        return (f"config is a {type(config).__name__}; a ChunkConfig is needed; pass one, or None",)
    room = (spec.psum_banks - spec.moving_fmax // spec.stationary_fmax) // 2
    reasons = [
        f"config.{name} is {getattr(config, name)!r}; an int from {least} to {most} is needed; "
        "change it"
        for name, least, most in (
            ("tokens", 1, 2**15), ("blocks", 1, 2**15), ("banks", 1, max(1, room)),
            ("masks", 0, 2**15), ("lag", 0, 2**15),
        )
        if type(getattr(config, name)) is not int or not least <= getattr(config, name) <= most
    ]  # fmt: skip
    if config.hwdge and spec.generation < 3:
        reasons.append(
            f"config.hwdge is True; {spec.name} has no hardware descriptor engine; set it False"
        )
    return tuple(reasons)


def _arguments(inputs: Sequence[Any], options: Options, config: ChunkConfig) -> tuple[Any, ...]:
    depth, scale = inputs[0].shape[3], options.get("scale")
    rule = DecodeRule(
        scale=float(depth**-0.5 if scale is None else scale),
        window=int(options.get("window") or 0),
        softcap=float(options.get("softcap") or 0.0),
    )
    return *inputs, rule, config


def _flops(axes: Axes) -> int:
    """Count the pairs of a full cache: all keys, less half of those of the chunk."""
    pairs = axes["T"] * keys_of(axes) - axes["T"] * (axes["T"] - 1) // 2
    return 2 * axes["B"] * axes["H"] * max(0, pairs) * (axes["D"] + axes["E"])


def _chain(axes: Axes, spec: CoreSpec) -> int:
    """The reference counts the roundings of plain sums; sections double them at most."""
    return 2


def _reduced(axes: Axes, config: ChunkConfig, spec: CoreSpec) -> dict[str, int]:
    """Keep two key heads of one sequence, some queries, and two sections of pages."""
    group, heads = axes["H"] // axes["G"], min(axes["G"], 2)
    parts = axes["P"] // config.tokens
    section = max(1, config.blocks * spec.partitions // parts)
    wide = min(axes["W"], 2 * section)
    queries = min(axes["T"], spec.stationary_fmax + axes["T"] % spec.stationary_fmax)
    return {**axes, "B": 1, "H": heads * group, "G": heads, "T": queries, "W": wide, "N": wide}


ATTENTION_CHUNKED_PREFILL = Operator(
    name="attention_chunked_prefill",
    summary="out = softmax(scale * q.k) v over the first keys of a paged cache; many queries",
    inputs=(
        Operand("q", ("B", "H", "T", "D")),
        Operand("k", ("N", "G", "P", "D")),
        Operand("v", ("N", "G", "P", "E")),
        Operand("table", ("B", "W"), dtype="int32"),
        Operand("lengths", ("B",), dtype="int32"),
        Operand("sinks", ("H",), optional=True, dtype="float32"),
    ),
    outputs=(
        Operand("out", ("B", "H", "T", "E")),
        Operand("lse", ("B", "H", "T"), dtype="float32"),
    ),
    axis_order=tuple("BHGTWPNDE"),
    dtypes=DTYPES,
    flops=_flops,
    roundings=1,
    chain=_chain,
    configure=_configure,
    reduced=_reduced,
    kernel=chunk_kernel,
    arguments=_arguments,
    limits=_limits,
    option_problems=option_problems,
    config_problems=_config_problems,
    value_problems=partial(value_problems, True),
    unknown_trips=0,
)


def attention_chunked_prefill(
    q: npt.NDArray[Any],
    k: npt.NDArray[Any],
    v: npt.NDArray[Any],
    lengths: npt.NDArray[Any],
    table: npt.NDArray[Any],
    *,
    sinks: npt.NDArray[Any] | None = None,
    scale: float | None = None,
    window: int | None = None,
    softcap: float | None = None,
    config: ChunkConfig | None = None,
    target: str | None = None,
) -> tuple[npt.NDArray[Any], npt.NDArray[Any]]:
    """Attention of a chunk of each prompt over its paged KV cache, which has the chunk already.

    What `attention_decode` computes, for many queries: p[j] = lengths[b] - T + t;
    out[b, h, t] = sum_j softmax_j(s) * v[j], over j <= p, s[j] = scale * q[b, h, t] . k[j].

    Exponentials are taken unshifted and checked afterwards. Where a row's sum is outside of
    2^-60 .. 2^60, or a key that a query does not attend would overflow, everything is computed
    again by the slower kernel of `attention_decode`: any finite scores are safe.

    Dimensions:
        B: sequences    H: query heads, a multiple of G, KV heads    T: queries of a chunk
        N, P: pages and their keys    W: pages of a sequence    D, E: head sizes

    Args:
        q: [B, H, T, D], bfloat16 | float16 | float32; the last T positions of each sequence.
        k: [N, G, P, D], dtype of `q`, P a power of 2.
        v: [N, G, P, E], dtype of `q`.
        lengths: [B] int32, keys of each sequence, those of the chunk included. A shorter one than
            T leaves the first queries with nothing to attend. What lies behind has no weight but
            must be finite, and is computed all the same: cut `table` to the longest sequence.
        table: [B, W] int32: page `table[b, j // P]` holds key j. Entries behind the last key may be
            anything.
        sinks: [H] float32, one more score per head, without a value.
        scale: None is D ** -0.5.
        window: keys a query attends, counted back from its own; None is no limit.
        softcap: s becomes softcap * tanh(s / softcap); None is no cap.
        config: tuning of the kernel; None lets the operator choose.
        target: hardware generation; None means the one in force, as for `matmul`.

    Returns:
        out [B, H, T, E], dtype of `q`, and lse [B, H, T] float32, as of `attention_decode`.

    Raises:
        ShapeError, DtypeError, OptionError, ConfigError: as of `attention_decode`, and for a head
            size of v beyond a PSUM bank.

    Source: the kernel is `nki_kernels.kernels.attention.chunked`.

    Example:
        >>> import numpy as np
        >>> q, k = np.zeros((1, 1, 2, 2), np.float32), np.ones((1, 1, 2, 2), np.float32)
        >>> v = np.arange(4, dtype=np.float32).reshape(1, 1, 2, 2)
        >>> length, table = np.array([2], np.int32), np.zeros((1, 1), np.int32)
        >>> attention_chunked_prefill(q, k, v, length, table)[0]
        array([[[[0., 1.],
                 [1., 2.]]]], dtype=float32)
    """
    options = {"scale": scale, "window": window, "softcap": softcap}
    inputs = (q, k, v, table, lengths, sinks)
    run = ATTENTION_CHUNKED_PREFILL.launch(inputs, options, config=config, target=target)
    out, lse = run.result
    return out, lse
