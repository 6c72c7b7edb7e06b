"""Small worked examples with their results, recomputed from the public pages.

From the docstrings of the instructions and the examples of older releases; F is the lowest float32.
Those of views are in `test_vector_views.py`.
"""

from __future__ import annotations

from typing import Any

import nki.isa as nisa
import nki.language as nl
import numpy as np
import pytest

from nki_kernels.machine.options import Options
from tests.embedded.harness import HBM, ps, sb, tile, values
from tests.semantics.both import TOY4

F32 = np.float32
F = float(np.finfo(F32).min)


def row(*numbers: float, dtype: Any = F32) -> Any:
    return np.array([numbers], dtype)


def on(call: Any, *arrays: Any, target: Any = "trn2") -> Any:
    """The results as nested lists."""
    got = values(call, *arrays, target=target)
    return tuple(x.tolist() for x in got) if isinstance(got, tuple) else got.tolist()


def into(shape: tuple[int, ...], name: str, dtype: Any = nl.float32, **more: Any) -> Any:
    """Make one call with a new dst; arrays given by keyword become tiles. Return dst."""
    tensors = {k: v for k, v in more.items() if isinstance(v, np.ndarray)}
    options = {k: v for k, v in more.items() if k not in tensors and k != "target"}

    def call(*given: Any) -> Any:
        dst = sb(*shape, dtype=dtype)
        tiles = {k: tile(x) for k, x in zip(tensors, given, strict=True)}
        getattr(nisa, name)(dst=dst, **tiles, **options)
        return dst

    return on(call, *tensors.values(), target=more.get("target", "trn2"))


# -- compute ---------------------------------------------------------------------------------------


def test_nc_matmul() -> None:
    def call(s: Any, m: Any) -> Any:
        dst = ps(2, 3)
        nisa.nc_matmul(dst=dst, stationary=tile(s), moving=tile(m))
        return dst

    got = on(call, np.array([[1, 2], [3, 4]], F32), np.array([[1, 0, 2], [0, 1, 3]], F32))
    assert got == [[1, 3, 11], [2, 4, 16]]


def test_activation_keeps_its_register() -> None:
    def call(x: Any) -> Any:
        dst, first, second = sb(1, 3), sb(1, 1), sb(1, 1)
        for result, command in ((first, "reset_reduce"), (second, "reduce")):
            nisa.activation(
                dst=dst, op=nl.copy, data=tile(x), scale=2.0, bias=1.0, reduce_op=nl.add,
                reduce_res=result, reduce_cmd=nisa.reduce_cmd[command],
            )  # fmt: skip
        return dst, first, second

    assert on(call, row(1, 2, 3)) == ([[3, 5, 7]], [[15]], [[30]])


@pytest.mark.parametrize(
    ("more", "want"),
    [
        ({}, [-2, 1]),
        ({"op1": nl.multiply, "operand1": 2.0}, [-4, 2]),
        ({"op1": nl.subtract, "operand1": 1.0, "reverse1": True}, [3, 0]),
        ({"reverse0": True}, [2, -1]),
    ],
)
def test_tensor_scalar(more: Any, want: list[float]) -> None:
    got = into((1, 2), "tensor_scalar", data=row(1, 4), op0=nl.subtract, operand0=3.0, **more)
    assert got == [want]


@pytest.mark.parametrize(("reverse", "want"), [(False, [-7, -4]), (True, [7, 4])])
def test_scalar_tensor_tensor(reverse: bool, want: list[float]) -> None:
    got = into(
        (1, 2), "scalar_tensor_tensor", data=row(1, 2), op0=nl.multiply, operand0=3.0,
        op1=nl.subtract, operand1=row(10, 10), reverse1=reverse,
    )  # fmt: skip
    assert got == [want]


