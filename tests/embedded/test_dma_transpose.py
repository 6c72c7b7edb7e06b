"""dma_transpose: the three permutations bit for bit, the gathering form, and its limits."""

from __future__ import annotations

import itertools

import ml_dtypes
import nki.isa as nisa
import nki.language as nl
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from nki_kernels.machine.errors import OutOfBounds, UninitializedRead
from tests.embedded.harness import (
    HBM,
    HOSTS,
    SBUF,
    Rule,
    by_name,
    check,
    hbm,
    ps,
    refused,
    same,
    sb,
    tile,
    traced,
    values,
)

F32, BF16 = np.float32, ml_dtypes.bfloat16
MODE = nisa.dge_mode
SKIP = nisa.oob_mode.skip
AXES = {2: (1, 0), 3: (2, 1, 0), 4: (3, 1, 2, 0)}
sizes = st.integers(1, 4)


def transpose(x, buffer=HBM, target="toy", **options):
    def kernel(source):
        shape = tuple(source.shape[a] for a in AXES[source.ndim])
        out = sb(*shape, dtype=source.dtype)
        nisa.dma_transpose(out, source if buffer is HBM else tile(source), **options)
        return out

    return values(kernel, x, target=target)


# -- values ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [nl.float32, nl.int32, nl.bfloat16, nl.float16, nl.uint16])
@pytest.mark.parametrize("buffer", [SBUF, HBM])
@given(shape=st.lists(sizes, min_size=2, max_size=4), named=st.booleans(), seed=st.integers(0, 99))
def test_every_rank_moves_bits(kind, buffer, shape, named, seed):
    host = np.dtype(HOSTS[kind])
    rng = np.random.default_rng(seed)
    raw = rng.integers(0, 256, (*shape, host.itemsize), np.uint8).view(host)[..., 0]
    axes = AXES[len(shape)]
    got = transpose(np.ascontiguousarray(raw), buffer, **({"axes": axes} if named else {}))
    width = f"u{host.itemsize}"
    assert got.shape == tuple(shape[a] for a in axes)
    want = np.ascontiguousarray(raw.transpose(axes))
    assert np.array_equal(got.view(width), want.view(width))


def test_example_28():
    got = transpose(np.arange(12, dtype=F32).reshape(2, 1, 3, 2), axes=[3, 1, 2, 0])
    want = [[[[0, 6], [2, 8], [4, 10]]], [[[1, 7], [3, 9], [5, 11]]]]
    same(got, np.array(want, F32))


def test_a_strided_source_and_the_hardware_form():
    x = np.arange(16 * 8, dtype=np.uint16).reshape(16, 8)

    def kernel(source):
        half, hardware = sb(4, 16, dtype=nl.uint16), sb(8, 16, dtype=nl.uint16)
        nisa.dma_transpose(half, source[:, 0:8:2])
        nisa.dma_transpose(hardware, source, dge_mode=MODE.hwdge)
        return half, hardware

    half, hardware = values(kernel, x)
    same(half, np.ascontiguousarray(x[:, ::2].T))
    same(hardware, np.ascontiguousarray(x.T))


@pytest.mark.parametrize("start", [0, 2])
def test_a_run_time_address(start):
    x = np.arange(12, dtype=F32).reshape(4, 3)

    def kernel(source):
        out, at = sb(3, 2), nisa.register_alloc(start)
        nisa.dma_transpose(out, source.ap([[3, 2], [1, 3]], scalar_offset=at))
        return out

    same(values(kernel, x), np.ascontiguousarray(x[start : start + 2].T))


