"""Every rule of the linter: kernels it must name, at the right place, and twins it must pass."""

from __future__ import annotations

import textwrap

import pytest

import nki_kernels  # noqa: F401  (puts the embedded nki on the path)
from nki_kernels.lint import RULES, Finding, lint_source
from tests.child import REPO

HEAD = """
import nki
import nki.isa as nisa
import nki.language as nl
"""


def lint(text: str) -> list[Finding]:
    """Findings of a file: `text` below the three imports; line 1 is the first of `text`."""
    found = lint_source(HEAD.strip() + "\n" + textwrap.dedent(text).strip("\n"))
    return [Finding(f.path, f.line - 3, f.column, f.rule, f.severity, f.message) for f in found]


def kernel(*lines: str, parameters: str = "x") -> str:
    body = "\n".join(f"    {line}" for text in lines for line in text.splitlines())
    return f"@nki.jit\ndef kernel({parameters}):\n{body}\n"


REGISTER = "r = nisa.register_alloc(3)"
TILE = "t = nl.ndarray((8, 8), dtype=nl.float32, buffer=nl.sbuf)"
PSUM = "t = nl.ndarray((8, 8), dtype=nl.float32, buffer=nl.psum)"
OUT = "out = nl.ndarray((8, 8), dtype=nl.float32, buffer=nl.shared_hbm)"

#: Rule, text, line and column of the finding, a part of its message.
BAD = [
    ("register-in-python", kernel(REGISTER, "if r:\n    pass"), (4, 8), "register 'r' steers"),
    ("register-in-python", kernel(REGISTER, "while r:\n    pass"), (4, 11), "nl.while_loop"),
    ("register-in-python", kernel(REGISTER, "n = int(r)"), (4, 13), "run time"),
    (
        "register-in-python",
        kernel(REGISTER, "for i in range(r):\n    pass"),
        (4, 20),
        "steers Python",
    ),
    ("register-in-python", kernel(REGISTER, "y = r < 2"), (4, 9), "nl.fori_loop"),
    ("register-in-python", kernel(REGISTER, "y = x and not r"), (4, 19), "scalar_offset"),
    ("register-in-python", kernel(REGISTER, "y = 1 if r else 2"), (4, 14), "register"),
    (
        "register-in-python",
        kernel("def body(i):\n    if i == 0:\n        pass", "nl.fori_loop(0, 4, body)"),
        (4, 12),
        "register 'i'",
    ),
    ("dynamic-range", kernel("for i in nl.dynamic_range(4):\n    pass"), (3, 14), "nl.fori_loop"),
    ("unknown-name", kernel("y = nl.arange(4)"), (3, 9), "no 'arange' in NKI 0.6; use slices"),
    ("unknown-name", kernel("nisa.tensor_cpoy(dst=x, src=x)"), (3, 5), "no 'tensor_cpoy'"),
    ("unknown-name", kernel("y = nki.nothing"), (3, 9), "nki has no 'nothing'"),
    ("arguments", kernel("nisa.reciprocal(x)"), (3, 5), "reciprocal: missing a required argument"),
    ("arguments", kernel("nisa.memset(dst=x, value=0, mask=x)"), (3, 5), "'mask'"),
    ("plain-constant", kernel("nisa.memset(dst=x, value=0, engine=2)"), (3, 40), "nisa.engine"),
    (
        "plain-constant",
        kernel("y = nl.ndarray((4, 4), nl.int8, buffer='sbuf')"),
        (3, 44),
        "nl.sbuf",
    ),
    ("output-buffer", kernel(TILE, "return t"), (4, 12), "'t' is returned and lies in sbuf"),
    ("output-buffer", kernel(TILE, "return x, t[0:4]"), (4, 15), "nl.shared_hbm"),
    (
        "output-buffer",
        kernel(OUT.replace("shared_hbm", "private_hbm"), "return out"),
        (4, 12),
        "private_hbm",
    ),
    ("output-buffer", kernel("t = nl.ndarray((8, 8), nl.int8)", "return t"), (4, 12), "sbuf"),
    ("dma-from-psum", kernel(PSUM, "nisa.dma_copy(dst=x, src=t[:, 0:4])"), (4, 30), "src 't[:, 0"),
    ("dma-from-psum", kernel(PSUM, "nisa.dma_copy(t, x)"), (4, 19), "dst 't' is in PSUM"),
    ("assignment-into-tensor", kernel(TILE, "t[0:4] = x"), (4, 5), "assignment to 't[0:4]'"),
    ("assignment-into-tensor", kernel(TILE, "t += 1"), (4, 5), "nisa.tensor_copy(dst=...)"),
    ("tensor-in-python", kernel(TILE, "if t:\n    pass"), (4, 8), "tensor 't' as a condition"),
    ("tensor-in-python", kernel(TILE, "while t[0, 0] > 1:\n    pass"), (4, 11), "register"),
    (
        "loop-body",
        kernel("def body(i):\n    return i", "nl.fori_loop(0, 4, body)"),
        (4, 9),
        "returns a value",
    ),
    (
        "loop-body",
        kernel(REGISTER, "def body(i):\n    pass", "nl.while_loop(r, body_fun=body)"),
        (4, 5),
        "returns no register",
    ),
    ("loop-body", kernel("nl.fori_loop(0, 4, x(1))"), (3, 24), "the body is called"),
    ("is-operator", kernel("y = x is None"), (3, 9), "use =="),
    ("is-operator", kernel("y = x is not None"), (3, 9), "use !="),
    ("keyword-only", kernel("pass", parameters="x, *, flag"), (2, 18), "flag not by position"),
    ("keyword-only", kernel("pass", parameters="*x, **y"), (2, 13), "x, y not by position"),
    ("list-argument", kernel("pass", parameters="x, y=[1]"), (2, 17), "use a tuple"),
    ("list-argument", kernel("pass", parameters="x: list[int]"), (2, 12), "x is a list"),
    ("python-subset", kernel("yield x"), (3, 5), "a generator"),
    ("python-subset", kernel("y = [i for i in x]"), (3, 9), "a list comprehension"),
    ("python-subset", kernel("try:\n    pass\nfinally:\n    pass"), (3, 5), "try"),
    ("python-subset", kernel("with x:\n    pass"), (3, 5), "nl.no_reorder"),
    ("python-subset", kernel("global y"), (3, 5), "pure functions"),
    ("python-subset", kernel("import os"), (3, 5), "an import"),
    ("dict-key", kernel("y = {1: x}"), (3, 10), "dict key 1"),
    ("dict-key", kernel("y = {(1, 2): x}"), (3, 10), "strings"),
    ("class-base", "class A:\n    pass\n" + kernel("y = A()"), (1, 1), "inherits from nothing"),
    (
        "class-base",
        "class A(nl.NKIObject, tuple):\n    pass\n" + kernel("y = A()"),
        (1, 1),
        "nl.NKIObject, tuple",
    ),
    ("nested-kernel", kernel("pass") + "@nki.jit\ndef f(x):\n    kernel(x)", (6, 5), "undecorated"),
    ("jit-keyword", "@nki.jit(mode='trace')\ndef f(x):\n    pass", (1, 2), "leave it out"),
    ("deprecated", kernel("for i in nl.affine_range(4):\n    pass"), (3, 14), "use range"),
]

