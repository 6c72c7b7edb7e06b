"""From an operator and its row to a custom op ``torch.ops.nki_kernels.<name>``.

Schema, fake, implementation, gradient and the public function, all from the two. The op is opaque:
`torch.compile` and `torch.export` see the output shapes of the contract and nothing else, and the
backend is chosen when the op runs.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import replace
from itertools import compress
from typing import Any

import torch
from torch import Tensor

from nki_kernels.operators.contract import Operand, shapes_of
from nki_kernels.torch_ops import backends, casting
from nki_kernels.torch_ops.counts import COPY, EMPTY, count
from nki_kernels.torch_ops.row import Grads, Inputs, Options, Row, Tensors

NAMESPACE = "nki_kernels"


def schema(row: Row) -> str:
    """Return the schema: the contract's inputs by position, options and backend by keyword."""
    letters = {name: f"({chr(ord('a') + i)}!)" for i, name in enumerate(row.mutates)}
    inputs = ", ".join(
        f"Tensor? {operand.name}=None"
        if _may_be_left_out(row, at)
        else f"Tensor{'?' * operand.optional}{letters.get(operand.name, '')} {operand.name}"
        for at, operand in enumerate(row.op.inputs)
    )
    outputs = ", ".join("Tensor" for _ in row.op.outputs)
    options = ", ".join(filter(None, (row.options, "str? backend=None")))
    return f"({inputs}, *, {options}) -> {outputs if len(row.op.outputs) == 1 else f'({outputs})'}"


def _may_be_left_out(row: Row, at: int) -> bool:
    """Tell whether an input has a default: it is optional, and so are all behind it."""
    return all(operand.optional for operand in row.op.inputs[at:])


def register(row: Row) -> Callable[..., Any]:
    """Define the custom op of a row and return its public function."""
    definition = torch.library.custom_op(
        f"{NAMESPACE}::{row.op.name}",
        _implementation(row),
        mutates_args=row.mutates,
        schema=schema(row),
    )
    definition.register_fake(_fake(row))
    if row.backward is not None:
        _register_backward(definition, row)
    if row.vmap is not None:
        definition.register_vmap(_vmap(row))
    if not row.mutates:
        casting.register(row)
    return _public(row)


def _implementation(row: Row) -> Callable[..., Any]:
    always = not any(out.optional for out in row.op.outputs)

    def implementation(*inputs: Tensor | None, backend: str | None = None, **options: Any) -> Any:
        whole = row.complete(inputs)
        outputs = run(row, whole, options, backend)
        return _returned(outputs if always else _filled(row, whole, outputs, options))

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
    if not module.IS_KERNEL:
        outputs = module.run(row, inputs, options)
        count(row.op.name, choice.backend)
        return outputs
    copies = len(backends.strided(row, inputs))
    dense = inputs
    if copies:
        dense = tuple(x if x is None else x.contiguous() for x in inputs)
    outputs = module.run(row, dense, options)
    if copies and row.mutates:
        _copy_back(row, dense, inputs)
    count(row.op.name, choice.backend)
    count(row.op.name, COPY, copies)
    return outputs


def _copy_back(row: Row, dense: Inputs, inputs: Inputs) -> None:
    """Write what the kernel wrote into the strided inputs that were copied for it."""
    for operand, written, own in zip(row.op.inputs, dense, inputs, strict=True):
        if operand.name in row.mutates and written is not own and own is not None:
            own.copy_(written)  # type: ignore[arg-type]  # a copy of a tensor is one


def _returned(outputs: Tensors) -> Any:
    if not outputs:
        return None
    return outputs[0] if len(outputs) == 1 else outputs


def _fake(row: Row) -> Callable[..., Any]:
    def fake(*inputs: Tensor | None, backend: str | None = None, **options: Any) -> Any:
        inputs = row.complete(inputs)
        first = row.present(inputs)[0][1]
        # Explicit sizes: empty_like would inherit the strides of a transposed input.
        answers = row.answers(inputs)
        outputs = tuple(compress(row.op.outputs, answers))
        shapes = replace(row.op, outputs=outputs).output_shapes(*shapes_of(inputs), options=options)
        given = [
            first.new_empty(shape, dtype=_out_dtype(row, out, first, options))
            for out, shape in zip(outputs, shapes, strict=True)
        ]
        return _returned(_filled(row, inputs, tuple(given), options))

    return fake


def _out_dtype(row: Row, out: Operand, first: Tensor, options: Options) -> torch.dtype:
    wanted: torch.dtype | None = options.get("out_dtype")
    name = out.dtype
    if name is None and wanted is None and row.op.out_dtypes is not None:
        name = row.op.out_dtypes[0]
    named: torch.dtype = getattr(torch, name) if name else wanted or first.dtype
    return named


