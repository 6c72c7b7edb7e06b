"""The README's table of the model against hardware is what the command prints."""

from __future__ import annotations

from pathlib import Path

from bench.validate import PARTS, broken, markdown

README = Path(__file__).parents[2] / "README.md"


def test_the_readme_shows_what_validate_says():
    readings = [reading for _, found in PARTS for reading in found()]
    assert not broken(readings)
    # After a change of the model: `python -m bench validate --markdown`, between the two marks.
    text = README.read_text(encoding="utf-8")
    shown = text.split("<!-- bench validate --markdown -->")[1].split("<!-- end -->")[0]
    assert shown.strip() == markdown(readings)
    assert all(r.source for r in readings)
    assert all(r.cause for r in readings if r.missed)
