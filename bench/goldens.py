"""``python -m bench goldens``: the modelled times of our kernels, as checked in.

A difference is a change of the model or of a kernel, and both need a reason: rerun with ``--write
REASON``, which is kept in the file beside the times, and so in the commit that changes them.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from bench.entries import ENTRIES
from bench.record import BenchError, write_text
from nki_kernels.machine.timeline import MODEL_VERSION
from nki_kernels.operators.contract import supports
from nki_kernels.operators.shapes import DEFAULTS, parse

FILE = Path(__file__).with_name("goldens.json")
TARGETS = ("trn2", "trn3")
#: The first of these that an operator takes.
DTYPES = ("bfloat16", "float8_e4m3")


def figures() -> Iterator[tuple[str, dict[str, float | int]]]:
    """Yield (operator shape dtype target, {ns, instructions}) for every default shape."""
    for entry in ENTRIES.values():
        for shape in DEFAULTS[entry.op.name]:
            case = parse(entry.op, shape)
            dtype = next(name for name in DTYPES if supports(entry.op, name))
            inputs = entry.shapes_only(case.axes, dtype)
            options = entry.op.options_of(case.axes)
            for target in TARGETS:
                run = entry.op.launch(inputs, options, target=target)
                name = f"{entry.op.name} {case.name} {dtype} {target}"
                # A tenth of a nanosecond: less than a cycle of any engine.
                ns = round(run.time().total_ns, 1)
                yield name, {"ns": ns, "instructions": len(run.trace)}


def read(path: Path = FILE) -> dict[str, Any]:
    """Read the checked-in figures.

    Raises:
        BenchError: the file is missing or is not one of ours.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(content["model"], str) or not isinstance(content["figures"], dict):
            raise TypeError
    except FileNotFoundError:
        raise BenchError(f"{path} does not exist; write it with --write") from None
    except (ValueError, KeyError, TypeError):
        raise BenchError(
            f"{path} is no file of modelled times; write it anew with --write"
        ) from None
    return dict(content)


def write(found: dict[str, dict[str, float | int]], reason: str, path: Path = FILE) -> None:
    """Replace the checked-in figures, whole or not at all.

    Raises:
        BenchError: the reason says nothing.
    """
    if not reason.strip():
        raise BenchError("--write: the reason is empty; say in a sentence why the times change")
    content = {"model": MODEL_VERSION, "reason": reason.strip(), "figures": found}
    write_text(path, json.dumps(content, indent=1, sort_keys=True) + "\n")


def differences(found: dict[str, dict[str, float | int]], stored: dict[str, Any]) -> list[str]:
    """Return one line per figure that is not as checked in."""
    lines = []
    if stored["model"] != MODEL_VERSION:
        lines.append(f"model version: checked in {stored['model']}, now {MODEL_VERSION}")
    old = stored["figures"]
    for name in sorted(found.keys() | old.keys()):
        before, now = old.get(name), found.get(name)
        if before is None or now is None:
            lines.append(f"{name}: {'new' if before is None else 'gone'}")
        elif before != now:
            change = 100 * (now["ns"] / before["ns"] - 1)
            lines.append(
                f"{name}: {before['ns']} ns, {before['instructions']} instructions; now "
                f"{now['ns']} ns ({change:+.2f} %), {now['instructions']} instructions"
            )
    return lines
