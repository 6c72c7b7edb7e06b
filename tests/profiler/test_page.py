"""The page: self-contained, safe, true to the timeline; used with a real mouse in a browser."""

from __future__ import annotations

import base64
import json
import re
import zlib
from collections.abc import Iterator

import numpy as np
import pytest

import nki_kernels
from nki_kernels.machine.options import Options
from nki_kernels.profiler import Profile
from nki_kernels.profiler.path import blocker
from tests.profiler import browser as chromium
from tests.profiler.browser import Browser
from tests.profiler.kernels import awkward, empty, many, two_cores_kernel
from tests.profiler.mlp import mlp

needs_browser = pytest.mark.skipif(chromium.found() is None, reason="no Chromium on the path")
#: For 100,000 instructions. The frame leaves room for the other tests on the same cores.
OPEN_MS, DRAW_MS, LARGE_BYTES = 3000, 80, 1_500_000


@pytest.fixture(scope="module")
def spoiled() -> Profile:
    x, w = (nki_kernels.Abstract(s, "bfloat16") for s in ((2048, 256), (256, 2048)))
    return nki_kernels.profile(mlp, x, w, fault="eviction on one engine", target="trn2")


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory, spoiled: Profile) -> Iterator[Browser]:
    path = tmp_path_factory.mktemp("page")
    with chromium.browser(path / "home") as running:
        running.open(spoiled.save(path / "profile.html"))
        yield running


def meta_of(text: str) -> dict:
    (found,) = re.findall(r'<script type="application/json" id="meta">(.*?)</script>', text, re.S)
    return json.loads(found)


def columns_of(text: str) -> dict[str, np.ndarray]:
    (found,) = re.findall(r'<script type="text/plain" id="columns">(.*?)</script>', text, re.S)
    data = np.frombuffer(zlib.decompress(base64.b64decode(found)), np.uint8)
    columns, at = {}, 0
    for name, count in meta_of(text)["columns"]:
        planes = data[at : at + 4 * count].reshape(4, count)
        steps = np.ascontiguousarray(planes.T).view("<u4").reshape(-1)
        columns[name] = np.cumsum(steps, dtype=np.uint32)
        at += 4 * count
    assert at == len(data)
    return columns


# -- without a browser -----------------------------------------------------------------------------


def test_the_page_asks_for_nothing(spoiled):
    text = spoiled.html()
    head = text.replace(re.findall(r'id="columns">.*?</script>', text, re.S)[0], "")
    assert not re.search(r"""(?:src|href)\s*=\s*["']?(?!\s*$)(?:https?:|//|\.|/)""", head)
    assert not re.search(r"url\((?!#)|@import|https?://(?!www\.w3\.org/)", head)
    assert "default-src 'none'" in head


def test_the_page_holds_the_timeline_to_the_tick(spoiled):
    text = spoiled.html()
    meta, columns, timeline = meta_of(text), columns_of(text), spoiled.timeline
    tick = meta["tick_ns"]
    half = tick / 2 * (1 + 1e-9)
    start = columns["start"].astype(np.int64)
    assert np.max(np.abs(start * tick - timeline.start)) <= half
    for name in ("issue", "service", "service_end", "result"):
        moment = (start + columns[name].view(np.int32)) * tick
        assert np.max(np.abs(moment - getattr(timeline, name))) <= half
    assert np.array_equal(columns["cause"], timeline.cause)
    back = columns["back"].view(np.int32).astype(np.int64)
    waited = np.where(back != 0, np.arange(len(back)) - back, -1)
    order = spoiled.case.order
    assert waited.tolist() == [blocker(timeline, order, number) for number in range(len(back))]
    known = (timeline.cause_event >= 0) & (waited != timeline.cause_event)
    assert {spoiled.trace.events[n].engine.name for n in np.flatnonzero(known)} <= {"tensor"}
    opcodes = [meta["opcodes"][i][1] for i in columns["opcode"]]
    assert opcodes == [event.opcode for event in spoiled.trace]


