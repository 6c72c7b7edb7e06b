"""The public operations: contract, config choice and launch of each, and real model shapes."""

from __future__ import annotations

from nki_kernels.operators.attention import ATTENTION, CAUSAL_ATTENTION, WINDOW_ATTENTION
from nki_kernels.operators.attention_backward import (
    ATTENTION_BACKWARD,
    CAUSAL_ATTENTION_BACKWARD,
)
from nki_kernels.operators.attention_chunk import ATTENTION_CHUNKED_PREFILL
from nki_kernels.operators.attention_decode import DECODES
from nki_kernels.operators.attention_varlen import ATTENTION_VARLEN, CAUSAL_ATTENTION_VARLEN
from nki_kernels.operators.contract import Operator
from nki_kernels.operators.dispatch import COMBINE, DISPATCH
from nki_kernels.operators.experts import EXPERTS
from nki_kernels.operators.group_norm import GROUP_NORM
from nki_kernels.operators.grouped import GROUPED_MATMUL
from nki_kernels.operators.linear import LINEAR, LINEAR_BACKWARD, LINEAR_KN
from nki_kernels.operators.matmul import MATMULS
from nki_kernels.operators.matmul_fp8 import MATMUL_FP8, MATMUL_FP8_NT
from nki_kernels.operators.merge import MERGE_ATTENTION
from nki_kernels.operators.mla import MLA_DECODES
from nki_kernels.operators.mlp import GATED_MLP, GATED_MLP_KN
from nki_kernels.operators.mlp_backward import MLP_BACKWARDS
from nki_kernels.operators.norm import LAYER_NORM, RMS_NORM
from nki_kernels.operators.norm_backward import LAYER_NORM_BACKWARD, RMS_NORM_BACKWARD
from nki_kernels.operators.norm_variants import NORM_VARIANTS
from nki_kernels.operators.projection import NORM_LINEARS, QKV_PROJECTIONS
from nki_kernels.operators.rope import ROPES
from nki_kernels.operators.router import ROUTER

#: Every operator by name. Tests, benchmarks and torch ops are generated from this table.
OPERATORS: dict[str, Operator] = {
    op.name: op
    for op in (
        *MATMULS.values(),
        MATMUL_FP8,
        MATMUL_FP8_NT,
        LINEAR,
        LINEAR_KN,
        LINEAR_BACKWARD,
        GATED_MLP,
        GATED_MLP_KN,
        *MLP_BACKWARDS.values(),
        *NORM_LINEARS.values(),
        *QKV_PROJECTIONS.values(),
        RMS_NORM,
        LAYER_NORM,
        RMS_NORM_BACKWARD,
        LAYER_NORM_BACKWARD,
        *NORM_VARIANTS,
        GROUP_NORM,
        *ROPES.values(),
        *DECODES.values(),
        ATTENTION_CHUNKED_PREFILL,
        *MLA_DECODES.values(),
        MERGE_ATTENTION,
        ATTENTION,
        CAUSAL_ATTENTION,
        WINDOW_ATTENTION,
        ATTENTION_VARLEN,
        CAUSAL_ATTENTION_VARLEN,
        ATTENTION_BACKWARD,
        CAUSAL_ATTENTION_BACKWARD,
        ROUTER,
        DISPATCH,
        COMBINE,
        GROUPED_MATMUL,
        EXPERTS,
    )
}
