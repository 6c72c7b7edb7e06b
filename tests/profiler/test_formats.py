"""Record, Perfetto trace, diff, report and notebook of a profile."""

from __future__ import annotations

import html
import json
from collections import defaultdict
from itertools import pairwise

import pytest
from IPython.core.formatters import HTMLFormatter

import nki_kernels
from nki_kernels.machine.errors import OptionError
from nki_kernels.profiler import Profile, diff, session
from tests.profiler import browser as chromium
from tests.profiler.kernels import many, trickle, two_cores_kernel
from tests.profiler.mlp import mlp


def profiled(fault: str, rows: int = 1024) -> Profile:
    x, w = (nki_kernels.Abstract(s, "bfloat16") for s in ((rows, 256), (256, 2048)))
    return nki_kernels.profile(mlp, x, w, fault=fault, target="trn2")


@pytest.fixture(scope="module")
def good() -> Profile:
    return profiled("none")


@pytest.fixture(scope="module")
def reloading() -> Profile:
    return profiled("reloaded input")


@pytest.fixture(scope="module")
def two_cores() -> Profile:
    x = nki_kernels.Abstract((64, 32), "float32")
    return nki_kernels.profile(two_cores_kernel, x, target="trn2", lnc=2)


# -- record ----------------------------------------------------------------------------------------


def test_the_record_is_json_and_says_where_it_comes_from(reloading):
    record = json.loads(json.dumps(reloading.record(), allow_nan=False))
    assert (record["schema_version"], record["source"], record["label"]) == (
        1,
        "model",
        "model, unvalidated",
    )
    assert record["summary"] == reloading.summary()
    assert (record["kernel"], record["target"], record["lnc"]) == ("mlp", "trn2", 1)
    assert record["nki_kernels"] == nki_kernels.__version__
    (advice,) = record["advice"]
    assert advice["name"] == "reloaded input"
    assert advice["lines"][0]["file"].endswith("mlp.py")
    assert len(record["gaps"]["longest"]) == min(20, record["gaps"]["count"])
    assert sum(line["instructions"] for line in record["lines"]) == len(reloading.trace)


def test_the_names_of_the_summary_are_those_of_neurons_profiler(good):
    assert {
        "total_active_time_percent", "tensor_engine_active_time_percent",
        "vector_engine_active_time_percent", "scalar_engine_active_time_percent",
        "gpsimd_engine_active_time_percent", "sync_engine_active_time_percent",
        "dma_active_time_percent", "dma_transfer_total_bytes", "dma_transfer_average_bytes",
        "hbm_read_bytes", "hbm_write_bytes", "spill_save_bytes", "spill_reload_bytes",
        "mm_arithmetic_intensity", "hardware_flops", "transpose_flops", "mfu_estimated_percent",
        "mfu_max_achievable_estimated_percent", "hfu_estimated_percent", "mbu_estimated_percent",
        "throttle_active_time_percent",
    } <= set(good.summary())  # fmt: skip


def test_hfu_counts_transposes_and_mfu_is_below_what_is_achievable():
    figures = profiled("redundant transposes").summary()
    assert figures["hfu_estimated_percent"] > figures["mfu_estimated_percent"]
    assert figures["mfu_estimated_percent"] < figures["mfu_max_achievable_estimated_percent"]
    flops = figures["hardware_flops"] - figures["transpose_flops"]
    moved = figures["hbm_read_bytes"] + figures["hbm_write_bytes"]
    assert figures["mm_arithmetic_intensity"] == flops / moved


# -- Perfetto --------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["good", "reloading", "two_cores"])
def test_a_perfetto_trace_holds_every_instruction_once(name, request):
    profile = request.getfixturevalue(name)
    data = json.loads(json.dumps(profile.perfetto(), allow_nan=False))
    boxes = [e for e in data["traceEvents"] if e["ph"] == "X"]
    seen = sorted(e["args"]["event"] for e in boxes if e["cat"] != "payload")
    assert seen == list(range(len(profile.trace)))
    assert {e["pid"] for e in boxes} == set(range(profile.trace.lnc))
    for box in boxes:
        event = profile.trace.events[box["args"]["event"]]
        assert box["name"] == event.opcode
        if box["cat"] == "engine":
            assert box["ts"] == profile.timeline.start[box["args"]["event"]] / 1e3
    assert data["otherData"]["source"] == "model, unvalidated"


@pytest.mark.parametrize("name", ["good", "two_cores"])
def test_perfetto_can_show_it(name, request):
    """Named threads, no overlap in a thread, arrows that start and end in boxes."""
    events = request.getfixturevalue(name).perfetto()["traceEvents"]
    named = {(e["pid"], e["tid"]) for e in events if e["name"] == "thread_name"}
    threads = defaultdict(list)
    for event in events:
        if event["ph"] == "X":
            threads[event["pid"], event["tid"]].append((event["ts"], event["ts"] + event["dur"]))
    assert set(threads) == named
    for spans in threads.values():
        for (_, end), (start, _) in pairwise(spans):
            assert end <= start + 1e-9
    counters = {(e["pid"], e["name"]) for e in events if e["ph"] == "C"}
    assert len(counters) == len(request.getfixturevalue(name).curves)
    flows = defaultdict(list)
    for event in events:
        if event["ph"] in "sf":
            flows[event["id"]].append(event)
            spans = threads[event["pid"], event["tid"]]
            assert any(low <= event["ts"] <= high for low, high in spans)
    assert all([e["ph"] for e in pair] == ["s", "f"] for pair in flows.values())


