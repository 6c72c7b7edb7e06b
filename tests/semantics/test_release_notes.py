"""One test for each correction of AWS's simulator that NKI's release notes report.

A correction says what the hardware does and what is easily got wrong. Each test names the release
and says in its own words what was corrected.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import ml_dtypes
import nki
import nki.isa as nisa
import nki.language as nl
import numpy as np
import pytest

from nki_kernels.machine.errors import NkiKernelsError, RuleViolation, ShapeError
from nki_kernels.machine.launch import launch
from tests.embedded.harness import HBM, ps, sb, tile, values

F32 = np.float32
FP32_MIN = float(np.finfo(F32).min)


def f32(*rows: Any) -> Any:
    return np.array(rows, F32)


# -- 0.6.0 -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "want"),
    [
        (nl.int8, [-2, 0, 2, 2, 4, 127, -128]),
        (nl.uint8, [0, 0, 2, 2, 4, 200, 0]),
        (nl.int32, [-2, 0, 2, 2, 4, 200, -200]),
    ],
)
def test_0_6_float_to_integer_rounds_to_the_nearest_even_and_saturates(
    kind: Any, want: list[int]
) -> None:
    def call(x: Any) -> Any:
        dst = sb(1, 7, dtype=kind)
        nisa.tensor_copy(dst=dst, src=tile(x))
        return dst

    assert values(call, f32([-1.5, 0.5, 1.5, 2.5, 3.5, 200, -200]))[0].tolist() == want


@pytest.mark.parametrize(("number", "want"), [(3e9, 2**31 - 1), (-3e9, -(2**31))])
def test_0_6_float_to_int32_saturates_at_32_bits(number: float, want: int) -> None:
    def call(x: Any) -> Any:
        dst = sb(1, 1, dtype=nl.int32)
        nisa.tensor_copy(dst=dst, src=tile(x))
        return dst

    assert values(call, f32([number]))[0, 0] == want


def test_0_6_match_replace8_gives_the_first_occurrence_to_the_last_column() -> None:
    def call(x: Any, v: Any) -> Any:
        dst, where = sb(1, 11), sb(1, 8, dtype=nl.uint32)
        nisa.nc_match_replace8(dst=dst, data=tile(x), vals=tile(v), imm=0.0, dst_idx=where)
        return where

    data = f32([1, 2, 3, 4, 8, 8, 8, 8, 8, 8, 8])
    vals = f32([3, 8, 8, 8, 8, 8, 8, 8])
    assert values(call, data, vals)[0].tolist() == [2, 10, 9, 8, 7, 6, 5, 4]


def find8(data: Any, vals: Any) -> list[int]:
    def call(x: Any, v: Any) -> Any:
        where = sb(1, 8, dtype=nl.uint32)
        nisa.nc_find_index8(dst=where, data=tile(x), vals=tile(v))
        return where

    found: list[int] = values(call, data, vals)[0].tolist()
    return found


def test_0_6_find_index8_reports_all_ones_for_what_is_not_there() -> None:
    found = find8(f32([5, 1, 2, 3, 4, 6, 7, 8]), f32([9, 5, 9, 8, 9, 9, 9, 9]))
    missing = 2**32 - 1
    assert found == [missing, 0, missing, 7, *[missing] * 4]


def test_0_6_find_index8_walks_through_the_occurrences_of_a_repeated_value() -> None:
    data = f32([1, 2, 3, 4, 8, 8, 8, 8, 8, 8, 8])
    assert find8(data, f32([3, 8, 8, 8, 8, 8, 8, 8])) == [2, 4, 5, 6, 7, 8, 9, 10]


def test_0_6_activation_may_put_its_sum_into_dst() -> None:
    def call(x: Any) -> Any:
        both = sb(2, 1)
        nisa.activation(
            dst=both, op=nl.copy, data=tile(x), scale=3.0, reduce_op=nl.add, reduce_res=both,
            reduce_cmd=nisa.reduce_cmd.reset_reduce,
        )  # fmt: skip
        return both

    # One column: the activated value and the sum are different only by the second write.
    assert values(call, f32([2], [5])).tolist() == [[6], [15]]

    def wide(x: Any) -> Any:
        dst = sb(2, 3)
        nisa.activation(
            dst=dst, op=nl.copy, data=tile(x), reduce_op=nl.add, reduce_res=dst[:, 0:1],
            reduce_cmd=nisa.reduce_cmd.reset_reduce,
        )  # fmt: skip
        return dst

    assert values(wide, f32([1, 2, 3], [4, 5, 6])).tolist() == [[6, 2, 3], [15, 5, 6]]


def test_0_6_double_row_is_seen_and_contracts_both_planes() -> None:
    def call(s: Any, m: Any) -> Any:
        dst = ps(1, 2)
        nisa.nc_matmul(
            dst=dst, stationary=tile(s), moving=tile(m),
            perf_mode=nisa.matmul_perf_mode.double_row,
        )  # fmt: skip
        return dst

    fp8 = ml_dtypes.float8_e4m3
    stationary = np.array([[[2], [3]]], fp8)
    moving = np.array([[[1, 2], [10, 20]]], fp8)
    assert values(call, stationary, moving).tolist() == [[32, 64]]


def test_0_6_matmuls_into_overlapping_regions_add_where_they_overlap() -> None:
    def call(s: Any, a: Any, b: Any) -> Any:
        dst = ps(1, 3)
        one = tile(s)
        nisa.nc_matmul(dst=dst[:, 0:2], stationary=one, moving=tile(a))
        nisa.nc_matmul(dst=dst[:, 1:3], stationary=one, moving=tile(b))
        return dst

    assert values(call, f32([1]), f32([1, 1]), f32([10, 10])).tolist() == [[1, 11, 10]]


def test_0_6_matmul_reports_accumulation_that_the_hardware_gets_wrong() -> None:
    """Adding to what another instruction put into PSUM; AWS warns, here it is an error."""

    def kernel() -> None:
        dst, one = ps(1, 2), sb(1, 1)
        row = sb(1, 2)
        for each in (dst, one, row):
            nisa.memset(dst=each, value=1.0)
        nisa.nc_matmul(dst=dst, stationary=one, moving=row, accumulate=True)

    with pytest.raises(RuleViolation, match="nc_matmul"):
        launch(kernel, target="trn2")


def test_0_6_copy_predicated_takes_operands_of_different_rank() -> None:
    def call(x: Any, p: Any) -> Any:
        dst = sb(2, 1, 2, 2)
        nisa.memset(dst=dst, value=0.0)
        nisa.tensor_copy_predicated(dst=dst, src=tile(x), predicate=tile(p))
        return dst

    pred = np.array([[[[1, 0], [0, 1]]], [[[0, 1], [1, 0]]]], np.uint8)
    got = values(call, f32([1, 2, 3, 4], [5, 6, 7, 8]), pred)
    assert got.reshape(2, 4).tolist() == [[1, 0, 0, 4], [0, 6, 7, 0]]


def test_0_6_select_reduce_takes_operands_of_different_rank() -> None:
    def call(x: Any, p: Any) -> Any:
        dst, res = sb(1, 2, 2), sb(1, 1)
        nisa.select_reduce(
            dst=dst, predicate=tile(p), on_true=tile(x), on_false=-9.0, reduce_res=res,
            reduce_cmd=nisa.reduce_cmd.reset_reduce,
        )  # fmt: skip
        return dst, res

    dst, res = values(call, f32([1, 2, 3, 4]), np.array([[[[1, 0]], [[0, 1]]]], np.uint8))
    assert dst.reshape(-1).tolist() == [1, -9, -9, 4]
    assert res[0, 0] == 4


def test_0_6_selections_take_a_python_float_as_fill_value() -> None:
    def call(x: Any, low: Any, high: Any) -> Any:
        data, ranged, causal = tile(x), sb(2, 3), sb(2, 3)
        nisa.range_select(
            dst=ranged, on_true_tile=data, comp_op0=nl.greater_equal, comp_op1=nl.less,
            bound0=tile(low), bound1=tile(high), on_false_value=FP32_MIN,
        )  # fmt: skip
        nisa.affine_select(
            dst=causal, pattern=[[-1, 3]], channel_multiplier=1, on_true_tile=data,
            on_false_value=FP32_MIN, cmp_op=nl.greater_equal,
        )  # fmt: skip
        return ranged, causal

    data = f32([1, 2, 3], [4, 5, 6])
    ranged, causal = values(call, data, f32([1], [0]), f32([2], [3]))
    assert ranged.tolist() == [[FP32_MIN, 2, FP32_MIN], [4, 5, 6]]
    assert causal.tolist() == [[1, FP32_MIN, FP32_MIN], [4, 5, FP32_MIN]]


def test_0_6_an_operand_of_more_than_128_partitions_is_refused() -> None:
    def kernel() -> None:
        big = nl.ndarray((129, 2), nl.float32, buffer=nl.sbuf)
        nisa.memset(dst=big, value=0.0)

    with pytest.raises(NkiKernelsError, match="129"):
        launch(kernel, target="trn2")


# -- 0.5.0 -----------------------------------------------------------------------------------------


def test_0_5_accumulating_onto_unwritten_psum_is_reported() -> None:
    def kernel() -> None:
        dst, one, row = ps(1, 2), sb(1, 1), sb(1, 2)
        for each in (one, row):
            nisa.memset(dst=each, value=1.0)
        nisa.nc_matmul(dst=dst, stationary=one, moving=row, accumulate=True)

    with pytest.raises(RuleViolation, match="nc_matmul"):
        launch(kernel, target="trn2")


def test_0_5_dma_copy_skips_rows_of_packed_types() -> None:
    """x4 elements have no number; rows past the end stay as they were, the others keep bits."""

    def call(table: Any, index: Any) -> Any:
        packed = table.view(nl.float8_e4m3fn_x4)
        dst = sb(3, 2, dtype=nl.uint32)
        nisa.memset(dst=dst, value=7)
        nisa.dma_copy(
            dst=dst.view(nl.float8_e4m3fn_x4),
            src=packed.ap([[2, 3], [1, 2]], vector_offset=tile(index)),
            oob_mode=nisa.oob_mode.skip,
        )
        return dst

    bits = np.array([[0xFF800001, 2], [0x7FC00000, 4]], np.uint32)
    got = values(call, bits, np.array([[1], [5], [0]], np.int32), target="trn3")
    assert got.tolist() == [bits[1].tolist(), [7, 7], bits[0].tolist()]


def test_0_5_matmul_takes_moving_operands_of_more_dimensions() -> None:
    """A convolution's window: [K, rows, columns] of a larger image."""

    def call(s: Any, image: Any) -> Any:
        dst = ps(2, 2, 2)
        nisa.nc_matmul(dst=dst, stationary=tile(s), moving=tile(image)[:, 1:3, 0:2])
        return dst

    image = np.arange(18, dtype=F32).reshape(2, 3, 3)
    weights = f32([1, 2], [3, 4])
    want = np.einsum("km,krc->mrc", weights, image[:, 1:3, 0:2])
    assert np.array_equal(values(call, weights, image), want)


