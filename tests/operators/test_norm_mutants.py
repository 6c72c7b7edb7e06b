"""Mutated bodies of the normalization kernels: the comparison must reject each of them.

A mutant replaces a piece of a kernel, or an instruction it calls. It must be seen in every dtype,
or only in float32 where it loses what the narrow types have not got; the shape has four row tiles
and several chunks, the last of each ragged.
"""

from __future__ import annotations

import sys

import nki.isa as nisa
import nki.language as nl
import numpy as np
import pytest

from nki_kernels.kernels.norm import LayerNormConfig, RmsNormConfig
from nki_kernels.kernels.norm import moments as moments_module
from nki_kernels.kernels.norm import rows as rows_module
from nki_kernels.machine.errors import NkiKernelsError
from nki_kernels.operators import OPERATORS
from tests.operators.norms import DTYPES, NORMS, TOY, TRN2, call, compare, operands

N, H = 3 * TOY.partitions + 5, 45
EPS = 0.25
CONFIGS = {
    "rms_norm": RmsNormConfig(
        chunk=13, piece=7, ahead=1, together=0, scalar=0, pool=0, hwdge=True,
    ),
    "layer_norm": LayerNormConfig(
        vector_stats=5, pool_shift=3, pool_scale=5,
        chunk=13, piece=7, ahead=0, overlap=True, hwdge=True,
    ),
}  # fmt: skip


class Patch:
    """Replaces pieces of the kernel of one operator, and instructions, for one test."""

    def __init__(self, op, monkeypatch):
        self.op = op
        self.monkeypatch = monkeypatch
        # The package exports kernels under the names of their modules: ask for the module itself.
        self.module = sys.modules[OPERATORS[op].kernel.__module__]

    def piece(self, name, change, module=None):
        """Replace a function of the kernel's module (or another) by change(real, ...)."""
        module = module or self.module
        real = getattr(module, name)
        self.monkeypatch.setattr(module, name, lambda *a, **k: change(real, *a, **k))

    def sums(self, change):
        """Replace the sums of the Scalar engine, a chunk each, by change(real, ...)."""
        self.piece("accumulate_chunk", change, module=rows_module)

    def parameters(self, change):
        """Replace the broadcast of columns of a parameter by change(real, ...)."""
        module = self.module if self.op == "layer_norm" else rows_module
        self.piece("broadcast_columns", change, module=module)

    def instruction(self, name, change):
        """Replace an instruction by change(real, ...); the kernels call with keywords only."""
        real = getattr(nisa, name)
        self.monkeypatch.setattr(nisa, name, lambda **k: change(real, **k))


def to_bfloat16(tile):
    """Round an SBUF tile in place, by two instructions."""
    narrow = nl.ndarray(tile.shape, dtype=nl.bfloat16, buffer=nl.sbuf)
    nisa.tensor_copy(dst=narrow, src=tile)
    nisa.tensor_copy(dst=tile, src=narrow)


# -- statistics ------------------------------------------------------------------------------------


