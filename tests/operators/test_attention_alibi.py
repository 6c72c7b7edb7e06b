"""ALiBi: distances computed on chip, on the fast path and on the exact one."""

from __future__ import annotations

import nki.isa as nisa
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from nki_kernels import ops
from nki_kernels.hardware import spec_for
from nki_kernels.machine.errors import OptionError
from nki_kernels.machine.tensor import Abstract
from tests.operators.attentions import DTYPES, check, compare, operands, repaired, run
from tests.strategies.matrices import extents, seeds

TOY = spec_for("toy")


@given(
    h=st.sampled_from([1, 2, 4]),
    m=extents(TOY.moving_fmax, 2 * TOY.moving_fmax + 3),
    n=extents(TOY.partitions, 4 * TOY.partitions + 3),
    slope=st.sampled_from([0.0, 1e-3, 0.11, 0.4, 0.7, 1.8]),
    options=st.fixed_dictionaries(
        {},
        optional={
            "causal": st.booleans(),
            "align": st.sampled_from(["top-left", "bottom-right"]),
            "window": st.integers(1, 40),
            "softcap": st.just(3.0),
        },
    ),
    dtype=st.sampled_from(list(DTYPES)),
    seed=seeds(),
)
def test_slopes_match_the_reference(h, m, n, slope, options, dtype, seed):
    inputs = operands(1, h, 1, m, n, 8, dtype, seed)
    slopes = [slope / (1 + head) for head in range(h)]
    check(inputs, {**options, "slopes": slopes}, f"{options} {slopes}")


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("slope", [0.05, 0.3, 0.9])
def test_real_tiles_match_the_reference_on_the_fast_path(slope, dtype):
    inputs = operands(1, 2, 1, 640, 700, 64, dtype)
    options = {"causal": True, "slopes": (slope, slope / 2)}
    assert not repaired(check(inputs, options, f"{slope}", "trn2"))


@pytest.mark.parametrize("extra", ["sinks", "bias", "mask", "bidirectional", "negative"])
def test_what_the_fast_path_does_not_take_matches_the_reference(extra):
    inputs = operands(1, 2, 2, 40, 37, 8, "float32")
    options = {"causal": extra != "bidirectional", "slopes": (0.5, 0.1)}
    sinks = mask = bias = None
    if extra == "sinks":
        sinks = np.float32([0.5, -2])
    elif extra == "bias":
        bias = np.random.default_rng(0).standard_normal((1, 1, 40, 37)).astype(np.float32)
    elif extra == "mask":
        mask = (np.random.default_rng(0).random((1, 2, 40, 37)) < 0.5).astype(np.uint8)
    elif extra == "negative":
        options["slopes"] = (-0.2, 0.1)
    check((*inputs, sinks, mask, bias), options, extra)


def test_a_slope_too_steep_for_any_cell_takes_the_second_path():
    inputs = operands(1, 1, 1, 600, 600, 8, "float32")
    assert repaired(check(inputs, {"causal": True, "slopes": (90.0,)}, "steep", "trn2"))


def test_a_slope_of_zero_is_none():
    inputs = operands(1, 2, 1, 40, 40, 8, "bfloat16")
    sloped = run(inputs, {"causal": True, "slopes": (0.0, 0.0)}).result
    plain = run(inputs, {"causal": True}).result
    assert [x.tobytes() for x in sloped] == [x.tobytes() for x in plain]


def test_distances_never_leave_the_chip():
    q = Abstract((1, 2, 4096, 128), "bfloat16")
    plain = run((q, q, q), {"causal": True}, "trn2").time()
    sloped = run((q, q, q), {"causal": True, "slopes": (0.1, 0.01)}, "trn2").time()
    assert sloped.hbm_read_bytes == plain.hbm_read_bytes
    assert sloped.hbm_write_bytes == plain.hbm_write_bytes


def test_the_public_call_takes_slopes():
    inputs = operands(1, 2, 1, 20, 24, 8, "float32")
    options = {"causal": True, "slopes": [0.5, 0.25]}
    compare(ops.attention(*inputs, **options, target="toy"), inputs, options, "ops")


@pytest.mark.parametrize(
    ("slopes", "text"),
    [
        ((0.5,), "slopes has 1 entries; one per query head, 2; give them all"),
        (0.5, "slopes is 0.5; one finite number per query head or None is needed"),
        ((), r"slopes is \(\); one finite number per query head or None is needed"),
        ((0.5, np.inf), "one finite number per query head or None is needed"),
    ],
)
def test_illegal_slopes_say_why(slopes, text):
    with pytest.raises(OptionError, match=text):
        run(operands(1, 2, 1, 4, 4, 4, "float32"), {"slopes": slopes})


@pytest.mark.parametrize("wrong", ["bias", "correction"])
def test_a_mutant_is_rejected(wrong, monkeypatch):
    inputs = operands(1, 1, 1, 40, 40, 8, "float32")
    options = {"causal": True, "slopes": (0.3,)}
    check(inputs, options, "right")
    name = "activation" if wrong == "bias" else "scalar_tensor_tensor"
    real = getattr(nisa, name)

    def faulty(*args, **kwargs):
        if wrong == "bias":
            kwargs.pop("bias", None)
        else:
            kwargs["operand0"] = 0.0
        return real(*args, **kwargs)

    monkeypatch.setattr(nisa, name, faulty)
    with pytest.raises(AssertionError, match="worst at"):
        compare(run(inputs, options).result, inputs, options, wrong)
