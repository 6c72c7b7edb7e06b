"""What holds for every op, on one small call each: values, fakes, gradients, autocast, vmap."""

from __future__ import annotations

import inspect

import numpy as np
import pytest

torch = pytest.importorskip("torch")

from torch.library import opcheck

from nki_kernels.machine.errors import OptionError
from nki_kernels.torch_ops import counters, functions, stubs
from nki_kernels.torch_ops.arrays import as_arrays
from nki_kernels.torch_ops.rows import ROWS
from tests.tolerance import assert_close
from tests.torch_ops.samples import SAMPLES
from tests.torch_ops.support import TOY, array

CASES = [pytest.param(s, id=f"{s.op}-{i}") for i, s in enumerate(SAMPLES)]
WITH_VALUES = [p for p in CASES if p.values[0].reference is not None]
BARE_ATTENTION = [s for s in SAMPLES if s.op == "attention"][1]
DIFFERENTIABLE = [p for p in CASES if ROWS[p.values[0].op].backward is not None]


def outputs(found):
    return found if isinstance(found, tuple) else () if found is None else (found,)


def given(sample, kind):
    """Return the inputs, one per operand; the last ones may be None."""
    return ROWS[sample.op].complete(sample.make(getattr(torch, kind)))


def op_of(sample):
    return getattr(torch.ops.nki_kernels, sample.op).default


def test_every_op_has_a_sample():
    assert {sample.op for sample in SAMPLES} == set(ROWS)


def test_the_types_of_the_functions_are_written_from_the_schemas():
    assert stubs.STUB.read_text() == stubs.render(), "python -m nki_kernels.torch_ops.stubs"


@pytest.mark.parametrize("name", ROWS)
def test_defaults_of_the_formula_are_those_of_the_schema(name):
    parameters = inspect.signature(ROWS[name].plain).parameters
    for argument in getattr(torch.ops.nki_kernels, name).default._schema.arguments:
        stated = parameters.get(argument.name)
        if argument.kwarg_only and argument.has_default_value() and stated is not None:
            assert stated.default == argument.default_value, argument.name


@pytest.mark.parametrize("backend", ["simulator", "torch"])
@pytest.mark.parametrize("sample", WITH_VALUES)
def test_values_match_the_reference(sample, backend):
    row = ROWS[sample.op]
    for kind in sample.kinds:
        inputs = given(sample, kind)
        found = outputs(getattr(functions, sample.op)(*inputs, **sample.options, backend=backend))
        assert counters()[sample.op, backend] == 1 + sample.kinds.index(kind)
        arrays = as_arrays(row, inputs)
        axes = row.op.axes(
            *(None if x is None else x.shape for x in inputs), options=sample.options
        )
        keywords = {
            "op": sample.op, "roundings": row.op.roundings,
            "chain": max(row.op.chain(axes, TOY), 1), "case": f"{kind} {backend}",
        }  # fmt: skip
        references = sample.reference(*arrays, **sample.options)
        for got, reference in zip(found, references, strict=True):
            assert_close(array(got), reference.value, reference.magnitude, **keywords)


@pytest.mark.parametrize("sample", CASES)
def test_opcheck(sample):
    row = ROWS[sample.op]
    inputs = given(sample, sample.kinds[-1])
    # Its check of gradients adds up the outputs, beginning with the dtype of the first. Gradients
    # of gradients are compared below; tracing them takes minutes.
    traced = row.backward is not None and "_backward" not in sample.op
    if traced and row.op.outputs[0].dtype != "int32":
        inputs = _with_gradients(inputs)
    tests = ["test_autograd_registration", "test_faketensor"]
    if sample is next(s for s in SAMPLES if s.op == sample.op):  # the slow one once an op
        tests.append("test_aot_dispatch_dynamic")
    # The schema check multiplies, which PyTorch has not for fp8.
    if all(x is None or x.dtype.itemsize != 1 for x in inputs):
        tests.append("test_schema")
    opcheck(op_of(sample), tuple(inputs), sample.options, test_utils=tests)


