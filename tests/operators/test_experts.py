"""The fused experts: loads of any skew, forms, properties of a mixture, refusals, mutants."""

from __future__ import annotations

import dataclasses
from collections import Counter

import ml_dtypes
import nki.isa as nisa
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from nki_kernels import ops_moe as ops
from nki_kernels.hardware import spec_for
from nki_kernels.kernels.moe import experts as kernel
from nki_kernels.kernels.moe import schedule
from nki_kernels.machine.errors import ConfigError, DtypeError, OptionError, ShapeError
from nki_kernels.machine.launch import launch
from nki_kernels.machine.tensor import Abstract
from nki_kernels.operators.experts import EXPERTS
from nki_kernels.operators.linear import ACTIVATIONS
from reference.moe import experts as reference
from tests.strategies.matrices import extents, normal, seeds, small_integers
from tests.tolerance import assert_close

TOY, TRN2 = spec_for("toy"), spec_for("trn2")
DTYPES = {"bfloat16": ml_dtypes.bfloat16, "float16": np.float16, "float32": np.float32}
GPT_OSS = {"interleaved": True, "limit": 1.5}
FORMS = [{"activation": name} for name in ACTIVATIONS]
FORMS += [GPT_OSS, {"interleaved": True}, {"limit": 2.0, "alpha": 1.0}]
FORMS += [{"activation": "gelu_tanh", "plain": True}]


def operands(t, h, i, experts, k, dtype, seed, *, gated=True, biased=False, make=normal):
    host, f = DTYPES[dtype], 2 * i if gated else i
    shapes = [(t, h), (experts, h, f), (experts, i, h)]
    shapes += [(experts, f), (experts, h)] if biased else []
    x, up, down, *biases = (make(seed + at, shape, host) for at, shape in enumerate(shapes))
    if make is normal:
        up, down = (up / np.sqrt(h)).astype(host), (down / np.sqrt(i)).astype(host)
    rng = np.random.default_rng(seed)
    indices = rng.integers(-1, experts + 1, (t, k)).astype(np.int32)
    scores = make(seed + 9, (t, k), np.float32)
    return [x, indices, scores, up, down, *(biases or (None, None))]


def compare(got, inputs, target, case, **options):
    shapes = [None if x is None else x.shape for x in inputs]
    ref = reference(*inputs, **options, rounded_rows=shapes[0][0] > spec_for(target).partitions)
    chain = EXPERTS.chain(EXPERTS.axes(*shapes), spec_for(target))
    assert_close(got, ref.value, ref.magnitude, op="experts", case=case, roundings=1, chain=chain)


sizes = {
    "t": st.integers(1, 3 * TOY.partitions + 3),
    "h": extents(TOY.partitions, TOY.moving_fmax + 3),
    "i": extents(TOY.partitions, TOY.moving_fmax + 3),
    "dtype": st.sampled_from(list(DTYPES)),
    "seed": seeds(),
}


def loads(kind, t, k, experts, seed):
    """Choices of a kind: some skew, all to one expert, or to nobody."""
    rng = np.random.default_rng(seed)
    if kind == "empty":
        return np.full((t, k), experts, np.int32)
    if kind == "one":
        return np.full((t, k), experts - 1, np.int32)
    weight = np.arange(1, experts + 1) ** {"uniform": 0.0, "zipf": -2.0}[kind]
    return rng.choice(experts, (t, k), p=weight / weight.sum()).astype(np.int32)


@given(
    kind=st.sampled_from(["uniform", "zipf", "one", "empty"]),
    k=st.integers(1, 3),
    experts=st.integers(1, 5),
    **sizes,
)
def test_any_load_matches_the_reference(kind, k, experts, t, h, i, dtype, seed):
    inputs = operands(t, h, i, experts, k, dtype, seed)
    inputs[1] = loads(kind, t, k, experts, seed)
    compare(ops.experts(*inputs, target="toy"), inputs, "toy", kind)


