from __future__ import annotations

import dataclasses

import numpy as np
import pytest

import bench.check
from bench.check import cache_folder, check, kernel_hash, reduced_axes, source_hash
from bench.entries import ENTRIES
from bench.harness import measure
from nki_kernels.hardware import spec_for
from nki_kernels.operators.shapes import parse

MATMUL = ENTRIES["matmul"]
TOY = "toy"


@pytest.fixture(autouse=True)
def empty_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("NKI_KERNELS_CACHE", str(tmp_path))
    return tmp_path


@pytest.fixture
def unaffordable(monkeypatch):
    monkeypatch.setattr(bench.check, "AFFORDABLE_FLOPS", 1)


def config(axes):
    return MATMUL.op.configure(axes, "float32", spec_for(TOY))


def wrong_reference(entry):
    def reference(*inputs):
        value, magnitude = entry.reference(*inputs)
        return value + (np.arange(value.size).reshape(value.shape) == value.size - 1), magnitude

    return dataclasses.replace(entry, reference=reference)


def launches(monkeypatch):
    """Count the launches, by their M."""
    seen = []
    launch = type(MATMUL.op).launch

    def counted(self, inputs, *args, **kwargs):
        seen.append(inputs[0].shape[0])
        return launch(self, inputs, *args, **kwargs)

    monkeypatch.setattr(type(MATMUL.op), "launch", counted)
    return seen


def test_an_affordable_case_is_checked_in_full_in_the_run_that_is_timed(monkeypatch):
    seen = launches(monkeypatch)
    result = measure(MATMUL, parse(MATMUL.op, "9x17x10"), "float32", TOY, full=False)
    assert (result.correct, result.checked_at, result.check_cached) == (True, "full", False)
    assert seen == [9]


def test_a_large_case_is_checked_reduced_once_and_timed_by_shape(monkeypatch, unaffordable):
    axes = {"M": 400, "N": 70, "K": 45}
    reduced = reduced_axes(MATMUL, axes, config(axes), TOY)
    assert reduced["M"] < axes["M"]
    seen = launches(monkeypatch)
    case = parse(MATMUL.op, "400x70x45")
    first = measure(MATMUL, case, "float32", TOY, full=False)
    assert first.checked_at == "x".join(str(reduced[letter]) for letter in "MNK")
    assert seen == [reduced["M"], 400]
    second = measure(MATMUL, case, "float32", TOY, full=False)
    assert seen == [reduced["M"], 400, 400]
    assert second == dataclasses.replace(first, check_cached=True)
    third = measure(MATMUL, case, "float32", TOY, full=True)
    assert seen[3:] == [400]
    # Values or shapes only: the same time to the last bit.
    assert third == dataclasses.replace(first, checked_at="full")


def test_a_wrong_result_is_not_timed(unaffordable):
    entry = wrong_reference(MATMUL)
    for full in (False, True):
        result = measure(entry, parse(MATMUL.op, "400x70x45"), "float32", TOY, full=full)
        assert not result.correct
        assert "matmul [" in result.failure
        assert "worst at" in result.failure
        assert result.modelled_us is None
        assert result.percent_of_roofline is None


def test_a_failure_is_not_remembered(empty_cache, unaffordable):
    axes = {"M": 400, "N": 70, "K": 45}
    for _ in range(2):
        verdict = check(wrong_reference(MATMUL), axes, "float32", config(axes), TOY, full=False)
        assert not verdict.correct
    assert not list(empty_cache.rglob("*.json"))
    assert check(MATMUL, axes, "float32", config(axes), TOY, full=False).correct


def test_other_sources_or_configs_are_checked_again(empty_cache, monkeypatch, unaffordable):
    axes = {"M": 400, "N": 70, "K": 45}
    chosen = config(axes)
    assert not check(MATMUL, axes, "float32", chosen, TOY, full=False).cached
    assert check(MATMUL, axes, "float32", chosen, TOY, full=False).cached
    assert not check(MATMUL, axes, "float16", chosen, TOY, full=False).cached
    monkeypatch.setenv("NKI_PRECISE_FP", "0")
    assert not check(MATMUL, axes, "float32", chosen, TOY, full=False).cached
    monkeypatch.setenv("NKI_PRECISE_FP", "1")
    monkeypatch.setattr(bench.check, "source_hash", lambda *_: "edited")
    assert not check(MATMUL, axes, "float32", chosen, TOY, full=False).cached
    assert check(MATMUL, axes, "float32", chosen, TOY, full=False).cached


def test_an_unreadable_or_unwritable_cache_only_costs_time(empty_cache, monkeypatch, unaffordable):
    axes = {"M": 400, "N": 70, "K": 45}
    check(MATMUL, axes, "float32", config(axes), TOY, full=False)
    (note,) = empty_cache.rglob("*.json")
    for text in ("{", "[]", '{"correct": false}'):
        note.write_text(text)
        assert not check(MATMUL, axes, "float32", config(axes), TOY, full=False).cached
    blocked = empty_cache / "file"
    blocked.write_text("")
    monkeypatch.setenv("NKI_KERNELS_CACHE", str(blocked))
    for _ in range(2):
        verdict = check(MATMUL, axes, "float32", config(axes), TOY, full=False)
        assert (verdict.correct, verdict.cached) == (True, False)


def test_the_cache_folder_follows_the_environment(monkeypatch, tmp_path):
    assert cache_folder() == tmp_path
    monkeypatch.delenv("NKI_KERNELS_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert cache_folder() == tmp_path / "xdg" / "nki-kernels"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    assert cache_folder() == tmp_path / "home" / ".cache" / "nki-kernels"


def test_a_source_hash_sees_names_and_bytes(tmp_path, monkeypatch):
    monkeypatch.setattr(bench.check, "ROOT", tmp_path)
    room = tmp_path / "room"
    room.mkdir()

    def hashed():
        source_hash.cache_clear()
        return source_hash("room")

    seen = {hashed()}
    (room / "a.py").write_text("1")
    seen.add(hashed())
    (room / "a.py").write_text("2")
    seen.add(hashed())
    (room / "a.py").rename(room / "b.py")
    seen.add(hashed())
    assert len(seen) == 4
    (room / "b.pyc").write_text("compiled")
    assert hashed() in seen
    (tmp_path / "one.py").write_text("1")
    assert source_hash("one.py") != source_hash()
    source_hash.cache_clear()


def test_every_operator_has_kernel_sources_to_hash():
    empty = source_hash()
    for name in ENTRIES:
        assert kernel_hash(ENTRIES[name]) != empty
    assert kernel_hash(ENTRIES["rms_norm"]) == source_hash("nki_kernels/kernels/norm")
    assert kernel_hash(MATMUL) == source_hash("nki_kernels/kernels/matmul")
