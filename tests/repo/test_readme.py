"""The README is true: its commands are one line each, its kernel runs as pasted."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest

from tests.child import REPO, run_python
from tests.repo.source import REPO as ROOT

README = (ROOT / "README.md").read_text(encoding="utf-8")


def block(marker: str) -> str:
    """The fenced block below the comment ``<!-- marker -->``; there must be exactly one."""
    pattern = rf"<!-- {re.escape(marker)} -->\n```\w+\n(.*?)```\n"
    (text,) = re.findall(pattern, README, flags=re.DOTALL)
    return str(text)


@pytest.mark.parametrize("marker", ["command: main job", "command: tests"])
def test_each_command_is_one_line_that_does_its_own_set_up(marker: str) -> None:
    (line,) = block(marker).splitlines()
    words = shlex.split(line)
    assert words[:4] == ["python3", "-m", "venv", ".venv"]
    assert words[4:6] == ["&&", ".venv/bin/pip"]
    extra = next(word for word in words if word.startswith(".["))
    extras = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    assert re.search(rf"^{extra[2:-1]} = \[", extras, flags=re.MULTILINE)


def test_ci_runs_the_test_command_of_the_readme() -> None:
    script = (ROOT / ".ci" / "run").read_text(encoding="utf-8")
    assert "<!-- command: tests -->" in script
    assert "pytest -q -n 2" not in script.replace(block("command: tests"), "").splitlines()


def test_the_first_kernel_runs_as_pasted(tmp_path: Path) -> None:
    (tmp_path / "first.py").write_text(block("python: first kernel"), encoding="utf-8")
    done = run_python(["first.py"], cwd=tmp_path, path=[REPO])
    assert (done.returncode, done.stdout) == (0, "True\n"), done.stderr


def test_the_first_profile_runs_as_pasted(tmp_path: Path) -> None:
    both = block("python: first kernel") + block("python: first profile")
    (tmp_path / "first.py").write_text(both, encoding="utf-8")
    done = run_python(["first.py"], cwd=tmp_path, path=[REPO])
    assert done.returncode == 0, done.stderr
    first, label, *figures = done.stdout.splitlines()
    assert (first, label) == ("True", "add on trn2 (model, unvalidated)")
    assert "  limiting_engine" + "dma".rjust(45) in figures


def test_the_profile_command_runs_as_pasted(tmp_path: Path) -> None:
    (tmp_path / "first.py").write_text(block("python: first kernel"), encoding="utf-8")
    python, *words = shlex.split(block("command: profile"))
    done = run_python(words, cwd=tmp_path, path=[REPO])
    assert (python, done.returncode) == ("python", 0), done.stderr
    assert "wrote first.html" in done.stderr
    assert (tmp_path / "first.html").stat().st_size > 0


def test_links_lead_somewhere() -> None:
    targets = re.findall(r"\]\((?!https?:)([^)#]+)", README)
    assert targets
    assert [target for target in targets if not (ROOT / target).exists()] == []
