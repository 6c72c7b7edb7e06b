"""The norms in PyTorch: formula, gradient in closed form, and the ops made of them."""

from __future__ import annotations

import numpy as np
import pytest

torch = pytest.importorskip("torch")

from torch.library import opcheck

from nki_kernels.operators import OPERATORS
from nki_kernels.operators.norm import DEFAULT_EPS
from nki_kernels.torch_ops import BackendError, counters, explain, layer_norm, rms_norm, use
from nki_kernels.torch_ops.rows import ROWS
from reference.norm import layer_norm as layer_reference
from reference.norm import rms_norm as rms_reference
from tests.tolerance import assert_close
from tests.torch_ops.support import DTYPES, TOY, array, same_bits, tensor

OPS = {"rms_norm": rms_norm, "layer_norm": layer_norm}
REFERENCES = {"rms_norm": rms_reference, "layer_norm": layer_reference}
ROWS_H = (TOY.partitions + 3, 3 * TOY.partitions + 5)
#: Which parameters are given: weight, bias.
GIVEN = [
    ("rms_norm", ()), ("rms_norm", ("weight",)),
    ("layer_norm", ()), ("layer_norm", ("weight",)), ("layer_norm", ("bias",)),
    ("layer_norm", ("weight", "bias")),
]  # fmt: skip


def inputs(given, dtype, shape=ROWS_H):
    parameters = {name: tensor(shape[1:], dtype, 5 + len(name)) for name in given}
    return tensor(shape, dtype, 3), parameters


def compare(name, got, x, parameters, case, **options):
    operator = OPERATORS[name]
    arrays = {key: array(value) for key, value in parameters.items()}
    ref = REFERENCES[name](array(x), **arrays, **options)
    chain = operator.chain(operator.axes(x.shape, *(None,) * (len(operator.inputs) - 1)), TOY)
    keywords = {"op": name, "roundings": operator.roundings, "chain": chain}
    assert_close(array(got), ref.value, ref.magnitude, case=case, **keywords)


# -- values ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", ["simulator", "torch"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("name", "given"), GIVEN)
def test_values_match_the_reference(name, given, dtype, backend):
    x, parameters = inputs(given, DTYPES[dtype])
    got = OPS[name](x, **parameters, backend=backend)
    assert (got.dtype, got.shape) == (x.dtype, x.shape)
    assert counters() == {(name, backend): 1}
    compare(name, got, x, parameters, f"{given} {dtype}")


@pytest.mark.parametrize("backend", ["simulator", "torch"])
@pytest.mark.parametrize("name", OPS)
def test_eps_and_out_dtype_reach_the_backend(name, backend):
    x, parameters = inputs(("weight",), torch.bfloat16)
    got = OPS[name](x, **parameters, eps=0.25, out_dtype=torch.float32, backend=backend)
    assert got.dtype == torch.float32
    compare(name, got, x, parameters, "eps", eps=0.25)


@pytest.mark.parametrize(("name", "given"), GIVEN)
def test_the_simulator_gives_the_bits_of_the_numpy_call(name, given):
    x, parameters = inputs(given, torch.bfloat16)
    got = OPS[name](x, **parameters, backend="simulator")
    names = [operand.name for operand in OPERATORS[name].inputs[1:]]
    arrays = [array(parameters[key]) if key in given else None for key in names]
    assert array(got).tobytes() == OPERATORS[name].launch((array(x), *arrays), {}).result.tobytes()


@pytest.mark.parametrize("backend", [None, "simulator"])
@pytest.mark.parametrize("shape", [(0, 5), (5, 0), (0, 0)])
@pytest.mark.parametrize("name", OPS)
def test_empties(name, shape, backend):
    x = torch.empty(shape, requires_grad=True)
    weight = torch.ones(shape[1], requires_grad=True)
    got = OPS[name](x, weight, backend=backend)
    assert got.shape == shape
    assert set(counters()) == {(name, "empty")}
    got.sum().backward()
    assert set(counters()) == {(name, "empty"), (f"{name}_backward", "empty")}
    assert x.grad.shape == shape
    assert same_bits(weight.grad, torch.zeros(shape[1]))


@pytest.mark.parametrize("how", ["torch", "simulator", "meta"])
@pytest.mark.parametrize("name", OPS)
def test_every_backend_and_the_fake_refuse_a_wrong_rank(name, how):
    x = torch.ones(2, 3, 4, device="meta" if how == "meta" else "cpu")
    backend = None if how == "meta" else how
    with pytest.raises((ValueError, BackendError), match=r"x has 3 dimensions, shape \[2, 3, 4\]"):
        OPS[name](x, backend=backend)
    assert not explain(name, x, backend=backend).runs
    assert not counters()


# -- gradients -------------------------------------------------------------------------------------


