"""DMA instructions and registers against the naive machine."""

from __future__ import annotations

from typing import Any

import nki.isa as nisa
import nki.language as nl
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from nki_kernels.hardware.toy import TOY
from tests.embedded.harness import FLOATS, HBM, INTEGERS, SBUF, sb, values
from tests.semantics import both, naive
from tests.semantics.both import Base, Call, Indexed, Operand, agree, filled, operand

EVERY = (*FLOATS, nl.float8_e4m3, nl.float8_e5m2, *INTEGERS)
kinds = st.sampled_from(EVERY)
rows = st.integers(1, 8)
columns = st.integers(1, 12)
flags = st.booleans()
SKIP = {"oob_mode": nisa.oob_mode.skip}


def anywhere(draw: Any, p: int, n: int, kind: Any, *, written: bool = False) -> Operand:
    """An operand on chip from any partition (a DMA knows no quadrants), or in HBM."""
    buffer = draw(st.sampled_from([SBUF, HBM]), label="memory")
    start = draw(st.integers(0, 8 - p), label="partition")
    return operand(draw, p, n, kind, buffer, start=start, written=written)


@given(st.data(), rows, columns, kinds, kinds)
def test_dma_copy(d: Any, p: int, n: int, source: Any, target: Any) -> None:
    src = anywhere(d.draw, p, n, source)
    dst = anywhere(d.draw, p, n, target, written=True)
    agree(Call("dma_copy", {"dst": dst, "src": src}))