def test_every_instruction_is_in_one_lane_and_every_payload_in_one_more(spoiled):
    meta, columns = meta_of(spoiled.html()), columns_of(spoiled.html())
    seen = {"engine": [], "trigger": [], "payload": []}
    for number, lane in enumerate(meta["lanes"]):
        seen[lane["kind"]] += columns[f"lane{number}"].tolist()
    assert sorted(seen["engine"] + seen["trigger"]) == list(range(len(spoiled.trace)))
    assert sorted(seen["payload"]) == sorted(seen["trigger"])


def test_the_text_of_a_kernel_stays_text():
    profile = nki_kernels.profile(awkward, np.ones((8, 8), np.float32), target="trn2")
    text = profile.html()
    assert text.count("</script>") == 3
    assert "\u2028" not in text
    assert any("</script>" in row for s in meta_of(text)["sources"] for _, row in s["rows"])


# -- in a browser ----------------------------------------------------------------------------------


def row(page: Browser, title: str) -> dict:
    """Position of a lane on the screen, by its title."""
    rows = page.js("profilePage.timeline.rows.map(r => ({title: r.title, y: r.y, h: r.height}))")
    (found,) = [r for r in rows if r["title"] == title]
    page.js("document.getElementById('canvas').scrollIntoView({block: 'center'})")
    box = page.js("(r => ({x: r.x, y: r.y, w: r.width}))"
                  "(document.getElementById('canvas').getBoundingClientRect())")  # fmt: skip
    return {"x": box["x"], "w": box["w"], "y": box["y"] + found["y"] + found["h"] / 2}


def view(page: Browser) -> tuple[float, float]:
    low, high = page.js("[profilePage.timeline.t0, profilePage.timeline.t1]")
    return low, high


def text_of(page: Browser, name: str) -> str:
    return str(page.js(f"document.getElementById('{name}').textContent"))


@needs_browser
def test_the_first_page_names_the_fault_and_nothing_goes_wrong(page, spoiled):
    assert text_of(page, "kernel") == "mlp on trn2"
    assert text_of(page, "label") == "model, unvalidated"
    assert spoiled.verdict == text_of(page, "verdict")
    shown = page.js("[...document.querySelectorAll('#advice b')].map(b => b.textContent)")
    assert shown == [advice.name for advice in spoiled.advice] == ["eviction on one engine"]
    bottom = page.js("document.getElementById('advice').getBoundingClientRect().bottom")
    assert bottom < 1000
    assert page.problems() == []
    assert [url.partition(":")[0] for url in page.requests()] == ["file"]


@needs_browser
def test_wheel_drag_and_keys_move_the_view(page, spoiled):
    page.key("f")
    lane = row(page, "scalar")
    low, high = view(page)
    assert low <= 0.0 <= spoiled.timeline.makespan_ns / 1e3 <= high
    x = lane["x"] + 118 + (lane["w"] - 118) / 4
    under = low + (high - low) / 4
    page.wheel(x, lane["y"], -400)
    low, high = view(page)
    assert high - low < 0.5 * spoiled.timeline.makespan_ns / 1e3
    assert abs((low + (high - low) / 4) - under) < 0.01 * (high - low)
    page.drag(x + 300, x + 100, lane["y"])
    moved, _ = view(page)
    assert abs(moved - low - 200 * (high - low) / (lane["w"] - 118)) < 0.02 * (high - low)
    low, high = view(page)
    page.drag(x, x + 200, lane["y"], shift=True)
    inner = view(page)
    assert low < inner[0] < inner[1] < high
    page.key("s")
    page.key("d")
    assert view(page)[0] > inner[0] - (inner[1] - inner[0])
    page.key("f")
    assert view(page)[1] >= spoiled.timeline.makespan_ns / 1e3


