"""rms_norm of rows so short that several share a partition."""

from __future__ import annotations

from collections import Counter

import nki.isa as nisa
import nki.language as nl
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from nki_kernels import ops
from nki_kernels.kernels.norm import RmsNormConfig, short_rows
from nki_kernels.operators import OPERATORS
from tests.operators.norms import DTYPES, TOY, TRN2, compare, operands
from tests.strategies.matrices import extents, seeds

P = TOY.partitions


def config_of(together, scalar, pool, hwdge=True):
    return RmsNormConfig(
        chunk=16, piece=16, ahead=0,
        together=together, scalar=min(scalar, together), pool=min(pool, together), hwdge=hwdge,
    )  # fmt: skip


@given(
    n=extents(P, 4 * P + 5), h=st.integers(1, 16), dtype=st.sampled_from(list(DTYPES)),
    out_dtype=st.sampled_from(list(DTYPES)), together=st.integers(1, 4),
    scalar=st.integers(0, 4), pool=st.integers(0, 4), hwdge=st.booleans(), seed=seeds(),
    weighted=st.booleans(),
)  # fmt: skip
def test_rows_that_share_a_partition_match_the_reference(
    n, h, dtype, out_dtype, together, scalar, pool, hwdge, seed, weighted
):
    x, weight = operands("rms_norm", n, h, dtype, seed)
    inputs = (x, weight if weighted else None)
    config = config_of(together, scalar, pool, hwdge)
    got = ops.rms_norm(*inputs, config=config, out_dtype=out_dtype, target="toy")
    compare("rms_norm", got, inputs, "toy", repr(config))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("n", [1, 127, 128, 129, 2047, 2048, 2300])
@pytest.mark.parametrize("h", [1, 64, 128, 512])
def test_the_chosen_config_matches_the_reference(n, h, dtype):
    config = OPERATORS["rms_norm"].configure({"N": n, "H": h}, dtype, TRN2)
    assert config.together > 1
    inputs = operands("rms_norm", n, h, dtype)
    compare("rms_norm", ops.rms_norm(*inputs, target="trn2"), inputs, "trn2", f"{n}x{h}")


def test_longer_rows_do_not_share():
    axes = {"N": 4096, "H": TRN2.bn_stats_fmax + 1}
    assert OPERATORS["rms_norm"].configure(axes, "bfloat16", TRN2).together == 0


@given(n=st.integers(1, 10**6), together=st.integers(1, 64))
def test_the_tiles_cover_every_row_once(n, together):
    at = 0
    for start, count, each in short_rows.short_spans(n, together):
        assert start == at
        assert 1 <= count <= nl.tile_size.pmax
        assert 1 <= each <= together
        at += count * each
    assert at == n


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("row", [0, 5, 24, 60])
def test_a_special_value_stays_in_its_row(row, value, dtype):
    x, weight = operands("rms_norm", 61, 13, dtype)
    x[row, 7] = value
    got = ops.rms_norm(x, weight, config=config_of(3, 1, 2), target="toy")
    assert np.isnan(got[row, 7])
    assert np.isnan(got[row]).all() if np.isnan(value) else (np.delete(got[row], 7) == 0).all()
    others = np.arange(61) != row
    compare("rms_norm", got[others], (x[others], weight), "toy", "others")


@given(n=extents(P, 4 * P + 5), more=st.integers(1, 40), h=st.integers(1, 16), seed=seeds())
def test_a_row_does_not_depend_on_how_many_share_its_partition(n, more, h, seed):
    x, weight = operands("rms_norm", n + more, h, "float32", seed)
    whole = ops.rms_norm(x, weight, config=config_of(4, 2, 3), target="toy")
    part = ops.rms_norm(x[:n], weight, config=config_of(4, 2, 3), target="toy")
    assert whole[:n].tobytes() == part.tobytes()
    alone = ops.rms_norm(x, weight, config=config_of(1, 0, 0), target="toy")
    assert whole.tobytes() == alone.tobytes()


@pytest.mark.parametrize("weighted", [True, False])
@pytest.mark.parametrize("n", [1, P, 2 * P + 3, 7 * P + 1])
def test_instructions_are_exactly_the_formula(n, weighted):
    config = config_of(3, 1, 2)
    x, weight = operands("rms_norm", n, 9, "bfloat16")
    inputs = (x, weight if weighted else None)
    run = OPERATORS["rms_norm"].launch(inputs, {}, config=config, target="toy")
    want = Counter(memset=1, dma_copy=weighted)
    left = n
    while left:
        each = min(3, -(-left // P))
        count = min(P, left // each)
        left -= count * each
        scalar, pool = each * 1 // 3, each * 2 // 3
        want.update(
            dma_copy=2, activation=1 + scalar, tensor_reduce=1,
            scalar_tensor_tensor=1, tensor_scalar=1,
            tensor_tensor=1 + weighted * ((pool > 0) + (pool < each)),
        )  # fmt: skip
    assert Counter(event.opcode for event in run.trace) == +want


def test_a_row_of_its_neighbours_factor_is_rejected(monkeypatch):
    real = nisa.tensor_reduce

    def shifted(**k):
        real(**k)
        if k["dst"].shape[1] > 1:
            nisa.tensor_copy(dst=k["dst"][:, 0:1], src=k["dst"][:, 1:2])

    inputs = operands("rms_norm", 4 * P, 13, "bfloat16")
    config = config_of(3, 1, 2)
    compare("rms_norm", ops.rms_norm(*inputs, config=config, target="toy"), inputs, "toy", "right")
    monkeypatch.setattr(nisa, "tensor_reduce", shifted)
    got = ops.rms_norm(*inputs, config=config, target="toy")
    with pytest.raises(AssertionError, match="worst at"):
        compare("rms_norm", got, inputs, "toy", "neighbour")
