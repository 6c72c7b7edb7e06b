"""Instructions that multiply, move, search, select or index, against the naive machine."""

from __future__ import annotations

from typing import Any

import nki.isa as nisa
import nki.language as nl
import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from nki_kernels.machine.instruction import REGISTRY
from tests.embedded.harness import FLOATS, HBM, HOSTS, INTEGERS, PSUM, SBUF
from tests.semantics import both, naive
from tests.semantics.both import CORE, QUADRANT, Base, Call, Operand, agree, filled, operand, vector

#: Instructions that have no twin. Of the generators only the statistics are documented, and two
#: cores meet in the last two. The list may only get shorter.
PENDING = frozenset({
    "core_barrier", "dropout", "rand2", "rand_get_state", "rand_set_state", "rng", "sendrecv",
    "set_rng_seed",
})  # fmt: skip

EVERY = (*FLOATS, nl.float8_e4m3, nl.float8_e5m2, *INTEGERS)
COMPARISONS = ("equal", "less", "less_equal", "greater", "greater_equal")
rows = st.integers(1, 8)
columns = st.integers(1, 16)
kinds = st.sampled_from(EVERY)
flags = st.booleans()


def test_every_instruction_has_a_twin() -> None:
    assert set(REGISTRY) - set(naive.TWINS) <= PENDING
    assert not PENDING & set(naive.TWINS)
    assert both.TWIN_MODULES  # imported: importing them fills the table


def whole(draw: Any, shape: tuple[int, ...], dtype: Any, buffer: Any = HBM) -> Operand:
    """A whole tensor, as one operand."""
    return Operand(Base(filled(draw, shape, dtype), dtype, buffer), (slice(None),) * len(shape))


def plain(draw: Any, p: int, n: int, dtype: Any, buffer: Any = SBUF) -> Operand:
    """A contiguous [p, n] tile from partition 0."""
    return Operand(Base(filled(draw, (p, n), dtype), dtype, buffer), (slice(0, p), slice(0, n)))


# -- Tensor engine ---------------------------------------------------------------------------------


@given(st.data(), rows, rows, st.integers(1, 16), st.sampled_from([*FLOATS, nl.float8_e4m3]))
def test_nc_matmul(d: Any, k: int, m: int, n: int, kind: Any) -> None:
    """Integers, whose sums are exact in any order; groups of one to three matmuls."""
    second = nl.float32 if kind == nl.float32 else d.draw(st.sampled_from(FLOATS[1:]))
    dst = operand(d.draw, m, n, nl.float32, PSUM, written=True)
    calls = []
    for _ in range(d.draw(st.integers(1, 3), label="matmuls")):
        left = operand(d.draw, k, m, kind)
        right = operand(d.draw, k, n, second)
        for side in (left, right):
            side.base.bits[...] = np.rint(side.base.bits.astype(np.float32))
        accumulate = d.draw(st.sampled_from([None, False, *([True] if calls else [])]))
        arguments = {"dst": dst, "stationary": left, "moving": right, "accumulate": accumulate}
        calls.append(Call("nc_matmul", arguments))
    agree(*calls, signed_zeros=False)  # the order of a sum decides the sign of its zero


@given(st.data(), st.integers(1, 4), rows, st.integers(2, 6), st.integers(1, 5))
def test_nc_matmul_accumulates_where_regions_overlap(
    d: Any, k: int, m: int, width: int, step: int
) -> None:
    """accumulate=None counts element by element: overlapping writes add, the rest begins."""
    total = width + 2 * step
    bits = filled(d.draw, (m, total), nl.float32)
    base = Base(bits, nl.float32, PSUM)
    calls = []
    for at in (0, step, 2 * step):
        left, right = plain(d.draw, k, m, nl.bfloat16), plain(d.draw, k, width, nl.bfloat16)
        for side in (left, right):
            side.base.bits[...] = np.rint(side.base.bits.astype(np.float32))
        dst = Operand(base, (slice(0, m), slice(at, at + width)))
        calls.append(Call("nc_matmul", {"dst": dst, "stationary": left, "moving": right}))
    agree(*calls, signed_zeros=False)


@given(st.data(), rows, rows, st.integers(1, 8))
def test_nc_matmul_double_row(d: Any, k: int, m: int, n: int) -> None:
    kind = d.draw(st.sampled_from([nl.float8_e4m3, nl.float8_e5m2]))
    left, right = (
        Operand(Base(filled(d.draw, (k, 2, width), kind), kind),
                (slice(0, k), slice(0, 2), slice(0, width)))
        for width in (m, n)
    )  # fmt: skip
    for side in (left, right):
        side.base.bits[...] = np.rint(side.base.bits.astype(np.float32))
    dst = operand(d.draw, m, n, nl.float32, PSUM, written=True)
    call = Call("nc_matmul", {"dst": dst, "stationary": left, "moving": right,
                              "perf_mode": "double_row"})  # fmt: skip
    agree(call, signed_zeros=False)


