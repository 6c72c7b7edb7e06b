"""``python -m nki_kernels``: running a script as python would, and the facts of ``env``."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

import nki_kernels
from nki_kernels import __main__ as main_module
from nki_kernels import toolchain
from tests.child import REPO, run_python

EMBEDDED = {toolchain.ENV: "embedded"}


def run(tmp_path: Path, *args: str, cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
    return run_python(["-m", "nki_kernels", *args], cwd=cwd or tmp_path, env=EMBEDDED)


def script(tmp_path: Path, text: str, name: str = "script.py") -> Path:
    path = tmp_path / name
    path.parent.mkdir(exist_ok=True)
    path.write_text(text)
    return path


def test_run_gives_the_script_nki_its_arguments_and_its_neighbours(tmp_path: Path) -> None:
    script(tmp_path, "WORD = 'neighbour'", "sub/neighbour.py")
    script(tmp_path, "raise RuntimeError('not this one')", "sub/nki.py")
    path = script(
        tmp_path,
        "import sys, json, nki, nki.language, nki.isa, neighbour\n"
        "print(json.dumps([sys.argv, __name__, __file__, nki.__file__, neighbour.WORD,\n"
        "    sys.path[0], '' in sys.path]))\n",
        "sub/script.py",
    )
    done = run(tmp_path, "run", "sub/script.py", "--help", "-x", "run", "a b")
    assert done.returncode == 0, done.stderr
    argv, name, file, nki_file, word, first, has_cwd = json.loads(done.stdout)
    assert argv == ["sub/script.py", "--help", "-x", "run", "a b"]
    assert (name, file, word) == ("__main__", "sub/script.py", "neighbour")
    assert nki_file == str(toolchain.embedded_path() / "nki" / "__init__.py")
    assert (first, has_cwd) == (str(path.parent), False)


@pytest.mark.parametrize(
    ("text", "code", "error"),
    [
        ("pass", 0, ""),
        ("import sys; sys.exit(7)", 7, ""),
        ("import sys; sys.exit()", 0, ""),
        ("import sys; sys.exit('no luck')", 1, "no luck\n"),
        ("raise SystemExit(3)", 3, ""),
    ],
)
def test_run_ends_with_the_exit_code_of_the_script(
    tmp_path: Path, text: str, code: int, error: str
) -> None:
    done = run(tmp_path, "run", str(script(tmp_path, text)))
    assert (done.returncode, done.stdout, done.stderr) == (code, "", error)


@pytest.mark.parametrize(
    "text",
    [
        "def f(n):\n    return 1 / n\n\nf(0)\n",
        "try:\n    int('x')\nexcept ValueError as err:\n    raise KeyError('y') from err\n",
        "def f(:\n    pass\n",
        "import json\njson.loads('{')\n",
    ],
)
def test_run_shows_the_traceback_that_python_shows(tmp_path: Path, text: str) -> None:
    path = str(script(tmp_path, text))
    ours = run(tmp_path, "run", path)
    pythons = run_python([path], cwd=tmp_path)
    assert ours.returncode == pythons.returncode == 1
    assert ours.stderr == pythons.stderr


def test_run_keeps_a_hook_that_the_script_installs(tmp_path: Path) -> None:
    text = "import sys\nsys.excepthook = lambda *a: print('mine', a[1])\nraise KeyError('k')\n"
    done = run(tmp_path, "run", str(script(tmp_path, text)))
    assert (done.returncode, done.stdout, done.stderr) == (1, "mine 'k'\n", "")


def test_a_missing_script_is_a_usage_error(tmp_path: Path) -> None:
    done = run(tmp_path, "run", "nowhere.py")
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == (
        f"nki_kernels run: 'nowhere.py' is not a file (looked in {tmp_path}); "
        "allowed: the path of a Python script; check the path\n"
    )


@pytest.mark.parametrize(
    ("args", "says"),
    [
        ([], "the following arguments are required: COMMAND"),
        (["fly"], "invalid choice: 'fly'"),
        (["run"], "the following arguments are required: script"),
        (["env", "--yaml"], "unrecognized arguments: --yaml"),
    ],
)
def test_a_wrong_command_line_is_a_usage_error(
    args: list[str], says: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as exit_info:
        main_module.main(args)
    assert exit_info.value.code == 2
    error = capsys.readouterr().err
    assert error.startswith("usage: python -m nki_kernels")
    assert says in error


def test_help_names_every_command(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exit_info:
        main_module.main(["--help"])
    assert exit_info.value.code == 0
    out = capsys.readouterr().out
    assert all(f"\n    {name} " in out for name in ("run", "env"))


def test_env_json_states_versions_toolchain_and_target(tmp_path: Path) -> None:
    done = run(tmp_path, "env", "--json")
    assert done.returncode == 0, done.stderr
    facts = json.loads(done.stdout)
    assert facts["nki_kernels"] == nki_kernels.__version__
    assert facts["python"] == ".".join(str(part) for part in sys.version_info[:3])
    assert set(facts["packages"]) == {"numpy", "ml_dtypes", "torch"}
    assert facts["packages"]["numpy"] is not None
    assert facts["toolchain"] == {
        "kind": "embedded",
        "version": nki_kernels.__version__,
        "path": str(REPO / "nki_kernels" / "embedded" / "nki"),
        "reason": "NKI_KERNELS_TOOLCHAIN=embedded",
    }
    assert facts["target"] == {
        "name": "trn2",
        "set_by": "default; NEURON_PLATFORM_TARGET_OVERRIDE is not set",
        "problem": None,
    }


def test_env_in_words_says_the_same(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("NEURON_PLATFORM_TARGET_OVERRIDE", "gen4")
    monkeypatch.setattr(main_module, "_version", {"numpy": "2.9.9"}.get)
    assert main_module.main(["env"]) == 0
    lines = dict(line.split(maxsplit=1) for line in capsys.readouterr().out.splitlines())
    tool = toolchain.current()
    assert lines["numpy"] == "2.9.9"
    assert lines["torch"] == "not installed"
    assert lines["target"] == "gen4 (NEURON_PLATFORM_TARGET_OVERRIDE)"
    assert lines["nki"] == f"{tool.kind} {tool.version}: {tool.reason}"
    assert lines["nki_path"] == str(tool.path)
