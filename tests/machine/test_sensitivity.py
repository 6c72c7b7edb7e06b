"""Times at the bounds of uncertain numbers."""

from __future__ import annotations

import pytest

from nki_kernels.hardware import TOY, TRN1, TRN2, TRN3, CoreSpec, Engine
from nki_kernels.machine.sensitivity import sensitivity, uncertain
from tests.machine.trace_builder import Builder, view

V, S = Engine.vector, Engine.scalar


def _two_engines(spec: CoreSpec = TRN2) -> Builder:
    b = Builder(spec)
    x, y = b.tile(64, 64), b.tile(64, 64)
    b.dma(view(x), view(b.tile(64, 64, memory="hbm")))
    for _ in range(4):
        b.copy(y, x, V)
        b.copy(x, y, S)
    return b


@pytest.mark.parametrize("spec", [TRN1, TRN2, TRN3, TOY], ids=lambda s: s.name)
def test_only_numbers_with_a_bound_are_varied(spec: CoreSpec) -> None:
    origins = spec.origins()
    names = uncertain(spec)
    assert names
    for name, origin in origins.items():
        assert (name in names) == (origin.low is not None or origin.high is not None)


def test_an_effect_is_the_time_with_that_number_at_its_bound() -> None:
    found = sensitivity(_two_engines().trace)
    effect = found.effects["sync.other_engine_ns"]
    # Seven handoffs between the two engines lie on the only path.
    origin = effect.origin
    assert origin.low is not None
    assert origin.high is not None
    for time, bound in ((effect.low_ns, origin.low), (effect.high_ns, origin.high)):
        expected = 7 * (bound - TRN2.sync.other_engine_ns)
        assert round(time - found.nominal_ns, 3) == round(expected, 3)


def test_the_band_contains_every_single_effect() -> None:
    found = sensitivity(_two_engines().trace)
    assert found.fastest_ns < found.nominal_ns < found.slowest_ns
    for effect in found.effects.values():
        assert found.fastest_ns <= min(effect.low_ns, effect.high_ns)
        assert found.slowest_ns >= max(effect.low_ns, effect.high_ns)


def test_the_largest_effects_come_first_and_idle_ones_not_at_all() -> None:
    found = sensitivity(_two_engines().trace)
    spans = [
        max(e.low_ns, e.high_ns, found.nominal_ns) - min(e.low_ns, e.high_ns, found.nominal_ns)
        for e in found.largest
    ]
    assert spans == sorted(spans, reverse=True)
    assert spans[-1] > 0
    assert "pe.ldw_cycles" in found.effects
    assert "pe.ldw_cycles" not in {e.name for e in found.largest}