def test_0_5_a_while_loop_ends() -> None:
    def call() -> Any:
        total, one = sb(1, 1, dtype=nl.int32), sb(1, 1, dtype=nl.int32)
        left = sb(1, 1, dtype=nl.int32)
        nisa.memset(dst=total, value=0)
        nisa.memset(dst=one, value=1)
        nisa.memset(dst=left, value=3)
        register = nisa.register_alloc(None)
        nisa.register_load(register, left)

        def body(r: Any) -> Any:
            nisa.tensor_tensor(dst=total, data1=total, data2=one, op=nl.add)
            nisa.tensor_tensor(dst=left, data1=left, data2=one, op=nl.subtract)
            nisa.register_load(r, left)
            return r

        nl.while_loop(register, body)
        return total

    assert values(call)[0, 0] == 3


def test_0_5_a_gathering_transpose_leaves_the_columns_of_skipped_rows() -> None:
    def call(table: Any, index: Any) -> Any:
        dst = sb(2, 16, dtype=nl.uint16)
        nisa.memset(dst=dst, value=9)
        rows = table.ap([[2, 16], [1, 2]], vector_offset=tile(index))
        nisa.dma_transpose(dst=dst, src=rows, oob_mode=nisa.oob_mode.skip)
        return dst

    table = np.array([[1, 2], [3, 4]], np.uint16)
    index = np.full((16, 1), 99, np.uint32)
    index[3], index[5] = 1, 0
    want = np.full((2, 16), 9, np.uint16)
    want[:, 3], want[:, 5] = table[1], table[0]
    assert np.array_equal(values(call, table, index, target="trn2"), want)