def drop_half_a_chunk(patch):
    """Leave out half of each chunk of the sums of the Scalar engine."""

    def shorter(real, op, columns, *args, **kwargs):
        return real(op, columns[:, 0 : (columns.shape[1] + 1) // 2], *args, **kwargs)

    patch.sums(shorter)


def drop_the_last_column(patch):
    def shorter(real, op, columns, *args, **kwargs):
        return real(op, columns[:, 0 : max(1, columns.shape[1] - 1)], *args, **kwargs)

    patch.sums(shorter)


def count_the_first_column_twice(patch):
    def again(real, op, columns, total, first, *args, **kwargs):
        real(op, columns[:, 0:1], None, first, *args, **kwargs)
        return real(op, columns, total, False, *args, **kwargs)

    patch.sums(again)


def divide_by_one_less(patch):
    """Divide the sum of squares by H - 1, as an estimate from a sample would."""

    def unbiased(real, squares, scale, epsilon):
        # rms_norm divides here; layer_norm's variance comes divided already.
        return real(squares, scale * H / (H - 1), epsilon)

    patch.piece("shifted_squares", unbiased, module=moments_module)


def forget_eps(patch):
    patch.piece("root_constants", lambda real, value: real(0.0))


def add_eps_outside_the_root(patch):
    """1 / (sqrt(v) + eps), not 1 / sqrt(v + eps)."""

    def outside(real, squares, scale, epsilon):
        root = nl.ndarray(squares.shape, dtype=nl.float32, buffer=nl.sbuf)
        nisa.activation(dst=root, op=nl.sqrt, data=squares, scale=scale)
        eps = epsilon[0 : squares.shape[0], :]
        nisa.tensor_tensor(dst=root, data1=root, data2=eps, op=nl.add)
        # The root that follows takes it back.
        nisa.tensor_tensor(dst=root, data1=root, data2=root, op=nl.multiply)
        return root

    patch.piece("shifted_squares", outside, module=moments_module)


def round_the_factor(patch):
    """Keep 1 / sqrt(...) in bfloat16."""

    def rounded(real, **k):
        real(**k)
        if k["op0"] == nl.rsqrt:
            to_bfloat16(k["dst"])

    patch.instruction("tensor_scalar", rounded)


def round_the_sums(patch):
    """Keep the sums of the Scalar engine in bfloat16."""

    def rounded(real, op, columns, total, *args, **kwargs):
        real(op, columns, total, *args, **kwargs)
        if total is not None:
            to_bfloat16(total)

    patch.sums(rounded)


def use_the_factor_of_the_first_rows(patch):
    """Reuse what the first row tile had."""
    first = []

    def stale(real, *args):
        first.append(real(*args))
        mine, old = first[-1], first[0]
        rows = (mine[1] if isinstance(mine, tuple) else mine).shape[0]
        return tuple(t[0:rows] for t in old) if isinstance(old, tuple) else old[0:rows]

    patch.piece("reciprocal_rms" if patch.op == "rms_norm" else "merge_moments", stale)


# -- statistics of layer_norm ----------------------------------------------------------------------


def forget_the_mean(patch):
    """Scale the rows without centring them."""

    def uncentred(real, *args):
        mean, factor = real(*args)
        nisa.memset(dst=mean, value=0.0)
        return mean, factor

    patch.piece("merge_moments", uncentred)


def drop_the_last_bn_stats(patch):
    """Aggregate all triples but the last."""

    def fewer(real, **k):
        data = k["data"]
        return real(**{**k, "data": data[:, 0 : data.shape[1] - 3]})

    patch.instruction("bn_aggr", fewer)


def weigh_the_pieces_alike(patch):
    """Give the columns of the Scalar engine the count of a whole row."""

    def miscounted(real, **k):
        return real(**{**k, "value": float(H)} if EPS < k["value"] < H else k)

    patch.instruction("memset", miscounted)


def square_about_zero(patch):
    """Sum the squares of the Scalar engine's columns about 0, not about their mean."""

    def about_zero(real, op, columns, total, first, scale=1.0, bias=None):
        return real(op, columns, total, first, scale, None if op == nl.square else bias)

    patch.sums(about_zero)


# -- scaling and storing ---------------------------------------------------------------------------


def forget_the_parameters(patch):
    def ones(real, tile, vector, cut, config):
        nisa.memset(dst=tile[:, cut[0] : cut[1]], value=1.0)

    patch.parameters(ones)


def shift_the_weight_by_a_column(patch):
    def shifted(real, tile, vector, cut, config):
        real(tile, vector, cut, config)
        left, right = cut
        moved = nl.ndarray((tile.shape[0], right - left), dtype=tile.dtype, buffer=nl.sbuf)
        nisa.tensor_copy(dst=moved, src=tile[:, left:right])
        nisa.tensor_copy(dst=tile[:, left + 1 : right], src=moved[:, 0 : right - left - 1])

    patch.parameters(shifted)


def store_a_stale_tile(patch):
    stores = []

    def stale(real, **k):
        if nl.is_hbm(k["dst"].buffer):
            stores.append(k["src"])
            same = [s for s in stores[:-1] if s.shape == k["src"].shape]
            k["src"] = same[0] if same else k["src"]
        return real(**k)

    patch.instruction("dma_copy", stale)


def load_the_wrong_rows(patch):
    """Load the first rows for every row tile."""

    def first(real, x, start, stop, config):
        return real(x, 0, stop - start, config)

    def first_chunk(real, x, rows, *args):
        return real(x, (0, rows[1] - rows[0]), *args)

    if patch.op == "rms_norm":
        patch.piece("load_rows", first, module=rows_module)
    else:
        patch.piece("load_pieces", first_chunk)


def round_before_the_weight(patch):
    """Round x / rms to the dtype of x before the multiplication, as some models do."""

    def twice(real, **k):
        columns = k["data"]
        narrow = nl.ndarray(columns.shape, dtype=columns.dtype, buffer=nl.sbuf)
        nisa.tensor_scalar(dst=narrow, data=columns, op0=k["op0"], operand0=k["operand0"])
        return nisa.tensor_tensor(dst=k["dst"], data1=narrow, data2=k["operand1"], op=k["op1"])

    patch.instruction("scalar_tensor_tensor", twice)


ANY, WIDE, NARROW = tuple(DTYPES), ("float32",), ("bfloat16", "float16")
BOTH = [
    (drop_half_a_chunk, ANY), (drop_the_last_column, ANY), (count_the_first_column_twice, ANY),
    (divide_by_one_less, ANY), (forget_eps, ANY), (add_eps_outside_the_root, ANY),
    (round_the_factor, WIDE), (round_the_sums, WIDE), (use_the_factor_of_the_first_rows, ANY),
    (forget_the_parameters, ANY), (shift_the_weight_by_a_column, ANY), (store_a_stale_tile, ANY),
    (load_the_wrong_rows, ANY),
]  # fmt: skip
OWN = {
    "rms_norm": [(round_before_the_weight, NARROW)],
    "layer_norm": [
        (forget_the_mean, ANY), (drop_the_last_bn_stats, ANY), (weigh_the_pieces_alike, ANY),
        (square_about_zero, ANY), (round_before_the_weight, NARROW),
    ],
}  # fmt: skip
MUTANTS = [
    (op, mutant, dtype) for op in NORMS for mutant, dtypes in BOTH + OWN[op] for dtype in dtypes
]


@pytest.mark.parametrize(
    ("op", "mutant", "dtype"), MUTANTS, ids=[f"{o}-{m.__name__}-{d}" for o, m, d in MUTANTS]
)
def test_a_mutated_kernel_is_rejected(op, mutant, dtype, monkeypatch):
    x, *vectors = operands(op, N, H, dtype)
    # A mean of the order of the spread, so that centring matters.
    inputs = ((x.astype(np.float64) + 0.5).astype(x.dtype), *vectors)

    def run():
        return call(op, inputs, eps=EPS, config=CONFIGS[op], target="toy")

    compare(op, run(), inputs, "toy", "right", eps=EPS)
    mutant(Patch(op, monkeypatch))
    with pytest.raises(AssertionError, match="worst at"):
        compare(op, run(), inputs, "toy", mutant.__name__, eps=EPS)


@pytest.mark.parametrize(
    ("mutant", "h", "dtype"),
    [
        (round_the_sums, 4096, "float32"),
        (round_the_factor, 4096, "float32"),
        (drop_half_a_chunk, 16384, "float32"),
        (drop_half_a_chunk, 16384, "bfloat16"),
    ],
)
@pytest.mark.parametrize("op", NORMS)
def test_the_bound_still_bites_on_long_rows(op, mutant, h, dtype, monkeypatch):
    """The bound grows with H, since a sum in order may lose H roundings: this is what is left."""
    inputs = operands(op, 2 * TRN2.partitions, h, dtype)
    compare(op, call(op, inputs, target="trn2"), inputs, "trn2", "right")
    mutant(Patch(op, monkeypatch))
    with pytest.raises(AssertionError, match="worst at"):
        compare(op, call(op, inputs, target="trn2"), inputs, "trn2", mutant.__name__)


@pytest.mark.parametrize("h", [45, 2880])
def test_a_variance_that_cancels_is_rejected(h, monkeypatch):
    """mean(x^2) - mean(x)^2 in float32 passes on centred rows, and not where the mean is large."""
    target = "toy" if h < 100 else "trn2"
    x, weight, bias = operands("layer_norm", 20, h, "float32")

    def textbook(real, partial, epsilon):
        mean, shifted = real(partial, epsilon)
        (tile,) = last
        rows, size = tile.shape
        sums = nl.ndarray((rows, 2), dtype=nl.float32, buffer=nl.sbuf)
        scratch = nl.ndarray((rows, size), dtype=nl.bfloat16, buffer=nl.sbuf)
        for op, column in ((nl.copy, 0), (nl.square, 1)):
            nisa.activation(
                dst=scratch, op=op, data=tile, reduce_op=nl.add,
                reduce_res=sums[:, column : column + 1], reduce_cmd=nisa.reduce_cmd.reset_reduce,
            )  # fmt: skip
        nisa.tensor_scalar(dst=sums, data=sums, op0=nl.multiply, operand0=1.0 / size)
        nisa.tensor_tensor(dst=mean, data1=sums[:, 0:1], data2=sums[:, 0:1], op=nl.multiply)
        nisa.tensor_tensor(dst=shifted, data1=sums[:, 1:2], data2=mean, op=nl.subtract)
        nisa.tensor_scalar(
            dst=shifted, data=shifted, op0=nl.maximum, operand0=0.0,
            op1=nl.add, operand1=epsilon[0:rows, :],
        )  # fmt: skip
        nisa.tensor_copy(dst=mean, src=sums[:, 0:1])
        return mean, shifted

    last = []

    def remember(real, tile, *args):
        last[:] = [tile]
        return real(tile, *args)

    patch = Patch("layer_norm", monkeypatch)
    patch.piece("merge_moments", textbook)
    patch.piece("measure_moments", remember)

    def check(rows):
        inputs = (rows.astype(np.float32), weight, bias)
        compare("layer_norm", call("layer_norm", inputs, target=target), inputs, target, "cancel")

    check(x)
    with pytest.raises(AssertionError, match="worst at"):
        check(x + 1e4)


@pytest.mark.parametrize("op", NORMS)
def test_a_kernel_that_forgets_to_write_is_refused(op, monkeypatch):
    inputs = operands(op, N, H, "float32")
    run = OPERATORS[op].launch(inputs, {}, config=CONFIGS[op], target="toy")
    stores = sum(
        event.opcode == "dma_copy" and event.writes[0].tile.memory == "hbm" for event in run.trace
    )
    seen = []

    def forgetful(real, **k):
        if nl.is_hbm(k["dst"].buffer):
            seen.append(k["dst"])
            if len(seen) == stores:
                return None
        return real(**k)

    Patch(op, monkeypatch).instruction("dma_copy", forgetful)
    with pytest.raises(NkiKernelsError, match="no instruction wrote"):
        call(op, inputs, config=CONFIGS[op], target="toy")
