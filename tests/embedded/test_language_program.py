"""Random tiles, constants of the program, device loops, ordered blocks, objects kernels carry."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import nki.isa as nisa
import nki.language as nl
import nki.typing as nt
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from nki_kernels.machine.errors import DtypeError, KernelError, RuleViolation, ShapeError
from nki_kernels.machine.launch import launch
from tests.embedded.harness import (
    HBM,
    HOSTS,
    INTEGERS,
    PSUM,
    SBUF,
    back,
    columns,
    data,
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
TARGETS = ("trn1", "trn2", "trn3")
seeds = st.integers(0, 2**20)


# -- random numbers --------------------------------------------------------------------------------


def seeded(number):
    seed = nl.full((1, 1), number, nl.int32)
    nl.random_seed(seed)


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("buffer", [SBUF, PSUM, HBM, nl.private_hbm])
@pytest.mark.parametrize("kind", [nl.float32, nl.bfloat16])
def test_rand_is_uniform_from_0_to_1(kind, buffer, target):
    def kernel():
        result = nl.rand((128, 64), kind, buffer=buffer, name="noise")
        assert (result.buffer, result.name, result.dtype) == (buffer, "noise", kind)
        return result

    got = values(kernel, target=target).astype(np.float64)
    assert got.min() >= 0
    assert got.max() < 1 or kind is nl.bfloat16
    # n = 8192 draws: the mean and each decile lie within 6 standard deviations, one failure in
    # 10^8 such tests, and the seed is fixed.
    assert abs(got.mean() - 0.5) < 6 * np.sqrt(1 / 12 / got.size)
    shares = np.histogram(got, 10, (0, 1))[0] / got.size
    grid = 2.0**-8 if kind is nl.bfloat16 else 0.0  # how far rounding moves a decile's edge
    assert np.abs(shares - 0.1).max() < 6 * np.sqrt(0.09 / got.size) + grid


@pytest.mark.parametrize("target", TARGETS)
def test_equal_seeds_give_equal_numbers(target):
    def kernel():
        drawn = []
        for number in (42, 42, 7):
            seeded(number)
            drawn.append(nl.rand((4, 8), nl.float32))
        return (*drawn, nl.rand((4, 8), nl.float32))

    first, again, other, following = values(kernel, target=target)
    same(again, first)
    assert not np.array_equal(other, first)
    assert not np.array_equal(following, other)


def test_every_block_of_hbm_draws_its_own_numbers():
    got = values(lambda: nl.rand((24, 16), nl.float32, buffer=HBM))
    assert len({row.tobytes() for row in got}) == 24


def test_rand_is_a_float():
    refused(lambda: nl.rand((2, 2), nl.int32), "dtype int32", "float type", error=DtypeError)


def test_a_seed_is_one_element():
    refused(lambda: nl.random_seed(nl.zeros((1, 2), nl.int32)), "src_seeds [1, 2]", "[1, 1]")
    refused(lambda: nl.random_seed(42), "nl.random_seed: seed is int 42", "must be a tile")


@given(p=rows, n=columns, kind=st.sampled_from([nl.float32, nl.bfloat16, *INTEGERS]), seed=seeds)
def test_dropout_at_its_ends(p, n, kind, seed):
    x = data(seed, (p, n), kind)
    none, every = values(lambda y: (nl.dropout(tile(y), 0.0), nl.dropout(tile(y), 1.0)), x)
    same(none, x)
    same(every, np.zeros_like(x))


def test_dropout_drops_its_share_and_scales_nothing():
    x = np.ones((128, 64), F32)
    column = np.repeat(np.array([[0.0], [0.75]], F32), 64, 0)

    def kernel(y, rate):
        return nl.dropout(tile(y), 0.25), nl.dropout(tile(y), tile(rate), dtype=nl.bfloat16)

    even, split = values(kernel, x, column, target="trn2")
    assert set(np.unique(even)) == {0.0, 1.0}
    assert abs(even.mean() - 0.75) < 6 * np.sqrt(0.1875 / even.size)
    assert split.dtype == HOSTS[nl.bfloat16]
    assert (split[:64] == 1).all()
    share = split[64:].astype(np.float64).mean()
    assert abs(share - 0.25) < 6 * np.sqrt(0.1875 / (split.size / 2))


def test_a_rate_is_a_probability():
    refused(lambda: nl.dropout(sb(2, 2), 1.5), "prob=1.5", "from 0 to 1")


# -- constants of the program ----------------------------------------------------------------------


@pytest.mark.parametrize("kind", [nl.float32, nl.bfloat16, nl.float16, nl.int32, nl.uint8,
                                  nl.float8_e5m2])  # fmt: skip
def test_a_constant_lies_in_shared_hbm(kind):
    x = data(3, (3, 20), kind)

    def kernel():
        constant = nl.shared_constant(x)
        assert (constant.buffer, constant.dtype) == (nl.shared_hbm, kind)
        return tile(constant)

    same(values(kernel), x)
    assert [e.opcode for e in traced(lambda: nl.shared_constant(x)).trace] == []


def test_a_constant_from_a_file(tmp_path):
    x = np.arange(6, dtype=F32).reshape(2, 3)
    np.save(tmp_path / "table.npy", x)
    for name in (tmp_path / "table.npy", str(tmp_path / "table.npy")):
        same(values(lambda n=name: tile(nl.shared_constant(n))), x)


def test_a_kernel_may_return_a_constant():
    x = np.arange(3, dtype=F32)
    got = launch(lambda: nl.shared_constant(x), target="toy").outputs[0]
    same(got, x)
    assert got is not x


def test_constants_that_are_none(tmp_path):
    (tmp_path / "broken.npy").write_text("no array")
    for bad in (tmp_path / "missing.npy", tmp_path / "broken.npy"):
        refused(lambda b=bad: nl.shared_constant(b), bad.name, "cannot be read", ".npy file")
    refused(lambda: nl.shared_constant([1.0]), "constant is list", "a NumPy array")
    refused(
        lambda: nl.shared_constant(np.zeros(2, bool)), "dtype bool_", "convert the array",
        error=DtypeError,
    )  # fmt: skip


def test_cores_share_a_constant_and_must_agree():
    def agree():
        nl.shared_constant(np.arange(3, dtype=F32))

    launch(agree, target="trn2", lnc=2)

    def differ():
        nl.shared_constant(np.full(3, nl.program_id(0), F32))

    with pytest.raises(KernelError, match=r"core 1 passes other data .* than core 0"):
        launch(differ, target="trn2", lnc=2)


# -- the shape of a transpose ----------------------------------------------------------------------


@pytest.mark.parametrize(("shape", "axes"), [((2, 5), (1, 0)), ((2, 1, 5), (2, 1, 0)),
                                             ((2, 1, 3, 5), (3, 1, 2, 0))])  # fmt: skip
def test_empty_like_prepares_a_transpose(shape, axes):
    x = np.arange(np.prod(shape), dtype=F32).reshape(shape)

    def kernel(source):
        target = nl.empty_like(
            source, buffer=SBUF, name="turned", transpose_axes=axes, address=(0, 64)
        )
        assert (target.name, target.mem.tile.address) == ("turned", (0, 64))
        nisa.dma_transpose(dst=target, src=source)
        return target

    same(values(kernel, x), x.transpose(axes))


@pytest.mark.parametrize(("axes", "buffer"), [((0, 1), SBUF), ((2, 1, 0), SBUF), ((1, 0), PSUM),
                                              ([1, 0], SBUF)])  # fmt: skip
def test_empty_like_knows_the_orders_of_the_transpose(axes, buffer):
    refused(
        lambda: nl.empty_like(sb(2, 3), buffer=buffer, transpose_axes=axes),
        f"transpose_axes={axes!r} of [2, 3] into {buffer.value}", "allowed are (1, 0)",
        error=ShapeError,
    )  # fmt: skip


# -- device loops ----------------------------------------------------------------------------------


def copied(source, target, index):
    """Move the element that the register `index` names."""
    held = nl.ndarray((1, 1), nl.float32, buffer=SBUF)
    nisa.dma_copy(dst=held, src=source.ap([[1, 1], [1, 1]], scalar_offset=index, indirect_dim=1))
    nisa.dma_copy(dst=target.ap([[1, 1], [1, 1]], scalar_offset=index, indirect_dim=1), src=held)


@pytest.mark.parametrize(("bounds", "moved"), [((4,), [0, 1, 2, 3]), ((1, 4), [1, 2, 3]),
                                               ((0, 6, 2), [0, 2, 4]), ((3, 3), [])])  # fmt: skip
def test_dynamic_range_counts_like_range(bounds, moved):
    def kernel(x):
        out = nl.zeros((1, 6), nl.float32, buffer=HBM)
        for index in nl.dynamic_range(*bounds):
            copied(x, out, index)
        return out

    x = np.arange(1, 7, dtype=F32).reshape(1, 6)
    found = launch(kernel, (x,), target="toy")
    want = np.zeros((1, 6), F32)
    want[0, moved] = x[0, moved]
    same(found.outputs[0], want)
    inside = [e.loop for e in found.trace if e.loop]
    assert {path[0][1] for path in inside} == set(range(len(moved)))


def test_dynamic_range_takes_registers():
    seen = []

    def kernel():
        end = nisa.register_alloc(3)
        for index in nl.dynamic_range(1, end):
            seen.append(index.read())
            with pytest.raises(TypeError):
                int(index)
            refusal = pytest.raises(RuleViolation, match="index of a device loop")
            with refusal:
                nisa.register_move(index, 0)

    launch(kernel, target="toy")
    assert seen == [1, 2]


def test_a_loop_left_early_is_left():
    def kernel():
        for _ in nl.dynamic_range(5):
            break
        nl.zeros((1, 1), nl.float32)

    assert [e.loop for e in traced(kernel).trace] == [((1, 0),), ()]


@pytest.mark.parametrize("bounds", [(0, 3, 0), (0, 3, True), (0, 3, -1)])
def test_dynamic_range_steps_forward(bounds):
    refused(lambda: nl.dynamic_range(*bounds), "nl.dynamic_range: step=", "a positive int",
            error=KernelError)  # fmt: skip


@pytest.mark.parametrize(("bounds", "says"), [((1.5,), "stop=1.5"), ((None, 3), "start=None")])
def test_dynamic_range_bounds_are_ints_or_registers(bounds, says):
    refused(lambda: nl.dynamic_range(*bounds), f"nl.dynamic_range: {says}", "an int or a register",
            error=KernelError)  # fmt: skip


# -- ordered blocks --------------------------------------------------------------------------------

LOOPS = {
    "fori_loop": lambda: nl.fori_loop(0, 2, lambda i: None),
    "while_loop": lambda: nl.while_loop(nisa.register_alloc(0), lambda r: r),
    "dynamic_range": lambda: nl.dynamic_range(2),
}


@pytest.mark.parametrize("name", LOOPS)
def test_no_device_loop_in_an_ordered_block(name):
    def illegal():
        with nl.no_reorder():
            LOOPS[name]()

    refused(illegal, f"nl.{name} inside nl.no_reorder", "loop's body", error=KernelError)

    def outside():
        with nl.no_reorder():
            nl.zeros((1, 1), nl.float32)
        LOOPS[name]()

    traced(outside)


def test_an_ordered_block_in_a_loop_body():
    def body(index):
        with nl.no_reorder():
            for _ in range(2):
                nl.zeros((1, 1), nl.float32)

    found = traced(lambda: nl.fori_loop(0, 2, body))
    assert [e.opcode for e in found.trace].count("memset") == 4


def test_an_error_leaves_the_block():
    def kernel():
        with pytest.raises(ZeroDivisionError), nl.no_reorder():
            raise ZeroDivisionError
        nl.fori_loop(0, 1, lambda i: None)

    traced(kernel)


def test_ordered_blocks_need_a_kernel():
    with pytest.raises(KernelError, match=r"nl\.no_reorder outside a kernel"), nl.no_reorder():
        pass


# -- printing --------------------------------------------------------------------------------------


def test_device_print_takes_a_string_and_a_tensor():
    refused(lambda: nl.device_print(sb(1, 1), "x"), "print_prefix=<NkiTensor", "must be a string")
    refused(lambda: nl.device_print("x", 3), "tensor=3", "in SBUF or HBM")
    refused(lambda: nl.device_print("x", ps(1, 1)), "in psum", "tensor_copy")


def test_device_print_of_hbm(capsys):
    launch(lambda x: nl.device_print("x:", x), (np.array([[7]], np.int32),), target="toy")
    assert "[[7]]" in capsys.readouterr().out


# -- objects kernels carry -------------------------------------------------------------------------


class Plain(nl.NKIObject):
    size: int
    limit: ClassVar[int] = 3
    step = 2


@dataclass
class Config(nl.NKIObject):
    size: int
    width: int = 4
    extra: int

    def doubled(self):
        return 2 * self.size


def test_fields_without_a_value_are_none():
    assert (Plain().size, Plain().step, Plain.limit) == (None, 2, 3)
    assert (Plain(size=5, step=1).size, Plain(size=5, step=1).step) == (5, 1)
    config = Config(size=3)
    assert (config.width, config.extra, config.doubled()) == (4, None, 6)


@dataclass
class Unannotated(nl.NKIObject):
    """As AWS's attention kernel has one."""

    at = None
    size: int
    kept = 3

    def moved(self):
        return self.at + self.kept


