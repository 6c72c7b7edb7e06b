"""The test pattern of merge_attention."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import nki_kernels.kernels.attention.merge as kernel
import reference.decode
from nki_kernels.hardware import spec_for
from nki_kernels.machine.errors import ConfigError, ShapeError
from nki_kernels.machine.trace import DmaWork
from nki_kernels.operators.attention_decode import attention_decode
from nki_kernels.operators.merge import MERGE_ATTENTION, MergeConfig, merge_attention
from tests.operators.test_attention_decode import DTYPES
from tests.strategies.matrices import normal, seeds
from tests.tolerance import assert_close

TOY = spec_for("toy")
types = st.sampled_from(list(DTYPES))


def operands(seed, b, h, t, e, dtype="float32", spread=3.0):
    """Return two parts; some rows of each attended nothing."""
    rng = np.random.default_rng(seed)
    found = []
    for part in range(2):
        out = normal(seed + part, (b, h, t, e), DTYPES[dtype])
        lse = (spread * rng.standard_normal((b, h, t))).astype(np.float32)
        empty = rng.random(lse.shape) < 0.2
        lse[empty] = -np.inf
        out[empty] = 0
        found += [out, lse]
    return found


def compare(got, inputs, case):
    refs = reference.decode.merge_attention(*inputs)
    for name, result, ref in zip(("out", "lse"), got, refs, strict=True):
        assert_close(
            result, ref.value, ref.magnitude, op=name, case=case,
            roundings=MERGE_ATTENTION.roundings, chain=MERGE_ATTENTION.chain({}, TOY),
        )  # fmt: skip


@given(dtype=types, seed=seeds(), b=st.integers(1, 2), h=st.integers(1, 3), t=st.integers(1, 30),
       e=st.integers(1, 40), spread=st.sampled_from([0.1, 3.0, 100.0]))  # fmt: skip
def test_any_shape_matches_the_reference(dtype, seed, b, h, t, e, spread):
    inputs = operands(seed, b, h, t, e, dtype, spread)
    compare(merge_attention(*inputs, target="toy"), inputs, f"{b}x{h}x{t}x{e}")


@pytest.mark.parametrize("target", ["trn1", "trn2", "trn3"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_real_sizes_match_the_reference(dtype, target):
    inputs = operands(1, 2, 8, 150, 128, dtype)
    compare(merge_attention(*inputs, target=target), inputs, dtype)


@given(seed=seeds(), section=st.integers(1, 9), rows=st.integers(1, 4), ahead=st.integers(0, 3),
       hwdge=st.booleans())  # fmt: skip
def test_no_config_changes_a_bit(seed, section, rows, ahead, hwdge):
    inputs = operands(seed, 1, 3, 29, 5)
    want = merge_attention(*inputs, target="toy")
    config = MergeConfig(section, rows, ahead, hwdge)
    got = merge_attention(*inputs, config=config, target="toy")
    assert all(a.tobytes() == b.tobytes() for a, b in zip(got, want, strict=True))


@given(seed=seeds(), dtype=types)
def test_nothing_is_neutral_and_the_parts_may_change_places(seed, dtype):
    a, la, b, lb = operands(seed, 1, 2, 9, 4, dtype)
    nothing = np.zeros_like(a), np.full_like(la, -np.inf)
    out, lse = merge_attention(a, la, *nothing, target="toy")
    assert (out == a).all()
    assert (lse == la).all()
    one, other = (merge_attention(*x, target="toy") for x in ((a, la, b, lb), (b, lb, a, la)))
    assert (one[1] == other[1]).all()
    compare(other, (a, la, b, lb), "swapped")


@given(seed=seeds(), cut=st.integers(1, 20))
def test_parts_of_a_cache_merge_to_the_whole(seed, cut):
    q, k, v = (normal(seed + i, (1, 2, n, 4), np.float32) for i, n in enumerate((1, 21, 21)))
    parts, whole = [], attention_decode(q, k, v, np.array([21], np.int32), target="toy")
    for part in (slice(0, cut), slice(cut, 21)):
        keys, values = (np.ascontiguousarray(x[:, :, part]) for x in (k, v))
        length = np.array([keys.shape[2]], np.int32)
        parts += attention_decode(q, keys, values, length, target="toy")
    got = merge_attention(*parts, target="toy")
    refs = reference.decode.attention_decode(
        q, k, v, np.array([21], np.int32), depth=TOY.partitions
    )
    for result, exact, ref in zip(got, whole, refs, strict=True):
        # Each part has its own bound, the merge another.
        for found in (result, exact):
            assert_close(found, ref.value, ref.magnitude, op="merged", case=str(cut),
                         roundings=4, chain=12)  # fmt: skip


def test_equal_parts_average_exactly():
    out = np.arange(24, dtype=np.float32).reshape(1, 2, 3, 4)
    lse = np.zeros((1, 2, 3), np.float32)
    got, _ = merge_attention(out, lse, 3 * out, lse, target="toy")
    assert (got == 2 * out).all()


def test_bytes_and_instructions():
    inputs = operands(0, 2, 4, 256, 64, "bfloat16")
    run = MERGE_ATTENTION.launch(inputs, {}, target="trn2")
    moved = [event.work for event in run.trace if isinstance(event.work, DmaWork)]
    assert sum(work.hbm_read_bytes for work in moved) == sum(x.nbytes for x in inputs)
    assert sum(work.hbm_write_bytes for work in moved) == inputs[0].nbytes + inputs[1].nbytes
    opcodes = [event.opcode for event in run.trace]
    # 16 rows a partition; two exponentials and a logarithm.
    assert opcodes.count("activation") == 16 + 3
    assert opcodes.count("scalar_tensor_tensor") == 16 + 1


@pytest.mark.parametrize(("name", "value"), [("_FLOOR", 0.5), ("_LOWEST", -1.0)])
def test_a_mutant_is_rejected(name, value, monkeypatch):
    inputs = operands(3, 1, 2, 20, 4, spread=20.0)
    compare(merge_attention(*inputs, target="toy"), inputs, "right")
    monkeypatch.setattr(kernel, name, value)
    got = merge_attention(*inputs, target="toy")
    with pytest.raises(AssertionError):
        compare(got, inputs, name)


def test_illegal_calls_say_why():
    inputs = operands(0, 1, 1, 2, 4)
    with pytest.raises(ConfigError, match=r"config is a int; a MergeConfig is needed"):
        merge_attention(*inputs, config=3, target="toy")
    with pytest.raises(ConfigError, match=r"config.rows is 0; an int from 1 on is needed"):
        merge_attention(*inputs, config=MergeConfig(1, 0, 0, False), target="toy")
    with pytest.raises(ConfigError, match=r"config.hwdge is True; trn1 has no hardware descriptor"):
        merge_attention(*inputs, config=MergeConfig(1, 1, 0, True), target="trn1")
    with pytest.raises(ShapeError, match=r"a row of E = 60000 takes .* split the rows along E"):
        merge_attention(*operands(0, 1, 1, 1, 60000, "bfloat16"), target="trn2")
