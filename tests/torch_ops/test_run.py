"""Values of the ops on each backend, and the proof of what computed them."""

from __future__ import annotations

import pytest

torch = pytest.importorskip("torch")

import nki.isa as nisa
from hypothesis import given
from hypothesis import strategies as st

from nki_kernels import ops
from nki_kernels.torch_ops import counters, matmul, reset_counters, simulator
from tests.strategies.matrices import extents, seeds, small_integers
from tests.torch_ops.support import (
    DTYPES,
    SHAPE,
    TOY,
    array,
    compare,
    operands,
    products,
    same_bits,
    tensor,
)

# -- values ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_simulator_gives_the_bits_of_the_numpy_call(dtype):
    a, b = operands(DTYPES[dtype])
    got = matmul(a, b, backend="simulator")
    assert array(got).tobytes() == ops.matmul(array(a), array(b)).tobytes()
    assert counters() == {("matmul", "simulator"): 1}
    compare(got, a, b, dtype)


@pytest.mark.parametrize("dtype", DTYPES)
def test_plain_torch_is_the_default_on_a_cpu(dtype):
    a, b = operands(DTYPES[dtype])
    got = matmul(a, b)
    assert counters() == {("matmul", "torch"): 1}
    assert same_bits(got, a @ b)
    compare(got, a, b, dtype, chain=1 + a.shape[1])


