"""The error rule: how far a result may lie from the reference. Computed, per element, never typed.

    allowed = roundings * ulp(|ref|, dtype) + chain * 2^-24 * sum|terms|

* `roundings`: how often a value is rounded to the output dtype on its way to one output element.
* `chain`: an upper bound on the float32 roundings that any one term passes through while it is
  summed. A sum of products computed in float32 in *any* order is sum(t_k * (1 + d_k)) with
  |d_k| <= (1 + u)^chain - 1, u = 2^-24 (Higham, Accuracy and Stability, 4.2), so the bound is a
  certainty and not a likelihood: inputs that Hypothesis invents round in the same direction over
  and over, which the popular sqrt(K) does not cover. It stays sharp because hardware sums in
  tiles: chain is tile + number of tiles, not K. The operator states it (`Operator.chain`), since
  it depends on the array. (1 + u)^chain - 1 is evaluated exactly: no second-order term is lost.
* Integers have no error: equal or wrong.
"""

from __future__ import annotations

import math
from typing import Any

import ml_dtypes
import numpy as np
import numpy.typing as npt

_FLOAT32_UNIT = 2.0**-24


def ulp(values: npt.ArrayLike, dtype: Any) -> npt.NDArray[np.float64]:
    """Return the spacing of `dtype` at |values|: 2^(exponent - mantissa bits), float64.

    Below the smallest normal number the spacing is that of the subnormals; above the largest finite
    number it is that of the top binade.
    """
    info = ml_dtypes.finfo(np.dtype(dtype))  # type: ignore[no-untyped-call]
    magnitude = np.abs(np.asarray(values, dtype=np.float64))
    _, exponent = np.frexp(magnitude)  # magnitude = m * 2^exponent, 0.5 <= m < 1
    lowest = math.frexp(float(info.smallest_normal))[1]
    highest = math.frexp(float(info.max))[1]
    exponent = np.where(magnitude > 0, exponent, lowest)
    exponent = np.clip(np.where(np.isinf(magnitude), highest, exponent), lowest, highest)
    spacing: npt.NDArray[np.float64] = np.ldexp(1.0, exponent - 1 - int(info.nmant))
    return spacing


def allowed_error(
    ref: npt.NDArray[np.float64],
    magnitude: npt.NDArray[np.float64],
    *,
    dtype: Any,
    roundings: int,
    chain: int,
) -> npt.NDArray[np.float64]:
    """Return the allowed |result - ref| per element; zero for integer dtypes.

    Args:
        ref: exact result, float64.
        magnitude: per element, the sum of the absolute values of its terms.
        dtype: dtype of the result.
        roundings: roundings to `dtype` per element.
        chain: float32 roundings one term passes through at most.
    """
    if np.dtype(dtype).kind in "iub":
        return np.zeros(ref.shape)
    growth = math.expm1(chain * math.log1p(_FLOAT32_UNIT))
    # An infinite or NaN sum has one right answer; an infinite allowance would accept any.
    accumulation = growth * np.where(np.isfinite(magnitude), magnitude, 0.0)
    bound: npt.NDArray[np.float64] = roundings * ulp(ref, dtype) + accumulation
    return bound


def assert_close(
    got: npt.NDArray[Any],
    ref: npt.NDArray[np.float64],
    magnitude: npt.NDArray[np.float64],
    *,
    op: str,
    case: str,
    roundings: int,
    chain: int,
) -> None:
    """Compare a result with its reference under the error rule.

    An infinite result is right where the reference overflows the dtype; NaN only where it is NaN.

    Raises:
        AssertionError: op, case, dtype, worst index, got / want / allowed; a note says how often.
    """
    where = f"{op} [{case}] {got.dtype}"
    if got.shape != ref.shape:
        raise AssertionError(f"{where}: shape {got.shape}, want {ref.shape}")
    if got.size == 0:
        raise AssertionError(f"{where}: no elements to compare; a test of nothing proves nothing")
    allowed = allowed_error(ref, magnitude, dtype=got.dtype, roundings=roundings, chain=chain)
    error = _distance(got, ref)
    # not (error <= allowed) also catches a NaN on either side.
    wrong = ~(error <= allowed)
    if not wrong.any():
        return
    with np.errstate(over="ignore"):  # of integers nothing is allowed
        ratio = error / np.maximum(allowed, np.finfo(float).tiny)
    excess = np.where(np.isfinite(error), ratio, np.inf)
    excess = np.where(wrong, excess, 0.0)
    index = tuple(int(i) for i in np.unravel_index(int(np.argmax(excess)), excess.shape))
    failure = AssertionError(
        f"{where}: worst at {index}: got {float(got[index])!r}, want {float(ref[index])!r}, "
        f"error {float(error[index]):.6g}, allowed {float(allowed[index]):.6g}"
    )
    failure.add_note(f"{int(wrong.sum())} of {got.size} elements are outside the bound")
    raise failure


def _distance(got: npt.NDArray[Any], ref: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    """Return |got - ref|, with infinities counted as the first number the dtype cannot hold."""
    wide = got.astype(np.float64)
    if np.dtype(got.dtype).kind in "iub":
        return np.abs(wide - ref)
    top = ml_dtypes.finfo(got.dtype).max  # type: ignore[no-untyped-call]
    limit = math.ldexp(1.0, math.frexp(float(top))[1])
    distance: npt.NDArray[np.float64] = np.abs(
        np.clip(wide, -limit, limit) - np.clip(ref, -limit, limit)
    )
    return np.where(np.isnan(wide) & np.isnan(ref), 0.0, distance)
