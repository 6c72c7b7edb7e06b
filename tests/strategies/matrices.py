"""Extents around tile edges, and matrices whose products are exact or hard."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
from hypothesis import strategies as st


def extents(tile: int, most: int) -> st.SearchStrategy[int]:
    """Draw sizes in 1 .. most, often around multiples of `tile`, so they shrink to corners."""
    edges = {1, tile - 1, tile, tile + 1, 2 * tile - 1, 2 * tile, 2 * tile + 1}
    corners = sorted(size for size in edges if 1 <= size <= most)
    return st.one_of(st.sampled_from(corners), st.integers(1, most))


def seeds() -> st.SearchStrategy[int]:
    """Draw a seed: large arrays come from NumPy, so that an example stays small and replays."""
    return st.integers(0, 2**32 - 1)


def normal(seed: int, shape: tuple[int, ...], dtype: Any) -> npt.NDArray[Any]:
    """Return standard normal values rounded to `dtype`."""
    values: npt.NDArray[Any] = np.random.default_rng(seed).standard_normal(shape).astype(dtype)
    return values


def wide(seed: int, shape: tuple[int, ...], dtype: Any) -> npt.NDArray[Any]:
    """Return values whose magnitudes spread over 2^-6 .. 2^6: cancellation and uneven terms."""
    rng = np.random.default_rng(seed)
    exponents = rng.integers(-6, 7, shape)
    values: npt.NDArray[Any] = np.ldexp(rng.standard_normal(shape), exponents).astype(dtype)
    return values


def small_integers(seed: int, shape: tuple[int, ...], dtype: Any, most: int) -> npt.NDArray[Any]:
    """Return integers in -most .. most: exact in every float dtype when most <= 256."""
    rng = np.random.default_rng(seed)
    values: npt.NDArray[Any] = rng.integers(-most, most + 1, shape).astype(dtype)
    return values
