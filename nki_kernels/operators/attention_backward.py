"""The operator `attention_backward`: contract, limits and configs.

Its inputs are do, q, k, v and the two results of `attention`, whose options it takes.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import partial
from typing import Any

from nki_kernels.hardware.spec import CoreSpec
from nki_kernels.kernels.attention.backward import AttentionBackwardConfig, attention_backward
from nki_kernels.machine.dtypes import as_dtype
from nki_kernels.operators import attention as forward
from nki_kernels.operators.contract import Axes, Operand, Operator, Options

__all__ = [
    "ATTENTION_BACKWARD",
    "CAUSAL_ATTENTION_BACKWARD",
    "MASKED_ATTENTION_BACKWARD",
    "AttentionBackwardConfig",
]

#: The share of SBUF that tiles can take: those of different sizes leave gaps.
_PACKED = 0.93

#: Tiles of queries per load: each costs its queue 0.6 us, and the first scores wait for it.
_CHUNK = 4

#: Steps between loads and scores, statistics and scores, scores and dS, scores and the products
#: with dO, Q and K. A step takes PE 1.1 us; the transposes of dS by DMA come 2 us after Vector's
#: 0.7, later where loads are under way (causal 8192: 651 us with a lag of 6, 636 with 8). With dS a
#: step behind, Vector does not wait for the selects of a bounded step (4 heads of 4096: 683 us at
#: once, 663; a window of 1024: 274 and 217). In float32 a step takes four times as long, and its
#: tiles twice the room.
_NEAR, _AHEAD, _READY = 8, (24, 16, 12, 8, 6, 4, 2, 1), 2
_DS_LAG, _DV_LAG, _DK_LAG, _DQ_LAG = 1, 2, 3, {2: 8, 4: 3}

#: Steps whose softcap is taken together: two changes of function for all, 2.6 us.
_BATCH = 4

#: A query that attends up to so many blocks of keys: PE turns dS, for loads and stores alone keep
#: the DMA engines busy (32 heads of 512: 306 us with DMA transposes, 243 with PE's; 8 heads of 4096
#: with a window of 128: 587 and 440; of 1024 keys equal; 2 heads of 2048 8 % slower).
_PE_BLOCKS = 2


def _flops(causal: bool, axes: Axes) -> int:
    """Count the five products; causal counts half."""
    pairs = axes["B"] * axes["H"] * axes["M"] * axes["N"]
    whole = 2 * pairs * (3 * axes["D"] + 2 * axes["E"])
    return whole // 2 if causal else whole


def _chain(axes: Axes, spec: CoreSpec) -> int:
    """The reference's magnitudes count roundings themselves, as those of `attention` do."""
    return 1