@given(st.data(), rows, rows, st.sampled_from([*FLOATS]))
def test_nc_matmul_transposes(d: Any, k: int, m: int, kind: Any) -> None:
    data, eye = operand(d.draw, k, m, kind), plain(d.draw, k, k, kind)
    eye.base.bits[...] = np.eye(k)
    dst = operand(d.draw, m, k, kind, PSUM, written=True)
    agree(Call("nc_matmul", {"dst": dst, "stationary": data, "moving": eye, "is_transpose": True}))


@given(st.data(), st.integers(1, 8), st.integers(1, 8), kinds)
def test_nc_transpose(d: Any, p: int, n: int, kind: Any) -> None:
    wide = np.dtype(HOSTS[kind]).itemsize > 1  # 1-byte results are spread over 16 bits
    if d.draw(flags, label="Tensor") and wide:
        data, dst = operand(d.draw, p, n, kind), operand(d.draw, n, p, kind, PSUM, written=True)
        agree(Call("nc_transpose", {"dst": dst, "data": data}))
        return
    p, n = min(p, QUADRANT), min(n, QUADRANT)
    data, dst = operand(d.draw, p, n, kind), operand(d.draw, n, p, kind, written=True)
    agree(Call("nc_transpose", {"dst": dst, "data": data}, {"engine": nisa.engine.vector}))


# -- searches --------------------------------------------------------------------------------------


def searched(d: Any, p: int, n: int, dims: int = 2) -> Operand:
    """A tile with few different values, so that some repeat."""
    data = operand(d.draw, p, n, d.draw(st.sampled_from(FLOATS)), dims=dims)
    data.base.bits[...] = np.rint(data.base.bits.astype(np.float32)) + 1  # no zero has a sign
    return data


@given(st.data(), rows, st.integers(8, 20))
def test_max8(d: Any, p: int, n: int) -> None:
    dst = operand(d.draw, p, 8, nl.float32, dims=1, written=True)
    agree(Call("max8", {"dst": dst, "src": searched(d, p, n)}), signed_zeros=False)


def eight(d: Any, p: int, data: Operand) -> Operand:
    """Values to look for: some of data's, some of nobody's, some twice."""
    vals = operand(d.draw, p, 8, nl.float32, dims=1, written=True)
    view = vals.of_array(vals.base.bits)
    here = np.ascontiguousarray(data.of_array(data.base.bits)).astype(np.float32).reshape(p, -1)
    rng = np.random.default_rng(d.draw(st.integers(0, 2**16)))
    picked = rng.integers(0, here.shape[1], (p, 8))
    view[...] = np.take_along_axis(here, picked, axis=1)
    view[rng.random((p, 8)) < 0.2] = 99
    return vals


@given(st.data(), rows, st.integers(8, 20), st.sampled_from([nl.uint16, nl.uint32]))
def test_nc_find_index8(d: Any, p: int, n: int, kind: Any) -> None:
    data = searched(d, p, n)
    dst = operand(d.draw, p, 8, kind, dims=1, written=True)
    agree(Call("nc_find_index8", {"dst": dst, "data": data, "vals": eight(d, p, data)}))


@given(st.data(), rows, st.integers(1, 20))
def test_nc_match_replace8(d: Any, p: int, n: int) -> None:
    data = searched(d, p, n, dims=3)
    arguments = {"dst": operand(d.draw, p, n, d.draw(st.sampled_from(FLOATS)), written=True),
                 "data": data, "vals": eight(d, p, data),
                 "imm": d.draw(st.sampled_from([0.5, -7, 100]))}  # fmt: skip
    if d.draw(flags, label="in place") and data.repeat is None:
        arguments["dst"] = data
    if d.draw(flags, label="dst_idx"):
        kind = d.draw(st.sampled_from([nl.uint16, nl.uint32]))
        arguments["dst_idx"] = operand(d.draw, p, 8, kind, dims=1, written=True)
    agree(Call("nc_match_replace8", arguments))


# -- selection -------------------------------------------------------------------------------------


