from __future__ import annotations

import csv
import dataclasses
import itertools
import json
import os
import subprocess
import sys

import pytest

import bench.entries
import bench.running
from bench.__main__ import main
from bench.record import ROOT, BenchError
from nki_kernels.hardware import spec_for
from nki_kernels.operators import OPERATORS
from nki_kernels.operators.shapes import cases


@pytest.fixture(autouse=True)
def empty_cache(tmp_path_factory, monkeypatch):
    monkeypatch.setenv("NKI_KERNELS_CACHE", str(tmp_path_factory.mktemp("cache")))


def test_list_names_operators_and_shapes(capsys):
    assert main(["list"]) == 0
    out = capsys.readouterr().out
    assert "matmul: c[m, n] = sum_k a[m, k] * b[k, n]" in out
    for op in OPERATORS.values():
        assert " ".join(f"{op.name}: {op.summary}".split()) in " ".join(out.split())
        for case in cases(op.name):
            assert case.name in out


def legal_sizes(op):
    """Small sizes within the operator's limits, ragged where they allow it."""
    spec = spec_for("toy")
    for sizes in itertools.product((9, 8, 18, 4, 1), repeat=len(op.axis_order)):
        axes = dict(zip(op.axis_order, sizes, strict=True))
        if any(op.limits(axes, dtype, spec) for dtype in op.dtypes):
            continue
        try:
            bench.entries.ENTRIES[op.name].inputs(op.input_shapes(axes), op.dtypes[0], 0)
        except ValueError:
            continue  # sizes that depend on each other, such as the pages of a cache
        return "x".join(map(str, sizes))
    raise AssertionError(op.name)


@pytest.mark.parametrize("op", OPERATORS)
def test_every_operator_runs_in_every_dtype(op, tmp_path, capsys):
    sizes = legal_sizes(OPERATORS[op])
    path = tmp_path / "out.json"
    command = ["run", op, "--shape", sizes, "--target", "toy", "--json", str(path)]
    for dtype in OPERATORS[op].dtypes:
        command += ["--dtype", dtype]
    assert main(command) == 0
    results = json.loads(path.read_text("utf-8"))["results"]
    assert [result["dtype"] for result in results] == list(OPERATORS[op].dtypes)
    assert all(result["correct"] and result["flops"] >= 0 for result in results)
    assert capsys.readouterr().out.startswith(f"{op} on toy (model, unvalidated, projected")


