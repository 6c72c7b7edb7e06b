"""The whole test pattern for qkv_projection and qkv_projection_kn."""

from __future__ import annotations

import dataclasses
import itertools
from collections import Counter

import nki.isa as nisa
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from nki_kernels import ops
from nki_kernels.hardware import spec_for
from nki_kernels.kernels.projection import ProjectionConfig
from nki_kernels.kernels.projection import qkv as kernel
from nki_kernels.machine.errors import ConfigError, DtypeError, OptionError, ShapeError
from nki_kernels.machine.tensor import Abstract
from nki_kernels.machine.trace import DmaWork, PeWork
from nki_kernels.operators import OPERATORS
from nki_kernels.operators.shapes import cases
from reference.projection import qkv_projection as reference
from tests.operators.test_matmul import DTYPES
from tests.strategies.matrices import extents, normal, seeds, small_integers
from tests.tolerance import assert_close

OPS = [OPERATORS["qkv_projection"], OPERATORS["qkv_projection_kn"]]
TOY, TRN2 = spec_for("toy"), spec_for("trn2")
KINDS = ["bfloat16", "float32"]
EXTRAS = list(itertools.product([False, True], repeat=4))  # bias, norm, norms of heads, rope
parametrize_op = pytest.mark.parametrize("op", OPS, ids=lambda op: op.name)


def operands(op, axes, dtype, used=(True, True, True, True), seed=0, make=normal):
    """Return x, weight and the optional operands by name, all as the operator takes them."""
    shapes = op.input_shapes({"F": 1, **axes, "C": axes["Q"] + 2 * axes["G"]})
    arrays = [make(seed + i, s, DTYPES[dtype]) for i, s in enumerate(shapes[:6])]
    angle = np.random.default_rng(seed).uniform(-3, 3, shapes[6])
    arrays += [np.cos(angle).astype(np.float32), np.sin(angle).astype(np.float32)]
    bias, norm, heads, rope = used
    kept = (True, True, bias, norm, heads, heads, rope, rope)
    return [array if keep else None for array, keep in zip(arrays, kept, strict=True)]


def run(op, inputs, axes, **keywords):
    x, weight, bias, norm, q_norm, k_norm, cos, sin = inputs
    rope = None if cos is None else (cos, sin)
    given = {"norm_weight": norm, "q_norm": q_norm, "k_norm": k_norm, "rope": rope}
    sizes = {"heads": axes["Q"], "kv_heads": axes["G"], "transpose_weight": op is OPS[0]}
    return ops.qkv_projection(x, weight, bias, **given, **sizes, **keywords)


def compare(got, op, inputs, axes, target, case):
    sizes = {"heads": axes["Q"], "kv_heads": axes["G"], "transpose_weight": op is OPS[0]}
    chain = op.chain(axes, spec_for(target))
    keywords = {"op": op.name, "roundings": op.roundings, "chain": chain}
    for name, array, ref in zip("qkv", got, reference(*inputs, **sizes), strict=True):
        assert_close(array, ref.value, ref.magnitude, case=f"{case} {name}", **keywords)


def sizes(t, h, q, g, d, f=1):
    return {"T": t, "H": h, "Q": q, "G": g, "D": d, "F": f}


@parametrize_op
def test_named_cases_match_the_reference(op):
    for case in cases(op.name):
        config = op.configure(case.axes, "bfloat16", TRN2)
        axes = {**case.axes, "T": min(case.axes["T"], 131), "H": 140 + case.axes["H"] % 128}
        axes |= {"Q": 5, "G": 1, "C": 7}
        inputs = operands(op, axes, "bfloat16")
        compare(run(op, inputs, axes, config=config, target="trn2"), op, inputs, axes, "trn2", case)


