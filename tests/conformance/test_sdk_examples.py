"""AWS's tutorial kernels run unmodified, from a checkout of aws-neuron-sdk named by NKI_SDK.

None of their code is part of this repository: without a checkout these tests say so and skip.
Each module runs in a child process, because some of them set environment variables on import.
The table of the last run is in tests/conformance/README.md.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest

from reference.matmul import matmul as reference
from tests.child import REPO, run_python
from tests.tolerance import allowed_error, assert_close, ulp

EXAMPLES = ("nki", "examples")
TARGETS = ("trn1", "trn2", "trn3")
#: Loads a module by its path, calls one function of it, and stores what it returns.
CHILD = """
import importlib.util, sys
import ml_dtypes, numpy as np
import nki_kernels
path, function, target, arrays, keywords, result = sys.argv[1:]
spec = importlib.util.spec_from_file_location("example", path)
module = importlib.util.module_from_spec(spec)
spec.loader.exec_module(module)
if target:
    import os
    os.environ["NEURON_PLATFORM_TARGET_OVERRIDE"] = target
given = np.load(arrays)
values = [given[name] for name in sorted(given.files)]
values = [v.view(ml_dtypes.bfloat16) if v.dtype == np.dtype("V2") else v for v in values]
out = getattr(module, function)(*values, **eval(keywords))
assert type(out) is np.ndarray, type(out)
np.save(result, out.view(np.uint16) if out.dtype == ml_dtypes.bfloat16 else out)
"""


@pytest.fixture
def examples() -> Path:
    named = os.environ.get("NKI_SDK")
    if not named:
        pytest.skip("NKI_SDK names no checkout of aws-neuron-sdk: AWS's kernels were not run")
    path = Path(named).joinpath(*EXAMPLES)
    if not path.is_dir():
        pytest.fail(f"NKI_SDK={named}: no directory {'/'.join(EXAMPLES)} in it")
    return path


def call(module: Path, function: str, tmp: Path, arrays: Any, target: str = "", **keywords: Any):
    """Return what ``function(*arrays, **keywords)`` of the module returns, in a fresh process."""
    inputs, result = tmp / "in.npz", tmp / "out.npy"
    np.savez(inputs, **{f"a{i}": x for i, x in enumerate(arrays)})
    arguments = [str(module), function, target, str(inputs), repr(keywords), str(result)]
    done = run_python(["-c", CHILD, *arguments], cwd=tmp, path=(REPO,))
    assert done.returncode == 0, done.stderr
    out = np.load(result)
    return out.view(ml_dtypes.bfloat16) if arrays[0].dtype == ml_dtypes.bfloat16 else out


def normal(seed: int, shape: tuple[int, ...], dtype: Any) -> Any:
    return np.random.default_rng(seed).standard_normal(shape).astype(dtype)


@pytest.mark.parametrize("dtype", [np.float32, np.float16, ml_dtypes.bfloat16])
def test_tensor_addition(examples, tmp_path, dtype):
    a, b = normal(0, (256, 1024), dtype), normal(1, (256, 1024), dtype)
    module = examples / "tensor_addition" / "tensor_addition_nki_kernels.py"
    got = call(module, "nki_tensor_add", tmp_path, (a, b))
    ref = a.astype(np.float64) + b.astype(np.float64)
    terms = np.abs(a.astype(np.float64)) + np.abs(b.astype(np.float64))
    assert_close(got, ref, terms, op="nki_tensor_add", case="trn1", roundings=1, chain=1)


#: Name: ((K, M, N), meta-parameters, blocks of K whose running sum has the type of the output).
MATMULS = {
    "nki_matmul_basic_": ((128, 64, 512), {}, 1),
    "nki_matmul_tiled_": ((256, 128, 512), {}, 1),
    "nki_matmul_hoist_load_": ((256, 256, 512), {}, 1),
    "nki_matmul_block_free_dimension_": ((256, 256, 1024), {}, 1),
    "nki_matmul_fully_optimized_": (
        (512, 256, 1024),
        {"TILES_IN_BLOCK_M": 2, "TILES_IN_BLOCK_N": 2, "TILES_IN_BLOCK_K": 2}, 2),
}  # fmt: skip
TILE_K = 128


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("dtype", [np.float32, ml_dtypes.bfloat16])
@pytest.mark.parametrize("name", MATMULS)
def test_matrix_multiplication(examples, tmp_path, name, dtype, target):
    (k, m, n), keywords, blocks = MATMULS[name]
    lhs, rhs = normal(0, (k, m), dtype), normal(1, (k, n), dtype)
    module = examples / "matrix_multiplication" / "matrix_multiplication_nki_kernels.py"
    got = call(module, name, tmp_path, (lhs, rhs), target, **keywords)
    ref = reference(lhs.T, rhs)
    chain = TILE_K + k // TILE_K + blocks
    allowed = allowed_error(ref.value, ref.magnitude, dtype=dtype, roundings=1, chain=chain)
    for block in range(1, blocks):
        # The sum over the first blocks is rounded to the output's type as well.
        depth = block * k // blocks
        allowed = allowed + ulp(reference(lhs[:depth].T, rhs[:depth]).value, dtype)
    assert got.shape == (m, n)
    assert got.dtype == dtype
    assert (np.abs(got.astype(np.float64) - ref.value) <= allowed).all()


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize(
    ("dtype", "shape"), [(np.int8, (5, 3, 4)), (np.float32, (128, 4, 8)), (np.float16, (64, 7, 2))]
)
def test_transpose2d(examples, tmp_path, dtype, shape, target):
    p, x, y = shape
    a = (np.arange(p * x * y) % 100).astype(dtype).reshape(p, x * y)
    module = examples / "transpose2d" / "transpose2d_nki_kernels.py"
    got = call(module, "tensor_transpose2D_kernel_", tmp_path, (a,), target, shape2D=(x, y))
    want = a.reshape(p, x, y).transpose(0, 2, 1).reshape(p, x * y)
    assert got.dtype == dtype
    assert np.array_equal(got, want)
