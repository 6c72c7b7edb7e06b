"""Which of AWS's kernels stands beside which of our operators, at which sizes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from bench import peer_calls as calls

SDK = "sdk"


@dataclass(frozen=True, slots=True, kw_only=True)
class Peer:
    """One of AWS's kernels as the peer of one of our operators.

    Attributes:
        name: of AWS's kernel.
        op: our operator.
        module: below ``nkilib``, or for the tutorials a file below ``nki/examples``.
        call: makes the arguments.
        shapes: of our operator, in its axis order; what both are timed at by default.
        lncs: core counts the kernel runs on.
        differs: in what the two do not do the same.
        source: the checkout it is in: "library" or "sdk".
        device: what was published for hardware, by shape.
    """

    name: str
    op: str
    module: str
    call: calls.Call
    shapes: tuple[str, ...]
    lncs: tuple[int, ...] = (1, 2)
    differs: str = ""
    source: str = "library"
    device: Mapping[str, str] = field(default_factory=dict)


_TUTORIAL = "matrix_multiplication/matrix_multiplication_nki_kernels.py"
#: AWS's tutorial, measured on trn1 in bfloat16 (nki/tutorials/matrix_multiplication, SDK 2.26).
_PUBLISHED = "4096x8192x8192"


def _tutorial(name: str, shapes: tuple[str, ...], published: str = "", **sizes: int) -> Peer:
    return Peer(
        name=name, op="matmul_tn", module=_TUTORIAL, source=SDK, lncs=(1,), shapes=shapes,
        call=calls.tutorial(name, **sizes),
        device={_PUBLISHED: f"{published} on trn1"} if published else {},
    )  # fmt: skip


_PLAIN = "no norm, rotation or bias on either side"
_ROUTERS = ("2048x4096x8x2", "2048x2048x128x8", "2048x2880x32x4", "16x2048x128x8")
_CACHE = "its cache holds K [keys, head size]; the mask comes as positions"

PEERS: tuple[Peer, ...] = (
    _tutorial("nki_matmul_basic_", ("64x512x128",)),
    _tutorial("nki_matmul_tiled_", ("2048x2048x2048", _PUBLISHED), "51.80 ms"),
    _tutorial("nki_matmul_hoist_load_", ("2048x2048x2048", _PUBLISHED), "42.96 ms"),
    _tutorial("nki_matmul_block_free_dimension_", ("2048x2048x2048", _PUBLISHED), "22.07 ms"),
    _tutorial("nki_matmul_fully_optimized_", ("2048x2048x2048", _PUBLISHED), "6.97 ms"),
    Peer(
        name="mlp", op="gated_mlp_kn", module="core.mlp.mlp", call=calls.mlp,
        shapes=(
            "1024x4096x2048", "4096x4096x2048", "1024x8192x1024", "4096x4096x14336",
            "1x4096x3584", "16x4096x3584", "64x4096x3584", "1x4096x14336",
        ),
    ),
    Peer(
        name="qkv", op="matmul", module="core.qkv.qkv", call=calls.qkv,
        shapes=("4096x1536x4096", "1024x1536x8192", "4096x6144x4096", "16x1536x4096"),
        differs=_PLAIN,
    ),
    Peer(
        name="qkv, norm and rotation", op="qkv_projection_kn", module="core.qkv.qkv",
        call=calls.qkv_fused, shapes=("4096x4096x12x8x2x128x64", "16x4096x12x8x2x128x64"),
        differs="ours adds a bias and normalises q and k by head as well",
    ),
    Peer(
        name="output_projection_cte", op="matmul_tn",
        module="core.output_projection.output_projection_cte.output_projection_cte",
        call=calls.output_projection_cte,
        shapes=("4096x4096x1024", "1024x8192x1024", "4096x4096x4096"),
    ),
    Peer(
        name="output_projection_tkg", op="matmul_tn",
        module="core.output_projection.output_projection_tkg", call=calls.output_projection_tkg,
        shapes=("16x4096x1024", "64x8192x1024"),
    ),
    Peer(
        name="rmsnorm_quant_kernel", op="rms_norm", module="core.rmsnorm.rmsnorm_quant",
        call=calls.rmsnorm_quant, shapes=("4096x4096", "2048x16384", "8192x2880", "128x4096"),
        differs="its output is fp8 with a scale per row: half the bytes, and a maximum to find",
    ),
    Peer(
        name="rope_hf", op="rope", module="core.embeddings.rope_hf", call=calls.rope_hf,
        shapes=("1x40x4096x128x64", "1x5x1024x128x64"),
        differs="queries and keys in two tensors; cos and sin in bf16 and of the whole head size",
    ),
    Peer(
        name="RoPE", op="rope", module="core.embeddings.rope", call=calls.rope,
        shapes=("1x8x4096x128x64", "1x8x1024x128x64"),
        differs="head size outermost",
    ),
    Peer(
        name="attention_cte", op="causal_attention", module="core.attention.attention_cte",
        call=calls.attention_cte,
        shapes=(
            "1x1x1x16384x16384x128x128", "1x1x1x16384x16384x64x64", "1x32x8x4096x4096x128x128",
            "1x32x32x512x512x128x128", "1x8x8x4096x4096x256x256",
        ),
    ),
    Peer(
        name="attention_cte, full", op="attention", module="core.attention.attention_cte",
        call=calls.attention_full,
        shapes=("1x8x8x4096x4096x128x128", "1x8x8x4096x4096x256x256"),
    ),
    Peer(
        name="attention_bwd", op="causal_attention_backward",
        module="core.attention.attention_bwd", call=calls.attention_bwd,
        shapes=(
            "1x1x1x8192x8192x128x128", "1x8x2x4096x4096x128x128", "1x8x8x2048x2048x64x64",
        ),
        differs="the logsumexp in tiles of 128 rows; head size before tokens",
    ),
    Peer(
        name="attention_tkg", op="attention_decode", module="core.attention.attention_tkg",
        call=calls.attention_tkg,
        shapes=("8x4x1x1x8192x128x128", "8x32x8x1x8192x128x128", "8x64x8x1x8192x64x64"),
        differs=_CACHE,
    ),
    *(
        Peer(
            name=name, op="router", module="core.router_topk.router_topk", call=call,
            lncs=(2,), shapes=_ROUTERS,
            differs="affinities in a row of all experts, logits too; no counts. It waits for two "
            f"cores wherever it runs{more}",
        )
        for name, call, more in (
            ("router_topk", calls.router_topk, ""),
            ("router_topk, x [H, T]", calls.router_topk_turned, "; x comes turned"),
        )
    ),
    Peer(
        name="moe_cte", op="experts", module="core.moe.moe_cte.moe_cte", call=calls.moe_cte,
        lncs=(2,), shapes=("2048x4096x2048x4096x8x2", "4096x2048x768x1536x128x8"),
        differs="its schedule of blocks is made beforehand; ours sorts on chip",
    ),
    Peer(
        name="moe_tkg", op="experts", module="core.moe.moe_tkg.moe_tkg", call=calls.moe_tkg,
        shapes=(
            "1x4096x14336x28672x8x2", "1x4096x3584x7168x8x2", "1x2048x768x1536x128x8",
            "4x2880x2880x5760x32x4", "16x2048x768x1536x128x8",
        ),
        differs="it loads the weights of every choice of every token; ours of every expert once",
    ),
)  # fmt: skip