def test_a_run_time_address_outside():
    x = np.arange(12, dtype=F32).reshape(4, 3)

    def kernel(mode):
        def run(source):
            out, at = sb(3, 2), nisa.register_alloc(3)
            nisa.memset(out, 7.0)
            nisa.dma_transpose(out, source.ap([[3, 2], [1, 3]], scalar_offset=at), oob_mode=mode)
            return out

        return values(run, x)

    same(kernel(SKIP), np.array([[9, 7], [10, 7], [11, 7]], F32))
    with pytest.raises(OutOfBounds, match=r"nisa\.dma_transpose src at .*: row 1 of its run-time"):
        kernel(nisa.oob_mode.error)


def test_a_run_time_source_must_have_been_written():
    def kernel():
        source = hbm(4, 3).ap([[3, 2], [1, 3]], scalar_offset=nisa.register_alloc(1))
        nisa.dma_transpose(sb(3, 2), source)

    refused(kernel, "nisa.dma_transpose at", "row 0 reads elements from 3 on",
            "no instruction wrote", error=UninitializedRead)  # fmt: skip


# -- the gathering form (real sizes only: at least 16 rows) ----------------------------------------


def gather(table, index, shape, mode=nisa.oob_mode.error, before=None):
    """dst = table[flat].T for flat = index.T.flatten(), over `before`."""
    pattern_rows, *rest = shape

    def kernel(source, indices):
        out_shape = tuple(shape[a] for a in AXES[len(shape)])
        out = sb(*out_shape, dtype=source.dtype)
        if before is not None:
            nisa.memset(out, before)
        steps = [[int(np.prod(rest[i:])) // rest[i] if rest[i] else 1, rest[i]]
                 for i in range(len(rest))]  # fmt: skip
        view = source.ap([[int(np.prod(rest)), pattern_rows], *steps], vector_offset=tile(indices))
        nisa.dma_transpose(out, view, oob_mode=mode)
        return out

    return values(kernel, table, index, target="trn2")


@pytest.mark.parametrize(("count", "columns"), [(16, 1), (32, 5), (128, 128)])
def test_a_gather_with_one_column_of_indices(count, columns):
    table = np.arange(40 * columns, dtype=np.uint16).reshape(40, columns)
    index = np.random.default_rng(0).integers(0, 40, (count, 1)).astype(np.uint32)
    want = table[index[:, 0]].T
    same(gather(table, index, (count, columns)), np.ascontiguousarray(want))


def test_example_29_indices_are_flattened_column_by_column():
    table = np.arange(300 * 3, dtype=np.uint16).reshape(300, 3)
    index = np.arange(256, dtype=np.uint32).reshape(128, 2)
    want = table[index.T.flatten()].T
    same(gather(table, index, (256, 3)), np.ascontiguousarray(want))


def test_fewer_rows_than_indices():
    table = np.arange(300 * 3, dtype=np.uint16).reshape(300, 3)
    index = np.arange(256, dtype=np.uint32).reshape(128, 2)
    want = table[index.T.flatten()[:144]].T
    same(gather(table, index, (144, 3)), np.ascontiguousarray(want))


@pytest.mark.parametrize("middle", [(1, 3), (3, 1)])
def test_a_four_dimensional_gather(middle):
    table = np.arange(40 * 3 * 4, dtype=np.uint16).reshape(40, *middle, 4)
    index = np.arange(16, dtype=np.uint32)[::-1].reshape(16, 1).copy()
    want = table[index[:, 0]].transpose(3, 1, 2, 0)
    same(gather(table, index, (16, *middle, 4)), np.ascontiguousarray(want))


def test_skipped_rows_leave_their_column():
    table = np.arange(40 * 3, dtype=np.uint16).reshape(40, 3)
    index = np.arange(16, dtype=np.uint32).reshape(16, 1)
    index[[2, 5], 0] = 40, 2**32 - 1
    want = table[:16].T.copy()
    want[:, [2, 5]] = 9
    same(gather(table, index, (16, 3), SKIP, before=9), want)
    with pytest.raises(OutOfBounds, match="row 2 of its run-time addresses starts at element 120"):
        gather(table, index, (16, 3))


# -- rules -----------------------------------------------------------------------------------------


def call(dst, src, **options):
    return lambda: nisa.dma_transpose(dst(), src(), **options)


def S(*shape, dtype=nl.float32):
    return lambda: sb(*shape, dtype=dtype)


def H(*shape, dtype=nl.bfloat16):
    return lambda: hbm(*shape, dtype=dtype)


def hw(*shape, dtype=nl.bfloat16):
    turned = tuple(shape[a] for a in AXES[len(shape)])
    return call(S(*turned, dtype=dtype), H(*shape, dtype=dtype), dge_mode=MODE.hwdge)


def gathered(shape, index, base=(256, 4), dtype=nl.bfloat16, kind=nl.uint32):
    """A gathering transpose of `shape` with indices [n, m]."""

    def run():
        rest = shape[1:]
        steps = [[int(np.prod(rest[i + 1 :])), n] for i, n in enumerate(rest)]
        idx = sb(*index, dtype=kind)
        nisa.memset(idx, 0)
        view = hbm(*base, dtype=dtype).ap([[base[-1], shape[0]], *steps], vector_offset=idx)
        nisa.dma_transpose(sb(*(shape[a] for a in AXES[len(shape)]), dtype=dtype), view)

    return run


LEGAL_GATHER = gathered((16, 4), (16, 1))
RULES = [
    Rule("lands in SBUF", call(S(5, 4), H(4, 5, dtype=nl.float32)),
         call(H(5, 4), H(4, 5)),
         ("dst is in HBM", "must be in SBUF", "store it with dma_copy")),
    Rule("no PSUM source", call(S(5, 4), S(4, 5)), call(S(5, 4), lambda: ps(4, 5)),
         ("src is in PSUM", "SBUF or HBM")),
    Rule("equal dtypes", call(S(5, 4), S(4, 5)), call(S(5, 4), H(4, 5)),
         ("dst float32, src bfloat16", "must be equal")),
    Rule("axes by rank", call(S(5, 4), S(4, 5), axes=(1, 0)), call(S(5, 4), S(4, 5), axes=(0, 1)),
         ("axes=(0, 1) for src [4, 5]", "(1, 0), (2, 1, 0) and (3, 1, 2, 0)")),
    Rule("axes are a tuple", call(S(5, 4), S(4, 5), axes=[1, 0]), call(S(5, 4), S(4, 5), axes=1),
         ("axes=1",)),
    Rule("axes are no NumPy number", call(S(5, 4), S(4, 5), axes=None),
         call(S(5, 4), S(4, 5), axes=np.float32(1)), ("axes=np.float32(1.0)", "by rank")),
    Rule("rank", call(S(2, 1, 1, 3), S(3, 1, 1, 2)), call(S(2, 1), H(2, dtype=nl.float32)),
         ("axes=None for src [2]",)),
    Rule("exact shape", call(S(5, 4), S(4, 5)), call(S(4, 5), S(4, 5)),
         ("dst [4, 5] for src [4, 5]", "dst must be [5, 4]")),
    Rule("2 or 4 bytes", call(S(5, 4, dtype=nl.int16), S(4, 5, dtype=nl.int16)),
         call(S(5, 4, dtype=nl.int8), S(4, 5, dtype=nl.int8)),
         ("src is int8", "2- and 4-byte elements", "view it")),
    Rule("no run-time destination", call(S(5, 4), S(4, 5)),
         call(lambda: sb(5, 8).ap([[8, 5], [1, 4]], scalar_offset=nisa.register_alloc(0),
                                  indirect_dim=1), S(4, 5)),
         ("dst has a run-time address", "dma_copy")),
    Rule("no swdge without gather", call(S(5, 4), S(4, 5), dge_mode=MODE.none),
         call(S(5, 4), S(4, 5), dge_mode=MODE.swdge),
         ("dge_mode=swdge without a vector_offset", "unknown or hwdge")),
    Rule("no skip without index", call(S(5, 4), S(4, 5)), call(S(5, 4), S(4, 5), oob_mode=SKIP),
         ("oob_mode=skip without a run-time index", "drop it")),
    Rule("hwdge rows", hw(16, 5), hw(8, 5), ("src [8, 5] bfloat16", "16 rows in 2-D")),
    Rule("hwdge rows in 3-D", hw(8, 2, 5), hw(8, 3, 5), ("src [8, 3, 5]", "multiple of 16")),
    Rule("hwdge rows in 4-D", hw(4, 1, 4, 5), hw(3, 1, 16, 5), ("src [3, 1, 16, 5]",)),
    Rule("hwdge columns", hw(16, 128), hw(1, 16, 129), ("hwdge transpose of src [1, 16, 129]",
                                                        "at most 128 columns"), "trn2x"),
    Rule("hwdge 2 bytes", hw(16, 5), hw(16, 5, dtype=nl.float32), ("float32", "2-byte elements")),
    Rule("hwdge from gen3", call(S(5, 16), S(16, 5)), hw(16, 5),
         ("dge_mode=hwdge on trn1", "needs gen3"), "trn1"),
    Rule("priority", call(S(5, 4), S(4, 5), priority=1), call(S(5, 4), S(4, 5), priority=9),
         ("priority=9 on trn3", "0 to 3"), "trn3"),
    Rule("gather rows", LEGAL_GATHER, gathered((17, 4), (128, 2)),
         ("gathering transpose of src [17, 4]", "rows in multiples of 16"), "trn2"),
    Rule("gather index rows", LEGAL_GATHER, gathered((16, 4), (24, 2)),
         ("by indices [24, 2]", "n a multiple of 16"), "trn2"),
    Rule("gather index columns", gathered((256, 4), (128, 2)), gathered((32, 4), (16, 2)),
         ("by indices [16, 2]", "128 if m > 1"), "trn2"),
    Rule("gather enough indices", gathered((16, 4), (16, 1)), gathered((384, 4), (128, 2)),
         ("n * m >= rows",), "trn2"),
    Rule("gather by uint32", LEGAL_GATHER,
         gathered((16, 3), (16, 1), base=(256, 3), kind=nl.int32),
         ("[16, 1] int32", "uint32 indices"), "trn2"),
    Rule("gather 2 bytes", LEGAL_GATHER, gathered((16, 4), (16, 1), dtype=nl.float32),
         ("src [16, 4] float32", "2-byte elements"), "trn2"),
    Rule("gather one middle", gathered((16, 1, 2, 2), (16, 1)), gathered((16, 2, 2, 1), (16, 1)),
         ("gathering transpose of src [16, 2, 2, 1]",), "trn2"),
]  # fmt: skip


@pytest.mark.parametrize("rule", RULES, ids=by_name)
def test_rule(rule):
    # The columns of a transpose are partitions of dst: only a full core can hold 128 of them.
    if rule.target == "trn2x":
        traced(rule.legal, target="trn2")
        refused(rule.illegal, "partition", target="trn2")
        return
    if rule.target == "trn1":
        refused(rule.illegal, *rule.says, target="trn1")
        traced(rule.legal, target="trn1")
        return
    check(rule, "dma_transpose", __file__)


def test_gathers_need_gen3_and_hbm():
    traced(LEGAL_GATHER, target="trn3")
    refused(LEGAL_GATHER, "it takes gen3", target="trn1")


@pytest.mark.parametrize(("rank", "buffer"), list(itertools.product([2, 3, 4], [SBUF, HBM])))
def test_every_rank_from_both_memories_on_trn2(rank, buffer):
    shape = (*(32, 2, 3)[: rank - 1], 40)
    x = np.arange(np.prod(shape), dtype=F32).reshape(shape)
    same(transpose(x, buffer, "trn2"), np.ascontiguousarray(x.transpose(AXES[rank])))