def jacobians(name, x, parameters, eps):
    """Return dy/d(input) of one row [H_out, size], exact to float64: a complex step of 1e-30.

    The formula is analytic, so f(x + ih) = f(x) + ih f'(x) up to h^2, with nothing subtracted.
    """
    values = {"x": x, **parameters}
    found = {}
    for key, value in values.items():
        columns = []
        for i in range(value.size):
            moved = {k: v.astype(np.complex128) for k, v in values.items()}
            moved[key][i] += 1e-30j
            columns.append(_formula(name, eps, **moved).imag / 1e-30)
        found[key] = np.stack(columns, axis=1)
    return found


def assert_close_float64(got, want, magnitude, chain):
    """The error rule where everything is float64: `chain` roundings, one of them the last."""
    assert got.shape == want.shape
    assert (np.abs(got - want) <= chain * np.finfo(np.float64).eps * magnitude).all()


def _formula(name, eps, x, weight=1.0, bias=0.0):
    s = x - np.mean(x) if name == "layer_norm" else x
    return s / np.sqrt(np.mean(s * s) + eps) * weight + bias


@pytest.mark.parametrize(
    ("dtype", "backend"),
    [
        *((dtype, backend) for dtype in DTYPES for backend in ("simulator", "torch")),
        ("float64", "torch"),
    ],
)
@pytest.mark.parametrize(("name", "given"), GIVEN)
def test_gradients_are_those_of_the_float64_formula(name, given, dtype, backend):
    rows, size = 5, 7
    x, parameters = inputs(given, getattr(torch, dtype), (rows, size))
    leaves = {"x": x, **parameters}
    for leaf in leaves.values():
        leaf.requires_grad_()
    y = OPS[name](x, **parameters, eps=0.125, backend=backend)
    dy = tensor((rows, size), y.dtype, 11)
    grads = dict(zip(leaves, torch.autograd.grad(y, list(leaves.values()), dy), strict=True))
    assert counters() == {(name, backend): 1, (f"{name}_backward", backend): 1}
    wide = {key: array(value).astype(np.float64) for key, value in leaves.items()}
    expected = {key: np.zeros(value.shape) for key, value in wide.items()}
    magnitude = {key: np.zeros(value.shape) for key, value in wide.items()}
    for n in range(rows):
        row = {**wide, "x": wide["x"][n]}
        d = array(dy)[n].astype(np.float64)
        for key, jacobian in jacobians(name, row.pop("x"), row, 0.125).items():
            at = n if key == "x" else slice(None)
            expected[key][at] += d @ jacobian
            magnitude[key][at] += np.abs(d) @ np.abs(jacobian)
    for key, grad in grads.items():
        assert grad.dtype == leaves[key].dtype
        # Two row sums, the statistics, the sum over rows, and a dozen products on the way.
        chain = 4 * size + rows + 12
        if dtype == "float64":
            assert_close_float64(array(grad), expected[key], magnitude[key], chain)
        else:
            assert_close(
                array(grad), expected[key], magnitude[key],
                op=name, case=f"d{key} {given} {dtype}", roundings=1, chain=chain,
            )  # fmt: skip


@pytest.mark.parametrize("name", OPS)
def test_only_the_gradients_that_are_needed_are_computed(name):
    for wanted in ("x", "weight"):
        x, parameters = inputs(("weight",), torch.float32)
        leaves = {"x": x, **parameters}
        leaves[wanted].requires_grad_()
        OPS[name](x, **parameters).sum().backward()
        assert [key for key, leaf in leaves.items() if leaf.grad is not None] == [wanted]


@pytest.mark.parametrize(("name", "given"), GIVEN)
def test_gradients_on_the_simulator_have_the_bits_of_the_numpy_call(name, given):
    x, parameters = inputs(given, torch.bfloat16)
    leaves = [x.requires_grad_(), *(value.requires_grad_() for value in parameters.values())]
    y = OPS[name](x, **parameters, backend="simulator")
    dy = tensor(y.shape, torch.bfloat16, 11)
    weight = array(parameters["weight"]) if "weight" in given else None
    run = OPERATORS[f"{name}_backward"].launch((array(dy), array(x), weight), {})
    want = dict(zip(("x", "weight", "bias"), run.result, strict=False))
    for key, grad in zip(("x", *given), torch.autograd.grad(y, leaves, dy), strict=True):
        assert array(grad).tobytes() == want[key].tobytes(), key


@pytest.mark.parametrize("backend", ["simulator", "torch"])
@pytest.mark.parametrize("name", OPS)
def test_a_wider_result_has_its_gradients_rounded_once(name, backend):
    """dy is no bfloat16 number: rounding it to the inputs' dtype, or dx twice, would show."""
    x, parameters = inputs(("weight",), torch.bfloat16)
    leaves = [x.requires_grad_(), parameters["weight"].requires_grad_()]
    y = OPS[name](x, **parameters, out_dtype=torch.float32, backend=backend)
    dy = tensor(y.shape, torch.float32, 11)
    wide = getattr(torch.ops.nki_kernels, f"{name}_backward")(
        dy, x.detach().float(), leaves[1].detach().float(), eps=DEFAULT_EPS[name], backend=backend
    )
    for grad, want in zip(torch.autograd.grad(y, leaves, dy), wide, strict=False):
        assert same_bits(grad, want.to(torch.bfloat16))