@given(form=st.sampled_from(FORMS), biased=st.booleans(), **sizes)
def test_any_form_matches_the_reference(form, biased, t, h, i, dtype, seed):
    plain, form = form.get("plain", False), {n: v for n, v in form.items() if n != "plain"}
    inputs = operands(t, h, i, 3, 2, dtype, seed, gated=not plain, biased=biased)
    compare(ops.experts(*inputs, **form, target="toy"), inputs, "toy", f"{form}", **form)


@pytest.mark.parametrize("target", ["trn1", "trn2", "trn3"])
@pytest.mark.parametrize("tokens", [1, 7, 300])
@pytest.mark.parametrize("dtype", DTYPES)
def test_every_generation_matches_the_reference(dtype, tokens, target):
    inputs = operands(tokens, 200, 330, 4, 2, dtype, 3, biased=True)
    got = ops.experts(*inputs, **GPT_OSS, target=target)
    compare(got, inputs, target, target, **GPT_OSS)


BODIES = st.lists(st.lists(st.integers(1, 2), min_size=1, max_size=3).map(tuple), max_size=3)


@given(
    bodies=BODIES,
    flight=st.integers(1, 600),
    tail=st.integers(0, 3),
    banks=st.sampled_from([2, 4]),
    carry=st.booleans(),
    **sizes,
)
def test_no_config_changes_a_result(bodies, flight, tail, banks, carry, t, h, i, dtype, seed):
    inputs = operands(t, h, i, 3, 2, dtype, seed, make=lambda *w: small_integers(*w, most=2))
    axes = EXPERTS.axes(*(None if x is None else x.shape for x in inputs))
    config = EXPERTS.configure(axes, dtype, TOY)
    most = banks // 2
    if t <= TOY.partitions:
        most, bodies = 1, [(1,) * len(body) for body in bodies]
    bodies = [tuple(min(size, most) for size in body) for body in bodies]
    other = dataclasses.replace(
        config, bodies=(*bodies, *((size,) for size in range(most, 0, -1))), most=most,
        flight=(flight,) * most, tail=tail, banks=banks, carry=carry,
    )  # fmt: skip
    one = ops.experts(*inputs, activation="relu", out_dtype="float32", target="toy")
    two = ops.experts(*inputs, activation="relu", out_dtype="float32", config=other, target="toy")
    assert (one == two).all()


# -- properties of a mixture -----------------------------------------------------------------------


def exact(inputs):
    """Run on small integers without a function: sums of any order are equal."""
    return ops.experts(*inputs, activation="relu", out_dtype="float32", target="toy")


def whole(seed, experts, tokens):
    return operands(
        tokens, 12, 9, experts, 2, "float32", seed, make=lambda *w: small_integers(*w, 2)
    )


@pytest.mark.parametrize("tokens", [6, 21])
@pytest.mark.parametrize("seed", range(3))
def test_relabelled_experts_give_the_same_sums(seed, tokens):
    inputs = whole(seed, 4, tokens)
    x, indices, scores, up, down, *rest = inputs
    order = np.random.default_rng(seed).permutation(4)
    inside = (indices >= 0) & (indices < 4)
    moved = np.where(inside, np.argsort(order)[np.clip(indices, 0, 3)], -1).astype(np.int32)
    two = exact([x, moved, scores, up[order].copy(), down[order].copy(), *rest])
    assert (exact(inputs) == two).all()


