"""The operators `kv_cache_write` and `kv_cache_write_paged`: new keys and values, in place.

They have no output, and so no place among the operators that are benchmarked against a reference.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from nki_kernels.hardware.spec import CoreSpec
from nki_kernels.kernels.attention.cache import CacheConfig
from nki_kernels.kernels.attention.cache import kv_cache_write as contiguous_kernel
from nki_kernels.kernels.attention.cache import kv_cache_write_paged as paged_kernel
from nki_kernels.machine.dtypes import as_dtype
from nki_kernels.machine.errors import OptionError
from nki_kernels.operators.contract import Axes, Operand, Operator, Options

__all__ = ["KV_CACHE_WRITE", "KV_CACHE_WRITE_PAGED", "CacheConfig", "kv_cache_write"]

DTYPES = ("bfloat16", "float16", "float32", "float8_e4m3", "float8_e5m2")

#: Rows of a cache that a 32-bit number counts, with room for what marks a row as outside.
_MOST_ROWS = 2**30

#: New rows from which on one DMA per sequence is faster than descriptors of single rows (model:
#: 17 against 20 us at 8 sequences of one token, 200 against 23 at one of 512).
_SCATTER_TOKENS = 8

_MODES = ("scatter", "hwdge")


def _configure(axes: Axes, dtype: str, spec: CoreSpec) -> CacheConfig:
    scatter = "N" in axes or axes["T"] < _SCATTER_TOKENS
    return CacheConfig(scatter=scatter, hwdge=spec.generation >= 3)


def _limits(axes: Axes, dtype: str, spec: CoreSpec) -> tuple[str, ...]:
    reasons = []
    if axes["G"] > spec.partitions:
        reasons.append(
            f"the cache has {axes['G']} heads; at most {spec.partitions} on {spec.name}; split it"
        )
    rows = axes["G"] * (axes["N"] * axes["P"] if "N" in axes else axes["B"] * axes["S"])
    if rows > _MOST_ROWS:
        reasons.append(f"the cache has {rows} rows; at most {_MOST_ROWS} are counted; split it")
    if "P" in axes and axes["P"] & (axes["P"] - 1):
        reasons.append(
            f"a page has {axes['P']} tokens; a power of 2 is needed; use pages of 16 to 128"
        )
    if "S" in axes and axes["T"] > axes["S"]:
        reasons.append(
            f"{axes['T']} new tokens do not fit a cache of {axes['S']}; write at most as many"
        )
    size = max(axes["D"], axes["E"]) * as_dtype(dtype).itemsize
    room = spec.sbuf_usable_bytes // 4
    if size > room:
        reasons.append(
            f"a row has {size} bytes; at most {room} on {spec.name}; split the rows along depth"
        )
    return tuple(reasons)


def _start_problems(inputs: Sequence[Any], options: Options) -> tuple[str, ...]:
    most = inputs[2].shape[2] - inputs[0].shape[2]
    wrong = [int(n) for n in np.asarray(inputs[4]) if not 0 <= n <= most]
    if not wrong:
        return ()
    return (
        f"starts has {wrong[0]}; allowed are 0 to {most}, where the new tokens fit; correct it",
    )


def _slot_problems(inputs: Sequence[Any], options: Options) -> tuple[str, ...]:
    if not isinstance(inputs[4], np.ndarray):
        return ()
    slots = inputs[4].ravel()
    count = inputs[2].shape[0] * inputs[2].shape[2]
    used = slots[slots >= 0]
    reasons = []
    if (used >= count).any():
        reasons.append(
            f"slots has {int(used.max())}; the cache has slots 0 to {count - 1}, and negative ones "
            "are left out; correct it"
        )
    numbers, times = np.unique(used, return_counts=True)
    if (times > 1).any():
        reasons.append(
            f"slots has {int(numbers[times > 1][0])} twice; one token per slot is needed; leave "
            "one out with -1"
        )
    return tuple(reasons)


def _config_problems(config: Any, dtype: str, spec: CoreSpec) -> tuple[str, ...]:
    if not isinstance(config, CacheConfig):
        return (f"config is a {type(config).__name__}; a CacheConfig is needed; pass one, or None",)
    reasons = [
        f"config.{name} is {getattr(config, name)!r}; True or False is needed; pass one of them"
        for name in _MODES
        if not isinstance(getattr(config, name), bool)
    ]
    if config.hwdge and spec.generation < 3:
        reasons.append(
            f"config.hwdge is True; {spec.name} has no hardware descriptor engine; set it False"
        )
    return tuple(reasons)


def _no_flops(axes: Axes) -> int:
    return 0


def _no_chain(axes: Axes, spec: CoreSpec) -> int:
    return 0


def _arguments(inputs: Sequence[Any], options: Options, config: Any) -> tuple[Any, ...]:
    return *inputs, config


def _same(axes: Axes, config: Any, spec: CoreSpec) -> Axes:
    return axes


def _operator(name: str, kernel: Any, cache: str, where: Operand, problems: Any) -> Operator:
    return Operator(
        name=name,
        summary="the rows of new tokens of k and v, written into a cache",
        inputs=(
            Operand("k", ("B", "G", "T", "D")),
            Operand("v", ("B", "G", "T", "E")),
            Operand("k_cache", (*cache, "D")),
            Operand("v_cache", (*cache, "E")),
            where,
        ),
        outputs=(),
        axis_order=("B", "G", "T", "D", "E", *(letter for letter in cache if letter not in "BG")),
        dtypes=DTYPES,
        flops=_no_flops,
        roundings=0,
        chain=_no_chain,
        configure=_configure,
        reduced=_same,
        kernel=kernel,
        arguments=_arguments,
        limits=_limits,
        config_problems=_config_problems,
        value_problems=problems,
    )


KV_CACHE_WRITE = _operator(
    "kv_cache_write",
    contiguous_kernel,
    "BGS",
    Operand("starts", ("B",), dtype="int32"),
    _start_problems,
)

KV_CACHE_WRITE_PAGED = _operator(
    "kv_cache_write_paged",
    paged_kernel,
    "NGP",
    Operand("slots", ("B", "T"), dtype="int32"),
    _slot_problems,
)


def kv_cache_write(
    k: npt.NDArray[Any],
    v: npt.NDArray[Any],
    k_cache: npt.NDArray[Any],
    v_cache: npt.NDArray[Any],
    *,
    starts: npt.NDArray[Any] | None = None,
    slots: npt.NDArray[Any] | None = None,
    config: CacheConfig | None = None,
    target: str | None = None,
) -> None:
    """Write the keys and values of new tokens into a KV cache, in place.

    k_cache[b, g, starts[b] + t] = k[b, g, t], or, with slots, pages:
    k_cache[s // P, g, s % P] = k[b, g, t], s = slots[b, t]; the same for v. Bit for bit.

    Dimensions:
        B: sequences    G: KV heads    T: new tokens    S: tokens of the cache    D, E: head sizes
        N, P: pages and their tokens

    Args:
        k: [B, G, T, D], bfloat16 | float16 | float32 | float8_e4m3 | float8_e5m2.
        v: [B, G, T, E], dtype of `k`.
        k_cache: [B, G, S, D], dtype of `k`, or with slots [N, G, P, D], P a power of 2; written.
        v_cache: likewise, with E; written.
        starts: [B] int32, where the new tokens of each sequence begin.
        slots: [B, T] int32 instead, where each token goes; a negative one is left out.
        config: tuning of the kernel; None lets the operator choose.
        target: hardware generation; None means the one in force, as for `matmul`.

    Raises:
        OptionError: neither or both of starts and slots; a start or a slot outside of the cache,
            a slot named twice.
        ShapeError: sizes that differ, a wrong rank, a zero size, a strided array, more heads than
            partitions, a page whose size is no power of 2.
        DtypeError: a dtype that is not supported, or two different ones.
        ConfigError: a `config` that cannot run on the target.

    Source: the kernels are in `nki_kernels.kernels.attention.cache`.
    """
    if (starts is None) == (slots is None):
        given = "neither" if starts is None else "both"
        raise OptionError(
            f"kv_cache_write: {given} of starts and slots is given; exactly one is needed; pass "
            "starts for a contiguous cache, slots for a paged one"
        )
    op, where = (KV_CACHE_WRITE, starts) if slots is None else (KV_CACHE_WRITE_PAGED, slots)
    op.launch((k, v, k_cache, v_cache, where), {}, config=config, target=target)
