"""Tensor indirection (gen4): gathers and scatters against loops, groups, rules, messages."""

from __future__ import annotations

import nki.isa as nisa
import nki.language as nl
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from nki_kernels.machine.errors import OutOfBounds, RuleViolation, UninitializedRead
from nki_kernels.machine.launch import launch
from nki_kernels.machine.tensor import Abstract
from tests.embedded.calls import SITE
from tests.embedded.harness import (
    Rule,
    check,
    data,
    event,
    hbm,
    ps,
    refused,
    same,
    sb,
    tile,
    values,
)

F32 = np.float32
R = nisa.reduce_cmd
seeds = st.integers(0, 2**20)
TENSOR, OTHERS = 32, 16


def offsets(seed, p, k, limit, distinct=0):
    """An index tile [p, k]; the first `distinct` offsets of every group differ if asked."""
    rng = np.random.default_rng(seed)
    if not distinct:
        return rng.integers(0, limit, (p, k)).astype(np.uint32)
    found = np.zeros((p, k), np.uint32)
    for first in range(0, p, OTHERS):
        for i, at in enumerate(rng.permutation(limit)[:distinct]):
            found[first + i % OTHERS, i // OTHERS] = at
    return found


def offset_of(index, p, i, group=OTHERS):
    """Offset of column i in partition p: element i of the snake through its group's rows."""
    return int(index[p // group * group + i % group, i // group])


def gathered(x, index, count, group=OTHERS):
    flat = x.reshape(x.shape[0], -1)
    return np.array([[flat[p, offset_of(index, p, i, group)] for i in range(count)]
                     for p in range(len(flat))], x.dtype)  # fmt: skip


def scattered(old, new, index):
    flat = old.reshape(old.shape[0], -1).copy()
    for p in range(len(flat)):
        for i in range(new.shape[1]):
            flat[p, offset_of(index, p, i)] = new[p, i]
    return flat.reshape(old.shape)


cases = given(p=st.sampled_from([16, 32, 48, 128]), k=st.integers(1, 2), n=st.integers(1, 9),
              count=st.integers(1, 16), seed=seeds)  # fmt: skip


@cases
def test_a_copy_gathers(p, k, n, count, seed):
    x, index = data(seed, (p, n), nl.bfloat16), offsets(seed, p, k, n)

    def call(y, i):
        dst = sb(p, count, dtype=nl.bfloat16)
        nisa.tensor_copy(dst, tile(y).indirect(tile(i), count), engine=nisa.engine.vector)
        return dst

    same(values(call, x, index, target="trn3"), gathered(x, index, count))


@cases
def test_a_copy_scatters_and_keeps_the_rest(p, k, n, count, seed):
    old, new = data(seed, (p, n), nl.float32), data(seed + 1, (p, count), nl.float32)
    index = offsets(seed, p, k, n)

    def call(y, z, i):
        dst = tile(y)
        nisa.tensor_copy(dst.indirect(tile(i), count), tile(z), engine=nisa.engine.vector)
        return dst

    same(values(call, old, new, index, target="trn3"), scattered(old, new, index))


def test_free_dimensions_are_flattened_and_views_may_have_gaps():
    x = data(0, (16, 4, 3), nl.float32)
    index = offsets(1, 16, 1, 6)

    def call(y, i):
        dst = sb(16, 16)
        nisa.tensor_copy(dst, tile(y)[:, 1:4:2, :].indirect(tile(i)))
        return dst

    same(values(call, x, index, target="trn3"), gathered(x[:, 1:4:2, :], index, 16))


def test_a_scatter_into_a_view_with_gaps():
    old, new, index = np.zeros((16, 4), F32), data(1, (16, 2), nl.float32), offsets(2, 16, 1, 2, 2)

    def call(y, z, i):
        dst = tile(y)
        nisa.tensor_copy(dst[:, 1:4:2].indirect(tile(i), 2), tile(z))
        return dst

    want = old.copy()
    want[:, 1:4:2] = scattered(old[:, 1:4:2], new, index)
    same(values(call, old, new, index, target="trn3"), want)


# -- every instruction that takes them -------------------------------------------------------------

C = 16
CALLS = {
    "tensor_tensor": lambda d, x, y: nisa.tensor_tensor(d, x, y, nl.add),
    "tensor_scalar": lambda d, x, y: nisa.tensor_scalar(d, x, nl.multiply, 2.0),
    "tensor_copy": lambda d, x, y: nisa.tensor_copy(d, x),
    "tensor_scalar_reduce":
        lambda d, x, y: nisa.tensor_scalar_reduce(d, x, nl.add, 1.0, nl.add, sb(16, 1)),
    "tensor_scalar_cumulative":
        lambda d, x, y: nisa.tensor_scalar_cumulative(d, x, nl.multiply, nl.add, 2.0),
    "activation": lambda d, x, y: nisa.activation(d, nl.square, x),
    "activation_reduce":
        lambda d, x, y: nisa.activation_reduce(d, nl.square, x, nl.add, sb(16, 1)),
    "activate2": lambda d, x, y: nisa.activate2(d, nl.copy, x, 1.0, None, nl.add, nl.bypass),
    "exponential": lambda d, x, y: nisa.exponential(d, x),
    "tensor_reduce": lambda d, x, y: nisa.tensor_reduce(d, nl.add, x, axis=1),
}  # fmt: skip


@pytest.mark.parametrize("name", CALLS)
def test_both_operands_of_each_instruction(name):
    """The same as a gather before and a scatter after it."""
    x, y = data(0, (16, 8), nl.float32, 2), data(1, (16, C), nl.float32, 2)
    width = 1 if name == "tensor_reduce" else C
    into = np.zeros((16, 20), F32)
    source, target = offsets(2, 16, 1, 8), offsets(3, 16, 1, 20, width)

    def call(a, b, c, i, j):
        direct, dst = sb(16, width), tile(c)
        columns = tile(a).indirect(tile(i), C)
        staged = sb(16, C)
        nisa.tensor_copy(staged, columns)
        CALLS[name](direct, staged, tile(b))
        CALLS[name](dst.indirect(tile(j), width), columns, tile(b))
        return direct, dst

    direct, dst = values(call, x, y, into, source, target, target="trn3")
    same(dst, scattered(into, direct, target))


def test_a_predicated_copy():
    x, keep = data(0, (16, 6), nl.float32), np.arange(16 * 6).reshape(16, 6).astype(np.uint8) % 3
    index = offsets(1, 16, 1, 6, 4)

    def call(y, k, i):
        dst, at = tile(y), tile(i)
        nisa.tensor_copy_predicated(dst.indirect(at, 4), 9.0, tile(k).indirect(at, 4))
        return dst

    new = np.where(gathered(keep, index, 4) != 0, F32(9), gathered(x, index, 4))
    same(values(call, x, keep, index, target="trn3"), scattered(x, new, index))


# -- the Tensor engine -----------------------------------------------------------------------------


def whole(seed, shape, dtype):
    return np.random.default_rng(seed).integers(-4, 5, shape).astype(dtype)


@given(seed=seeds, k=st.sampled_from([32, 64]), m=st.integers(1, 32), n=st.integers(1, 32))
def test_matmul_operands_gather_in_groups_of_32(seed, k, m, n):
    a, b = whole(seed, (k, 7), "bfloat16"), whole(seed + 1, (k, 9), "bfloat16")
    i, j = offsets(seed, k, 1, 7), offsets(seed + 1, k, 1, 9)

    def call(x, y, p, q):
        acc = ps(m, n)
        nisa.nc_matmul(acc, tile(x).indirect(tile(p), m), tile(y).indirect(tile(q), n))
        return acc

    left, right = gathered(a, i, m, TENSOR).astype(int), gathered(b, j, n, TENSOR).astype(int)
    same(values(call, a, b, i, j, target="trn3"), (left.T @ right).astype(F32))


def mx(dst, left, right, x, y, **options):
    nisa.nc_matmul_mx(dst, left, right, x, y, **options)


def test_microscaled_pairs_gather_by_one_index():
    """The same as data and scales gathered by copies, whose rows without scales stay unwritten."""
    rng = np.random.default_rng(0)
    a, b = (rng.integers(0, 2**16, (64, 6)).astype(np.uint16) for _ in range(2))
    x, y = (rng.integers(125, 129, (64, 6)).astype(np.uint8) for _ in range(2))
    index = offsets(1, 64, 1, 6)

    def call(*arrays):
        at = tile(arrays[4])
        data_ = [tile(t, dtype=nl.float4_e2m1fn_x4) for t in arrays[:2]]
        scales = [sb(64, 6, dtype=nl.uint8) for _ in range(2)]
        for tile_, source in zip(scales, arrays[2:4], strict=True):
            for first in (0, 32):
                nisa.dma_copy(tile_[first : first + 4], source[first : first + 4])
        acc = ps(4, 5)
        mx(acc, data_[0].indirect(at, 4), data_[1].indirect(at, 5),
           scales[0].indirect(at, 4), scales[1].indirect(at, 5))  # fmt: skip
        return acc

    def direct(*arrays):
        acc = ps(4, 5)
        mx(acc, *(tile(t, dtype=nl.float4_e2m1fn_x4) for t in arrays[:2]),
           *(tile(t) for t in arrays[2:]))  # fmt: skip
        return acc

    counts = (4, 5, 4, 5)
    chosen = [gathered(t, index, n, TENSOR) for t, n in zip((a, b, x, y), counts, strict=True)]
    same(values(call, a, b, x, y, index, target="trn3"), values(direct, *chosen, target="trn3"))


def test_a_microscaled_pair_is_one_tensor():
    def call(both):
        words, scale = sb(32, 4, dtype=nl.float8_e4m3fn_x4), sb(32, 4, dtype=nl.uint8)
        one = at(32)
        x = scale.indirect(one, 2) if both else scale[:, 0:2]
        mx(ps(2, 4), words.indirect(one, 2), words, x, scale,
           **({"tile_position": (32, 0), "tile_size": (32, 128)} if both else {}))  # fmt: skip

    refused(lambda: call(False), "stationary and stationary_scale are one tensor", target="trn3")
    refused(lambda: call(True), "tile_position (32, 0); it must be (0, 0)", target="trn3")


@pytest.mark.parametrize("accumulate", [None, True])
def test_a_matmul_scatters_into_its_groups(accumulate):
    a, b = whole(0, (32, 32), "bfloat16"), whole(1, (32, 3), "bfloat16")
    index = np.zeros((32, 1), np.uint32)
    index[:3, 0] = [4, 0, 2]

    def call(x, y, i):
        acc, left, right, at = ps(32, 6), tile(x), tile(y), tile(i)
        nisa.nc_matmul(acc.indirect(at, 3), left, right)
        nisa.nc_matmul(acc.indirect(at, 3), left, right, accumulate=accumulate)
        nisa.nc_matmul(acc[:, 0:1], left, right[:, 0:1])  # the second product adds there
        return acc[:, 0:1], acc[:, 2:3], acc[:, 4:5]

    product = a.astype(int).T @ b.astype(int)
    zero, two, four = values(call, a, b, index, target="trn3")
    same(four, (2 * product[:, :1]).astype(F32))
    same(zero, (2 * product[:, 1:2] + product[:, :1]).astype(F32))
    same(two, (2 * product[:, 2:]).astype(F32))


def test_adding_where_no_matmul_wrote():
    def call():
        left, at = sb(32, 32, dtype=nl.bfloat16), sb(32, 1, dtype=nl.uint32)
        nisa.memset(left, 0)
        nisa.memset(at, 0)
        nisa.nc_matmul(ps(32, 4).indirect(at, 2), left, left[:, 0:2], accumulate=True)

    refused(call, "accumulate=True on elements", target="trn3")


# -- what was written, values, events --------------------------------------------------------------


def test_only_the_chosen_columns_need_have_been_written():
    index = np.array([[0]] * 8 + [[2]] * 8, np.uint32)

    def call(i):
        x, dst = sb(16, 4), sb(16, 16)
        nisa.memset(x[:, 0:1], 1.0)
        nisa.memset(x[:, 2:3], 2.0)
        nisa.tensor_copy(dst, x.indirect(tile(i)))
        return dst

    assert values(call, index, target="trn3")[3].tolist() == [1] * 8 + [2] * 8


def test_columns_nothing_wrote():
    def call():
        x, at = sb(16, 4), sb(16, 1, dtype=nl.uint32)
        nisa.memset(x[:, 0:1], 1.0)
        nisa.memset(at, 3)
        nisa.tensor_copy(sb(16, 2), x.indirect(at, 2))

    refused(call, "src reads 32 of 32", target="trn3", error=UninitializedRead)


def test_a_scatter_writes_its_columns_only():
    def call():
        x, at = sb(16, 4), sb(16, 1, dtype=nl.uint32)
        nisa.memset(at, 3)
        one = sb(16, 1)
        nisa.memset(one, 1)
        nisa.tensor_copy(x.indirect(at, 1), one)
        nisa.tensor_copy(sb(16, 1), x[:, 3:4])
        nisa.tensor_copy(sb(16, 1), x[:, 2:3])

    refused(call, "src reads 16 of 16", target="trn3", error=UninitializedRead)


def test_offsets_nothing_wrote():
    def call():
        x = sb(16, 4)
        nisa.memset(x, 0)
        nisa.tensor_copy(sb(16, 16), x.indirect(sb(16, 1, dtype=nl.uint32)))

    refused(call, "the index of src", target="trn3", error=UninitializedRead)


@pytest.mark.parametrize("bad", [4, -1])
def test_an_offset_outside(bad):
    def call():
        x, at = sb(16, 4), sb(16, 1, dtype=nl.int32)
        nisa.memset(x, 0)
        nisa.memset(at, bad)
        nisa.tensor_copy(sb(16, 16), x.indirect(at))

    refused(call, f"offset {bad} leaves the 4 elements", target="trn3", error=OutOfBounds)


@pytest.mark.parametrize("abstract", ["data", "index", "both"])
def test_without_values_the_events_are_the_same(abstract):
    x, index = data(0, (16, 8), nl.float32), offsets(1, 16, 1, 8)

    def kernel(y, i):
        src, dst, at = tile(y), sb(16, 20), tile(i)
        nisa.memset(dst, 0)
        nisa.activation(dst.indirect(at), nl.exp, src.indirect(at))
        assert dst.mem.abstract == (y.mem.abstract or i.mem.abstract)
        nisa.tensor_copy(sb(16, 20), dst)

    def told(*arguments):
        return [
            (e.opcode, e.work, [(a.offset, a.shape, a.whole) for a in (*e.reads, *e.writes)])
            for e in launch(kernel, arguments, target="trn3").trace
        ]

    shapes = (Abstract((16, 8), "float32"), Abstract((16, 1), "uint32"))
    given_ = {"data": (shapes[0], index), "index": (x, shapes[1]), "both": shapes}[abstract]
    assert told(*given_) == told(x, index)


def test_event():
    def call():
        at = sb(16, 1, dtype=nl.uint32)
        nisa.memset(at, 0)
        nisa.tensor_copy(sb(16, 3), sb(16, 4).indirect(at, 3))

    found = event(call, target="trn3")
    assert [(a.tile.shape, a.whole) for a in found.reads] == [((16, 4), True), ((16, 1), False)]
    assert found.work.n == 3
    assert found.work.dynamic


# -- rules -----------------------------------------------------------------------------------------


def at(p=16, k=1, dtype=nl.uint32):
    made = sb(p, k, dtype=dtype)
    nisa.memset(made, 0)
    return made


def copy(dst, src, **options):
    return lambda: nisa.tensor_copy(dst() if callable(dst) else dst, src(), **options)


def col(p=16, n=4, count=2, k=1, buffer=sb):
    return lambda: buffer(p, n).indirect(at(p, k), count)


def half(first):
    """Columns of partitions first ... with offsets in the same rows of their own tile."""
    return lambda: sb(128, 4)[first : first + 16].indirect(at(128)[first : first + 16], 2)


def apart():
    return sb(64, 4)[32:48].indirect(at(16), 2)


def plain(*shape):
    return lambda: sb(*shape)


RULES = [
    Rule("whole groups", copy(plain(32, 2), col(32)), copy(plain(8, 2), col(8)),
         ("src [8, 2]", "a multiple of 16"), "trn3"),
    Rule("offsets enough", copy(plain(16, 32), col(count=32, k=2)),
         copy(plain(16, 17), col(count=17)), ("17 columns", "holds 16 offsets"), "trn3"),
    Rule("start of the index", copy(plain(16, 2), half(32)), copy(plain(16, 2), half(16)),
         ("the index of src starts at partition 16", "multiple of 32"), "trn3"),
    Rule("start of the operand", copy(plain(16, 2), col()), copy(plain(16, 2), apart),
         ("src starts at partition 32, its index at 0",), "trn3"),
    Rule("start of a scatter", copy(col(), plain(16, 2)),
         copy(col(), lambda: sb(64, 2)[32:48]),
         ("the index of dst starts at partition 0, the data at 32",), "trn3"),
    Rule("no scatter of Scalar to PSUM",
         copy(col(buffer=ps), plain(16, 2), engine=nisa.engine.vector),
         copy(col(buffer=ps), plain(16, 2), engine=nisa.engine.scalar),
         ("the scalar engine scatters to SBUF only",), "trn3"),
    Rule("gen4", lambda: None, copy(plain(16, 2), col()), ("src is an indirect view on trn2",),
         "trn2"),
]  # fmt: skip


@pytest.mark.parametrize("rule", RULES, ids=lambda r: r.name)
def test_rule(rule):
    check(rule, "tensor_copy", SITE.replace("calls", "test_indirection"))


def test_other_operands_take_none():
    for call, says in (
        (lambda: nisa.tensor_tensor(sb(16, 2), sb(16, 2), col()(), nl.add), "takes dst, data1"),
        (lambda: nisa.reciprocal(sb(16, 2), col()()), "takes no operand"),
        (lambda: nisa.dma_copy(sb(16, 2), col()()), "takes no operand"),
    ):
        refused(call, "is an indirect view", says, target="trn3")


MATMUL = {
    "tile_position": {"tile_position": (0, 32), "tile_size": (32, 32)},
    "is_transpose": {"is_transpose": True},
    "1 or 2 bytes": {},
}


@pytest.mark.parametrize("says", MATMUL)
def test_matmul_limits(says):
    kind = nl.float32 if says == "1 or 2 bytes" else nl.bfloat16

    def call():
        moving = sb(32, 4, dtype=kind).indirect(at(32), 32)
        acc = ps(128, 32, dtype=kind if "is" in says else nl.float32)[32:64]
        nisa.nc_matmul(acc, sb(32, 32, dtype=kind), moving, **MATMUL[says])

    refused(call, "moving", "indirect view", says, target="trn3")


VIEWS = {
    "index": lambda t, i: t.indirect(i)[:, 0:1],
    "ellipsis": lambda t, i: t.indirect(i)[...],
    "reshape": lambda t, i: t.indirect(i).reshape((16, 4, 4)),
    "ap": lambda t, i: t.indirect(i).ap([[4, 16], [1, 2]]),
    "permute": lambda t, i: t.indirect(i).permute((0, 1)),
    "values": lambda t, i: t.indirect(i).numpy(),
    "again": lambda t, i: t.indirect(i).indirect(i),
}


@pytest.mark.parametrize("name", VIEWS)
def test_an_indirect_view_is_an_operand_only(name):
    says = "only one is possible" if name == "again" else "an operand and nothing else"
    refused(lambda: VIEWS[name](sb(16, 4), at()), says, target="trn3")


def test_operands_of_indirect():
    for call, says in (
        (lambda: hbm(16, 4).indirect(at()), "works in SBUF and PSUM"),
        (lambda: sb(16, 4).indirect(sb(16, 1)), "uint16, int32 or uint32"),
        (lambda: sb(16, 4).indirect(hbm(16, 1, dtype=nl.uint32)), "an SBUF tile"),
        (lambda: sb(16, 4).indirect([0, 1]), "an SBUF tile"),
        (lambda: sb(16, 4).indirect(at(32)), "offsets in 32 partitions"),
        (lambda: sb(16, 4).indirect(at(), 0), "num_elem=0"),
    ):
        refused(call, says, target="trn3", error=RuleViolation)
