"""Start a child Python, for tests of what happens on import, on exit or in another directory."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

REPO = Path(__file__).resolve().parent.parent
# What decides the toolchain, the target or the path must not leak in from whoever runs the tests.
_CLEARED = (
    "NKI_KERNELS_TOOLCHAIN",
    "NEURON_PLATFORM_TARGET_OVERRIDE",
    "NKI_SIMULATOR",
    "PYTHONPATH",
    "PYTHONSAFEPATH",
)


def run_python(
    args: Sequence[str],
    *,
    cwd: Path,
    path: Sequence[Path] = (REPO,),
    env: Mapping[str, str] | None = None,
    python: str = sys.executable,
) -> subprocess.CompletedProcess[str]:
    """Run ``python args...`` with ``path`` as PYTHONPATH; never raises for a non-zero exit."""
    full = {name: value for name, value in os.environ.items() if name not in _CLEARED}
    full["PYTHONPATH"] = os.pathsep.join(str(entry) for entry in path)
    full.update(env or {})
    return subprocess.run(
        [python, *args], cwd=cwd, env=full, capture_output=True, text=True, timeout=300, check=False
    )
