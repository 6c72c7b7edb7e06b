"""The arrows between rooms, read from every import statement.

One row per room says what it may import. A file that belongs to no row, or an import that no row
allows, fails with its place and the fix; all of them are reported at once.
"""

from __future__ import annotations

import ast
import dataclasses
import sys
from collections.abc import Iterator

import pytest

from tests.repo.source import EMBEDDED, python_files

ALL_LIBRARY = frozenset(
    {
        "package", "hardware", "machine", "nki", "kernels", "operators", "ops", "profiler",
        "torch_ops", "lint", "conformance", "benchmark",
    }
)  # fmt: skip
CORE_PACKAGES = frozenset({"numpy", "ml_dtypes"})


@dataclasses.dataclass(frozen=True)
class Room:
    """A part of the repository: the modules in it and what they may import.

    ``modules`` are dotted names: the module itself and, unless ``exact``, everything below it.
    ``late`` are packages that may be imported inside a function only.
    """

    name: str
    modules: tuple[str, ...]
    may: frozenset[str]
    packages: frozenset[str] = frozenset()
    late: frozenset[str] = frozenset()
    exact: bool = False


ROOMS = (
    Room(
        "package",
        ("nki_kernels", "nki_kernels._version", "nki_kernels.toolchain"),
        frozenset({"package", "machine", "profiler"}),  # the front door: Abstract, profile
        exact=True,
    ),
    Room("command", ("nki_kernels.__main__",), ALL_LIBRARY, CORE_PACKAGES, exact=True),
    Room("hardware", ("nki_kernels.hardware",), frozenset({"hardware"})),
    Room(
        "machine",
        ("nki_kernels.machine",),
        frozenset({"machine", "hardware"}),
        CORE_PACKAGES,
    ),
    Room(
        "nki",
        ("nki",),
        frozenset({"nki", "machine", "hardware", "package"}),
        CORE_PACKAGES,
        late=frozenset({"torch"}),  # arguments may be torch tensors, if the caller has torch
    ),
    Room("kernels", ("nki_kernels.kernels",), frozenset({"kernels", "nki"})),
    Room(
        "operators",
        ("nki_kernels.operators",),
        frozenset({"operators", "kernels", "hardware", "machine", "nki", "package"}),
        CORE_PACKAGES,
    ),
    Room(
        "ops",
        ("nki_kernels.ops", "nki_kernels.ops_attention", "nki_kernels.ops_moe"),
        frozenset({"ops", "operators", "package"}),
        CORE_PACKAGES,
    ),
    # The base class of a user's benchmark: an operator spelt out.
    Room(
        "benchmark",
        ("nki_kernels.benchmark",),
        frozenset({"benchmark", "operators", "hardware", "machine", "package"}),
        CORE_PACKAGES,
        exact=True,
    ),
    Room(
        "profiler",
        ("nki_kernels.profiler",),
        frozenset({"profiler", "machine", "hardware", "package"}),
        CORE_PACKAGES,
    ),
    Room(
        "torch_ops",
        ("nki_kernels.torch_ops",),
        frozenset({"torch_ops", "operators", "ops", "machine", "hardware", "package"}),
        CORE_PACKAGES | {"torch"},
        late=frozenset({"transformers"}),
    ),
    Room(
        "neuron",
        ("nki_kernels.torch_ops.neuron",),
        frozenset({"torch_ops", "neuron", "operators", "ops", "package", "nki"}),
        CORE_PACKAGES | {"torch"},
        late=frozenset({"torch_neuronx"}),
        exact=True,
    ),
    # It reads names and signatures from the embedded nki, which it loads by name.
    Room("lint", ("nki_kernels.lint",), frozenset({"lint", "package"})),
    Room(
        "conformance",
        ("nki_kernels.conformance",),
        frozenset({"conformance", "machine", "hardware", "package", "nki"}),
        # It runs AWS's test files: with pytest, and with the package `test` of AWS's checkout.
        CORE_PACKAGES | {"pytest", "test"},
    ),
    # ml_dtypes only adds NumPy's missing dtypes.
    Room("reference", ("reference",), frozenset({"reference"}), CORE_PACKAGES),
    Room(
        "bench",
        ("bench",),
        # `tests` for the rule that says how large an error may be: there is one.
        # `neuron` for the command that needs a device.
        ALL_LIBRARY | {"bench", "reference", "tests", "command", "neuron"},
        CORE_PACKAGES | {"rich"},
        late=frozenset({"torch", "matplotlib"}),
    ),
    Room(
        "tests",
        ("tests",),
        ALL_LIBRARY | {"tests", "reference", "bench", "command", "neuron"},
        CORE_PACKAGES | {"pytest", "hypothesis", "torch", "IPython", "rich", "_pytest"},
        late=frozenset({"transformers"}),
    ),
)
FIX = {
    "kernels": "pass it in as an argument: a kernel file must run unchanged with AWS's SDK",
    "hardware": "hardware is the bottom: move the code that needs it up",
    "machine": "the machine knows nothing of nki, operators or kernels: pass the value in",
    "reference": "the reference is NumPy only and independent of what it judges",
}


