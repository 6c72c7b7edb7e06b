"""The 14 problems of NKIBench as shapes of our operators, where there is one.

NKIBench (AccelOpt, arXiv 2511.15915; github.com/zhang677/AccelOpt, folder NKIBench) takes its
problems from language models; all are float32.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

#: The dtype of every problem.
DTYPE = "float32"


@dataclass(frozen=True, slots=True)
class Problem:
    """One problem.

    Attributes:
        name: NKIBench's name; ours is "nkibench:<name>".
        sizes: NKIBench's sizes, in its letters.
        formula: the mathematics.
        op: our operator; None where there is none yet.
        axes: the sizes in the operator's letters.
        differs: what our operator does otherwise, in words.
    """

    name: str
    sizes: str
    formula: str
    op: str | None = None
    axes: Mapping[str, int] | None = None
    differs: str = ""

    @property
    def shape(self) -> str:
        """The name in the registry of shapes."""
        return f"nkibench:{self.name}"


PROBLEMS: tuple[Problem, ...] = (
    Problem(
        "matmul", "M4096 N12288 K5120", "x w",
        "matmul", {"M": 4096, "N": 12288, "K": 5120},
    ),
    Problem(
        "bmm", "B16 M4096 K64 N4096", "x w, per batch",
        "bmm", {"B": 16, "M": 4096, "N": 4096, "K": 64},
    ),
    Problem(
        "transpose_matmul", "M4096 K2048 N10944", "x^T w",
        "matmul_tn", {"M": 4096, "N": 10944, "K": 2048},
    ),
    Problem(
        "rope_single_freq_apply", "B1 H64 N4096 D128", "rotary embedding of pairs",
        "rope", {"B": 1, "H": 64, "S": 4096, "D": 128, "F": 64},
        "rows are tokens and all heads share cos and sin; there each has its own",
    ),
    Problem("bmm_softmax", "B16 M4096 K64 N4096", "softmax(x w), per batch"),
    Problem(
        "gqa_full", "B1 N4096 QH16 KH8 D128", "softmax(q k^T / sqrt(D)) v",
        "attention", {"B": 1, "H": 16, "G": 8, "M": 4096, "N": 4096, "D": 128, "E": 128},
        "heads are before tokens; there they are after",
    ),
    Problem(
        "swiglu", "M4096 N3072 K1024", "(silu(x wg) * (x wu)) wd",
        "gated_mlp_kn", {"T": 4096, "H": 1024, "I": 3072},
    ),
    Problem("lora", "M4096 N12288 K5120 R128", "x w + (x a) b"),
    Problem("rmsnorm_matmul", "M4096 N2048 K1024", "rms_norm(x) w"),
    Problem("add_rmsnorm_matmul", "M4096 N2048 K1024", "(rms_norm(x + z) * g) w"),
    Problem("matmul_add_rmsnorm", "M4096 N2048 K2048", "rms_norm(x w + z) * g"),
    Problem("silu", "M4096 N7168", "x / (1 + exp(-x))"),
    Problem("mamba", "M7168 C256 S16", "selective scan"),
    Problem("adamw", "M10944 N2048", "one step of AdamW"),
)  # fmt: skip
