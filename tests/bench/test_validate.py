from __future__ import annotations

import json

import pytest

import bench.validate
from bench.__main__ import main
from bench.table import WIDTH
from bench.validate import PARTS, Reading, broken, ladders, report
from bench.validate.law_probes import law_readings
from bench.validate.published import transfer_readings
from bench.validate.reading import error_percent, spearman
from nki_kernels.hardware import TRN2


def reading(**changes):
    facts = {
        "part": "kernels",
        "id": "X1",
        "what": "something",
        "unit": "us",
        "measured": 100.0,
        "source": "a paper",
        "modelled": 104.0,
    }
    return Reading(**(facts | changes))


def test_error_is_signed_and_relative_to_hardware():
    assert error_percent(104.0, 100.0) == 4.0
    assert reading().error_percent == 4.0
    assert reading(modelled=75.0).error_percent == -25.0


@pytest.mark.parametrize(
    ("modelled", "limit", "missed"),
    [(104.0, 4.0, False), (104.5, 4.0, True), (95.5, 4.0, True), (500.0, None, False)],
)
def test_a_miss_is_an_error_beyond_the_limit(modelled, limit, missed):
    assert reading(modelled=modelled, limit_percent=limit).missed is missed


@pytest.mark.parametrize(
    ("a", "b", "expected"),
    [
        ([1.0, 2.0, 3.0], [10.0, 20.0, 90.0], 1.0),
        ([1.0, 2.0, 3.0], [3.0, 2.0, 1.0], -1.0),
        # d = 0, 1, 1: 1 - 6 * 2 / (3 * 8)
        ([1.0, 2.0, 3.0], [1.0, 3.0, 2.0], 0.5),
        # Ranks 1.5, 1.5, 3 against 1, 2, 3: 1.5 / sqrt(1.5 * 2)
        ([5.0, 5.0, 7.0], [1.0, 2.0, 3.0], 1.5 / 3**0.5),
        ([4.0, 4.0], [1.0, 2.0], None),
    ],
)
def test_spearman(a, b, expected):
    assert spearman(a, b) == expected


@pytest.mark.parametrize(("a", "b"), [([1.0], [2.0]), ([1.0, 2.0], [1.0])])
def test_spearman_takes_pairs(a, b):
    with pytest.raises(ValueError, match=rf"spearman: {len(a)} and {len(b)} values; .* at least 2"):
        spearman(a, b)


def test_a_ladder_ranks_model_and_baselines_apart():
    rungs = [
        reading(measured=m, modelled=p, roofline=9.0, documented=d, ladder="L")
        for m, p, d in ((1.0, 10.0, None), (2.0, 20.0, 3.0), (3.0, 15.0, 4.0))
    ]
    (ladder,) = ladders([*rungs, reading()])
    assert (ladder.name, ladder.rungs) == ("L", 3)
    assert ladder.model == 0.5
    assert ladder.roofline is None
    assert ladder.documented is None


def test_every_law_comes_back_from_a_real_kernel_or_says_why():
    readings = list(law_readings())
    assert len({(r.id, r.what) for r in readings}) >= len(TRN2.op_laws)
    assert not broken(readings)
    # Overlapping fits of one operand signature, and the window; nothing else.
    assert {(r.id, r.cause.split(" ")[0]) for r in readings if r.missed} == {
        ("activation", "two"),
        ("tensor_copy", "two"),
        ("tensor_reduce", "the"),
    }


def test_a_law_that_is_lost_without_a_cause_is_a_failure():
    lost = {"part": "laws", "limit_percent": 1.0}
    assert broken([reading(**lost)])
    assert not broken([reading(**lost, cause="two fits"), reading(limit_percent=1.0)])


def test_the_report_fits_and_keeps_the_misses():
    text = report(
        [
            reading(part="laws", id="law", modelled=100.5, limit_percent=1.0),
            reading(part="laws", id="lost", limit_percent=1.0, cause="two fits " * 20),
            reading(id="X2", what="w" * 120, modelled=130.0, limit_percent=8.0, ladder="L"),
            reading(id="X3", modelled=1.0, limit_percent=8.0, cause="because", ladder="L"),
            reading(id="X4", modelled=150.0, ranked_only=True, use="parameter"),
            reading(part="probes", id="X5", limit_percent=5.0, use="partly", roofline=12345.0),
        ]
    )
    assert max(map(len, text.splitlines())) <= WIDTH
    assert "1 of 2 measured laws" in text
    assert "model against hardware (published)" in text
    for expected in ("+30.0!", "-99.0!", "+50.0*", "unknown", "    because", "12,345", "two fits"):
        assert expected in text


def test_the_command_prints_and_writes_readings(tmp_path, capsys, monkeypatch):
    parts = [part for part in PARTS if part[0] in ("isolated probes", "max pooling")]
    monkeypatch.setattr(bench.validate, "PARTS", parts)
    path = tmp_path / "out.json"
    assert main(["validate", "--json", str(path)]) == 0
    out = capsys.readouterr().out
    assert max(map(len, out.splitlines())) <= WIDTH
    assert "V11 maxpool 3x3, row tile 89" in out
    document = json.loads(path.read_text("utf-8"))
    assert document["source"] == "model against hardware (published)"
    records = document["results"]
    assert {r["part"] for r in records} == {"probes", "kernels", "ladders"}
    for record in records:
        if record["part"] != "ladders":
            error = error_percent(record["modelled"], record["measured"])
            assert record["error_percent"] == error
            assert record["source"]


def test_a_lost_law_fails_the_command(monkeypatch, capsys):
    lost = reading(part="laws", limit_percent=1.0)
    monkeypatch.setattr(bench.validate, "PARTS", [("laws", lambda: iter([lost]))])
    assert main(["validate"]) == 1
    assert "0 of 1 measured laws" in capsys.readouterr().out


def test_an_unwritable_file_is_refused_before_any_work(tmp_path, capsys, monkeypatch):
    def work():
        raise AssertionError("work was done")
        yield

    monkeypatch.setattr(bench.validate, "PARTS", [("laws", work)])
    assert main(["validate", "--json", str(tmp_path / "missing" / "out.json")]) == 2
    assert "does not exist; create it first" in capsys.readouterr().err


def test_the_bandwidth_curve_is_ordered_as_published():
    curve = [r for r in transfer_readings() if r.id == "V07"]
    assert [r.measured for r in curve] == sorted(r.measured for r in curve)
    assert [r.modelled for r in curve] == sorted(r.modelled for r in curve)
