"""Specs: every number has an origin, targets have names, bounds and variants work."""

from __future__ import annotations

from dataclasses import fields

import pytest

from nki_kernels.hardware import TARGETS, TOY, TRN1, TRN2, TRN3, CoreSpec, spec_for
from nki_kernels.hardware.origin import Sourced, documented, estimated, measured

SPECS = [TRN1, TRN2, TRN3, TOY]
IDS = [spec.name for spec in SPECS]


def numbers(record: Sourced, prefix: str = "") -> dict[str, object]:
    """Every numeric field of a spec by dotted name."""
    found: dict[str, object] = {}
    for f in fields(record):
        value = getattr(record, f.name)
        if isinstance(value, Sourced):
            found |= numbers(value, f"{prefix}{f.name}.")
        elif isinstance(value, int | float | tuple) and not isinstance(value, bool):
            found[prefix + f.name] = value
    return found


@pytest.mark.parametrize("spec", SPECS, ids=IDS)
def test_every_number_has_an_origin(spec: CoreSpec) -> None:
    assert set(numbers(spec)) <= set(spec.origins())
    assert all(origin.source for origin in spec.origins().values())


@pytest.mark.parametrize("spec", SPECS, ids=IDS)
def test_bounds_contain_the_value(spec: CoreSpec) -> None:
    values = numbers(spec)
    for name, origin in spec.origins().items():
        value = values.get(name)
        if origin.low is not None:
            assert origin.low <= value, name
        if origin.high is not None:
            assert value <= origin.high, name


@pytest.mark.parametrize("spec", SPECS, ids=IDS)
def test_sizes_divide(spec: CoreSpec) -> None:
    assert spec.dma_engines * spec.partitions_per_dma_engine == spec.partitions
    assert spec.partitions % spec.quadrant == 0
    assert spec.sbuf_usable_bytes <= spec.sbuf_bytes
    assert spec.psum_bank_bytes == 4 * spec.moving_fmax
    assert spec.pe.rows == spec.partitions
    assert spec.pe.columns == spec.stationary_fmax


@pytest.mark.parametrize("name", sorted(TARGETS))
def test_targets(name: str) -> None:
    assert spec_for(name) is TARGETS[name]


def test_unknown_target_lists_the_names() -> None:
    with pytest.raises(ValueError, match=r"target 'trn9': unknown; allowed are trn1, inf2, gen2"):
        spec_for("trn9")


@pytest.mark.parametrize(
    ("spec", "dtype", "tflops"),
    [
        (TRN1, "bfloat16", 91.75),
        (TRN1, "float32", 22.94),
        (TRN2, "bfloat16", 78.64),
        (TRN2, "float16", 78.64),
        (TRN2, "float32", 19.66),
        (TRN2, "tfloat32", 78.64),
        (TRN2, "float8_e4m3", 157.29),
        (TRN3, "float8_e4m3fn_x4", 314.57),
    ],
)
def test_peaks(spec: CoreSpec, dtype: str, tflops: float) -> None:
    assert f"{spec.peak_tflops(dtype):.2f}" == f"{tflops:.2f}"


def test_borrowed_measurements_are_estimates() -> None:
    assert TRN3.projected
    assert not [n for n, o in TRN3.origins().items() if o.kind == "measured"]
    assert TRN2.origins()["pe.drain_ns"].kind == "measured"
    assert TRN1.origins()["pe.ldw_fp32_cycles"].kind == "estimated"
    assert TRN1.origins()["pe.ldw_fp32_cycles"].source.startswith("as trn2: ")


def test_with_bounds_changes_one_number_and_keeps_its_origin() -> None:
    slow = TRN2.with_bounds("pe.ldw_cycles", "high")
    assert (slow.pe.ldw_cycles, TRN2.pe.ldw_cycles) == (1.0, 0.25)
    assert slow.origins() == TRN2.origins()
    before, after = numbers(TRN2), numbers(slow)
    assert {n for n in before if before[n] != after[n]} == {"pe.ldw_cycles"}
    assert TRN2.with_bounds("pe.ldw_cycles", "low").pe.ldw_cycles == TRN2.pe.ldw_cycles


def test_with_bounds_says_what_is_missing() -> None:
    with pytest.raises(KeyError, match=r"CoreSpec has no number 'pe\.speed'; see origins\(\)"):
        TRN2.with_bounds("pe.speed", "low")
    with pytest.raises(ValueError, match=r"pe\.clock_ghz \(documented: .*\) states no low bound"):
        TRN2.with_bounds("pe.clock_ghz", "low")


def test_a_number_without_origin_is_an_error() -> None:
    message = r"CoreSpec\.partitions=64 has no origin; wrap it in documented\(\), measured\(\) or"
    with pytest.raises(TypeError, match=message):
        TRN2.derive(partitions=64)


@pytest.mark.parametrize("state", [documented, measured, estimated])
def test_derive_takes_a_stated_number(state: object) -> None:
    spec = TRN2.derive(partitions=state(64, "a test", low=1, high=99))  # type: ignore[operator]
    origin = spec.origins()["partitions"]
    assert (spec.partitions, origin.source, origin.low, origin.high) == (64, "a test", 1, 99)
    assert origin.kind == state.__name__  # type: ignore[attr-defined]
    assert spec.quadrant == TRN2.quadrant