def _configure(axes: Axes, dtype: str, spec: CoreSpec) -> AttentionBackwardConfig:
    itemsize, p, keys = as_dtype(dtype).itemsize, spec.partitions, spec.moving_fmax
    d, e, lag = axes["D"], axes["E"], _DQ_LAG[itemsize]
    slices = math.ceil(d / p) + math.ceil(e / p)
    # Bytes of a partition: q and do, as they are and transposed, and dq; k, and k and v transposed.
    tile = (slices * p + d + e) * itemsize + 4 * d
    block = (slices * keys + keys // p * d) * itemsize
    room = int(spec.sbuf_usable_bytes * _PACKED)
    # p, ds and its transpose of the steps in flight; float32 of mask, bias and softcap; products of
    # do and out of two chunks, and what is stored of a block.
    room -= (lag + 2) * 3 * keys * itemsize + (5 + _BATCH) * keys * 4
    room -= 2 * _CHUNK * e * (itemsize + 4) + 2 * keys // p * max(d, e) * 4
    # A block is for as many steps as it has tiles of keys, or there are tiles of queries.
    steps = min(keys // p, math.ceil(axes["M"] / p))
    for ahead in _AHEAD:
        tiles = (room - (1 + math.ceil((ahead + lag) / steps)) * block) // tile
        if tiles >= ahead + lag:
            break
    chunk = max(1, min(_CHUNK, tiles // 8))
    return AttentionBackwardConfig(
        keys=keys,
        segment=max(1, tiles - 2 * chunk),
        chunk=chunk,
        near=min(_NEAR, ahead),
        ahead=ahead,
        ready=min(_READY, ahead),
        batch=_BATCH,
        ds_lag=_DS_LAG,
        dv_lag=_DV_LAG,
        dk_lag=_DK_LAG,
        dq_lag=lag,
        dma_above=0 if itemsize > 2 else _PE_BLOCKS * keys,
        fill=d % p != 0 or e % p != 0,
        hwdge=spec.generation >= 3,
    )


def _limits(axes: Axes, dtype: str, spec: CoreSpec) -> tuple[str, ...]:
    reasons = []
    if axes["H"] % axes["G"]:
        reasons.append(
            f"{axes['H']} query heads share {axes['G']} key heads; the first must be a multiple of "
            "the second; repeat or drop heads"
        )
    banks = sum(math.ceil(axes[letter] / spec.stationary_fmax) for letter in ("D", "E"))
    if banks > spec.psum_banks - 1:
        reasons.append(
            f"the head sizes of q and v are {axes['D']} and {axes['E']}; the sums of dk and dv "
            f"take a PSUM bank for every {spec.stationary_fmax} of each, {banks} in all, at most "
            f"{spec.psum_banks - 1} on {spec.name}; use smaller heads"
        )
    most = spec.psum_bank_bytes // 4
    if axes["D"] > most:
        reasons.append(
            f"the head size of q and k is {axes['D']}; a row of dq must fit a PSUM bank, at most "
            f"{most} on {spec.name}; use smaller heads"
        )
    return tuple(reasons)


def _masked_limits(axes: Axes, dtype: str, spec: CoreSpec) -> tuple[str, ...]:
    """Add what `attention` says of masks and biases alone."""
    known = forward.ATTENTION.limits(axes, dtype, spec)
    extra = forward.MASKED_ATTENTION.limits(axes, dtype, spec)
    return (*_limits(axes, dtype, spec), *(reason for reason in extra if reason not in known))


_LEAST = {
    "keys": 1,
    "segment": 1,
    "chunk": 1,
    "near": 0,
    "ahead": 0,
    "ready": 0,
    "batch": 1,
    "dma_above": 0,
    "ds_lag": 0,
    "dv_lag": 0,
    "dk_lag": 0,
    "dq_lag": 0,
}


def _config_problems(config: Any, dtype: str, spec: CoreSpec) -> tuple[str, ...]:
    if not isinstance(config, AttentionBackwardConfig):
        return (f"config is {config!r}; an AttentionBackwardConfig is needed; pass one, or None",)
    reasons = []
    for name, least in _LEAST.items():
        value = getattr(config, name)
        if type(value) is not int or value < least:
            reasons.append(f"config.{name} is {value!r}; it must be an int of at least {least}")
    if not reasons and (config.keys % spec.partitions or config.keys > spec.moving_fmax):
        reasons.append(
            f"config.keys is {config.keys}; {spec.name} takes multiples of {spec.partitions} up to "
            f"{spec.moving_fmax}"
        )
    if not reasons and not config.ready <= config.near <= config.ahead:
        reasons.append(
            f"config.ready is {config.ready}, config.near {config.near}, config.ahead "
            f"{config.ahead}; statistics are made of what is loaded: none may exceed the next"
        )
    if not reasons and config.ds_lag > min(config.dk_lag, config.dq_lag):
        reasons.append(
            f"config.ds_lag is {config.ds_lag}, config.dk_lag {config.dk_lag} and config.dq_lag "
            f"{config.dq_lag}; dK and dQ are products with dS: its lag must not be larger"
        )
    if not reasons and config.dma_above and config.dk_lag > config.dq_lag:
        reasons.append(
            f"config.dk_lag is {config.dk_lag} and config.dq_lag {config.dq_lag}; up to "
            f"{config.dma_above} keys PE turns dS, with dK's product: dq_lag must not be smaller"
        )
    if config.hwdge and spec.generation < 3:
        reasons.append(
            f"config.hwdge needs gen3; {spec.name} is gen{spec.generation}; set it to False"
        )
    return tuple(reasons)


def _option_problems(options: Options) -> tuple[str, ...]:
    """Add to the problems of `attention` what the gradients lack."""
    reasons = forward.ATTENTION.option_problems(options)
    if options.get("max_seqlen") is None:
        return reasons
    reason = (
        f"max_seqlen is {options['max_seqlen']!r}; packed sequences have no gradients yet; leave "
        "it out, and call once per sequence or pass a mask"
    )
    return (*reasons, reason)


def _value_problems(inputs: Sequence[Any], options: Options) -> tuple[str, ...]:
    """Say what `attention` says of its inputs."""
    return forward.ATTENTION.value_problems(inputs[1:4], options)


def _arguments(
    causal: bool, inputs: Sequence[Any], options: Options, config: AttentionBackwardConfig
) -> tuple[Any, ...]:
    q, k = inputs[1], inputs[2]
    extras = inputs[6:] or (None, None, None)
    axes = {"D": q.shape[3], "M": q.shape[2], "N": k.shape[2]}
    rule = forward.rule_of(axes, options, causal)
    out_dtype = str(as_dtype(options.get("out_dtype") or q.dtype))
    return *inputs[:6], *extras, rule, out_dtype, config


def _operator(name: str, causal: bool, extras: bool = False) -> Operator:
    return Operator(
        name=name,
        summary="dq, dk, dv of attention: ds = p * (do.v - do.out), p = exp(scale * q.k - lse)",
        inputs=(
            Operand("do", ("B", "H", "M", "E")),
            *forward.ATTENTION.inputs,
            Operand("out", ("B", "H", "M", "E")),
            Operand("lse", ("B", "H", "M"), dtype="float32"),
            *(forward.MASKED_ATTENTION.inputs[3:] if extras else ()),
        ),
        outputs=(
            Operand("dq", ("B", "H", "M", "D")),
            Operand("dk", ("B", "G", "N", "D")),
            Operand("dv", ("B", "G", "N", "E")),
            *(_EXTRA_OUTPUTS if extras else ()),
        ),
        axis_order=("B", "H", "G", "M", "N", "D", "E"),
        dtypes=("bfloat16", "float16", "float32"),
        flops=partial(_flops, causal),
        roundings=1,
        chain=_chain,
        configure=_configure,
        reduced=forward.ATTENTION.reduced,
        kernel=attention_backward,
        arguments=partial(_arguments, causal),
        limits=_masked_limits if extras else _limits,
        option_problems=_option_problems,
        config_problems=_config_problems,
        value_problems=_value_problems,
    )


_EXTRA_OUTPUTS = (
    Operand("dsinks", ("H",), optional=True, dtype="float32"),
    Operand("dbias", ("R", "S", "M", "N"), optional=True),
)

#: Without bounds, or with those of the options; and with causal as the default.
ATTENTION_BACKWARD = _operator("attention_backward", causal=False)
CAUSAL_ATTENTION_BACKWARD = _operator("causal_attention_backward", causal=True)

#: With sinks, a mask and a bias; dsinks and dbias follow dv where sinks and bias are given.
MASKED_ATTENTION_BACKWARD = _operator("attention_backward", causal=False, extras=True)