@given(st.data(), rows, columns)
def test_select_reduce(d: Any, p: int, n: int) -> None:
    allowed = [k for k in EVERY if k not in (nl.int32, nl.uint32)]
    predicate = operand(
        d.draw, p, n, d.draw(st.sampled_from([nl.int8, nl.uint8, nl.int16, nl.uint16]))
    )
    predicate.base.bits[np.abs(predicate.base.bits.astype(np.int32)) % 3 == 0] = 0
    command = d.draw(st.sampled_from(["idle", "reset_reduce"]))
    on_false = vector(d.draw, p) if d.draw(flags) else d.draw(st.sampled_from([-9.0, 3]))
    arguments = {
        "dst": operand(d.draw, p, n, d.draw(kinds), written=True), "predicate": predicate,
        "on_true": operand(d.draw, p, n, d.draw(st.sampled_from(allowed))), "on_false": on_false,
        "reduce_cmd": command, "reverse_pred": d.draw(flags),
    }  # fmt: skip
    if command != "idle":
        arguments["reduce_res"] = vector(d.draw, p, d.draw(st.sampled_from(FLOATS)), written=True)
    agree(Call("select_reduce", arguments), signed_zeros=False)


@given(st.data(), rows, columns, st.integers(-20, 20))
def test_range_select(d: Any, p: int, n: int, start: int) -> None:
    floats = st.sampled_from([*FLOATS, nl.float8_e5m2])
    data = operand(d.draw, p, n, d.draw(floats), d.draw(st.sampled_from([SBUF, PSUM])))
    bounds = [vector(d.draw, p) for _ in range(2)]
    for bound in bounds:
        bound.base.bits[...] = start + np.rint(np.abs(bound.base.bits))
    command = d.draw(st.sampled_from(["idle", "reset_reduce"]))
    arguments = {
        "dst": operand(d.draw, p, n, d.draw(floats), written=True),
        "on_true_tile": data,
        "comp_op0": d.draw(st.sampled_from(COMPARISONS)),
        "comp_op1": d.draw(st.sampled_from(COMPARISONS)),
        "bound0": bounds[0], "bound1": bounds[1], "range_start": start, "reduce_cmd": command,
    }  # fmt: skip
    if command != "idle":
        arguments["reduce_res"] = vector(d.draw, p, d.draw(st.sampled_from(FLOATS)), written=True)
    agree(Call("range_select", arguments), signed_zeros=False)


@given(st.data(), rows, columns, kinds)
def test_tensor_copy_predicated(d: Any, p: int, n: int, kind: Any) -> None:
    predicate = operand(d.draw, p, n, d.draw(st.sampled_from([nl.uint8, nl.uint16, nl.uint32])))
    predicate.base.bits[predicate.base.bits % 3 == 0] = 0
    src: Any = operand(d.draw, p, n, kind)
    if d.draw(flags, label="number"):
        src = d.draw(st.integers(0, 100))
    arguments = {
        "dst": operand(d.draw, p, n, kind, written=True), "src": src, "predicate": predicate,
        "reverse_pred": d.draw(flags),
    }  # fmt: skip
    agree(Call("tensor_copy_predicated", arguments))


def pattern_of(d: Any) -> list[list[int]]:
    # 81 elements at most: with gaps and offsets a tile of them still fits the toy core.
    pairs = d.draw(st.lists(st.integers(1, 3), min_size=1, max_size=4), label="counts")
    return [[d.draw(st.integers(-9, 9) | st.just(2**31 - 1), label="step"), n] for n in pairs]


def count_of(pattern: list[list[int]]) -> int:
    return int(np.prod([n for _, n in pattern]))


word = st.integers(-50, 50) | st.integers(-(2**31), 2**31 - 1)


@given(st.data(), rows, kinds, word, word)
def test_iota(d: Any, p: int, kind: Any, offset: int, multiplier: int) -> None:
    pattern = pattern_of(d)
    dst = operand(d.draw, p, count_of(pattern), kind, written=True)
    arguments = {
        "dst": dst, "pattern": pattern, "offset": offset, "channel_multiplier": multiplier,
    }  # fmt: skip
    agree(Call("iota", arguments))


@given(st.data(), rows, kinds, kinds, st.integers(-20, 20), st.integers(-9, 9))
def test_affine_select(
    d: Any, p: int, source: Any, target: Any, offset: int, multiplier: int
) -> None:
    pattern = pattern_of(d)
    count = count_of(pattern)
    arguments = {
        "dst": operand(d.draw, p, count, target, written=True), "pattern": pattern,
        "channel_multiplier": multiplier, "on_true_tile": operand(d.draw, p, count, source),
        "on_false_value": d.draw(st.sampled_from([0.0, -1.5, float(np.finfo(np.float32).min)])),
        "cmp_op": d.draw(st.sampled_from([*COMPARISONS, "not_equal"])), "offset": offset,
    }  # fmt: skip
    agree(Call("affine_select", arguments))


