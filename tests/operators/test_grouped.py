"""The grouped product: ragged, empty and full groups, rows of no group, refusals, mutants."""

from __future__ import annotations

import ml_dtypes
import nki.isa as nisa
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from nki_kernels import ops
from nki_kernels.hardware import spec_for
from nki_kernels.machine.errors import ConfigError, DtypeError, OptionError, ShapeError
from nki_kernels.machine.tensor import Abstract
from nki_kernels.operators import OPERATORS
from nki_kernels.operators.grouped import GroupedConfig
from reference.matmul import matmul as plain
from reference.moe import grouped_matmul as reference
from tests.strategies.matrices import extents, normal, seeds, small_integers
from tests.tolerance import assert_close

GROUPED = OPERATORS["grouped_matmul"]
TOY, TRN2 = spec_for("toy"), spec_for("trn2")
DTYPES = {"bfloat16": ml_dtypes.bfloat16, "float16": np.float16, "float32": np.float32}


def compare(got, a, b, offsets, target, case):
    ref = reference(a, b, offsets)
    axes = GROUPED.axes(a.shape, b.shape, offsets.shape)
    chain = GROUPED.chain(axes, spec_for(target))
    assert_close(
        got, ref.value, ref.magnitude, op="grouped_matmul", case=case, roundings=1, chain=chain
    )


def operands(m, n, k, groups, dtype, seed, make=normal):
    host = DTYPES[dtype]
    return make(seed, (m, k), host), make(seed + 1, (groups, k, n), host)


@st.composite
def loads(draw, rows):
    """Ends of groups: any cuts, so that groups are empty, full, or leave rows to none."""
    groups = draw(st.integers(1, 4))
    ends = draw(st.lists(st.integers(0, rows), min_size=groups, max_size=groups))
    return np.sort(np.array(ends, np.int32))


sizes = {
    "m": extents(TOY.partitions, 4 * TOY.partitions + 3),
    "n": extents(TOY.moving_fmax, 2 * TOY.moving_fmax + 3),
    "k": extents(TOY.partitions, 3 * TOY.partitions + 3),
    "dtype": st.sampled_from(list(DTYPES)),
    "seed": seeds(),
}


@given(data=st.data(), **sizes)
def test_any_load_matches_the_reference(data, m, n, k, dtype, seed):
    offsets = data.draw(loads(m))
    a, b = operands(m, n, k, offsets.size, dtype, seed)
    got = ops.grouped_matmul(a, b, offsets, target="toy")
    compare(got, a, b, offsets, "toy", f"{offsets.tolist()}")


@given(data=st.data(), block=st.sampled_from([1, 2, 4]), width=st.integers(1, 40), **sizes)
def test_no_config_changes_a_result(data, block, width, m, n, k, dtype, seed):
    offsets = data.draw(loads(m))
    a, b = operands(m, n, k, offsets.size, dtype, seed, lambda *w: small_integers(*w, most=4))
    config = GroupedConfig(block, width, False)
    got = ops.grouped_matmul(a, b, offsets, out_dtype="float32", config=config, target="toy")
    assert (got == reference(a, b, offsets).value).all()


@given(**sizes)
def test_one_group_of_all_rows_is_a_matrix_product(m, n, k, dtype, seed):
    a, b = operands(m, n, k, 3, dtype, seed, lambda *w: small_integers(*w, most=4))
    for full in range(3):
        offsets = np.array([m if group >= full else 0 for group in range(3)], np.int32)
        got = ops.grouped_matmul(a, b, offsets, out_dtype="float32", target="toy")
        assert (got == plain(a, b[full]).value).all()


@given(data=st.data(), **sizes)
def test_rows_of_no_group_are_zero_whatever_they_hold(data, m, n, k, dtype, seed):
    offsets = data.draw(loads(m))
    a, b = operands(m, n, k, offsets.size, dtype, seed)
    a[offsets[-1] :] = np.nan
    got = ops.grouped_matmul(a, b, offsets, target="toy")
    assert (got[offsets[-1] :] == 0).all()
    assert not np.isnan(got.astype(np.float32)).any()


