"""The summary of a profile: figures from the trace, names of Neuron's profiler."""

from __future__ import annotations

import nki
import nki.isa as nisa
import nki.language as nl
import numpy as np
import pytest

import nki_kernels
from nki_kernels.hardware import TRN2
from nki_kernels.machine.errors import NkiKernelsError


@nki.jit
def product(x, y):
    out = nl.ndarray((x.shape[1], y.shape[1]), dtype=nl.float32, buffer=nl.shared_hbm)
    a = nl.ndarray(x.shape, dtype=x.dtype)
    b = nl.ndarray(y.shape, dtype=y.dtype)
    flipped = nl.ndarray((x.shape[1], x.shape[0]), dtype=x.dtype, buffer=nl.psum)
    c = nl.ndarray(out.shape, dtype=nl.float32, buffer=nl.psum)
    result = nl.ndarray(out.shape, dtype=nl.float32)
    nisa.dma_copy(dst=a, src=x)
    nisa.dma_copy(dst=b, src=y)
    nisa.nc_transpose(dst=flipped, data=a)
    nisa.nc_matmul(dst=c, stationary=a, moving=b)
    nisa.tensor_copy(dst=result, src=c)
    nisa.dma_copy(dst=out, src=result)
    return out


X, Y = np.ones((64, 32), np.float32), np.ones((64, 100), np.float32)


def test_the_figures_are_counted_from_the_trace():
    profile = nki_kernels.profile(product, X, Y, target="trn2")
    figures = profile.summary()
    assert figures["instructions"] == 6
    assert figures["hardware_flops"] == 2 * (64 * 32 * 100 + 64 * 32 * 64)
    assert figures["transpose_flops"] == 2 * 64 * 32 * 64
    assert figures["hbm_read_bytes"] == X.nbytes + Y.nbytes
    assert figures["hbm_write_bytes"] == 32 * 100 * 4
    moved = X.nbytes + Y.nbytes + 32 * 100 * 4
    assert figures["dma_transfer_average_bytes"] == moved / 3
    assert figures["peak_psum_banks"] == 2
    assert np.array_equal(profile.result, X.T @ Y)


def test_percentages_follow_their_definitions():
    profile = nki_kernels.profile(product, X, Y, target="trn2")
    figures, timeline = profile.summary(), profile.timeline
    total = timeline.total_ns
    assert figures["total_time_us"] == total / 1e3
    flops = 2 * 64 * 32 * 100
    assert figures["mfu_estimated_percent"] == 100 * flops / (
        TRN2.peak_tflops("bfloat16") * 1e3 * total
    )
    moved = figures["hbm_read_bytes"] + figures["hbm_write_bytes"]
    assert figures["mbu_estimated_percent"] == 100 * moved / (TRN2.hbm_bytes_per_ns * total)
    for engine in ("tensor", "vector", "scalar", "gpsimd", "sync"):
        share = 100 * timeline.busy_ns[engine] / total
        assert figures[f"{engine}_engine_active_time_percent"] == share


def test_values_do_not_change_the_figures():
    shapes = [nki_kernels.Abstract(v.shape, v.dtype) for v in (X, Y)]
    without = nki_kernels.profile(product, *shapes, target="trn2")
    assert without.summary() == nki_kernels.profile(product, X, Y, target="trn2").summary()
    assert isinstance(without.result, nki_kernels.Abstract)
    assert without.result.shape == (32, 100)


@pytest.mark.parametrize(
    ("target", "label"),
    [
        ("trn2", "(model, unvalidated)"),
        ("trn3", "(model, unvalidated, projected hardware numbers)"),
    ],
)
def test_the_text_names_its_source(target, label):
    text = str(nki_kernels.profile(product, X, Y, target=target))
    assert text.splitlines()[0] == f"product on {target} {label}"
    assert "limiting_engine" in text


def test_a_kernel_that_raises_raises():
    with pytest.raises(NkiKernelsError, match=r"must be \[32, 100\]|contraction"):
        nki_kernels.profile(product, X, np.ones((63, 100), np.float32), target="trn2")


def test_an_unknown_target_is_named():
    with pytest.raises(ValueError, match="trn9"):
        nki_kernels.profile(product, X, Y, target="trn9")


def test_an_unknown_name_of_the_package_is_an_attribute_error():
    with pytest.raises(AttributeError, match="no attribute 'profil'"):
        _ = nki_kernels.profil


def test_the_repr_is_one_line():
    profile = nki_kernels.profile(product, X, Y, target="trn2")
    assert repr(profile).startswith("<Profile of 'product' on trn2: ")
    assert len(repr(profile).splitlines()) == 1


def test_the_package_lists_what_it_loads_on_first_use():
    assert {"Abstract", "Profile", "profile"} <= set(dir(nki_kernels))
