"""From arrays to results: arguments, in-place writes, results, targets, cores, nesting."""

from __future__ import annotations

import logging
from typing import NamedTuple

import ml_dtypes
import nki
import nki.isa as nisa
import nki.language as nl
import numpy as np
import pytest

from nki_kernels.machine import launch as launch_module
from nki_kernels.machine.errors import (
    AbstractValue,
    DoesNotFit,
    DtypeError,
    KernelError,
    ShapeError,
    UninitializedRead,
)
from nki_kernels.machine.launch import launch
from nki_kernels.machine.options import NkiWarning, Options, default_options
from nki_kernels.machine.tensor import Abstract
from tests.machine.kernels import counted, double, hbm, loaded, psum, sbuf, stored

pytestmark = pytest.mark.usefixtures("toy")


@nki.jit
def zero_first_row(x):
    tile = sbuf(1, x.shape[1], dtype=x.dtype)
    nisa.memset(tile, 0)
    nisa.dma_copy(dst=x[0:1], src=tile)


DTYPES = [
    np.float32, np.float16, ml_dtypes.bfloat16, ml_dtypes.float8_e4m3, ml_dtypes.float8_e5m2,
    np.int8, np.uint8, np.int16, np.uint16, np.int32, np.uint32,
]  # fmt: skip


# -- arguments and results -------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: np.dtype(d).name)
def test_numpy_in_numpy_out(dtype):
    array = counted(3, 4, dtype=dtype)
    result = double(array)
    assert type(result) is np.ndarray
    assert result.dtype == array.dtype
    assert np.array_equal(result.astype(np.float32), 2 * array.astype(np.float32))
    assert np.array_equal(array, counted(3, 4, dtype=dtype))


def test_bool_stays_bool():
    @nki.jit
    def copy(x):
        return stored(loaded(x))

    array = np.array([[True, False]])
    assert copy(array).dtype == np.bool_
    assert np.array_equal(copy(array), array)


@pytest.mark.parametrize("order", ["C", "F", "strided"])
def test_any_memory_order_in_and_in_place(order):
    array = np.array(counted(4, 6), order="F" if order == "F" else "C")
    view = array[::2, ::3] if order == "strided" else array
    want = view.copy()
    assert np.array_equal(double(view), 2 * want)
    zero_first_row(view)
    want[0] = 0
    assert np.array_equal(view, want)


def test_keywords_constants_and_sequences_pass():
    seen = []

    @nki.jit
    def kernel(pair, many, *, scale, name=None):
        seen.extend([pair[1].shape, [t.dtype for t in many], scale, name])
        return stored(loaded(pair[0]))

    x, y = counted(2, 2), counted(1, 3, dtype=np.int32)
    assert np.array_equal(kernel((x, y), [y, x], scale=2.5), x)
    assert seen == [(1, 3), [nl.int32, nl.float32], 2.5, None]


class Pair(NamedTuple):
    first: object
    second: object


SHAPES = {
    "tuple": (lambda a, b: (a, b), lambda a, b: (a, b)),
    "list": (lambda a, b: [a, b], lambda a, b: [a, b]),
    "named": (Pair, Pair),
    "nested": (lambda a, b: (a, (b, None)), lambda a, b: (a, (b, None))),
    "twice": (lambda a, b: (a, a), lambda a, b: (a, a)),
}


@pytest.mark.parametrize("name", SHAPES)
def test_results_keep_their_structure(name):
    returned, wanted = SHAPES[name]

    @nki.jit
    def kernel(x):
        tile = loaded(x)
        return returned(stored(tile), stored(tile[0:1]))

    got, want = kernel(counted(2, 3)), wanted(counted(2, 3), counted(2, 3)[0:1])

    def same(a, b):
        assert type(a) is type(b)
        if isinstance(a, (tuple, list)):
            for x, y in zip(a, b, strict=True):
                same(x, y)
        else:
            assert np.array_equal(a, b)

    same(got, want)


ILLEGAL_ARGUMENTS = [
    (np.zeros((2, 2)), DtypeError, "argument 'x': dtype dtype('float64'): not a NeuronCore data"),
    (np.zeros((2, 2), np.int64), DtypeError, "argument 'x': dtype dtype('int64'): not a"),
    (np.zeros((0, 2), np.float32), ShapeError, "argument 'x': shape [0, 2]; a kernel argument has"),
    (np.zeros((), np.float32), ShapeError, "argument 'x': shape []; a kernel argument has dim"),
    (
        (counted(1), np.zeros(0, np.int8)),
        ShapeError,
        "argument 'x[1]': shape [0]; a kernel argument",
    ),
]