@pytest.mark.parametrize("target", ["trn1", "trn2", "trn3"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("offsets", [[0, 130, 130, 300], [300] * 4, [0, 0, 0, 0], [1, 2, 3, 299]])
def test_every_generation_matches_the_reference(offsets, dtype, target):
    a, b = operands(300, 530, 140, 4, dtype, 3)
    ends = np.array(offsets, np.int32)
    compare(ops.grouped_matmul(a, b, ends, target=target), a, b, ends, target, f"{offsets}")


def test_a_layer_of_experts_is_the_sum_over_experts():
    """router, dispatch, grouped_matmul and combine against the dense mixture, exact."""
    tokens, hidden, experts = 21, 12, 5
    x = small_integers(1, (tokens, hidden), np.float32, 3)
    b = small_integers(2, (experts, hidden, 9), np.float32, 3)
    scores = small_integers(3, (hidden, experts), np.float32, 3)
    indices, _, counts = ops.router(x, scores, top_k=2, target="toy")
    rows, slots, offsets = ops.dispatch(x, indices, experts=experts, target="toy")
    assert (np.diff(offsets, prepend=0) == counts).all()
    y = ops.combine(ops.grouped_matmul(rows, b, offsets, target="toy"), slots, target="toy")
    want = sum(np.einsum("th,thn->tn", x, b[indices[:, choice]]) for choice in range(2))
    assert (y == want).all()


def test_permuting_rows_of_a_group_permutes_the_result():
    a, b = operands(20, 9, 10, 2, "float32", 4)
    offsets, order = np.array([12, 20], np.int32), np.arange(20)
    order[:12] = order[:12][::-1]
    one, two = (ops.grouped_matmul(x, b, offsets, target="toy") for x in (a, a[order]))
    compare(two, a[order], b, offsets, "toy", "permuted")
    compare(one[order], a[order], b, offsets, "toy", "then permuted")


# -- refusals --------------------------------------------------------------------------------------

A, B = np.zeros((6, 4), np.float32), np.zeros((2, 4, 3), np.float32)
ENDS = np.array([2, 6], np.int32)


@pytest.mark.parametrize(
    ("inputs", "error", "text"),
    [
        ((A, B, ENDS[::-1].copy()), OptionError, "offsets[1] is 2 after 6; ends of consecutive"),
        ((A, B, ENDS - 3), OptionError, "offsets[0] is -1 after 0"),
        ((A, B, ENDS + 1), OptionError, "offsets reach 7; a has M = 6 rows"),
        ((A, B, ENDS.astype(np.int64)), DtypeError, "offsets has dtype int64; it must be int32"),
        ((A, B, ENDS[:1]), ShapeError, "G is 2 in b [G, K, N] = [2, 4, 3] but 1 in offsets"),
        ((A, B.astype(np.float16), ENDS), DtypeError, "dtypes differ: a float32, b float16"),
    ],
)
def test_an_illegal_call_says_why(inputs, error, text):
    with pytest.raises(error) as caught:
        ops.grouped_matmul(*inputs, target="trn2")
    assert text in str(caught.value)


@pytest.mark.parametrize(
    ("shape", "text"),
    [
        ((2**22, 8, 8, 2), "M is 4194304; at most 4194303 rows are counted"),
        (
            (128, 2**17, 128, 2),
            "K is 131072 with N = 128 and G = 2; a tile of rows and 128 columns",
        ),
    ],
)
def test_what_does_not_fit_says_so(shape, text):
    m, k, n, groups = shape
    inputs = [Abstract((m, k), "bfloat16"), Abstract((groups, k, n), "bfloat16")]
    with pytest.raises(ShapeError) as caught:
        GROUPED.launch([*inputs, Abstract((groups,), "int32")], {}, target="trn2")
    assert text in str(caught.value)


@pytest.mark.parametrize(
    ("config", "target", "text"),
    [
        (1, "trn2", "a GroupedConfig is needed"),
        (GroupedConfig(0, 8, False), "trn2", "config.block is 0; it must be an int of at least 1"),
        (GroupedConfig(3, 8, False), "trn2", "config.block is 3; it must be a power of two"),
        (GroupedConfig(1, 0, False), "trn2", "config.width is 0; it must be an int of at least 1"),
        (GroupedConfig(1, 8, True), "trn1", "config.hwdge needs gen3; trn1 is gen2"),
    ],
)
def test_a_config_that_cannot_run_says_why(config, target, text):
    with pytest.raises(ConfigError) as caught:
        ops.grouped_matmul(A, B, ENDS, config=config, target=target)
    assert text in str(caught.value)


@pytest.mark.parametrize(
    ("m", "k", "n", "dtype"), [(1024, 14336, 600, "bfloat16"), (512, 4096, 2048, "float32")]
)
def test_what_passes_the_limits_fits(m, k, n, dtype):
    inputs = [Abstract((m, k), dtype), Abstract((2, k, n), dtype)]
    GROUPED.launch([*inputs, np.array([m // 2, m], np.int32)], {}, target="trn2").time()


@given(
    m=st.integers(1, 2**21), k=st.integers(1, 16384), n=st.integers(1, 30000),
    groups=st.integers(1, 512),
)  # fmt: skip
@pytest.mark.parametrize("target", ["trn1", "trn2", "trn3"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_chosen_config_has_no_problems(dtype, target, m, k, n, groups):
    axes, spec = {"M": m, "K": k, "N": n, "G": groups}, spec_for(target)
    if not GROUPED.limits(axes, dtype, spec):
        assert GROUPED.config_problems(GROUPED.configure(axes, dtype, spec), dtype, spec) == ()


# -- mutants ---------------------------------------------------------------------------------------


def drop_the_last_slice(real):
    def faulty(dst, stationary, moving, accumulate, **keywords):
        if stationary.shape[0] < TOY.partitions:
            return None
        return real(dst=dst, stationary=stationary, moving=moving, accumulate=accumulate)

    return faulty


def forget_to_add(real):
    def faulty(dst, stationary, moving, accumulate, **keywords):
        return real(dst=dst, stationary=stationary, moving=moving, accumulate=False)

    return faulty


@pytest.mark.parametrize("mutant", [drop_the_last_slice, forget_to_add])
def test_a_mutated_kernel_is_rejected(mutant, monkeypatch):
    a, b = operands(20, 9, 2 * TOY.partitions + 3, 2, "bfloat16", 4)
    offsets = np.array([12, 20], np.int32)
    compare(ops.grouped_matmul(a, b, offsets, target="toy"), a, b, offsets, "toy", "right")
    monkeypatch.setattr(nisa, "nc_matmul", mutant(nisa.nc_matmul))
    with pytest.raises(AssertionError, match="worst at"):
        compare(ops.grouped_matmul(a, b, offsets, target="toy"), a, b, offsets, "toy", "wrong")


def test_a_pass_that_starts_a_row_late_is_rejected(monkeypatch):
    a, b = operands(20, 9, 10, 2, "float32", 4)
    offsets = np.array([3, 20], np.int32)
    real = nisa.iota

    def late(dst, pattern, channel_multiplier=0, **keywords):
        return real(dst=dst, pattern=pattern, offset=1, channel_multiplier=channel_multiplier)

    monkeypatch.setattr(nisa, "iota", late)
    with pytest.raises(Exception, match=r"worst at|wrote"):
        compare(ops.grouped_matmul(a, b, offsets, target="toy"), a, b, offsets, "toy", "late")
