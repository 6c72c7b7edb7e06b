"""What the tracer rejects, or every frontend: severity error."""

from __future__ import annotations

import ast
import functools
import importlib
import inspect
from collections.abc import Iterator
from types import ModuleType
from typing import Any

from nki_kernels.lint.rule import Severity, Violation, rule
from nki_kernels.lint.source import BODY, LOOPS, Source, argument

_STEERS = frozenset({"int", "float", "bool", "range", "len", "min", "max"})
_STEERED = (
    "register {!r} steers Python; its value exists only at run time; use nl.fori_loop or "
    "nl.while_loop, or pass it as scalar_offset"
)
_CONDITION = (
    "tensor {!r} as a condition; its values exist only on the device; load one into a register for "
    "nl.while_loop, or pass the choice as a compile-time argument"
)
_MODULES = ("nki", "nki.isa", "nki.language", "nki.collectives", "nki.typing")
_CHECKED = ("nki.isa.", "nki.language.", "nki.collectives.")
#: What took the place of a removed name.
_INSTEAD = {
    "arange": "slices, nl.ds or .ap()",
    "mgrid": "slices, nl.ds or .ap()",
    "par_dim": "the first dimension, which is the partition dimension",
    "spmd_dim": "the launch's core count",
    "tensor_copy_dynamic_src": "tensor_copy with src.ap(..., scalar_offset=...)",
    "tensor_copy_dynamic_dst": "tensor_copy with dst.ap(..., scalar_offset=...)",
}
_ENUMS = frozenset({"engine", "dge_mode", "oob_mode", "dma_engine", "reduce_cmd", "perf_mode"})


@rule(Severity.error, "aws-neuron-sdk, nki/api: VirtualRegister (tracer frontend: TypeError)")
def register_in_python(source: Source) -> Iterator[Violation]:
    """A register steers Python: ``if``, ``while``, ``int()``, ``range()``, a comparison."""
    for scope in source.scopes:
        for node in scope.nodes():
            used: list[ast.expr] = []
            if isinstance(node, ast.If | ast.While | ast.IfExp | ast.Assert):
                used = [node.test]
            elif isinstance(node, ast.BoolOp):
                used = node.values
            elif isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.Not):
                used = [node.operand]
            elif isinstance(node, ast.Compare):
                used = [node.left, *node.comparators]
                # `reg is None` looks at no value.
                if all(isinstance(op, ast.Is | ast.IsNot) for op in node.ops):
                    used = []
            elif isinstance(node, ast.Call) and source.dotted(node.func) in _STEERS:
                used = node.args
            for one in used:
                if scope.kind_of(one) == "register":
                    yield one, _STEERED.format(ast.unparse(one))


@rule(Severity.error, "aws-neuron-sdk, nki/migration 0.5.0 to 0.6.0; VirtualRegister")
def dynamic_range(source: Source) -> Iterator[Violation]:
    """``nl.dynamic_range``: deprecated in 0.6, of no use under the tracer."""
    for _, call, name in source.calls():
        if name == "nki.language.dynamic_range":
            yield call, "nl.dynamic_range works in the parser frontend only; use nl.fori_loop"


@rule(Severity.error, "aws-neuron-sdk, nki/migration 0.3.0 to 0.4.0: a compilation error")
def old_namespace(source: Source) -> Iterator[Violation]:
    """Anything of the package that NKI was part of before 0.2."""
    old = "neuron" + "xcc.nki"
    for node in ast.walk(source.tree):
        names: list[str] = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        for name in names:
            if f"{name}.".startswith(f"{old}."):
                yield node, f"{name} is the namespace of NKI 0.1; import it from nki"


@functools.cache
def _public(name: str) -> Any:
    """What the embedded nki has under a full name; None if it has nothing."""
    module, _, last = name.rpartition(".")
    if name in _MODULES:
        try:
            return importlib.import_module(name)
        except ModuleNotFoundError:
            return None
    parent = _public(module) if module else None
    return None if parent is None else getattr(parent, last, None)


@rule(Severity.error, "the published API of NKI 0.6, as the embedded nki has it")
def unknown_name(source: Source) -> Iterator[Violation]:
    """A name that NKI does not have: removed, misspelt, or newer than 0.6."""
    for node in source.walk():
        if not isinstance(node, ast.Attribute):
            continue
        name = source.dotted(node)
        module, _, last = name.rpartition(".")
        if module not in _MODULES or last == "dynamic_range" or name in _MODULES:
            continue
        if isinstance(_public(module), ModuleType) and _public(name) is None:
            instead = _INSTEAD.get(last)
            advice = f"use {instead}" if instead else "see nki_kernels/embedded/README.md"
            yield node, f"{module} has no {last!r} in NKI 0.6; {advice}"


@rule(Severity.error, "the published signatures of NKI 0.6, as the embedded nki has them")
def arguments(source: Source) -> Iterator[Violation]:
    """A call of an NKI function that its signature does not take (no ``dst``, ``mask=``)."""
    for _, call, name in source.calls():
        function = _public(name) if name.startswith(_CHECKED) else None
        given = [k.arg for k in call.keywords]
        if None in given or any(isinstance(a, ast.Starred) for a in call.args):
            continue
        if function is None or not inspect.isfunction(inspect.unwrap(function)):
            continue
        try:
            inspect.signature(function).bind(*call.args, **{str(k): None for k in given})
        except TypeError as error:
            yield call, f"{name.rpartition('.')[2]}: {error}; see its signature in NKI 0.6"