@pytest.mark.parametrize("backend", ["simulator", "torch"])
@pytest.mark.parametrize("out_dtype", DTYPES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_the_result_is_rounded_once_to_the_output_dtype(dtype, out_dtype, backend):
    # The sums are exact in float32 and not in the 2-byte types; float32 holds 257, bfloat16 not.
    a, b = operands(
        DTYPES[dtype], seed=3, make=lambda *where: small_integers(*where, most=3)
    )  # fmt: skip
    a = a * 257
    got = matmul(a, b, out_dtype=DTYPES[out_dtype], backend=backend)
    assert same_bits(got, (a.double() @ b.double()).to(DTYPES[out_dtype]))


sizes = {
    "m": extents(TOY.stationary_fmax, TOY.stationary_fmax + 3),
    "n": extents(TOY.moving_fmax, TOY.moving_fmax + 3),
    "k": extents(TOY.partitions, 2 * TOY.partitions + 3),
}


@given(dtype=st.sampled_from(list(DTYPES)), seed=seeds(), flip=st.booleans(), **sizes)
def test_any_shape_and_layout_matches_the_reference(m, n, k, dtype, seed, flip):
    a, b = operands(DTYPES[dtype], (m, n, k), seed)
    if flip:
        a, b = a.t().contiguous().t(), b.t().contiguous().t()
    compare(matmul(a, b, backend="simulator"), a, b, f"{m}x{n}x{k}")


def test_float64_goes_to_plain_torch():
    a, b = operands(torch.float64)
    assert same_bits(matmul(a, b), a @ b)
    assert counters() == {("matmul", "torch"): 1}


def test_mixed_dtypes_are_refused_whatever_the_output():
    a, b = operands(torch.float32)
    for out_dtype in (None, torch.float32, torch.bfloat16):
        with pytest.raises(RuntimeError, match="same dtype"):
            matmul(a, b.half(), out_dtype=out_dtype)
    assert not counters()


# -- empties, strides, aliases ---------------------------------------------------------------------


@pytest.mark.parametrize("backend", [None, "simulator", "torch"])
@pytest.mark.parametrize("shape", [(0, 3, 4), (3, 0, 4), (3, 4, 0), (0, 0, 0)])
def test_empties_give_the_right_shape_without_a_kernel(shape, backend):
    m, n, k = shape
    a, b = torch.ones(m, k, requires_grad=True), torch.ones(k, n, requires_grad=True)
    got = matmul(a, b, backend=backend)
    assert same_bits(got, torch.zeros(m, n))
    got.sum().backward()
    assert same_bits(a.grad, torch.zeros(m, k) if n == 0 else torch.ones(m, k) * n)
    assert (a.grad.shape, b.grad.shape) == (a.shape, b.shape)
    assert set(products(counters())) == {"empty"}


@pytest.mark.parametrize("backend", ["simulator", "torch"])
def test_empties_that_do_not_fit_are_refused(backend):
    with pytest.raises(RuntimeError, match="cannot be multiplied"):
        matmul(torch.ones(0, 3), torch.ones(4, 5), backend=backend)
    assert not counters()


def _transposed(x):
    return x.t().contiguous().t()


def _every_second(x):
    return torch.stack([x, x + 1], dim=1).flatten(0, 1)[::2]


def _offset(x):
    wide = torch.zeros(x.shape[0], x.shape[1] + 2, dtype=x.dtype)
    wide[:, 1:-1] = x
    return wide[:, 1:-1]


@pytest.mark.parametrize("layout", [_transposed, _every_second, _offset])
@pytest.mark.parametrize("dtype", DTYPES)
def test_strided_inputs_are_copied_for_the_kernel_and_counted(dtype, layout):
    a, b = operands(DTYPES[dtype])
    want = matmul(a, b, backend="simulator")
    assert counters()["matmul", "copy"] == 0
    strided = layout(a)
    assert not strided.is_contiguous()
    assert same_bits(matmul(strided, b, backend="simulator"), want)
    assert counters()["matmul", "copy"] == 1
    assert same_bits(matmul(strided, layout(b), backend="simulator"), want)
    assert counters()["matmul", "copy"] == 3
    assert same_bits(strided, a)


def test_the_kernel_backend_is_given_dense_tensors(monkeypatch):
    a, b = operands(torch.float32)
    given = []

    def run(row, inputs, options):
        given.extend(inputs)
        return (torch.mm(*inputs),)

    monkeypatch.setattr(simulator, "run", run)
    matmul(_transposed(a), _offset(b), backend="simulator")
    assert all(x.is_contiguous() for x in given)
    assert same_bits(given[0], a)
    assert same_bits(given[1], b)
    # What is dense already is handed over as it is.
    given.clear()
    matmul(a, b, backend="simulator")
    assert [x.data_ptr() for x in given] == [a.data_ptr(), b.data_ptr()]


def test_plain_torch_takes_strides_as_they_are():
    a, b = operands(torch.float32)
    got = matmul(_transposed(a), _transposed(b))
    assert got.is_contiguous()
    assert counters() == {("matmul", "torch"): 1}


def test_an_expanded_input_is_copied():
    a, b = operands(torch.float32)
    row = a[:1].expand(5, -1)
    got = matmul(row, b, backend="simulator")
    assert same_bits(got, matmul(a[:1].repeat(5, 1), b, backend="simulator"))
    assert counters()["matmul", "copy"] == 1


def test_a_lazily_negated_input_is_negated():
    x = torch.complex(tensor((9, 4), torch.float32), tensor((9, 4), torch.float32, 1))
    negated = x.conj().imag
    assert negated.is_neg()
    eye = torch.eye(4)
    assert same_bits(matmul(negated, eye, backend="simulator"), -x.imag.contiguous())


@pytest.mark.parametrize("backend", ["simulator", "torch"])
def test_the_inputs_stay_as_they_were_and_the_result_is_new(backend):
    a, b = operands(torch.float32)
    before = a.clone(), b.clone()
    first, second = matmul(a, b, backend=backend), matmul(a, b, backend=backend)
    assert same_bits(a, before[0])
    assert same_bits(b, before[1])
    assert len({x.untyped_storage().data_ptr() for x in (a, b, first, second)}) == 4
    first.add_(1)
    assert same_bits(second, matmul(a, b, backend=backend))


# -- the kernel really runs ------------------------------------------------------------------------


def test_nki_simulator_runs_the_kernel(monkeypatch):
    a, b = operands(torch.bfloat16)
    monkeypatch.setenv("NKI_SIMULATOR", "1")
    reset_counters()
    compare(matmul(a, b), a, b, "NKI_SIMULATOR=1")
    assert counters() == {("matmul", "simulator"): 1}


def never_accumulate(real, dst, stationary, moving, **keywords):
    return real(dst, stationary, moving, **{**keywords, "accumulate": False})


def drop_a_contraction_row(real, dst, stationary, moving, **keywords):
    rows = max(1, stationary.shape[0] - 1)
    return real(dst, stationary[0:rows], moving[0:rows], **keywords)


def multiply_the_first_row_twice(real, dst, stationary, moving, **keywords):
    real(dst, stationary, moving, **keywords)
    return real(dst, stationary[0:1], moving[0:1], **{**keywords, "accumulate": True})


MUTANTS = [never_accumulate, drop_a_contraction_row, multiply_the_first_row_twice]


@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda f: f.__name__)
def test_a_mutated_kernel_turns_results_and_gradients_wrong(mutant, monkeypatch):
    a, b = operands(torch.float32)
    a.requires_grad_()
    real = nisa.nc_matmul
    monkeypatch.setattr(nisa, "nc_matmul", lambda *args, **kw: mutant(real, *args, **kw))
    got = matmul(a, b, backend="simulator")
    with pytest.raises(AssertionError, match="worst at"):
        compare(got, a, b, mutant.__name__)
    (grad,) = torch.autograd.grad(got, a, torch.ones_like(got))
    with pytest.raises(AssertionError, match="worst at"):
        compare(grad, torch.ones_like(got), b.t(), mutant.__name__)
    compare(matmul(a, b), a, b, "plain torch", chain=1 + SHAPE[2])


def test_a_kernel_that_raises_is_not_replaced(monkeypatch):
    def broken(*args, **keywords):
        raise ValueError("broken kernel")

    monkeypatch.setattr(nisa, "nc_matmul", broken)
    monkeypatch.setenv("NKI_SIMULATOR", "1")
    with pytest.raises(ValueError, match="broken kernel"):
        matmul(*operands(torch.float32))
    assert not counters()
