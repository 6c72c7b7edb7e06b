"""``python -m nki_kernels lint``: our kernels are clean; text, JSON, exit codes."""

from __future__ import annotations

import json

import pytest

import nki_kernels
from nki_kernels import toolchain
from nki_kernels.__main__ import main
from nki_kernels.lint import lint_paths
from tests.child import REPO, run_python

BAD = "import nki\n@nki.jit\ndef f(x):\n    y = x is None\n    nki.isa.nothing()\n"


def test_our_kernels_have_no_errors():
    room = REPO / "nki_kernels" / "kernels"
    assert len(list(room.rglob("*.py"))) > 3
    found = [f for f in lint_paths([room]) if f.severity == "error"]
    assert found == [], "\n".join(map(str, found))


def test_text_and_exit_code(tmp_path, capsys):
    file = tmp_path / "k.py"
    file.write_text(BAD)
    assert main(["lint", str(tmp_path)]) == 1
    first, second, last = capsys.readouterr().out.splitlines()
    assert first.startswith(f"{file}:4:9: info [is-operator] ")
    assert second.startswith(f"{file}:5:5: error [unknown-name] nki.isa has no 'nothing'")
    assert last == "1 error, 1 info"
    assert main(["lint", "--quiet", str(file)]) == 1
    assert len(capsys.readouterr().out.splitlines()) == 2
    file.write_text(BAD.replace("    nki.isa.nothing()\n", ""))
    assert main(["lint", str(file)]) == 0
    assert capsys.readouterr().out.endswith("\n0 errors, 1 info\n")


def test_json(tmp_path, capsys):
    file = tmp_path / "k.py"
    file.write_text(BAD)
    assert main(["lint", "--json", str(file)]) == 1
    given = json.loads(capsys.readouterr().out)
    assert given["schema_version"] == 1
    assert [f["rule"] for f in given["findings"]] == ["is-operator", "unknown-name"]
    assert given["findings"][1] == {
        "path": str(file), "line": 5, "column": 5, "rule": "unknown-name", "severity": "error",
        "message": "nki.isa has no 'nothing' in NKI 0.6; see nki_kernels/embedded/README.md",
    }  # fmt: skip


@pytest.mark.parametrize("name", ["missing.py", "binary.py"])
def test_a_path_that_cannot_be_read(tmp_path, capsys, name):
    (tmp_path / "binary.py").write_bytes(b"\xff\xfe\x00")
    assert main(["lint", str(tmp_path / name)]) == 2
    error = capsys.readouterr().err
    assert error.startswith("nki_kernels lint: ")
    assert "allowed: Python files and directories" in error


def test_with_a_real_nki_in_force_a_child_reads_the_embedded_one(tmp_path, monkeypatch, capfd):
    file = tmp_path / "k.py"
    file.write_text(BAD)
    real = toolchain.Toolchain("real", "0.6.0", tmp_path, "installed")
    monkeypatch.setattr(toolchain, "current", lambda: real)
    monkeypatch.setenv("PYTHONPATH", str(REPO))
    assert main(["lint", "--quiet", str(file)]) == 1
    assert capfd.readouterr().out.endswith("\n1 error, 1 info\n")
    assert main(["lint", "--json", str(file)]) == 1
    assert json.loads(capfd.readouterr().out)["schema_version"] == 1


def test_as_a_program(tmp_path):
    (tmp_path / "k.py").write_text(BAD)
    done = run_python(["-m", "nki_kernels", "lint", "k.py"], cwd=tmp_path, path=(REPO,))
    assert (done.returncode, done.stdout.splitlines()[-1]) == (1, "1 error, 1 info")
    assert nki_kernels.__version__
