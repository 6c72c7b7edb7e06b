"""linear and linear_backward in PyTorch: formula, kernel and gradients."""

from __future__ import annotations

import pytest

torch = pytest.importorskip("torch")

import reference.matmul as references
from nki_kernels.operators import OPERATORS
from nki_kernels.torch_ops import counters, linear, linear_backward
from tests.strategies.matrices import small_integers
from tests.tolerance import assert_close
from tests.torch_ops.support import DTYPES, SHAPE, TOY, array, same_bits, tensor

FORWARD, BACKWARD = OPERATORS["linear"], OPERATORS["linear_backward"]


def integers(dtype, shape, seed=0):
    return tensor(shape, dtype, seed, lambda *where: small_integers(*where, most=4))


def normals(dtype, shape, seed=0):
    return tensor(shape, dtype, seed)


def inputs(dtype, sizes=SHAPE, make=normals):
    m, n, k = sizes
    shapes = FORWARD.input_shapes({"M": m, "N": n, "K": k})
    return [make(dtype, shape, seed) for seed, shape in enumerate(shapes)]


def compare(op, got, refs, axes):
    chain = op.chain(axes, TOY)
    for result, ref in zip(got, refs, strict=True):
        keywords = {"op": op.name, "case": "torch", "roundings": op.roundings, "chain": chain}
        assert_close(array(result), ref.value, ref.magnitude, **keywords)


@pytest.mark.parametrize("backend", ["simulator", "torch"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("extras", [(True, True), (True, False), (False, False)])
def test_the_value_is_that_of_the_reference(backend, dtype, extras):
    x, weight, *rest = inputs(DTYPES[dtype])
    rest = [value if used else None for value, used in zip(rest, extras, strict=True)]
    got = linear(x, weight, *rest, backend=backend)
    given = [None if value is None else array(value) for value in (x, weight, *rest)]
    axes = dict(zip("MNK", SHAPE, strict=True))
    compare(FORWARD, [got], [references.linear(*given)], axes)
    assert counters()["linear", backend] == 1


@pytest.mark.parametrize("backend", ["simulator", "torch"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_the_gradients_are_those_of_the_reference_in_one_kernel(backend, dtype):
    given = [value.requires_grad_() for value in inputs(DTYPES[dtype])]
    y = linear(*given, backend=backend)
    dy = tensor(y.shape, y.dtype, 7)
    *got, residual = torch.autograd.grad(y, given, dy)
    refs = references.linear_backward(array(dy), array(given[0]), array(given[1]))
    compare(BACKWARD, got, refs, dict(zip("MNK", SHAPE, strict=True)))
    assert same_bits(residual, dy)
    assert counters() == {("linear", backend): 1, ("linear_backward", backend): 1}


def test_the_gradient_is_that_of_the_float64_formula():
    given = [value.requires_grad_() for value in inputs(torch.float64, (5, 4, 3), integers)]
    # Linear in each input, and exact with integers and a step of 2^-6: nothing to allow for.
    exact = {"eps": 2.0**-6, "atol": 0, "rtol": 0}
    assert torch.autograd.gradcheck(linear, given, **exact)
    dy = integers(torch.float64, (5, 4), 9).requires_grad_()
    assert torch.autograd.gradcheck(linear_backward, (dy, *given[:2]), **exact)
    assert torch.autograd.gradgradcheck(linear, given, dy, **exact)


@pytest.mark.parametrize("out_dtype", DTYPES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_gradients_are_exact_on_integers_for_every_output_dtype(dtype, out_dtype):
    given = [x.requires_grad_() for x in inputs(DTYPES[dtype], (9, 7, 8), integers)]
    y = linear(*given, out_dtype=DTYPES[out_dtype], backend="simulator")
    dy = integers(y.dtype, y.shape, 2)
    dx, dweight, dbias, residual = torch.autograd.grad(y, given, dy)
    x, weight, *_ = given
    assert same_bits(dx, (dy.double() @ weight.double()).to(x.dtype))
    assert same_bits(dweight, (dy.double().t() @ x.double()).to(x.dtype))
    assert same_bits(dbias, dy.double().sum(0).to(x.dtype))
    assert same_bits(residual, dy.to(x.dtype))


@pytest.mark.parametrize("needed", range(4))
def test_only_what_is_needed_is_returned(needed):
    given = inputs(torch.float32, (5, 4, 3))
    given[needed].requires_grad_()
    linear(*given, backend="simulator").sum().backward()
    assert [value.grad is not None for value in given] == [at == needed for at in range(4)]
    assert counters()["linear_backward", "simulator"] == (needed < 3)


def test_two_dtypes_are_refused_as_pytorch_does():
    x, weight, *_ = inputs(torch.float32)
    with pytest.raises(RuntimeError, match="same dtype"):
        linear(x, weight.half())
