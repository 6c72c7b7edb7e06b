"""The law table: what is in it, and each step of the rule that picks a row."""

from __future__ import annotations

import pytest

from nki_kernels.hardware import TRN1, TRN2, TRN3
from nki_kernels.hardware.laws import Operand

FP32, BF16 = Operand("float32", "sbuf"), Operand("bfloat16", "sbuf")
PSUM = Operand("float32", "psum")
TABLE = TRN2.op_laws


def test_all_rows_are_there() -> None:
    assert len(TABLE) == 69
    assert {law.engine for law in TABLE.laws} == {"ACT", "DVE", "Pool"}
    assert len(TRN1.op_laws) == len(TRN3.op_laws) == 0


def startup(*args: object, **kwargs: object) -> float:
    match = TABLE.find(*args, **kwargs)  # type: ignore[arg-type]
    assert match is not None
    return match.law.startup_ns


@pytest.mark.parametrize(
    ("source", "output", "expected"),
    [
        (FP32, FP32, 160.5),
        (FP32, BF16, 155.5),
        (BF16, BF16, 155.7),
        (Operand("float16", "sbuf"), Operand("float16", "sbuf"), 155.7),
        (BF16, FP32, 152.7),
        (PSUM, FP32, 156.0),
        (FP32._replace(step=2), FP32, 161.33),
        (BF16._replace(step=2), BF16, 141.67),
    ],
)
def test_operands_choose(source: Operand, output: Operand, expected: float) -> None:
    assert startup("tensor_copy", "DVE", 128, sources=(source,), output=output) == expected


def test_no_row_for_unmeasured_operands() -> None:
    wide = Operand("int32", "sbuf")
    assert TABLE.find("tensor_scalar", "DVE", 128, sources=(wide,), output=wide) is None
    assert TABLE.find("tensor_copy", "Pool", 128, sources=(FP32,), output=FP32) is None
    assert TABLE.find("no such", "DVE", 128) is None


def test_function_chooses_and_unmeasured_ones_take_the_table_walk() -> None:
    ask = {"sources": (FP32,), "output": FP32}
    copy = TABLE.find("activation", "ACT", 128, function="copy", **ask)  # type: ignore[arg-type]
    gelu = TABLE.find("activation", "ACT", 128, function="gelu", **ask)  # type: ignore[arg-type]
    exp = TABLE.find("activation", "ACT", 128, function="exp", **ask)  # type: ignore[arg-type]
    assert copy is not None
    assert gelu is not None
    assert exp is not None
    assert (copy.law.startup_ns, copy.exact) == (202.2, True)
    assert (exp.law.startup_ns, exp.exact) == (293.47, True)
    assert gelu.law is exp.law
    assert not gelu.exact


def test_window_reduction_only_when_asked() -> None:
    ask = {"sources": (FP32,), "output": FP32}
    assert startup("tensor_reduce", "DVE", 600, function="add", **ask) == 152.5
    window = "max 2-axis window"
    assert startup("tensor_reduce", "DVE", 600, function=window, **ask) == 142.4


@pytest.mark.parametrize(("n", "expected"), [(1, 279.1), (63, 279.1), (64, 293.39), (2048, 293.39)])
def test_short_n_takes_the_narrow_fit(n: int, expected: float) -> None:
    ask = {"sources": (FP32,), "output": FP32, "function": "rsqrt"}
    assert startup("activation", "ACT", n, **ask) == expected


@pytest.mark.parametrize(
    ("n", "expected"), [(64, 189.2), (127, 189.2), (128, 190.33), (9999, 190.33)]
)
def test_domain_chooses_then_width(n: int, expected: float) -> None:
    assert startup("tensor_copy", "ACT", n, sources=(FP32,), output=FP32) == expected


@pytest.mark.parametrize(("partitions", "expected"), [(4, 290.7), (32, 293.47), (128, 293.47)])
def test_partitions_choose(partitions: int, expected: float) -> None:
    ask = {"sources": (FP32,), "output": FP32, "function": "exp", "partitions": partitions}
    assert startup("activation", "ACT", 256, **ask) == expected