def test_0_5_reshape_keeps_the_number_of_elements() -> None:
    def kernel() -> None:
        sb(2, 6).reshape((2, 5))

    with pytest.raises(ShapeError, match=r"reshape\(2, 5\) has 10 elements"):
        launch(kernel, target="toy")


# -- 0.4.0 -----------------------------------------------------------------------------------------


def test_0_4_low_precision_floats_are_rounded_by_default() -> None:
    def call(x: Any) -> Any:
        half = sb(1, 1, dtype=nl.bfloat16)
        nisa.tensor_copy(dst=half, src=tile(x))
        return half

    got = values(call, f32([1 + 2.0**-9]))
    assert got.dtype == ml_dtypes.bfloat16
    assert got[0, 0] == 1


def test_0_4_dma_copy_with_skip_keeps_the_bits_of_integers() -> None:
    """2^24 + 1 has no float32."""

    def call(table: Any, index: Any) -> Any:
        dst = sb(2, 1, dtype=nl.int32)
        nisa.memset(dst=dst, value=2**24 + 3)
        nisa.dma_copy(
            dst=dst,
            src=table.ap([[1, 2], [1, 1]], vector_offset=tile(index)),
            oob_mode=nisa.oob_mode.skip,
        )
        return dst

    got = values(call, np.array([[2**24 + 1]], np.int32), np.array([[0], [-1]], np.int32))
    assert got.tolist() == [[2**24 + 1], [2**24 + 3]]