@rule(Severity.error, "aws-neuron-sdk, nki/migration 0.2.0 to 0.3.0: enum constants, buffer names")
def plain_constant(source: Source) -> Iterator[Violation]:
    """An integer where an enumeration belongs, a string where a buffer does."""
    for _, call, name in source.calls():
        if not name.startswith("nki."):
            continue
        for keyword in call.keywords:
            value = keyword.value.value if isinstance(keyword.value, ast.Constant) else None
            number = isinstance(value, int) and not isinstance(value, bool)
            if keyword.arg in _ENUMS and number:
                yield keyword.value, f"{keyword.arg}={value!r}; use a member of nisa.{keyword.arg}"
            if keyword.arg == "buffer" and isinstance(value, str):
                yield keyword.value, f"buffer={value!r}; use the object nl.{value}"


@rule(Severity.error, "aws-neuron-sdk, nki/migration 0.2.0 to 0.3.0: outputs in nl.shared_hbm")
def output_buffer(source: Source) -> Iterator[Violation]:
    """A kernel returns a tensor that it did not allocate in ``nl.shared_hbm``."""
    called = {name for _, call, name in source.calls()}
    for scope in source.scopes:
        name = getattr(scope.node, "name", "")
        # A kernel that another one calls may hand it a tile.
        if source.jitted.get(name) is not scope.node or name in called:
            continue
        for node in scope.nodes():
            if not isinstance(node, ast.Return) or node.value is None:
                continue
            many = isinstance(node.value, ast.Tuple | ast.List)
            for value in node.value.elts if many else [node.value]:  # type: ignore[attr-defined]
                buffer = scope.buffer_of(value)
                if buffer not in ("", "unknown", "shared_hbm"):
                    what = f"{ast.unparse(value)!r} is returned and lies in {buffer}"
                    yield value, f"{what}; a launch returns tensors of buffer=nl.shared_hbm"


@rule(Severity.error, "aws-neuron-sdk, nki/migration 0.2.0 to 0.3.0: dma_copy, reading from PSUM")
def dma_from_psum(source: Source) -> Iterator[Violation]:
    """A DMA reads or writes PSUM."""
    for scope, call, name in source.calls():
        if name not in ("nki.isa.dma_copy", "nki.isa.dma_transpose"):
            continue
        for position, operand in enumerate(("dst", "src")):
            value = argument(call, position, operand)
            if value is not None and scope.buffer_of(value) == "psum":
                what = f"{name.rpartition('.')[2]}: {operand} {ast.unparse(value)!r} is in PSUM"
                yield value, f"{what}, which DMA does not reach; copy to SBUF with tensor_copy"


@rule(Severity.error, "aws-neuron-sdk, nki/migration 0.1.0 to 0.2.0: explicit dst")
def assignment_into_tensor(source: Source) -> Iterator[Violation]:
    """``tile[...] = x`` and ``tile += x``: an instruction writes its ``dst`` and nothing else."""
    for scope in source.scopes:
        for node in scope.nodes():
            targets: list[ast.expr] = []
            if isinstance(node, ast.Assign):
                targets = [t for t in node.targets if isinstance(t, ast.Subscript)]
            elif isinstance(node, ast.AugAssign):
                targets = [node.target]
            for target in targets:
                if scope.buffer_of(target):
                    what = f"assignment to {ast.unparse(target)!r}, a tensor"
                    yield target, f"{what}; write it with an instruction: nisa.tensor_copy(dst=...)"


@rule(Severity.error, "aws-neuron-sdk, nki/get-started: NKI Language Guide, Tensor Values")
def tensor_in_python(source: Source) -> Iterator[Violation]:
    """A tensor as a condition: its values exist only on the device."""
    for scope in source.scopes:
        for node in scope.nodes():
            if isinstance(node, ast.If | ast.While | ast.IfExp | ast.Assert):
                test = node.test
                operands = [test.left, *test.comparators] if isinstance(test, ast.Compare) else []
                plain = isinstance(test, ast.Compare) and all(
                    isinstance(op, ast.Lt | ast.LtE | ast.Gt | ast.GtE) for op in test.ops
                )
                for one in operands if plain else [test]:
                    if scope.buffer_of(one):
                        yield one, _CONDITION.format(ast.unparse(one))


@rule(Severity.error, "aws-neuron-sdk, nki/api: nki.language.fori_loop, while_loop")
def loop_body(source: Source) -> Iterator[Violation]:
    """A body of ``nl.fori_loop`` returns a value, or one of ``nl.while_loop`` returns none."""
    for _, call, name in source.calls():
        body = argument(call, LOOPS[name], BODY) if name in LOOPS else None
        if isinstance(body, ast.Call):
            yield body, f"nl.{name.rpartition('.')[2]}: the body is called; pass the function"
    for scope in source.scopes:
        loop = source.bodies.get(getattr(scope.node, "name", ""))
        returns = [n for n in scope.nodes() if isinstance(n, ast.Return)]
        valued = [n for n in returns if n.value is not None and not _is_none(n.value)]
        if loop == "nki.language.fori_loop":
            for node in valued:
                yield node, "the body of nl.fori_loop returns a value; carry state in SBUF or HBM"
        elif loop == "nki.language.while_loop" and not valued:
            yield scope.node, "the body of nl.while_loop returns no register: the next condition"


def _is_none(node: ast.expr) -> bool:
    return isinstance(node, ast.Constant) and node.value is None
