from __future__ import annotations

import dataclasses

import pytest

from bench.table import WIDTH, render, results_table, shapes_table
from nki_kernels.operators import OPERATORS
from nki_kernels.operators.shapes import DEFAULTS, cases
from tests.bench.test_record import RESULT

TIMED = dataclasses.replace(
    RESULT, modelled_us=123456.78, limiting_engine="tensor", mfu_estimated_percent=91.25,
    percent_of_roofline=99.5, checked_at="256x1024x14336", estimated_constants=7,
)  # fmt: skip


def lines(text):
    split = text.splitlines()
    assert max(map(len, split)) <= WIDTH
    return split


@pytest.mark.parametrize("name", [case.name for case in cases("matmul")])
def test_results_fit_the_width_without_losing_a_name(name):
    table = lines(results_table([dataclasses.replace(TIMED, shape=name)]))
    assert table[3].split() == [
        name, "fp32", "yes", "256x1024x14336", "123456.8", "tensor", "91.2", "99.5",
    ]  # fmt: skip


def test_the_table_says_what_its_numbers_are():
    text = results_table([TIMED, dataclasses.replace(TIMED, dtype="bfloat16", peak_tflops=78.64)])
    assert lines(text)[0] == "matmul on toy (model, unvalidated)"
    assert "7 estimated constants" in text
    assert "fp32 1.5 TFLOP/s, bf16 78.6 TFLOP/s" in text
    projected = results_table([dataclasses.replace(TIMED, projected=True)])
    assert lines(projected)[0] == "matmul on toy (model, unvalidated, projected hardware)"
    validated = results_table([dataclasses.replace(TIMED, validated=True)])
    assert lines(validated)[0] == "matmul on toy (model)"


def test_a_failed_case_shows_its_failure_and_no_time():
    failed = dataclasses.replace(RESULT, correct=False, failure="worst at 0", modelled_us=None)
    table = results_table([failed, TIMED])
    assert "NO" in table.splitlines()[3].split()
    assert table.splitlines()[3].split()[-4:] == ["-"] * 4
    assert "FAILED 1x2x3 float32: worst at 0" in table


def test_operators_and_targets_have_their_own_table():
    text = results_table([TIMED, dataclasses.replace(TIMED, target="trn2")])
    assert "matmul on toy (" in text
    assert "matmul on trn2 (" in text


def test_a_name_that_is_too_long_is_cut_visibly():
    table = render([("n" * 200, "1")], ("shape", "x"))
    assert {len(line) for line in table[1:]} == {WIDTH}
    assert table[2].endswith("n… 1")


@pytest.mark.parametrize("op", OPERATORS)
def test_every_named_shape_is_listed_with_its_sizes(op):
    rows = [line.split() for line in lines(shapes_table({op: (OPERATORS[op], DEFAULTS[op])}))]
    for case in cases(op):
        assert any(row[-2:] == [case.name, "x".join(map(str, case.axes.values()))] for row in rows)
