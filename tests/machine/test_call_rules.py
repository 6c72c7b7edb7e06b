"""What a call may be made of, judged at every call: the memo of verdicts hides nothing."""

from __future__ import annotations

import nki.isa as nisa
import nki.language as nl
import numpy as np
import pytest

from nki_kernels.machine.errors import AbstractValue, RuleViolation
from nki_kernels.machine.launch import launch
from nki_kernels.machine.tensor import Abstract


def run(kernel, *arrays, target="trn2"):
    return launch(kernel, arrays, target=target)


def loaded(x):
    tile = nl.ndarray(x.shape, x.dtype)
    nisa.dma_copy(dst=tile, src=x)
    return tile


def test_an_index_of_another_type_is_judged_anew():
    table = np.arange(32, dtype=np.float32).reshape(8, 4)

    def kernel(x, good, bad):
        out = nl.ndarray((2, 4), nl.float32)
        for index in (good, bad):
            rows = x.ap([[4, 2], [1, 4]], vector_offset=loaded(index))
            nisa.dma_copy(dst=out, src=rows)

    indices = np.zeros((2, 1), np.int32)
    with pytest.raises(RuleViolation, match=r"int32 or uint32"):
        run(kernel, table, indices, indices.astype(np.float32))


@pytest.mark.parametrize("value", [[1.0], np.ones((2, 2), np.float32), {}])
def test_an_operand_of_no_known_type_is_named(value):
    def kernel():
        tile = nl.ndarray((2, 2), nl.float32)
        nisa.tensor_copy(dst=tile, src=value)

    with pytest.raises(RuleViolation) as caught:
        run(kernel)
    text = str(caught.value)
    assert f"src is {type(value).__name__}; operands are tensors" in text
    assert f"nisa.tensor_copy at {__file__}" in text


def test_an_operator_of_another_library_names_the_line():
    def kernel(x):
        tile = loaded(x)
        nisa.tensor_tensor(dst=tile, data1=tile, data2=tile, op=np.add)

    with pytest.raises(RuleViolation) as caught:
        run(kernel, np.ones((2, 2), np.float32))
    text = str(caught.value)
    assert f"nisa.tensor_tensor at {__file__}" in text
    assert "must be a function of nki.language such as nl.add" in text


def test_registers_cannot_be_compared():
    def kernel():
        return nisa.register_alloc(0) == 0

    with pytest.raises(AbstractValue, match="exists only at run time"):
        run(kernel)


def test_a_register_tile_may_be_written_with_one_dimension():
    def kernel(x):
        tile = nl.ndarray([1], nl.int32)
        assert tile.shape == (1, 1)
        nisa.dma_copy(dst=tile, src=x)
        register = nisa.register_alloc()
        nisa.register_load(register, tile)
        out = nl.ndarray((1,), nl.int32, buffer=nl.shared_hbm)
        nisa.register_store(out, register)
        return out

    assert run(kernel, np.array([7], np.int32)).result.tolist() == [7]


def accumulate(x, command):
    tile, total = loaded(x), nl.ndarray((x.shape[0], 1), nl.float32)
    nisa.activation(
        dst=tile, op=nl.copy, data=tile, reduce_op=nl.add, reduce_res=total, reduce_cmd=command
    )
    return total


def test_an_accumulator_that_was_never_reset_is_poison():
    seen = []

    def kernel(x):
        seen.append(accumulate(x, nisa.reduce_cmd.reduce).numpy())
        seen.append(accumulate(x, nisa.reduce_cmd.reset_reduce).numpy())

    run(kernel, np.ones((2, 3), np.float32))
    assert np.isnan(seen[0]).all()
    assert np.array_equal(seen[1], [[3], [3]])


def test_an_accumulator_without_values_passes_none_on():
    def kernel(known, unknown):
        accumulate(unknown, nisa.reduce_cmd.reset_reduce)
        mixed = accumulate(known, nisa.reduce_cmd.reduce)
        fresh = accumulate(known, nisa.reduce_cmd.reset_reduce)
        assert mixed.mem.abstract
        assert np.array_equal(fresh.numpy(), [[3], [3]])

    run(kernel, np.ones((2, 3), np.float32), Abstract((2, 3), np.float32))


@pytest.mark.parametrize(("target", "legal"), [("trn1", False), ("trn2", False), ("trn3", True)])
def test_adding_to_what_another_instruction_initialised_needs_gen4(target, legal):
    def kernel(x):
        tile, total = loaded(x), nl.ndarray((3, 3), nl.float32, buffer=nl.psum)
        nisa.memset(dst=total, value=2.0)
        nisa.nc_matmul(total, tile, tile, accumulate=True)
        assert np.array_equal(total.numpy(), np.full((3, 3), 4.0))

    if legal:
        run(kernel, np.ones((2, 3), np.float32), target=target)
    else:
        with pytest.raises(RuleViolation, match=f"nisa.nc_matmul at {__file__}"):
            run(kernel, np.ones((2, 3), np.float32), target=target)


@pytest.mark.parametrize("side", [1, 5, 40])
def test_the_shares_of_a_transpose_add_up(side):
    def kernel(x):
        tile = nl.ndarray((side, side), nl.bfloat16)
        nisa.dma_transpose(dst=tile, src=x)

    trace = run(kernel, Abstract((side, side), nl.bfloat16)).trace
    (event,) = trace.events
    shares = sum(count * size for _, runs in event.work.descriptors for count, size in runs)
    assert shares == event.work.nbytes == 2 * side * side


def test_a_tile_equals_none_or_itself_and_has_no_value_to_compare():
    def kernel(x):
        tile = loaded(x)
        assert tile != None  # noqa: E711 - NKI has no `is`
        assert tile == tile
        assert tile != loaded(x)
        return tile == 1

    with pytest.raises(AbstractValue, match=r"== 1 needs the tile's values"):
        run(kernel, np.ones((2, 2), np.float32))


HUGE = 10**400


def multiplied(x):
    nisa.tensor_scalar(dst=x, data=x, op0=nl.multiply, operand0=HUGE)


def activated(x):
    nisa.activation(dst=x, op=nl.exp, data=x, scale=HUGE)


def replaced(x):
    nisa.nc_match_replace8(dst=x, data=x, vals=x[:, 0:8], imm=HUGE)


def indexed(x):
    nisa.nc_match_replace8(dst=x, data=x, vals=x[:, 0:8], imm=0.0, dst_idx=1.0)


@pytest.mark.parametrize(
    ("call", "says"),
    [
        (multiplied, "must be a number"),
        (activated, "must be a number"),
        (replaced, "must be a number"),
        (indexed, "dst_idx=1.0; it must be None or a uint16 or uint32"),
    ],
)
def test_numbers_no_float32_can_hold_and_stray_ones_are_refused(call, says):
    def kernel(x):
        call(loaded(x))

    with pytest.raises(RuleViolation, match=says):
        run(kernel, np.ones((2, 9), np.float32))


def test_numbers_in_a_tuple_are_judged_by_their_type():
    """(0, 0) and (0.0, 0) are equal and hash alike; the verdict of one is not the other's."""

    def kernel(x, position):
        t, out = loaded(x), nl.ndarray(x.shape, nl.float32, buffer=nl.psum)
        nisa.nc_matmul(out, t, t, tile_position=position, tile_size=(32, 32))

    x = np.ones((32, 32), np.float32)
    for _ in range(2):
        run(kernel, x, (0, 0))
        with pytest.raises(RuleViolation, match="each is two ints"):
            run(kernel, x, (0.0, 0))