def _with_gradients(inputs):
    """Return leaves; the last two of eight are the angles of a projection, which have none."""
    return [
        x.clone().requires_grad_() if x is not None and x.dtype.is_floating_point and at < 6 else x
        for at, x in enumerate(inputs)
    ]


def test_angles_of_a_projection_have_no_gradient():
    sample = next(s for s in SAMPLES if s.op == "qkv_projection")
    *inputs, sin = given(sample, "float32")
    q, _, _ = functions.qkv_projection(*inputs, sin.clone().requires_grad_(), **sample.options)
    with pytest.raises(OptionError, match="cos or sin requires a gradient, which the op has not"):
        q.sum().backward()


@pytest.mark.parametrize("sample", CASES)
def test_a_strided_call_is_the_dense_one(sample):
    """Both backends; caches are written through their strides."""
    for backend in ("torch", "simulator"):
        dense = given(sample, sample.kinds[0])
        strided = [x if x is None else _strided(x) for x in dense]
        results = []
        for inputs in (dense, strided):
            found = outputs(op_of(sample)(*inputs, **sample.options, backend=backend))
            written = [
                x for x, operand in zip(inputs, ROWS[sample.op].op.inputs, strict=True)
                if operand.name in ROWS[sample.op].mutates
            ]  # fmt: skip
            results.append([array(x).tolist() for x in (*found, *written)])
        assert results[0] == results[1]


def _strided(x):
    """Return the same values with a stride of 2 in the last axis."""
    return torch.stack([x, x], dim=-1)[..., 0]


@pytest.mark.parametrize("sample", DIFFERENTIABLE)
def test_the_gradient_is_that_of_the_formula(sample):
    """In float64: the closed form against PyTorch's derivative of the row's own formula."""
    row = ROWS[sample.op]
    wide = [
        x if x is None or not x.dtype.is_floating_point else x.double()
        for x in given(sample, "float64")
    ]
    angles = {"cos", "sin"} if sample.op.startswith("qkv") else set()
    leaves = [
        x.requires_grad_()
        for operand, x in zip(row.op.inputs, wide, strict=True)
        if x is not None and x.dtype == torch.float64 and operand.name not in angles
    ]
    results = []
    for function in (op_of(sample), row.plain):
        found = [y for y in outputs(function(*wide, **sample.options)) if y.dtype.is_floating_point]
        seeds = [torch.sin(torch.arange(1.0, y.numel() + 1)).reshape(y.shape).to(y) for y in found]
        results.append(torch.autograd.grad(found, leaves, seeds, allow_unused=True))
    assert any(grad is not None for grad in results[0])
    for got, want in zip(*results, strict=True):
        if want is None or got is None:
            # A gradient that is 0 for lack of any influence may be left out.
            assert all(g is None or not g.any() for g in (got, want))
            continue
        ref, keywords = array(want), {"op": sample.op, "case": "gradient"}
        magnitude = abs(ref) + abs(ref).max()
        narrow = array(got).astype(np.float32)
        assert_close(narrow, ref, magnitude, roundings=1, chain=4, **keywords)


@pytest.mark.parametrize("sample", DIFFERENTIABLE)
def test_gradients_on_the_simulator_run_kernels_and_no_plain_op(sample):
    inputs = _with_gradients(given(sample, "float32"))
    found = outputs(op_of(sample)(*inputs, **sample.options, backend="simulator"))
    float_outputs = [y for y in found if y.requires_grad]
    torch.autograd.backward(float_outputs, [torch.ones_like(y) for y in float_outputs])
    assert inputs[0].grad is not None
    assert not [key for key in counters() if key[1] == "torch"]


