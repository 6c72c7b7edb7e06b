"""From an operator and its row to a custom op ``torch.ops.nki_kernels.<name>``.

Schema, fake, implementation, gradient and the public function, all from the two. The op is opaque:
`torch.compile` and `torch.export` see the output shapes of the contract and nothing else, and the
backend is chosen when the op runs.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from nki_kernels.operators.contract import shapes_of
from nki_kernels.torch_ops import backends
from nki_kernels.torch_ops.counts import COPY, EMPTY, count
from nki_kernels.torch_ops.rows import Inputs, Row, Tensors

NAMESPACE = "nki_kernels"


def schema(row: Row) -> str:
    """Return the schema: the contract's inputs by position, options and backend by keyword."""
    inputs = ", ".join(
        f"Tensor? {operand.name}=None" if operand.optional else f"Tensor {operand.name}"
        for operand in row.op.inputs
    )
    outputs = ", ".join("Tensor" for _ in row.op.outputs)
    options = ", ".join(filter(None, (row.options, "str? backend=None")))
    return f"({inputs}, *, {options}) -> {outputs if len(row.op.outputs) == 1 else f'({outputs})'}"


def register(row: Row) -> Callable[..., Any]:
    """Define the custom op of a row and return its public function."""
    definition = torch.library.custom_op(
        f"{NAMESPACE}::{row.op.name}", _implementation(row), mutates_args=(), schema=schema(row)
    )
    definition.register_fake(_fake(row))
    if row.backward is not None:
        _register_backward(definition, row)
    return _public(row)


def _implementation(row: Row) -> Callable[..., Any]:
    def implementation(*inputs: Tensor | None, backend: str | None = None, **options: Any) -> Any:
        return _returned(run(row, row.complete(inputs), options, backend))

    return implementation


def run(row: Row, inputs: Inputs, options: dict[str, Any], backend: str | None) -> Tensors:
    """Choose the backend, run it, and count what ran.

    Raises:
        BackendError: the backend asked for cannot run this call; every reason is listed.
    """
    choice = backends.choose(row, inputs, backend)
    module = backends.backend_module(choice.backend)
    if module.IS_KERNEL:  # PyTorch refuses a call in its own words
        found = backends.reasons(choice.backend, row, inputs, options)
        if found:
            raise backends.failure(row, inputs, choice, found)
    if backends.is_empty(inputs):
        outputs = backends.backend_module("torch").run(row, inputs, options)
        count(row.op.name, EMPTY)
        return outputs
    copies = len(backends.strided(row, inputs)) if module.IS_KERNEL else 0
    if copies:
        inputs = tuple(x if x is None else x.contiguous() for x in inputs)
    outputs = module.run(row, inputs, options)
    count(row.op.name, choice.backend)
    count(row.op.name, COPY, copies)
    return outputs


def _returned(outputs: Tensors) -> Any:
    return outputs[0] if len(outputs) == 1 else outputs


def _fake(row: Row) -> Callable[..., Any]:
    def fake(*inputs: Tensor | None, backend: str | None = None, **options: Any) -> Any:
        inputs = row.complete(inputs)
        first = row.present(inputs)[0][1]
        # Explicit sizes: empty_like would inherit the strides of a transposed input.
        dtype = options.get("out_dtype") or first.dtype
        outputs = row.op.output_shapes(*shapes_of(inputs))
        return _returned(tuple(first.new_empty(shape, dtype=dtype) for shape in outputs))

    return fake


def _register_backward(definition: Any, row: Row) -> None:
    formula = row.backward
    if formula is None:
        return
    name = row.gradient or row.op.name

    def setup(ctx: Any, inputs: Inputs, keyword_only_inputs: dict[str, Any], output: Any) -> None:
        ctx.save_for_backward(*inputs)
        ctx.options = dict(keyword_only_inputs)
        ctx.backend = ctx.options.pop("backend")
        # Eagerly, the backward pass asks for what the forward pass asked for, even if the `with`
        # block is over by then. A graph must not remember what was in force when it was traced.
        if ctx.backend is None and not torch.compiler.is_compiling():
            asked = backends.requested()
            ctx.backend = None if asked is None else asked.backend

    def backward(ctx: Any, *grads: Tensor) -> Any:
        op = getattr(getattr(torch.ops, NAMESPACE), name)

        def call(*inputs: Tensor | None, **options: Any) -> Tensor:
            result: Tensor = op(*inputs, **options, backend=ctx.backend)
            return result

        # PyTorch leaves optional inputs off the end here as well; what is None needs no gradient.
        inputs = row.complete(ctx.saved_tensors)
        needs = (*ctx.needs_input_grad, *(False for _ in inputs[len(ctx.needs_input_grad) :]))
        return formula(call, needs, grads, *inputs, **ctx.options)

    definition.register_autograd(backward, setup_context=setup)


def _public(row: Row) -> Callable[..., Any]:
    op = getattr(getattr(torch.ops, NAMESPACE), row.op.name)

    def function(*args: Any, **kwargs: Any) -> Any:
        return op(*args, **kwargs)

    function.__name__ = function.__qualname__ = row.op.name
    function.__module__ = "nki_kernels.torch_ops"
    function.__doc__ = _docstring(row)
    arguments = op.default._schema.arguments
    function.__signature__ = inspect.Signature(  # type: ignore[attr-defined]
        [
            inspect.Parameter(
                argument.name,
                inspect.Parameter.KEYWORD_ONLY
                if argument.kwarg_only
                else inspect.Parameter.POSITIONAL_OR_KEYWORD,
                default=argument.default_value
                if argument.has_default_value()
                else inspect.Parameter.empty,
            )
            for argument in arguments
        ]
    )
    return function


def _docstring(row: Row) -> str:
    op = row.op
    dtypes = " | ".join(op.dtypes)
    lines = [op.summary, "", "Args:"]
    lines += [f"    {operand}: {dtypes}; any strides." for operand in op.inputs]
    lines += [f"    {note}" for note in row.notes]
    lines += [f"    backend: {', '.join(backends.BACKENDS)}; None means what use() or"]
    lines += [
        f"        {backends.SIMULATOR_ENV} asks for, else the default of the tensors' device."
    ]
    lines += ["", "Returns:", f"    {', '.join(map(str, op.outputs))}; new, dense."]
    lines += ["", "Raises:", "    BackendError: the backend asked for cannot run the call."]
    lines += ["    ValueError: an unknown backend."]
    lines += ["", f"The contract is that of `nki_kernels.ops.{op.name}`."]
    return "\n".join(lines)
