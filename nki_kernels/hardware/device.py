"""What is assumed of real hardware where results are compared with a reference."""

from __future__ import annotations

#: Relative error of one activation function on the Scalar engine. The documents give none: the
#: functions are piecewise polynomials, and AWS's own tests compare them at 2e-2. One bfloat16
#: spacing is this project's estimate, to be replaced by what `bench device` measures.
ACTIVATION_ERROR = 2.0**-8
