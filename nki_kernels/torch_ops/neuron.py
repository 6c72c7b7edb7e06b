"""The backend "neuron": the op's kernel on a NeuronCore. Only this file knows `torch_neuronx`.

Never run on a device so far: none was available. What is tested is that it refuses with all reasons
where it must, and that it calls the kernel with the tensors, the constants and the config when
nothing stands in the way.
"""

from __future__ import annotations

import contextlib
import importlib.metadata
import re
from collections.abc import Sequence
from typing import Any, TypeGuard

import numpy.typing as npt
import torch
from torch import Tensor

from nki_kernels import toolchain
from nki_kernels.operators.contract import shapes_of
from nki_kernels.torch_ops.arrays import (
    E4M3,
    E4M3_OF_TORCH,
    kernel_dtype,
    to_array,
    to_tensor,
)
from nki_kernels.torch_ops.backends import NEURON_DEVICE
from nki_kernels.torch_ops.row import Inputs, Options, Row, Tensors
from nki_kernels.torch_ops.target import current_core

IS_KERNEL = True
#: The first release with eager NKI calls; the public index has a placeholder of version 1.0.
OLDEST = (2, 13)
_INSTALL = (
    "pip install 'nki-kernels[neuron]' --extra-index-url https://pip.repos.neuron.amazonaws.com "
    "(Linux, Python 3.12 or newer)"
)


def reasons(row: Row, inputs: Inputs, options: Options) -> list[str]:
    """Return why no NeuronCore can be used here, in words; limits of the op not included."""
    found = missing()
    for name, value in row.present(inputs):
        if value.device.type != NEURON_DEVICE:
            found.append(
                f"{name} is on {value.device}; a device takes tensors on {NEURON_DEVICE}; "
                f"pass {name}.to('{NEURON_DEVICE}')"
            )
    return found


def missing() -> list[str]:
    """Return what this machine lacks for a NeuronCore, whatever is to run there, in words."""
    return [*_package_reasons(), *_toolchain_reasons()]


def _toolchain_reasons() -> list[str]:
    nki = toolchain.current()
    if nki.kind == "real":
        return []
    needed = "a device needs AWS's, which the extra 'neuron' installs too"
    return [f"the nki in force is the embedded one ({nki.reason}); {needed}"]


def _package_reasons() -> list[str]:
    try:
        version = importlib.metadata.version("torch-neuronx")
    except importlib.metadata.PackageNotFoundError:
        return [f"torch_neuronx is not installed; {_INSTALL}"]
    number = re.match(r"(\d+)\.(\d+)", version)
    if number is None or (int(number[1]), int(number[2])) < OLDEST:
        what = "is too old, or the public index's placeholder"
        oldest = ".".join(map(str, OLDEST))
        return [f"torch_neuronx {version} {what}; allowed is {oldest} or newer; {_INSTALL}"]
    try:
        import torch_neuronx  # type: ignore[import-not-found]  # noqa: F401
    except (ImportError, OSError, RuntimeError) as error:
        what = f"fails to import: {type(error).__name__}: {error}"
        return [f"torch_neuronx {version} {what}; repair it: {_INSTALL}"]
    return []


def _is_mask(x: Tensor | None) -> TypeGuard[Tensor]:
    return x is not None and x.dtype == torch.bool


def run(row: Row, inputs: Inputs, options: Options) -> Tensors:
    """Call the kernel on device tensors: TorchNeuron runs a `@nki.jit` kernel called with them."""
    op = row.op
    axes = op.axes(*shapes_of(inputs), options=options)
    dtype = kernel_dtype(row, inputs)
    config = op.configure(axes, dtype, current_core())
    given = tuple(x.view(torch.uint8) if _is_mask(x) else x for x in inputs)
    result = op.kernel(*op.arguments(given, options, config))
    if result is None:
        return ()
    return result if isinstance(result, tuple) else (result,)


class NeuronDevice:
    """A NeuronCore for ``python -m bench device``: arrays in and out, calls, versions."""

    def software(self) -> dict[str, str]:
        """Return the versions of what compiles and runs kernels."""
        names = ("torch", "torch-neuronx", "nki", "neuronx-cc")
        found = {}
        for name in names:
            with contextlib.suppress(importlib.metadata.PackageNotFoundError):
                found[name] = importlib.metadata.version(name)
        return found

    def put(self, array: npt.NDArray[Any]) -> Tensor:
        """Return the array on the device; 8-bit floats under the type of the same bits."""
        if array.dtype.name == E4M3:
            array = array.view(E4M3_OF_TORCH)
        return to_tensor(array).to(NEURON_DEVICE)

    def get(self, value: Tensor) -> npt.NDArray[Any]:
        """Return a tensor's values."""
        return to_array(value.cpu())

    def call(self, name: str, inputs: Sequence[Tensor | None], options: Options) -> Any:
        """Run the kernel of an operator."""
        from nki_kernels.torch_ops.rows import ROWS

        outputs = run(ROWS[name], tuple(inputs), options)
        return outputs[0] if len(outputs) == 1 else outputs

    def synchronize(self) -> None:
        """Wait for the device."""
        torch.accelerator.synchronize()
