"""``python -m nki_kernels profile``: arguments, files, and everything that can go wrong."""

from __future__ import annotations

import json
import os
import stat
import subprocess
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest

import nki_kernels
from nki_kernels import __main__ as main_module
from nki_kernels import toolchain
from nki_kernels.machine.errors import OptionError, ToolchainError
from nki_kernels.profiler import output
from nki_kernels.profiler.command import arguments
from tests.child import REPO, run_python
from tests.profiler.kernels import many

KERNELS = str(REPO / "tests" / "profiler" / "kernels.py")
GOOD = ["--arg", "x=bf16[128,128]", "--arg", "rounds=3", "--target", "trn2"]


def run(*words: str, kernel: str = "many") -> int:
    return main_module.main(["profile", f"{KERNELS}:{kernel}", *words])


# -- what works ------------------------------------------------------------------------------------


def test_a_report_of_a_kernel_in_any_file(capsys):
    assert run(*GOOD) == 0
    out = capsys.readouterr().out
    assert out.splitlines()[0] == "many on trn2 (model, unvalidated)"
    direct = nki_kernels.profile(
        many, nki_kernels.Abstract((128, 128), "bfloat16"), 3, target="trn2"
    )
    assert out.splitlines()[:8] == str(direct).splitlines()[:8]


def test_every_kind_of_file_is_written_and_said(tmp_path, capsys):
    names = ["a.html", "a.json", "a.perfetto.json"]
    outputs = [word for name in names for word in ("-o", str(tmp_path / name))]
    assert run(*GOOD, *outputs) == 0
    said = capsys.readouterr().err
    for name in names:
        path = tmp_path / name
        assert f"wrote {path} ({path.stat().st_size:,} bytes)" in said
    assert (tmp_path / "a.html").read_text().startswith("<!doctype html>")
    assert json.loads((tmp_path / "a.json").read_text())["schema_version"] == 1
    assert "traceEvents" in json.loads((tmp_path / "a.perfetto.json").read_text())
    assert sorted(p.name for p in tmp_path.iterdir()) == sorted(names)
    umask = os.umask(0)
    os.umask(umask)
    assert stat.S_IMODE((tmp_path / "a.json").stat().st_mode) == 0o666 & ~umask


def test_json_on_the_terminal_is_json(capsys):
    assert run(*GOOD, "--json") == 0
    assert json.loads(capsys.readouterr().out)["kernel"] == "many"


def test_against_prints_what_changed(tmp_path, capsys):
    old = tmp_path / "old.json"
    assert run(*GOOD, "-o", str(old)) == 0
    assert run("--arg=x=bf16[128,128]", "--arg=rounds=6", "--target=trn2", f"--against={old}") == 0
    out = capsys.readouterr().out
    assert f"Against {old}" in out
    assert "times as fast" in out.partition("Against")[2]


@pytest.mark.parametrize(
    ("word", "value"),
    [
        ("eps=1e-6", 1e-6),
        ("n=5", 5),
        ("axes=(1, 0)", (1, 0)),
        ("mode=fast", "fast"),
        ("mode='two words'", "two words"),
        ("flag=true", True),
        ("flag=False", False),
        ("bias=none", None),
        ("bias=None", None),
        ("name=a=b", OptionError),
    ],
)
def test_constants(word, value):
    if value is OptionError:
        with pytest.raises(OptionError, match="is no argument"):
            arguments([word])
        return
    args, kwargs = arguments([word])
    assert args == ()
    assert list(kwargs.values()) == [value]
    assert type(next(iter(kwargs.values()))) is type(value)


@pytest.mark.parametrize(
    ("text", "shape", "dtype"),
    [
        ("bf16[1,8,4096,128]", (1, 8, 4096, 128), "bfloat16"),
        ("float32[7]", (7,), "float32"),
        ("i32[2, 3]", (2, 3), "int32"),
        ("e5m2[4]", (4,), "float8_e5m2"),
    ],
)
def test_shapes_without_values(text, shape, dtype):
    for words in ([f"x={text}"], [text]):
        args, kwargs = arguments(words)
        (value,) = (*args, *kwargs.values())
        assert isinstance(value, nki_kernels.Abstract)
        assert (value.shape, str(value.dtype)) == (shape, dtype)


