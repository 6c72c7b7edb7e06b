"""Inputs of the benchmarks of the mixture of experts."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from nki_kernels.machine.dtypes import as_dtype


def router_inputs(shapes: Sequence[tuple[int, ...]], dtype: str, seed: int) -> tuple[Any, ...]:
    """Return tokens and weights of a router without biases; logits are of unit variance."""
    rng = np.random.default_rng(seed)
    host = as_dtype(dtype).host
    tokens, weight = shapes[:2]
    x = rng.standard_normal(tokens, np.float32).astype(host)
    scaled = rng.standard_normal(weight, np.float32) / np.sqrt(np.float32(weight[0]))
    return x, scaled.astype(host), None, None
