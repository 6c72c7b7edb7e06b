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


def dispatch_inputs(shapes: Sequence[tuple[int, ...]], dtype: str, seed: int) -> tuple[Any, ...]:
    """Return tokens, and for each its choices among as many experts as a mixture of its width has.

    The contract's arrays do not say how many experts there are; 8 are in every case.
    """
    rng = np.random.default_rng(seed)
    x = rng.standard_normal(shapes[0], np.float32).astype(as_dtype(dtype).host)
    return x, rng.integers(0, 8, shapes[1]).astype(np.int32)


def combine_inputs(shapes: Sequence[tuple[int, ...]], dtype: str, seed: int) -> tuple[Any, ...]:
    """Return rows, the slots of a shuffle of them, and weights."""
    rng = np.random.default_rng(seed)
    rows = rng.standard_normal(shapes[0], np.float32).astype(as_dtype(dtype).host)
    slots = np.resize(rng.permutation(shapes[0][0]), shapes[1]).astype(np.int32)
    return rows, slots, rng.random(shapes[2], np.float32)


def grouped_inputs(shapes: Sequence[tuple[int, ...]], dtype: str, seed: int) -> tuple[Any, ...]:
    """Return rows, a matrix per group, and offsets of a uniform multinomial load."""
    rng = np.random.default_rng(seed)
    host = as_dtype(dtype).host
    a, b = (rng.standard_normal(shape, np.float32).astype(host) for shape in shapes[:2])
    groups = shapes[2][0]
    counts = rng.multinomial(shapes[0][0], np.full(groups, 1 / groups))
    return a, b, np.cumsum(counts).astype(np.int32)


#: Skew of the load by the number of experts, as an exponent of Zipf's law: the models' own cases.
_SKEW = {8: 0.0, 32: 0.8, 128: 1.1}


def expert_choices(shapes: Sequence[tuple[int, ...]], dtype: str, seed: int) -> list[Any]:
    """Return the inputs of `experts` that steer it: choices without repetition, of a Zipf load.

    The exponent is 0 for 8 experts, 0.8 for 32, 1.1 for 128; 16 tokens or fewer choose evenly.
    """
    (tokens, choices), experts = shapes[1], shapes[3][0]
    exponent = 0.0 if tokens <= 16 else _SKEW.get(experts, 0.8)
    share = -exponent * np.log(np.arange(1, experts + 1))
    noise = np.random.default_rng(seed).gumbel(size=(tokens, experts))
    order = np.argsort(-(share + noise), axis=1)[:, :choices].astype(np.int32)
    return [None, np.ascontiguousarray(order), *[None] * (len(shapes) - 2)]


def expert_inputs(shapes: Sequence[tuple[int, ...]], dtype: str, seed: int) -> tuple[Any, ...]:
    """Return tokens, their choices and scores, and weights that keep the variance; no biases."""
    rng = np.random.default_rng(seed)
    host = as_dtype(dtype).host
    x = rng.standard_normal(shapes[0], np.float32).astype(host)
    scores = rng.random(shapes[2], np.float32)
    up, down = (
        (rng.standard_normal(shape, np.float32) / np.sqrt(np.float32(shape[1]))).astype(host)
        for shape in shapes[3:5]
    )
    return x, expert_choices(shapes, dtype, seed)[1], scores, up, down, None, None