def test_0_4_shuffle_entries_of_255_keep_what_dst_holds() -> None:
    def call(x: Any) -> Any:
        dst = sb(32, 1)
        nisa.memset(dst=dst, value=-1.0)
        nisa.nc_stream_shuffle(dst=dst, src=tile(x), shuffle_mask=[16] + [255] * 31)
        return dst

    got = values(call, np.arange(32, dtype=F32).reshape(32, 1), target="trn2")
    assert got[:, 0].tolist() == [16] + [-1] * 31


@pytest.mark.parametrize("through", ["slice", "ap"])
def test_0_4_local_gather_writes_into_views(through: str) -> None:
    def call(x: Any, index: Any) -> Any:
        dst = sb(16, 6)
        nisa.memset(dst=dst, value=-1.0)
        part = dst[:, 2:6] if through == "slice" else dst.ap([[6, 16], [1, 4]], offset=2)
        nisa.local_gather(
            dst=part, src_buffer=tile(x), index=tile(index), num_elem_per_idx=2,
            num_valid_indices=2,
        )  # fmt: skip
        return dst

    src = (10 * np.arange(16)[:, None] + np.arange(4)).astype(F32)
    index = np.zeros((16, 1), np.uint16)
    index[0, 0], index[1, 0] = 2, 0
    got = values(call, src, index, target="trn2")
    assert got[1].tolist() == [-1, -1, 12, 13, 10, 11]
    assert np.array_equal(got[:, 2:], src[:, [2, 3, 0, 1]])


def test_0_4_matmul_reads_every_element_of_operands_with_three_dimensions() -> None:
    def call(s: Any, m: Any) -> Any:
        dst = ps(4, 4)
        nisa.nc_matmul(dst=dst, stationary=tile(s), moving=tile(m))
        return dst

    rng = np.random.default_rng(0)
    left, right = (rng.integers(-4, 5, (3, 2, 2)).astype(F32) for _ in range(2))
    want = left.reshape(3, 4).T @ right.reshape(3, 4)
    assert np.array_equal(values(call, left, right), want)


