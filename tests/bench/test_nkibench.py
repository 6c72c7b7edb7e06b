"""NKIBench's problems: ours by the model, the published figures beside them, no ratio."""

from __future__ import annotations

import dataclasses
import json

import pytest

import bench.__main__
import bench.running
from bench.__main__ import main
from bench.nkibench import DEVICE_MS, nkibench_table, nkibench_work
from nki_kernels.operators import OPERATORS
from nki_kernels.operators.nkibench import DTYPE, PROBLEMS
from nki_kernels.operators.shapes import parse
from tests.bench.test_record import RESULT

MATMUL = dataclasses.replace(
    RESULT, op="matmul", shape="nkibench:matmul", dtype=DTYPE, target="trn2", correct=True,
    modelled_us=31617.6, percent_of_roofline=82.94, limiting_engine="tensor", failure=None,
)  # fmt: skip


def test_there_are_14_problems_each_with_its_device_figures():
    names = [problem.name for problem in PROBLEMS]
    assert len(set(names)) == 14
    assert set(names) == set(DEVICE_MS)
    assert all(0 < ms < 100 for figures in DEVICE_MS.values() for ms in figures)


SOLVED = [p for p in PROBLEMS if p.op in OPERATORS]


@pytest.mark.parametrize("problem", SOLVED, ids=lambda p: p.name)
def test_a_problem_with_an_operator_is_a_named_shape_of_it(problem):
    case = parse(OPERATORS[problem.op], problem.shape)
    assert dict(case.axes) == dict(problem.axes)
    assert set(case.axes) == set(OPERATORS[problem.op].axis_order)
    assert DTYPE in OPERATORS[problem.op].dtypes
    # The sizes are those of NKIBench, under other letters.
    sizes = sorted(int("".join(filter(str.isdigit, text))) for text in problem.sizes.split())
    assert set(sizes) <= set(problem.axes.values())
    # What else there is follows from them: half of a head, a token count that stands twice.
    assert set(problem.axes.values()) <= {*sizes, *(size // 2 for size in sizes)}


def test_the_work_is_what_has_an_operator_on_every_target():
    work = nkibench_work(["trn2", "trn1"])
    names = [p.name for p in SOLVED]
    assert len(names) >= 4
    assert [w.shape for w in work] == [f"nkibench:{n}" for n in names] * 2
    assert {(w.dtype, w.target) for w in work} == {(DTYPE, "trn2"), (DTYPE, "trn1")}


def test_the_table_has_all_problems_and_no_ratio():
    text = nkibench_table([MATMUL])
    lines = {line.split()[0]: line.split() for line in text.splitlines() if line.strip()}
    for problem in PROBLEMS:
        assert lines[problem.name][-2:] == [f"{1e3 * ms:,.0f}" for ms in DEVICE_MS[problem.name]]
    assert lines["matmul"][4:] == ["matmul", "31,618", "82.9", "35,200", "35,309"]
    assert "no operator yet" in " ".join(lines["adamw"])
    assert text.startswith("NKIBench, float32; ours on trn2 (model, unvalidated)\n")
    assert "measured on trn1" in text
    assert "no ratio to ours is formed" in text
    assert max(map(len, text.splitlines())) <= 100


def test_a_failed_check_has_no_time():
    failed = dataclasses.replace(MATMUL, correct=False, modelled_us=None, failure="worst at 3")
    text = nkibench_table([failed])
    assert "FAILED nkibench:matmul: worst at 3" in text
    (row,) = (line for line in text.splitlines() if line.startswith("matmul "))
    assert row.split()[4:] == ["matmul", "FAILED", "-", "35,200", "35,309"]


def test_the_command_prints_and_writes(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(bench.__main__, "nkibench_work", lambda targets: [])
    monkeypatch.setattr(bench.__main__, "run_all", lambda work, jobs, partial: [MATMUL])
    path = tmp_path / "out.json"
    assert main(["nkibench", "--json", str(path)]) == 0
    assert "31,618" in capsys.readouterr().out
    assert [r["op"] for r in json.loads(path.read_text())["results"]] == ["matmul"]
    assert main(["nkibench", "--target", "trn9"]) == 2
    assert "--target: target 'trn9': unknown" in capsys.readouterr().err
