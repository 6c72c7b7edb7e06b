"""dma_copy: conversions, shapes, gathers and scatters, bounds, and its operand rules."""

from __future__ import annotations

import itertools

import nki.isa as nisa
import nki.language as nl
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from nki_kernels.machine.errors import OutOfBounds, UninitializedRead
from nki_kernels.machine.launch import launch
from nki_kernels.machine.options import Options
from tests.embedded.harness import (
    FLOATS,
    HBM,
    HOSTS,
    INTEGERS,
    SBUF,
    Rule,
    by_name,
    cast,
    check,
    columns,
    data,
    hbm,
    ps,
    refused,
    rows,
    same,
    sb,
    tile,
    traced,
    values,
)

F32 = np.float32
FP8 = (nl.float8_e4m3, nl.float8_e5m2)
kinds = st.sampled_from([*FLOATS, *FP8, *INTEGERS])
SKIP, ERROR = nisa.oob_mode.skip, nisa.oob_mode.error


def filled(x, buffer):
    return x if buffer is HBM else tile(x)


# -- values ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(("src", "dst"), list(itertools.product([SBUF, HBM], repeat=2)))
@given(p=rows, n=columns, types=st.tuples(kinds, kinds), seed=st.integers(0, 2**20))
def test_a_copy_converts_through_float32_between_any_memories(src, dst, p, n, types, seed):
    x = data(seed, (p, n), types[0])

    def kernel(source):
        out = nl.ndarray((p, n), types[1], buffer=dst)
        nisa.dma_copy(out, filled(source, src))
        return out

    same(values(kernel, x), cast(x.astype(float), types[1]))


@pytest.mark.parametrize("kind", [nl.float32, nl.bfloat16, nl.float8_e5m2, nl.int32, nl.uint16])
def test_equal_dtypes_move_bits(kind):
    host = np.dtype(HOSTS[kind])
    raw = np.random.default_rng(0).integers(0, 256, (4, 8 * host.itemsize), np.uint8).view(host)

    def kernel(source):
        out = hbm(4, 8, dtype=kind)
        nisa.dma_copy(out, tile(source))
        return out

    assert np.array_equal(values(kernel, raw).view(np.uint8), raw.view(np.uint8))


@pytest.mark.parametrize("kind", [nl.float8_e4m3fn_x4, nl.float8_e5m2_x4])
def test_packed_types_move_as_bits(kind):
    raw = np.arange(6, dtype=np.uint32).reshape(2, 3) * 0x01020304

    def kernel(source):
        out = sb(2, 3, dtype=kind)
        nisa.dma_copy(out, source.view(kind))
        return out.view(nl.uint32)

    same(values(kernel, raw), raw)


@pytest.mark.parametrize("shapes", [((4, 6), (24,)), ((24,), (4, 6)), ((2, 3, 4), (8, 3)),
                                    ((6, 1), (1, 6)), ((6,), (1, 6))])  # fmt: skip
@pytest.mark.parametrize("buffer", [SBUF, HBM])
def test_shapes_may_differ_and_elements_go_in_row_major_order(shapes, buffer):
    x = np.arange(np.prod(shapes[0]), dtype=F32).reshape(shapes[0])
    if buffer is SBUF and len(shapes[1]) == 1:
        return

    def kernel(source):
        out = nl.ndarray(shapes[1], nl.float32, buffer=buffer)
        nisa.dma_copy(out, source)
        return out

    same(values(kernel, x), x.reshape(shapes[1]))


def test_one_element_of_a_1d_tensor_fills_a_tile():
    def kernel(source):
        out = sb(1, 1)
        nisa.dma_copy(out, source[3])
        return out

    same(values(kernel, np.arange(5, dtype=F32)), np.array([[3]], F32))


def test_overlapping_and_broadcast_sources():
    def kernel(source):
        windows, repeated = sb(4, 3), sb(8, 6)
        nisa.dma_copy(windows, source.ap([[1, 4], [1, 3]]))
        nisa.dma_copy(repeated, source.ap([[0, 8], [1, 6]]))
        return windows, repeated

    x = np.arange(6, dtype=F32)
    windows, repeated = values(kernel, x)
    same(windows, np.stack([x[i : i + 3] for i in range(4)]))
    same(repeated, np.tile(x, (8, 1)))


def test_a_dma_starts_at_any_partition():
    def kernel(source):
        t = sb(8, 2)
        nisa.dma_copy(t[3:6], source)
        return t[3:6]

    x = data(0, (3, 2), nl.float32)
    same(values(kernel, x), x)