@pytest.mark.parametrize("extra", ["nothing", "lse", "slopes"])
def test_the_gradient_of_attention_is_a_kernel_unless_lse_or_alibi_need_more(extra):
    q, k, v = (x.requires_grad_() for x in given(BARE_ATTENTION, "float32")[:3])
    slopes = [0.5, 0.25, 1.0, 0.0] if extra == "slopes" else None
    out, lse = functions.attention(q, k, v, slopes=slopes, backend="simulator")
    (out.sum() + lse.sum() if extra == "lse" else out.sum()).backward()
    assert counters()["attention_backward", "simulator"] == (extra == "nothing")
    assert not [key for key in counters() if key[1] == "torch"]
    mine = [x.grad for x in (q, k, v)]
    wide = [x.detach().double().requires_grad_() for x in (q, k, v)]
    out, lse = ROWS["attention"].plain(*wide, slopes=slopes)
    (out.sum() + lse.sum() if extra == "lse" else out.sum()).backward()
    for got, x in zip(mine, wide, strict=True):
        ref = array(x.grad)
        # Sums of 11 keys and 7 queries of probabilities that are themselves some roundings off.
        keywords = {"op": "attention_backward", "roundings": 1, "chain": 256, "case": extra}
        assert_close(array(got), ref, abs(ref) + abs(ref).max(), **keywords)


@pytest.mark.parametrize("sample", [p for p in CASES if not ROWS[p.values[0].op].mutates])
def test_autocast(sample):
    row = ROWS[sample.op]
    inputs = given(sample, sample.kinds[-1])
    with torch.autocast("cpu", torch.bfloat16):
        found = outputs(op_of(sample)(*inputs, **sample.options))
    low = row.autocast == "low" and inputs[0].dtype == torch.float32
    cast = [
        x.bfloat16() if low and x is not None and operand.dtype is None else x
        for x, operand in zip(inputs, row.op.inputs, strict=True)
    ]
    want = outputs(op_of(sample)(*cast, **sample.options))
    for got, expected in zip(found, want, strict=True):
        assert (got.dtype, array(got).tolist()) == (expected.dtype, array(expected).tolist())


def test_autocast_widens_a_narrow_operand_to_the_parameters():
    x, weight = torch.ones(3, 4, dtype=torch.bfloat16), torch.ones(4)
    with torch.autocast("cpu", torch.bfloat16):
        assert functions.rms_norm(x, weight, backend="simulator").dtype == torch.float32
    assert counters() == {("rms_norm", "simulator"): 1}


#: Ops with a rule, the inputs that have a batch, and how many calls it takes.
BATCHED = [
    ("matmul", (True, False), "matmul", 1), ("matmul", (False, True), "bmm", 1),
    ("matmul_nt", (True, True), "bmm_nt", 1), ("matmul_tn", (True, False), "bmm_tn", 1),
    ("linear", (True, False, False, True), "linear", 1),
    ("linear", (False, True, False, False), "linear", 3),
    ("rms_norm", (True, False), "rms_norm", 1), ("rms_norm", (True, True), "rms_norm", 3),
    ("layer_norm", (True, False, False), "layer_norm", 1),
    ("rope", (True, False, False), "rope", 1), ("rope", (False, True, True), "rope", 3),
]  # fmt: skip


@pytest.mark.parametrize(("name", "axes", "ran", "times"), BATCHED)
def test_vmap_folds_the_batch_where_it_can(name, axes, ran, times):
    sample = next(s for s in SAMPLES if s.op == name)
    inputs = given(sample, "float32")
    batched = [
        torch.stack([x, 2 * x, -x], dim=1) if axis else x
        for x, axis in zip(inputs, axes, strict=True)
    ]
    dims = tuple(1 if axis else None for axis in axes)
    got = torch.vmap(lambda *x: op_of(sample)(*x, **sample.options), in_dims=dims)(*batched)
    assert counters() == {(ran, "torch"): times}
    for at in range(3):
        one = [x.select(1, at) if axis else x for x, axis in zip(batched, axes, strict=True)]
        assert array(got[at]).tolist() == array(op_of(sample)(*one, **sample.options)).tolist()
