"""The house rules that ruff and mypy do not know, each a function from a file to its violations.

All violations of all files are reported at once. Every rule has a text that it must reject.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Callable, Iterator

import pytest

from tests.repo.source import python_files, text_files

MAX_FILE, MAX_FUNCTION, MAX_PARAMETERS = 500, 80, 14
# Files that may raise NotImplementedError, with the reason.
NOT_IMPLEMENTED: dict[str, str] = {}
# Written in two pieces, so that this file does not break its own rules.
MACHINE_PATHS = re.compile(r"(?<![\w.<>*}{])/" + r"(?:work|tmp|root|home|Users|opt|mnt|private)/")
MARKERS = re.compile(r"\b(?:TO" + r"DO|FIX" + r"ME|X" + r"XX|HA" + r"CK)\b")
REGISTRY = re.compile(r"\bpypi\.|python" + r"hosted|npm" + r"js\.|ana" + r"conda\.|index" + r"-url")
REGISTRIES_NAMED = re.compile(
    r"--(?:extra-)?index" + r"-url[ =]"
    r"https://(?:pip\.repos\.neuron\.amazonaws\.com|download\.pytorch\.org/whl/cpu)(?![\w/.])"
)
HARDWARE = frozenset({(int, 128), (int, 512), (int, 2048)})
CLOSENESS = frozenset(
    {"allclose", "isclose", "assert_allclose", "assert_close", "assert_almost_equal", "approx"}
)
TOLERANCES = frozenset({"rtol", "atol", "rel_tol", "abs_tol", "rel", "abs", "decimal", "delta"})

Rule = Callable[[str, ast.Module], Iterator[tuple[int, str]]]


def in_library(path: str) -> bool:
    return path.startswith("nki_kernels/")


# --- rules on text -------------------------------------------------------------------------------


def text_violations(path: str, text: str) -> list[str]:
    """Machine paths, registry hosts, markers of unfinished work."""
    found = []
    for number, line in enumerate(text.splitlines(), 1):
        if match := MACHINE_PATHS.search(line):
            found.append(f"{path}:{number}: machine path {match[0]}; use a relative path")
        if match := REGISTRY.search(REGISTRIES_NAMED.sub("", line)):
            found.append(
                f"{path}:{number}: package registry {match[0]}; leave it to pip's configuration"
            )
        if match := MARKERS.search(line):
            found.append(f"{path}:{number}: {match[0]}; do it, or file an issue")
    return found


# --- rules on Python -----------------------------------------------------------------------------


def no_assert(path: str, tree: ast.Module) -> Iterator[tuple[int, str]]:
    """No assert outside the tests: python -O removes it, and it tells a user nothing."""
    if path.startswith("tests/"):
        return
    for node in ast.walk(tree):
        if isinstance(node, ast.Assert):
            yield node.lineno, "assert; raise an error of nki_kernels/machine/errors.py"


def no_unfinished_code(path: str, tree: ast.Module) -> Iterator[tuple[int, str]]:
    """No NotImplementedError in the library, unless listed."""
    if not in_library(path) or path in NOT_IMPLEMENTED:
        return
    for node in ast.walk(tree):
        if isinstance(node, ast.Name) and node.id == "NotImplementedError":
            yield node.lineno, "NotImplementedError; implement it, or list the file with a reason"


def no_hardware_literals(path: str, tree: ast.Module) -> Iterator[tuple[int, str]]:
    """No 128, 512 or 2048 in a kernel: nl.tile_size has them, and the toy core has others."""
    if not path.startswith("nki_kernels/kernels/"):
        return
    for node in ast.walk(tree):
        # The type as well: 512.0 is no size.
        if isinstance(node, ast.Constant) and (type(node.value), node.value) in HARDWARE:
            yield node.lineno, f"hardware number {node.value!r}; use nl.tile_size"


def no_catch_all(path: str, tree: ast.Module) -> Iterator[tuple[int, str]]:
    """No except that catches everything and goes on; one that cleans up and re-raises may."""
    for node in ast.walk(tree):
        if isinstance(node, ast.ExceptHandler) and not (
            isinstance(node.body[-1], ast.Raise) and node.body[-1].exc is None
        ):
            kinds = node.type.elts if isinstance(node.type, ast.Tuple) else [node.type]
            for kind in kinds:
                name = "" if kind is None else ast.unparse(kind)
                if name in ("", "Exception", "BaseException"):
                    yield node.lineno, f"except {name or 'of everything'}; name what is expected"


def no_typed_tolerances(path: str, tree: ast.Module) -> Iterator[tuple[int, str]]:
    """No tolerance typed by hand, and none taken from a comparison's defaults."""
    if not path.startswith(("tests/", "bench/", "reference/")):
        return
    ours = _names_from_tests(tree) | {"tolerance.assert_close"}
    for node in ast.walk(tree):
        if isinstance(node, ast.keyword) and node.arg in TOLERANCES:
            numbers = [n.value for n in ast.walk(node.value) if isinstance(n, ast.Constant)]
            if any(isinstance(value, float) or value not in (0, None) for value in numbers):
                yield node.value.lineno, f"literal {node.arg}=; compute it (tests/tolerance.py)"
        elif isinstance(node, ast.Call):
            function = ast.unparse(node.func)
            name = function.rpartition(".")[2]
            given = {keyword.arg for keyword in node.keywords} & TOLERANCES
            if name in CLOSENESS and len(given) < 2 and function not in ours:
                yield node.lineno, f"{name}() with default tolerances; use tests/tolerance.py"