def test_a_copy_inside_one_tensor_reads_before_it_writes():
    def kernel(source):
        t = hbm(6)
        nisa.dma_copy(t, source)
        nisa.dma_copy(t[1:6], t[0:5])
        return t

    x = np.arange(6, dtype=F32)
    same(values(kernel, x), x[[0, 0, 1, 2, 3, 4]])


# -- run-time addresses ----------------------------------------------------------------------------


def scalar(value, dtype=nl.int32):
    t = sb(1, 1, dtype=dtype)
    nisa.memset(t, value)
    return t


@pytest.mark.parametrize("make", [scalar, nisa.register_alloc, lambda v: scalar(v, nl.uint32)])
def test_example_4_scalar_offset(make):
    def kernel(source):
        out = sb(1, 2)
        nisa.dma_copy(out, source.ap([[2, 1], [1, 2]], 6, scalar_offset=make(2), indirect_dim=1))
        return out

    x = np.arange(24, dtype=F32).reshape(4, 3, 2)
    same(values(kernel, x), np.array([[10, 11]], F32))


def test_the_documented_scalar_offset():
    def kernel(source):
        out = sb(128, 256)
        nisa.dma_copy(out, source.ap([[512, 128], [1, 256]], scalar_offset=scalar(3 * 128)))
        return out

    x = np.arange(512 * 512, dtype=F32).reshape(512, 512)
    same(values(kernel, x, target="trn2"), x[384:512, 0:256])


@given(draw=st.data(), shape=st.tuples(rows, st.integers(1, 6)))
def test_a_run_time_row_reaches_a_tile_of_another_rank(draw, shape):
    at = draw.draw(st.integers(0, shape[0] - 1))
    x = data(at, shape, nl.float32)

    def kernel(source):
        chosen, pattern, index = sb(1, shape[1]), sb(1, shape[1]), nisa.register_alloc(at)
        nisa.dma_copy(chosen, source.select(0, index))
        nisa.dma_copy(pattern, source.ap([[1, shape[1]]], scalar_offset=index))
        return chosen, pattern

    for got in values(kernel, x):
        same(got, x[at : at + 1])


def gather(x, index, into, mode=ERROR, offset=None, pattern=None):
    """dst rows <- rows index[i] of x, over a dst that holds `into`."""

    def kernel(source, indices, before):
        out, idx = tile(before), tile(indices)
        p, n = into.shape
        view = source.ap(pattern or [[source.shape[1], p], [1, n]], offset, vector_offset=idx)
        nisa.dma_copy(out, view, oob_mode=mode)
        return out

    return values(kernel, x, index, into)


TABLE = np.arange(12, dtype=F32).reshape(4, 3)


def test_example_5_the_leading_step_is_ignored():
    got = gather(TABLE, np.array([[2], [0]], np.int32), np.zeros((2, 2), F32), offset=1,
                 pattern=[[99, 2], [1, 2]])  # fmt: skip
    same(got, np.array([[7, 8], [1, 2]], F32))


@pytest.mark.parametrize(("dtype", "outside"), [
    (np.int32, -1), (np.uint32, 2**32 - 1), (np.int32, -1000000), (np.int32, 4),
    (np.int32, 2**31 - 1),
])  # fmt: skip
def test_example_6_skip_leaves_the_row_and_error_raises(dtype, outside):
    index, seven = np.array([[outside], [3]], dtype), np.full((2, 2), 7, F32)
    options = {"offset": 1, "pattern": [[3, 2], [1, 2]]}
    same(gather(TABLE, index, seven, SKIP, **options), np.array([[7, 7], [10, 11]], F32))
    with pytest.raises(OutOfBounds) as caught:
        gather(TABLE, index, seven, **options)
    for text in ("nisa.dma_copy src at", "test_dma_copy.py:", "row 0", "keep indices inside",
                 "oob_mode=nisa.oob_mode.skip"):  # fmt: skip
        assert text in str(caught.value)


def test_a_row_partly_outside_is_outside():
    got = gather(TABLE, np.array([[3], [2]], np.int32), np.full((2, 2), 7, F32), SKIP, offset=2,
                 pattern=[[3, 2], [1, 2]])  # fmt: skip
    same(got, np.array([[7, 7], [8, 9]], F32))


