"""Ten planted performance faults: each is named, and the good kernel is accused of none."""

from __future__ import annotations

import functools

import nki.isa as nisa
import nki.language as nl
import numpy as np
import pytest

import nki_kernels
from nki_kernels.profiler import Profile
from tests.profiler.kernels import looped
from tests.profiler.mlp import FAULTS, mlp

SHAPES = {"x": (4096, 256), "w": (256, 2048)}
#: What is allowed to be said beside the fault, because it is true: one PSUM bank for all rows is a
#: single buffer too, and transposing again on PE is much transposing.
BESIDE = {
    "bank conflict": {"single buffering"},
    "redundant transposes": {"transposes"},
}


@functools.cache
def profiled(fault: str) -> Profile:
    x, w = (nki_kernels.Abstract(shape, "bfloat16") for shape in SHAPES.values())
    return nki_kernels.profile(mlp, x, w, fault=fault, target="trn2")


def names(profile: Profile) -> list[str]:
    return [advice.name for advice in profile.advice]


def first_page(profile: Profile) -> str:
    """What stands above the figures of the report."""
    return str(profile).partition("  total_time_us")[0]


def test_the_good_kernel_is_not_accused():
    assert names(profiled("none")) == []
    assert "No performance fault found" in first_page(profiled("none"))


@pytest.mark.parametrize("fault", FAULTS)
def test_a_planted_fault_is_named_on_the_first_page_and_no_other(fault):
    found = set(names(profiled(fault)))
    assert fault in found
    assert found <= {fault} | BESIDE.get(fault, set())
    assert f". {fault} (" in first_page(profiled(fault))


@pytest.mark.parametrize("fault", FAULTS)
def test_the_advice_names_the_spoiled_line(fault):
    profile = profiled(fault)
    (advice,) = [a for a in profile.advice if a.name == fault]
    frames = [profile.case.sites.frames[place] for place in advice.places]
    functions = {
        "serialised loads": "_rows",
        "single buffering": "_rows",
        "tiny DMAs": "_store",
        "table switches": "_root",
        "eviction on one engine": "_products",
        "strided operand": "_exponentials",
        "unused partitions": "_products",
        "bank conflict": "_evict_together",
        "redundant transposes": "_transposed",
        "reloaded input": "_weights",
    }
    assert functions[fault] in {frame.function for frame in frames}
    assert frames[0].file.endswith("mlp.py")
    assert f"mlp.py:{frames[0].line}" in advice.text


@pytest.mark.parametrize("fault", FAULTS)
def test_the_fault_costs_time_and_something_is_at_stake(fault):
    good, bad = profiled("none"), profiled(fault)
    assert bad.timeline.total_ns > good.timeline.total_ns
    (advice,) = [a for a in bad.advice if a.name == fault]
    assert 0.0 < advice.at_stake_ns <= bad.timeline.total_ns
    assert advice.at_stake_percent == 100.0 * advice.at_stake_ns / bad.timeline.total_ns


@pytest.mark.parametrize("fault", ["none", *FAULTS])
def test_no_fault_changes_a_result(fault):
    rng = np.random.default_rng(7)
    x = (rng.integers(-2, 3, (256, 128)) / 8).astype(np.float32)
    w = (rng.integers(-2, 3, (128, 2048)) / 8).astype(np.float32)
    halves = [a.astype(nki_kernels.machine.dtypes.as_dtype("bfloat16").host) for a in (x, w)]
    out, _ = nki_kernels.profile(mlp, *halves, fault=fault, target="trn2").result
    good, _ = nki_kernels.profile(mlp, *halves, target="trn2").result
    assert np.array_equal(out, good)


# -- faults beyond the ten, each with its clean twin -----------------------------------------------


def spilling(x, spill):
    """exp(exp(x)), by way of HBM or not."""
    out = nl.ndarray(x.shape, dtype=x.dtype, buffer=nl.shared_hbm)
    there = nl.ndarray(x.shape, dtype=x.dtype, buffer=nl.private_hbm)
    for start in range(0, x.shape[0], 128):
        tile = nl.ndarray((128, x.shape[1]), dtype=x.dtype, buffer=nl.sbuf)
        nisa.dma_copy(dst=tile, src=x[start : start + 128, :])
        nisa.activation(dst=tile, op=nl.exp, data=tile)
        again = tile
        if spill:
            again = nl.ndarray((128, x.shape[1]), dtype=x.dtype, buffer=nl.sbuf)
            nisa.dma_copy(dst=there[start : start + 128, :], src=tile)
            nisa.dma_copy(dst=again, src=there[start : start + 128, :])
        nisa.activation(dst=again, op=nl.exp, data=again)
        nisa.dma_copy(dst=out[start : start + 128, :], src=again)
    return out


