"""Configs found by ``python -m bench tune``, one JSON file per target.

They are data for whoever passes a config by name; a launch without one takes the operator's own
choice, which is measured against them (its regret).
"""

from __future__ import annotations

import dataclasses
import json
from functools import cache
from pathlib import Path
from typing import Any

from nki_kernels.hardware import spec_for
from nki_kernels.operators.contract import Axes, Operator


def file_of(target: str) -> Path:
    """Return the file that holds the configs of a target."""
    return Path(__file__).with_name(f"{target}.json")


@cache
def tuned_cases(target: str) -> dict[str, Any]:
    """Return config, tuned and heuristic time by "operator sizes dtype"; empty if never tuned."""
    path = file_of(target)
    if not path.is_file():
        return {}
    return dict(json.loads(path.read_text(encoding="utf-8"))["cases"])


def case_key(op: Operator, axes: Axes, dtype: str) -> str:
    """Return the name of a problem in the files: sizes in the operator's order."""
    return f"{op.name} {'x'.join(str(axes[letter]) for letter in op.axis_order)} {dtype}"


def tuned_config(op: Operator, axes: Axes, dtype: str, target: str) -> Any:
    """Return the tuned config of exactly this problem, or None where nothing better is known."""
    found = tuned_cases(target).get(case_key(op, axes, dtype))
    if found is None:
        return None
    return dataclasses.replace(op.configure(axes, dtype, spec_for(target)), **found["config"])
