"""What a row says of one op beyond its contract, because it is about PyTorch."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol, TypeAlias

from torch import Tensor

from nki_kernels.operators.contract import Operator

Tensors: TypeAlias = tuple[Tensor, ...]
#: The inputs of a call, one per operand of the contract; None where an optional one is left out.
Inputs: TypeAlias = tuple[Tensor | None, ...]
Options: TypeAlias = Mapping[str, Any]
Grads: TypeAlias = tuple[Tensor | None, ...]
#: What autocast does to the operands without a dtype of their own: "low" casts them to autocast's
#: dtype, "widest" to the widest among them, so that wider parameters meet the activations.
Casting: TypeAlias = Literal["low", "widest"]


class Calls(Protocol):
    """The ops a gradient may call, on the backend that the forward pass asked for."""

    def __call__(self, *inputs: Tensor | None, **options: Any) -> Any:
        """Call the op named by `Row.gradient`, or the op itself."""

    def __getitem__(self, name: str) -> Callable[..., Any]:
        """Return another op by name."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """The PyTorch side of one operator.

    Attributes:
        op: the operator. Optional outputs ("dbias") that a call has not are empty, of shape [0].
        options: the keyword-only options, in the language of `torch.library` schemas.
        notes: what a user must know of the options, for the docstring; one line each.
        plain: the formula in PyTorch: (*inputs, **options) -> outputs; also for zero-size inputs,
            and for shapes without values.
        backward: the gradient in closed form, made of ops that can be traced (ours or PyTorch's);
            None if the op has no gradient. (call, needs, grads, *inputs, **options) -> one gradient
            per input, None where `needs` is False; `call` is a `Calls`, `grads` has one per output.
            Statistics are computed anew from the inputs, or see `keeps_outputs`.
        gradient: name of the op the gradient is made of; None means the op itself.
        keeps_outputs: the outputs follow the inputs in the arguments of `backward`.
        mutates: inputs that are written; such an op has no outputs.
        autocast: what autocast does to the inputs.
        vmap: (call, axes, *inputs, **options) -> outputs with the batch in front, for inputs with
            the batch in front where `axes` is True; None loops over the batch.
    """

    op: Operator
    options: str
    notes: tuple[str, ...]
    plain: Callable[..., Tensors]
    backward: Callable[..., Grads] | None = None
    gradient: str | None = None
    keeps_outputs: bool = False
    mutates: tuple[str, ...] = ()
    autocast: Casting = "widest"
    vmap: Callable[..., Tensors | None] | None = None

    def complete(self, inputs: Inputs) -> Inputs:
        """Return one input per operand: PyTorch leaves optional ones off the end."""
        return inputs + (None,) * (len(self.op.inputs) - len(inputs))

    def answers(self, inputs: Inputs) -> list[bool]:
        """Return for each output whether a call has it: an optional one ("dbias") has its input."""
        names = {name for name, _ in self.present(inputs)}
        return [not out.optional or out.name.removeprefix("d") in names for out in self.op.outputs]

    def present(self, inputs: Sequence[Any]) -> list[tuple[str, Any]]:
        """Return name and tensor of every input that is there."""
        pairs = zip(self.op.inputs, inputs, strict=True)
        return [(operand.name, value) for operand, value in pairs if value is not None]