@pytest.mark.parametrize("spill", [True, False])
def test_spills_are_traffic_of_tensors_that_are_neither_input_nor_output(spill):
    x = nki_kernels.Abstract((512, 2048), "float32")
    profile = nki_kernels.profile(spilling, x, spill, target="trn2")
    figures = profile.summary()
    moved = 512 * 2048 * 4 if spill else 0
    assert (figures["spill_save_bytes"], figures["spill_reload_bytes"]) == (moved, moved)
    assert ("spills" in names(profile)) == spill
    if spill:
        (advice,) = [a for a in profile.advice if a.name == "spills"]
        assert "50 % of the HBM reads fetch back intermediate tensors" in advice.text


def crowded(x, engine, rounds):
    """Vector's fast mode and another engine side by side: GpSimd shares Vector's port to SBUF."""
    out = nl.ndarray(x.shape, dtype=x.dtype, buffer=nl.shared_hbm)
    tiles = [nl.ndarray(x.shape, dtype=x.dtype, buffer=nl.sbuf) for _ in range(4)]
    nisa.dma_copy(dst=tiles[0], src=x)
    nisa.dma_copy(dst=tiles[2], src=x)
    for _ in range(rounds):
        nisa.tensor_copy(dst=tiles[1], src=tiles[0], engine=nisa.engine.vector)
        nisa.tensor_copy(dst=tiles[3], src=tiles[2], engine=engine)
    nisa.dma_copy(dst=out, src=tiles[1])
    return out


@pytest.mark.parametrize("name", ["gpsimd", "scalar"])
def test_the_port_that_gpsimd_and_vector_share(name):
    x = nki_kernels.Abstract((128, 2048), "bfloat16")
    engine = getattr(nisa.engine, name)
    profile = nki_kernels.profile(crowded, x, engine, 40, target="trn2")
    assert ("shared port" in names(profile)) == (name == "gpsimd")


def flipping(x, w, count):
    """`count` transposes of fresh data for eight matmuls."""
    out = nl.ndarray((128, 512), dtype=nl.float32, buffer=nl.shared_hbm)
    tile = nl.ndarray(x.shape, dtype=x.dtype, buffer=nl.sbuf)
    weight = nl.ndarray(w.shape, dtype=w.dtype, buffer=nl.sbuf)
    total = nl.ndarray((128, 512), dtype=nl.float32, buffer=nl.psum)
    result = nl.ndarray((128, 512), dtype=nl.float32, buffer=nl.sbuf)
    nisa.dma_copy(dst=tile, src=x)
    nisa.dma_copy(dst=weight, src=w)
    for index in range(40):
        moved = tile[:, 0:128]
        if index < count:
            bank = nl.ndarray((128, 128), dtype=x.dtype, buffer=nl.psum)
            moved = nl.ndarray((128, 128), dtype=x.dtype, buffer=nl.sbuf)
            part = tile[:, 128 * index : 128 * (index + 1)]
            nisa.nc_transpose(dst=bank, data=part, engine=nisa.engine.tensor)
            nisa.tensor_copy(dst=moved, src=bank)
        nisa.nc_matmul(dst=total, stationary=moved, moving=weight, accumulate=index > 0)
    nisa.tensor_copy(dst=result, src=total)
    nisa.dma_copy(dst=out, src=result)
    return out


@pytest.mark.parametrize(("count", "said"), [(40, True), (18, True), (17, False), (0, False)])
def test_transposes_above_ten_percent_of_the_flops_are_too_many(count, said):
    """One transpose is 128 of a matmul's 512 rows: 40 of 40 are 20 %, 18 are 10.1 %."""
    x, w = (nki_kernels.Abstract(s, "bfloat16") for s in ((128, 128 * 40), (128, 512)))
    profile = nki_kernels.profile(flipping, x, w, count, target="trn2")
    figures = profile.summary()
    share = figures["transpose_flops"] / figures["hardware_flops"]
    assert share == count * 128 / (count * 128 + 40 * 512)
    assert ("transposes" in names(profile)) == said == (share > 0.1)
    assert "redundant transposes" not in names(profile)


def unrolled(x):
    """The loop of `looped`, in Python."""
    out = nl.ndarray(x.shape, dtype=x.dtype, buffer=nl.shared_hbm)
    tile = nl.ndarray(x.shape, dtype=x.dtype, buffer=nl.sbuf)
    nisa.dma_copy(dst=tile, src=x)
    for _ in range(5):
        nisa.tensor_tensor(dst=tile, data1=tile, data2=tile, op=nl.add)
        nisa.activation(dst=tile, op=nl.exp, data=tile)
    nisa.dma_copy(dst=out, src=tile)
    return out


@pytest.mark.parametrize("kernel", [looped, unrolled])
def test_a_device_loop_that_does_little_is_named(kernel):
    profile = nki_kernels.profile(kernel, np.ones((8, 8), np.float32), target="trn2")
    assert ("loop overhead" in names(profile)) == (kernel is looped)
    for advice in profile.advice:
        if advice.name == "loop overhead":
            assert "5 iterations of device loops at kernels.py:" in advice.text
