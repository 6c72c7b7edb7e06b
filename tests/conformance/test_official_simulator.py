"""The same kernels on the embedded NKI and, where a real `nki` is installed, on ``nki.simulate``.

Each toolchain runs the script in a process of its own: a process has one `nki`. Without a real
`nki` the comparison of the two says so and skips; that the kernels do what they are meant to is
checked against NumPy in any case.
"""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from nki_kernels import toolchain
from tests.child import REPO, run_python
from tests.tolerance import assert_close

SCRIPT = """
import sys
import nki_kernels
import nki
import nki.isa as nisa
import nki.language as nl
import numpy as np


def loaded(x):
    tile = nl.ndarray(x.shape, dtype=x.dtype, buffer=nl.sbuf)
    nisa.dma_copy(dst=tile, src=x)
    return tile


def stored(tile):
    out = nl.ndarray(tile.shape, dtype=tile.dtype, buffer=nl.shared_hbm)
    nisa.dma_copy(dst=out, src=tile)
    return out


def product(a, b):
    psum = nl.ndarray((a.shape[1], b.shape[1]), dtype=nl.float32, buffer=nl.psum)
    nisa.nc_matmul(dst=psum, stationary=loaded(a), moving=loaded(b))
    tile = nl.ndarray(psum.shape, dtype=nl.float32, buffer=nl.sbuf)
    nisa.tensor_copy(dst=tile, src=psum)
    return stored(tile)


def scaled(a, b):
    tile = nl.ndarray(a.shape, dtype=nl.float32, buffer=nl.sbuf)
    nisa.tensor_scalar(
        dst=tile, data=loaded(a), op0=nl.multiply, operand0=3.0, op1=nl.add, operand1=-2.0)
    return stored(tile)


def summed(a, b):
    tile = nl.ndarray((a.shape[0], 1), dtype=nl.float32, buffer=nl.sbuf)
    nisa.tensor_reduce(dst=tile, op=nl.add, data=loaded(a), axis=1)
    return stored(tile)


def rounded(a, b):
    tile = nl.ndarray(a.shape, dtype=nl.int32, buffer=nl.sbuf)
    nisa.tensor_scalar(dst=tile, data=loaded(a), op0=nl.multiply, operand0=1.5)
    return stored(tile)


def rooted(a, b):
    tile = nl.ndarray(a.shape, dtype=nl.float32, buffer=nl.sbuf)
    nisa.activation(dst=tile, op=nl.square, data=loaded(a), scale=0.5)
    nisa.activation(dst=tile, op=nl.sqrt, data=tile)
    return stored(tile)


def counted(a, b):
    tile = nl.ndarray((8, 16), dtype=nl.int32, buffer=nl.sbuf)
    nisa.iota(tile, pattern=[[3, 16]], offset=5, channel_multiplier=100)
    return stored(tile)


def flipped(a, b):
    tile = loaded(a)
    psum = nl.ndarray((tile.shape[1], tile.shape[0]), dtype=nl.float32, buffer=nl.psum)
    nisa.nc_transpose(dst=psum, data=tile, engine=nisa.engine.tensor)
    turned = nl.ndarray(psum.shape, dtype=nl.float32, buffer=nl.sbuf)
    nisa.tensor_copy(dst=turned, src=psum)
    return stored(turned)


def largest(a, b):
    tile = nl.ndarray((a.shape[0], 8), dtype=nl.float32, buffer=nl.sbuf)
    nisa.max8(dst=tile, src=loaded(a))
    return stored(tile)


KERNELS = (product, scaled, summed, rounded, rooted, counted, flipped, largest)
given = np.load(sys.argv[1])
done = {k.__name__: np.asarray(nki.simulate(k)(given["a"], given["b"])) for k in KERNELS}
np.savez(sys.argv[2], **done)
"""
A = np.random.default_rng(0).standard_normal((64, 48)).astype(np.float32) * 4
B = np.random.default_rng(1).standard_normal((64, 96)).astype(np.float32)
WIDE, WIDE_B = A.astype(np.float64), B.astype(np.float64)
#: Name: (reference, sum of absolute terms, length of the sum); the others are exact.
REALS: dict[str, tuple[Any, Any, int]] = {
    "product": (WIDE.T @ WIDE_B, np.abs(WIDE.T) @ np.abs(WIDE_B), 64),
    "scaled": (3 * WIDE - 2, 3 * np.abs(WIDE) + 2, 2),
    "summed": (WIDE.sum(1, keepdims=True), np.abs(WIDE).sum(1, keepdims=True), 48),
    "rooted": (np.abs(WIDE) / 2, np.abs(WIDE), 3),
}
EXACT = {
    "rounded": np.rint(A * np.float32(1.5)).astype(np.int32),
    "counted": (5 + 100 * np.arange(8)[:, None] + 3 * np.arange(16)).astype(np.int32),
    "flipped": A.T,
    "largest": -np.sort(-A, axis=1)[:, :8],
}


@cache
def results(kind: str, scratch: Path) -> dict[str, Any] | str:
    """What the kernels return on a toolchain, or why it does not run."""
    script, given, out = scratch / "kernels.py", scratch / "in.npz", scratch / f"{kind}.npz"
    script.write_text(SCRIPT)
    np.savez(given, a=A, b=B)
    environment = {toolchain.ENV: kind, "NEURON_PLATFORM_TARGET_OVERRIDE": "trn2"}
    arguments = [str(script), str(given), str(out)]
    done = run_python(arguments, cwd=scratch, path=(REPO,), env=environment)
    if done.returncode:
        return done.stderr.strip().splitlines()[-1]
    return dict(np.load(out))


@pytest.fixture(scope="module")
def scratch(tmp_path_factory):
    return tmp_path_factory.mktemp("official")


def check(found: Any, name: str) -> None:
    if name in EXACT:
        assert np.array_equal(found, EXACT[name])
    else:
        value, magnitude, chain = REALS[name]
        assert_close(found, value, magnitude, op=name, case="", roundings=1, chain=chain)


@pytest.mark.parametrize("name", [*REALS, *EXACT])
def test_the_embedded_nki_equals_numpy(scratch, name):
    found = results("embedded", scratch)
    assert not isinstance(found, str), found
    check(found[name], name)


@pytest.mark.parametrize("name", [*REALS, *EXACT])
def test_the_official_simulator_equals_both(scratch, name):
    found = results("real", scratch)
    if isinstance(found, str) and f"{toolchain.ENV}=real, but" in found:
        pytest.skip(f"no real nki: {found}")
    assert not isinstance(found, str), found
    ours = results("embedded", scratch)
    assert not isinstance(ours, str), ours
    check(found[name], name)
    if name in EXACT:
        assert found[name].dtype == ours[name].dtype
        assert np.array_equal(found[name], ours[name])