@given(rows_of=st.lists(st.integers(-2, 5), min_size=1, max_size=8), seed=st.integers(0, 99))
def test_a_gather_with_skips(rows_of, seed):
    before = data(seed, (len(rows_of), 3), nl.float32)
    index = np.array(rows_of, np.int32)[:, None]
    want = before.copy()
    for i, row in enumerate(rows_of):
        if 0 <= row < 4:
            want[i] = TABLE[row]
    same(gather(TABLE, index, before, SKIP), want)


@given(rows_of=st.lists(st.integers(-2, 5), min_size=1, max_size=8), seed=st.integers(0, 99))
def test_a_scatter_with_skips_and_duplicates(rows_of, seed):
    source = data(seed, (len(rows_of), 3), nl.float32)
    index = np.array(rows_of, np.int32)[:, None]
    want = TABLE.copy()
    for i, row in enumerate(rows_of):
        if 0 <= row < 4:
            want[row] = source[i]

    def kernel(before, indices, x):
        table = hbm(4, 3)
        nisa.dma_copy(table, before)
        view = table.ap([[3, len(rows_of)], [1, 3]], vector_offset=tile(indices))
        nisa.dma_copy(view, tile(x), oob_mode=SKIP)
        return table

    same(values(kernel, TABLE, index, source), want)


def test_vector_select_is_a_gather_and_converts():
    def kernel(source, indices):
        out = sb(3, 3, dtype=nl.int8)
        nisa.dma_copy(out, source.vector_select(0, tile(indices)))
        return out

    index = np.array([[3], [1], [3]], np.int32)
    same(values(kernel, TABLE, index), TABLE[[3, 1, 3]].astype(np.int8))


def test_an_index_may_be_a_strided_column_and_a_base_one_dimensional():
    def kernel(source, indices):
        column, flat = sb(2, 3), sb(2, 1)
        idx = tile(indices)
        nisa.dma_copy(column, source.ap([[3, 2], [1, 3]], vector_offset=idx[:, 1:2]))
        nisa.dma_copy(flat, source.reshape((12,)).ap([[1, 2], [1, 1]], vector_offset=idx[:, 1:2]))
        return column, flat

    index = np.array([[9, 2], [9, 0]], np.int32)
    column, flat = values(kernel, TABLE, index)
    same(column, TABLE[[2, 0]])
    same(flat, np.array([[2], [0]], F32))


def scatter(index, mode, shape=(2, 2), pattern=None):
    """[[1, 2], [3, 4]] to a zero HBM (3, 2) at a scalar offset."""

    def kernel(source):
        table = nl.zeros((3, 2), nl.float32, buffer=HBM)
        view = table.ap(pattern or [[2, 2], [1, 2]], scalar_offset=scalar(index))
        t = sb(*shape)
        nisa.dma_copy(t, source.reshape(shape))
        nisa.dma_copy(view, t, oob_mode=mode)
        return table

    return values(kernel, np.array([[1, 2], [3, 4]], F32))


@pytest.mark.parametrize("shape", [(2, 2), (1, 4), (4, 1)])
def test_example_7_a_scalar_scatter_drops_row_by_row(shape):
    same(scatter(2, SKIP, shape), np.array([[0, 0], [0, 0], [1, 2]], F32))
    with pytest.raises(OutOfBounds, match=r"nisa\.dma_copy dst at .*: row 1 of its run-time"):
        scatter(2, ERROR, shape)


def test_rows_cut_differently_on_both_sides():
    """src rows 0 and 1 of 2 elements inside, 2 outside; dst rows of 3: the second is cut."""

    def kernel(source):
        out = sb(2, 3)
        nisa.memset(out, 9.0)
        view = source.ap([[2, 3], [1, 2]], scalar_offset=nisa.register_alloc(1))
        nisa.dma_copy(out, view, oob_mode=SKIP)
        return out

    x = np.arange(6, dtype=F32).reshape(3, 2)
    same(values(kernel, x), np.array([[2, 3, 4], [5, 9, 9]], F32))


def test_an_index_larger_than_its_dimension_is_judged_by_its_address():
    def kernel(source):
        out = sb(1, 2)
        view = source.ap([[2, 1], [1, 2]], scalar_offset=scalar(5), indirect_dim=1)
        nisa.dma_copy(out, view)
        return out

    x = np.arange(24, dtype=F32).reshape(4, 3, 2)
    same(values(kernel, x), np.array([[10, 11]], F32))


