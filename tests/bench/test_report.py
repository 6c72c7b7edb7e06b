"""The report: true to the results, self-contained, and drawn by a real browser."""

from __future__ import annotations

import dataclasses
import re
import sys
import time

import pytest

import bench.report
from bench.__main__ import main
from bench.record import write_json
from bench.report import history_of, page_of, png_of
from tests.bench.test_compare import BASE
from tests.profiler import browser as chromium

pytest.importorskip("matplotlib")

needs_browser = pytest.mark.skipif(chromium.found() is None, reason="no Chromium on the path")


def results():
    made = [
        dataclasses.replace(
            BASE, op=op, shape=f"{size}x{size}x{size}", target=target, flops=2 * size**3,
            min_hbm_bytes=6 * size**2, modelled_us=size**3 / 3e7 + 10, percent_of_roofline=share,
        )
        for target in ("trn2", "trn3")
        for op in ("matmul", "linear")
        for size, share in ((512, 31.0), (2048, 92.0))
    ]  # fmt: skip
    moved = dataclasses.replace(BASE, op="dispatch", flops=0, percent_of_roofline=77.0)
    failed = dataclasses.replace(
        BASE, shape="7x7x7", correct=False, modelled_us=None, percent_of_roofline=None,
        limiting_engine=None, mfu_estimated_percent=None, failure="worst at <3> & more",
    )  # fmt: skip
    return [*made, moved, failed]


@pytest.fixture(scope="module")
def page():
    return page_of(results())


def test_the_page_needs_no_other_file(page):
    assert not re.search(r"<(script|link|img|iframe)\b", page)
    assert not re.search(r"(src|href)=\"(?!#|data:)", page)
    assert "@import" not in page
    assert page.startswith("<!doctype html>")


def test_the_page_has_every_case_and_its_source(page):
    for result in results():
        assert f"<td>{result.shape}</td>" in page
    assert page.count("<svg") == 2 + (len(history_of()) > 1)
    assert "trn2: roofline (model, unvalidated)" in page
    assert "trn3: percent of the roof (model, unvalidated)" in page
    assert page.count("<h2>") == 5 + 1 * (len(history_of()) > 1)
    for text in ("matmul on trn2 (model, unvalidated)", "dispatch on trn2"):
        assert text in page


def test_a_failure_is_shown_and_what_it_says_is_text(page):
    assert "worst at &lt;3&gt; &amp; more" in page
    assert "worst at <3>" not in page


def test_the_heat_map_holds_the_shares_of_the_roof(page):
    shares = re.findall(r">\s*(\d+)\s*</text>", page)
    assert shares.count("31") >= 4
    assert shares.count("92") >= 4
    assert "77" in shares


def test_the_picture_is_a_png():
    assert png_of(results()).startswith(b"\x89PNG\r\n")


def test_the_history_is_that_of_the_checked_in_times(monkeypatch):
    history = history_of()
    for commit, figures in history:
        assert re.fullmatch(r"[0-9a-f]{7,}", commit)
        assert all(ns > 0 for ns in figures.values())
    monkeypatch.setattr(bench.report, "_git", lambda *arguments: "")
    assert history_of() == []


def test_a_commit_that_held_something_else_is_passed_over(monkeypatch):
    shown = {
        "a:bench/goldens.json": "{",
        "b:bench/goldens.json": "[]",
        "c:bench/goldens.json": '{"figures": {"x": {"ns": 2}}}',
    }
    monkeypatch.setattr(
        bench.report, "_git", lambda verb, what, *_: "c b a" if verb == "log" else shown[what]
    )
    assert history_of() == [("c", {"x": 2.0})]


def test_the_command_writes_page_and_picture(tmp_path, capsys):
    paths = [tmp_path / name for name in ("in.json", "out.html", "out.png")]
    write_json(paths[0], "model", results())
    command = ["report", str(paths[0]), "-o", str(paths[1]), "--png", str(paths[2])]
    assert main(command) == 0
    assert capsys.readouterr().out.count("wrote ") == 2
    assert paths[1].read_text("utf-8").startswith("<!doctype html>")
    assert paths[2].read_bytes()[1:4] == b"PNG"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["report", "{json}"], "report writes nothing: neither --output nor --png"),
        (["report", "{json}", "-o", "{absent}/a.html"], "--output"),
        (["report", "{json}", "--png", "{absent}/a.png"], "--png"),
        (["report", "{empty}", "--png", "{folder}/a.png"], "the files hold no timed case"),
        (["report", "{absent}", "--png", "{folder}/a.png"], "cannot be read"),
    ],
)
def test_what_cannot_be_reported_gets_a_clear_error(tmp_path, capsys, arguments, message):
    good, empty = tmp_path / "good.json", tmp_path / "empty.json"
    write_json(good, "model", results())
    write_json(empty, "model", results()[-1:])
    places = {"json": good, "empty": empty, "absent": tmp_path / "absent", "folder": tmp_path}
    assert main([argument.format(**places) for argument in arguments]) == 2
    assert message in capsys.readouterr().err
    assert sorted(p.name for p in tmp_path.iterdir()) == ["empty.json", "good.json"]


def test_without_matplotlib_the_error_names_the_extra(tmp_path, monkeypatch, capsys):
    path = tmp_path / "in.json"
    write_json(path, "model", results())
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert main(["report", str(path), "--png", str(tmp_path / "a.png")]) == 2
    assert "install the extra with pip install '.[bench]'" in capsys.readouterr().err


@needs_browser
def test_a_browser_draws_it_without_a_request_or_a_problem(page, tmp_path):
    path = tmp_path / "report.html"
    path.write_text(page, encoding="utf-8")
    with chromium.browser(tmp_path / "home") as running:
        running.call("Page.navigate", url=path.as_uri())
        while running.js("document.readyState") != "complete" or not running.js("document.title"):
            time.sleep(0.05)
        assert running.problems() == []
        asked = [u for u in running.requests() if not u.startswith(("data:", "about:"))]
        assert asked == [path.as_uri()]
        widths = running.js("[...document.querySelectorAll('svg')].map(s => s.clientWidth)")
        assert len(widths) >= 2
        assert min(widths) > 600
        assert running.js("document.documentElement.scrollWidth <= innerWidth")
        assert running.js("document.querySelectorAll('tr.bad').length") == 2