def test_run_prints_a_table_and_writes_json(tmp_path, capsys):
    path = tmp_path / "out.json"
    command = ["run", "matmul", "--shape", "9x17x10", "--shape", "1x1x1", "--dtype", "bf16"]
    command += ["--dtype", "float32", "--target", "toy", "--check", "full", "--json", str(path)]
    assert main(command) == 0
    out, err = capsys.readouterr()
    assert err == ""
    assert out.startswith("matmul on toy (model, unvalidated, projected hardware)\n")
    assert max(map(len, out.splitlines())) <= 100
    document = json.loads(path.read_text("utf-8"))
    assert document["source"] == "model"
    cells = [(r["shape"], r["dtype"]) for r in document["results"]]
    assert cells == [(s, d) for s in ("9x17x10", "1x1x1") for d in ("bfloat16", "float32")]
    for record in document["results"]:
        assert record["correct"] is True
        assert record["validated"] is False
        assert record["projected"] is True
        assert record["modelled_us"] > 0
        assert 0 < record["mfu_estimated_percent"] <= record["percent_of_roofline"] < 100
        assert record["hbm_read_bytes"] + record["hbm_write_bytes"] >= record["min_hbm_bytes"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["run", "matmull"], "no operator 'matmull'; there are matmul, matmul_nt,"),
        (["list", "norm"], "no operator 'norm'; there are matmul, matmul_nt,"),
        (["run", "matmul", "--shape", "12x"], "shape '12x' is neither a named shape nor MxNxK"),
        (["run", "matmul", "--shape", "1x2x3", "--shape", "0x1x1"], "has a size below 1"),
        (["run", "--dtype", "float64"], "dtype 'float64' is not supported; allowed are bfloat16,"),
        (["run", "--dtype", "int8"], "dtype 'int8' is not supported"),
        (["run", "--target", "trn9"], "--target: target 'trn9': unknown; allowed are trn1,"),
        (["run", "--jobs", "0"], "--jobs is 0; at least 1 is needed"),
        (["run", "--all", "--shape", "1x1x1"], "--all and --shape exclude each other"),
        (
            ["run", "matmul", "--shape", "1000000x1000000x1000000"],
            "GB of memory (about 343,928,261,408 instructions of 3000 bytes); there are",
        ),
        (["run", "rms_norm", "--shape", "1000000000x4096"], "choose smaller sizes"),
    ],
)
def test_a_request_that_cannot_be_met_writes_nothing(arguments, message, tmp_path, capsys):
    path = tmp_path / "out.json"
    path.write_text("old")
    json_option = ["--json", str(path)] if arguments[0] == "run" else []
    assert main([*arguments, *json_option]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("error: ")
    assert message in err
    assert path.read_text() == "old"


@pytest.mark.parametrize(
    "arguments", [[], ["fly"], ["run", "--check", "none"], ["run", "--jsn", "F"], ["list", "-x"]]
)
def test_a_command_line_that_does_not_parse_is_code_2(arguments, capsys):
    with pytest.raises(SystemExit) as stopped:
        main(arguments)
    assert stopped.value.code == 2
    assert "usage: python -m bench" in capsys.readouterr().err


def test_a_path_that_cannot_be_written_stops_before_any_work(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(bench.running, "measure", lambda *_, **__: pytest.fail("worked"))
    assert main(["run", "--json", str(tmp_path / "absent" / "out.json")]) == 2
    assert "does not exist; create it first" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_a_failed_check_is_shown_and_is_code_1(tmp_path, capsys, monkeypatch):
    entry = bench.entries.ENTRIES["matmul"]

    def doubled(*inputs):
        value, magnitude = entry.reference(*inputs)
        return 2 * value, magnitude

    broken = {"matmul": dataclasses.replace(entry, reference=doubled)}
    monkeypatch.setattr(bench.entries, "ENTRIES", broken)
    path = tmp_path / "out.json"
    command = ["run", "--shape", "9x17x10", "--target", "toy", "--json", str(path)]
    assert main(command) == 1
    assert "FAILED 9x17x10 bfloat16: matmul [9x17x10] bfloat16: worst at" in capsys.readouterr().out
    (record,) = json.loads(path.read_text())["results"]
    assert record["correct"] is False
    assert record["modelled_us"] is None


def test_an_interruption_writes_nothing(tmp_path, monkeypatch, capsys):
    def interrupted(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(bench.running, "measure", interrupted)
    assert main(["run", "--json", str(tmp_path / "out.json")]) == 130
    assert capsys.readouterr().err == "interrupted; nothing was written\n"
    assert list(tmp_path.iterdir()) == []


def test_a_full_disk_keeps_the_old_file(tmp_path, monkeypatch, capsys):
    path = tmp_path / "out.json"
    path.write_text("old")

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("bench.record.os.replace", full)
    command = ["run", "matmul", "--shape", "1x1x1", "--target", "toy", "--json", str(path)]
    assert main(command) == 2
    assert "error: [Errno 28] No space left on device" in capsys.readouterr().err
    assert path.read_text() == "old"
    # What was measured is kept for the next try.
    assert sorted(p.name for p in tmp_path.iterdir()) == ["out.json", "out.json.partial"]


def test_without_rich_the_error_names_the_extra(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "rich.console", None)
    assert main(["run", "matmul", "--shape", "1x1x1", "--target", "toy"]) == 2
    assert "install the extra with pip install '.[bench]'" in capsys.readouterr().err


def test_the_module_runs_from_a_clone():
    command = [sys.executable, "-m", "bench", "list", "matmul"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.startswith("matmul: ")
    assert done.stderr == ""


def test_results_come_as_csv_and_markdown_too(tmp_path, capsys):
    csv_path, markdown_path = tmp_path / "out.csv", tmp_path / "out.md"
    command = ["run", "matmul", "--shape", "9x17x10", "--shape", "1x1x1", "--target", "toy"]
    command += ["--target", "trn2", "--csv", str(csv_path), "--markdown", str(markdown_path)]
    assert main(command) == 0
    rows = list(csv.DictReader(csv_path.read_text("utf-8").splitlines()))
    assert [(r["shape"], r["target"]) for r in rows] == [
        (s, t) for s in ("9x17x10", "1x1x1") for t in ("toy", "trn2")
    ]
    assert json.loads(rows[0]["axes"]) == {"M": 9, "N": 17, "K": 10}
    assert float(rows[0]["modelled_us"]) > 0
    assert rows[0]["failure"] == ""
    text = markdown_path.read_text("utf-8")
    assert "**matmul on toy (model, unvalidated, projected hardware)**" in text
    for line in text.splitlines():
        assert not line.startswith("|") or line.count("|") == 9
    assert "| 9x17x10 | bf16 | yes | full |" in text


def test_several_processes_give_the_same_results(tmp_path):
    paths = [tmp_path / f"{jobs}.json" for jobs in (1, 2)]
    for jobs, path in enumerate(paths, 1):
        command = ["run", "rms_norm", "--shape", "9x17", "--shape", "3x5", "--target", "toy"]
        assert main([*command, "--jobs", str(jobs), "--json", str(path)]) == 0
    one, two = (json.loads(path.read_text())["results"] for path in paths)
    for record in (*one, *two):
        # The clone may change while this test runs.
        del record["git_sha"], record["kernel_source_hash"]
    assert one == two
    assert sorted(p.name for p in tmp_path.iterdir()) == ["1.json", "2.json"]


def test_an_interrupted_run_goes_on_where_it_stopped(tmp_path, monkeypatch, capsys):
    measure, seen = bench.running.measure, []

    def once(entry, case, *rest, **options):
        seen.append(case.name)
        if len(seen) == 2:
            raise KeyboardInterrupt
        return measure(entry, case, *rest, **options)

    monkeypatch.setattr(bench.running, "measure", once)
    path = tmp_path / "out.json"
    command = ["run", "matmul", "--shape", "1x1x1", "--shape", "2x2x2", "--target", "toy"]
    command += ["--json", str(path)]
    assert main(command) == 130
    assert "the same command again goes on where this one stopped" in capsys.readouterr().err
    assert [p.name for p in tmp_path.iterdir()] == ["out.json.partial"]
    with (tmp_path / "out.json.partial").open("a") as file:
        file.write('{"torn')
    assert main(command) == 0
    assert seen == ["1x1x1", "2x2x2", "2x2x2"]
    results = json.loads(path.read_text("utf-8"))["results"]
    assert [r["shape"] for r in results] == ["1x1x1", "2x2x2"]
    assert [p.name for p in tmp_path.iterdir()] == ["out.json"]


def test_all_keeps_going_past_a_case_that_is_refused(tmp_path, monkeypatch, capsys):
    from nki_kernels.operators.shapes import Case

    monkeypatch.setattr(bench.running, "all_shapes", lambda entry: ("1x1", "3x5"))
    real = bench.running.measure

    def picky(entry, case: Case, *rest, **options):
        if case.name == "1x1":
            raise BenchError("too small")
        return real(entry, case, *rest, **options)

    monkeypatch.setattr(bench.running, "measure", picky)
    command = ["run", "rms_norm", "--target", "toy", "--jobs", "1"]
    assert main([*command, "--all"]) == 1
    out = capsys.readouterr().out
    assert "FAILED 1x1 bfloat16: refused: too small" in out
    assert "3x5" in out
    assert main([*command, "--shape", "1x1"]) == 2


def test_all_names_every_shape_of_the_registry():
    for entry in bench.entries.ENTRIES.values():
        shapes = bench.running.all_shapes(entry)
        assert {case.name for case in cases(entry.op.name)} <= set(shapes)
        assert set(bench.running.default_shapes(entry)) <= set(shapes)


def test_env_judges_the_target(monkeypatch, capsys):
    monkeypatch.setenv("NEURON_PLATFORM_TARGET_OVERRIDE", "trn9")
    assert main(["env"]) == 2
    message = "error: NEURON_PLATFORM_TARGET_OVERRIDE: target 'trn9': unknown; allowed are trn1,"
    assert message in capsys.readouterr().err
    monkeypatch.setenv("NEURON_PLATFORM_TARGET_OVERRIDE", "trn3")
    assert main(["env", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["target"]["name"] == "trn3"


def test_a_wrong_toolchain_is_one_clear_line():
    command = [sys.executable, "-m", "bench", "env"]
    environment = os.environ | {"NKI_KERNELS_TOOLCHAIN": "Real"}
    done = subprocess.run(
        command, cwd=ROOT, capture_output=True, text=True, env=environment, check=False
    )
    assert done.returncode == 2
    assert done.stderr == (
        "error: toolchain: NKI_KERNELS_TOOLCHAIN is 'Real'; allowed: auto, real, embedded; set one "
        "of these or unset it\n"
    )
