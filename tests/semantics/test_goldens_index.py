"""NumPy equivalents of the pages and of ``nki/test``: selection, searches, gathers."""

from __future__ import annotations

from typing import Any

import ml_dtypes
import nki.isa as nisa
import nki.language as nl
import numpy as np
import pytest

from tests.embedded.harness import sb, tile
from tests.semantics.test_goldens import F32, FP32_MIN, one, rand, run


@pytest.mark.parametrize(
    ("shape", "pattern", "more", "want"),
    [
        ((1, 512), [[1, 512]], {}, np.arange(512)[None, :]),
        ((128, 1), [[0, 1]], {"channel_multiplier": 1}, np.arange(128)[:, None]),
        ((1, 512), [[-1, 512]], {}, -np.arange(512)[None, :]),
        (
            (128, 1), [[0, 1]], {"channel_multiplier": 2, "offset": 5},
            np.arange(5, 260, 2)[:, None],
        ),
        (
            (128, 512), [[1, 512]], {"channel_multiplier": 1},
            np.arange(512)[None, :] + np.arange(128)[:, None],
        ),
    ],
)  # fmt: skip
def test_iota(shape: Any, pattern: Any, more: Any, want: Any) -> None:
    got = one("iota", shape, pattern=pattern, dtype=nl.int32, **more)
    assert np.array_equal(got, want)


def test_affine_select_keeps_what_lies_below_the_diagonal() -> None:
    a = rand(0, 128, 128)
    got = one(
        "affine_select", (128, 128), a, pattern=[[-1, 128]], channel_multiplier=1,
        on_true_tile=..., on_false_value=FP32_MIN, cmp_op=nl.greater,
    )  # fmt: skip
    want = a.copy()
    want[np.triu_indices_from(want)] = FP32_MIN
    assert np.array_equal(got, want)


@pytest.mark.parametrize(
    "kind", [nl.float8_e4m3, nl.float8_e5m2, nl.bfloat16, nl.float16, nl.float32]
)
def test_range_select(kind: Any) -> None:
    """Indices 32 + i between 0 and 64; the maximum of each row."""
    hosts = {
        nl.float8_e4m3: ml_dtypes.float8_e4m3, nl.float8_e5m2: ml_dtypes.float8_e5m2,
        nl.bfloat16: ml_dtypes.bfloat16, nl.float16: np.float16, nl.float32: F32,
    }  # fmt: skip
    host = hosts[kind]
    data = rand(0, 128, 512, scale=1).astype(host)

    def call(x: Any, low: Any, high: Any) -> Any:
        dst, res = sb(128, 512, dtype=kind), sb(128, 1, dtype=kind)
        nisa.range_select(
            dst=dst, on_true_tile=tile(x), comp_op0=nl.greater_equal, comp_op1=nl.less,
            bound0=tile(low), bound1=tile(high), range_start=32, reduce_res=res,
        )  # fmt: skip
        return dst, res

    dst, res = run(call, data, np.zeros((128, 1), F32), np.full((128, 1), 64, F32))
    indices = 32 + np.arange(512)
    golden = np.where((indices >= 0) & (indices < 64), data.astype(F32), F32(FP32_MIN))
    with np.errstate(over="ignore"):
        want = golden.astype(host)
    assert np.array_equal(dst.astype(F32), want.astype(F32))
    assert np.array_equal(res, golden.max(axis=1, keepdims=True).astype(host))


def test_range_select_in_a_chain() -> None:
    """Three calls on shifted ranges; the register keeps the maximum of all."""
    data = rand(0, 128, 512, scale=1)

    def call(x: Any, low: Any, high: Any) -> Any:
        first, a, b, dst, res = tile(x), tile(low), tile(high), sb(128, 512), sb(128, 1)
        for i in range(3):
            shifted = sb(128, 512)
            nisa.tensor_scalar(dst=shifted, data=first, op0=nl.add, operand0=float(i))
            nisa.range_select(
                dst=dst, on_true_tile=shifted, comp_op0=nl.greater_equal, comp_op1=nl.less,
                bound0=a, bound1=b, range_start=32 + 128 * i,
                reduce_cmd=nisa.reduce_cmd.reduce if i else nisa.reduce_cmd.reset_reduce,
                reduce_res=res if i == 2 else None,
            )  # fmt: skip
        return dst, res

    dst, res = run(call, data, np.zeros((128, 1), F32), np.full((128, 1), 350, F32))
    most = np.full((128, 1), -np.inf, F32)
    for i in range(3):
        indices = 32 + 128 * i + np.arange(512)
        chosen = np.where((indices >= 0) & (indices < 350), data + F32(i), F32(FP32_MIN))
        most = np.maximum(most, chosen.max(axis=1, keepdims=True))
    assert np.array_equal(dst, chosen)
    assert np.array_equal(res, most)