def _filled(row: Row, inputs: Inputs, outputs: Tensors, options: Options) -> Tensors:
    """Return one output per operand: an op always has as many, absent ones empty."""
    answers = row.answers(inputs)
    if all(answers):
        return outputs
    given, first = iter(outputs), row.present(inputs)[0][1]
    return tuple(
        next(given) if answer else first.new_empty(0, dtype=_out_dtype(row, out, first, options))
        for out, answer in zip(row.op.outputs, answers, strict=True)
    )


class _Calls:
    """The ops of a gradient on one backend; see `nki_kernels.torch_ops.row.Calls`."""

    def __init__(self, name: str, backend: str | None) -> None:
        self.name = name
        self.backend = backend

    def __call__(self, *inputs: Tensor | None, **options: Any) -> Any:
        op = getattr(getattr(torch.ops, NAMESPACE), self.name)
        return op(*inputs, **options, backend=self.backend)

    def __getitem__(self, name: str) -> _Calls:
        return _Calls(name, self.backend)


def _register_backward(definition: Any, row: Row) -> None:
    formula = row.backward
    if formula is None:
        return
    name = row.gradient or row.op.name

    def setup(ctx: Any, inputs: Inputs, keyword_only_inputs: dict[str, Any], output: Any) -> None:
        outputs = output if isinstance(output, tuple) else (output,)
        kept = outputs if row.keeps_outputs else ()
        ctx.save_for_backward(*row.complete(inputs), *kept)
        if row.keeps_outputs:  # such a formula tells an output without influence from a zero
            ctx.set_materialize_grads(False)
        ctx.options = dict(keyword_only_inputs)
        ctx.backend = ctx.options.pop("backend")
        # Eagerly, the backward pass asks for what the forward pass asked for, even if the `with`
        # block is over by then. A graph must not remember what was in force when it was traced.
        if ctx.backend is None and not torch.compiler.is_compiling():
            asked = backends.requested()
            ctx.backend = None if asked is None else asked.backend

    def backward(ctx: Any, *grads: Tensor) -> Grads:
        # PyTorch leaves optional inputs off the end here as well; what is None needs no gradient.
        more = len(row.op.inputs) - len(ctx.needs_input_grad)
        needs = (*ctx.needs_input_grad, *(False for _ in range(more)))
        saved = ctx.saved_tensors
        grads = tuple(compress(grads, row.answers(saved[: len(row.op.inputs)])))
        found = formula(_Calls(name, ctx.backend), needs, grads, *saved, **ctx.options)
        return found[: len(ctx.needs_input_grad)]

    definition.register_autograd(backward, setup_context=setup)


def _vmap(row: Row) -> Callable[..., Any]:
    """Return the batching rule of a row; where it has none for these axes, a loop."""

    def rule(info: Any, in_dims: Any, *inputs: Tensor | None, **options: Any) -> Any:
        backend = options.pop("backend", None)
        dims = (*in_dims[: len(inputs)], *(None for _ in range(len(inputs) - len(in_dims))))
        front = tuple(
            x if x is None or dim is None else x.movedim(dim, 0)
            for x, dim in zip(inputs, dims, strict=True)
        )
        axes = tuple(x is not None and dim is not None for x, dim in zip(inputs, dims, strict=True))
        axes += (False,) * (len(row.op.inputs) - len(axes))
        call = _Calls(row.op.name, backend)
        every = row.complete(front)
        found = None if row.vmap is None else row.vmap(call, axes, *every, **options)
        if found is None:
            found = _loop(call, info.batch_size, axes, every, options)
        return _returned(found), 0 if len(found) == 1 else (0,) * len(found)

    return rule


def _loop(
    call: _Calls, size: int, axes: tuple[bool, ...], inputs: Inputs, options: dict[str, Any]
) -> Tensors:
    """Run the op once per example."""
    results = []
    for at in range(size):
        one = (
            x[at] if x is not None and batched else x
            for x, batched in zip(inputs, axes, strict=True)
        )
        result = call(*one, **options)
        results.append(result if isinstance(result, tuple) else (result,))
    return tuple(torch.stack(parts) for parts in zip(*results, strict=True))


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
    for operand in op.inputs:
        written = "; written." if operand.name in row.mutates else "; any strides."
        lines += [f"    {operand}: {operand.dtype or dtypes}{written}"]
    lines += [f"    {note}" for note in row.notes]
    lines += [f"    backend: {', '.join(backends.BACKENDS)}; None means what use() or"]
    lines += [
        f"        {backends.SIMULATOR_ENV} asks for, else the default of the tensors' device."
    ]
    if op.outputs:
        lines += ["", "Returns:", f"    {', '.join(map(str, op.outputs))}; new, dense."]
    lines += ["", "Raises:", "    BackendError: the backend asked for cannot run the call."]
    lines += ["    ValueError: an unknown backend; an option or values that the contract excludes."]
    return "\n".join(lines)
