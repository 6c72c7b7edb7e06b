"""The table of what uncertain numbers do to modelled times."""

from __future__ import annotations

import json

from bench.__main__ import main
from bench.entries import ENTRIES
from bench.sensitivity import measure_band, sensitivity_table
from nki_kernels.operators.shapes import parse


def _band():
    entry = ENTRIES["rms_norm"]
    return measure_band(entry, parse(entry.op, "256x512"), "bfloat16", "trn2")


def test_a_band_holds_the_time_and_names_what_moves_it():
    band = _band()
    assert band.fastest_us < band.nominal_us < band.slowest_us
    low, high = band.effects["sync.launch_ns"]
    # 9.4 us of start and end are stated as 9.4 to 15.
    assert low == 0.0
    assert round(high * band.nominal_us / 100, 6) == 5.6
    text = sensitivity_table([band])
    assert "[1] rms_norm 256x512 bfloat16" in text
    assert "sync.launch_ns" in text
    assert "model, unvalidated" in text


def test_the_command_takes_the_first_default_of_each_operator(capsys, tmp_path):
    file = tmp_path / "bands.json"
    assert main(["sensitivity", "layer_norm", "--shape", "128x256", "--json", str(file)]) == 0
    assert "[1] layer_norm 128x256" in capsys.readouterr().out
    (record,) = json.loads(file.read_text(encoding="utf-8"))["results"]
    assert record["source"] == "model"
    assert main(["sensitivity", "--target", "trn9"]) == 2
    assert "trn9" in capsys.readouterr().err
