"""The band of a profile: its time at the bounds of the uncertain numbers."""

from __future__ import annotations

import json

import pytest

import nki_kernels
from nki_kernels import __main__ as main_module
from nki_kernels.hardware import TRN2
from nki_kernels.hardware.origin import Origin
from nki_kernels.machine.sensitivity import Effect, Sensitivity, uncertain
from nki_kernels.profiler.band import band_record, band_text, percent
from tests.child import REPO
from tests.profiler.kernels import many

COMMAND = [
    "profile", str(REPO / "tests" / "profiler" / "kernels.py") + ":many",
    "--arg=x=bf16[128,512]", "--arg=rounds=3", "--target=trn2",
]  # fmt: skip


@pytest.fixture(scope="module")
def profile():
    return nki_kernels.profile(many, nki_kernels.Abstract((128, 512), "bfloat16"), 3, target="trn2")


def effect(name: str, low: float, high: float, origin: Origin) -> Effect:
    return Effect(name, origin, low, high)


def test_the_band_is_that_of_the_very_launch(profile):
    band = profile.band
    assert band.nominal_ns == profile.timeline.total_ns
    assert band.fastest_ns < band.nominal_ns < band.slowest_ns
    assert set(band.effects) == set(uncertain(TRN2))
    # The kernel's start lies on every path, whatever else does.
    launch = band.effects["sync.launch_ns"]
    assert launch.origin.high is not None
    moved = launch.origin.high - TRN2.sync.launch_ns
    assert round(launch.high_ns - band.nominal_ns, 3) == round(moved, 3) > 0


def test_the_text_names_what_moves_the_time_most():
    both = Origin("estimated", "a guess", 1.0, 3.5)
    above = Origin("measured", "a probe", None, 15000.0)
    below = Origin("documented", "a guide", 0.25, None)
    named = {
        "most": effect("most", 900.0, 1400.0, both),
        "less": effect("less", 1000.0, 1200.0, above),
        "least": effect("least", 990.0, 1000.0, below),
        "hardly": effect("hardly", 1000.0, 1000.9, both),
        "idle": effect("idle", 1000.0, 1000.0, both),
    }
    assert band_text(Sensitivity(1000.0, 890.0, 1600.0, named)).splitlines() == [
        "Band: 0.89 to 1.60 us (-11.0 to +60.0 % of 1.00), all 5 uncertain numbers at their bounds",
        "     low %  high %  number at its bound alone",
        "     -10.0   +40.0  most (1 to 3.5, estimated)",
        "      +0.0   +20.0  less (at most 15000, measured)",
        "      -1.0    +0.0  least (at least 0.25, documented)",
    ]


def test_the_text_of_what_nothing_moves_and_of_what_much_does():
    origin = Origin("estimated", "a guess", 1.0, 2.0)
    idle = band_text(Sensitivity(10.0, 10.0, 10.0, {"a": effect("a", 10.0, 10.0, origin)}))
    assert idle.endswith("\nNo single one of them moves the time by 0.1 %.")
    many_of_them = {f"n{i}": effect(f"n{i}", 10.0, 20.0 - i, origin) for i in range(10)}
    rows = band_text(Sensitivity(10.0, 10.0, 40.0, many_of_them)).splitlines()
    assert "n0 (" in rows[2]
    assert "n7 (" in rows[-2]
    assert rows[-1] == "  and 2 that move it less"


def test_percent_of_nothing():
    assert percent(0.0, 0.0) == 0.0
    assert percent(15.0, 10.0) == 50.0


def test_the_record_has_the_band_where_it_was_asked_for(profile):
    assert "band" not in profile.record()
    asked = profile.record(band=True)
    assert {k: v for k, v in asked.items() if k != "band"} == profile.record()
    band = json.loads(json.dumps(asked["band"], allow_nan=False))
    assert band == band_record(profile.band)
    assert band["fastest_us"] == profile.band.fastest_ns / 1e3
    assert band["slowest_us"] == profile.band.slowest_ns / 1e3
    assert band["uncertain_numbers"] == len(profile.band.effects)
    assert [e["name"] for e in band["effects"]] == [e.name for e in profile.band.largest]


def test_the_command_prints_it_after_the_report(profile, capsys):
    assert main_module.main([*COMMAND]) == 0
    plain = capsys.readouterr().out
    assert main_module.main([*COMMAND, "--band"]) == 0
    assert capsys.readouterr().out == f"{plain}\n{band_text(profile.band)}\n"


def test_the_command_puts_it_into_the_record(tmp_path, capsys):
    path = tmp_path / "p.json"
    assert main_module.main([*COMMAND, "--band", "--json", "-o", str(path)]) == 0
    printed = json.loads(capsys.readouterr().out)
    assert printed == json.loads(path.read_text())
    assert printed["band"]["effects"]
