"""A row is all it takes: ops made here from rows of their own."""

from __future__ import annotations

import dataclasses
import inspect

import pytest

torch = pytest.importorskip("torch")

from torch.library import opcheck

from nki_kernels.torch_ops import counters, matmul
from nki_kernels.torch_ops.registration import register, schema
from nki_kernels.torch_ops.rows import MATMUL


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
        plain=lambda inputs, _: (torch.mm(*inputs), torch.mm(*inputs).t()),
        backward=None,
    )
    function = register(probe)
    c, d = function(torch.ones(2, 3), torch.ones(3, 4))
    assert (c.shape, d.shape, d.is_contiguous()) == ((2, 4), (4, 2), True)
    assert counters() == {("probe_two", "torch"): 1}
    opcheck(torch.ops.nki_kernels.probe_two.default, (torch.ones(2, 3), torch.ones(3, 4)))


def test_an_op_without_a_gradient_says_so():
    function = register(row("probe_no_gradient", backward=None))
    c = function(torch.ones(2, 3, requires_grad=True), torch.ones(3, 4))
    with pytest.raises(RuntimeError, match="no autograd formula was registered"):
        c.sum().backward()
