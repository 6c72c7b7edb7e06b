"""Settings of every test run: one BLAS thread per worker, and the Hypothesis profiles."""

from __future__ import annotations

import os

# Before NumPy is imported: its BLAS reads these once. Two workers on two cores with two threads
# each run slower than with one, and the order of a threaded sum would depend on the machine.
for _name in ("OPENBLAS_NUM_THREADS", "OMP_NUM_THREADS", "MKL_NUM_THREADS"):
    os.environ.setdefault(_name, "1")

from hypothesis import HealthCheck, settings

# Wall-clock limits measure the machine, not the code.
_common = settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.register_profile("dev", _common, max_examples=50)
settings.register_profile(
    "ci", _common, max_examples=50, derandomize=True, database=None, print_blob=True
)
settings.register_profile("long", _common, max_examples=2000)
# `--hypothesis-profile NAME` on the command line goes before this.
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "dev"))