@pytest.mark.parametrize(
    ("more", "want"),
    [
        ({}, 3),
        ({"reduce_res_negate": True}, -3),
        ({"reduce_cmd": nisa.reduce_cmd.load_reduce, "reduce_init": 5.0}, 5),
    ],
)
def test_tensor_scalar_reduce(more: Any, want: float) -> None:
    def call(x: Any) -> Any:
        dst, res = sb(1, 3), sb(1, 1)
        nisa.tensor_scalar_reduce(
            dst=dst, data=tile(x), op0=nl.abs, operand0=0, reduce_op=nl.maximum, reduce_res=res,
            **more,
        )  # fmt: skip
        return dst, res

    assert on(call, row(-3, 1, 2)) == ([[3, 1, 2]], [[want]])


@pytest.mark.parametrize(
    ("op1", "more", "want"),
    [
        (nl.add, {}, [2, 6, 12]),
        (nl.subtract, {}, [2, 2, 4]),
        (nl.add, {"reduce_cmd": nisa.reduce_cmd.load_reduce, "imm1": 10.0}, [12, 16, 22]),
    ],
)
def test_tensor_scalar_cumulative(op1: Any, more: Any, want: list[float]) -> None:
    got = into(
        (1, 3), "tensor_scalar_cumulative", src=row(1, 2, 3), op0=nl.multiply, op1=op1, imm0=2.0,
        **more,
    )  # fmt: skip
    assert got == [want]


@pytest.mark.parametrize(
    ("op0", "op1", "reverse", "want"),
    [
        (nl.multiply, nl.add, False, [3, 10, 11]),
        (nl.subtract, nl.add, False, [2, 2, 0]),
        (nl.subtract, nl.add, True, [0, -2, -2]),
    ],
)
def test_tensor_tensor_scan(op0: Any, op1: Any, reverse: bool, want: list[float]) -> None:
    got = into(
        (1, 3), "tensor_tensor_scan", data0=row(2, 3, 1), data1=row(1, 1, 1), initial=1.0, op0=op0,
        op1=op1, reverse0=reverse,
    )  # fmt: skip
    assert got == [want]


def test_tensor_reduce() -> None:
    data = np.array([[[1, 2, 3], [4, 5, 6]]], F32)
    assert into((1, 2), "tensor_reduce", op=nl.add, data=data, axis=2) == [[6, 15]]
    got = into((1, 1), "tensor_reduce", op=nl.add, data=data, axis=(1, 2), negate=True)
    assert got == [[-21]]


@pytest.mark.parametrize(
    ("numbers", "stats", "moments"),
    [
        ([1, 2, 3, 4, 5], [3, 3, 8, 2, 3, 2], [3, 2]),
        ([1, 3, 2, 8], [2, 1.5, 0.5, 2, 5.5, 12.5], [3.5, 7.25]),
    ],
)
def test_batch_statistics(numbers: Any, stats: Any, moments: Any) -> None:
    assert into((1, 6), "bn_stats", data=row(*numbers)) == [stats]
    assert into((1, 2), "bn_aggr", data=row(*stats)) == [moments]


@pytest.mark.parametrize(
    ("op", "pair", "want"),
    [
        (nl.abs_max, (-5, 3), -5),
        (nl.abs_min, (-5, 3), 3),
        (nl.abs_max, (1, -1), -1),
        (nl.abs_min, (1, -1), -1),
    ],
)
def test_absolute_extremes_give_ties_to_the_second(op: Any, pair: Any, want: float) -> None:
    got = into(
        (1, 1), "tensor_tensor", data1=row(pair[0]), data2=row(pair[1]), op=op, target="trn3"
    )
    assert got == [[want]]


def test_right_shift_is_logical() -> None:
    got = into(
        (1, 1), "tensor_scalar", data=row(-8, dtype=np.int32), op0=nl.right_shift, operand0=1,
        dtype=nl.int32,
    )  # fmt: skip
    assert got == [[0x7FFFFFFC]]


def test_sine_beyond_pi_is_a_cubic() -> None:
    def call(x: Any) -> Any:
        dst = sb(1, 1)
        nisa.activation(dst=dst, op=nl.sin, data=tile(x))
        return dst

    ((got,),) = values(call, row(9.0), target="trn2", options=Options(domain="off"))
    assert round(float(got), 2) == 27.65


# -- selection -------------------------------------------------------------------------------------


