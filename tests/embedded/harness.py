"""Run one instruction inside a kernel, and what the tests compare it with.

`apply` moves arrays to tiles, calls the instruction, and brings the result back. `cast` is this
suite's own statement of the one rounding on a write. `refused` runs an illegal call and checks the
message; `accepted` runs its legal twin.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import ml_dtypes
import nki.isa as nisa
import nki.language as nl
import numpy as np
import pytest
from hypothesis import strategies as st

from nki_kernels.machine.errors import RuleViolation
from nki_kernels.machine.launch import Launch, launch
from nki_kernels.machine.options import Options

SBUF, PSUM, HBM = nl.sbuf, nl.psum, nl.shared_hbm
#: Legal twins of illegal calls read tiles that nothing wrote: their values do not matter.
UNCHECKED = Options(uninitialized="off", outputs="off", integers="off", domain="off")
#: Of kernels that write to HBM for a test to look at, and return nothing.
NO_RESULT = Options(outputs="off")

HOSTS: dict[Any, Any] = {
    nl.float32: np.float32, nl.tfloat32: np.float32, nl.float16: np.float16,
    nl.bfloat16: ml_dtypes.bfloat16, nl.float8_e4m3: ml_dtypes.float8_e4m3,
    nl.float8_e5m2: ml_dtypes.float8_e5m2, nl.int8: np.int8, nl.int16: np.int16,
    nl.int32: np.int32, nl.uint8: np.uint8, nl.uint16: np.uint16, nl.uint32: np.uint32,
}  # fmt: skip
FLOATS = (nl.float32, nl.bfloat16, nl.float16)
INTEGERS = (nl.int8, nl.int16, nl.int32, nl.uint8, nl.uint16, nl.uint32)


# -- inside a kernel -------------------------------------------------------------------------------


def sb(*shape: int, dtype: Any = nl.float32) -> Any:
    """A tile in SBUF."""
    return nl.ndarray(shape, dtype, buffer=SBUF)


def ps(*shape: int, dtype: Any = nl.float32) -> Any:
    """A tile in PSUM."""
    return nl.ndarray(shape, dtype, buffer=PSUM)


def hbm(*shape: int, dtype: Any = nl.float32) -> Any:
    """A tensor in HBM."""
    return nl.ndarray(shape, dtype, buffer=HBM)


def tile(source: Any, buffer: Any = SBUF, dtype: Any = None) -> Any:
    """A tile with the bits of an HBM tensor (through SBUF where it goes to PSUM)."""
    kind = dtype or source.dtype
    loaded = nl.ndarray(source.shape, kind, buffer=SBUF)
    nisa.dma_copy(dst=loaded, src=source if kind == source.dtype else source.view(kind))
    if buffer is SBUF:
        return loaded
    moved = nl.ndarray(source.shape, kind, buffer=buffer)
    nisa.tensor_copy(dst=moved, src=loaded)
    return moved


def back(result: Any) -> Any:
    """An HBM tensor with the bits of a tile."""
    if result.buffer is PSUM:
        landed = nl.ndarray(result.shape, result.dtype, buffer=SBUF)
        nisa.tensor_copy(dst=landed, src=result)
        result = landed
    stored = nl.ndarray(result.shape, result.dtype, buffer=HBM)
    nisa.dma_copy(dst=stored, src=result)
    return stored


# -- around a kernel -------------------------------------------------------------------------------


def apply(
    call: Callable[..., Any],
    *arrays: Any,
    shape: Sequence[int],
    dtype: Any = nl.float32,
    buffer: Any = SBUF,
    buffers: Sequence[Any] = (),
    target: str = "toy",
    options: Options | None = None,
) -> Any:
    """Return dst after ``call(dst, *tiles)``; `buffers` says where inputs lie (default SBUF)."""

    def kernel(*inputs: Any) -> Any:
        places = [*buffers, *[SBUF] * len(inputs)]
        tiles = [tile(x, place) for x, place in zip(inputs, places, strict=False)]
        dst = nl.ndarray(tuple(shape), dtype, buffer=buffer)
        call(dst, *tiles)
        return back(dst)

    return launch(kernel, arrays, target=target, options=options).outputs[0]


def values(
    call: Callable[..., Any], *arrays: Any, target: str = "toy", options: Options | None = None
) -> Any:
    """Return the values of the tile, or tuple of tiles, that ``call(*hbm_tensors)`` returns."""
    seen: list[Any] = []

    def kernel(*inputs: Any) -> None:
        result = call(*inputs)
        many = result if isinstance(result, tuple) else (result,)
        seen.extend(t.numpy() for t in many)

    quiet = NO_RESULT if options is None else replace(options, outputs="off")
    launch(kernel, arrays, target=target, options=quiet)
    return seen[0] if len(seen) == 1 else tuple(seen)


def traced(call: Callable[..., Any], *arrays: Any, target: str = "toy") -> Launch:
    """Return the launch of a kernel that makes the call and returns nothing."""

    def kernel(*inputs: Any) -> None:
        call(*inputs)

    return launch(kernel, arrays, target=target, options=UNCHECKED)


def event(call: Callable[..., Any], *arrays: Any, target: str = "toy") -> Any:
    """Return the last event of a kernel that makes the call."""
    return traced(call, *arrays, target=target).trace.events[-1]


class Rule(NamedTuple):
    """One operand rule: a call that keeps it, one that breaks it, and what the error says."""

    name: str
    legal: Callable[[], Any]
    illegal: Callable[[], Any]
    says: tuple[str, ...]
    target: str = "toy"


def by_name(rule: Rule) -> str:
    return rule.name


def refused(
    call: Callable[..., Any], *says: str, target: str = "toy", error: Any = RuleViolation
) -> str:
    """Check that the call raises `error` with every text of `says`; return the message."""

    def kernel() -> None:
        call()

    with pytest.raises(error) as caught:
        launch(kernel, target=target)
    message = str(caught.value)
    for text in says:
        assert text in message, f"{text!r} not in {message!r}"
    return message


def check(rule: Rule, opcode: str, file: str) -> None:
    """Check both calls of a rule; the error names the instruction and the line that called it."""
    message = refused(rule.illegal, *rule.says, target=rule.target)
    assert message.startswith(f"nisa.{opcode} at {file}:"), message
    traced(rule.legal, target=rule.target)


# -- what results are compared with ----------------------------------------------------------------


def cast(exact: Any, dtype: Any) -> Any:
    """Round float64 values the way a write does: to float32, then once to `dtype`.

    Integers: nearest, ties to even, saturating, NaN to 0. For + - * / and sqrt of float32 values
    the float64 result rounded to float32 is the correctly rounded one.
    """
    host = np.dtype(HOSTS[dtype])
    with np.errstate(over="ignore"):  # to infinity, as IEEE says
        single = np.asarray(exact, np.float64).astype(np.float32)
        if host.kind not in "iu":
            return single.astype(host)
    info = np.iinfo(host)

    def one(x: float) -> int:
        if math.isnan(x):
            return 0
        if math.isinf(x):
            return info.max if x > 0 else info.min
        return min(max(round(x), info.min), info.max)

    flat = [one(float(x)) for x in single.reshape(-1)]
    return np.array(flat, host).reshape(single.shape)


def same(got: Any, want: Any) -> None:
    """Check that two arrays agree in dtype, shape and every bit (all NaN count as one value)."""
    want = np.asarray(want)
    assert got.dtype == want.dtype
    assert got.shape == want.shape
    if got.dtype.kind in "iub":
        assert np.array_equal(got, want), (got, want)
        return
    nan = np.isnan(want.astype(np.float64))
    assert np.array_equal(np.isnan(got.astype(np.float64)), nan)
    unsigned = f"u{got.dtype.itemsize}"
    bits = [np.ascontiguousarray(x).view(unsigned)[~nan] for x in (got, want)]
    assert np.array_equal(*bits), (got, want)


def data(seed: int, shape: Sequence[int], dtype: Any, most: float = 8.0) -> Any:
    """Values of `dtype`: normal for floats, the whole range for integers narrower than 32 bits."""
    rng = np.random.default_rng(seed)
    host = np.dtype(HOSTS[dtype])
    if host.kind not in "iu":
        return np.clip(2 * rng.standard_normal(shape), -most, most).astype(host)
    if host.itemsize == 4:
        low = 0 if host.kind == "u" else -(2**20)
        return rng.integers(low, 2**20, shape).astype(host)
    info = np.iinfo(host)
    return rng.integers(info.min, info.max + 1, shape).astype(host)


#: Partitions and free sizes of the toy core's tiles.
rows = st.integers(1, 8)
columns = st.integers(1, 16)
