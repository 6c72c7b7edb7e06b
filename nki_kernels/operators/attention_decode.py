"""The operators `attention_decode` and `attention_decode_paged`: a few queries over a KV cache."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import partial
from typing import Any

import numpy as np
import numpy.typing as npt

from nki_kernels.hardware.spec import CoreSpec
from nki_kernels.kernels.attention.decode import attention_decode as contiguous_kernel
from nki_kernels.kernels.attention.decode_steps import DecodeConfig, DecodeRule
from nki_kernels.kernels.attention.paged import attention_decode_paged as paged_kernel
from nki_kernels.machine.dtypes import as_dtype
from nki_kernels.machine.errors import OptionError
from nki_kernels.operators.contract import Axes, Operand, Operator, Options

__all__ = ["DECODES", "DecodeConfig", "attention_decode"]

DTYPES = ("bfloat16", "float16", "float32")

#: Bytes of a tile of K that a partition holds: 32 KiB make steps of 4 MiB, whose softmax hides
#: under PE; steps of half the size cost a tenth of the rate (model).
_TILE_BYTES = 32 * 1024

#: The share of SBUF to plan with: tiles of several sizes leave gaps.
_PACKED = 0.95

#: Of 8 evictions of transposed keys, those of Scalar: Vector has the masks and sums besides.
_BY_SCALAR = 4

#: Key positions, and rows of a paged cache, are computed in float32.
_EXACT = 2**24


def _each(axes: Axes, spec: CoreSpec) -> int:
    """Rows of the output per KV head that share a pass over the cache."""
    group = axes["H"] // axes["G"]
    return group * min(axes["T"], max(1, spec.partitions // group))


def keys_of(axes: Axes) -> int:
    """Keys of a sequence at most."""
    return axes["W"] * axes["P"] if "W" in axes else axes["S"]


def _needed(
    axes: Axes, stored: int, heads: int, tokens: int, ahead: int, lag: int, spec: CoreSpec
) -> int:
    """Bytes of a partition that a step of `heads` heads and `tokens` keys each takes.

    `stored` is the size of an element of K and V.
    """
    itemsize = max(2, stored)
    slices = math.ceil(axes["D"] / spec.partitions)
    each = _each(axes, spec)
    rows = each * axes["G"]
    queries_at_once = each * axes["G"] // axes["H"]
    columns = tokens + (1 if "S" in axes and axes["S"] % spec.partitions else 0)
    keys, values = (heads * columns * axes[letter] * stored for letter in "DE")
    scores = heads * columns * each * (4 * 2 + itemsize)
    if 2 * each >= spec.partitions:
        scores += heads * columns * each * 3  # the maxima of halves
    turned = (lag + 2) * slices * spec.psum_bank_bytes
    queries = 2 * rows * slices * itemsize
    queries += 2 * math.ceil(rows / spec.partitions) * axes["D"] * itemsize
    if stored == 1:
        # Even and odd, once for each token that shares a transpose, and once more before it.
        fold = max(1, spec.partitions // max(1, axes["D"] // 2))
        fold = max(1, min(fold, spec.moving_fmax // each))
        queries *= 2 * fold
    constants = 2 * 4 * spec.partitions + 8 * axes["B"] + 4 * axes["T"] + 8 * rows
    masks = 4 * math.ceil(keys_of(axes) / spec.partitions + 1) + 4 * columns * queries_at_once * 4
    # Statistics, their factors and outputs in float32; then a result and the logarithms.
    groups = math.ceil(axes["G"] / heads)
    statistics = 4 * heads * each * (4 * groups + 12) + axes["E"] * (itemsize + 4)
    logarithms = 4 * 4 * spec.moving_fmax
    fixed = turned + queries + constants + masks + statistics + logarithms
    return (ahead + 1) * keys + (ahead + 2) * values + scores + fixed


def _shape(axes: Axes, stored: int, spec: CoreSpec) -> tuple[int, int, int, int]:
    """Return (heads, tokens, ahead, lag): as large as they come, then as early as they fit."""
    room = int(spec.sbuf_usable_bytes * _PACKED)
    most = max(1, spec.partitions // _each(axes, spec))
    choices = [h for h in range(min(most, axes["G"]), 0, -1) if axes["G"] % h == 0]
    for ahead, lag in ((1, 4), (0, 1), (0, 0)):
        for heads in choices:
            for tokens in _tokens(axes, stored, heads, spec):
                if _needed(axes, stored, heads, tokens, ahead, lag, spec) <= room:
                    return heads, tokens, ahead, lag
    return 1, 1, 0, 0


def _tokens(axes: Axes, stored: int, heads: int, spec: CoreSpec) -> list[int]:
    """Return the keys per partition to try, the longest first."""
    most = max(1, _TILE_BYTES // (heads * axes["D"] * stored))
    if "P" not in axes:
        # Blocks of one length, as few as it takes.
        whole = max(1, axes["S"] // spec.partitions)
        lengths = {math.ceil(whole / count) for count in range(1, whole + 1)}
        return sorted((n for n in lengths if n <= most), reverse=True)
    if heads > 1:
        return [axes["P"]] if axes["P"] <= most else []
    # Parts of pages, so that few long pages fill the partitions too.
    parts = [p for p in _powers(axes["P"]) if axes["P"] // p <= spec.partitions]
    filling = [p for p in parts if axes["W"] * axes["P"] // p >= spec.partitions]
    return [p for p in (filling or parts[-1:]) if p <= most] or parts[-1:]


def _powers(size: int) -> list[int]:
    """Return size, size / 2, ... down to 1, for a power of 2."""
    return [size >> n for n in range(size.bit_length())]


def _stored(dtype: str, quantized: bool) -> int:
    return 1 if quantized else as_dtype(dtype).itemsize


def _configure(quantized: bool, axes: Axes, dtype: str, spec: CoreSpec) -> DecodeConfig:
    heads, tokens, ahead, lag = _shape(axes, _stored(dtype, quantized), spec)
    scalar = _BY_SCALAR if spec.generation >= 3 else 0
    return DecodeConfig(heads, tokens, ahead, lag, scalar, spec.generation >= 3)


def _limits(quantized: bool, axes: Axes, dtype: str, spec: CoreSpec) -> tuple[str, ...]:
    if axes["H"] % axes["G"]:
        reason = (
            f"{axes['H']} query heads share {axes['G']} key heads; the first must be a multiple of "
            "the second; repeat or drop heads"
        )
        return (reason,)
    reasons = []
    group = axes["H"] // axes["G"]
    if group > spec.partitions:
        reasons.append(
            f"{group} query heads share a key head; at most {spec.partitions} on {spec.name}; "
            "attend with some of the query heads at a time"
        )
    if keys_of(axes) > _EXACT:
        reasons.append(
            f"the cache has {keys_of(axes)} keys per sequence; at most {_EXACT} are counted "
            "exactly; split the cache and merge by the LSE"
        )
    if "P" in axes:
        reasons += _page_limits(axes, spec)
    room = int(spec.sbuf_usable_bytes * _PACKED)
    least = _needed(axes, _stored(dtype, quantized), 1, 1, 0, 0, spec)
    if not reasons and least > room:
        reasons.append(
            f"a step of one key head takes {least} bytes of a partition, {spec.name} has {room}; "
            "decode fewer sequences, heads or keys at once"
        )
    return tuple(reasons)


def _page_limits(axes: Axes, spec: CoreSpec) -> list[str]:
    reasons = []
    size = axes["P"]
    if size & (size - 1):
        reasons.append(f"a page has {size} keys; a power of 2 is needed; use pages of 16 to 128")
    # A step of one head may cut a page into as many parts as there are partitions.
    pieces = axes["N"] * axes["G"] * min(size, spec.partitions)
    if pieces > _EXACT:
        reasons.append(
            f"the cache has {axes['N']} pages of {axes['G']} heads; at most {_EXACT} parts, here "
            f"{pieces}, are counted exactly; split the cache"
        )
    return reasons


def option_problems(options: Options) -> tuple[str, ...]:
    """Return what is wrong with scale, softcap and window."""
    reasons = []
    scale, cap, window = (options.get(name) for name in ("scale", "softcap", "window"))
    if scale is not None and not _finite(scale):
        reasons.append(f"scale is {scale!r}; a finite number or None is needed; pass D ** -0.5")
    if cap is not None and not (_finite(cap) and cap > 0):
        reasons.append(f"softcap is {cap!r}; a finite number above 0 or None is needed; pass 50.0")
    whole = isinstance(window, (int, np.integer)) and not isinstance(window, bool)
    if window is not None and not (whole and window >= 1):
        reasons.append(f"window is {window!r}; an int of at least 1 or None is needed; pass 128")
    return tuple(reasons)


def _finite(value: Any) -> bool:
    number = isinstance(value, (int, float, np.integer, np.floating))
    return number and not isinstance(value, bool) and math.isfinite(np.float32(value))


def value_problems(paged: bool, inputs: Sequence[Any], options: Options) -> tuple[str, ...]:
    """Return what is wrong with lengths and table."""
    lengths, k = np.asarray(inputs[4 if paged else 3]), inputs[1]
    most = inputs[3].shape[1] * k.shape[2] if paged else k.shape[2]
    wrong = [int(n) for n in lengths if not 0 <= n <= most]
    if wrong:
        return (f"lengths has {wrong[0]}; allowed are 0 to {most}, the keys of the cache; cut it",)
    if paged and isinstance(inputs[3], np.ndarray):
        table, pages = inputs[3], k.shape[0]
        used = np.arange(table.shape[1])[None, :] * k.shape[2] < lengths[:, None]
        bad = table[used & ((table < 0) | (table >= pages))]
        if bad.size:
            reason = (
                f"table has page {int(bad[0])} before the end of its sequence; the cache has pages "
                f"0 to {pages - 1}; correct the table"
            )
            return (reason,)
    return ()


def _config_problems(config: Any, dtype: str, spec: CoreSpec) -> tuple[str, ...]:
    if not isinstance(config, DecodeConfig):
        return (
            f"config is a {type(config).__name__}; a DecodeConfig is needed; pass one, or None",
        )
    reasons = [
        f"config.{name} is {getattr(config, name)!r}; an int from {least} on is needed; raise it"
        for name, least in (("heads", 1), ("tokens", 1), ("ahead", 0), ("lag", 0), ("scalar", 0))
        if type(getattr(config, name)) is not int or getattr(config, name) < least
    ]
    if spec.generation < 3 and config.hwdge:
        reasons.append(
            f"config.hwdge is True; {spec.name} has no hardware descriptor engine; set it False"
        )
    return tuple(reasons)


def _reduced(axes: Axes, config: DecodeConfig, spec: CoreSpec) -> dict[str, int]:
    """Keep two sequences, the heads of two steps, and a block of keys and what is ragged."""
    group = axes["H"] // axes["G"]
    heads = min(axes["G"], config.heads)
    small = {**axes, "B": min(axes["B"], 2), "G": heads, "H": heads * group}
    if "W" in axes:
        wide = min(axes["W"], spec.partitions + axes["W"] % spec.partitions)
        return {**small, "W": wide, "N": small["B"] * wide}
    block = spec.partitions * config.tokens
    return {**small, "S": min(axes["S"], block + axes["S"] % block)}


def _flops(axes: Axes) -> int:
    pairs = axes["B"] * axes["H"] * axes["T"] * keys_of(axes)
    return 2 * pairs * (axes["D"] + axes["E"])


def _chain(axes: Axes, spec: CoreSpec) -> int:
    """The reference counts the roundings of plain sums; merging blocks doubles them at most."""
    return 2


def _arguments(
    quantized: bool, inputs: Sequence[Any], options: Options, config: DecodeConfig
) -> tuple[Any, ...]:
    depth, scale = inputs[0].shape[3], options.get("scale")
    rule = DecodeRule(
        scale=float(depth**-0.5 if scale is None else scale),
        window=int(options.get("window") or 0),
        softcap=float(options.get("softcap") or 0.0),
    )
    scales = () if quantized else (None, None)
    return *inputs, *scales, rule, config


def _operator(paged: bool, quantized: bool) -> Operator:
    cache = ("N", "G", "P") if paged else ("B", "G", "S")
    stored = "float8_e4m3" if quantized else None
    scales = [Operand(name, ("G",), dtype="float32") for name in ("k_scale", "v_scale")]
    return Operator(
        name="attention_decode" + "_paged" * paged + "_fp8" * quantized,
        summary="out = softmax(scale * q.k) v over the first keys of a cache; lse = log sum exp",
        inputs=(
            Operand("q", ("B", "H", "T", "D")),
            Operand("k", (*cache, "D"), dtype=stored),
            Operand("v", (*cache, "E"), dtype=stored),
            *([Operand("table", ("B", "W"), dtype="int32")] if paged else []),
            Operand("lengths", ("B",), dtype="int32"),
            Operand("sinks", ("H",), optional=True, dtype="float32"),
            *(scales if quantized else []),
        ),
        outputs=(
            Operand("out", ("B", "H", "T", "E")),
            Operand("lse", ("B", "H", "T"), dtype="float32"),
        ),
        axis_order=tuple("BHGTWPNDE" if paged else "BHGTSDE"),
        dtypes=DTYPES[:2] if quantized else DTYPES,
        flops=_flops,
        roundings=1,
        chain=_chain,
        configure=partial(_configure, quantized),
        reduced=_reduced,
        kernel=paged_kernel if paged else contiguous_kernel,
        arguments=partial(_arguments, quantized),
        limits=partial(_limits, quantized),
        option_problems=option_problems,
        config_problems=_config_problems,
        value_problems=partial(value_problems, paged),
    )


#: By (paged, fp8 cache).
DECODES: dict[tuple[bool, bool], Operator] = {
    (paged, quantized): _operator(paged, quantized)
    for paged in (False, True)
    for quantized in (False, True)
}


def _unused_scales(k: Any) -> OptionError:
    return OptionError(
        f"attention_decode: k_scale or v_scale is given and k has dtype {k.dtype}; scales belong "
        "to a float8_e4m3 cache; multiply them into `scale` and the result"
    )


def attention_decode(
    q: npt.NDArray[Any],
    k: npt.NDArray[Any],
    v: npt.NDArray[Any],
    lengths: npt.NDArray[Any],
    *,
    table: npt.NDArray[Any] | None = None,
    sinks: npt.NDArray[Any] | None = None,
    k_scale: npt.NDArray[Any] | None = None,
    v_scale: npt.NDArray[Any] | None = None,
    scale: float | None = None,
    window: int | None = None,
    softcap: float | None = None,
    config: DecodeConfig | None = None,
    target: str | None = None,
) -> tuple[npt.NDArray[Any], npt.NDArray[Any]]:
    """Attention of the newest queries of each sequence over its KV cache.

    p[j] = lengths[b] - T + t; out[b, h, t] = sum_j softmax_j(s) * v[b, g, j], over j <= p
    s[j] = scale * sum_d q[b, h, t, d] * k[b, g, j, d], g = h * G // H

    The softmax is shifted by the exact maximum of each row: any finite scores are safe. Scores and
    sums are float32; probabilities are rounded to the dtype of `v` before they meet it.

    Dimensions:
        B: sequences    H: query heads, a multiple of G, KV heads    T: new queries
        S: keys of the cache    D, E: head sizes of keys and values    N, P: pages and their keys

    Args:
        q: [B, H, T, D], bfloat16 | float16 | float32; the last T positions of each sequence.
        k: [B, G, S, D], dtype of `q`; or, with a table, pages [N, G, P, D], P a power of 2.
            With 2-byte queries also float8_e4m3.
        v: [B, G, S, E] or [N, G, P, E], dtype of `k`.
        lengths: [B] int32, keys of each sequence, those of the new queries included. What lies
            behind them has no weight but must be finite.
        table: [B, W] int32: page `table[b, j // P]` holds key j. Entries behind the last key may be
            anything.
        sinks: [H] float32, one more score per head, without a value.
        k_scale: [G] float32, factors of float8_e4m3 keys by head; None is 1.
        v_scale: likewise of the values.
        scale: None is D ** -0.5.
        window: keys a query attends, counted back from its own; None is no limit.
        softcap: s becomes softcap * tanh(s / softcap); None is no cap.
        config: tuning of the kernel, upper bounds; None lets the operator choose.
        target: hardware generation; None means the one in force, as for `matmul`.

    Returns:
        out [B, H, T, E], dtype of `q`, and lse [B, H, T] float32, the logarithm of the sum of
        exponentials, the sink's included. A row that attends nothing is 0, and -inf without a sink.

    Raises:
        ShapeError: sizes that differ, a wrong rank, a zero size, a strided array, more query heads
            per KV head than partitions, a page whose size is no power of 2.
        DtypeError: a dtype that is not supported.
        OptionError: an option out of range, a length beyond the cache, a page that is none, scales
            without an fp8 cache.
        ConfigError: a `config` that cannot run on the target.

    Source: the kernels are `nki_kernels.kernels.attention.decode` and `.paged`.

    Example:
        >>> import numpy as np
        >>> one = np.ones((1, 1, 1, 2), np.float32)
        >>> out, lse = attention_decode(one, one, one, np.array([1], np.int32), scale=1.0)
        >>> out, lse
        (array([[[[1., 1.]]]], dtype=float32), array([[[2.]]], dtype=float32))
    """
    options = {"scale": scale, "window": window, "softcap": softcap}
    quantized = str(getattr(k, "dtype", None)) == "float8_e4m3"
    inputs = [q, k, v, *([] if table is None else [table]), lengths, sinks]
    if quantized:
        ones = np.ones(k.shape[1], np.float32)
        inputs += [ones if factors is None else factors for factors in (k_scale, v_scale)]
    elif k_scale is not None or v_scale is not None:
        raise _unused_scales(k)
    op = DECODES[table is not None, quantized]
    run = op.launch(inputs, options, config=config, target=target)
    out, lse = run.result
    return out, lse