def test_select_reduce() -> None:
    rng = np.random.default_rng(0)
    x, y, p = rand(1, 128, 512), rand(2, 128, 1), rng.integers(0, 2, (128, 512)).astype(np.uint8)

    def call(p: Any, x: Any, y: Any) -> Any:
        dst, res = sb(128, 512), sb(128, 1)
        nisa.select_reduce(
            dst=dst, predicate=tile(p), on_true=tile(x), on_false=tile(y), reduce_res=res,
            reduce_cmd=nisa.reduce_cmd.reset_reduce, reduce_op=nl.maximum,
        )  # fmt: skip
        return dst, res

    dst, res = run(call, p, x, y)
    golden = np.where(p, x, y)
    assert np.array_equal(dst, golden)
    assert np.array_equal(res, golden.max(axis=1, keepdims=True))


@pytest.mark.parametrize("reverse", [False, True])
def test_select_reduce_halves(reverse: bool) -> None:
    p = np.zeros((128, 64), np.uint8)
    p[:64] = 1
    got = one(
        "select_reduce", (128, 64), p, np.ones((128, 64), F32), predicate=..., on_true=...,
        on_false=FP32_MIN, reverse_pred=reverse,
    )  # fmt: skip
    ones, others = (got[64:], got[:64]) if reverse else (got[:64], got[64:])
    assert (ones == 1).all()
    assert (others == FP32_MIN).all()


def test_max8_is_the_end_of_the_sorted_row() -> None:
    data = rand(0, 32, 128, scale=1)
    got = one("max8", (32, 8), data, src=...)
    assert np.array_equal(got, np.sort(data, axis=1)[:, :-9:-1])


def test_find_index8_of_the_largest_is_argsort() -> None:
    data = rand(0, 32, 128, scale=1)

    def call(x: Any) -> Any:
        t, most, at = tile(x), sb(32, 8), sb(32, 8, dtype=nl.uint32)
        nisa.max8(dst=most, src=t)
        nisa.nc_find_index8(dst=at, data=t, vals=most)
        return at

    assert np.array_equal(run(call, data), np.argsort(data, axis=1)[:, :-9:-1])


@pytest.mark.parametrize("shape", [(4, 16), (8, 4, 16)])
@pytest.mark.parametrize("in_place", [False, True])
def test_match_replace8(shape: tuple[int, ...], in_place: bool) -> None:
    """The eight largest become imm, and are found where they stood."""
    data = rand(0, *shape, scale=1)

    def call(x: Any) -> Any:
        t, most, at = tile(x), sb(shape[0], 8), sb(shape[0], 8, dtype=nl.uint32)
        dst = t if in_place else sb(*shape)
        nisa.max8(dst=most, src=t)
        nisa.nc_match_replace8(dst=dst, data=t, vals=most, imm=0.0, dst_idx=at)
        return dst, at

    dst, at = run(call, data)
    flat = data.reshape(shape[0], -1)
    order = np.argsort(flat, axis=1)[:, :-9:-1]
    want = flat.copy()
    np.put_along_axis(want, order, 0, axis=1)
    assert np.array_equal(dst.reshape(flat.shape), want)
    assert np.array_equal(at, order)


@pytest.mark.parametrize("rows", [32, 128])
def test_nc_stream_shuffle_rotates_each_quadrant(rows: int) -> None:
    data = rand(0, rows, 128)
    mask = [(i - 1) % 32 for i in range(32)]
    got = one("nc_stream_shuffle", (rows, 128), data, src=..., shuffle_mask=mask)
    order = [32 * (i // 32) + (i % 32 - 1) % 32 for i in range(rows)]
    assert np.array_equal(got, data[order])


def test_nc_stream_shuffle_broadcasts_a_partition() -> None:
    data = rand(0, 1, 128)
    got = one("nc_stream_shuffle", (32, 128), data, src=..., shuffle_mask=[0] * 32)
    assert np.array_equal(got, np.repeat(data, 32, axis=0))


def test_local_gather() -> None:
    """np.take of each core's list of its eight, in runs of four elements."""
    rng = np.random.default_rng(0)
    src = rand(1, 128, 512, 4)
    per_core = rng.integers(0, 512, (16, 4)).astype(np.uint16)
    index = np.tile(per_core, (8, 1))
    got = one(
        "local_gather", (128, 4, 16, 4), src, index * np.uint16(4), src_buffer=..., index=...,
        num_elem_per_idx=4, num_valid_indices=64,
    )  # fmt: skip
    want = np.take(src, per_core.flatten(order="F"), axis=1)
    assert np.array_equal(got, want.reshape(128, 4, 16, 4))


def test_nc_n_gather() -> None:
    data = rand(0, 32, 64)
    index = np.random.default_rng(1).integers(0, 64, (32, 10)).astype(np.uint32)
    got = one("nc_n_gather", (32, 10), data, index, data=..., indices=...)
    assert np.array_equal(got, np.take_along_axis(data, index.astype(np.int64), axis=1))


def test_sequence_bounds() -> None:
    ids = np.sort(np.random.default_rng(0).integers(0, 32, 32)).astype(F32)[None, :]
    got = one("sequence_bounds", (1, 2, 32), ids, segment_ids=...)
    starts = [int(np.argmax(ids[0] == x)) if x else 32 for x in ids[0]]
    ends = [32 - int(np.argmax(ids[0][::-1] == x)) if x else -1 for x in ids[0]]
    assert got.tolist() == [[starts, ends]]
