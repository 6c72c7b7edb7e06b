"""Gradients: the closed form, on the backend of the forward pass."""

from __future__ import annotations

import pytest

torch = pytest.importorskip("torch")

from nki_kernels.torch_ops import counters, matmul, use
from tests.strategies.matrices import small_integers
from tests.torch_ops.support import (
    DTYPES,
    SHAPE,
    array,
    compare,
    operands,
    products,
    same_bits,
    tensor,
)


def integers(dtype, shape, seed=0):
    return tensor(shape, dtype, seed, lambda *where: small_integers(*where, most=4))


@pytest.mark.parametrize("layout", ["dense", "strided"])
def test_the_gradient_is_that_of_the_float64_formula(layout):
    a, b = integers(torch.float64, (5, 3)), integers(torch.float64, (3, 4), 1)
    if layout == "strided":
        a, b = a.t().contiguous().t(), b.t().contiguous().t()
    a.requires_grad_()
    b.requires_grad_()
    # The product is linear in each input, and with integers and a step of 2^-6 every value is
    # exact, so the central difference has no error to allow for.
    exact = {"eps": 2.0**-6, "atol": 0, "rtol": 0}
    assert torch.autograd.gradcheck(matmul, (a, b), **exact)
    dc = integers(torch.float64, (5, 4), 2).requires_grad_()
    assert torch.autograd.gradgradcheck(matmul, (a, b), dc, **exact)
    assert set(products(counters())) == {"torch"}


@pytest.mark.parametrize("dtype", DTYPES)
def test_gradients_of_the_kernel_match_the_reference(dtype):
    a, b = operands(DTYPES[dtype])
    a.requires_grad_()
    b.requires_grad_()
    c = matmul(a, b, backend="simulator")
    dc = tensor(c.shape, c.dtype, 7)
    da, db = torch.autograd.grad(c, (a, b), dc)
    assert (da.dtype, db.dtype) == (a.dtype, b.dtype)
    compare(da, dc, b.t(), "dA")
    compare(db, a.t(), dc, "dB")
    # Each gradient takes B and A as they are stored: nothing is copied.
    ran = {(name, "simulator"): 1 for name in ("matmul", "matmul_nt", "matmul_tn")}
    assert counters() == ran


@pytest.mark.parametrize("backend", ["simulator", "torch"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("out_dtype", DTYPES)
def test_gradients_are_exact_on_integers_for_every_output_dtype(dtype, out_dtype, backend):
    a = integers(DTYPES[dtype], (9, 8)).requires_grad_()
    b = integers(DTYPES[dtype], (8, 7), 1).requires_grad_()
    c = matmul(a, b, out_dtype=DTYPES[out_dtype], backend=backend)
    # Not a bfloat16 number, times a small integer: rounding dC to the inputs' dtype would show.
    dc = 257 * integers(c.dtype, c.shape, 2)
    da, db = torch.autograd.grad(c, (a, b), dc)
    assert same_bits(da, (dc.double() @ b.double().t()).to(a.dtype))
    assert same_bits(db, (a.double().t() @ dc.double()).to(b.dtype))
    assert set(products(counters())) == {backend}


@pytest.mark.parametrize(("grad_a", "grad_b", "runs"), [(1, 0, 2), (0, 1, 2), (0, 0, 1)])
def test_only_the_gradients_that_are_needed_are_computed(grad_a, grad_b, runs):
    a, b = operands(torch.float32)
    a.requires_grad_(bool(grad_a))
    b.requires_grad_(bool(grad_b))
    c = matmul(a, b, backend="simulator")
    assert c.requires_grad == bool(grad_a or grad_b)
    if c.requires_grad:
        c.sum().backward()
    assert (a.grad is None, b.grad is None) == (not grad_a, not grad_b)
    assert products(counters()) == {"simulator": runs}


def test_a_backward_pass_asks_for_what_its_forward_pass_asked_for(monkeypatch):
    for way in ("argument", "use", "environment"):
        a, b = (x.requires_grad_() for x in operands(torch.float32))
        before = counters()
        if way == "argument":
            c = matmul(a, b, backend="simulator")
        elif way == "use":
            with use("simulator"):
                c = matmul(a, b)
        else:
            with monkeypatch.context() as patch:
                patch.setenv("NKI_SIMULATOR", "1")
                c = matmul(a, b)
        c.sum().backward()
        assert products(counters() - before) == {"simulator": 3}, way


def test_the_second_derivative_runs_the_kernel_too():
    a, b = (integers(torch.float32, shape).requires_grad_() for shape in ((5, 6), (6, 4)))
    c = matmul(a, b, backend="simulator")
    dc = integers(torch.float32, c.shape, 3).requires_grad_()
    (da,) = torch.autograd.grad(c, a, dc, create_graph=True)
    again = integers(torch.float32, a.shape, 4)
    db, ddc = torch.autograd.grad(da, (b, dc), again)
    assert array(db).tolist() == array(again.t() @ dc).tolist()
    assert array(ddc).tolist() == array(again @ b).tolist()
    assert "torch" not in products(counters())


def test_a_training_step_is_the_one_of_plain_torch():
    x, w = integers(torch.float32, (SHAPE[0], 6)), integers(torch.float32, (6, 5), 1)
    grads = []
    for product in (torch.mm, lambda x, w: matmul(x, w, backend="simulator")):
        weight = torch.nn.Parameter(w.clone())
        product(x, weight).square().sum().backward()
        grads.append(weight.grad)
    assert same_bits(*grads)