def test_an_access_on_chip_cannot_run_on_into_the_next_partition():
    def call(mode):
        def kernel(source):
            out, t = sb(2, 2), tile(source)
            nisa.memset(out, 7.0)
            view = t.ap([[4, 2], [1, 2]], scalar_offset=nisa.register_alloc(3), indirect_dim=1)
            nisa.dma_copy(out, view, oob_mode=mode)
            return out

        return values(kernel, np.arange(32, dtype=F32).reshape(8, 4))

    same(call(SKIP), np.full((2, 2), 7, F32))
    with pytest.raises(OutOfBounds):
        call(ERROR)


@pytest.mark.parametrize("mode", [SKIP, ERROR])
def test_skip_means_nothing_where_no_address_is_dynamic(mode):
    def kernel(source):
        out = sb(4, 3)
        nisa.dma_copy(out, source, oob_mode=mode)
        return out

    same(values(kernel, TABLE), TABLE)


def test_a_gathered_row_must_have_been_written():
    def kernel():
        table, idx = hbm(4, 3), sb(2, 1, dtype=nl.int32)
        zeros = sb(1, 3)
        nisa.memset(zeros, 0.0)
        nisa.dma_copy(table[0:1], zeros)
        nisa.iota(idx, [[1, 1]], channel_multiplier=1)
        nisa.dma_copy(sb(2, 3), table.ap([[3, 2], [1, 3]], vector_offset=idx))

    refused(kernel, "nisa.dma_copy at", "row 1 reads elements from 3 on", "no instruction wrote",
            error=UninitializedRead)  # fmt: skip


def test_only_scattered_rows_count_as_written():
    def kernel(source, indices):
        table = hbm(4, 3)
        nisa.dma_copy(table.ap([[3, 2], [1, 3]], vector_offset=tile(indices)), tile(source))
        out = sb(1, 3)
        nisa.dma_copy(out, table[2:3])
        nisa.dma_copy(sb(1, 3), table[1:2])
        return out

    with pytest.raises(UninitializedRead, match="src reads 3 of 3 elements"):
        values(kernel, TABLE[:2], np.array([[2], [0]], np.int32))


def test_unrounded_floats_stay_unrounded_through_a_gather():
    """With NKI_PRECISE_FP=0 narrow floats are held as float32, also in an indirect copy."""

    def kernel(source):
        narrow, out = hbm(1, 2, dtype=nl.bfloat16), hbm(1, 2)
        nisa.dma_copy(narrow, source)
        nisa.dma_copy(out, narrow.ap([[2, 1], [1, 2]], scalar_offset=nisa.register_alloc(0)))
        return out

    x = np.array([[1 + 2.0**-20, -3.0]], F32)
    same(launch(kernel, (x,), target="toy", options=Options(precise_fp=False)).outputs[0], x)


# -- rules -----------------------------------------------------------------------------------------


def S(*shape, dtype=nl.float32):
    return lambda: sb(*shape, dtype=dtype)


def H(*shape, dtype=nl.float32):
    return lambda: hbm(*shape, dtype=dtype)


def copy(dst, src, **options):
    return lambda: nisa.dma_copy(dst(), src(), **options)


def zero(*shape, dtype=nl.int32):
    t = sb(*shape, dtype=dtype)
    nisa.memset(t, 0)
    return t


def gathered(index, base=lambda: hbm(8, 5)):
    return lambda: base().ap([[5, 4], [1, 5]], vector_offset=index())


