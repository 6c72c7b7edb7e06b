"""Write `functions.pyi`, the types of the functions: python -m nki_kernels.torch_ops.stubs.

The signatures are those of the registered schemas, so that editors and mypy see what runs.
"""

from __future__ import annotations

import inspect
from pathlib import Path

import torch

from nki_kernels.torch_ops import functions

STUB = Path(functions.__file__).with_suffix(".pyi")

_TYPES = {
    "Tensor": "Tensor", "Optional[Tensor]": "Tensor | None",
    "Optional[List[float]]": "list[float] | None", "float": "float",
    "Optional[float]": "float | None", "int": "int", "Optional[int]": "int | None",
    "str": "str", "Optional[str]": "str | None", "bool": "bool",
}  # fmt: skip
_HEAD = '''# ruff: noqa: D415, D417, E501
"""The types of `functions.py`; written by python -m nki_kernels.torch_ops.stubs."""

import torch
from torch import Tensor

__all__: list[str]
'''


def render() -> str:
    """Return the text of `functions.pyi`."""
    return "\n".join([_HEAD, *(_function(name) for name in functions.__all__)])


def _function(name: str) -> str:
    schema = getattr(torch.ops.nki_kernels, name).default._schema
    lines = []
    starred = False
    for argument in schema.arguments:
        if argument.kwarg_only and not starred:
            lines.append("    *,")
            starred = True
        kind = "torch.dtype | None" if argument.name == "out_dtype" else _TYPES[str(argument.type)]
        default = f" = {_value(argument.default_value)}" if argument.has_default_value() else ""
        lines.append(f"    {argument.name}: {kind}{default},")
    returns = "tuple[" + ", ".join("Tensor" for _ in schema.returns) + "]"
    if len(schema.returns) < 2:
        returns = "Tensor" if schema.returns else "None"
    doc = inspect.getdoc(getattr(functions, name)) or ""
    body = "\n".join(f"    {line}".rstrip() for line in doc.splitlines())
    signature = "\n".join(lines)
    return f'def {name}(\n{signature}\n) -> {returns}:\n    """{body.strip()}\n    """\n'


def _value(value: object) -> str:
    return f'"{value}"' if isinstance(value, str) else repr(value)


if __name__ == "__main__":
    STUB.write_text(render())
