"""What the parser frontend rejects (the default up to NKI 0.6), and what is going: info."""

from __future__ import annotations

import ast
from collections.abc import Iterator

from nki_kernels.lint.rule import Severity, Violation, rule
from nki_kernels.lint.source import Source

_GUIDE = "aws-neuron-sdk, nki/get-started: NKI Language Guide"
#: Statements and expressions that the guide's list of what the language has leaves out.
_OUTSIDE: dict[type[ast.AST], str] = {
    ast.Yield: "a generator",
    ast.YieldFrom: "a generator",
    ast.Await: "await",
    ast.AsyncFunctionDef: "an async function",
    ast.AsyncFor: "async for",
    ast.AsyncWith: "async with",
    ast.Try: "try",
    ast.Match: "match",
    ast.Global: "global: kernels are pure functions of their arguments",
    ast.Nonlocal: "nonlocal: carry state in a list, an object, SBUF or HBM",
    ast.NamedExpr: "an assignment expression",
    ast.ListComp: "a list comprehension",
    ast.SetComp: "a set comprehension",
    ast.DictComp: "a dict comprehension",
    ast.GeneratorExp: "a generator expression",
    ast.Set: "a set",
    ast.Delete: "del",
    ast.Import: "an import inside a kernel",
    ast.ImportFrom: "an import inside a kernel",
}
_DEPRECATED = {
    "nki.language.affine_range": "use range",
    "nki.language.sequential_range": "use range",
    "nki.language.static_range": "use range",
    "nki.language.tile_size.psum_fmax": "use the byte sizes of nl.tile_size",
    "nki.language.tile_size.total_available_sbuf_size": "use the byte sizes of nl.tile_size",
    "nki.isa.tensor_engine": "use nisa.engine.tensor",
    "nki.isa.vector_engine": "use nisa.engine.vector",
    "nki.isa.scalar_engine": "use nisa.engine.scalar",
    "nki.isa.gpsimd_engine": "use nisa.engine.gpsimd",
    "nki.isa.activation_reduce": "use nisa.activation with reduce_op and reduce_res",
}
_BASES = frozenset({"nki.language.NKIObject", "enum.Enum"})


@rule(Severity.info, "aws-neuron-sdk, nki/migration 0.2.0 to 0.3.0: is, is not")
def is_operator(source: Source) -> Iterator[Violation]:
    """``is`` and ``is not``."""
    for node in source.walk():
        if isinstance(node, ast.Compare):
            for op in node.ops:
                if isinstance(op, ast.Is | ast.IsNot):
                    word = "is" if isinstance(op, ast.Is) else "is not"
                    instead = "==" if word == "is" else "!="
                    yield node, f"{word!r}: the parser frontend has no identity; use {instead}"


@rule(Severity.info, "aws-neuron-sdk, nki/migration 0.2.0 to 0.3.0: keyword-only separator")
def keyword_only(source: Source) -> Iterator[Violation]:
    """A bare ``*``, ``*args`` or ``**kwargs`` in the signature of a kernel."""
    for name, kernel in source.jitted.items():
        args = kernel.args
        odd = [*args.kwonlyargs, *(a for a in (args.vararg, args.kwarg) if a is not None)]
        if odd:
            names = ", ".join(a.arg for a in odd)
            yield odd[0], f"kernel {name!r}: {names} not by position; use plain parameters"


@rule(Severity.info, "aws-neuron-sdk, nki/migration 0.2.0 to 0.3.0: list kernel arguments")
def list_argument(source: Source) -> Iterator[Violation]:
    """A kernel takes a list: as a default, or by its annotation."""
    for name, kernel in source.jitted.items():
        args = kernel.args
        for default in [*args.defaults, *(d for d in args.kw_defaults if d is not None)]:
            if isinstance(default, ast.List):
                yield default, f"kernel {name!r}: a list as an argument; use a tuple"
        for one in [*args.posonlyargs, *args.args, *args.kwonlyargs]:
            noted = one.annotation
            base = noted.value if isinstance(noted, ast.Subscript) else noted
            if source.dotted(base) in ("list", "typing.List"):
                yield one, f"kernel {name!r}: {one.arg} is a list; use a tuple"


@rule(Severity.info, f"{_GUIDE}, NKI Values, Control Flow")
def python_subset(source: Source) -> Iterator[Violation]:
    """Python that the language guide does not list."""
    for node in source.walk():
        what = _OUTSIDE.get(type(node))
        if what is not None:
            yield node, f"{what}; not in the parser frontend's subset of Python"
        elif isinstance(node, ast.With):
            names = [source.dotted(getattr(i.context_expr, "func", None)) for i in node.items]
            if names != ["nki.language.no_reorder"]:
                yield node, "with; the parser frontend has it for nl.no_reorder() only"


@rule(Severity.info, f"{_GUIDE}, NKI Values")
def dict_key(source: Source) -> Iterator[Violation]:
    """A dict key that is plainly no string."""
    for node in source.walk():
        for key in filter(None, node.keys) if isinstance(node, ast.Dict) else ():
            number = isinstance(key, ast.Constant) and not isinstance(key.value, str)
            if number or isinstance(key, ast.Tuple):
                yield key, f"dict key {ast.unparse(key)}; the parser frontend's are strings"


@rule(Severity.info, f"{_GUIDE}, Class Support, Enumerations")
def class_base(source: Source) -> Iterator[Violation]:
    """A class of kernel code that inherits from something else than NKIObject or Enum."""
    for definition in source.kernel_code:
        if isinstance(definition, ast.ClassDef):
            bases = [source.dotted(base) for base in definition.bases]
            if len(bases) != 1 or bases[0] not in _BASES:
                shown = ", ".join(map(ast.unparse, definition.bases)) or "nothing"
                what = f"class {definition.name} inherits from {shown}"
                yield definition, f"{what}; the parser frontend takes nl.NKIObject or Enum alone"


@rule(Severity.info, "aws-neuron-sdk, nki/migration 0.1.0 to 0.2.0: decorator on sub-kernels")
def nested_kernel(source: Source) -> Iterator[Violation]:
    """A kernel calls another one that is decorated."""
    for _, call, name in source.calls():
        callee = source.jitted.get(name)
        if callee is not None and any(source.is_jit(d) for d in callee.decorator_list):
            yield call, f"{name} is decorated with nki.jit; share an undecorated function"


@rule(
    Severity.info, "aws-neuron-sdk, nki/migration 0.2.0 to 0.3.0: nki.jit(mode=, platform_target=)"
)
def jit_keyword(source: Source) -> Iterator[Violation]:
    """``nki.jit(mode=...)`` and ``platform_target=``: ignored since 0.3."""
    for kernel in source.jitted.values():
        for decorator in kernel.decorator_list:
            if isinstance(decorator, ast.Call) and source.is_jit(decorator):
                for keyword in decorator.keywords:
                    if keyword.arg in ("mode", "platform_target"):
                        yield decorator, f"nki.jit({keyword.arg}=...) is ignored; leave it out"


@rule(Severity.info, "aws-neuron-sdk, nki/migration and nki/api: deprecations up to 0.6")
def deprecated(source: Source) -> Iterator[Violation]:
    """A name that a release announced to remove."""
    for node in source.walk():
        if isinstance(node, ast.Attribute):
            name = source.dotted(node)
            if name in _DEPRECATED:
                yield node, f"{name} is deprecated; {_DEPRECATED[name]}"