@dataclasses.dataclass(frozen=True)
class Import:
    """One imported name: the module, with the name appended when it may be a module itself."""

    module: str
    name: str | None
    line: int
    late: bool


def room_of(module: str) -> Room | None:
    """Return the room of a dotted module name: the row with the longest matching prefix."""
    best: tuple[int, Room] | None = None
    for room in ROOMS:
        for root in room.modules:
            inside = module == root or (not room.exact and module.startswith(root + "."))
            if inside and (best is None or len(root) > best[0]):
                best = (len(root), room)
    return None if best is None else best[1]


def module_of(path: str) -> str:
    """Return the dotted name under which a file is imported."""
    inner = path.removeprefix(EMBEDDED).removesuffix(".py").removesuffix("/__init__")
    return inner.replace("/", ".")


def imports_of(tree: ast.Module, package: str) -> Iterator[Import]:
    """Yield every import in a module; ``package`` resolves the relative ones."""
    late_nodes = {
        id(node)
        for outer in ast.walk(tree)
        if isinstance(outer, ast.FunctionDef | ast.AsyncFunctionDef | ast.If)
        and (not isinstance(outer, ast.If) or ast.unparse(outer.test) == "TYPE_CHECKING")
        for node in ast.walk(outer)
    }
    for node in ast.walk(tree):
        late = id(node) in late_nodes
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield Import(alias.name, None, node.lineno, late)
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                parts = package.split(".")
                parts = parts[: len(parts) - (node.level - 1)]
                base = ".".join([*parts, base] if base else parts)
            for alias in node.names:
                yield Import(base, alias.name, node.lineno, late)


def problem(room: Room, item: Import) -> str | None:
    """Say why ``room`` may not import ``item``, and what to do; None if it may."""
    full = item.module if item.name is None else f"{item.module}.{item.name}"
    if full == "nki_kernels.embedded" or full.startswith("nki_kernels.embedded."):
        return "gives nki a second identity; import nki"
    top = item.module.partition(".")[0]
    if top in sys.stdlib_module_names:
        return None
    # `from nki_kernels import machine` imports a room; `from nki_kernels import __version__` not.
    target = room_of(full) or room_of(item.module)
    if target is not None:
        if target.name in room.may:
            return None
        fix = FIX.get(room.name, "turn the dependency round, or pass the value in")
        return f"{room.name} may import {', '.join(sorted(room.may))}; {fix}"
    if top in room.packages or (item.late and top in room.late):
        return None
    if top in room.late:
        return f"{room.name} may import {top} only inside a function; move it there"
    allowed = ", ".join(sorted(room.packages)) or "no third-party package"
    return f"{room.name} may import {allowed}; do without it, or add a row with the reason"


def violations(path: str, text: str) -> list[str]:
    """All arrows of one file that point the wrong way."""
    module = module_of(path)
    room = room_of(module)
    if room is None:
        return [f"{path}: belongs to no room; add a row to ROOMS in tests/repo/test_imports.py"]
    package = module if path.endswith("/__init__.py") else module.rpartition(".")[0]
    found = []
    for item in imports_of(ast.parse(text), package):
        reason = problem(room, item)
        if reason is not None:
            name = item.module if item.name is None else f"{item.module}.{item.name}"
            found.append(f"{path}:{item.line}: imports {name}: {reason}")
    return found


def test_every_arrow_points_the_right_way() -> None:
    found = [line for path, text in python_files() for line in violations(path, text)]
    assert not found, "\n" + "\n".join(found)