@pytest.mark.parametrize("fill", ["zeros", "ones", "arange", "random"])
def test_shapes_with_values(fill):
    (value,), _ = arguments([f"bf16[2,3]:{fill}"])
    assert (value.shape, value.dtype) == ((2, 3), ml_dtypes.bfloat16)
    wide = value.astype(np.float32)
    expected = {
        "zeros": np.zeros((2, 3)),
        "ones": np.ones((2, 3)),
        "arange": [[0, 1, 2], [3, 4, 5]],
    }
    if fill == "random":
        assert len(np.unique(wide)) == 6
    else:
        assert np.array_equal(wide, expected[fill])


def test_values_from_a_file(tmp_path):
    array = np.arange(6, dtype=np.float32).reshape(2, 3)
    np.save(tmp_path / "x.npy", array)
    _, kwargs = arguments([f"x=@{tmp_path / 'x.npy'}"])
    assert np.array_equal(kwargs["x"], array)


# -- what does not ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("word", "says"),
    [
        ("x=[", "'[' is no argument; allowed: dtype[d0,d1,...]"),
        ("x=", "'' is no argument"),
        ("x=bf17[3]", "dtype 'bf17': not a NeuronCore data type"),
        ("x=bf16[3,]", "shape [3,]; it is one or more integers of at least 1"),
        ("x=bf16[]", "shape []; it is"),
        ("x=bf16[0]", "shape [0]; it is"),
        ("x=bf16[2]:twos", "values 'twos'; allowed: zeros, ones, arange, random"),
        ("x=@nowhere.npy", "'nowhere.npy' cannot be read"),
    ],
)
def test_an_argument_that_does_not_parse(word, says, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert run("--arg", word, "-o", "p.html") == 2
    error = capsys.readouterr().err
    assert error.startswith(f"nki_kernels profile: --arg {word!r}: ")
    assert says in error
    assert list(tmp_path.iterdir()) == []


def test_an_archive_is_no_array(tmp_path):
    np.savez(tmp_path / "x.npz", a=np.zeros(2))
    with pytest.raises(OptionError, match="holds several arrays"):
        arguments([f"x=@{tmp_path / 'x.npz'}"])


def test_a_name_given_twice():
    with pytest.raises(OptionError, match="'n' is given twice; give it once"):
        arguments(["n=1", "n=2"])


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["--arg", "x=bf16[128,128]"], "missing a required argument: 'rounds'"),
        ([*GOOD, "--arg", "z=1"], "unexpected keyword argument 'z'"),
        ([*GOOD, "--target", "trn9"], "--target: target 'trn9': unknown; allowed are trn1"),
    ],
)
def test_a_call_that_does_not_fit(words, says, capsys):
    assert run(*words) == 2
    assert says in capsys.readouterr().err


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("nowhere.py:k", "'nowhere.py' is not a file (looked in "),
        ("nowhere.py", "allowed is FILE.py:KERNEL: name the kernel too"),
        (f"{KERNELS}:nothing", "has no kernel 'nothing'; it has many, awkward, "),
        (f"{REPO / 'README.md'}:k", "is no Python file"),
    ],
)
def test_a_kernel_that_is_not_there(name, says, capsys):
    assert main_module.main(["profile", name]) == 2
    assert says in capsys.readouterr().err


def test_a_kernel_that_breaks_a_rule_says_which_and_writes_nothing(tmp_path, capsys):
    path = tmp_path / "p.html"
    assert run("--arg=x=fp32[8,8]", "--target=trn2", "-o", str(path), kernel="broken") == 1
    error = capsys.readouterr().err
    assert error.startswith(f"nki_kernels profile: {KERNELS}:broken raised UninitializedRead: ")
    assert "kernels.py:" in error
    assert list(tmp_path.iterdir()) == []


