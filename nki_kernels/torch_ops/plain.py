"""The backend "torch": the formula of the row, in PyTorch's own operations, on any device."""

from __future__ import annotations

from dataclasses import fields

from nki_kernels.machine.errors import OptionError
from nki_kernels.operators.contract import Operator, shapes_of
from nki_kernels.torch_ops.arrays import as_arrays
from nki_kernels.torch_ops.row import Inputs, Options, Row, Tensors

IS_KERNEL = False

#: What operators have that say nothing about values: no array need be made for them.
_UNCHECKED = next(f.default for f in fields(Operator) if f.name == "value_problems")


def reasons(row: Row, inputs: Inputs, options: Options) -> list[str]:
    """Return what would be refused, in its own words: the formula on shapes without values."""
    try:
        run(row, tuple(x if x is None else x.detach().to("meta") for x in inputs), options)
    except (RuntimeError, ValueError, TypeError) as error:
        return [str(error)]
    return []


def run(row: Row, inputs: Inputs, options: Options) -> Tensors:
    """Compute the formula; the outputs are new and dense, as the fake promises.

    Raises:
        ShapeError: a wrong rank, which the formula might take but neither kernel nor fake do.
        OptionError: options and values that the contract excludes.
    """
    op = row.op
    if any(
        x is not None and x.dim() != len(operand.axes)
        for x, operand in zip(inputs, op.inputs, strict=True)
    ):
        op.axes(*shapes_of(inputs))  # raises, in the contract's words
    wrong = op.option_problems(options)
    checked = op.value_problems is not _UNCHECKED
    if checked and not wrong and all(x is None or (x.is_cpu and x.numel()) for x in inputs):
        wrong = row.op.value_problems(as_arrays(row, inputs), options)
    if wrong:
        raise OptionError(f"{row.op.name}: " + "; ".join(wrong))
    return tuple(x.contiguous() for x in row.plain(*inputs, **options))
