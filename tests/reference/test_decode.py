from __future__ import annotations

import math

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from reference.decode import (
    attention_decode,
    attention_decode_fp8,
    attention_decode_paged,
    attention_decode_paged_fp8,
    gathered,
)
from tests.strategies.matrices import normal, seeds

sizes = {
    "b": st.integers(1, 2),
    "g": st.integers(1, 2),
    "group": st.integers(1, 2),
    "t": st.integers(1, 3),
    "s": st.integers(1, 6),
}


def operands(seed, b, g, group, t, s):
    shapes = [(b, g * group, t, 3), (b, g, s, 3), (b, g, s, 2)]
    lengths = np.random.default_rng(seed).integers(0, s + 1, b)
    return (*(normal(seed + i, shape, np.float32) for i, shape in enumerate(shapes)), lengths)


@given(seed=seeds(), window=st.one_of(st.none(), st.integers(1, 4)), sink=st.booleans(), **sizes)
def test_every_row_is_the_formula(seed, window, sink, b, g, group, t, s):
    q, k, v, lengths = operands(seed, b, g, group, t, s)
    sinks = normal(seed + 7, (g * group,), np.float32) if sink else None
    out, lse = attention_decode(q, k, v, lengths, sinks, window=window, scale=0.5)
    for i, h, row in np.ndindex(b, g * group, t):
        last = int(lengths[i]) - t + row
        seen = [j for j in range(s) if j <= last and (window is None or j > last - window)]
        scores = [0.5 * math.fsum(q[i, h, row] * k[i, h // group, j].astype(float)) for j in seen]
        terms = [math.exp(score) for score in scores]
        total = math.fsum([*terms, math.exp(sinks[h])] if sink else terms)
        if total == 0:
            assert lse.value[i, h, row] == -np.inf
            assert (out.value[i, h, row] == 0).all()
            continue
        assert abs(lse.value[i, h, row] - math.log(total)) <= 1e-12 * lse.magnitude[i, h, row]
        for e in range(2):
            want = math.fsum(
                p * float(v[i, h // group, j, e]) for p, j in zip(terms, seen, strict=True)
            )
            error = abs(out.value[i, h, row, e] - want / total)
            assert error <= 1e-12 * out.magnitude[i, h, row, e]


@given(seed=seeds(), **sizes)
def test_pages_are_their_cache(seed, b, g, group, t, s):
    q, k, v, lengths = operands(seed, b, g, group, t, 2 * s)
    pages = [normal(seed, (b * s + 1, g, 2, x.shape[3]), np.float32) for x in (k, v)]
    table = np.random.default_rng(seed).permutation(b * s + 1)[: b * s].reshape(b, s)
    for cache, x in zip(pages, (k, v), strict=True):
        for i, w in np.ndindex(b, s):
            cache[table[i, w]] = x[i, :, 2 * w : 2 * w + 2]
        assert (gathered(cache, table) == x).all()
    scales = [normal(seed + 1, (g,), np.float32) for _ in range(2)]
    whole = attention_decode(q, k, v, lengths)
    by_pages = attention_decode_paged(q, *pages, table, lengths)
    assert (whole[0].value == by_pages[0].value).all()
    one, other = (
        attention_decode_fp8(q, k, v, lengths, None, *scales),
        attention_decode_paged_fp8(q, *pages, table, lengths, None, *scales),
    )
    wide = [
        x * y[None, :, None, None].astype(np.float64) for x, y in zip((k, v), scales, strict=True)
    ]
    want = attention_decode(q, *wide, lengths)
    for found in (one, other):
        assert (found[0].value == want[0].value).all()
        assert (found[1].value == want[1].value).all()


def test_what_is_no_page_is_zero():
    pages = np.ones((2, 1, 2, 1), np.float32)
    assert gathered(pages, np.array([[-1, 1, 2]])).ravel().tolist() == [0, 0, 1, 1, 0, 0]