def test_0_4_iota_and_affine_select_read_offsets_from_registers() -> None:
    def call(x: Any) -> Any:
        register = nisa.register_alloc(5)
        counted, chosen = sb(2, 3, dtype=nl.int32), sb(2, 3)
        nisa.iota(dst=counted, pattern=[[1, 3]], offset=register, channel_multiplier=10)
        nisa.affine_select(
            dst=chosen, pattern=[[-1, 3]], offset=register, channel_multiplier=-5,
            on_true_tile=tile(x), on_false_value=0.0, cmp_op=nl.greater,
        )  # fmt: skip
        return counted, chosen

    counted, chosen = values(call, np.ones((2, 3), F32))
    assert counted.tolist() == [[5, 6, 7], [15, 16, 17]]
    assert chosen.tolist() == [[1, 1, 1], [0, 0, 0]]


def test_0_4_dma_compute_has_no_scales() -> None:
    def kernel() -> None:
        a, b = sb(2, 2), sb(2, 2)
        nisa.dma_compute(dst=a, srcs=[a, b], reduce_op=nl.add, scales=[1.0, 2.0])

    with pytest.raises(RuleViolation, match="scales"):
        launch(kernel, target="toy")


def test_0_4_logical_and_is_true_where_both_are_nonzero() -> None:
    def call(x: Any, y: Any) -> Any:
        return nl.logical_and(tile(x), tile(y))

    got = values(call, f32([0, 0, 1, 1, 2]), f32([0, 1, 0, 1, 3]))
    assert got.tolist() == [[0, 0, 0, 1, 1]]


@pytest.mark.parametrize("engine", ["tensor", "vector"])
def test_0_4_nc_transpose_runs_on_the_engine_it_is_given(engine: str) -> None:
    def kernel(x: Any) -> None:
        dst = sb(2, 2) if engine == "vector" else ps(2, 2)
        nisa.nc_transpose(dst=dst, data=tile(x), engine=nisa.engine[engine])

    trace = launch(kernel, (f32([1, 2], [3, 4]),), target="toy").trace
    assert trace.events[-1].engine is nisa.engine[engine]


def test_0_4_frozen_dataclasses_of_nkiobject_can_be_made() -> None:
    @dataclasses.dataclass(frozen=True)
    class Config(nl.NKIObject):
        width: int
        height: int = 3

    assert Config(2) == Config(width=2, height=3)


def test_0_4_bool_outputs_stay_bool() -> None:
    @nki.jit
    def kernel(x: Any) -> Any:
        out = nl.ndarray(x.shape, nl.bool_, buffer=HBM)
        flags = sb(1, 3, dtype=nl.bool_)
        nisa.tensor_scalar(dst=flags, data=tile(x), op0=nl.greater, operand0=0.0)
        nisa.dma_copy(dst=out, src=flags)
        return out

    got = kernel(f32([-1, 0, 5]))
    assert got.dtype == np.bool_
    assert got.tolist() == [[False, False, True]]


def test_0_4_writing_the_index_of_a_device_loop_is_refused() -> None:
    def kernel() -> None:
        def body(i: Any) -> None:
            nisa.register_move(i, 0)

        nl.fori_loop(0, 2, body)

    with pytest.raises(RuleViolation, match="index of a device loop"):
        launch(kernel, target="toy")


def test_0_4_dma_transpose_wants_the_exact_shape_of_dst() -> None:
    def kernel() -> None:
        src = nl.ndarray((4, 1, 1, 6), nl.bfloat16, buffer=HBM)
        nisa.dma_transpose(dst=sb(6, 1, 4, dtype=nl.bfloat16), src=src)

    with pytest.raises(RuleViolation, match=r"dst must be \[6, 1, 1, 4\]"):
        launch(kernel, target="toy")
