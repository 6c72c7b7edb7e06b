"""Packed sequences: boundaries are values, only the longest length is a constant."""

from __future__ import annotations

import itertools

import nki.isa as nisa
import nki.language as nl
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from nki_kernels import ops
from nki_kernels.hardware import spec_for
from nki_kernels.machine.errors import OptionError, ShapeError
from nki_kernels.machine.tensor import Abstract
from nki_kernels.operators.attention_varlen import ATTENTION_VARLEN, CAUSAL_ATTENTION_VARLEN
from reference.attention import attention_varlen as reference
from tests.operators.attentions import DTYPES, compare, operands, repaired
from tests.strategies.matrices import extents, seeds
from tests.tolerance import assert_close

TOY = spec_for("toy")


def launch(inputs, cuts, options, target="toy"):
    causal = options.get("causal", False)
    op = CAUSAL_ATTENTION_VARLEN if causal else ATTENTION_VARLEN
    longest = max(1, int(np.diff(cuts, append=inputs[0].shape[2]).max()))
    return op.launch((*inputs, cuts), {"max_seqlen": longest, **options}, target=target)


def check(inputs, cuts, options, case, target="toy"):
    launched = launch(inputs, cuts, options, target)
    found = reference(*inputs, cuts, **options)
    for name, got, want in zip(("out", "lse"), launched.result, found, strict=True):
        assert_close(
            got, want.value, want.magnitude, op=f"attention_varlen {name}", case=case,
            roundings=ATTENTION_VARLEN.roundings, chain=1,
        )  # fmt: skip
    return launched


@given(
    m=extents(TOY.moving_fmax, 3 * TOY.moving_fmax + 3),
    fractions=st.lists(st.floats(0, 1), max_size=5),
    tail=st.booleans(),
    h=st.sampled_from([1, 2]),
    options=st.fixed_dictionaries(
        {"causal": st.booleans()},
        optional={
            "window": st.integers(1, 20),
            "softcap": st.just(3.0),
            "scale": st.sampled_from([0.3, 300.0]),
        },
    ),
    dtype=st.sampled_from(list(DTYPES)),
    seed=seeds(),
)
def test_any_lengths_match_the_reference(m, fractions, tail, h, options, dtype, seed):
    cuts = [0, *sorted(int(part * m) for part in fractions)] + ([] if tail else [m])
    inputs = operands(1, h, 1, m, m, 8, dtype, seed)
    check(inputs, np.array(cuts, np.int32), options, f"{cuts} {options}")


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("causal", [False, True])
def test_real_tiles_match_the_reference(causal, dtype):
    inputs = operands(1, 1, 1, 700, 700, 64, dtype)
    cuts = np.array([0, 1, 130, 512, 512, 660, 700], np.int32)
    assert not repaired(check(inputs, cuts, {"causal": causal}, "tiles", "trn2"))


def test_each_sequence_is_as_if_alone():
    inputs = operands(1, 2, 1, 50, 50, 8, "float32")
    cuts = np.array([0, 17, 30, 50], np.int32)
    out, lse = launch(inputs, cuts, {"causal": True}).result
    for start, stop in itertools.pairwise(cuts):
        alone = tuple(np.ascontiguousarray(x[:, :, start:stop]) for x in inputs)
        compare((out[:, :, start:stop], lse[:, :, start:stop]), alone, {"causal": True}, "alone")


def test_one_kernel_serves_all_boundaries():
    inputs = operands(1, 1, 1, 50, 50, 8, "bfloat16")
    traces = [
        [(e.opcode, e.engine) for e in launch(inputs, np.array(cuts, np.int32), options).trace]
        for options in ({"max_seqlen": 30},)
        for cuts in ([0, 20, 50], [0, 25, 25], [0, 30, 45])
    ]
    assert traces[0] == traces[1] == traces[2]


def test_cost_follows_the_longest_length():
    q, cuts = Abstract((1, 1, 8192, 64), "bfloat16"), np.arange(0, 8193, 512, dtype=np.int32)

    def macs(longest):
        run = launch((q, q, q), cuts, {"causal": True, "max_seqlen": longest}, "trn2")
        return sum(e.work.macs for e in run.trace if e.opcode == "nc_matmul")

    assert macs(512) < 0.2 * macs(8192)


def test_a_mutant_is_rejected(monkeypatch):
    inputs = operands(1, 1, 1, 50, 50, 8, "float32")
    cuts, options = np.array([0, 17, 50], np.int32), {"causal": True}
    check(inputs, cuts, options, "right")
    real = nisa.tensor_scalar

    def off_by_one(*args, **kwargs):
        if kwargs.get("op0") is nl.subtract:
            kwargs["operand0"] = kwargs["operand0"] - 1.0
        return real(*args, **kwargs)

    monkeypatch.setattr(nisa, "tensor_scalar", off_by_one)
    with pytest.raises(AssertionError, match="worst at"):
        check(inputs, cuts, options, "wrong")


def test_the_public_call():
    inputs = operands(1, 2, 1, 20, 20, 8, "float32")
    cuts = np.array([0, 8, 20], np.int32)
    options = {"causal": True, "window": 5, "scale": 0.5}
    found = ops.attention_varlen(*inputs, cuts, max_seqlen=12, **options, target="toy")
    for got, want in zip(found, reference(*inputs, cuts, **options), strict=True):
        assert_close(got, want.value, want.magnitude, op="ops", case="ops", roundings=1, chain=1)


@pytest.mark.parametrize(
    ("cuts", "longest", "text"),
    [
        ([1, 8], 8, r"cu_seqlens is \[1, 8\]; it must begin with 0, never fall and end by 8"),
        ([0, 5, 4, 8], 8, "it must begin with 0, never fall and end by 8"),
        ([0, 9], 8, "it must begin with 0, never fall and end by 8"),
        ([0, 5, 8], 4, "sequence 0 has 5 tokens and max_seqlen is 4; no sequence, nor the tokens"),
        ([0, 2], 4, "sequence 1 has 6 tokens and max_seqlen is 4"),
        ([0, 8], 0, "max_seqlen is 0; an int of at least 1 is needed"),
        ([0, 8], None, "max_seqlen is None; an int of at least 1 is needed"),
    ],
)
def test_illegal_boundaries_say_why(cuts, longest, text):
    inputs = operands(1, 1, 1, 8, 8, 4, "float32")
    with pytest.raises(OptionError, match=text):
        launch(inputs, np.array(cuts, np.int32), {"max_seqlen": longest})


def test_more_tokens_than_float32_counts_say_why():
    q, cuts = Abstract((1, 1, 2**24 + 1, 4), "bfloat16"), np.array([0, 2**24 + 1], np.int32)
    with pytest.raises(ShapeError, match="16777217 tokens; at most 16777216, whose numbers"):
        launch((q, q, q), cuts, {})
