from __future__ import annotations

import dataclasses
import json
import os
from pathlib import Path

import pytest

from bench.record import BenchError, Result, git_sha, require_writable, write_json

RESULT = Result(
    op="matmul", shape="1x2x3", axes={"M": 1, "N": 2, "K": 3}, dtype="float32", target="toy", lnc=1,
    config={"block": 1}, correct=True, checked_at="full", check_cached=False,
    projected=False, min_hbm_bytes=44, flops=12, peak_tflops=1.5,
    kernel_source_hash="ab", git_sha="cd", modelled_us=1.25,
)  # fmt: skip


def test_a_result_names_its_source_and_that_it_is_unvalidated():
    assert (RESULT.source, RESULT.validated, RESULT.schema_version) == ("model", False, 1)
    required = {
        "op", "shape", "dtype", "target", "correct", "checked_at", "source", "modelled_us",
        "limiting_engine", "mfu_estimated_percent", "percent_of_roofline", "hbm_read_bytes",
        "hbm_write_bytes", "schema_version", "config", "git_sha", "kernel_source_hash", "validated",
    }  # fmt: skip
    assert required <= {field.name for field in dataclasses.fields(Result)}


def test_json_holds_every_field(tmp_path):
    path = tmp_path / "out.json"
    path.write_text("old")
    write_json(path, "model", [RESULT, RESULT])
    document = json.loads(path.read_text("utf-8"))
    assert document["source"] == "model"
    assert document["results"] == [dataclasses.asdict(RESULT)] * 2
    assert [p.name for p in tmp_path.iterdir()] == ["out.json"]
    assert path.stat().st_mode & 0o777 == 0o666 & ~_umask()


def _umask():
    mask = os.umask(0)
    os.umask(mask)
    return mask


def test_through_a_link_the_file_it_names_is_replaced(tmp_path):
    (tmp_path / "there").mkdir()
    link, file = tmp_path / "link.json", tmp_path / "there" / "out.json"
    file.write_text("old")
    link.symlink_to(file)
    write_json(link, "model", [RESULT])
    assert link.is_symlink()
    assert json.loads(file.read_text("utf-8"))["results"] == [dataclasses.asdict(RESULT)]


@pytest.mark.parametrize("interruption", [OSError, KeyboardInterrupt])
def test_a_failed_write_leaves_the_old_file_and_nothing_else(tmp_path, monkeypatch, interruption):
    path = tmp_path / "out.json"
    path.write_text("old")

    def refuse(*_):
        raise interruption

    monkeypatch.setattr(os, "replace", refuse)
    with pytest.raises(interruption):
        write_json(path, "model", [RESULT])
    assert path.read_text() == "old"
    assert [p.name for p in tmp_path.iterdir()] == ["out.json"]


def test_a_value_that_json_cannot_hold_writes_nothing(tmp_path):
    path = tmp_path / "out.json"
    with pytest.raises(ValueError, match="JSON compliant"):
        write_json(path, "model", [dataclasses.replace(RESULT, modelled_us=float("nan"))])
    assert list(tmp_path.iterdir()) == []


def test_a_path_that_cannot_be_written_is_refused_before_the_work(tmp_path, monkeypatch):
    require_writable(tmp_path / "new.json")
    with pytest.raises(BenchError, match=r"--json .*: is a folder; name a file in it"):
        require_writable(tmp_path)
    with pytest.raises(BenchError, match=r"is no regular file; name a file"):
        require_writable(Path(os.devnull))
    with pytest.raises(BenchError, match=r"absent does not exist; create it first"):
        require_writable(tmp_path / "absent" / "new.json")
    monkeypatch.setattr(os, "access", lambda *_: False)
    with pytest.raises(BenchError, match=r"is not writable; name a file elsewhere"):
        require_writable(tmp_path / "new.json")


def test_git_sha_is_a_commit_or_unknown():
    sha = git_sha().removesuffix("-dirty")
    assert sha == "unknown" or (len(sha) == 40 and int(sha, 16) >= 0)
