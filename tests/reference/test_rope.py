from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from reference.rope import rope
from tests.strategies.matrices import normal, seeds


@pytest.mark.parametrize("batched", [False, True])
@pytest.mark.parametrize("interleaved", [False, True])
@given(seed=seeds(), inverse=st.booleans(), pairs=st.integers(1, 3), rest=st.integers(0, 2))
def test_every_element_is_the_formula(batched, interleaved, seed, inverse, pairs, rest):
    x = normal(seed, (2, 2, 3, 2 * pairs + rest), np.float32)
    angles = (2, 3, pairs) if batched else (3, pairs)
    cos, sin = (normal(seed + i, angles, np.float32) for i in (1, 2))
    ref = rope(x, cos, sin, interleaved, inverse)
    for b, h, s, d in np.ndindex(*x.shape):
        x1 = float(x[b, h, s, d])
        want = x1
        if d < 2 * pairs:
            f, second = (d // 2, d % 2) if interleaved else (d % pairs, d // pairs)
            other = d + (1 if interleaved else pairs) * (-1 if second else 1)
            at = (b, s, f) if batched else (s, f)
            sign = (1 if second else -1) * (-1 if inverse else 1)
            terms = [x1 * float(cos[at]), sign * float(x[b, h, s, other]) * float(sin[at])]
            want = math.fsum(terms)
            size = sum(map(abs, terms))
            assert abs(ref.magnitude[b, h, s, d] - size) <= 4 * 2.0**-53 * size
            assert abs(ref.value[b, h, s, d] - want) <= 4 * 2.0**-53 * size
        else:
            assert ref.value[b, h, s, d] == want
