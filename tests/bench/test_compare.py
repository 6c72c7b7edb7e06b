from __future__ import annotations

import dataclasses
import json

import pytest

from bench.__main__ import main
from bench.compare import compare
from bench.record import SCHEMA_VERSION, BenchError, Result, read_results, write_json

BASE = Result(
    op="matmul", shape="2x2x2", axes={"M": 2, "N": 2, "K": 2}, dtype="bfloat16", target="trn2",
    lnc=1, config={"wave": 1}, correct=True, checked_at="full", check_cached=False, projected=False,
    modelled_us=100.0, limiting_engine="dma", mfu_estimated_percent=1.0, percent_of_roofline=2.0,
    hbm_read_bytes=16, hbm_write_bytes=8, min_hbm_bytes=24, flops=16, peak_tflops=78.6,
    instructions=7, estimated_constants=3, kernel_source_hash="a", git_sha="b",
)  # fmt: skip


def results(*times):
    return [
        dataclasses.replace(BASE, shape=f"{i}x1x1", modelled_us=time)
        for i, time in enumerate(times, 1)
    ]


def files(tmp_path, old, new):
    paths = [tmp_path / "old.json", tmp_path / "new.json"]
    for path, records in zip(paths, (old, new), strict=True):
        write_json(path, "model", records)
    return [str(path) for path in paths]


def test_identical_runs_have_no_change(tmp_path, capsys):
    same = results(100.0, 7.0)
    assert main(["compare", *files(tmp_path, same, same)]) == 0
    assert capsys.readouterr().out == "no change in 2 cases (modelled times, exact)\n"


def test_a_planted_regression_of_3_percent_is_found(tmp_path, capsys):
    paths = files(tmp_path, results(50.0, 100.0, 7.0), results(50.0, 103.0, 7.0))
    assert main(["compare", *paths]) == 1
    out = capsys.readouterr().out
    assert "matmul 2x1x1 bfloat16 trn2 100.00 103.00 +3.00 SLOWER" in " ".join(out.split())
    assert "1 of 3 cases changed, 1 for the worse" in out
    assert "50.00" not in out
    assert main(["compare", *paths, "--threshold", "3.5"]) == 0
    assert "slower" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("after", "percent", "bad"),
    [(101.0, 1.0, False), (101.01, 1.01, True), (99.0, -1.0, False), (100.0 + 1e-9, 0.0, False)],
)
def test_any_difference_is_a_change_and_only_a_slower_one_is_bad(after, percent, bad):
    (change,) = compare(results(100.0), results(after))
    assert change.bad is bad
    assert round(change.percent, 2) == percent
    assert change.what == ("slower" if after > 100 else "faster")


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"config": {"wave": 2}}, "config: wave 1 -> 2"),
        ({"kernel_source_hash": "c"}, "the kernel's source differs"),
        ({"limiting_engine": "tensor"}, "limited by tensor, was dma"),
        ({"hbm_read_bytes": 1016}, "1,024 bytes of HBM traffic, were 24"),
        ({"instructions": 8}, "8 instructions, were 7"),
        ({}, "same kernel, config and traffic: the timing model differs"),
    ],
)
def test_a_change_comes_with_what_else_differs(changes, reason):
    new = dataclasses.replace(results(90.0)[0], **changes)
    (change,) = compare(results(100.0), [new])
    assert change.why == reason


def test_new_gone_failing_and_passing_cases_are_told(tmp_path, capsys):
    fails = dataclasses.replace(
        BASE, shape="4x1x1", correct=False, modelled_us=None, failure="worst at 3"
    )
    passes = dataclasses.replace(fails, shape="5x1x1")
    old = [*results(1.0, 2.0), *results(1.0, 1.0, 1.0, 4.0)[3:], passes]
    new = [results(1.0)[0], results(1.0, 1.0, 3.0)[2], fails, *results(1, 1, 1, 1, 5.0)[4:]]
    changes = {c.case.split()[1]: (c.what, c.bad) for c in compare(old, new)}
    assert changes == {
        "2x1x1": ("gone", True),
        "3x1x1": ("new", False),
        "4x1x1": ("fails", True),
        "5x1x1": ("passes", False),
    }
    assert main(["compare", *files(tmp_path, old, new)]) == 1
    assert "matmul 4x1x1 bfloat16 trn2: its check fails: worst at 3" in capsys.readouterr().out


def test_runs_without_a_common_case_and_a_negative_threshold_are_refused():
    with pytest.raises(BenchError, match=r"no case in common \(1 and 0 cases\)"):
        compare(results(1.0), [])
    with pytest.raises(BenchError, match="--threshold is -1; allowed are 0 and more"):
        compare(results(1.0), results(1.0), -1)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "is no JSON"),
        ("\x00\x01", "is no JSON"),
        ("[]", "is JSON of something else"),
        ('{"source": "model", "results": []}', "is JSON of something else"),
        (
            {"schema_version": 99, "source": "model", "results": []},
            "has schema version 99; this is version 1; make the file anew",
        ),
        (
            {"schema_version": SCHEMA_VERSION, "source": "host", "results": []},
            "holds 'host' figures",
        ),
        (
            {"schema_version": SCHEMA_VERSION, "source": "model", "results": [{"ns": 1}]},
            "holds records that are no timed cases",
        ),
    ],
)
def test_an_unreadable_or_foreign_file_gets_a_clear_error(tmp_path, capsys, content, message):
    good, bad = tmp_path / "good.json", tmp_path / "bad.json"
    write_json(good, "model", results(1.0))
    bad.write_text(content if isinstance(content, str) else json.dumps(content))
    assert main(["compare", str(good), str(bad)]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith(f"error: {bad}: ")
    assert message in err


def test_a_missing_file_and_bytes_that_are_no_text_get_one_too(tmp_path):
    with pytest.raises(BenchError, match=r"cannot be read \(No such file or directory\)"):
        read_results(tmp_path / "absent.json")
    path = tmp_path / "bytes.json"
    path.write_bytes(b"\xff\xfe")
    with pytest.raises(BenchError, match="is no JSON"):
        read_results(path)


def test_what_was_written_is_what_is_read(tmp_path):
    path = tmp_path / "out.json"
    write_json(path, "model", results(1.0, 2.5))
    assert read_results(path) == results(1.0, 2.5)
