"""What attention costs as sequences grow: no cliff, no growth of SBUF; and adversarial scores."""

from __future__ import annotations

import numpy as np
import pytest

from nki_kernels.hardware import spec_for
from nki_kernels.machine.tensor import Abstract
from nki_kernels.operators.attention import ATTENTION
from tests.operators.attentions import DTYPES, check, operands, repaired, run

LENGTHS = (1024, 2048, 4096, 8192)


@pytest.fixture(scope="module")
def launches():
    found = {}
    for length in LENGTHS:
        q = Abstract((1, 1, length, 128), "bfloat16")
        found[length] = run((q, q, q), {"causal": True}, "trn2")
    return found


def test_time_is_a_square_law_without_a_cliff(launches):
    """The three shorter lengths give a, b and c of a S^2 + b S + c; the longest must lie on it.

    To 65536 the largest distance from a fit of all lengths is 0.16 % (16,756 us there).
    """
    times = [launches[length].time().total_ns for length in LENGTHS]
    a, b, c = np.linalg.solve(np.vander(LENGTHS[:3]).astype(float), times[:3])
    assert min(a, b, c) > 0
    assert abs(a * LENGTHS[3] ** 2 + b * LENGTHS[3] + c - times[3]) < times[3] / 100


def test_instructions_grow_no_faster_than_pairs(launches):
    counts = [len(launches[length].trace) for length in LENGTHS]
    # Five products and an exponential for two tiles, and 16 instructions a block.
    for length, count in zip(LENGTHS, counts, strict=True):
        pairs, blocks = (length / 512) * (length / 128 + 4) / 2, length / 512
        assert count < 5.5 * pairs + 20 * blocks + 40


def test_keys_stay_in_sbuf_while_they_take_a_third_of_it(launches):
    spec = spec_for("trn2")
    for length in LENGTHS:
        assert launches[length].placement.peak_sbuf_bytes < spec.sbuf_usable_bytes / 2
    axes = {"B": 1, "H": 1, "G": 1, "D": 128, "E": 128}
    resident = {
        length: ATTENTION.configure({**axes, "M": length, "N": length}, "bfloat16", spec).resident
        for length in (8192, 16384, 32768, 65536)
    }
    assert resident == {8192: True, 16384: True, 32768: False, 65536: False}


@pytest.mark.parametrize("causal", [False, True])
def test_keys_that_are_loaded_anew_leave_room(causal):
    """The longest sequences in small: with few resident keys SBUF holds the loads of a block."""
    toy = spec_for("toy")
    inputs = operands(1, 1, 1, 400, 400, 8, "bfloat16")
    axes = ATTENTION.axes(*(x.shape for x in inputs))
    assert not ATTENTION.configure(axes, "bfloat16", toy).resident
    launched = check(inputs, {"causal": causal}, "long")
    assert launched.placement.peak_sbuf_bytes < toy.sbuf_usable_bytes


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", ["huge key", "equal keys", "alternating", "first", "last", "low"])
@pytest.mark.parametrize("causal", [False, True])
def test_logits_of_ten_thousand_match_the_reference(kind, dtype, causal):
    q, k, v = operands(1, 2, 1, 40, 41, 8, dtype)
    # q·k is 8 in units of the amount.
    q[...], amount = 1, 1250
    k[...] = np.sign(k) / 8
    if kind == "huge key":
        k[:, :, 20] = amount
    elif kind == "equal keys":
        k[...] = amount
    elif kind == "alternating":
        k[...] = (np.where(np.arange(41) % 2, 1, -1) * amount)[:, None]
    elif kind == "low":
        k[...] = -amount
    else:
        k[:, :, 0 if kind == "first" else -1] = amount
    launched = check((q, k, v), {"causal": causal, "scale": 1.0}, kind)
    # With causal no query but the last could see the last key, and none of 40 does.
    assert repaired(launched) or (kind == "last" and causal)