def _names_from_tests(tree: ast.Module) -> set[str]:
    """Names that this module imports from tests: our own comparisons, not a library's."""
    return {
        alias.asname or alias.name
        for node in ast.walk(tree)
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("tests")
        for alias in node.names
    } | {node.name for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)}


def limits(path: str, tree: ast.Module) -> Iterator[tuple[int, str]]:
    """Functions and signatures of a size that one can read."""
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            first = min([node.lineno, *(deco.lineno for deco in node.decorator_list)])
            lines = (node.end_lineno or first) - first + 1
            if lines > MAX_FUNCTION:
                yield first, f"{node.name} has {lines} lines; at most {MAX_FUNCTION}; split it"
            args = [*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs]
            count = len(args)
            # An instruction's operands are the published ones, behind its context; the functions
            # of `functional.py` are drop-ins for others'.
            drop_in = path == "nki_kernels/torch_ops/functional.py"
            published = drop_in or (bool(args) and args[0].arg == "ctx")
            if count > MAX_PARAMETERS and not published:
                what = f"{node.name} has {count} parameters"
                yield first, f"{what}; at most {MAX_PARAMETERS}; group them in a frozen config"


def future_annotations(path: str, tree: ast.Module) -> Iterator[tuple[int, str]]:
    """Annotations are never evaluated: a kernel's `nt.tensor[128, 512]` must cost nothing."""
    code = [node for node in tree.body if not isinstance(node, ast.Expr)]
    if code and not any(isinstance(n, ast.ImportFrom) and n.module == "__future__" for n in code):
        yield 1, "no `from __future__ import annotations`; add it"


RULES: tuple[Rule, ...] = (
    no_assert,
    no_unfinished_code,
    no_hardware_literals,
    no_catch_all,
    no_typed_tolerances,
    limits,
    future_annotations,
)


def python_violations(path: str, text: str, rules: tuple[Rule, ...] = RULES) -> list[str]:
    found = []
    count = len(text.splitlines())
    if count > MAX_FILE:
        found.append(f"{path}: {count} lines; at most {MAX_FILE}; split it")
    tree = ast.parse(text)
    for rule in rules:
        found += [f"{path}:{line}: {what}" for line, what in rule(path, tree)]
    return found


def test_the_house_rules_hold() -> None:
    found = [line for path, text in text_files() for line in text_violations(path, text)]
    found += [line for path, text in python_files() for line in python_violations(path, text)]
    assert not found, "\n" + "\n".join(found)


def test_every_listed_exception_exists() -> None:
    paths = {path for path, _ in python_files()}
    assert set(NOT_IMPLEMENTED) <= paths


# --- the rules themselves ------------------------------------------------------------------------