MODE = nisa.dge_mode
INDEX = gathered(lambda: zero(4, 1))
RULES = [
    Rule("no PSUM source", copy(H(4, 5), S(4, 5)), copy(H(4, 5), lambda: ps(4, 5)),
         ("src is in PSUM", "must be in SBUF or HBM", "tensor_copy or activation")),
    Rule("no PSUM destination", copy(S(4, 5), H(4, 5)), copy(lambda: ps(4, 5), H(4, 5)),
         ("dst is in PSUM", "must be in SBUF or HBM")),
    Rule("equal counts", copy(S(4, 5), H(20)), copy(S(4, 5), H(21)),
         ("dst [4, 5] (20 elements), src [21] (21 elements)", "must be equal", "slice")),
    Rule("hwdge moves bits", copy(S(4, 5), H(4, 5), dge_mode=MODE.hwdge),
         copy(S(4, 5, dtype=nl.bfloat16), H(4, 5), dge_mode=MODE.hwdge),
         ("src float32 to dst bfloat16 with hwdge", "equal dtypes, or another mode")),
    Rule("packed types stay", copy(S(4, 5), H(4, 5, dtype=nl.bfloat16)),
         copy(S(4, 5), H(4, 5, dtype=nl.float8_e5m2_x4)),
         ("src float8_e5m2_x4 to dst float32", "not converted")),
    Rule("scales stay", copy(*[S(4, 5, dtype=nl.float8_e8m0fnu)] * 2),
         copy(S(4, 5), S(4, 5, dtype=nl.float8_e8m0fnu)), ("src float8_e8m0fnu",)),
    Rule("hwdge from gen3", copy(S(4, 5), H(4, 5)), copy(S(4, 5), H(4, 5), dge_mode=MODE.hwdge),
         ("dge_mode=hwdge on trn1", "needs gen3"), "trn1"),
    Rule("priority from gen4", copy(S(4, 5), H(4, 5)), copy(S(4, 5), H(4, 5), priority=0),
         ("priority=0 on toy", "from gen4 on")),
    Rule("priorities", copy(S(4, 5), H(4, 5), priority=3), copy(S(4, 5), H(4, 5), priority=4),
         ("priority=4 on trn3", "0 to 3"), "trn3"),
    Rule("a queue with hwdge", copy(S(4, 5), H(4, 5), dge_mode=MODE.hwdge,
                                    engine=nisa.engine.scalar),
         copy(S(4, 5), H(4, 5), engine=nisa.engine.scalar),
         ("engine=scalar with dge_mode=unknown", "only with dge_mode=nisa.dge_mode.hwdge")),
    Rule("queues", copy(S(4, 5), H(4, 5), dge_mode=MODE.hwdge, engine=nisa.engine.sync),
         copy(S(4, 5), H(4, 5), dge_mode=MODE.hwdge, engine=nisa.engine.vector),
         ("engine=vector with dge_mode=hwdge", "sync or scalar")),
    Rule("a dge_mode", copy(S(4, 5), H(4, 5), dge_mode=MODE.none),
         copy(S(4, 5), H(4, 5), dge_mode="none"), ("dge_mode='none'", "nisa.dge_mode")),
    Rule("an oob_mode", copy(S(4, 5), H(4, 5), oob_mode=SKIP),
         copy(S(4, 5), H(4, 5), oob_mode="skip"), ("oob_mode='skip'", "nisa.oob_mode")),
    Rule("gathers in software", copy(S(4, 5), INDEX, dge_mode=MODE.swdge),
         copy(S(4, 5), INDEX, dge_mode=MODE.hwdge),
         ("vector_offset with dge_mode=hwdge", "swdge (or unknown)")),
    Rule("not on both sides", copy(H(4, 5), INDEX),
         copy(gathered(lambda: zero(4, 1)), INDEX),
         ("src and dst both have a vector_offset", "gather into SBUF first")),
    Rule("rows correspond", copy(S(4, 5), INDEX), copy(S(2, 10), INDEX),
         ("src gathers 4 rows", "[2, 10] has 2", "dimension 0 must agree")),
    Rule("indices in SBUF", copy(S(4, 5), INDEX),
         copy(S(4, 5), gathered(lambda: hbm(4, 1, dtype=nl.int32), lambda: hbm(9, 5))),
         ("the vector_offset of src is not an SBUF tile", "load the indices")),
    Rule("integer indices", copy(S(4, 5), gathered(lambda: zero(4, 1, dtype=nl.uint32))),
         copy(S(4, 5, dtype=nl.float16),
              gathered(lambda: zero(4, 1, dtype=nl.int16), lambda: hbm(8, 5, dtype=nl.float16))),
         ("the vector_offset of src is int16", "int32 or uint32")),
]  # fmt: skip


@pytest.mark.parametrize("rule", RULES, ids=by_name)
def test_rule(rule):
    check(rule, "dma_copy", __file__)


def test_a_scalar_index_is_one_32_bit_integer():
    def call(shape, dtype):
        return lambda: nisa.dma_copy(
            sb(1, 3), nl.zeros((4, 3), nl.float32, buffer=HBM).ap(
                [[3, 1], [1, 3]], scalar_offset=zero(*shape, dtype=dtype)))  # fmt: skip

    traced(call((1, 1), nl.uint32))
    refused(call((1, 1), nl.int16), "one int32 or uint32 element")
    refused(call((2, 1), nl.int32), "one int32 or uint32 element")
