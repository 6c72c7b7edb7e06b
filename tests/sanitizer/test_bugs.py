"""Each planted bug is caught by its check, by no other, and its twin passes every check."""

from __future__ import annotations

import warnings
from typing import Any

import pytest

from nki_kernels.machine.errors import NkiKernelsError
from nki_kernels.machine.launch import launch
from nki_kernels.machine.options import CHECKS, NkiWarning, Options, only
from tests.sanitizer import calls, memory, programs
from tests.sanitizer.bug import HOSTILE, Bug

BUGS: list[Bug] = [*calls.BUGS, *memory.BUGS, *programs.BUGS]
PASSABLE = [bug for bug in BUGS if not bug.stops]


def run(kernel: Any, bug: Bug, options: Options) -> None:
    arrays = tuple(a.copy() for a in bug.arrays)
    launch(kernel, arrays, target=bug.target, lnc=bug.lnc, options=options)


def named(bug: Bug) -> str:
    return bug.name


def limited(check: str, level: Any = "error") -> Options:
    """The one check, with the low limit of instructions of the corrected twins."""
    options = dict.fromkeys(CHECKS, "off") | {check: level}
    return Options(**options, instruction_limit=HOSTILE.instruction_limit)


def test_there_are_forty_with_names_of_their_own():
    assert len({bug.name for bug in BUGS}) == len(BUGS) >= 40
    assert {bug.check for bug in BUGS} == set(CHECKS)


@pytest.mark.parametrize("bug", BUGS, ids=named)
def test_its_check_catches_it_and_says_where_and_what(bug):
    with pytest.raises(NkiKernelsError) as caught:
        run(bug.bug, bug, limited(bug.check))
    message = str(caught.value)
    for text in bug.says:
        assert text in message, f"{text!r} not in {message!r}"
    if bug.check != "instruction_count":
        assert "/tests/sanitizer/" in message


@pytest.mark.parametrize("bug", PASSABLE, ids=named)
def test_it_warns_at_that_level(bug):
    with pytest.warns(NkiWarning) as caught:
        run(bug.bug, bug, limited(bug.check, "warn"))
    assert any(bug.says[0] in str(w.message) for w in caught)


@pytest.mark.parametrize("bug", PASSABLE, ids=named)
def test_nothing_else_stops_it(bug):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        run(bug.bug, bug, only())


@pytest.mark.parametrize("bug", BUGS, ids=named)
def test_the_corrected_twin_passes_every_check(bug):
    run(bug.twin, bug, HOSTILE)