GOOD = [
    ("register-in-python", kernel(REGISTER, "y = r is None", "r = 3", "if r:\n    pass")),
    ("register-in-python", kernel(REGISTER, "nisa.register_move(dst=r, src=4)")),
    # The name means a register in the body only.
    (
        "register-in-python",
        kernel(
            "def body(i):\n    nisa.register_store(dst=x, src=i)",
            "for i in range(4):\n    if i > 1:\n        pass",
            "nl.fori_loop(0, 4, body)",
        ),
    ),
    ("dynamic-range", "def host():\n    return range(4)\n" + kernel("pass")),
    ("unknown-name", kernel("y = nl.float32, nl.tile_size.pmax, nisa.engine.vector, nki.isa")),
    ("unknown-name", kernel("y = x.nothing.at_all")),
    ("arguments", kernel("nisa.memset(x, 0)", "nisa.memset(*x)", "nisa.memset(**x)")),
    ("plain-constant", kernel("nisa.memset(dst=x, value=0, engine=nisa.engine.vector)")),
    ("output-buffer", kernel(OUT, "return out")),
    ("output-buffer", kernel("return x")),
    # Called by another kernel of the file: it is inlined there.
    ("output-buffer", kernel(TILE, "return t") + "@nki.jit\ndef f(x):\n    y = kernel(x)\n"),
    ("output-buffer", "def helper():\n    " + TILE + "\n    return t\n" + kernel("y = helper()")),
    ("dma-from-psum", kernel(TILE, "nisa.dma_copy(dst=x, src=t)")),
    ("assignment-into-tensor", kernel("tiles = []", TILE, "tiles += [t]", "d = {}", "d['t'] = t")),
    ("assignment-into-tensor", kernel(TILE, "u = t[0:4]", "t = x")),
    ("tensor-in-python", kernel(TILE, "if t == None:\n    pass", "if t.shape[0] > 4:\n    pass")),
    ("loop-body", kernel("def body(i):\n    return", "nl.fori_loop(0, 4, body)")),
    ("loop-body", kernel(REGISTER, "def body(i):\n    return i", "nl.while_loop(r, body)")),
    ("is-operator", kernel("y = x == None")),
    ("keyword-only", "def host(*, x):\n    pass\n" + kernel("pass", parameters="x, y=1")),
    ("list-argument", kernel("y = [1, 2]", parameters="x: tuple, y=(1, 2)")),
    ("python-subset", kernel("with nl.no_reorder():\n    pass", "y = f'{x}'", "assert x")),
    ("python-subset", "def host():\n    yield 1\n" + kernel("pass")),
    ("dict-key", kernel("y = {'a': x}", "z = {x: 1}")),
    ("class-base", "class A(nl.NKIObject):\n    pass\n" + kernel("y = A()")),
    ("class-base", "class A:\n    pass\n" + kernel("pass")),
    ("nested-kernel", "def g(x):\n    pass\n" + kernel("g(x)")),
    ("jit-keyword", "@nki.jit()\ndef f(x):\n    pass"),
    ("deprecated", kernel("for i in range(4):\n    y = nisa.engine.vector")),
]