def test_iota() -> None:
    got = into(
        (2, 6), "iota", pattern=[[10, 2], [1, 3]], offset=100, channel_multiplier=1000,
        dtype=nl.int32,
    )  # fmt: skip
    first = [100, 101, 102, 110, 111, 112]
    assert got == [first, [x + 1000 for x in first]]


def test_affine_select_makes_a_causal_mask() -> None:
    """Query q0 + p sees keys up to itself; q0 = 2, k0 = 1."""
    got = into(
        (3, 4), "affine_select", pattern=[[-1, 4]], channel_multiplier=1, offset=1,
        on_true_tile=np.ones((3, 4), F32), on_false_value=F, cmp_op=nl.greater_equal,
    )  # fmt: skip
    assert got == [[1, 1, F, F], [1, 1, 1, F], [1, 1, 1, 1]]


@pytest.mark.parametrize(
    ("kind", "low", "want", "most"),
    [
        (nl.float32, 11, [F, 6, 7, F], 7),
        (nl.bfloat16, 11, [float("-inf"), 6, 7, float("-inf")], 7),
        (nl.float32, 99, [F] * 4, F),
    ],
)
def test_range_select(kind: Any, low: float, want: Any, most: float) -> None:
    def call(x: Any, a: Any, b: Any) -> Any:
        dst, res = sb(1, 4, dtype=kind), sb(1, 1)
        nisa.range_select(
            dst=dst, on_true_tile=tile(x), comp_op0=nl.greater_equal, comp_op1=nl.less,
            bound0=tile(a), bound1=tile(b), range_start=10, reduce_res=res,
        )  # fmt: skip
        return dst, res

    assert on(call, row(5, 6, 7, 8), row(low), row(13)) == ([want], [[most]])


@pytest.mark.parametrize(
    ("reverse", "want", "most"), [(False, [1, -9, 3], 3), (True, [-9, 2, -9], 2)]
)
def test_select_reduce(reverse: bool, want: Any, most: float) -> None:
    def call(p: Any, x: Any) -> Any:
        dst, res = sb(1, 3), sb(1, 1)
        nisa.select_reduce(
            dst=dst, predicate=tile(p), on_true=tile(x), on_false=-9.0, reduce_res=res,
            reduce_cmd=nisa.reduce_cmd.reset_reduce, reverse_pred=reverse,
        )  # fmt: skip
        return dst, res

    assert on(call, row(1, 0, 1, dtype=np.uint8), row(1, 2, 3)) == ([want], [[most]])


# -- searches, gathers, lists ----------------------------------------------------------------------


def test_the_eight_largest_and_where_they_are() -> None:
    def call(x: Any) -> Any:
        data = tile(x)
        most, at = sb(1, 8), sb(1, 8, dtype=nl.uint32)
        rest, gone = sb(1, 10), sb(1, 8, dtype=nl.uint32)
        nisa.max8(dst=most, src=data)
        nisa.nc_find_index8(dst=at, data=data, vals=most)
        nisa.nc_match_replace8(dst=rest, data=data, vals=most, imm=-1.0, dst_idx=gone)
        return most, at, rest, gone

    most, at, rest, gone = on(call, row(3, 9, 9, 1, 5, 2, 8, 7, 0, 4))
    assert most == [[9, 9, 8, 7, 5, 4, 3, 2]]
    assert at == [[1, 2, 6, 7, 4, 9, 0, 5]]
    assert gone == [[2, 1, 6, 7, 4, 9, 0, 5]]
    assert rest == [[-1, -1, -1, 1, -1, -1, -1, -1, 0, -1]]


@pytest.mark.parametrize(
    ("indices", "run", "want"), [([3, 1, 0], 1, [13, 11, 10]), ([2, 0], 2, [12, 13, 10, 11])]
)
def test_local_gather(indices: list[int], run: int, want: list[float]) -> None:
    src = (10 * np.arange(16)[:, None] + np.arange(4)).astype(F32)
    index = np.zeros((16, 1), np.uint16)
    index[: len(indices), 0] = indices
    got = into(
        (16, len(want)), "local_gather", src_buffer=src, index=index, num_elem_per_idx=run,
        num_valid_indices=len(indices),
    )  # fmt: skip
    assert got[1] == want


