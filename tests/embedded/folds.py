"""References that fold one element after the other, rounding to float32 at each step."""

from __future__ import annotations

import math

import numpy as np

from tests.embedded.harness import HOSTS, data
from tests.embedded.test_elementwise import FORMULAS

F32 = np.float32


def single(x):
    """The nearest float32, as a Python float."""
    with np.errstate(over="ignore"):
        return float(F32(x))


def left(name, elements):
    """x0 op x1 op x2 ..., each step rounded to float32."""
    function = FORMULAS[name]
    elements = [float(x) for x in elements]
    if name.startswith("logical"):
        elements = [float(x != 0) for x in elements]
    state = elements[0]
    for x in elements[1:]:
        state = single(function(state, x))
    return state


def folded(name, array, trailing):
    """Reduce the last axes of an array one output element at a time, in float64 storage."""
    kept = array.shape[: array.ndim - trailing]
    flat = array.astype(np.float64).reshape(math.prod(kept), -1)
    return np.array([left(name, line) for line in flat]).reshape(kept)


def at_least_2d(shape):
    return shape if len(shape) > 1 else (*shape, 1)


def small(seed, shape, kind):
    """Values small enough that products of a row stay in range."""
    low = 0 if np.dtype(HOSTS[kind]).kind == "u" else -3
    # ml_dtypes clip to float32.
    return np.clip(data(seed, shape, kind), low, 3).astype(HOSTS[kind])