@needs_browser
def test_a_click_explains_an_instruction_and_links_to_what_it_waited_for(page, spoiled):
    page.key("f")
    waits = [
        n for n, (event, cause) in enumerate(
            zip(spoiled.trace, spoiled.timeline.cause_event, strict=True)
        ) if event.engine.name == "vector" and cause >= 0
    ]  # fmt: skip
    number = waits[len(waits) // 2]
    source = int(spoiled.timeline.cause_event[number])
    page.js(f"profilePage.timeline.reveal({number})")
    page.frame()
    lane = row(page, "vector")
    at = page.js(f"profilePage.timeline.x(profilePage.data.start({number}))")
    page.click(lane["x"] + at + 1, lane["y"])
    details = text_of(page, "details")
    assert f"{spoiled.trace.events[number].opcode} #{number} on vector" in details
    assert f"{spoiled.trace.events[source].opcode} #{source}" in details
    page.js("[...document.querySelectorAll('#details a')][0].click()")
    assert f"{spoiled.trace.events[source].opcode} #{source} on" in text_of(page, "details")
    page.key("Escape")
    assert "Click an instruction" in text_of(page, "details")


@needs_browser
@pytest.mark.parametrize("words", ["activation", "mlp.py", "PSUM", "no such thing", "#7", "Vector"])
def test_search_marks_what_a_reader_would_mark(page, spoiled, words):
    page.js(f"(s => {{ s.value = {words!r}; s.oninput(); }})(document.getElementById('search'))")
    found = page.js("profilePage.matches.length")
    needle = words.lower()
    expected = 0
    for number, event in enumerate(spoiled.trace):
        place = spoiled.case.sites.frames[spoiled.case.sites.innermost[number]]
        memories = [a.tile.memory for a in (*event.reads, *event.writes)]
        # A function or a line of the kernel may have the word as well.
        stack = spoiled.case.sites.stacks[spoiled.case.sites.stack_of[number]]
        frames = [spoiled.case.sites.frames[p] for p in stack]
        texts = [event.opcode, event.engine.name, *memories, place.file.rpartition("/")[2]]
        texts += [t for f in frames for t in (f.text, f.function)]
        hit = (
            f"#{number}" == needle if needle[0] == "#" else any(needle in t.lower() for t in texts)
        )
        expected += hit
    assert found == expected
    page.key("Escape")
    assert page.js("profilePage.matches.length") == 0


@needs_browser
def test_next_steps_through_the_matches_in_order_of_time(page):
    page.js("(s => { s.value = 'rsqrt'; s.oninput(); })(document.getElementById('search'))")
    count = page.js("profilePage.matches.length")
    assert count >= 1
    for step in range(count):
        page.js("document.getElementById('next').click()")
        assert text_of(page, "matches") == f"{step + 1} of {count}"
    page.js("document.getElementById('next').click()")
    assert text_of(page, "matches") == f"1 of {count}"
    page.key("Escape")


@needs_browser
def test_a_gap_and_a_source_line_and_advice_lead_to_the_timeline(page, spoiled):
    gap = spoiled.gaps[1]
    page.js("document.querySelectorAll('#gaps tbody tr')[1].querySelector('a').click()")
    low, high = view(page)
    assert low < gap.start / 1e3 < gap.end / 1e3 < high
    page.key("Escape")
    page.js("[...document.querySelectorAll('.row.cost')].find(r => "
            "r.textContent.includes('nisa.nc_matmul(')).click()")  # fmt: skip
    matmuls = sum(event.opcode == "nc_matmul" for event in spoiled.trace)
    assert page.js("profilePage.matches.length") == matmuls
    page.key("Escape")
    page.js("document.querySelector('#advice li').click()")
    assert page.js("profilePage.timeline.selected") == spoiled.advice[0].events[0]
    page.key("Escape")


@needs_browser
def test_hovering_shows_a_box_and_a_curve(page, spoiled):
    page.key("f")
    for title, says in (("PSUM", "banks"), ("scalar", "#"), ("critical path", "(")):
        lane = row(page, title)
        middle = spoiled.timeline.makespan_ns / 2e3
        page.mouse("Moved", lane["x"] + page.js(f"profilePage.timeline.x({middle})"), lane["y"])
        page.frame()
        assert page.js("document.getElementById('tip').hidden") is False
        assert says in text_of(page, "tip")


@needs_browser
def test_what_is_drawn_is_the_timeline(page, spoiled):
    """Where Scalar is busy its lane has the colour of the box, elsewhere none."""
    page.key("f")
    page.js("profilePage.timeline.show(20, 40)")
    page.frame()
    lane = row(page, "scalar")
    spans = spoiled.timeline.intervals(nki_kernels.hardware.Engine.scalar)
    pixels = page.js(
        "(c => [...c.getContext('2d').getImageData(0, profilePage.timeline.rows"
        ".find(r => r.title === 'scalar').y + 3, c.width, 1).data])"
        "(document.getElementById('canvas'))"
    )
    colour = np.array(pixels).reshape(-1, 4)
    checked = 0
    for x in range(125, int(lane["w"]) - 5, 7):
        t0, t1 = (page_time(20, 40, lane["w"], x + d) * 1e3 for d in (-2, 3))
        inside = any(low <= t0 and t1 <= high for low, high in spans)
        outside = all(high <= t0 or t1 <= low for low, high in spans)
        red, _, blue = colour[x][:3].astype(int)
        if inside:
            checked += 1
            assert red - blue > 60 or colour[x].min() > 200, x
        elif outside:
            assert red - blue < 60, x
    assert checked > 20


def page_time(t0: float, t1: float, width: float, x: float) -> float:
    return t0 + (x - 118) / (width - 118) * (t1 - t0)


@needs_browser
@pytest.mark.parametrize("case", ["empty", "two cores", "awkward"])
def test_unusual_profiles_open(tmp_path, case):
    x = np.ones((8, 8), np.float32)
    kernel, lnc = {
        "empty": (empty, 1),
        "two cores": (two_cores_kernel, 2),
        "awkward": (awkward, 1),
    }[case]
    profile = nki_kernels.profile(kernel, x, target="trn2", lnc=lnc)
    with chromium.browser(tmp_path / "home") as page:
        page.open(profile.save(tmp_path / "p.html"))
        assert page.problems() == []
        assert page.js("document.title") == f"{kernel.__name__} on trn2"
        assert page.js("document.querySelectorAll('img').length") == 0
        if case == "two cores":
            titles = page.js("profilePage.timeline.rows.map(r => r.title)")
            assert {"core 0 · DMA 1", "core 1 · DMA 1"} <= set(titles)


@needs_browser
def test_a_hundred_thousand_instructions_open_fast_and_zoom_smoothly(tmp_path, record_property):
    x = nki_kernels.Abstract((128, 128), "bfloat16")
    # Unrolled loops of this length are a warning: AWS's compiler takes very long over them.
    options = Options(instruction_limit=1_000_000)
    profile = nki_kernels.profile(many, x, 12_500, target="trn2", options=options)
    assert len(profile.trace) >= 100_000
    path = profile.save(tmp_path / "large.html")
    with chromium.browser(tmp_path / "home") as page:
        page.open(path)
        opened = float(page.js("document.documentElement.dataset.readyMs"))
        lane = row(page, "scalar")
        page.wheel(lane["x"] + 700, lane["y"], -10)
        frames = []
        for step in range(40):
            page.wheel(lane["x"] + 700, lane["y"], -120 if step < 30 else 300)
            frames.append(page.js("profilePage.timeline.drawMs"))
        searched = page.js(
            "(t => (profilePage.mark(profilePage.data.search('tensor_tensor')), "
            "performance.now() - t))(performance.now())"
        )
        assert page.js("profilePage.matches.length") == 12_500
        assert page.problems() == []
    size, frame = path.stat().st_size, sorted(frames)[len(frames) // 2]
    record_property("bytes, open, frame, search (ms)", (size, opened, frame, searched))
    print(f"{size:,} bytes, opens in {opened} ms, {frame} ms a frame, search {searched} ms")
    assert opened < OPEN_MS
    assert frame < DRAW_MS
    assert size < LARGE_BYTES
