"""The backend "simulator": the op's kernel on the embedded NKI, on this CPU."""

from __future__ import annotations

from nki_kernels import toolchain
from nki_kernels.machine.errors import OptionError
from nki_kernels.torch_ops.arrays import as_arrays, to_tensor, too_large
from nki_kernels.torch_ops.row import Inputs, Options, Row, Tensors

IS_KERNEL = True


def reasons(row: Row, inputs: Inputs, options: Options) -> list[str]:
    """Return why the embedded NKI cannot be used here, in words; limits of the op not included."""
    found = []
    nki = toolchain.current()
    if nki.kind != "embedded":
        found.append(
            f"the nki in force is the {nki.kind} one, version {nki.version}; the simulator runs "
            f"kernels of the embedded one; start Python with {toolchain.ENV}=embedded"
        )
    for name, value in row.present(inputs):
        if value.device.type != "cpu":
            found.append(
                f"{name} is on {value.device}; the simulator takes tensors on cpu; "
                f"pass {name}.cpu()"
            )
    return found


def run(row: Row, inputs: Inputs, options: Options) -> Tensors:
    """Run the kernel. No value is copied on the way in; the outputs are new.

    Raises:
        OptionError: values that the contract excludes: offsets that decrease, say.
    """
    wrong = too_large(row, inputs)
    if wrong:
        raise OptionError(f"{row.op.name}: " + "; ".join(wrong))
    result = row.op.launch(as_arrays(row, inputs), options).result
    if result is None:
        return ()
    return tuple(map(to_tensor, result if isinstance(result, tuple) else (result,)))