@given(st.data(), rows, columns, kinds, kinds)
def test_dma_copy_between_shapes(d: Any, p: int, n: int, source: Any, target: Any) -> None:
    """Row-major order of both views decides where an element goes."""
    other = d.draw(st.sampled_from([x for x in range(1, 9) if (p * n) % x == 0]))
    src = anywhere(d.draw, p, n, source)
    dst = anywhere(d.draw, other, p * n // other, target, written=True)
    agree(Call("dma_copy", {"dst": dst, "src": src}))


def indexed(
    d: Any, p: int, n: int, kind: Any, which: str, *, far: bool, unique: bool = False
) -> Any:
    """p rows of n elements of an HBM table, some of them outside when `far`."""
    height = max(p, d.draw(st.integers(1, 8), label="table rows"))
    width = n + d.draw(st.integers(0, 3), label="more columns")
    table = Base(filled(d.draw, (height, width), kind), kind, HBM)
    count = p if which == "vector" else 1
    numbers = st.integers(-2, height + 1) if far else st.integers(0, height - 1)
    if which == "scalar" and not far:
        numbers = st.integers(0, height - p)
    chosen = d.draw(st.lists(numbers, min_size=count, max_size=count, unique=unique), label="index")
    bits = np.array(chosen, np.int32).reshape(count, 1)
    index = Operand(Base(bits, nl.int32), (slice(0, count), slice(0, 1)))
    # Past width - n the last row of the table is partly outside, which counts as outside.
    offset = d.draw(st.integers(0, width - 1 if far else width - n), label="offset")
    return Indexed(table, index, [[width, p], [1, n]], offset, which)


@given(st.data(), rows, columns, kinds, kinds, st.sampled_from(["vector", "scalar"]), flags)
def test_dma_copy_gathers(
    d: Any, p: int, n: int, source: Any, target: Any, which: str, far: bool
) -> None:
    src = indexed(d, p, n, source, which, far=far)
    dst = anywhere(d.draw, p, n, target, written=True)
    agree(Call("dma_copy", {"dst": dst, "src": src}, SKIP if far else {}))


@given(st.data(), rows, columns, kinds, st.sampled_from(["vector", "scalar"]), flags)
def test_dma_copy_scatters(d: Any, p: int, n: int, kind: Any, which: str, far: bool) -> None:
    # Of duplicate rows the documents leave open which one stays.
    dst = indexed(d, p, n, kind, which, far=far, unique=True)
    src = anywhere(d.draw, p, n, d.draw(kinds))
    agree(Call("dma_copy", {"dst": dst, "src": src}, SKIP if far else {}))


@given(
    st.data(),
    st.sampled_from([k for k in EVERY if k not in (nl.float8_e4m3, nl.float8_e5m2)]),
    st.lists(st.integers(1, 4), min_size=2, max_size=4),
)
def test_dma_transpose(d: Any, kind: Any, shape: list[int]) -> None:
    if np.dtype(filled(d.draw, (1,), kind).dtype).itemsize == 1:
        kind = nl.uint16
    src = Operand(
        Base(filled(d.draw, tuple(shape), kind), kind, d.draw(st.sampled_from([HBM, SBUF]))),
        tuple(slice(0, n) for n in shape),
    )
    order = {2: (1, 0), 3: (2, 1, 0), 4: (3, 1, 2, 0)}[len(shape)]
    flipped = tuple(shape[a] for a in order)
    dst = Operand(Base(filled(d.draw, flipped, kind), kind), tuple(slice(0, n) for n in flipped))
    more = {"axes": order} if d.draw(flags, label="axes given") else {}
    agree(Call("dma_transpose", {"dst": dst, "src": src, **more}))


@given(st.data(), st.integers(1, 5), st.integers(1, 8), flags)
def test_dma_transpose_gathers(d: Any, width: int, height: int, far: bool) -> None:
    """16 rows of a table by index, the least there are; the toy core has no 16 partitions."""
    kind = d.draw(st.sampled_from([nl.bfloat16, nl.uint16, nl.float16]))
    numbers = st.integers(0, height + 2 if far else height - 1)
    chosen = d.draw(st.lists(numbers, min_size=16, max_size=16), label="index")
    index = Operand(
        Base(np.array(chosen, np.uint32).reshape(16, 1), nl.uint32), (slice(0, 16), slice(0, 1))
    )
    table = Base(filled(d.draw, (height, width), kind), kind, HBM)
    src = Indexed(table, index, [[width, 16], [1, width]], 0, "vector")
    dst = Operand(Base(filled(d.draw, (width, 16), kind), kind), (slice(0, width), slice(0, 16)))
    call = Call("dma_transpose", {"dst": dst, "src": src}, SKIP if far else {})
    agree(call, target="trn2")


@given(st.data(), rows, columns, st.integers(1, 4))
def test_dma_compute(d: Any, p: int, n: int, terms: int) -> None:
    dst = anywhere(d.draw, p, n, d.draw(kinds), written=True)
    srcs = [anywhere(d.draw, p, n, d.draw(kinds)) for _ in range(terms)]
    if dst.base.dtype != nl.float32 and d.draw(flags, label="in place"):
        srcs[0] = dst
    agree(Call("dma_compute", {"dst": dst, "srcs": srcs, "reduce_op": "add"}), signed_zeros=False)


@given(st.data(), rows, columns, st.sampled_from(FLOATS), flags)
def test_dma_compute_scatters(d: Any, p: int, n: int, kind: Any, far: bool) -> None:
    dst = indexed(d, p, n, kind, "vector", far=far, unique=True)
    update = operand(d.draw, p, n, kind)
    call = Call(
        "dma_compute", {"dst": dst, "srcs": [dst, update], "reduce_op": "add"}, SKIP if far else {}
    )
    agree(call, signed_zeros=False)


@given(st.data(), rows, columns, st.sampled_from(FLOATS), flags)
def test_dma_compute_gathers(d: Any, p: int, n: int, kind: Any, far: bool) -> None:
    src = indexed(d, p, n, kind, "vector", far=far, unique=True)
    dst = operand(d.draw, p, n, kind, written=True)
    call = Call(
        "dma_compute", {"dst": dst, "srcs": [dst, src], "reduce_op": "add"}, SKIP if far else {}
    )
    agree(call, signed_zeros=False)


@given(st.integers(-(2**31), 2**31 - 1), st.sampled_from(INTEGERS))
def test_registers(value: int, kind: Any) -> None:
    """load, move, store: the low bits of 32."""
    host = np.dtype(naive.HOSTS[str(kind)])
    wrapped = (value - int(np.iinfo(host).min)) % 2 ** (8 * host.itemsize) + int(np.iinfo(host).min)

    def kernel(given: Any) -> Any:
        cell, other = sb(1, 1, dtype=kind), sb(1, 1, dtype=kind)
        nisa.dma_copy(dst=cell, src=given)
        first, second = nisa.register_alloc(None), nisa.register_alloc(7)
        nisa.register_load(first, cell)
        nisa.register_move(second, first)
        nisa.register_store(other, second)
        return other

    got = values(kernel, np.array([[wrapped]], host))
    assert int(got[0, 0]) == wrapped


# -- the comparison itself -------------------------------------------------------------------------


@pytest.mark.parametrize("at", [(0, 0), (1, 3), (2, 1)], ids=["before", "after", "inside"])
def test_a_wrong_byte_anywhere_in_a_tile_is_noticed(
    at: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A twin that also writes one more element, around the view or in it, does not agree."""
    copy = naive.TWINS["dma_copy"]

    def wrong(m: naive.Machine, dst: naive.Tile, src: naive.Tile) -> None:
        copy(m, dst, src)
        dst.array.base[at] += 1

    monkeypatch.setitem(naive.TWINS, "dma_copy", wrong)
    bits = np.arange(16, dtype=np.float32).reshape(4, 4)
    src = Operand(Base(bits, nl.float32), (slice(0, 2), slice(0, 2)))
    dst = Operand(Base(bits * 3, nl.float32), (slice(2, 4), slice(1, 3)))
    with pytest.raises(AssertionError):
        agree(Call("dma_copy", {"dst": dst, "src": src}))


def test_sizes_of_the_naive_core_are_those_of_the_toy() -> None:
    assert (TOY.partitions, TOY.quadrant) == (both.PARTITIONS, both.QUADRANT)
    assert TOY.gpsimd.core_partitions == both.CORE
