"""The table of checks: one field of Options each, one line of the README each."""

from __future__ import annotations

from dataclasses import fields
from pathlib import Path

import pytest

import nki_kernels.machine.checks
from nki_kernels.machine.options import CHECKS, LEVELS, Options, only

README = Path(nki_kernels.machine.checks.__file__).with_name("README.md")


def test_each_check_is_a_field_and_the_rest_are_no_levels():
    names = [f.name for f in fields(Options)]
    assert names == [*CHECKS, "instruction_limit", "precise_fp", "unknown_trips"]


@pytest.mark.parametrize("name", CHECKS)
def test_the_readme_says_what_each_check_finds(name):
    check = CHECKS[name]
    stage = f"{check.stage}, needs values" if check.values else check.stage
    level = Options().level(name)
    row = f"| `{name}` | {stage} | {level} | {check.finds} | {check.source} |"
    assert row in README.read_text(encoding="utf-8").splitlines()


@pytest.mark.parametrize("name", CHECKS)
def test_a_level_is_one_of_three(name):
    for level in LEVELS:
        assert Options(**{name: level}).level(name) == level
    with pytest.raises(ValueError, match=f"Options: {name}='loud'; allowed are error, warn, off"):
        Options(**{name: "loud"})


@pytest.mark.parametrize("limit", [0, -1, True, 1.5, "many"])
def test_the_limit_of_instructions_is_a_positive_int(limit):
    with pytest.raises(ValueError, match=r"instruction_limit=.*; it must be a positive int"):
        Options(instruction_limit=limit)


@pytest.mark.parametrize("trips", [-1, True, 1.5, "many"])
def test_unknown_trips_are_none_or_an_int(trips):
    with pytest.raises(ValueError, match=r"unknown_trips=.*; it must be None or an int of at leas"):
        Options(unknown_trips=trips)


def test_only_switches_the_others_off():
    options = only("alias", "names", level="warn")
    assert {n for n in CHECKS if options.level(n) != "off"} == {"alias", "names"}
    assert options.alias == "warn"
    with pytest.raises(ValueError, match="only: no check speed; checks are operands, buffer"):
        only("speed")
