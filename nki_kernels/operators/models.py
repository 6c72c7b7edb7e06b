"""Published models by their sizes, of which the registry of shapes is made."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class Model:
    """The sizes of one published model, from its configuration file on its model page.

    Attributes:
        hidden: width of the residual stream.
        intermediate: width of the MLP, or of one expert.
        gated: the MLP has a gate beside `up` (SwiGLU), fused into one matmul of twice the width.
        experts, top_k: routed experts and how many a token uses (0: a dense MLP).
        decodes: a generative model (an encoder has no decode phase).
        norm: operator that normalises the residual stream.
        qk_norm: each query and key head is normalised as well.
    """

    name: str
    hidden: int
    intermediate: int
    heads: int
    kv_heads: int
    head_dim: int
    vocabulary: int
    gated: bool = True
    experts: int = 0
    top_k: int = 0
    decodes: bool = True
    norm: str = "rms_norm"
    qk_norm: bool = False


MODELS: tuple[Model, ...] = (
    Model(
        name="llama3-8b", hidden=4096, intermediate=14336,
        heads=32, kv_heads=8, head_dim=128, vocabulary=128256,
    ),
    Model(
        name="llama3-70b", hidden=8192, intermediate=28672,
        heads=64, kv_heads=8, head_dim=128, vocabulary=128256,
    ),
    Model(
        name="qwen3-8b", hidden=4096, intermediate=12288,
        heads=32, kv_heads=8, head_dim=128, vocabulary=151936, qk_norm=True,
    ),
    Model(
        name="qwen3-30b-a3b", hidden=2048, intermediate=768,
        heads=32, kv_heads=4, head_dim=128, vocabulary=151936, experts=128, top_k=8,
        qk_norm=True,
    ),
    Model(
        name="mixtral-8x7b", hidden=4096, intermediate=14336,
        heads=32, kv_heads=8, head_dim=128, vocabulary=32000, experts=8, top_k=2,
    ),
    Model(
        name="gpt-oss-20b", hidden=2880, intermediate=2880,
        heads=64, kv_heads=8, head_dim=64, vocabulary=201088, experts=32, top_k=4,
    ),
    Model(
        name="minilm-l6", hidden=384, intermediate=1536,
        heads=12, kv_heads=12, head_dim=32, vocabulary=30522, gated=False, decodes=False,
        norm="layer_norm",
    ),
)  # fmt: skip
