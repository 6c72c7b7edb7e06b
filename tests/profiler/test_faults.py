"""Ten planted performance faults: each is named, and the good kernel is accused of none."""

from __future__ import annotations

import functools

import numpy as np
import pytest

import nki_kernels
from nki_kernels.profiler import Profile
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
