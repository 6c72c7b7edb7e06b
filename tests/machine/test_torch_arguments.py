"""CPU torch tensors as arguments and results of a kernel."""

from __future__ import annotations

import ml_dtypes
import nki
import nki.isa as nisa
import numpy as np
import pytest

torch = pytest.importorskip("torch")

from nki_kernels.machine.errors import DtypeError, KernelError, ShapeError
from nki_kernels.machine.launch import launch
from tests.machine.kernels import counted, double, hbm, loaded, sbuf, stored

pytestmark = pytest.mark.usefixtures("toy")

DTYPES = [
    "float32", "float16", "bfloat16", "float8_e5m2", "float8_e4m3fn", "int8", "uint8", "int16",
    "uint16", "int32", "uint32", "bool",
]  # fmt: skip


@nki.jit
def copy(x):
    return stored(loaded(x))


@nki.jit
def zero_first_row(x):
    tile = sbuf(1, x.shape[1], dtype=x.dtype)
    nisa.memset(tile, 0)
    nisa.dma_copy(dst=x[0:1], src=tile)


def tensor(name, *shape):
    return torch.arange(int(np.prod(shape))).reshape(shape).to(getattr(torch, name))


def equal(a, b):
    return torch.equal(a.to(torch.float32), b.to(torch.float32))


@pytest.mark.parametrize("name", DTYPES)
def test_torch_in_torch_out(name):
    given = tensor(name, 3, 4)
    result = copy(given)
    assert isinstance(result, torch.Tensor)
    assert result.dtype == given.dtype
    assert equal(result, given)
    result[0] = 0  # its own memory
    assert equal(given, tensor(name, 3, 4))


@pytest.mark.parametrize("name", DTYPES)
def test_torch_arguments_are_written_in_place(name):
    given = tensor(name, 3, 4)
    strided = tensor(name, 4, 6)[::2]
    for value in (given, strided):
        want = value.to(torch.float32)
        want[0] = 0
        assert zero_first_row(value) is None
        assert equal(value, want)


def test_a_transposed_tensor_is_read_in_its_order():
    assert equal(double(tensor("bfloat16", 3, 4).T), 2 * tensor("float32", 3, 4).T)


def test_a_returned_argument_is_the_callers_tensor():
    @nki.jit
    def kernel(x):
        return x, stored(loaded(x))

    given = tensor("bfloat16", 2, 2)
    same, new = kernel(given)
    assert same is given
    assert new is not given


def test_parameters_and_subclasses_are_tensors():
    class Mine(torch.Tensor):
        pass

    parameter = torch.nn.Parameter(torch.ones(1, 2))
    result = double(parameter)
    assert not result.requires_grad
    assert result.tolist() == [[2, 2]]
    assert double(torch.ones(1, 2).as_subclass(Mine)).tolist() == [[2, 2]]


def test_numpy_beside_torch_gives_torch():
    @nki.jit
    def kernel(x, y):
        return stored(loaded(x)), stored(loaded(y))

    for result in kernel(counted(1, 2), tensor("int32", 1, 2)):
        assert isinstance(result, torch.Tensor)


def test_a_failing_kernel_changes_no_tensor():
    given = torch.ones(1, 1)

    def kernel(x):
        zero_first_row(x)
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        launch(kernel, (given,))
    assert given == 1


def test_what_torch_cannot_hold_is_said():
    @nki.jit
    def kernel(x):
        tile = hbm(1, 1, dtype="float8_e4m3")
        nisa.dma_copy(dst=tile, src=loaded(x))
        return tile

    assert kernel(np.ones((1, 1), np.float32)).dtype == ml_dtypes.float8_e4m3
    with pytest.raises(DtypeError, match="float8_e4m3: torch has no such type"):
        kernel(torch.ones(1, 1))


ILLEGAL = [
    (lambda: torch.ones(2, 2, dtype=torch.float64), DtypeError, "dtype dtype('float64')"),
    (lambda: torch.ones(2, 2, dtype=torch.int64), DtypeError, "dtype dtype('int64')"),
    (lambda: torch.ones(()), ShapeError, "shape []"),
    (lambda: torch.ones(2, 0), ShapeError, "shape [2, 0]"),
    (
        lambda: torch.ones(2, 2, device="meta"),
        KernelError,
        "tensor on meta; the embedded NKI takes",
    ),
]


@pytest.mark.parametrize(("make", "error", "says"), ILLEGAL, ids=[i[2] for i in ILLEGAL])
def test_an_illegal_tensor_is_named(make, error, says):
    with pytest.raises(error) as caught:
        double(make())
    assert str(caught.value).startswith(f"kernel 'double', argument 'x': {says}")
