"""The test pattern of attention_chunked_prefill: properties, the second path, illegal calls."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace

import nki.isa as nisa
import nki.language as nl
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from nki_kernels.hardware import spec_for
from nki_kernels.kernels.attention import chunk_sums, chunked
from nki_kernels.kernels.attention.decode_steps import Constants
from nki_kernels.machine.errors import ConfigError, OptionError, ShapeError
from nki_kernels.operators.attention_chunk import (
    ATTENTION_CHUNKED_PREFILL,
    ChunkConfig,
    attention_chunked_prefill,
)
from tests.operators.test_attention_decode import DTYPES, compare, in_pages, operands
from tests.strategies.matrices import normal, seeds

TOY = spec_for("toy")
TRUTH = st.booleans()
AXES = {"B": 2, "H": 4, "G": 2, "T": 5, "W": 20, "P": 4, "N": 42, "D": 4, "E": 3}
CONFIG = ATTENTION_CHUNKED_PREFILL.configure(AXES, "float32", TOY)


def attend(inputs, page, seed, **keywords):
    q, k, v, lengths = inputs
    *pages, table = in_pages(k, v, page, seed)
    # What is behind the last key names no page.
    table[np.arange(table.shape[1])[None, :] * page >= lengths[:, None]] = -7
    return attention_chunked_prefill(q, *pages, lengths, table, **keywords)


@given(dtype=st.sampled_from(list(DTYPES)), seed=seeds(), g=st.integers(1, 2),
       group=st.integers(1, 3), t=st.integers(1, 40), page=st.sampled_from([1, 2, 4, 16]),
       width=st.integers(1, 12), d=st.integers(1, TOY.partitions + 2), e=st.integers(1, 12),
       window=st.one_of(st.none(), st.integers(1, 20)), sink=TRUTH,
       softcap=st.one_of(st.none(), st.sampled_from([0.5, 3.0])))  # fmt: skip
def test_any_shape_matches_the_reference(
    dtype, seed, g, group, t, page, width, d, e, window, sink, softcap
):
    inputs = operands(seed, 2, g * group, g, t, page * width, d, e, dtype)
    sinks = normal(seed + 9, (g * group,), np.float32) if sink else None
    options = {"window": window, "softcap": softcap}
    got = attend(inputs, page, seed, sinks=sinks, target="toy", **options)
    case = f"{g}x{group}x{t}x{page}x{width}x{d}x{e}"
    compare(got, inputs, case, sinks=sinks, **options)


@pytest.mark.parametrize("target", ["trn1", "trn2", "trn3"])
@pytest.mark.parametrize(
    ("h", "g", "t", "page", "width", "d"),
    [(4, 2, 140, 16, 9, 64), (2, 1, 30, 128, 3, 128), (1, 1, 600, 32, 20, 192)],
)
def test_real_sizes_match_the_reference(h, g, t, page, width, d, target):
    inputs = operands(1, 1, h, g, t, page * width, d, 128, "bfloat16")
    got = attend(inputs, page, 1, target=target)
    compare(got, inputs, f"{h}x{g}x{t}x{page}x{width}x{d}", target)


@given(dtype=st.sampled_from(list(DTYPES)), seed=seeds(), tokens=st.sampled_from([1, 2, 4]),
       blocks=st.integers(1, 3), masks=st.integers(0, 9), lag=st.integers(0, 4),
       hwdge=TRUTH)  # fmt: skip
def test_no_config_changes_the_mathematics(dtype, seed, tokens, blocks, masks, lag, hwdge):
    inputs = operands(seed, 1, 2, 1, 9, 40, 5, 4, dtype)
    config = ChunkConfig(tokens, blocks, 1, masks, lag, hwdge, CONFIG.exact)
    compare(attend(inputs, 4, seed, config=config, target="toy"), inputs, repr(config))


HARD = {
    "one huge key": lambda k: k.__setitem__((..., 5, slice(None)), 100.0),
    "alternating": lambda k: k.__setitem__((..., slice(0, None, 2), slice(None)), -100.0),
    "all far below": lambda k: k.__setitem__(..., -2500.0),
    "all far above": lambda k: k.__setitem__(..., 2500.0),
    "behind the last": lambda k: k.__setitem__((..., slice(30, None), slice(None)), 2500.0),
}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", HARD)
def test_hard_scores_take_the_exact_path(name, dtype):
    q, k, v, _ = operands(4, 2, 4, 2, 9, 36, 4, 4, dtype)
    q[...] = 1.0
    HARD[name](k)
    inputs = (q, k, v, np.array([30, 20], np.int32))
    got = attend(inputs, 4, 4, scale=1.0, target="toy")
    compare(got, inputs, name, scale=1.0)


@pytest.mark.parametrize("factor", [1.0, 1000.0])
def test_the_second_path_runs_only_where_it_must(factor):
    q, k, v, _ = operands(4, 1, 1, 1, 3, 8, 4, 4, "float32")
    q *= np.float32(factor)
    v[...] = 1
    *pages, table = in_pages(k, v, 4, 0)
    inputs = (q, *pages, table, np.array([8], np.int32), None)
    run = ATTENTION_CHUNKED_PREFILL.launch(inputs, {}, target="toy")
    counts = Counter(event.opcode for event in run.trace)
    # decode alone takes reciprocals of a row of columns, and transposes on the Tensor engine.
    assert (counts["nc_transpose"] > 0) == (factor > 1.0)
    assert abs(run.result[0] - 1).max() <= 2.0**-22


def test_sequences_of_no_and_of_few_keys():
    q, k, v, _ = operands(5, 3, 2, 1, 9, 16, 4, 3)
    inputs = (q, k, v, np.array([0, 3, 16], np.int32))
    out, lse = attend(inputs, 4, 5, target="toy")
    compare((out, lse), inputs, "few")
    for rows in (np.s_[0], np.s_[1, :, :6]):
        assert (out[rows] == 0).all()
        assert (lse[rows] == -np.inf).all()
    assert np.isfinite(lse[1, :, 6:]).all()


def test_equal_scores_average_integers_exactly():
    q, k, v, _ = operands(6, 1, 2, 1, 8, 16, 4, 3)
    q[...], v[...] = 0, np.round(v)
    out, _ = attend((q, k, v, np.array([16], np.int32)), 4, 0, target="toy")
    for t in range(8):
        total = v[0, 0, : 9 + t].sum(axis=0, dtype=np.float32)
        assert (out[0, :, t] == total * (np.float32(1) / np.float32(9 + t))).all()


# -- mutants ---------------------------------------------------------------------------------------


def one_more_key(patch):
    real = Constants.__init__

    def longer(self, lengths, queries, config):
        real(self, lengths, queries, config)
        nisa.tensor_scalar(dst=self.steps, data=self.steps, op0=nl.add, operand0=1.0)

    patch.setattr(Constants, "__init__", longer)


def window_off_by_one(patch):
    real = chunked._mask

    def wider(group, state, constants, rule, dtype, config):
        return real(group, state, constants, replace(rule, window=rule.window + 1), dtype, config)

    patch.setattr(chunked, "_mask", wider)


def masks_of_another_sequence(patch):
    real = chunked._mask

    def kept(group, state, constants, rule, dtype, config):
        if state["owner"] is not None:
            state["owner"] = (group["b"], group["span"])
        return real(group, state, constants, rule, dtype, config)

    patch.setattr(chunked, "_mask", kept)


def last_section_only(patch):
    real = chunk_sums.ChunkSums.add
    patch.setattr(
        chunk_sums.ChunkSums, "add", lambda self, o, g: real(self, o, {**g, "fresh": True})
    )


@pytest.mark.parametrize(
    "mutate", [one_more_key, window_off_by_one, masks_of_another_sequence, last_section_only]
)
def test_a_mutant_is_rejected(mutate, monkeypatch):
    q, k, v, _ = operands(3, 2, 4, 2, 9, 80, 4, 4)
    inputs = (q, k, v, np.array([79, 76], np.int32))
    options = {"window": 50, "config": replace(CONFIG, tokens=2, blocks=1)}
    compare(attend(inputs, 4, 3, target="toy", **options), inputs, "right", window=50)
    mutate(monkeypatch)
    got = attend(inputs, 4, 3, target="toy", **options)
    with pytest.raises(AssertionError):
        compare(got, inputs, mutate.__name__, window=50)


# -- the contract ----------------------------------------------------------------------------------


def plain(h=4, g=2, t=9, page=4, e=3):
    q, k, v, lengths = operands(0, 2, h, g, t, 2 * page, 4, e)
    *pages, table = in_pages(k, v, page, 0)
    return q, *pages, lengths, table


ILLEGAL = {
    "heads": (plain(h=3), {}, ShapeError, "3 query heads share 2 key heads; the first must be a m"),
    "group": (plain(h=18), {}, ShapeError, "9 query heads share a key head; at most 8 on toy;"),
    "page": (plain(page=3), {}, ShapeError, "a page has 3 keys; a power of 2 is needed"),
    "values": (plain(e=TOY.psum_bank_bytes // 4), {}, ShapeError,
               "an output row and its sum must fit a PSUM bank, at most"),
    "long": ((*plain()[:3], np.array([9, 0], np.int32), plain()[4]), {}, OptionError,
             "lengths has 9; allowed are 0 to 8, the keys of the cache; cut it"),
    "window": (plain(), {"window": 0}, OptionError, "window is 0; an int of at least 1 or None"),
    "config": (plain(), {"config": 3}, ConfigError, "config is a int; a ChunkConfig is needed"),
    "fields": (plain(), {"config": replace(CONFIG, banks=0)}, ConfigError,
               "config.banks is 0; an int from 1 to"),
    "descriptors": (plain(), {"config": replace(CONFIG, hwdge=True), "target": "trn1"}, ConfigError,
                    "config.hwdge is True; trn1 has no hardware descriptor engine; set it False"),
}  # fmt: skip


@pytest.mark.parametrize("name", ILLEGAL)
def test_an_illegal_call_says_why(name):
    inputs, keywords, error, text = ILLEGAL[name]
    with pytest.raises(error) as caught:
        attention_chunked_prefill(*inputs, **{"target": "toy", **keywords})
    assert text in str(caught.value)


def test_queries_that_do_not_fit_are_refused():
    axes = {**AXES, "H": 128, "G": 1, "T": 512, "D": 128, "E": 128, "P": 16}
    spec = spec_for("trn2")
    (reason,) = ATTENTION_CHUNKED_PREFILL.limits(axes, "bfloat16", spec)
    assert reason.startswith("the queries and sums of a key head take ")
    assert reason.endswith("use attention_decode, which takes queries in parts")


def test_a_production_size_fits_and_counts():
    axes = {"B": 1, "H": 8, "G": 2, "T": 512, "W": 256, "P": 16, "N": 256, "D": 128, "E": 128}
    config = ATTENTION_CHUNKED_PREFILL.configure(axes, "bfloat16", spec_for("trn2"))
    assert (config.tokens, config.blocks, config.banks) == (16, 2, 2)
    assert ATTENTION_CHUNKED_PREFILL.flops(axes) == 4 * 8 * 128 * (512 * 4096 - 512 * 511 // 2)
