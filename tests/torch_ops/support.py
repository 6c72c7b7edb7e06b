"""Tensors to test with, and the comparison of a matrix product with the reference."""

from __future__ import annotations

from collections import Counter

import ml_dtypes
import numpy as np
import torch

from nki_kernels.hardware import spec_for
from nki_kernels.operators import OPERATORS
from reference.matmul import matmul as reference
from tests.strategies.matrices import normal
from tests.tolerance import assert_close

MATMUL = OPERATORS["matmul"]
TOY = spec_for("toy")
DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}
#: Ragged on the toy core on every axis, with several contraction slices.
SHAPE = (TOY.stationary_fmax + 3, TOY.moving_fmax + 5, 2 * TOY.partitions + 1)


def tensor(shape, dtype, seed=0, make=normal):
    """Return values of a strategy as a tensor, rounded to the dtype."""
    return torch.from_numpy(make(seed, shape, np.float32)).to(dtype)


def operands(dtype, shape=SHAPE, seed=0, make=normal):
    m, n, k = shape
    return tensor((m, k), dtype, seed, make), tensor((k, n), dtype, seed + 1, make)


def array(x):
    """Return the values as a NumPy array of the same dtype."""
    x = x.detach()
    if x.dtype == torch.bfloat16:
        return x.contiguous().view(torch.int16).numpy().view(ml_dtypes.bfloat16)
    return x.numpy()


def compare(got, a, b, case, chain=None):
    """Hold `got` to a·b under the error rule; `chain` None means the kernel's own."""
    a, b = array(a), array(b)
    ref = reference(a, b)
    if chain is None:
        chain = MATMUL.chain(MATMUL.axes(a.shape, b.shape), TOY)
    keywords = {"op": "matmul", "roundings": MATMUL.roundings, "chain": chain}
    assert_close(array(got), ref.value, ref.magnitude, case=case, **keywords)


def products(counts):
    """Return how often any matrix product ran, by backend; copies left out."""
    found = Counter()
    for (name, what), times in counts.items():
        if name.startswith("matmul") and what != "copy":
            found[what] += times
    return found


def same_bits(x, y):
    return x.dtype == y.dtype and x.shape == y.shape and array(x).tobytes() == array(y).tobytes()
