"""A row is all it takes: ops made here from rows of their own."""

from __future__ import annotations

import dataclasses
import inspect

import pytest

torch = pytest.importorskip("torch")

from torch.library import opcheck

from nki_kernels.operators.contract import Operand
from nki_kernels.torch_ops import counters, explain, matmul
from nki_kernels.torch_ops.products import MATMUL
from nki_kernels.torch_ops.registration import register, schema
from nki_kernels.torch_ops.rows import ROWS


def row(name, **changes):
    """Return the row of matmul under another name."""
    fields = {field.name for field in dataclasses.fields(MATMUL)}
    op = dataclasses.replace(
        MATMUL.op, name=name, **{k: v for k, v in changes.items() if k not in fields}
    )
    mine = {k: v for k, v in changes.items() if k in fields}
    return dataclasses.replace(MATMUL, op=op, **mine)


def test_the_schema_comes_from_the_contract():
    assert schema(MATMUL) == (
        "(Tensor a, Tensor b, *, ScalarType? out_dtype=None, str? backend=None) -> Tensor"
    )


def test_the_public_function_documents_itself():
    assert str(inspect.signature(matmul)) == "(a, b, *, out_dtype=None, backend=None)"
    assert (matmul.__name__, matmul.__module__) == ("matmul", "nki_kernels.torch_ops")
    for text in (MATMUL.op.summary, "a [M, K]: bfloat16 | float16 | float32; any strides", "c [M"):
        assert text in matmul.__doc__


def test_several_outputs_and_no_options():
    out = MATMUL.op.outputs[0]
    probe = row(
        "probe_two",
        outputs=(out, dataclasses.replace(out, name="d", axes=("N", "M"))),
        options="",
        notes=(),
        plain=lambda a, b: (torch.mm(a, b), torch.mm(a, b).t()),
        backward=None,
    )
    function = register(probe)
    c, d = function(torch.ones(2, 3), torch.ones(3, 4))
    assert (c.shape, d.shape, d.is_contiguous()) == ((2, 4), (4, 2), True)
    assert counters() == {("probe_two", "torch"): 1}
    opcheck(torch.ops.nki_kernels.probe_two.default, (torch.ones(2, 3), torch.ones(3, 4)))


def _optional(name):
    return Operand(name, ("N",), optional=True)


def _affine(a, b, scale=None, shift=None, *, eps=1.0):
    c = torch.mm(a, b) + eps
    c = c if scale is None else c * scale
    return (c if shift is None else c + shift,)


def _affine_backward(call, needs, grads, a, b, scale=None, shift=None, *, eps=1.0):
    """Only the optional inputs have gradients here."""
    (dc,) = grads
    d_scale = (dc * call(a, b, eps=eps)).sum(0) if needs[2] else None
    return None, None, d_scale, dc.sum(0) if needs[3] else None


AFFINE = row(
    "probe_affine",
    inputs=(*MATMUL.op.inputs, _optional("scale"), _optional("shift")),
    options="float eps=1.0",
    plain=_affine,
    backward=_affine_backward,
)


@pytest.fixture(scope="module")
def affine():
    return register(AFFINE)


def test_optional_inputs_are_optional_tensors_of_the_schema():
    assert schema(AFFINE) == (
        "(Tensor a, Tensor b, Tensor? scale=None, Tensor? shift=None, *, "
        "float eps=1.0, str? backend=None) -> Tensor"
    )


def test_optional_inputs_may_be_left_out(affine):
    a, b = torch.ones(2, 3), torch.ones(3, 4)
    scale, shift = torch.full((4,), 2.0), torch.full((4,), 5.0)
    assert affine(a.to("meta"), b.to("meta"), shift=shift.to("meta")).shape == (2, 4)
    assert affine(a, b).tolist() == [[4.0] * 4] * 2
    assert affine(a, b, scale, eps=0.0).tolist() == [[6.0] * 4] * 2
    assert affine(a, b, shift=shift).tolist() == [[9.0] * 4] * 2
    assert affine(a, b, None, shift).tolist() == [[9.0] * 4] * 2
    assert affine(a, b, scale, shift).tolist() == [[13.0] * 4] * 2
    assert counters() == {("probe_affine", "torch"): 5}


@pytest.mark.parametrize(("scaled", "shifted"), [(0, 0), (1, 0), (0, 1), (1, 1)])
def test_optional_inputs_have_gradients(affine, scaled, shifted):
    a, b = torch.ones(2, 3), torch.ones(3, 4)
    scale = torch.full((4,), 2.0, requires_grad=True) if scaled else None
    shift = torch.full((4,), 5.0, requires_grad=True) if shifted else None
    c = affine(a, b, scale, shift, eps=0.5)
    assert c.requires_grad == bool(scaled or shifted)
    if c.requires_grad:
        c.sum().backward()
    if scaled:
        assert scale.grad.tolist() == [7.0] * 4
    if shifted:
        assert shift.grad.tolist() == [2.0] * 4


def test_explain_takes_optional_inputs_by_position_or_keyword(monkeypatch):
    monkeypatch.setitem(ROWS, "probe_affine", AFFINE)
    a, b, scale = torch.ones(2, 3), torch.ones(3, 4), torch.ones(8)[::2]
    shown = "probe_affine(float32[2, 3], float32[3, 4], {}, None)"
    assert explain("probe_affine", a, b).call == shown.format("None")
    for told in (explain("probe_affine", a, b, scale), explain("probe_affine", a, b, scale=scale)):
        assert told.call == shown.format("float32[4]")
        assert told.reasons["torch"] == ()
    with pytest.raises(ValueError, match="given no b; it takes a"):
        explain("probe_affine", a, scale=scale)


def test_an_op_without_a_gradient_says_so():
    function = register(row("probe_no_gradient", backward=None))
    c = function(torch.ones(2, 3, requires_grad=True), torch.ones(3, 4))
    with pytest.raises(RuntimeError, match="no autograd formula was registered"):
        c.sum().backward()