@pytest.mark.parametrize(
    ("array", "error", "says"), ILLEGAL_ARGUMENTS, ids=[a[2] for a in ILLEGAL_ARGUMENTS]
)
def test_an_illegal_argument_is_named(array, error, says):
    with pytest.raises(error) as caught:
        double(array)
    assert str(caught.value).startswith(f"kernel 'double', {says}")


def on_chip(x):
    return loaded(x)


def in_psum(x):
    tile = psum(2, 2)
    nisa.memset(tile, 0.0)
    return tile


def private(x):
    result = nl.ndarray((2, 2), nl.float32, buffer=nl.hbm)
    nisa.dma_copy(dst=result, src=x)
    return result


def in_part(x):
    result = hbm(2, 2)
    nisa.dma_copy(dst=result[:, 1:2], src=x[:, 1:2])
    return result


def a_number(x):
    return 3


def a_dict(x):
    return {"x": x}


ILLEGAL_RESULTS = [
    (on_chip, KernelError, "a tile on chip; copy it to an HBM tensor (buffer=nl.shared_hbm)"),
    (in_psum, KernelError, "a tile on chip; copy it to an HBM tensor"),
    (private, KernelError, "in private HBM; outputs are allocated with buffer=nl.shared_hbm"),
    (in_part, UninitializedRead, "has 2 of 4 elements that no instruction wrote (first at [0, 0])"),
    (a_number, KernelError, "returns 3; a kernel returns None, an HBM tensor, or a tuple of them"),
    (a_dict, KernelError, "a kernel returns None, an HBM tensor, or a tuple"),
]


@pytest.mark.parametrize(
    ("kernel", "error", "says"), ILLEGAL_RESULTS, ids=[r[0].__name__ for r in ILLEGAL_RESULTS]
)
def test_an_illegal_result_is_named(kernel, error, says):
    with pytest.raises(error) as caught:
        nki.jit(kernel)(counted(2, 2))
    message = str(caught.value)
    assert message.startswith(f"kernel '{kernel.__name__}'")
    assert says in message


def test_checks_of_results_can_warn_or_be_off():
    with pytest.warns(NkiWarning, match="2 of 4 elements that no instruction wrote"):
        launch(in_part, (counted(2, 2),), options=Options(outputs="warn"))
    result = launch(in_part, (counted(2, 2),), options=Options(outputs="off")).result
    assert result[:, 1].tolist() == [1, 3]


def too_large(x):
    tiles = [sbuf(1, 600) for _ in range(2)]
    for tile in tiles:
        nisa.memset(tile, 0.0)
    for tile in tiles:
        nisa.dma_copy(dst=x, src=tile[:, 0:4])


def test_capacity_is_judged_on_live_tiles():
    array = counted(1, 4) + 1
    with pytest.raises(DoesNotFit):
        launch(too_large, (array,))
    assert array.all()  # nothing was written
    with pytest.warns(NkiWarning):
        assert launch(too_large, (array,), options=Options(capacity="warn")).placement is None
    assert not array.any()
    assert launch(too_large, (array,), options=Options(capacity="off")).placement is None


# -- writes to arguments ---------------------------------------------------------------------------


def test_a_written_argument_changes_the_callers_array():
    array = counted(3, 4)
    assert zero_first_row(array) is None
    assert np.array_equal(array, counted(3, 4) * (np.arange(3) > 0)[:, None])


def test_a_returned_argument_is_the_callers_object():
    @nki.jit
    def kernel(x):
        zero_first_row(x)
        return x, x[1:2], stored(loaded(x))

    array = counted(3, 4)
    first, part, copy = kernel(array)
    assert first is array
    assert part is not array
    assert np.array_equal(part, counted(3, 4)[1:2])
    assert np.array_equal(copy, array)