@pytest.mark.parametrize("tokens", [6, 21])
@pytest.mark.parametrize("seed", range(3))
def test_permuted_and_split_tokens_give_the_same_rows(seed, tokens):
    inputs = whole(seed, 3, tokens)
    order = np.random.default_rng(seed).permutation(tokens)
    given, rest = inputs[:3], inputs[3:]
    got = exact(inputs)
    assert (got[order] == exact([*(part[order].copy() for part in given), *rest])).all()
    parts = [exact([*(part[rows].copy() for part in given), *rest])
             for rows in (slice(0, tokens // 2), slice(tokens // 2, tokens))]  # fmt: skip
    assert (got == np.concatenate(parts)).all()


@pytest.mark.parametrize("tokens", [6, 21])
@pytest.mark.parametrize("seed", range(3))
def test_an_expert_of_weight_zero_is_absent(seed, tokens):
    inputs = whole(seed, 3, tokens)
    without = list(inputs)
    inputs[2][:, 1], without[1] = 0.0, inputs[1].copy()
    without[1][:, 1] = -1
    assert (exact(inputs) == exact(without)).all()


def test_every_expert_chosen_is_the_dense_mixture():
    inputs = operands(20, 12, 9, 3, 3, "float32", 5)
    inputs[1] = np.tile(np.arange(3, dtype=np.int32), (20, 1))
    x, _, scores, up, down = (inputs[at] for at in range(5))
    both = np.einsum("th,ehf->etf", x.astype(float), up.astype(float))
    gate, other = both[..., :9], both[..., 9:]
    rows = np.einsum("eti,eih->eth", gate / (1 + np.exp(-gate)) * other, down.astype(float))
    dense = np.einsum("te,eth->th", scores, rows)
    ref = reference(*inputs)
    assert_close(dense.astype(np.float32), ref.value, ref.magnitude, op="experts", case="dense",
                 roundings=1, chain=200)  # fmt: skip
    compare(ops.experts(*inputs, target="toy"), inputs, "toy", "dense")


@pytest.mark.parametrize("tokens", [6, 20])
def test_absent_rows_are_inert_whatever_they_hold(tokens):
    inputs = operands(tokens, 12, 9, 3, 2, "float32", 5)
    inputs[1][4], inputs[1][5] = [-1, 99], [0, 0]
    inputs[0][4] = np.nan
    # Token 5 alone chooses the expert whose weights are infinite.
    inputs[1][[0, 1, 2, 3, *range(6, tokens)]] = [1, 2]
    inputs[4][0] = np.inf
    got = ops.experts(*inputs, target="toy")
    assert (got[4] == 0).all()
    assert np.isfinite(np.delete(got, 5, axis=0)).all()


# -- the schedule ----------------------------------------------------------------------------------


@given(values=st.lists(st.integers(0, 2**20), min_size=1, max_size=8), divisor=st.integers(1, 600))
def test_a_floor_division_is_exact(values, divisor):
    import nki
    import nki.language as nl

    @nki.jit
    def kernel(x):
        out = nl.ndarray(x.shape, dtype=nl.float32, buffer=nl.shared_hbm)
        tile = nl.ndarray(x.shape, dtype=nl.float32, buffer=nl.sbuf)
        nisa.dma_copy(dst=tile, src=x)
        schedule.floor_division(tile, tile, divisor, 0)
        nisa.dma_copy(dst=out, src=tile)
        return out

    x = np.array([values], np.float32)
    got = launch(kernel, (x,), target="trn2").result
    # The margin of half a divisor's part shrinks with the quotient.
    small = x < 2.0**22 / 8
    assert (got[small] == x[small] // divisor).all()


def weight_bytes(inputs):
    """Return the bytes read from each input of three dimensions."""
    run = EXPERTS.launch(inputs, {}, target="trn2")
    moved = Counter()
    for event in run.trace.events:
        tile = event.reads[0].tile if event.opcode == "dma_copy" else None
        if tile is not None and tile.role == "input" and len(tile.shape) == 3:
            moved[tile.shape] += event.work.hbm_read_bytes
    return moved


def test_weights_arrive_once_per_block():
    inputs = operands(256, 128, 128, 4, 1, "bfloat16", 1)
    inputs[1] = np.repeat(np.arange(4, dtype=np.int32), 64)[:, None]
    moved = weight_bytes(inputs)
    assert moved == {(4, 128, 256): 4 * 128 * 256 * 2, (4, 128, 128): 4 * 128 * 128 * 2}


@pytest.mark.parametrize("tokens", [1, 3, 128])
def test_of_few_tokens_only_the_weights_of_active_experts_leave_memory(tokens):
    inputs = operands(tokens, 128, 128, 16, 2, "bfloat16", 1)
    inputs[1] = np.arange(2 * tokens, dtype=np.int32).reshape(tokens, 2) % 6 + 7
    active = len(set(inputs[1].ravel().tolist()))
    moved = weight_bytes(inputs)
    assert moved == {(16, 128, 256): active * 128 * 512, (16, 128, 128): active * 128 * 256}


@pytest.mark.parametrize("count", [1, 4])
def test_one_expert_of_all_tokens_costs_no_more_than_balanced_ones(count):
    """Products counted from the trace, of 1024 tokens over as many experts."""
    inputs = operands(1024, 128, 128, 4, 1, "bfloat16", 1)
    inputs[1] = (np.arange(1024, dtype=np.int32) % count)[:, None]
    run = EXPERTS.launch(inputs, {}, target="trn2")
    loops = [event for event in run.trace.events if event.loop]
    # Eight row tiles: gate, up and down of one slice each.
    assert sum(event.opcode == "nc_matmul" for event in loops) == 8 * 3


# -- refusals --------------------------------------------------------------------------------------

CALL = operands(20, 4, 3, 2, 2, "float32", 0)


def changed(at, value):
    return [value if number == at else given for number, given in enumerate(CALL)]


@pytest.mark.parametrize(
    ("inputs", "options", "error", "text"),
    [
        (changed(1, np.full((20, 2), 2**24, np.int32)), {}, OptionError, "indices has 16777216"),
        (changed(1, CALL[1].astype(np.int64)), {}, DtypeError, "indices has dtype int64; it must"),
        (changed(2, CALL[2][:, :1].copy()), {}, ShapeError, "K is 2 in indices"),
        (changed(4, CALL[4].astype(np.float16)), {}, DtypeError, "dtypes differ: x float32"),
        (changed(3, CALL[3][:, :, :5].copy()), {}, ShapeError, "F is 5 with I = 3; up has 2 I"),
        (CALL, {"activation": "swish"}, OptionError, "activation is 'swish'; allowed are"),
        (CALL, {"limit": -1.0}, OptionError, "limit is -1.0; a positive finite number is needed"),
        (CALL, {"alpha": None}, OptionError, "alpha is None; a positive finite number is needed"),
        (CALL, {"interleaved": 1}, OptionError, "interleaved is 1; allowed are True and False"),
        (
            changed(3, CALL[3][:, :, :3].copy()),
            {"limit": 1.0},
            OptionError,
            "up has 3 columns for I = 3, no gate; interleaved and limit belong to gate and up",
        ),
    ],
)
def test_an_illegal_call_says_why(inputs, options, error, text):
    with pytest.raises(error) as caught:
        ops.experts(*inputs, **options, target="trn2")
    assert text in str(caught.value)


def abstract(t, h, i, experts, k, dtype="bfloat16"):
    shapes = [(t, h), (t, k), (t, k), (experts, h, 2 * i), (experts, i, h)]
    kinds = [dtype, "int32", "float32", dtype, dtype]
    return [*(Abstract(s, d) for s, d in zip(shapes, kinds, strict=True)), None, None]


@pytest.mark.parametrize(
    ("shape", "text"),
    [
        ((40000, 128, 128, 8, 2), "T is 40000; at most 32768 are sorted; split the tokens"),
        ((32768, 128, 128, 8, 600), "T * K is 19660800; fewer than 16777216 rows are counted"),
        ((256, 128, 128, 4000, 2), "E is 4000 with T * K = 512; PSUM counts at most 3583 experts"),
        ((256, 65536, 128, 8, 2), "more than trn2 has; split the tokens, or the features"),
    ],
)
def test_what_does_not_fit_says_so(shape, text):
    with pytest.raises(ShapeError) as caught:
        EXPERTS.launch(abstract(*shape), {}, target="trn2")
    assert text in str(caught.value)


def config(**changes):
    axes = {"T": 20, "H": 4, "I": 3, "F": 6, "E": 2, "K": 2}
    return dataclasses.replace(EXPERTS.configure(axes, "float32", TRN2), **changes)


@pytest.mark.parametrize(
    ("given", "text"),
    [
        (1, "an ExpertsConfig is needed"),
        (config(most=0), "config.most is 0; it must be an int of at least 1"),
        (config(flight=()), "config.flight is (); it needs a positive int for each of the"),
        (config(dtype="bfloat16"), "config.dtype is bfloat16 of 4 bytes for float32"),
        (config(banks=9), "config.banks is 9 with most ="),
        (config(bodies=((1, 9),)), "config.bodies is ((1, 9),); each lists classes 1 to most"),
    ],
)
def test_a_config_that_cannot_run_says_why(given, text):
    with pytest.raises(ConfigError) as caught:
        ops.experts(*CALL, config=given, target="trn2")
    assert text in str(caught.value)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("target", ["trn1", "trn2", "trn3", "toy"])
@given(
    t=st.integers(1, 4096), h=st.integers(1, 5000), i=st.integers(1, 15000),
    experts=st.integers(1, 256), k=st.integers(1, 8),
)  # fmt: skip
def test_a_chosen_config_has_no_problems(dtype, target, t, h, i, experts, k):
    axes = {"T": t, "H": h, "I": i, "F": 2 * i, "E": experts, "K": k}
    spec = spec_for(target)
    if not EXPERTS.limits(axes, dtype, spec):
        assert EXPERTS.config_problems(EXPERTS.configure(axes, dtype, spec), dtype, spec) == ()


@pytest.mark.parametrize(
    ("shape", "dtype"),
    [
        ((1, 4096, 14336, 1, 1), "bfloat16"),
        ((128, 7168, 2048, 2, 2), "float16"),
        ((512, 4096, 1024, 4, 1), "bfloat16"),
        ((256, 2048, 768, 16, 2), "bfloat16"),
        ((256, 2880, 2880, 2, 2), "float32"),
        ((256, 7168, 2048, 2, 2), "bfloat16"),
    ],
)
def test_what_passes_the_limits_fits(shape, dtype):
    inputs = abstract(*shape, dtype)
    t, _, _, experts, k = shape
    inputs[1] = np.random.default_rng(0).integers(0, experts, (t, k)).astype(np.int32)
    EXPERTS.launch(inputs, {}, target="trn2").time()


# -- mutants ---------------------------------------------------------------------------------------


def forget_to_add(real):
    def faulty(dst, stationary, moving, accumulate, **keywords):
        return real(dst=dst, stationary=stationary, moving=moving, accumulate=False)

    return faulty


def always_the_first_entry(real):
    def faulty(row, at, count):
        nisa.memset(dst=at, value=0)
        return real(row, at, count)

    return faulty


def no_first_places(real):
    def faulty(result, values):
        real(result, values)
        nisa.memset(dst=result, value=float(values.shape[0]))

    return faulty


@pytest.mark.parametrize(
    ("module", "name", "mutant"),
    [
        (nisa, "nc_matmul", forget_to_add),
        (kernel, "entries_at", always_the_first_entry),
        (schedule, "add_up", no_first_places),
    ],
)
def test_a_mutated_kernel_is_rejected(module, name, mutant, monkeypatch):
    inputs = operands(30, 20, 21, 3, 2, "bfloat16", 4)
    compare(ops.experts(*inputs, target="toy"), inputs, "toy", "right")
    monkeypatch.setattr(module, name, mutant(getattr(module, name)))
    with pytest.raises(Exception, match=r"worst at|wrote|run-time addresses"):
        compare(ops.experts(*inputs, target="toy"), inputs, "toy", "wrong")
