"""The reference of attention: the formula term by term, PyTorch's SDPA, and its invariances."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from reference.attention import attends, attention, attention_varlen
from tests.strategies.matrices import normal, seeds

sizes = {
    "b": st.integers(1, 2),
    "g": st.integers(1, 2),
    "group": st.integers(1, 2),
    "m": st.integers(1, 5),
    "n": st.integers(1, 6),
    "seed": seeds(),
}
patterns = st.fixed_dictionaries(
    {},
    optional={
        "causal": st.booleans(),
        "align": st.sampled_from(["top-left", "bottom-right"]),
        "window": st.integers(1, 7),
    },
)

#: float64 keeps this share of the terms' sum through every sum here.
EXACT = 1e-12


def operands(b, g, group, m, n, seed):
    shapes = [(b, g * group, m, 3), (b, g, n, 3), (b, g, n, 2)]
    return tuple(normal(seed + at, shape, np.float32) for at, shape in enumerate(shapes))


def agree(found, want):
    """Compare two (out, lse) of references; -inf equals itself."""
    for one, two in zip(found, want, strict=True):
        finite = np.isfinite(two.value)
        assert (one.value[~finite] == two.value[~finite]).all()
        error = np.abs(one.value[finite] - two.value[finite])
        assert (error <= EXACT * (two.magnitude[finite] + 1)).all()


def seen_by(i, m, n, *, causal=False, align="top-left", window=None):
    """List the keys of query i, from the words of the public call."""
    p = i + n - m if align == "bottom-right" else i
    keys = [j for j in range(n) if not causal or j <= p]
    if window is not None:
        keys = [j for j in keys if j > p - window and (causal or j < p + window)]
    return keys


@given(
    options=patterns, softcap=st.sampled_from([None, 1.5]), extra=st.booleans(),
    slope=st.sampled_from([None, 0.3]), **sizes,
)  # fmt: skip
def test_every_row_is_the_formula(b, g, group, m, n, seed, options, softcap, extra, slope):
    q, k, v = operands(b, g, group, m, n, seed)
    rng = np.random.default_rng(seed)
    sinks = mask = bias = slopes = None
    if extra:
        sinks = rng.standard_normal(g * group).astype(np.float32)
        mask = rng.random((b, 1, m, n)) < 0.7
        bias = rng.standard_normal((1, g * group, m, n)).astype(np.float32)
    if slope is not None:
        slopes = [slope * (h + 1) for h in range(g * group)]
    out, lse = attention(
        q, k, v, sinks, mask, bias, scale=0.5, softcap=softcap, slopes=slopes, **options
    )
    shift = n - m if options.get("align") == "bottom-right" else 0
    for i, h, row in np.ndindex(b, g * group, m):
        keys = seen_by(row, m, n, **options)
        if mask is not None:
            keys = [j for j in keys if mask[i, 0, row, j]]
        scores = []
        for j in keys:
            s = 0.5 * math.fsum(q[i, h, row] * k[i, h // group, j].astype(float))
            s = softcap * math.tanh(s / softcap) if softcap else s
            if slopes is not None:
                s -= float(np.float32(slopes[h])) * abs(row + shift - j)
            scores.append(s if bias is None else s + float(bias[0, h, row, j]))
        terms = [math.exp(s) for s in scores]
        total = math.fsum(terms if sinks is None else [*terms, math.exp(sinks[h])])
        if total == 0:
            assert lse.value[i, h, row] == -np.inf
            assert (out.value[i, h, row] == 0).all()
            continue
        assert abs(lse.value[i, h, row] - math.log(total)) <= EXACT * lse.magnitude[i, h, row]
        for e in range(2):
            want = math.fsum(
                p * float(v[i, h // group, j, e]) for p, j in zip(terms, keys, strict=True)
            )
            error = abs(out.value[i, h, row, e] - want / total)
            assert error <= EXACT * (out.magnitude[i, h, row, e] + 1)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize(("h", "g"), [(2, 2), (6, 2)])
def test_it_is_the_attention_of_pytorch(h, g, masked, causal):
    torch = pytest.importorskip("torch")
    rng = np.random.default_rng(h + masked)
    q, k, v = (rng.standard_normal(s) for s in ((2, h, 7, 5), (2, g, 7, 5), (2, g, 7, 4)))
    mask = rng.random((2, 1, 7, 7)) < 0.6
    mask |= np.eye(7, dtype=bool)
    options = {"is_causal": causal}
    if masked:
        both = mask & attends(7, 7, causal=causal)
        options = {"attn_mask": torch.from_numpy(both)}
    want = torch.nn.functional.scaled_dot_product_attention(
        *(torch.from_numpy(x) for x in (q, k, v)), enable_gqa=h != g, **options
    )
    out, _ = attention(q, k, v, None, mask if masked else None, causal=causal)
    assert (np.abs(out.value - want.numpy()) <= EXACT * (out.magnitude + 1)).all()


@given(**sizes)
def test_later_keys_change_no_earlier_row(b, g, group, m, n, seed):
    q, k, v = operands(b, g, group, m, n, seed)
    cut = 1 + seed % n
    whole = attention(q, k, v, causal=True)
    k[:, :, cut:], v[:, :, cut:] = 7, -3
    other = attention(q, k, v, causal=True)
    for one, two in zip(whole, other, strict=True):
        assert (one.value[:, :, :cut] == two.value[:, :, :cut]).all()


@given(options=patterns, **sizes)
def test_keys_permuted_with_their_mask_change_nothing(b, g, group, m, n, seed, options):
    q, k, v = operands(b, g, group, m, n, seed)
    rng = np.random.default_rng(seed)
    mask = (rng.random((b, 1, m, n)) < 0.6) & attends(m, n, **options)
    order = rng.permutation(n)
    moved = attention(q, k[:, :, order], v[:, :, order], None, mask[..., order])
    agree(moved, attention(q, k, v, None, mask))
    agree(attention(q, k, v, None, mask, **options), attention(q, k, v, None, mask))


@given(options=patterns, **sizes)
def test_parts_of_the_keys_merge_through_lse(b, g, group, m, n, seed, options):
    q, k, v = operands(b, g, group, m, n + 1, seed)
    seen = attends(m, n + 1, **options)[None, None]
    at = 1 + seed % n
    parts = [
        attention(q, k[:, :, s], v[:, :, s], None, seen[..., s])
        for s in (slice(0, at), slice(at, None))
    ]
    want_out, want_lse = attention(q, k, v, **options)
    lse = np.logaddexp(parts[0][1].value, parts[1][1].value)
    found = np.isfinite(lse)
    assert (found == np.isfinite(want_lse.value)).all()
    error = np.abs(lse[found] - want_lse.value[found])
    assert (error <= EXACT * want_lse.magnitude[found]).all()
    with np.errstate(invalid="ignore"):
        merged = sum(p[0].value * np.exp(p[1].value - lse)[..., None] for p in parts)
    error = np.abs(merged - want_out.value)[found]
    assert (error <= EXACT * (want_out.magnitude[found] + 1)).all()


@given(**sizes)
def test_a_window_of_all_keys_is_causal(b, g, group, m, n, seed):
    inputs = operands(b, g, group, m, n, seed)
    agree(attention(*inputs, causal=True, window=max(m, n)), attention(*inputs, causal=True))


@given(constant=st.floats(-50, 50), **sizes)
def test_a_constant_on_all_scores_moves_only_lse(b, g, group, m, n, seed, constant):
    inputs = operands(b, g, group, m, n, seed)
    moved = attention(*inputs, None, None, np.full((1, 1, m, n), constant))
    plain = attention(*inputs)
    assert (np.abs(moved[0].value - plain[0].value) <= EXACT * (plain[0].magnitude + 1)).all()
    error = np.abs(moved[1].value - constant - plain[1].value)
    assert (error <= EXACT * (plain[1].magnitude + abs(constant))).all()


@given(cuts=st.lists(st.integers(0, 6), max_size=3), **sizes)
def test_packed_sequences_are_their_parts(b, g, group, m, n, seed, cuts):
    q, k, v = operands(b, g, group, n, n, seed)
    bounds = np.array([0, *sorted(min(cut, n) for cut in cuts)])
    found = attention_varlen(q, k, v, bounds, causal=True)
    for start, stop in zip(bounds, [*bounds[1:], n], strict=True):
        if start < stop:
            part = attention(*(x[:, :, start:stop] for x in (q, k, v)), causal=True)
            agree(
                [type(x)(x.value[:, :, start:stop], x.magnitude[:, :, start:stop]) for x in found],
                part,
            )


def test_a_fully_masked_row_is_zero_and_its_sink_counts():
    q, k, v = operands(1, 1, 1, 3, 4, 0)
    mask = np.zeros((1, 1, 3, 4), bool)
    out, lse = attention(q, k, v, None, mask)
    assert (out.value == 0).all()
    assert (lse.value == -np.inf).all()
    out, lse = attention(q, k, v, np.float32([0.75]), mask)
    assert (out.value == 0).all()
    assert (lse.value == 0.75).all()


@pytest.mark.parametrize("size", [1e4, 1e30])
def test_huge_scores_neither_overflow_nor_vanish(size):
    q = np.full((1, 1, 2, 1), size)
    k = np.array([1.0, 1.0, -1.0]).reshape(1, 1, 3, 1)
    v = np.array([2.0, 4.0, 100.0]).reshape(1, 1, 3, 1)
    out, lse = attention(q, k, v, scale=1.0)
    assert (out.value == 3).all()
    assert np.isfinite(lse.value).all()