@pytest.mark.parametrize(
    "text",
    [
        "see /" + "work/main/x.py",
        'path = "/' + 'tmp/x"',
        "`/" + "home/someone/.cache`",
        "https://py" + "pi.org/simple",
        "pip install --index" + "-url https://mirror.example/simple x",
        "--extra-index" + "-url https://pip.repos.neuron.amazonaws.com.evil.example",
        "# TO" + "DO: later",
    ],
)
def test_a_bad_text_is_reported(text: str) -> None:
    assert len(text_violations("README.md", text)) == 1


@pytest.mark.parametrize(
    "text",
    [
        "pip install nki --extra-index" + "-url https://pip.repos.neuron.amazonaws.com",
        "pip install torch --index" + "-url https://download.pytorch.org/whl/cpu",
        "see ../shared/design.md and nki_kernels/home/x.py and https://x.example/home/y",
        "$root/" + "home/x",
    ],
)
def test_a_good_text_is_not_reported(text: str) -> None:
    assert text_violations("README.md", text) == []


@pytest.mark.parametrize(
    ("rule", "path", "text"),
    [
        (no_assert, "nki_kernels/a.py", "assert x"),
        (no_assert, "bench/a.py", "def f():\n    assert x, 'y'"),
        (no_unfinished_code, "nki_kernels/a.py", "raise NotImplementedError"),
        (no_unfinished_code, "nki_kernels/a.py", "raise NotImplementedError('x')"),
        (no_hardware_literals, "nki_kernels/kernels/m/k.py", "x = 128"),
        (no_hardware_literals, "nki_kernels/kernels/m/k.py", "def f(n=512): pass"),
        (no_hardware_literals, "nki_kernels/kernels/m/k.py", "y = x[:2048]"),
        (no_catch_all, "nki_kernels/a.py", "try:\n    x\nexcept:\n    pass"),
        (no_catch_all, "tests/a.py", "try:\n    x\nexcept Exception as e:\n    pass"),
        (no_catch_all, "bench/a.py", "try:\n    x\nexcept (OSError, BaseException):\n    pass"),
        (no_typed_tolerances, "tests/a.py", "f(a, b, rtol=1e-3)"),
        (no_typed_tolerances, "tests/a.py", "f(a, b, atol=2 * 1e-3 * scale)"),
        (no_typed_tolerances, "tests/a.py", "np.allclose(a, b)"),
        (no_typed_tolerances, "tests/a.py", "torch.testing.assert_close(a, b)"),
        (no_typed_tolerances, "tests/a.py", "x == pytest.approx(y)"),
        (limits, "bench/a.py", "def f():\n" + "    x\n" * 80),
        (limits, "bench/a.py", f"def f({', '.join(f'a{i}' for i in range(15))}): pass"),
        (future_annotations, "tests/a.py", "import os"),
    ],
)
def test_a_broken_rule_is_reported(rule: Rule, path: str, text: str) -> None:
    assert len(python_violations(path, text, (rule,))) == 1


@pytest.mark.parametrize(
    ("rule", "path", "text"),
    [
        (no_assert, "tests/a.py", "assert x"),
        (no_hardware_literals, "nki_kernels/kernels/m/k.py", "x = 127 + 1.0 + True"),
        (no_hardware_literals, "nki_kernels/hardware/spec.py", "x = 128"),
        (no_catch_all, "nki_kernels/a.py", "try:\n    x\nexcept (OSError, ValueError):\n    pass"),
        (no_typed_tolerances, "tests/a.py", "np.testing.assert_allclose(a, b, rtol=0, atol=bound)"),
        (no_typed_tolerances, "tests/a.py", "from tests.tolerance import approx\napprox(a)"),
        (no_catch_all, "bench/a.py", "try:\n    x\nexcept BaseException:\n    y\n    raise"),
        (future_annotations, "tests/a.py", '"""Only words."""'),
        (limits, "bench/a.py", "def f():\n" + "    x\n" * 79),
    ],
)  # fmt: skip
def test_a_kept_rule_is_not_reported(rule: Rule, path: str, text: str) -> None:
    assert python_violations(path, text, (rule,)) == []


def test_a_long_file_is_reported() -> None:
    assert python_violations("bench/a.py", "x\n" * 500, ()) == []
    (line,) = python_violations("bench/a.py", "x\n" * 501, ())
    assert line == "bench/a.py: 501 lines; at most 500; split it"
