"""The test pattern of rope: properties, exactness, illegal calls, mutants, counts."""

from __future__ import annotations

import sys
from collections import Counter

import ml_dtypes
import nki.isa as nisa
import nki.language as nl
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import reference.rope
from nki_kernels import ops
from nki_kernels.hardware import spec_for
from nki_kernels.machine.errors import ConfigError, DtypeError, OptionError, ShapeError
from nki_kernels.machine.trace import DmaWork
from nki_kernels.operators.rope import ROPES, RopeConfig
from tests.operators.test_contract import Symbol
from tests.strategies.matrices import extents, normal, seeds, small_integers, wide
from tests.tolerance import assert_close

DTYPES = {"bfloat16": ml_dtypes.bfloat16, "float16": np.float16, "float32": np.float32}
TOY, TRN2 = spec_for("toy"), spec_for("trn2")
TRUTH = st.booleans()


def operands(shape, pairs, dtype, seed=0, batched=False, make=normal):
    b, _, s, _ = shape
    angles = (b, s, pairs) if batched else (s, pairs)
    table = [make(seed + 1 + i, angles, np.float32) for i in range(2)]
    return (make(seed, shape, DTYPES[dtype]), *table)


def compare(got, inputs, case, interleaved=False, inverse=False):
    ref = reference.rope.rope(*inputs, interleaved=interleaved, inverse=inverse)
    op = ROPES[inputs[1].ndim == 3]
    chain = op.chain({}, TRN2)
    assert_close(
        got, ref.value, ref.magnitude, op="rope", case=case, roundings=op.roundings, chain=chain
    )