def test_a_kernel_that_raises_shows_its_own_traceback(tmp_path):
    words = ["-m", "nki_kernels", "profile", f"{KERNELS}:raising", "--arg=x=fp32[8,8]"]
    done = run_python([*words, "-o", "p.html", "--target=trn2"], cwd=tmp_path)
    assert done.returncode == 1
    first, second, *_ = done.stderr.splitlines()
    assert first == "Traceback (most recent call last):"
    assert second.startswith(f'  File "{KERNELS}", line ')
    assert done.stderr.splitlines()[-1] == "IndexError: tuple index out of range"
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("p.txt", "its name ends in one of .perfetto.json (perfetto), .json (json), .html (html)"),
        ("taken.html", "exists; name another file, or pass --force"),
        ("folder.html", "is a directory; name a file in it"),
        ("nowhere/p.html", "no directory"),
    ],
)
def test_an_output_that_cannot_be_is_known_before_the_kernel_runs(tmp_path, capsys, name, says):
    (tmp_path / "taken.html").write_text("mine")
    (tmp_path / "folder.html").mkdir()
    before = sorted(tmp_path.rglob("*"))
    assert run("--arg=x=fp32[8,8]", "-o", str(tmp_path / name), kernel="raising") == 2
    error = capsys.readouterr().err
    assert f"output {str(tmp_path / name)!r}" in error
    assert says in error
    assert sorted(tmp_path.rglob("*")) == before
    assert (tmp_path / "taken.html").read_text() == "mine"


def test_an_unknown_target_of_the_environment(capsys, monkeypatch):
    monkeypatch.setenv("NEURON_PLATFORM_TARGET_OVERRIDE", "trn9")
    assert run("--arg=x=bf16[128,128]", "--arg=rounds=3") == 2
    says = "nki_kernels profile: NEURON_PLATFORM_TARGET_OVERRIDE: target 'trn9': unknown; allowed"
    assert capsys.readouterr().err.startswith(says)
    assert run(*GOOD) == 0


def test_a_directory_without_permission(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(output.os, "access", lambda *_: False)  # root may write anywhere
    assert run(*GOOD, "-o", str(tmp_path / "p.html")) == 2
    assert "no permission to write to" in capsys.readouterr().err


def test_force_replaces(tmp_path):
    path = tmp_path / "p.json"
    path.write_text("old")
    assert run(*GOOD, "-o", str(path), "--force") == 0
    assert json.loads(path.read_text())["kernel"] == "many"


def test_a_full_disk_leaves_nothing_behind_and_says_so(tmp_path, capsys, monkeypatch):
    (tmp_path / "b.json").write_text("old")

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(output.os, "chmod", full)
    words = ["-o", str(tmp_path / "a.json"), "-o", str(tmp_path / "b.json"), "--force"]
    assert run(*GOOD, *words) == 2
    assert "cannot be written: No space left on device; choose another" in capsys.readouterr().err
    assert [p.name for p in tmp_path.iterdir()] == ["b.json"]
    assert (tmp_path / "b.json").read_text() == "old"


def test_a_file_that_appears_meanwhile_is_not_replaced(tmp_path):
    path = tmp_path / "p.json"

    def render(_: str) -> str:
        path.write_text("somebody else's")
        return "ours"

    with pytest.raises(OptionError, match="cannot be written: File exists"):
        output.save(path, render)
    assert path.read_text() == "somebody else's"
    assert [p.name for p in tmp_path.iterdir()] == ["p.json"]


def test_an_old_record_that_is_none(tmp_path, capsys):
    (tmp_path / "old.json").write_text("{}")
    target = tmp_path / "new.html"
    assert run(*GOOD, "--against", str(tmp_path / "old.json"), "-o", str(target)) == 2
    assert "has schema_version None; allowed is 1: profile the kernel again" in (
        capsys.readouterr().err
    )
    assert not target.exists()


# -- AWS's nki in force ----------------------------------------------------------------------------


@pytest.fixture
def real(monkeypatch):
    tool = toolchain.Toolchain("real", "0.6.0", Path("somewhere"), "it is installed")
    monkeypatch.setattr(toolchain, "_current", tool)


def test_with_awss_nki_the_command_starts_a_process_of_its_own(real, monkeypatch, tmp_path):
    seen = {}

    def fake(command, *, env, check):
        seen.update(command=command, env=env)
        return subprocess.CompletedProcess(command, 7)

    monkeypatch.setattr("nki_kernels.profiler.command.subprocess.run", fake)
    assert run(*GOOD, "--force", "--band", "-o", "p.html") == 7
    assert seen["env"][toolchain.ENV] == "embedded"
    again = main_module.parser().parse_args(seen["command"][3:])
    first = main_module.parser().parse_args(
        ["profile", f"{KERNELS}:many", *GOOD, "--force", "--band", "-o", "p.html"]
    )
    assert vars(again) == vars(first)


def test_with_awss_nki_the_function_says_what_to_do(real):
    with pytest.raises(ToolchainError, match=r"AWS's 0\.6\.0 .* `python -m nki_kernels profile"):
        nki_kernels.profile(lambda: None)