@pytest.mark.parametrize("kind", [nl.float8_e4m3fn_x4, nl.float8_e5m2_x4, nl.float4_e2m1fn_x4])
@pytest.mark.parametrize("step", [1, 2])
def test_a_packed_argument_is_written_bit_for_bit(kind, step):
    """NumPy carries a packed type as a record of one field."""

    @nki.jit
    def copy(source, target):
        nisa.dma_copy(dst=target, src=source)

    host = kind.host
    words = (np.arange(12, dtype=host).reshape(3, 4) * 5003 + np.iinfo(host).max // 3).astype(host)
    record = np.dtype([(str(kind), host)])
    target = np.zeros((3, 4 * step), record)[:, ::step]
    copy(words.view(record), target)
    assert np.array_equal(target[str(kind)], words)


def test_a_failing_kernel_changes_nothing():
    @nki.jit
    def kernel(x, y):
        zero_first_row(x)
        nisa.tensor_copy(dst=sbuf(1, 1), src=sbuf(1, 1))

    array = counted(3, 4) + 1
    with pytest.raises(UninitializedRead):
        kernel(array, array)
    assert np.array_equal(array, counted(3, 4) + 1)


def test_a_read_only_argument_may_be_read_but_not_written():
    @nki.jit
    def both(x, y):
        zero_first_row(x)
        zero_first_row(y)

    first, frozen = counted(2, 2) + 1, counted(2, 2) + 1
    frozen.flags.writeable = False
    assert np.array_equal(double(frozen), 2 * frozen)
    says = "kernel 'both' writes to argument 'y', but the array is read-only; pass a writable copy"
    with pytest.raises(KernelError, match=says):
        both(first, frozen)
    assert first.all()


# -- arguments without values ----------------------------------------------------------------------


def pipeline(a, b):
    """Two dtypes, PSUM, a view, a write to an argument."""
    left, right = loaded(a), loaded(b)
    product = psum(4, 6)
    nisa.nc_matmul(product, left, right)
    nisa.nc_matmul(product[:, 0:3], left, right[:, 3:6], accumulate=True)
    result = sbuf(4, 6)
    nisa.activation(result, nl.exp, product, scale=0.5)
    nisa.dma_copy(dst=b[0:4], src=result)
    return stored(result)


def test_shapes_alone_give_the_same_trace_and_the_same_time():
    a, b = counted(5, 4) / 32, counted(5, 6) / 32
    full = launch(pipeline, (a, b))
    bare = launch(pipeline, (Abstract((5, 4), nl.float32), Abstract((5, 6), nl.float32)))
    assert isinstance(bare.result, Abstract)
    assert (bare.result.shape, bare.result.dtype) == ((4, 6), nl.float32)
    assert bare.outputs == (None,)
    assert repr(bare.result) == "Abstract([4, 6], float32)"

    def facts(done):
        def access(x):
            return (x.tile.id, x.tile.role, *x[1:])

        def fields(e):
            accesses = [[access(x) for x in side] for side in (e.reads, e.writes)]
            return (e.opcode, e.engine, accesses, e.work, e.hidden_reads, e.hidden_writes, e.loop)

        return [fields(e) for e in done.trace]

    assert facts(full) == facts(bare)
    ours, theirs = full.time(), bare.time()
    assert ours is full.time()
    assert np.array_equal(ours.start, theirs.start)
    assert ours.total_ns == theirs.total_ns > 0


def test_values_are_lost_per_tile():
    def kernel(x, y):
        known, unknown = loaded(x), loaded(y)
        nisa.tensor_tensor(unknown[:, 0:1], known[:, 0:1], known[:, 0:1], nl.add)
        assert str(unknown).endswith("shape only")
        with pytest.raises(AbstractValue, match=r"tensor 't3' .* has a shape but no values"):
            unknown.numpy()
        nisa.tensor_tensor(unknown, known, known, nl.add)  # all of it: values again
        assert np.array_equal(unknown.numpy(), 2 * counted(2, 2))
        return stored(known), stored(unknown), y

    bare = Abstract((2, 2), "float32")
    known, unknown, same = launch(kernel, (counted(2, 2), bare)).result
    assert np.array_equal(known, counted(2, 2))
    assert np.array_equal(unknown, 2 * counted(2, 2))
    assert same is bare


@pytest.mark.parametrize("use", [bool, int, float, lambda t: [0][t]])
def test_a_tile_cannot_steer_python(use):
    with pytest.raises(AbstractValue, match="needs the tile's values while the kernel is being"):
        launch(lambda x: use(loaded(x)), (counted(1, 1),))


# -- targets, cores, environment -------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "generation"), [("trn1", 2), ("gen3", 3), ("trn3", 4), ("toy", 3)]
)
def test_the_environment_names_the_target(monkeypatch, name, generation):
    monkeypatch.setenv("NEURON_PLATFORM_TARGET_OVERRIDE", name)
    seen = []

    @nki.jit
    def kernel():
        seen.extend([nisa.get_nc_version(), nisa.get_nc_sub_version(), nl.tile_size.pmax])

    kernel()
    assert seen == [generation, 0, 8 if name == "toy" else 128]


def test_without_a_target_trn2_is_said_once(monkeypatch, caplog):
    monkeypatch.delenv("NEURON_PLATFORM_TARGET_OVERRIDE")
    monkeypatch.setattr(launch_module, "_said", set())
    with caplog.at_level(logging.WARNING, "nki"):
        for _ in range(2):
            assert launch(lambda: None).trace.spec.name == "trn2"
    (record,) = caplog.records
    says = "NEURON_PLATFORM_TARGET_OVERRIDE is not set: kernels run for trn2 (AWS's own"
    assert record.getMessage().startswith(says)


