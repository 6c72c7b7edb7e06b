"""cumsum and rope_hf of aws-neuron/nki-library run unmodified, from a checkout in NKI_LIBRARY.

Branch 2.29_release. None of its code is part of this repository: without a checkout these tests say
so and skip.
"""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest

import nki_kernels  # noqa: F401  (puts the embedded nki on the path)
from nki_kernels.machine.launch import launch
from tests.tolerance import assert_close

PACKAGE = "nkilib_src"
CUMSUM_TILE = 2048
#: float32 rounds a value by at most this share of it.
UNIT = float(np.finfo(np.float32).eps) / 2


@pytest.fixture
def library(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """A function that imports a module of the library by its name under nkilib."""
    named = os.environ.get("NKI_LIBRARY")
    if not named:
        pytest.skip("NKI_LIBRARY names no checkout of nki-library: its kernels were not run")
    source = Path(named, "src")
    if not source.joinpath(PACKAGE).is_dir():
        pytest.fail(f"NKI_LIBRARY={named}: no directory src/{PACKAGE} in it")
    monkeypatch.syspath_prepend(str(source))
    yield lambda name: importlib.import_module(f"{PACKAGE}.nkilib.{name}")
    for module in [m for m in sys.modules if m.partition(".")[0] == PACKAGE]:
        del sys.modules[module]


def normal(seed: int, shape: tuple[int, ...], dtype: Any) -> Any:
    return np.random.default_rng(seed).standard_normal(shape).astype(dtype)


def unit(dtype: Any) -> float:
    """The largest share of a value that one rounding to `dtype` changes."""
    return float(ml_dtypes.finfo(dtype).eps) / 2


# -- cumsum ----------------------------------------------------------------------------------------

SHAPES = [(1, 1), (5, 100), (130, 300), (3, 2, 17), (4, 5000)]


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", [np.float32, np.float16, ml_dtypes.bfloat16])
def test_cumsum(library, shape, dtype):
    x = normal(1, shape, dtype)
    got = launch(library("core.cumsum.cumsum").cumsum, (x,), target="trn2").result
    exact = np.cumsum(x.astype(np.float64), axis=-1)
    magnitude = np.cumsum(np.abs(x.astype(np.float64)), axis=-1)
    # Between tiles the kernel carries the sum in the type of x: one rounding of each earlier term
    # a tile, in units of float32.
    tiles = -(-shape[-1] // CUMSUM_TILE)
    chain = shape[-1] + (tiles - 1) * round(unit(dtype) / UNIT)
    assert_close(got, exact, magnitude, op="cumsum", case=str(shape), roundings=1, chain=chain)


@pytest.mark.parametrize("shape", SHAPES)
def test_cumsum_in_float32_is_numpys_bit_for_bit(library, shape):
    """NumPy's cumsum adds from left to right as well."""
    x = normal(2, shape, np.float32)
    got = launch(library("core.cumsum.cumsum").cumsum, (x,), target="trn2").result
    assert np.array_equal(got, np.cumsum(x, axis=-1, dtype=np.float32))


def test_cumsum_of_small_integers_is_exact_in_bfloat16(library):
    x = np.resize([1, 2, -3], (6, 3 * CUMSUM_TILE)).astype(ml_dtypes.bfloat16)
    got = launch(library("core.cumsum.cumsum").cumsum, (x, 1), target="trn2").result
    assert got.dtype == x.dtype
    assert np.array_equal(got.astype(np.int64), np.cumsum(x.astype(np.int64), axis=-1))


# -- rope_hf ---------------------------------------------------------------------------------------


def rotated(x: Any, cos: Any, sin: Any, backward: bool) -> tuple[Any, Any]:
    """Return (value, sum of absolute terms) in float64; x [B, heads, S, D], cos, sin [B?, S, D]."""
    x, cos, sin = (v.astype(np.float64) for v in (x, cos, sin))
    cos, sin = (v if v.ndim == 2 else v[:, None] for v in (cos, sin))
    half = x.shape[-1] // 2
    straight = x * cos
    if backward:
        turned = np.roll(x * sin, half, axis=-1)
        turned[..., half:] *= -1
    else:
        turned = np.roll(x, half, axis=-1) * sin
        turned[..., :half] *= -1
    return straight + turned, np.abs(straight) + np.abs(turned)


def check_rotation(got: Any, x: Any, cos: Any, sin: Any, backward: bool, case: str) -> None:
    value, magnitude = rotated(x, cos, sin, backward)
    # Each product is rounded to float32, then to x's type, before the sum is.
    scaled = magnitude * (unit(x.dtype) / UNIT)
    assert_close(got, value, scaled, op="rope_hf", case=case, roundings=1, chain=2)


@pytest.mark.parametrize("backward", [False, True])
@pytest.mark.parametrize("dtype", [np.float32, ml_dtypes.bfloat16])
@pytest.mark.parametrize(
    ("batch", "heads", "seq", "dim", "lnc"),
    [(1, (4, 2), 256, 128, 1), (2, (2, 1), 128, 64, 1), (1, (2, 1), 1280, 64, 1),
     (1, (4, 2), 256, 128, 2)],
)  # fmt: skip
def test_rope_hf(library, batch, heads, seq, dim, lnc, dtype, backward):
    q, k = (normal(i, (batch, h, seq, dim), dtype) for i, h in enumerate(heads))
    cos, sin = (normal(i, (batch, seq, dim), dtype) for i in (2, 3))
    out = {"q_out": np.zeros_like(q), "k_out": np.zeros_like(k)}
    kernel = library("core.embeddings.rope_hf").rope_hf
    arguments = {"q": q, "k": k, **out, "cos": cos, "sin": sin, "backward": backward}
    launch(kernel[lnc], (), arguments, target="trn2")
    check_rotation(out["q_out"], q, cos, sin, backward, "q")
    check_rotation(out["k_out"], k, cos, sin, backward, "k")


def test_rope_hf_with_a_packed_cache(library):
    q, k = normal(0, (2, 2, 128, 64), np.float32), normal(1, (2, 1, 128, 64), np.float32)
    cache = normal(2, (128, 128), np.float32)
    out = {"q_out": np.zeros_like(q), "k_out": np.zeros_like(k)}
    kernel = library("core.embeddings.rope_hf").rope_hf
    launch(kernel, (), {"q": q, "k": k, **out, "rope_cache": cache}, target="trn2")
    check_rotation(out["q_out"], q, cache[:, :64], cache[:, 64:], False, "q")
    check_rotation(out["k_out"], k, cache[:, :64], cache[:, 64:], False, "k")


def test_rope_hf_refuses_a_sequence_shorter_than_the_partitions(library):
    q = normal(0, (1, 1, 64, 64), np.float32)
    cos = normal(1, (1, 64, 64), np.float32)
    kernel = library("core.embeddings.rope_hf").rope_hf
    with pytest.raises(AssertionError, match="seq len must be multiple"):
        launch(kernel, (q, q, q, q, cos, cos), target="trn2")