def test_local_gather_reads_its_list_partition_by_partition() -> None:
    index = (2 * np.arange(16)[:, None] + np.arange(2)).astype(np.uint16)
    src = np.tile(np.arange(32, dtype=F32), (16, 1))
    got = into(
        (16, 32), "local_gather", src_buffer=src, index=index, num_elem_per_idx=1,
        num_valid_indices=32,
    )  # fmt: skip
    assert got[0] == [*range(0, 32, 2), *range(1, 32, 2)]


def test_nc_n_gather() -> None:
    got = into(
        (1, 4), "nc_n_gather", data=row(10, 20, 30), indices=row(2, 0, 2, 1, dtype=np.uint32)
    )
    assert got == [[30, 10, 30, 20]]


@pytest.mark.parametrize(
    ("rows", "mask", "want"),
    [
        (32, [(i - 1) % 32 for i in range(32)], [31, *range(31)]),
        (1, [0] * 32, [0] * 32),
    ],
)
def test_nc_stream_shuffle(rows: int, mask: list[int], want: list[float]) -> None:
    src = np.arange(rows, dtype=F32).reshape(rows, 1)
    got = into((32, 1), "nc_stream_shuffle", src=src, shuffle_mask=mask)
    assert got == [[x] for x in want]


def test_nonzero_with_count() -> None:
    def call(x: Any) -> Any:
        dst = sb(1, 9, dtype=nl.int32)
        nisa.nonzero_with_count(dst=dst, src=tile(x), index_offset=16, padding_val=-1)
        return dst

    got = on(call, row(0, 1, 1, 0, 0, 1, 0, 0))
    assert got == [[17, 18, 21, -1, -1, -1, -1, -1, 3]]


@pytest.mark.parametrize(
    ("ids", "starts", "ends"),
    [
        ([1, 1, 2, 0], [0, 0, 2, 4], [2, 2, 3, -1]),
        (
            [0, 1, 1, 2, 2, 2, 0, 3, 3],
            [9, 1, 1, 3, 3, 3, 9, 7, 7],
            [-1, 3, 3, 6, 6, 6, -1, 9, 9],
        ),
    ],
)
def test_sequence_bounds(ids: list[int], starts: list[int], ends: list[int]) -> None:
    got = into((1, 2, len(ids)), "sequence_bounds", segment_ids=row(*ids))
    assert got == [[starts, ends]]


# -- DMA -------------------------------------------------------------------------------------------


def test_dma_transpose_of_four_dimensions() -> None:
    def call(x: Any) -> Any:
        dst = sb(2, 1, 3, 2)
        nisa.dma_transpose(dst=dst, src=x, axes=(3, 1, 2, 0))
        return dst

    got = on(call, np.arange(12, dtype=F32).reshape(2, 1, 3, 2))
    assert got == [[[[0, 6], [2, 8], [4, 10]]], [[[1, 7], [3, 9], [5, 11]]]]


def test_dma_compute_adds_to_the_rows_an_index_names() -> None:
    def call(x: Any, i: Any, update: Any) -> Any:
        table = nl.ndarray((4, 1), nl.float32, buffer=HBM)
        nisa.dma_copy(dst=table, src=x)
        rows = table.ap([[1, 2], [1, 1]], vector_offset=tile(i))
        nisa.dma_compute(dst=rows, srcs=[tile(update), rows], reduce_op=nl.add)
        return table

    got = on(
        call, np.array([[1], [2], [3], [4]], F32), np.array([[3], [1]], np.int32),
        np.array([[10], [20]], F32),
    )  # fmt: skip
    assert got == [[1], [22], [3], [14]]


def test_exponential_of_the_fourth_generation() -> None:
    def call(x: Any) -> Any:
        dst, res = sb(1, 3), sb(1, 1)
        nisa.exponential(
            dst=dst, src=tile(x), max_value=2.0, reduce_res=res,
            reduce_cmd=nisa.reduce_cmd.reset_reduce,
        )  # fmt: skip
        return dst, res

    dst, res = on(call, row(2, 2, 2), target=TOY4)
    assert (dst, res) == ([[1, 1, 1]], [[3]])