@parametrize_op
@given(
    dtype=st.sampled_from(KINDS),
    seed=seeds(),
    used=st.sampled_from(EXTRAS),
    t=extents(TOY.stationary_fmax, 3 * TOY.stationary_fmax),
    h=extents(TOY.partitions, 40),
    q=st.integers(1, 9),
    g=st.integers(1, 4),
    d=extents(TOY.moving_fmax // 2, TOY.moving_fmax),
    data=st.data(),
)
def test_any_shape_matches_the_reference(op, dtype, seed, used, t, h, q, g, d, data):
    pairs = data.draw(st.integers(1, max(1, d // 2)))
    used = (*used[:3], used[3] and d > 1)
    axes = sizes(t, h, q, g, d, pairs)
    inputs = operands(op, axes, dtype, used, seed)
    got = run(op, inputs, axes, target="toy")
    compare(got, op, inputs, axes, "toy", f"{axes} {used}")


@pytest.mark.parametrize("target", ["trn1", "trn2", "trn3"])
@pytest.mark.parametrize("dtype", KINDS)
@pytest.mark.parametrize("tokens", [3, 131])
def test_every_generation_matches_the_reference(target, dtype, tokens):
    axes = sizes(tokens, 135, 6, 2, 96, 40)
    for op in OPS:
        inputs = operands(op, axes, dtype)
        compare(run(op, inputs, axes, target=target), op, inputs, axes, target, "ragged")


@parametrize_op
@given(seed=seeds(), t=st.integers(1, 20), h=st.integers(1, 30), bias=st.booleans())
def test_small_integers_are_exact(op, seed, t, h, bias):
    axes = sizes(t, h, 5, 2, 6, 2)
    make = lambda *at: small_integers(*at, most=8)  # noqa: E731
    inputs = operands(op, axes, "bfloat16", (bias, False, False, True), seed, make)
    quarter = np.random.default_rng(seed).integers(-1, 2, inputs[6].shape).astype(np.float32)
    inputs[6], inputs[7] = quarter, (1 - abs(quarter)).astype(np.float32)
    got = run(op, inputs, axes, out_dtype="float32", target="toy")
    want = reference(*inputs, heads=5, kv_heads=2, transpose_weight=op is OPS[0])
    for array, ref in zip(got, want, strict=True):
        assert (array == ref.value).all()


def test_without_extras_it_is_the_matmul_to_the_bit():
    axes = sizes(21, 30, 3, 2, 8)
    x, weight, *_ = operands(OPS[0], axes, "bfloat16")
    same = ops.matmul(x, weight.reshape(-1, 30), transpose_b=True, target="toy")
    for flat in (weight, weight.reshape(-1, 30)):
        got = ops.qkv_projection(x, flat, heads=3, kv_heads=2, target="toy")
        joined = np.concatenate([part.reshape(21, -1) for part in got], axis=1)
        assert joined.tobytes() == same.tobytes()


def test_a_flat_weight_and_bias_are_those_by_heads():
    axes = sizes(5, 9, 2, 1, 4, 2)
    for op in OPS:
        inputs = operands(op, axes, "float32")
        want = run(op, inputs, axes, target="toy")
        flat = [inputs[0], inputs[1].reshape((-1, 9) if op is OPS[0] else (9, -1))]
        got = run(op, [*flat, inputs[2].reshape(-1), *inputs[3:]], axes, target="toy")
        assert all(a.tobytes() == b.tobytes() for a, b in zip(got, want, strict=True))


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_a_special_value_reaches_its_token_and_no_other(value):
    axes = sizes(9, 17, 3, 2, 6, 3)
    inputs = operands(OPS[0], axes, "float32")
    inputs[0][2, 3] = value
    for part in run(OPS[0], inputs, axes, target="toy"):
        assert np.isnan(part[2]).all()
        assert np.isfinite(np.delete(part, 2, axis=0)).all()


def test_heads_of_zeros_stay_zeros():
    axes = sizes(4, 7, 2, 1, 4, 2)
    inputs = operands(OPS[0], axes, "float32", (False, True, True, True))
    inputs[0][1] = 0
    for part in run(OPS[0], inputs, axes, target="toy"):
        assert (part[1] == 0).all()


CONFIGS = [
    ProjectionConfig(product, chunk, pool)
    for base in [OPS[0].configure(sizes(40, 30, 9, 2, 8), "float32", TOY).product]
    for product in (
        dataclasses.replace(base, wave_m=1, wave_n=1, prefetch=1, tail=0),
        dataclasses.replace(base, wave_m=2, wave_n=1, prefetch=3, tail=99, hold_a=False),
        dataclasses.replace(base, wave_m=1, wave_n=2, prefetch=2, tail=2, evict_scalar=False),
        dataclasses.replace(base, wave_m=1, wave_n=1, rows=8),
    )
    for chunk, pool in ((5, True), (4096, False))
]


@parametrize_op
@pytest.mark.parametrize("dtype", KINDS)
@pytest.mark.parametrize("tokens", [5, 21])
def test_no_config_changes_the_mathematics(op, dtype, tokens):
    axes = sizes(tokens, 30, 9, 2, 8, 3)
    inputs = operands(op, axes, dtype)
    for config in CONFIGS:
        assert op.config_problems(config, dtype, TOY) == ()
        got = run(op, inputs, axes, config=config, target="toy")
        compare(got, op, inputs, axes, "toy", repr(config))


@given(
    t=st.integers(1, 5000), h=st.integers(1, 9000), q=st.integers(1, 130), g=st.integers(1, 70),
    d=st.integers(1, 512),
)  # fmt: skip
@pytest.mark.parametrize("target", ["trn1", "trn2"])
@pytest.mark.parametrize("dtype", KINDS)
def test_a_chosen_config_has_no_problems(dtype, target, t, h, q, g, d):
    axes, spec = {**sizes(t, h, q, g, d), "C": q + 2 * g}, spec_for(target)
    for op in OPS:
        config = op.configure(axes, dtype, spec)
        assert op.config_problems(config, dtype, spec) == ()
        small = op.reduced(axes, config, spec)
        assert all(1 <= small[letter] <= axes[letter] for letter in axes)
        assert small["C"] == small["Q"] + 2 * small["G"]


@pytest.mark.parametrize("axes", [(600, 8192, 4, 1, 128, 64), (16, 16384, 40, 4, 128, 64)])
@pytest.mark.parametrize("dtype", KINDS)
def test_wide_layers_fit(axes, dtype):
    op, axes = OPS[0], sizes(*axes)
    shapes = op.input_shapes({**axes, "C": axes["Q"] + 2 * axes["G"]})
    tables = [Abstract(shape, "float32") for shape in shapes[6:]]
    inputs = [*(Abstract(shape, dtype) for shape in shapes[:6]), *tables]
    options = {"heads": axes["Q"], "kv_heads": axes["G"]}
    assert op.launch(inputs, options, target="trn2").time().total_ns > 0


@pytest.mark.parametrize(
    ("error", "text", "change"),
    [
        (ShapeError, "the weight has 4 heads, heads is 3 and kv_heads 1; heads + 2 kv_heads = 5",
         {"heads": 3}),
        (ShapeError, "F is 3, 6 columns in pairs, and D is 4; at most F = D / 2 = 2",
         {"rope": (np.ones((2, 3), np.float32),) * 2}),
        (ShapeError, "T is 2 in x [T, H] = [2, 3] but 1 in cos",
         {"rope": (np.ones((1, 2), np.float32),) * 2}),
        (OptionError, "heads is 0; it must be an int of at least 1", {"heads": 0}),
        (OptionError, "kv_heads is 1.0; it must be an int of at least 1", {"kv_heads": 1.0}),
        (OptionError, "one of cos and sin is None; a rotation takes both",
         {"rope": (np.ones((2, 2), np.float32), None)}),
        (DtypeError, "cos has dtype float64; it must be float32", {"rope": (np.ones((2, 2)),) * 2}),
        (ConfigError, "config is 3; a ProjectionConfig is needed", {"config": 3}),
    ],
)  # fmt: skip
def test_wrong_calls_say_why(error, text, change):
    x, weight, *_ = operands(OPS[0], sizes(2, 3, 2, 1, 4), "float32")
    call = {"heads": 2, "kv_heads": 1, "target": "toy", **change}
    with pytest.raises(error) as caught:
        ops.qkv_projection(x, weight, **call)
    assert text in str(caught.value)


def test_a_head_beyond_a_bank_says_so():
    x, weight, *_ = operands(OPS[0], sizes(2, 3, 1, 1, 33), "float32")
    with pytest.raises(ShapeError, match="D is 33; a head must fit one bank of PSUM, at most D = "):
        ops.qkv_projection(x, weight, heads=1, kv_heads=1, target="toy")


# -- counts ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("used", EXTRAS)
def test_what_an_extra_adds_is_exactly_its_instructions(used):
    op, axes = OPS[1], sizes(20, 24, 5, 2, 8, 3)
    config = op.configure({**axes, "C": 9}, "bfloat16", TOY)
    inputs = operands(op, axes, "bfloat16", used)
    options = {"heads": 5, "kv_heads": 2}
    trace = op.launch(inputs, options, config=config, target="toy").trace
    plain = op.launch(operands(op, axes, "bfloat16", (False,) * 4), options, config=config,
                      target="toy").trace  # fmt: skip
    bias, norm, heads, rope = used
    each = TOY.moving_fmax // 8
    tiles_q, tiles_k = -(-5 // each), -(-2 // each)
    rows, blocks = 3, -(-20 // (config.product.wave_m * TOY.stationary_fmax))
    treated = rows * (tiles_q + tiles_k)  # q and k
    before = Counter(e.opcode for e in plain)
    want = Counter(before)
    waves = -(-(tiles_q + 2 * tiles_k) // config.product.wave_n)
    want["dma_copy"] += bias * blocks * waves + norm * (1 + rows) + 2 * heads + rope * 2 * rows
    want["memset"] += norm + heads
    want["nc_transpose"] += norm
    want["activation"] += norm * 2 * rows + heads * (rows * 7 + treated)
    want["scalar_tensor_tensor"] += heads * rows * 7
    want["tensor_tensor"] += rope * treated * 6
    want["tensor_copy"] += norm + rope * treated
    want["tensor_scalar"] += norm * (rows + blocks * 3) + heads * treated
    got = Counter(e.opcode for e in trace)
    evictions = rows * (tiles_q + 2 * tiles_k)
    opcodes = (
        "tensor_copy",
        "tensor_tensor",
        "scalar_tensor_tensor",
        "activation",
        "tensor_scalar",
    )
    # The evictions change their form: whatever it is, there is one for each tile.
    assert sum(got[o] for o in opcodes) == sum(want[o] for o in opcodes)
    assert sum(before[o] for o in opcodes) == evictions
    assert {o: n for o, n in got.items() if o not in opcodes} == {
        o: n for o, n in want.items() if n and o not in opcodes
    }
    passes = [e.work for e in trace if isinstance(e.work, PeWork) and e.work.mode == "matmul"]
    assert 2 * sum(work.macs for work in passes) == op.flops({**axes, "C": 9})
    moved = [e.work for e in trace if isinstance(e.work, DmaWork)]
    assert sum(work.hbm_write_bytes for work in moved) == 2 * 20 * 9 * 8


def test_values_change_no_event():
    axes = sizes(21, 37, 5, 2, 8, 3)
    inputs = operands(OPS[0], axes, "bfloat16")
    shapes = [Abstract(x.shape, x.dtype) for x in inputs]
    options = {"heads": 5, "kv_heads": 2}
    first, second = (OPS[0].launch(i, options, target="toy").trace for i in (inputs, shapes))
    assert [(e.opcode, e.work) for e in first] == [(e.opcode, e.work) for e in second]


# -- mutants ---------------------------------------------------------------------------------------


def swap_cos_and_sin(monkeypatch):
    real = kernel.products
    monkeypatch.setattr(kernel, "products", lambda z, tables, pool: real(z, tables[::-1], pool))


def the_first_head_for_all(monkeypatch):
    real = kernel.scale_heads

    def wrong(dst, z, factors, gain):
        real(dst, z, factors[:, 0:1].broadcast(1, z.shape[1]), gain)

    monkeypatch.setattr(kernel, "scale_heads", wrong)


def forget_to_rotate(monkeypatch):
    def wrong(dst, z, parts):
        nisa.tensor_copy(dst=dst, src=z)

    monkeypatch.setattr(kernel, "combine", wrong)


@pytest.mark.parametrize("dtype", KINDS)
@pytest.mark.parametrize(
    "mutant",
    [swap_cos_and_sin, the_first_head_for_all, forget_to_rotate],
    ids=lambda f: f.__name__,
)
def test_a_mutated_kernel_is_rejected(mutant, dtype, monkeypatch):
    axes = sizes(20, 24, 5, 2, 8, 3)
    inputs = operands(OPS[1], axes, dtype)
    compare(run(OPS[1], inputs, axes, target="toy"), OPS[1], inputs, axes, "toy", "right")
    mutant(monkeypatch)
    got = run(OPS[1], inputs, axes, target="toy")
    with pytest.raises(AssertionError, match="worst at"):
        compare(got, OPS[1], inputs, axes, "toy", mutant.__name__)
