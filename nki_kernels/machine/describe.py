"""What an instruction's declaration says, in words: for `help()` and for the generated pages."""

from __future__ import annotations

import inspect
from typing import TYPE_CHECKING

from nki_kernels.hardware.spec import Engine

if TYPE_CHECKING:
    from nki_kernels.machine.instruction import Instruction

_ENGINE = {
    Engine.tensor: "Tensor", Engine.vector: "Vector", Engine.scalar: "Scalar",
    Engine.gpsimd: "GpSimd", Engine.dma: "DMA", Engine.sync: "Sync",
}  # fmt: skip
_LABELS = {"buffers": "Buffers", "sizes": "Sizes", "dtypes": "Dtypes", "rules": "Rules"}
_UNSTATED = {"dtypes": "any that no other rule excludes"}


def engine_names(engines: tuple[Engine, ...]) -> str:
    """Return the engines as the architecture guides write them, the default one first."""
    return ", ".join(_ENGINE[e] for e in engines)


def since(ins: Instruction) -> int:
    """Return the first generation that has the instruction."""
    return max([2, *(rule.since() for rule in ins.rules)])


def cost(ins: Instruction) -> str:
    """Return what the declaration says about the cost."""
    return ins.source.partition("; cost: ")[2] or "see source"


def source(ins: Instruction) -> str:
    """Return the document the meaning and the rules come from."""
    return ins.source.partition("; cost: ")[0]


def facts(ins: Instruction) -> list[tuple[str, str]]:
    """Return (label, text) for engines, operands, rules, cost and source, in that order."""
    engines = engine_names(ins.engines)
    chosen = ins.default.__doc__
    if chosen:
        engines += f" ({chosen.strip().splitlines()[0].rstrip('.')})"
    reads = (*ins.reads, f"{ins.many} (a list)") if ins.many else ins.reads
    found = [
        ("Engines", engines),
        ("Generations", f"from gen{since(ins)} on"),
        ("Reads", _operands(reads)),
        ("Writes", _operands(ins.writes)),
    ]
    if ins.updates:
        found.append(("Keeps", f"the elements of {_operands(ins.updates)} that it does not write"))
    for about, label in _LABELS.items():
        texts = [_rule(str(rule), rule.check) for rule in ins.rules if rule.about == about]
        text = "; ".join(texts) or _UNSTATED.get(about, "")
        if text:
            found.append((label, text))
    return [*found, ("Cost", cost(ins)), ("Source", source(ins))]


def docstring(ins: Instruction) -> str:
    """Return the block's docstring with the declaration's facts below it."""
    lines = [inspect.cleandoc(ins.body.__doc__ or ""), ""]
    lines += [f"{label}: {text}." for label, text in facts(ins)]
    return "\n".join(lines)


def _operands(names: tuple[str, ...]) -> str:
    return ", ".join(f"`{name}`" if " " not in name else name for name in names) or "nothing"


def _rule(text: str, check: str) -> str:
    """Name the check of a rule that users switch on its own."""
    return text if check in ("operands", "buffer") else f"{text} (check `{check}`)"