# -- diff ------------------------------------------------------------------------------------------


def test_a_diff_names_what_was_fixed_and_where(good, reloading, tmp_path):
    old = reloading.save(tmp_path / "old.json")
    change = diff(old, good)
    assert (change.fixed, change.introduced) == (("reloaded input",), ())
    times = [p.summary()["total_time_us"] for p in (reloading, good)]
    assert change.speedup == times[0] / times[1] > 1.0
    assert change.figures["hbm_read_bytes"] == (
        reloading.timeline.hbm_read_bytes,
        good.timeline.hbm_read_bytes,
    )
    assert "_weights: nisa.dma_copy(" in change.lines
    text = str(change)
    assert "gone: reloaded input" in text
    assert f"{change.speedup:.3f} times as fast" in text
    back = diff(good.record(), str(old))
    assert (back.fixed, back.introduced) == ((), ("reloaded input",))
    assert "new:  reloaded input" in str(back)


def test_a_profile_does_not_differ_from_itself(good):
    same = diff(good, good)
    assert (same.figures, same.lines, same.speedup) == ({}, {}, 1.0)


def test_other_targets_are_said():
    x = nki_kernels.Abstract((64, 64), "bfloat16")
    two, three = (nki_kernels.profile(many, x, 2, target=t) for t in ("trn2", "trn3"))
    assert "The targets differ" in str(diff(two, three))


@pytest.mark.parametrize(
    ("text", "says"),
    [
        (None, "cannot be read as a profile"),
        ("{", "cannot be read as a profile"),
        ("[1]", "schema_version None; allowed is 1"),
        ('{"schema_version": 99, "summary": {}}', "schema_version 99; allowed is 1"),
    ],
)
def test_what_is_no_record_is_refused(good, tmp_path, text, says):
    path = tmp_path / "old.json"
    if text is not None:
        path.write_text(text)
    with pytest.raises(OptionError) as caught:
        diff(path, good)
    assert says in str(caught.value)
    assert "old.json" in str(caught.value)


# -- report ----------------------------------------------------------------------------------------


def test_the_report_names_gaps_lines_and_memory(good):
    text = str(good)
    gap = good.gaps[0]
    event = good.trace.events[gap.waited_for]
    assert f"{gap.reason} {event.opcode} #{gap.waited_for} on tensor at mlp.py:" in text
    assert "Idle gaps of the busiest engine, scalar (" in text
    assert f"PSUM: {good.curves[0].peak} of 8 banks at" in text
    assert "[128, 512] float32" in text
    hottest = good.lines[0]
    assert f"{hottest.place}" in text.partition("Lines, by time")[2].splitlines()[2]


def test_a_report_of_two_cores_says_which(two_cores):
    text = str(two_cores)
    assert "SBUF of core 0" in text
    assert "SBUF of core 1" in text


@pytest.mark.parametrize(
    ("fault", "says"),
    [
        ("reloaded input", "Memory-bound: "),
        ("unused partitions", "Compute-bound: tensor is active"),
        ("trickle", "Bound by DMA, not by bandwidth: dma is active"),
        ("single buffering", "Neither compute- nor memory-bound: "),
    ],
)
def test_the_verdict_uses_awss_thresholds(fault, says):
    if fault == "trickle":
        x = nki_kernels.Abstract((1, 64), "bfloat16")
        profile = nki_kernels.profile(trickle, x, 400, target="trn2")
    else:
        profile = profiled(fault, 4096)
    assert profile.verdict.startswith(says)
    inside = 100 * profile.timeline.busy_ns[profile.timeline.limiting_engine]
    good = inside / profile.timeline.makespan_ns >= 90
    mbu = profile.summary()["mbu_estimated_percent"]
    assert (says[:7] == "Neither") == (not good and not mbu >= 60)


# -- notebook --------------------------------------------------------------------------------------


def test_a_notebook_shows_the_page(good):
    shown = HTMLFormatter()(good)
    assert shown.startswith("<iframe srcdoc=")
    inner = shown.partition('srcdoc="')[2].partition('"')[0]
    assert html.unescape(inner) == good.html()
    assert 'sandbox="allow-scripts"' in shown


def test_a_notebook_shows_the_report_of_a_long_run(good, monkeypatch):
    monkeypatch.setattr(session, "_NOTEBOOK_EVENTS", len(good.trace) - 1)
    shown = HTMLFormatter()(good)
    assert shown.startswith("<pre>mlp on trn2")
    assert "profile.save('profile.html') writes the page" in shown


@pytest.mark.skipif(chromium.found() is None, reason="no Chromium on the path")
def test_the_frame_of_a_notebook_runs(good, tmp_path):
    # The sandbox would keep this test out as well; the page inside is the same.
    frame = HTMLFormatter()(good).replace('sandbox="allow-scripts" ', "")
    ready = "document.documentElement.dataset.readyMs = 1"
    (tmp_path / "cell.html").write_text(
        f"<!doctype html><meta charset=utf-8><body>{frame}<script>{ready}</script>"
    )
    with chromium.browser(tmp_path / "home") as page:
        page.open(tmp_path / "cell.html")
        page.js(
            "new Promise(done => { const look = () => { const inner = (frames[0].document."
            "documentElement || {}).dataset || {}; inner.readyMs || inner.error ? done() : "
            "setTimeout(look, 20); }; look(); })"
        )
        title = page.js("frames[0].document.getElementById('kernel').textContent")
        assert title == "mlp on trn2"
        assert page.problems() == []