sizes = {
    "b": st.integers(1, 3),
    "h": extents(TOY.partitions // 2, TOY.partitions + 3),
    "s": extents(TOY.partitions, 3 * TOY.partitions + 3),
    "d": st.integers(2, 12),
}


@given(dtype=st.sampled_from(list(DTYPES)), seed=seeds(), batched=TRUTH, interleaved=TRUTH,
       inverse=TRUTH, uneven=TRUTH, partial=st.data(), **sizes)  # fmt: skip
def test_any_shape_matches_the_reference(
    b, h, s, d, dtype, seed, batched, interleaved, inverse, uneven, partial
):
    pairs = partial.draw(st.integers(1, d // 2))
    inputs = operands((b, h, s, d), pairs, dtype, seed, batched, wide if uneven else normal)
    got = ops.rope(*inputs, interleaved=interleaved, inverse=inverse, target="toy")
    compare(got, inputs, f"{b}x{h}x{s}x{d} {pairs}", interleaved, inverse)
    rest = slice(2 * pairs, d)
    assert (got[..., rest] == inputs[0][..., rest]).all()


@pytest.mark.parametrize("target", ["trn1", "trn2", "trn3"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("shape", "pairs"), [((1, 2, 261, 128), 64), ((2, 3, 128, 96), 16), ((16, 9, 1, 64), 32)]
)
@pytest.mark.parametrize("batched", [False, True])
def test_real_sizes_match_the_reference(shape, pairs, dtype, target, batched):
    inputs = operands(shape, pairs, dtype, batched=batched)
    compare(ops.rope(*inputs, target=target), inputs, f"{shape}")


@given(rows=st.integers(1, 4), pool=st.integers(0, 5), ahead=st.integers(0, 2), seed=seeds(),
       hwdge=TRUTH, interleaved=TRUTH, s=sizes["s"])  # fmt: skip
def test_no_config_changes_a_bit(rows, pool, ahead, seed, hwdge, interleaved, s):
    inputs = operands((2, 3, s, 6), 2, "bfloat16", seed)
    config = RopeConfig(rows=rows, pool=pool, ahead=ahead, hwdge=hwdge)
    got = ops.rope(*inputs, interleaved=interleaved, config=config, target="toy")
    want = ops.rope(*inputs, interleaved=interleaved, target="toy")
    assert got.tobytes() == want.tobytes()


@given(seed=seeds(), interleaved=TRUTH, inverse=TRUTH, s=sizes["s"])
def test_integers_are_exact(seed, interleaved, inverse, s):
    x, cos, sin = operands(
        (1, 2, s, 8), 3, "float32", seed, make=lambda *where: small_integers(*where, most=9)
    )
    got = ops.rope(x, cos, sin, interleaved=interleaved, inverse=inverse, target="toy")
    assert (got == reference.rope.rope(x, cos, sin, interleaved, inverse).value).all()


@given(seed=seeds(), interleaved=TRUTH, s=sizes["s"])
def test_the_inverse_turns_back(seed, interleaved, s):
    """With quarter turns, whose cosine and sine are exact."""
    x, *_ = operands((1, 2, s, 8), 4, "bfloat16", seed)
    turns = np.random.default_rng(seed).integers(0, 4, (s, 4))
    cos, sin = (np.array(table, np.float32)[turns] for table in ([1, 0, -1, 0], [0, 1, 0, -1]))
    turned = ops.rope(x, cos, sin, interleaved=interleaved, target="toy")
    back = ops.rope(turned, cos, sin, interleaved=interleaved, inverse=True, target="toy")
    assert (back == x).all()


@given(seed=seeds(), s=sizes["s"])
def test_angles_of_equal_batches_are_one_table(seed, s):
    x, cos, sin = operands((3, 2, s, 6), 3, "float16", seed)
    twice = [np.repeat(table[None], 3, axis=0) for table in (cos, sin)]
    got = ops.rope(x, *twice, target="toy")
    assert got.tobytes() == ops.rope(x, cos, sin, target="toy").tobytes()


@given(seed=seeds())
def test_layouts_differ_by_a_permutation(seed):
    x, cos, sin = operands((1, 2, 11, 8), 4, "float32", seed)
    order = np.arange(8).reshape(2, 4).T.ravel()
    halves = ops.rope(x, cos, sin, target="toy")
    woven = ops.rope(np.ascontiguousarray(x[..., order]), cos, sin, interleaved=True, target="toy")
    assert woven.tobytes() == halves[..., order].tobytes()


def test_the_contract_never_looks_at_a_size():
    b, h, s, d, f = (Symbol(letter) for letter in "BHSDF")
    for batched, angles in ((False, (s, f)), (True, (b, s, f))):
        (shape,) = ROPES[batched].output_shapes((b, h, s, d), angles, angles)
        assert all(got is want for got, want in zip(shape, (b, h, s, d), strict=True))


def zeros(*shapes, dtype=np.float32):
    return [np.zeros(shape, dtype) for shape in shapes]


ILLEGAL = {
    "too many pairs": (
        zeros((1, 1, 3, 6), (3, 4), (3, 4)), {}, ShapeError,
        ("F is 4, 8 columns in pairs, and D is 6; at most F = D / 2 = 3 pairs are in a row; "
         "cut cos and sin"),
    ),
    "angles of other rows": (
        zeros((1, 1, 3, 6), (4, 3), (4, 3)), {}, ShapeError, "S is 3 in x [B, H, S, D]",
    ),
    "half angles": (
        [*zeros((1, 1, 3, 6)), *zeros((3, 3), (3, 3), dtype=np.float16)], {}, DtypeError,
        "cos has dtype float16; it must be float32; cast it with cos.astype('float32')",
    ),
    "interleaved": (
        zeros((1, 1, 3, 6), (3, 3), (3, 3)), {"interleaved": 1}, OptionError,
        "interleaved is 1; True or False is needed; pass one of them",
    ),
    "inverse": (
        zeros((1, 1, 3, 6), (3, 3), (3, 3)), {"inverse": None}, OptionError, "inverse is None; Tr",
    ),
    "row too long": (
        zeros((1, 1, 130, 8192), (130, 3), (130, 3)), {}, ShapeError,
        ("D is 8192; 1 rows of float32 must fit one partition of SBUF, at most D = "),
    ),
    "no config": (
        zeros((1, 1, 3, 6), (3, 3), (3, 3)), {"config": 7}, ConfigError,
        "config is a int; a RopeConfig is needed; pass one, or None",
    ),
    "no rows": (
        zeros((1, 1, 3, 6), (3, 3), (3, 3)), {"config": RopeConfig(0, 0, 0, True)}, ConfigError,
        "config.rows is 0; at least 1 is needed; raise it",
    ),
    "descriptors": (
        zeros((1, 1, 3, 6), (3, 3), (3, 3)),
        {"config": RopeConfig(1, 0, 0, True), "target": "trn1"}, ConfigError,
        "config.hwdge is True; trn1 has no hardware descriptor engine; set it False",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", ILLEGAL)
def test_an_illegal_call_says_why(name):
    inputs, keywords, error, text = ILLEGAL[name]
    with pytest.raises(error) as caught:
        ops.rope(*inputs, **{"target": "trn2", **keywords})
    assert text in str(caught.value)


def test_the_longest_row_runs():
    with pytest.raises(ShapeError) as caught:
        ops.rope(*zeros((1, 1, 130, 20000), (130, 3), (130, 3)), target="trn2")
    most = int(str(caught.value).partition("at most D = ")[2].split()[0])
    inputs = operands((1, 1, 130, most), most // 2, "float32")
    compare(ops.rope(*inputs, target="trn2"), inputs, "longest")


# -- mutants ---------------------------------------------------------------------------------------


def other_sign(real, first, second, cos, sin, inverse, engine):
    real(first, second, cos, sin, not inverse, engine)


def swapped(real, first, second, cos, sin, inverse, engine):
    real(second, first, cos, sin, inverse, engine)


def sine_for_cosine(real, first, second, cos, sin, inverse, engine):
    real(first, second, sin, cos, inverse, engine)


def first_row_only(real, first, second, cos, sin, inverse, engine):
    one = [t[:, 0:1, :].broadcast(1, first.shape[1]) for t in (cos, sin)]
    real(first, second, *one, inverse, engine)


def half_angles(real, first, second, cos, sin, inverse, engine):
    tables = []
    for table in (cos, sin):
        narrow = nl.ndarray(table.shape, dtype=nl.bfloat16, buffer=nl.sbuf)
        nisa.tensor_copy(dst=narrow, src=table)
        tables.append(narrow)
    real(first, second, *tables, inverse, engine)


MUTANTS = {"half_angles": ["float16", "float32"]}


@pytest.mark.parametrize("mutant", [other_sign, swapped, sine_for_cosine, first_row_only,
                                    half_angles])  # fmt: skip
def test_a_mutant_is_rejected(mutant, monkeypatch):
    module = sys.modules[ROPES[False].kernel.__module__]
    real = module._rotate
    monkeypatch.setattr(module, "_rotate", lambda *args: mutant(real, *args))
    for dtype in MUTANTS.get(mutant.__name__, DTYPES):
        inputs = operands((1, 2, 3 * TOY.partitions, 6), 3, dtype)
        got = ops.rope(*inputs, target="toy")
        with pytest.raises(AssertionError):
            compare(got, inputs, mutant.__name__)


# -- counts ----------------------------------------------------------------------------------------


#: Rows, and the rows per partition of each tile: as many as `rows` while all partitions have them.
TILES = {1: [1], 7: [7], 8: [1], 16: [2], 17: [2, 1], 43: [2, 2, 1, 1]}


@pytest.mark.parametrize("s", TILES)
@pytest.mark.parametrize("batched", [False, True])
def test_instructions_and_bytes_are_exactly_the_formula(s, batched):
    b, h, d, pairs = 2, 3, 6, 2
    config = RopeConfig(rows=2, pool=1, ahead=1, hwdge=True)
    inputs = operands((b, h, s, d), pairs, "bfloat16", batched=batched)
    run = ROPES[batched].launch(inputs, {}, config=config, target="toy")
    by_heads = s < TOY.partitions
    tables = len(TILES[s]) * (b if batched and not by_heads else 1)
    each = 1 if by_heads else b * h
    counts = Counter(event.opcode for event in run.trace)
    assert counts == {
        "dma_copy": 2 * tables + 2 * each * len(TILES[s]),
        # Half of the rows of a partition go to GpSimd, rounded down.
        "tensor_tensor": sum(6 * each * (2 if rows > 1 else 1) for rows in TILES[s]),
    }
    moved = [event.work for event in run.trace if isinstance(event.work, DmaWork)]
    assert sum(work.hbm_write_bytes for work in moved) == 2 * b * h * s * d
    copies = b * h if by_heads else b if batched else 1
    angles = 2 * 4 * copies * s * pairs
    assert sum(work.hbm_read_bytes for work in moved) == 2 * b * h * s * d + angles


def test_work_and_compulsory_bytes():
    axes = {"B": 2, "H": 3, "S": 5, "D": 8, "F": 3}
    assert ROPES[False].flops(axes) == 6 * 2 * 3 * 5 * 3
    assert ROPES[False].min_bytes(axes, "bfloat16") == 2 * 2 * 240 + 2 * 4 * 15
    assert ROPES[True].min_bytes(axes, "bfloat16") == 2 * 2 * 240 + 2 * 4 * 30