def test_an_unknown_target_lists_the_known_ones():
    with pytest.raises(ValueError, match="target 'trn9': unknown; allowed are trn1"):
        launch(lambda: None, target="trn9")


@nki.jit
def who(x):
    """Each core writes its number to its half of the output."""
    half = x.shape[1] // nl.num_programs(0)
    result = hbm(1, x.shape[1])
    tile = sbuf(1, half)
    nisa.memset(tile, float(nl.program_id(0)) + 10 * nl.program_ndim())
    start = nl.program_id(0) * half
    nisa.dma_copy(dst=result[:, start : start + half], src=tile)
    return result


def test_the_bracket_is_the_number_of_cores():
    array = counted(1, 4)
    assert who(array).tolist() == [[0, 0, 0, 0]]
    assert who[1](array).tolist() == [[10, 10, 10, 10]]
    assert who[2](array).tolist() == [[10, 10, 11, 11]]
    assert who[(2,)](array).tolist() == [[10, 10, 11, 11]]
    assert nki.simulate(who[2])(array).tolist() == [[10, 10, 11, 11]]
    assert [e.core for e in launch(who[2], (array,)).trace] == [0, 0, 1, 1]


@pytest.mark.parametrize("bracket", [0, 3, 8, True, "2", (1, 2), None])
def test_another_bracket_is_refused(bracket):
    with pytest.raises(KernelError) as caught:
        who[bracket]
    assert str(caught.value) == (
        f"kernel 'who'[{bracket!r}]: the bracket is the number of cores, 1 or 2"
    )


@pytest.mark.parametrize("lnc", [0, 3, -1, True, "2", 2.0])
def test_a_launch_has_one_or_two_cores(lnc):
    with pytest.raises(KernelError) as caught:
        launch(who, (counted(1, 4),), lnc=lnc)
    assert str(caught.value).startswith(f"launch: lnc={lnc!r}; a launch has 1 or 2 cores: pass")


@pytest.mark.parametrize("shape", [5, "ab", (2.5, 4), (True, 4)])
def test_the_shape_of_an_abstract_argument_is_whole_numbers(shape):
    with pytest.raises(ShapeError) as caught:
        Abstract(shape, "float32")
    assert f"Abstract: shape={shape!r}; it must be a tuple of positive int" in str(caught.value)


def test_the_environment_sets_the_cores(monkeypatch):
    monkeypatch.setenv("NEURON_LOGICAL_NC_CONFIG", "2")
    assert who(counted(1, 4)).tolist() == [[0, 0, 1, 1]]
    monkeypatch.setenv("NEURON_LOGICAL_NC_CONFIG", "4")
    with pytest.raises(KernelError, match="NEURON_LOGICAL_NC_CONFIG='4'; allowed are 1 and 2"):
        who(counted(1, 4))


def test_cores_must_allocate_the_same_shared_tensors():
    @nki.jit
    def kernel():
        hbm(1, 1 + nl.program_id(0))

    says = r"core 1 allocates shared tensor 0 as \[1, 2\] float32, core 0 as \[1, 1\] float32"
    with pytest.raises(KernelError, match=says):
        kernel[2]()


@pytest.mark.parametrize("function", [nl.program_id, nl.num_programs])
def test_grids_have_one_axis(function):
    with pytest.raises(KernelError, match="axis 1; grids have one axis, 0"):
        launch(lambda: function(1))


def test_precise_fp_keeps_narrow_floats_wide(monkeypatch):
    """(1 + 2^-9) - 1 is lost in bfloat16 and kept in float32."""

    @nki.jit
    def kernel(x):
        tile = loaded(x)
        nisa.tensor_scalar(tile, tile, nl.add, 2.0**-9)
        nisa.tensor_scalar(tile, tile, nl.subtract, 1.0)
        return stored(tile)

    one = np.ones((1, 1), ml_dtypes.bfloat16)
    assert kernel(one) == 0
    monkeypatch.setenv("NKI_PRECISE_FP", "0")
    assert not default_options().precise_fp
    assert kernel(one) == 2.0**-9
    assert kernel(one).dtype == one.dtype
    array = np.array([[1, 2], [3, 4]], ml_dtypes.bfloat16)
    zero_first_row(array)
    assert array.tolist() == [[0, 0], [3, 4]]
    monkeypatch.setenv("NKI_PRECISE_FP", "yes")
    with pytest.raises(ValueError, match="NKI_PRECISE_FP is 'yes'; allowed: 0, 1; set one"):
        kernel(one)


def test_options_refuse_unknown_levels():
    with pytest.raises(ValueError, match="capacity='loud'; allowed are error, warn, off"):
        Options(capacity="loud")
