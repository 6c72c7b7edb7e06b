"""The SDK's example average_pool2d runs unmodified, from a checkout of aws-neuron-sdk in NKI_SDK.

None of its code is part of this repository: without a checkout these tests say so and skip.
"""

from __future__ import annotations

import importlib.util
import os
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest

import nki_kernels  # noqa: F401  (puts the embedded nki on the path)
from nki_kernels.machine.launch import launch
from tests.tolerance import assert_close

EXAMPLE = Path("nki", "examples", "average_pool2d", "average_pool2d_nki_kernels.py")
TARGETS = ("trn1", "trn2", "trn3")


@pytest.fixture
def kernel() -> Any:
    named = os.environ.get("NKI_SDK")
    if not named:
        pytest.skip("NKI_SDK names no checkout of aws-neuron-sdk: average_pool2d was not run")
    path = Path(named, EXAMPLE)
    if not path.is_file():
        pytest.fail(f"NKI_SDK={named}: no file {EXAMPLE.as_posix()} in it")
    spec = importlib.util.spec_from_file_location("average_pool2d_example", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.tensor_avgpool_kernel


def windows(x: Any, pool: int) -> Any:
    """[C, H / pool, W / pool, pool * pool] in float64."""
    c, h, w = x.shape
    cut = x.astype(np.float64).reshape(c, h // pool, pool, w // pool, pool)
    return cut.transpose(0, 1, 3, 2, 4).reshape(c, h // pool, w // pool, pool * pool)


@pytest.mark.parametrize("target", TARGETS)
def test_the_case_of_the_example_is_exact(kernel, target):
    x = np.arange(2 * 6 * 6, dtype=np.float16).reshape(2, 6, 6)
    got = launch(kernel, (x, 2), target=target).result
    assert got.dtype == np.float16
    assert np.array_equal(got, windows(x, 2).mean(axis=-1))


@pytest.mark.parametrize("dtype", [np.float32, np.float16, ml_dtypes.bfloat16])
@pytest.mark.parametrize(("shape", "pool"), [((128, 24, 36), 2), ((5, 9, 6), 3), ((1, 4, 4), 4)])
def test_reals(kernel, shape, pool, dtype):
    x = np.random.default_rng(0).standard_normal(shape).astype(dtype)
    got = launch(kernel, (x, pool), target="trn2").result
    terms = windows(x, pool)
    count = pool * pool
    # The kernel rounds the sum to the input's type, then the mean: half a spacing each, the first
    # up to twice as wide where count is no power of two. float32: the sum, 1 / count, the product.
    assert_close(
        got, terms.mean(axis=-1), np.abs(terms).mean(axis=-1),
        op="average_pool2d", case=f"{shape} by {pool}", roundings=2, chain=count + 2,
    )  # fmt: skip
