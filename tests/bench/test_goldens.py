"""The modelled times of our kernels are those checked in."""

from __future__ import annotations

import copy
import json

import pytest

from bench import goldens
from bench.__main__ import main
from bench.record import BenchError


@pytest.fixture(scope="module")
def found():
    return dict(goldens.figures())


def test_every_modelled_time_is_as_checked_in(found):
    lines = goldens.differences(found, goldens.read())
    # A change of the model or of a kernel: `python -m bench goldens --write REASON`.
    assert not lines, "\n".join(lines)


def test_a_change_is_told_with_both_figures(found):
    stored = copy.deepcopy(goldens.read())
    name, other = sorted(stored["figures"])[:2]
    stored["figures"][name]["ns"] *= 2
    del stored["figures"][other]
    stored["figures"]["old 1x1 bfloat16 trn2"] = {"ns": 1.0, "instructions": 1}
    stored["model"] = "0"
    lines = goldens.differences(found, stored)
    assert len(lines) == 4
    assert any(line.startswith(name) and "(-50.00 %)" in line for line in lines)
    assert f"{other}: new" in lines
    assert "old 1x1 bfloat16 trn2: gone" in lines
    assert lines[0].startswith("model version: checked in 0, now ")


@pytest.mark.parametrize("content", ["", "[]", '{"figures": {}}', '{"model": 1, "figures": {}}'])
def test_a_foreign_file_is_refused(tmp_path, content):
    path = tmp_path / "goldens.json"
    with pytest.raises(BenchError, match="does not exist; write it with --write"):
        goldens.read(path)
    path.write_text(content, encoding="utf-8")
    with pytest.raises(BenchError, match="no file of modelled times; write it anew"):
        goldens.read(path)


def test_writing_and_reading_agree(tmp_path, found):
    path = tmp_path / "goldens.json"
    goldens.write(found, " a test\n", path)
    assert goldens.differences(found, goldens.read(path)) == []
    assert json.loads(path.read_text(encoding="utf-8")) == {**goldens.read(), "reason": "a test"}
    assert [p.name for p in tmp_path.iterdir()] == ["goldens.json"]


def test_the_command_fails_on_a_difference(found, monkeypatch, capsys):
    first, *_ = sorted(found)
    changed = {**found, first: {"ns": 1.0, "instructions": 1}}
    monkeypatch.setattr("bench.__main__.figures", lambda: iter(changed.items()))
    assert main(["goldens"]) == 1
    assert first in capsys.readouterr().out
    monkeypatch.setattr("bench.__main__.figures", lambda: iter(found.items()))
    assert main(["goldens"]) == 0
    assert "are as checked in" in capsys.readouterr().out


def test_times_change_with_a_reason_only(found, tmp_path, monkeypatch, capsys):
    path = tmp_path / "goldens.json"
    with pytest.raises(BenchError, match="the reason is empty; say in a sentence"):
        goldens.write(found, "  ", path)
    assert not path.exists()
    monkeypatch.setattr("bench.__main__.figures", lambda: iter(found.items()))
    with pytest.raises(SystemExit):
        main(["goldens", "--write"])
    assert "--write: expected one argument" in capsys.readouterr().err
    assert goldens.read()["reason"].strip()
