"""A kernel file as the rules read it: its kernel code, what its names mean, what its locals are."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cached_property

Function = ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda
_DEFINITIONS = (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda)
#: Device loops and the position of their body function.
LOOPS = {"nki.language.fori_loop": 2, "nki.language.while_loop": 1}
BODY = "body_fun"


@dataclass
class Scope:
    """One function and what its own assignments bind.

    Attributes:
        node: the function.
        parent: the function around it.
        kinds: a local name to what is bound to it, each binding one entry: "register",
            "tensor <buffer>" or "other".
    """

    node: Function
    parent: Scope | None
    kinds: dict[str, list[str]] = field(default_factory=dict)

    def kind(self, name: str) -> str:
        """What `name` is wherever this function reads it; "other" unless every binding agrees."""
        scope: Scope | None = self
        while scope is not None:
            if name in scope.kinds:
                bound = set(scope.kinds[name])
                return bound.pop() if len(bound) == 1 else "other"
            scope = scope.parent
        return "other"

    def kind_of(self, node: ast.AST) -> str:
        """The kind of an expression: of the name it is, or "other"."""
        return self.kind(node.id) if isinstance(node, ast.Name) else "other"

    def buffer_of(self, node: ast.AST) -> str:
        """The buffer of a tensor, or of a slice of one, that this function allocated; else ""."""
        while isinstance(node, ast.Subscript):
            node = node.value
        what, _, buffer = self.kind_of(node).partition(" ")
        return buffer if what == "tensor" else ""

    def nodes(self) -> Iterator[ast.AST]:
        """Every node of this function that is not in a function inside it."""
        body = self.node.body if isinstance(self.node.body, list) else [self.node.body]
        pending: list[ast.AST] = list(reversed(body))
        while pending:
            node = pending.pop()
            yield node
            if not isinstance(node, _DEFINITIONS):
                pending.extend(reversed(list(ast.iter_child_nodes(node))))


class Source:
    """One Python file.

    Kernel code is what a function decorated with ``nki.jit`` (or passed to ``nki.jit`` or
    ``nki.simulate``) reaches by name inside the file; in a file without any, what the functions
    reach that mention ``nki``: they are helpers of kernels elsewhere.
    """

    def __init__(self, path: str, text: str) -> None:
        self.path = path
        self.tree = ast.parse(text)
        self.aliases = _aliases(self.tree)
        self.definitions: dict[str, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef] = {
            node.name: node
            for node in ast.walk(self.tree)
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef)
        }

    def dotted(self, node: ast.AST | None) -> str:
        """The full name of what `node` refers to (``nki.isa.dma_copy``), "" if it is no name."""
        if isinstance(node, ast.Attribute):
            base = self.dotted(node.value)
            return f"{base}.{node.attr}" if base else ""
        if isinstance(node, ast.Name):
            return self.aliases.get(node.id, node.id)
        return ""

    @cached_property
    def jitted(self) -> dict[str, ast.FunctionDef | ast.AsyncFunctionDef]:
        """The kernels of the file by name."""
        wrapped = {
            argument.id
            for call in ast.walk(self.tree)
            if isinstance(call, ast.Call) and self.dotted(call.func) in ("nki.jit", "nki.simulate")
            for argument in call.args
            if isinstance(argument, ast.Name)
        }
        return {
            name: node
            for name, node in self.definitions.items()
            if not isinstance(node, ast.ClassDef)
            and (name in wrapped or any(self.is_jit(d) for d in node.decorator_list))
        }

    def is_jit(self, decorator: ast.expr) -> bool:
        """True for ``nki.jit`` and ``nki.jit(...)``."""
        called = decorator.func if isinstance(decorator, ast.Call) else decorator
        return self.dotted(called) == "nki.jit"

    @cached_property
    def kernel_code(self) -> list[ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef]:
        """The definitions that run while a kernel is built."""
        pending: list[str] = list(self.jitted)
        if not pending:
            pending = [n for n, d in self.definitions.items() if self._mentions_nki(d)]
        reached: dict[str, None] = {}
        while pending:
            name = pending.pop()
            if name not in reached:
                reached[name] = None
                used = (n.id for n in ast.walk(self.definitions[name]) if isinstance(n, ast.Name))
                pending.extend(u for u in used if u in self.definitions)
        order = [d for n, d in self.definitions.items() if n in reached]
        inside = {id(n) for d in order for n in ast.walk(d) if n is not d}
        return [d for d in order if id(d) not in inside]

    def _mentions_nki(self, node: ast.AST) -> bool:
        return any(
            isinstance(n, ast.Attribute)
            and self.dotted(n).startswith(("nki.isa.", "nki.language."))
            for n in ast.walk(node)
        )

    def walk(self) -> Iterator[ast.AST]:
        """Every node of the kernel code, without signatures' annotations and decorators."""
        for scope in self.scopes:
            yield from scope.nodes()

    def calls(self) -> Iterator[tuple[Scope, ast.Call, str]]:
        """Every call in the kernel code with the full name of what it calls."""
        for scope in self.scopes:
            for node in scope.nodes():
                if isinstance(node, ast.Call):
                    yield scope, node, self.dotted(node.func)

    @cached_property
    def bodies(self) -> dict[str, str]:
        """Functions of the kernel code passed to a device loop, to the loop's name."""
        found = {}
        for definition in self.kernel_code:
            for node in ast.walk(definition):
                if not isinstance(node, ast.Call):
                    continue
                loop = self.dotted(node.func)
                body = argument(node, LOOPS.get(loop, -1), BODY) if loop in LOOPS else None
                if isinstance(body, ast.Name):
                    found[body.id] = loop
        return found

    @cached_property
    def scopes(self) -> list[Scope]:
        """Every function of the kernel code, outer before inner."""
        found: list[Scope] = []
        for definition in self.kernel_code:
            if isinstance(definition, ast.ClassDef):
                methods = [n for n in definition.body if isinstance(n, ast.FunctionDef)]
                for method in methods:
                    self._open(method, None, found)
            else:
                self._open(definition, None, found)
        return found

    def _open(self, function: Function, parent: Scope | None, found: list[Scope]) -> None:
        scope = Scope(function, parent)
        found.append(scope)
        name = getattr(function, "name", "")
        # A body in the same file may be called from Python as well; its only parameter is then
        # whatever the device loop passes, which is a register.
        kind = "register" if name in self.bodies else "other"
        for parameter in _parameters(function):
            scope.kinds.setdefault(parameter.arg, []).append(kind)
        inner: list[Function] = []
        for node in scope.nodes():
            if isinstance(node, _DEFINITIONS):
                inner.append(node)
            self._bind(scope, node)
        for one in inner:
            self._open(one, scope, found)

    def _bind(self, scope: Scope, node: ast.AST) -> None:
        if isinstance(node, ast.Assign) and len(node.targets) == 1:
            target = node.targets[0]
            if isinstance(target, ast.Name):
                scope.kinds.setdefault(target.id, []).append(self._kind(node.value))
                self._seen.add(id(target))  # the name node itself comes by later
        elif isinstance(node, ast.AugAssign):
            self._seen.add(id(node.target))  # changes what is bound, binds nothing new
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            if id(node) not in self._seen:
                scope.kinds.setdefault(node.id, []).append("other")
        elif isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            scope.kinds.setdefault(node.name, []).append("other")

    @cached_property
    def _seen(self) -> set[int]:
        return set()

    def _kind(self, value: ast.expr) -> str:
        if not isinstance(value, ast.Call):
            return "other"
        called = self.dotted(value.func)
        if called == "nki.isa.register_alloc":
            return "register"
        if called == "nki.language.ndarray":
            return f"tensor {self.buffer_name(argument(value, 2, 'buffer'))}"
        return "other"

    def buffer_name(self, node: ast.expr | None) -> str:
        """``sbuf`` for ``nl.sbuf`` and for nothing, the default; "unknown" for a variable."""
        if node is None:
            return "sbuf"
        module, _, name = self.dotted(node).rpartition(".")
        return name if module == "nki.language" else "unknown"


def argument(call: ast.Call, position: int, name: str) -> ast.expr | None:
    """The argument of a call by position or keyword, None if it is not given."""
    for keyword in call.keywords:
        if keyword.arg == name:
            return keyword.value
    plain = not any(isinstance(a, ast.Starred) for a in call.args)
    return call.args[position] if plain and 0 <= position < len(call.args) else None


def _parameters(function: Function) -> list[ast.arg]:
    args = function.args
    extra = [a for a in (args.vararg, args.kwarg) if a is not None]
    return [*args.posonlyargs, *args.args, *args.kwonlyargs, *extra]


def _aliases(tree: ast.Module) -> dict[str, str]:
    """Local names of what is imported, wherever in the file, to their full names."""
    found = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                if alias.asname is not None:
                    found[alias.asname] = alias.name
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            for alias in node.names:
                found[alias.asname or alias.name] = f"{node.module}.{alias.name}"
    return found
