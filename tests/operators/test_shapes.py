from __future__ import annotations

import pytest

from nki_kernels.machine.errors import ShapeError
from nki_kernels.operators import OPERATORS
from nki_kernels.operators.shapes import DEFAULTS, MODELS, cases, parse

MATMUL = OPERATORS["matmul"]


@pytest.mark.parametrize(
    ("name", "mnk"),
    [
        ("llama3-8b:prefill:qkv", (4096, 6144, 4096)),
        ("llama3-8b:decode:down", (16, 4096, 14336)),
        ("llama3-70b:prefill:gate-up", (4096, 57344, 8192)),
        ("qwen3-8b:decode:lm-head", (16, 151936, 4096)),
        ("qwen3-30b-a3b:prefill:expert-gate-up", (256, 1536, 2048)),
        ("qwen3-30b-a3b:decode:expert-down", (1, 2048, 768)),
        ("mixtral-8x7b:prefill:router", (4096, 8, 4096)),
        ("gpt-oss-20b:prefill:qkv", (4096, 5120, 2880)),
        ("minilm-l6:prefill:up", (4096, 1536, 384)),
    ],
)
def test_a_named_shape_has_the_sizes_of_its_model(name, mnk):
    assert tuple(parse(MATMUL, name).axes.values()) == mnk


@pytest.mark.parametrize(
    ("op", "name", "rows_and_length"),
    [
        ("rms_norm", "llama3-70b:prefill:hidden", (4096, 8192)),
        ("rms_norm", "gpt-oss-20b:decode:hidden", (16, 2880)),
        ("rms_norm", "qwen3-8b:prefill:q-norm", (131072, 128)),
        ("rms_norm", "qwen3-30b-a3b:decode:k-norm", (64, 128)),
        ("layer_norm", "minilm-l6:prefill:hidden", (4096, 384)),
    ],
)
def test_a_norm_has_the_rows_of_its_model(op, name, rows_and_length):
    assert tuple(parse(OPERATORS[op], name).axes.values()) == rows_and_length


def test_each_model_has_its_own_norm():
    for model in MODELS:
        for op in ("rms_norm", "layer_norm"):
            phases = {case.name.split(":")[1] for case in cases(op, model.name, "hidden")}
            wanted = {"prefill", "decode"} if model.decodes else {"prefill"}
            assert phases == (wanted if model.norm == op else set())
    assert {case.name.split(":")[0] for case in cases("rms_norm", "q-norm")} == {
        "qwen3-8b", "qwen3-30b-a3b",
    }  # fmt: skip


@pytest.mark.parametrize("op", ["rms_norm", "layer_norm"])
def test_a_norm_is_timed_by_default_where_it_is_hard(op):
    assert {"4096x4096", "2048x16384", "8192x2880"} <= set(DEFAULTS[op])
    assert parse(OPERATORS[op], "7x300").axes == {"N": 7, "H": 300}


def test_every_model_has_its_phases_and_tags_select_them():
    for model in MODELS:
        assert cases("matmul", model.name, "prefill")
        assert bool(cases("matmul", model.name, "decode")) == model.decodes
    for case in cases("matmul", "decode"):
        assert case.name.split(":")[1] == "decode"
        assert min(case.axes.values()) >= 1
        assert tuple(case.axes) == MATMUL.axis_order


@pytest.mark.parametrize("op", OPERATORS)
def test_every_operator_has_cases_and_defaults_that_parse(op):
    assert cases(op)
    for name in DEFAULTS[op]:
        assert parse(OPERATORS[op], name).name == name


def test_a_free_form_shape_lists_the_axes_in_order():
    case = parse(MATMUL, "1x20x300")
    assert case.axes == {"M": 1, "N": 20, "K": 300}
    assert case.tags == {"free"}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("2048x2048", r"'2048x2048' has 2 sizes; 3 are needed, in the order MxNxK"),
        ("1x2x3x4", r"has 4 sizes; 3 are needed"),
        ("0x2x3", r"'0x2x3' has a size below 1; every axis \(MxNxK\) must be at least 1"),
        ("4x-2x3", r"has a size below 1"),
        ("", r"'' is neither a named shape nor MxNxK; write for example 2048x2048x2048"),
        ("axbxc", r"is neither a named shape nor MxNxK"),
        ("2x3x4\n", r"is neither a named shape"),
        ("2x3x٤", r"is neither a named shape"),
        ("llama3-8b:prefil:qkv", r"close names: llama3-8b:prefill:qkv"),
    ],
)
def test_a_shape_that_does_not_parse_says_what_would(text, message):
    with pytest.raises(ShapeError, match=message):
        parse(MATMUL, text)