def test_parameters_of_another_dtype_have_gradients_of_theirs():
    x, parameters = inputs(("weight", "bias"), torch.bfloat16)
    values = [value.float().requires_grad_() for value in parameters.values()]
    y = layer_norm(x.requires_grad_(), *values)
    grads = torch.autograd.grad(y, [x, *values], tensor(y.shape, y.dtype, 11))
    assert [grad.dtype for grad in grads] == [torch.bfloat16, torch.float32, torch.float32]


@pytest.mark.parametrize("name", OPS)
def test_the_second_derivative_on_the_simulator_is_that_of_the_formula(name):
    results = []
    for backend in ("simulator", "torch"):
        x, parameters = inputs(("weight",), torch.float32, (4, 6))
        y = OPS[name](x.requires_grad_(), **parameters, backend=backend)
        dy = tensor(y.shape, y.dtype, 11).requires_grad_()
        (dx,) = torch.autograd.grad(y, x, dy, create_graph=True)
        results.append(torch.autograd.grad(dx, (x, dy), tensor(y.shape, y.dtype, 12)))
    assert all(same_bits(a, b) for a, b in zip(*results, strict=True))


@pytest.mark.parametrize(("name", "given"), GIVEN)
def test_the_second_derivative_is_that_of_pytorch(name, given):
    rows, size = 3, 5
    x, parameters = inputs(given, torch.float64, (rows, size))
    theirs = getattr(torch.nn.functional, name)
    results = []
    for function in (
        lambda x, **p: OPS[name](x, **p, eps=0.125),
        lambda x, **p: theirs(x, (size,), **p, eps=0.125),
    ):
        leaf = x.clone().requires_grad_()
        y = function(leaf, **parameters)
        (dx,) = torch.autograd.grad(y.sin().sum(), leaf, create_graph=True)
        results.append(torch.autograd.grad(dx.square().sum(), leaf)[0])
    ours, want = (array(result) for result in results)
    # Each element is a sum over the row, twice; the largest stands for the terms that cancel.
    assert_close_float64(ours, want, np.abs(want).max(), 100 * size)


# -- tracing ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", ["simulator", "torch"])
@pytest.mark.parametrize(("name", "given"), GIVEN)
def test_opcheck(name, given, backend):
    x, parameters = inputs(given, torch.float32, (5, 6))
    names = [operand.name for operand in ROWS[name].op.inputs[1:]]
    values = [x.t().contiguous().t().requires_grad_()]
    values += [parameters[key].requires_grad_() if key in given else None for key in names]
    opcheck(getattr(torch.ops.nki_kernels, name).default, tuple(values), {"backend": backend})


@pytest.mark.parametrize("backend", ["simulator", "torch"])
@pytest.mark.parametrize("given", [(), ("weight",)])
@pytest.mark.parametrize("name", OPS)
def test_opcheck_of_the_gradients(name, given, backend):
    x, parameters = inputs(given, torch.float32, (5, 6))
    dy = tensor((5, 6), torch.float32, 11)
    values = (dy.requires_grad_(), x.requires_grad_(), parameters.get("weight"))
    opcheck(
        getattr(torch.ops.nki_kernels, f"{name}_backward").default, values, {"backend": backend}
    )


@pytest.mark.parametrize("name", OPS)
def test_export_with_dynamic_rows(name):
    class Normalize(torch.nn.Module):
        def forward(self, x, weight):
            return OPS[name](x, weight) * 2

    x, parameters = inputs(("weight",), torch.float32)
    dynamic = ({0: torch.export.Dim("rows")}, None)
    program = torch.export.export(Normalize(), (x, parameters["weight"]), dynamic_shapes=dynamic)
    assert not counters()
    for rows in (2, x.shape[0] + 3):
        more = torch.cat([x, x])[:rows]
        with use("simulator"):
            got = program.module()(more, parameters["weight"])
        want = OPS[name](more, parameters["weight"], backend="simulator") * 2
        assert same_bits(got, want)
    assert set(counters()) == {(name, "simulator")}


@pytest.mark.parametrize("name", OPS)
def test_a_compiled_call_and_its_gradients_are_those_of_the_eager_call(name):
    function = torch.compile(
        lambda x, weight: OPS[name](x, weight) * 2, backend="aot_eager", fullgraph=True
    )
    results = []
    for call in (lambda x, weight: OPS[name](x, weight) * 2, function):
        x, parameters = inputs(("weight",), torch.bfloat16)
        x.requires_grad_()
        weight = parameters["weight"].requires_grad_()
        with use("simulator"):
            call(x, weight).float().square().sum().backward()
        results.append((x.grad, weight.grad))
    assert all(same_bits(a, b) for a, b in zip(*results, strict=True))
    assert set(counters()) == {(name, "simulator"), (f"{name}_backward", "simulator")}
