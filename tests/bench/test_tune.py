"""The search of a config: it finds a better one, keeps nothing wrong, and goes on after a stop."""

from __future__ import annotations

import dataclasses
import json

import pytest

import bench.tune
from bench.__main__ import main
from bench.entries import ENTRIES
from bench.running import Work
from bench.tune import Search, modelled_ns, neighbours, tune_one, tune_table, write_tuned
from nki_kernels.hardware import TARGETS, spec_for
from nki_kernels.operators import OPERATORS
from nki_kernels.operators import tuned as stored
from nki_kernels.operators.tuned import case_key, tuned_cases, tuned_config

WORK = Work("matmul", "20x40x50", "bfloat16", "toy")
OP = ENTRIES["matmul"].op
AXES = {"M": 20, "N": 40, "K": 50}


@pytest.fixture(autouse=True)
def empty_cache(tmp_path_factory, monkeypatch):
    monkeypatch.setenv("NKI_KERNELS_CACHE", str(tmp_path_factory.mktemp("cache")))


def worse(monkeypatch):
    """Let the operator choose a poor config."""
    own = OP.configure

    def poor(axes, dtype, spec):
        return dataclasses.replace(own(axes, dtype, spec), wave_m=1, wave_n=1, prefetch=1)

    entry = dataclasses.replace(ENTRIES["matmul"], op=dataclasses.replace(OP, configure=poor))
    monkeypatch.setattr("bench.entries.ENTRIES", {"matmul": entry})
    return entry


def test_a_poor_choice_is_found_out(monkeypatch):
    entry = worse(monkeypatch)
    found = tune_one(Search(WORK, 30))
    assert found.tuned_ns < found.heuristic_ns
    assert found.regret_percent > 1
    assert found.failure is None
    # Both times are those of a launch with that config.
    start = entry.op.configure(AXES, "bfloat16", spec_for("toy"))
    best = dataclasses.replace(start, **found.config)
    assert modelled_ns(entry, AXES, "bfloat16", start, "toy") == found.heuristic_ns
    assert modelled_ns(entry, AXES, "bfloat16", best, "toy") == found.tuned_ns


def test_the_budget_ends_the_search(monkeypatch):
    worse(monkeypatch)
    found = tune_one(Search(WORK, 2))
    assert (found.tried, found.exhausted) == (2, True)
    full = tune_one(Search(WORK, 500))
    assert not full.exhausted
    assert full.tuned_ns <= found.tuned_ns


def test_a_config_that_computes_something_else_does_not_win(monkeypatch):
    entry = worse(monkeypatch)

    def wrong(*inputs, **options):
        value, magnitude = entry.reference(*inputs, **options)
        return 2 * value, magnitude

    broken = dataclasses.replace(entry, reference=wrong)
    monkeypatch.setattr("bench.entries.ENTRIES", {"matmul": broken})
    found = tune_one(Search(WORK, 10))
    assert "worst at" in found.failure
    assert found.config == {}
    assert found.tuned_ns == found.heuristic_ns
    assert "FAILED matmul 20x40x50: " in tune_table([found])
    assert main(["tune", "matmul", "--shape", "20x40x50", "--target", "toy", "--budget", "10"]) == 1


def test_a_config_that_cannot_run_is_no_candidate():
    spec = spec_for("toy")
    config = OP.configure(AXES, "bfloat16", spec)
    huge = dataclasses.replace(config, wave_m=1000)
    assert modelled_ns(ENTRIES["matmul"], AXES, "bfloat16", huge, "toy") is None


def test_neighbours_change_one_field_and_leave_unsettled_ones():
    @dataclasses.dataclass(frozen=True)
    class Config:
        wave: int
        hold: bool
        transpose: str
        banks: int

    config = Config(1, True, "dma", 1)
    found = list(neighbours(config))
    assert [(c.wave, c.hold, c.transpose, c.banks) for c in found] == [
        (2, True, "dma", 1),
        (0, True, "dma", 1),
        (1, False, "dma", 1),
        (1, True, "pe", 1),
    ]


def test_an_interrupted_search_goes_on_where_it_stopped(monkeypatch, tmp_path, capsys):
    real, seen = bench.tune.tune_one, []

    def once(search):
        seen.append(search.work.shape)
        if len(seen) == 2:
            raise KeyboardInterrupt
        return real(search)

    monkeypatch.setattr(bench.tune, "tune_one", once)
    path = tmp_path / "out.json"
    command = ["tune", "matmul", "--shape", "9x9x9", "--shape", "1x1x1", "--target", "toy"]
    command += ["--budget", "3", "--json", str(path)]
    assert main(command) == 130
    assert "the same command again goes on" in capsys.readouterr().err
    assert main(command) == 0
    assert seen == ["9x9x9", "1x1x1", "1x1x1"]
    assert [r["shape"] for r in json.loads(path.read_text())["results"]] == ["9x9x9", "1x1x1"]
    assert [p.name for p in tmp_path.iterdir()] == ["out.json"]
    assert "regret of the operator's own choice, percent" in capsys.readouterr().out


def test_a_budget_that_tries_nothing_is_refused(capsys):
    assert main(["tune", "matmul", "--shape", "9x9x9", "--budget", "1"]) == 2
    assert "--budget is 1; at least 2 are needed" in capsys.readouterr().err


def test_results_are_kept_per_target_and_read_back(monkeypatch, tmp_path):
    entry = worse(monkeypatch)
    monkeypatch.setattr(stored, "__file__", str(tmp_path / "__init__.py"))
    tuned_cases.cache_clear()
    assert tuned_config(entry.op, AXES, "bfloat16", "toy") is None
    found = tune_one(Search(WORK, 20))
    other = dataclasses.replace(found, key="matmul 1x1x1 bfloat16", config={})
    for results in ([found], [other], [found]):
        assert write_tuned(results) == [tmp_path / "toy.json"]
    tuned_cases.cache_clear()
    assert set(tuned_cases("toy")) == {found.key, other.key}
    config = tuned_config(entry.op, AXES, "bfloat16", "toy")
    start = entry.op.configure(AXES, "bfloat16", spec_for("toy"))
    assert config == dataclasses.replace(start, **found.config)
    assert tuned_config(entry.op, AXES, "float32", "toy") is None
    tuned_cases.cache_clear()


def test_every_stored_config_can_be_given_to_its_operator():
    tuned_cases.cache_clear()
    for target in TARGETS:
        for key, case in tuned_cases(target).items():
            name, sizes, dtype = key.split()
            op = OPERATORS[name]
            axes = dict(zip(op.axis_order, map(int, sizes.split("x")), strict=True))
            assert case_key(op, axes, dtype) == key
            config = tuned_config(op, axes, dtype, target)
            assert op.config_problems(config, dtype, spec_for(target)) == ()
            assert case["tuned_ns"] <= case["heuristic_ns"]