# -- gathers on chip -------------------------------------------------------------------------------


@given(st.data(), columns, kinds)
def test_nc_stream_shuffle(d: Any, n: int, kind: Any) -> None:
    pairs = d.draw(st.integers(1, 4), label="quadrants")
    p = QUADRANT * pairs
    # One active quadrant may start at each, two at every second, more at 0.
    step = p if pairs <= 2 else both.PARTITIONS
    starts = [d.draw(st.sampled_from(range(0, both.PARTITIONS - p + 1, step))) for _ in range(2)]
    src = operand(d.draw, p, n, kind, start=starts[0])
    dst = operand(d.draw, p, n, kind, start=starts[1], written=True)
    mask = [d.draw(st.sampled_from([0, 1, 255])) for _ in range(QUADRANT)]
    if d.draw(flags, label="in place") and src.repeat is None:
        dst = src
    agree(Call("nc_stream_shuffle", {"dst": dst, "src": src, "shuffle_mask": mask}))


@given(st.data(), rows, columns, columns, kinds)
def test_nc_n_gather(d: Any, p: int, n: int, held: int, kind: Any) -> None:
    indices = operand(d.draw, p, n, nl.uint32)
    indices.base.bits[...] %= held
    arguments = {
        "dst": operand(d.draw, p, n, kind, written=True),
        "data": operand(d.draw, p, held, kind), "indices": indices,
    }  # fmt: skip
    agree(Call("nc_n_gather", arguments))


@given(st.data(), st.sampled_from([CORE, 2 * CORE]), st.sampled_from([1, 2, 4]), kinds)
def test_local_gather(d: Any, p: int, run: int, kind: Any) -> None:
    held = run + d.draw(st.integers(0, 8))
    index = operand(d.draw, p, d.draw(st.integers(1, 3)), nl.uint16)
    index.base.bits[...] %= held - run + 1
    view = index.of_array(index.base.bits)
    count = d.draw(st.integers(1, view[0].size * CORE), label="valid indices")
    arguments = {
        "dst": operand(d.draw, p, count * run, kind, written=True),
        "src_buffer": operand(d.draw, p, held, kind), "index": index,
        "num_elem_per_idx": run, "num_valid_indices": count,
    }  # fmt: skip
    agree(Call("local_gather", arguments))


# -- index lists -----------------------------------------------------------------------------------


@given(st.data(), rows, columns, st.sampled_from([nl.int32, nl.float32]))
def test_nonzero_with_count(d: Any, p: int, n: int, kind: Any) -> None:
    src = operand(d.draw, p, n, kind)
    src.base.bits[np.abs(src.base.bits) % 2 == 0] = 0
    arguments = {
        "dst": operand(d.draw, p, n + 1, nl.int32, written=True), "src": src,
        "index_offset": d.draw(st.integers(-100, 100)),
        "padding_val": d.draw(st.integers(-5, 5)),
    }  # fmt: skip
    agree(Call("nonzero_with_count", arguments))


@given(st.data(), st.sampled_from([CORE, 2 * CORE]), st.integers(2, 6), st.integers(1, 8))
def test_topk(d: Any, p: int, width: int, k: int) -> None:
    """All values differ: the documents leave ties open."""
    n = d.draw(st.integers(8, max(8, CORE * width)))
    width = max(width, -(-n // CORE))
    src = plain(d.draw, p, width, nl.bfloat16)
    order = np.random.default_rng(d.draw(st.integers(0, 2**16))).permutation(p * width)
    src.base.bits[...] = order.reshape(p, width)
    arguments = {
        "val_dst": operand(d.draw, p, k, nl.bfloat16, written=True),
        "idx_dst": operand(d.draw, p, k, nl.uint32, written=True), "src": src, "n": n,
    }  # fmt: skip
    agree(Call("topk", arguments))


@given(st.data(), columns, st.sampled_from([nl.int32, nl.float32]))
def test_sequence_bounds(d: Any, n: int, kind: Any) -> None:
    ids = operand(d.draw, 1, n, kind)
    ids.base.bits[...] = np.abs(np.rint(ids.base.bits)) % 3
    dst = plain(d.draw, 1, 2 * n, kind)
    dst.base.bits = dst.base.bits.reshape(1, 2, n)
    dst.key = (slice(0, 1), slice(0, 2), slice(0, n))
    agree(Call("sequence_bounds", {"dst": dst, "segment_ids": ids}))
