from __future__ import annotations

import dataclasses
import json
import subprocess
import sys

import pytest

import bench.__main__
from bench.__main__ import main
from bench.record import ROOT
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
        assert f"{op.name}: {op.summary}\n" in out
        for case in cases(op.name):
            assert case.name in out


@pytest.mark.parametrize("op", OPERATORS)
def test_every_operator_runs_in_every_dtype(op, tmp_path, capsys):
    sizes = "x".join(["9"] * len(OPERATORS[op].axis_order))
    path = tmp_path / "out.json"
    command = ["run", op, "--shape", sizes, "--target", "toy", "--json", str(path)]
    for dtype in OPERATORS[op].dtypes:
        command += ["--dtype", dtype]
    assert main(command) == 0
    results = json.loads(path.read_text("utf-8"))["results"]
    assert [result["dtype"] for result in results] == list(OPERATORS[op].dtypes)
    assert all(result["correct"] and result["flops"] > 0 for result in results)
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
        (["run", "--target", "trn9"], "trn9"),
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
    monkeypatch.setattr(bench.__main__, "measure", lambda *_, **__: pytest.fail("worked"))
    assert main(["run", "--json", str(tmp_path / "absent" / "out.json")]) == 2
    assert "does not exist; create it first" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_a_failed_check_is_shown_and_is_code_1(tmp_path, capsys, monkeypatch):
    entry = bench.__main__.ENTRIES["matmul"]

    def doubled(*inputs):
        value, magnitude = entry.reference(*inputs)
        return 2 * value, magnitude

    broken = {"matmul": dataclasses.replace(entry, reference=doubled)}
    monkeypatch.setattr(bench.__main__, "ENTRIES", broken)
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

    monkeypatch.setattr(bench.__main__, "measure", interrupted)
    assert main(["run", "--json", str(tmp_path / "out.json")]) == 130
    assert capsys.readouterr().err == "interrupted; nothing was written\n"
    assert list(tmp_path.iterdir()) == []


def test_a_full_disk_keeps_the_old_file(tmp_path, monkeypatch, capsys):
    path = tmp_path / "out.json"
    path.write_text("old")

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.replace", full)
    command = ["run", "matmul", "--shape", "1x1x1", "--target", "toy", "--json", str(path)]
    assert main(command) == 2
    assert "error: [Errno 28] No space left on device" in capsys.readouterr().err
    assert path.read_text() == "old"
    assert [p.name for p in tmp_path.iterdir()] == ["out.json"]


def test_without_rich_the_error_names_the_extra(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "rich.console", None)
    assert main(["run", "matmul", "--shape", "1x1x1", "--target", "toy"]) == 2
    assert "install the extra with pip install '.[bench]'" in capsys.readouterr().err


def test_the_module_runs_from_a_clone():
    command = [sys.executable, "-m", "bench", "list", "matmul"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.startswith("matmul: ")
    assert done.stderr == ""