def test_a_plain_attribute_is_a_field_of_a_dataclass_as_well():
    given = Unannotated(at=2, size=5)
    assert (given.at, given.size, given.kept, given.moved()) == (2, 5, 3, 5)
    assert Unannotated() == Unannotated(at=None, size=None, kept=3)
    with pytest.raises(TypeError, match="moved"):
        Unannotated(moved=1)


def test_what_is_no_field_is_refused():
    with pytest.raises(TypeError, match="Plain\\(\\) has no field 'sise'"):
        Plain(sise=1)


def test_post_init_follows():
    class Derived(nl.NKIObject):
        size: int
        twice: int

        def __post_init__(self):
            self.twice = 2 * self.size

    assert Derived(size=4).twice == 8


def test_objects_reach_the_kernel():
    def kernel(x, config):
        return back(nl.add(tile(x), config.size))

    same(launch(kernel, (np.ones((1, 1), F32), Config(size=2)), target="toy").outputs[0],
         np.full((1, 1), 3, F32))  # fmt: skip


# -- annotations -----------------------------------------------------------------------------------


def test_annotations_state_shapes():
    assert repr(nt.tensor) == "nt.tensor"
    assert repr(nt.tensor[128, 512]) == "nt.tensor[128, 512]"
    assert nt.tensor[3].shape == (3,)
    assert nt.tensor[[2, 3]].shape == (2, 3)


@pytest.mark.parametrize("shape", ["rows", (128, None), (0, 2), (2.0, 2), (), (True, "x")])
def test_annotations_that_are_no_shapes(shape):
    with pytest.raises(ShapeError, match="a shape is one or more positive ints"):
        nt.tensor[shape]
