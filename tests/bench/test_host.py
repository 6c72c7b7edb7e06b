from __future__ import annotations

import importlib.util
import json

import numpy as np
import pytest

import bench.__main__
import bench.host
from bench.__main__ import main
from bench.entries import ENTRIES
from bench.host import (
    INSTRUCTION_LIMIT_US,
    MATMUL_LIMIT,
    HostResult,
    host_table,
    measure_growth,
    measure_instructions,
    measure_matmul,
    measure_shapes_only,
)
from tests.tolerance import assert_close


def test_every_instruction_is_measured_and_the_median_is_over_families(monkeypatch):
    costs = iter([5.0, 1.0, 30.0, 2.0, 4.0, 4.0, 50.0, 7.0, 8.0, 9.0])
    monkeypatch.setattr(bench.host, "instruction_us", lambda call, calls: next(costs))
    *each, summary = measure_instructions()
    assert [r.value for r in each] == [5.0, 1.0, 30.0, 2.0, 4.0, 4.0, 50.0, 7.0, 8.0, 9.0]
    # Family medians: 3, 30, 4, 7, 8, 9.
    assert (summary.value, summary.limit, summary.within) == (7.5, INSTRUCTION_LIMIT_US, True)


def test_the_calls_really_run():
    calls = 3
    results = list(measure_instructions(calls))
    assert all(r.value > 0 and r.source == "host" for r in results)
    seen = []
    families = bench.host._CALLS_BY_FAMILY
    call = families["elementwise"]["memset"]
    bench.host.instruction_us(lambda tiles: seen.append(call(tiles)), calls)
    assert len(seen) == 1 + calls * bench.host._REPEATS
    assert {handle.event.opcode for handle in seen} == {"memset"}


def test_each_call_is_the_instruction_it_is_named_after_with_one_element():
    for table in bench.host._CALLS_BY_FAMILY.values():
        for name, call in table.items():
            seen = []
            bench.host.instruction_us(lambda t, call=call, seen=seen: seen.append(call(t)), 1)
            if name == "register_load":
                continue  # returns no handle
            event = seen[0].event
            assert event.opcode == name
            assert {a.shape for a in (*event.reads, *event.writes)} <= {(1, 1), (1,)}


def test_the_matmul_is_compared_in_the_same_run():
    ours, numpy, *torch, ratio = measure_matmul(size=64, repeats=1)
    assert len(torch) == (importlib.util.find_spec("torch") is not None)
    assert ratio.value == ours.value / numpy.value
    assert ratio.limit == MATMUL_LIMIT
    assert ratio.within is (ratio.value < MATMUL_LIMIT)


def test_each_size_is_beside_numpy_and_pytorch(monkeypatch):
    monkeypatch.setattr(bench.host, "_beside_others", lambda op, axes, repeats: (2.0, 1.0, 0.5))
    results = list(measure_growth())
    assert [(r.name, r.value) for r in results[:3]] == [
        ("matmul 256x256x256 bf16", 2000.0),
        ("matmul 256x256x256 float32, numpy", 1000.0),
        ("matmul 256x256x256 float32, torch", 500.0),
    ]
    assert len(results) == 18
    assert all(r.limit is None for r in results)


@pytest.mark.parametrize(("op", "axes"), [("matmul", {"M": 3, "N": 4, "K": 5}),
                                          ("rms_norm", {"N": 3, "H": 5})])  # fmt: skip
def test_the_others_compute_the_same(op, axes):
    entry = ENTRIES[op]
    arrays = [x.astype(np.float32) for x in entry.inputs(entry.op.input_shapes(axes), "float32", 0)]
    value, magnitude = entry.reference(*arrays)
    rule = {"op": op, "case": "numpy", "roundings": 4, "chain": 12}
    assert_close(bench.host._IN_NUMPY[op](*arrays), value, magnitude, **rule)
    torch = pytest.importorskip("torch")
    theirs = bench.host._IN_TORCH[op](torch, *map(torch.from_numpy, arrays))
    assert_close(theirs.numpy(), value, magnitude, **rule)


FIGURES = [
    HostResult(name="memset", family="elementwise", value=7.25, unit="us"),
    HostResult(name="median", value=21.0, unit="us", limit=20.0, within=False),
    HostResult(name="ratio", value=2.0, unit="x", limit=4.0, within=True),
]


def test_the_table_shows_limits():
    lines = [line.split() for line in host_table(FIGURES).splitlines()]
    assert lines[0][-1] == "(host)"
    assert lines[3:] == [
        ["memset", "elementwise", "7.25", "us"],
        ["median", "21", "us", "20", "NO"],
        ["ratio", "2", "x", "4", "yes"],
    ]


@pytest.mark.parametrize(("kept", "code"), [(True, 0), (False, 1)])
def test_host_exits_by_its_limits(kept, code, tmp_path, capsys, monkeypatch):
    figures = FIGURES[2:] if kept else FIGURES
    monkeypatch.setattr(bench.__main__, "measure_instructions", lambda: iter(figures))
    monkeypatch.setattr(bench.__main__, "measure_matmul", lambda: iter(()))
    monkeypatch.setattr(bench.__main__, "measure_shapes_only", lambda: iter(()))
    monkeypatch.setattr(bench.__main__, "measure_growth", lambda: iter(()))
    path = tmp_path / "host.json"
    assert main(["host", "--json", str(path)]) == code
    assert "ratio" in capsys.readouterr().out
    document = json.loads(path.read_text("utf-8"))
    assert document["source"] == "host"
    assert [r["value"] for r in document["results"]] == [f.value for f in figures]


def test_host_refuses_a_path_before_it_measures(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(bench.__main__, "measure_instructions", lambda: pytest.fail("measured"))
    assert main(["host", "--json", str(tmp_path)]) == 2
    assert "is a folder; name a file in it" in capsys.readouterr().err


def test_shapes_only_runs_grow_with_the_size_and_carry_their_limits():
    small, large, rate, whole, memory = measure_shapes_only(rounds=40)
    assert small.name == "shapes only, 100 instructions, traced and timed, each"
    assert large.name == "shapes only, 400 instructions, traced and timed, each"
    assert rate.limit == 30.0
    assert rate.within == (rate.value >= rate.limit)
    assert whole.limit == 8.0
    assert round(whole.value * 1e6 / 400, 9) == round(large.value, 9)
    assert memory.value > 0