@pytest.mark.parametrize(
    ("path", "text"),
    [
        ("nki_kernels/hardware/spec.py", "from nki_kernels.machine import trace"),
        ("nki_kernels/hardware/spec.py", "import numpy as np"),
        ("nki_kernels/machine/core.py", "import nki.isa"),
        ("nki_kernels/machine/core.py", "from nki_kernels import operators"),
        ("nki_kernels/machine/core.py", "from ..operators import matmul"),
        ("nki_kernels/machine/core.py", "def f():\n    import nki_kernels.profiler"),
        ("nki_kernels/machine/core.py", "from nki_kernels.embedded.nki import isa"),
        ("nki_kernels/embedded/nki/isa/dma.py", "from nki_kernels.kernels.matmul import kernel"),
        ("nki_kernels/embedded/nki/jit.py", "import torch"),
        ("nki_kernels/kernels/matmul/kernel.py", "from nki_kernels.hardware import spec"),
        ("nki_kernels/kernels/matmul/kernel.py", "import nki_kernels"),
        ("nki_kernels/kernels/matmul/kernel.py", "import numpy as np"),
        ("nki_kernels/operators/matmul.py", "from reference import matmul"),
        ("nki_kernels/operators/matmul.py", "from tests.tolerance import allowed"),
        ("nki_kernels/operators/matmul.py", "import bench"),
        ("nki_kernels/operators/matmul.py", "def f():\n    import torch"),
        ("nki_kernels/operators/matmul.py", "from nki_kernels import ops"),
        ("nki_kernels/profiler/html.py", "import nki_kernels.operators"),
        ("nki_kernels/torch_ops/norm.py", "from nki_kernels.torch_ops import neuron"),
        ("nki_kernels/torch_ops/norm.py", "def f():\n    import torch_neuronx"),
        ("nki_kernels/torch_ops/norm.py", "import nki_kernels.kernels.norm"),
        ("nki_kernels/toolchain.py", "import nki_kernels.operators"),
        ("nki_kernels/newroom/a.py", ""),
        ("reference/matmul.py", "import scipy"),
        ("reference/matmul.py", "from nki_kernels.machine import dtypes"),
        ("reference/matmul.py", "from tests import tolerance"),
        ("bench/__main__.py", "import pandas"),
        ("bench/__main__.py", "import torch"),
    ],
)
def test_a_wrong_arrow_is_reported(path: str, text: str) -> None:
    assert len(violations(path, text)) == 1


@pytest.mark.parametrize(
    ("path", "text"),
    [
        ("nki_kernels/machine/core.py", "from nki_kernels.hardware.spec import Engine"),
        ("nki_kernels/machine/core.py", "from .trace import Event\nfrom . import trace"),
        ("nki_kernels/machine/__init__.py", "from .trace import Event"),
        ("nki_kernels/embedded/nki/__init__.py", "from nki.language import add\nimport numpy"),
        ("nki_kernels/embedded/nki/jit.py", "def f():\n    import torch"),
        ("nki_kernels/embedded/nki/jit.py", "if TYPE_CHECKING:\n    import torch"),
        ("nki_kernels/kernels/matmul/k.py", "import nki.isa as nisa\nimport dataclasses"),
        ("nki_kernels/kernels/matmul/k.py", "from nki_kernels.kernels.shared import evict"),
        ("nki_kernels/operators/matmul.py", "from nki_kernels.kernels.matmul import kernel"),
        ("nki_kernels/torch_ops/norm.py", "import torch\nfrom nki_kernels import ops"),
        ("nki_kernels/torch_ops/neuron.py", "def f():\n    import torch_neuronx"),
        ("nki_kernels/toolchain.py", "from nki_kernels._version import __version__"),
        ("bench/__main__.py", "from reference import matmul\nimport nki_kernels.profiler, rich"),
    ],
)
def test_a_right_arrow_is_not_reported(path: str, text: str) -> None:
    assert violations(path, text) == []


def test_all_wrong_arrows_are_reported_with_their_lines() -> None:
    text = "import nki\n\nfrom nki_kernels import kernels\n"
    first, second = violations("nki_kernels/machine/core.py", text)
    assert first.startswith("nki_kernels/machine/core.py:1: imports nki: machine may import ")
    assert second.startswith("nki_kernels/machine/core.py:3: imports nki_kernels.kernels: ")
    assert second.endswith("pass the value in")