@pytest.mark.parametrize(("rule", "text", "place", "words"), BAD)
def test_named_at_its_place(rule, text, place, words):
    found = [f for f in lint(text) if f.rule == rule]
    assert [(f.line, f.column) for f in found][:1] == [place], found
    assert words in found[0].message
    assert found[0].severity == RULES[rule].severity.value


@pytest.mark.parametrize(("rule", "text"), GOOD)
def test_not_named(rule, text):
    assert [f for f in lint(text) if f.rule == rule] == []


@pytest.mark.parametrize("module", ["nki", "nki.language", "nki.isa.constants"])
def test_the_old_namespace(module):
    old = "neuron" + "xcc." + module
    found = lint(f"import {old} as nl\n")
    assert [(f.rule, f.line, f.severity) for f in found] == [("old-namespace", 1, "error")]
    found = lint(f"from {old} import thing\n")
    assert found[0].message == f"{old}.thing is the namespace of NKI 0.1; import it from nki"
    assert lint("import neuronxcc_nki\nfrom neuron" + "xcc import starfish\n") == []


def test_every_rule_has_a_source_a_text_and_cases():
    assert {rule for rule, *_ in BAD} | {"old-namespace"} == set(RULES)
    assert {rule for rule, _ in GOOD} | {"old-namespace"} == set(RULES)
    for rule in RULES.values():
        assert rule.source
        assert rule.check.__doc__


def test_names_are_followed_through_every_kind_of_import():
    text = (
        "from nki.isa import register_alloc as alloc\nfrom nki import language\n"
        "@nki.jit\ndef k(x):\n    r = alloc(1)\n    if r:\n        language.arange(r)\n"
    )
    assert [f.rule for f in lint(text)] == ["register-in-python", "unknown-name"]
    plain = "import nki.isa\n@nki.jit\ndef k(x):\n    nki.isa.nothing(x)\n"
    assert [f.rule for f in lint_source(plain)] == ["unknown-name"]


def test_kernel_code_is_what_kernels_reach_and_helpers_of_others():
    helper = "def helper(x):\n    y = x is None\n"
    user = "def other(x):\n    nisa.memset(dst=x, value=0)\n    helper(x)\n"
    assert lint(helper) == []
    assert [f.rule for f in lint(helper + user)] == ["is-operator"]
    assert [f.rule for f in lint(helper + kernel("helper(x)"))] == ["is-operator"]
    assert lint(helper + kernel("pass")) == []
    assert [f.rule for f in lint(helper + "run = nki.jit(helper)\n")] == ["is-operator"]
    methods = "class A(nl.NKIObject):\n    def f(self):\n        return self is None\n"
    assert [f.rule for f in lint(methods + kernel("A().f()"))] == ["is-operator"]


def test_a_file_that_is_not_python():
    (found,) = lint_source("def f(:\n", "k.py")
    assert str(found) == "k.py:1:7: error [syntax] not Python: invalid syntax"


def test_the_readme_lists_the_rules_as_declared():
    readme = (REPO / "nki_kernels" / "lint" / "README.md").read_text()
    rows = [line for line in readme.splitlines() if line.startswith("| `")]
    assert rows == [
        f"| `{r.name}` | {r.severity.value} | {' '.join((r.check.__doc__ or '').split())} "
        f"| {r.source} |"
        for r in RULES.values()
    ]
