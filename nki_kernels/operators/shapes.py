"""Real geometries by name: the one list of shapes that tests, benchmarks and tuning read.

A named case reads "<model>:<phase>:<layer>", for example "llama3-8b:prefill:qkv". A free-form shape
lists the axes in the operator's order, for example "2048x512x4096" for matmul's M, N, K, or
"4096x2880" for a normalization's N, H.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from nki_kernels.machine.errors import ShapeError
from nki_kernels.operators.contract import Operator
from nki_kernels.operators.models import MODELS, Model
from nki_kernels.operators.nkibench import PROBLEMS

#: Tokens per pass: a long prompt (for an encoder, a batch of sentences), or one token for each of
#: sixteen sequences.
PHASES: dict[str, int] = {"prefill": 4096, "decode": 16}


@dataclass(frozen=True, slots=True)
class Case:
    """One problem of one operator.

    Attributes:
        op: operator name.
        name: the registry name, or the free-form text it was parsed from.
        axes: sizes by axis letter.
        tags: words to select by: model, phase, layer.
    """

    op: str
    name: str
    axes: Mapping[str, int]
    tags: frozenset[str] = frozenset()


def _matmul_layers(model: Model, tokens: int) -> Iterator[tuple[str, int, int, int]]:
    """Yield (layer, M, N, K) of every linear layer of one transformer block."""
    attention = model.heads * model.head_dim
    yield "qkv", tokens, attention + 2 * model.kv_heads * model.head_dim, model.hidden
    yield "attn-out", tokens, model.hidden, attention
    up = model.intermediate * (2 if model.gated else 1)
    if model.experts:
        yield "router", tokens, model.experts, model.hidden
        # One expert under balanced routing; fewer tokens than experts still need one row.
        tokens = max(1, tokens * model.top_k // model.experts)
    prefix = "expert-" if model.experts else ""
    yield f"{prefix}gate-up" if model.gated else "up", tokens, up, model.hidden
    yield f"{prefix}down", tokens, model.hidden, model.intermediate


def _passes() -> Iterator[tuple[Model, str, int]]:
    """Yield (model, phase, tokens) of every phase a model has."""
    for model in MODELS:
        for phase, tokens in PHASES.items():
            if model.decodes or phase != "decode":
                yield model, phase, tokens


def _case(op: str, model: Model, phase: str, layer: str, axes: Mapping[str, int]) -> Case:
    name = f"{model.name}:{phase}:{layer}"
    return Case(op, name, axes, frozenset({model.name, phase, layer}))


def _matmul_cases() -> Iterator[Case]:
    for model, phase, tokens in _passes():
        layers = list(_matmul_layers(model, tokens))
        if phase == "decode":
            # Prefill only needs the logits of the last position, so the head is a decode shape.
            layers.append(("lm-head", tokens, model.vocabulary, model.hidden))
        for layer, m, n, k in layers:
            yield _case("matmul", model, phase, layer, {"M": m, "N": n, "K": k})


def _stored_cases(op: str) -> Iterator[Case]:
    """The linear layers with operands stored another way: only one model, for the sizes repeat."""
    for case in _matmul_cases():
        if "qwen3-30b-a3b" in case.tags:
            yield Case(op, case.name, case.axes, case.tags)


def _mlp_cases(op: str) -> Iterator[Case]:
    for model, phase, tokens in _passes():
        if model.gated and not model.experts:
            axes = {"T": tokens, "H": model.hidden, "I": model.intermediate}
            yield _case(op, model, phase, "mlp", axes)


def _projection_cases(op: str) -> Iterator[Case]:
    """norm and head of the vocabulary or gate and up; all heads of attention, rotated."""
    for model, phase, tokens in _passes():
        size, heads, others = model.head_dim, model.heads, model.kv_heads
        if not model.decodes:
            continue
        if op.startswith("qkv"):
            axes = {"T": tokens, "H": model.hidden, "C": heads + 2 * others}
            axes |= {"Q": heads, "G": others, "D": size, "F": size // 2}
            yield _case(op, model, phase, "qkv", axes)
        elif not model.experts:
            axes = {"M": tokens, "N": 2 * model.intermediate, "K": model.hidden}
            yield _case(op, model, phase, "gate-up", axes)


def _bmm_cases(op: str) -> Iterator[Case]:
    """Scores [heads, tokens, tokens] and values [heads, tokens, head_dim] of plain attention."""
    tokens = 512
    for model, phase, _ in _passes():
        if phase == "prefill" and model.name in ("llama3-8b", "minilm-l6"):
            for layer, n, k in (
                ("scores", tokens, model.head_dim),
                ("values", model.head_dim, tokens),
            ):
                yield _case(
                    op, model, phase, layer, {"B": model.heads, "M": tokens, "N": n, "K": k}
                )


def _norm_cases(op: str) -> Iterator[Case]:
    for model, phase, tokens in _passes():
        if model.norm == op:
            yield _case(op, model, phase, "hidden", {"N": tokens, "H": model.hidden})
        if model.qk_norm and op == "rms_norm":
            for layer, heads in (("q-norm", model.heads), ("k-norm", model.kv_heads)):
                axes = {"N": tokens * heads, "H": model.head_dim}
                yield _case(op, model, phase, layer, axes)


def _norm_variant_cases(op: str) -> Iterator[Case]:
    """The residual stream; the norms of query and key heads add nothing."""
    plain = "layer_norm" if "layer_norm" in op else "rms_norm"
    for case in _norm_cases(plain):
        if case.name.endswith(":hidden"):
            yield Case(op, case.name, case.axes, case.tags)


def _group_norm_cases() -> Iterator[Case]:
    """Residual blocks of Stable Diffusion 1.5's U-Net, two images of 512 x 512 at 32 groups."""
    for level, channels, side in ((0, 320, 64), (1, 640, 32), (2, 1280, 16)):
        axes = {"N": 2, "C": channels, "S": side * side, "G": 32}
        tags = frozenset({"sd15-unet", "step", f"level{level}"})
        yield Case("group_norm", f"sd15-unet:step:level{level}", axes, tags)


def _norm_backward_cases(op: str) -> Iterator[Case]:
    """The forward cases of a training step: no decoding."""
    for case in _norm_cases(op.removesuffix("_backward")):
        if "decode" not in case.tags:
            yield Case(op, case.name, case.axes, case.tags)


def _rope_cases(op: str) -> Iterator[Case]:
    """Prompts share their angles; sequences that are decoded have each their own."""
    wanted = "decode" if op == "rope_batched" else "prefill"
    for model, phase, tokens in _passes():
        if model.decodes and phase == wanted:
            batch, rows = (tokens, 1) if phase == "decode" else (1, tokens)
            for layer, heads in (("q", model.heads), ("k", model.kv_heads)):
                size = model.head_dim
                axes = {"B": batch, "H": heads, "S": rows, "D": size, "F": size // 2}
                yield _case(op, model, phase, layer, axes)


def _attention_cases(op: str) -> Iterator[Case]:
    """The prefill of each model: decoders are causal, encoders attend both ways."""
    for model, phase, tokens in _passes():
        if phase == "prefill" and model.decodes == op.startswith(("causal", "window")):
            size, heads = model.head_dim, {"B": 1, "H": model.heads, "G": model.kv_heads}
            # An encoder's batch: eight sentences of 512 tokens.
            rows = tokens if model.decodes else 512
            axes = {**heads, "B": tokens // rows, "M": rows, "N": rows, "D": size, "E": size}
            if op == "window_attention":
                # That of every other layer of GPT-OSS.
                axes["W"] = 128
            elif op.endswith("varlen"):
                # The same tokens, eight sequences in a row.
                axes.pop("N")
                axes |= {"B": 1, "M": tokens, "C": 9, "L": tokens // 8}
            yield _case(op, model, phase, "attention", axes)


def _grouped_cases() -> Iterator[Case]:
    """The two products of every expert; the arrays of a short prompt, for they hold all experts."""
    for model in MODELS:
        if model.experts:
            rows, width = 1024 * model.top_k, model.intermediate
            for layer, n, k in (
                ("expert-gate-up", 2 * width, model.hidden),
                ("expert-down", model.hidden, width),
            ):
                axes = {"M": rows, "N": n, "K": k, "G": model.experts}
                yield _case("grouped_matmul", model, "prefill", layer, axes)


def _expert_cases() -> Iterator[Case]:
    """Prefill: how many experts few tokens leave idle, and so what must be read, values decide."""
    for model, phase, tokens in _passes():
        if model.experts and phase == "prefill":
            width = model.intermediate
            axes = {"T": tokens, "H": model.hidden, "I": width, "F": 2 * width}
            axes |= {"E": model.experts, "K": model.top_k}
            yield _case("experts", model, phase, "experts", axes)


def _moe_cases(op: str) -> Iterator[Case]:
    for model, phase, tokens in _passes():
        if model.experts:
            axes = {"T": tokens, "H": model.hidden, "E": model.experts, "K": model.top_k}
            if op == "combine":
                axes = {"S": tokens * model.top_k, "H": model.hidden, "T": tokens, "K": model.top_k}
            yield _case(op, model, phase, "experts", axes)


def _merge_cases() -> Iterator[Case]:
    """A prompt whose keys lie on two cores."""
    for model, phase, tokens in _passes():
        if model.decodes and phase == "prefill":
            axes = {"B": 1, "H": model.heads, "T": tokens, "E": model.head_dim}
            yield _case("merge_attention", model, phase, "attention", axes)


def _mla_cases(op: str) -> Iterator[Case]:
    """DeepSeek-V3 on one core: 128 heads over 4096 rows of 512 + 64; pages of 64."""
    cache = {"S": 4096} if op == "mla_decode" else {"W": 64, "P": 64, "N": 256}
    axes = {"B": 4, "H": 128, "T": 1, **cache, "D": 576, "E": 512}
    name = "deepseek-v3:decode:attention"
    yield Case(op, name, axes, frozenset({"deepseek-v3", "decode", "attention"}))


def _decode_cases(op: str) -> Iterator[Case]:
    """Eight sequences of 8192 keys; pages of 16."""
    batch, context, page = 8, 8192, 16
    for model in MODELS:
        if model.decodes:
            size = model.head_dim
            axes = {"B": batch, "H": model.heads, "G": model.kv_heads, "T": 1}
            if op == "attention_chunked_prefill":
                # 512 queries of one prompt, those before it in the cache.
                axes |= {"B": 1, "T": 512, "W": context // page, "P": page, "N": context // page}
                axes |= {"D": size, "E": size}
                yield _case(op, model, "chunk", "attention", axes)
                continue
            if "paged" not in op:
                axes |= {"S": context}
            else:
                axes |= {"W": context // page, "P": page, "N": batch * context // page}
            yield _case(op, model, "decode", "attention", {**axes, "D": size, "E": size})


_CASES: dict[str, dict[str, Case]] = {
    "matmul": {case.name: case for case in _matmul_cases()},
    **{
        op: {case.name: case for case in _stored_cases(op)}
        for op in (
            "matmul_nt",
            "matmul_tn",
            "matmul_tt",
            "matmul_fp8",
            "matmul_fp8_nt",
            "linear",
            "linear_kn",
        )
    },
    **{op: {case.name: case for case in _mlp_cases(op)} for op in ("gated_mlp", "gated_mlp_kn")},
    **{
        op: {case.name: case for case in _projection_cases(op)}
        for op in ("norm_linear", "norm_linear_kn", "qkv_projection", "qkv_projection_kn")
    },
    **{
        op: {case.name: case for case in _mlp_cases(op) if "decode" not in case.tags}
        for op in ("gated_mlp_backward", "gated_mlp_backward_kept")
    },
    "linear_backward": {
        case.name: case for case in _stored_cases("linear_backward") if "decode" not in case.tags
    },
    **{
        op: {case.name: case for case in _bmm_cases(op)}
        for op in ("bmm", "bmm_nt", "bmm_tn", "bmm_tt")
    },
    **{
        op: {case.name: case for case in _attention_cases(op)}
        for op in (
            "attention",
            "causal_attention",
            "window_attention",
            "attention_varlen",
            "causal_attention_varlen",
            "attention_backward",
            "causal_attention_backward",
        )
    },
    **{
        op: {case.name: case for case in _moe_cases(op)} for op in ("router", "dispatch", "combine")
    },
    "experts": {case.name: case for case in _expert_cases()},
    "grouped_matmul": {case.name: case for case in _grouped_cases()},
    "rms_norm": {case.name: case for case in _norm_cases("rms_norm")},
    "layer_norm": {case.name: case for case in _norm_cases("layer_norm")},
    **{
        op: {case.name: case for case in _norm_variant_cases(op)}
        for op in ("add_rms_norm", "add_layer_norm", "rms_norm_llama", "rms_norm_gemma")
    },
    "group_norm": {case.name: case for case in _group_norm_cases()},
    "rms_norm_backward": {case.name: case for case in _norm_backward_cases("rms_norm_backward")},
    "layer_norm_backward": {
        case.name: case for case in _norm_backward_cases("layer_norm_backward")
    },
    **{op: {case.name: case for case in _rope_cases(op)} for op in ("rope", "rope_batched")},
    **{
        op: {case.name: case for case in _decode_cases(op)}
        for op in (
            "attention_decode",
            "attention_decode_paged",
            "attention_decode_fp8",
            "attention_decode_paged_fp8",
            "attention_chunked_prefill",
        )
    },
    **{
        op: {case.name: case for case in _mla_cases(op)}
        for op in ("mla_decode", "mla_decode_paged")
    },
    "merge_attention": {case.name: case for case in _merge_cases()},
}
for _problem in PROBLEMS:
    if _problem.op is not None and _problem.axes is not None:
        _named = _CASES.setdefault(_problem.op, {})
        _named[_problem.shape] = Case(
            _problem.op, _problem.shape, _problem.axes, frozenset({"nkibench", _problem.name})
        )

#: What `python -m bench run <op>` times when no shape is named.
DEFAULTS: dict[str, tuple[str, ...]] = {
    "matmul": (
        "2048x2048x2048",
        "1000x3000x700",
        "llama3-8b:prefill:qkv",
        "llama3-8b:decode:down",
        "qwen3-30b-a3b:prefill:expert-gate-up",
        "gpt-oss-20b:decode:qkv",
        "minilm-l6:prefill:up",
    ),
    "matmul_nt": ("2048x2048x2048", "1x14336x4096", "8x14336x4096", "64x14336x4096"),
    "matmul_tn": ("2048x2048x2048",),
    "matmul_tt": ("2048x2048x2048",),
    "linear": ("4096x4096x4096", "8x14336x4096"),
    "linear_kn": ("1x14336x4096", "8x14336x4096", "64x14336x4096"),
    "gated_mlp": ("1x4096x14336", "512x4096x14336"),
    "gated_mlp_kn": ("1x4096x14336", "16x4096x14336", "512x4096x14336"),
    "norm_linear": ("4096x4096x4096",),
    "norm_linear_kn": ("4096x4096x4096", "16x14336x4096"),
    "qkv_projection": ("llama3-8b:prefill:qkv", "qwen3-8b:decode:qkv"),
    "qkv_projection_kn": (
        "llama3-8b:prefill:qkv",
        "qwen3-30b-a3b:prefill:qkv",
        "qwen3-8b:decode:qkv",
        "1x4096x48x32x8x128x64",
    ),
    "matmul_fp8": ("4096x4096x4096", "64x14336x4096"),
    "matmul_fp8_nt": ("4096x4096x4096", "64x14336x4096"),
    "gated_mlp_backward": ("512x2048x5632",),
    "gated_mlp_backward_kept": ("512x2048x5632",),
    "linear_backward": ("4096x4096x4096", "1024x1024x1024"),
    "bmm": ("llama3-8b:prefill:values",),
    "bmm_nt": ("llama3-8b:prefill:scores",),
    "bmm_tn": ("llama3-8b:prefill:values",),
    "bmm_tt": ("llama3-8b:prefill:values",),
    "attention": ("1x8x8x4096x4096x128x128", "1x8x8x4096x4096x256x256"),
    "attention_backward": ("1x8x8x2048x2048x128x128",),
    "causal_attention_backward": (
        "1x1x1x8192x8192x128x128",
        "1x1x1x8192x8192x64x64",
        "llama3-8b:prefill:attention",
        "1x32x32x512x512x128x128",
    ),
    "causal_attention": (
        "1x1x1x16384x16384x128x128",
        "1x1x1x16384x16384x64x64",
        "llama3-8b:prefill:attention",
        "1x32x32x512x512x128x128",
        "1x16x16x4096x4096x192x128",
    ),
    "window_attention": ("1x1x1x10240x10240x64x64x128", "1x8x8x10240x10240x64x64x128"),
    "attention_varlen": ("1x8x8x8192x64x64x17x512",),
    "causal_attention_varlen": ("1x32x8x8192x128x128x9x1024",),
    "router": (
        "mixtral-8x7b:prefill:experts",
        "qwen3-30b-a3b:prefill:experts",
        "gpt-oss-20b:prefill:experts",
        "qwen3-30b-a3b:decode:experts",
        "4096x7168x256x8",
    ),
    "dispatch": ("mixtral-8x7b:prefill:experts", "qwen3-30b-a3b:prefill:experts"),
    "combine": ("mixtral-8x7b:prefill:experts", "qwen3-30b-a3b:prefill:experts"),
    "experts": ("qwen3-30b-a3b:prefill:experts",),
    "grouped_matmul": ("1024x768x512x8", "gpt-oss-20b:prefill:expert-down"),
    "rms_norm": (
        "4096x4096",
        "2048x16384",
        "8192x2880",
        "llama3-70b:prefill:hidden",
        "llama3-8b:decode:hidden",
        "qwen3-8b:prefill:k-norm",
    ),
    "layer_norm": (
        "4096x4096",
        "2048x16384",
        "8192x2880",
        "minilm-l6:prefill:hidden",
        "16x4096",
    ),
    "add_rms_norm": ("4096x4096", "8192x2880", "llama3-8b:decode:hidden"),
    "add_layer_norm": ("4096x4096", "minilm-l6:prefill:hidden"),
    "group_norm": ("8x320x4096x32", "sd15-unet:step:level0"),
    "rms_norm_llama": ("4096x4096", "llama3-8b:decode:hidden"),
    "rms_norm_gemma": ("4096x4096",),
    "rms_norm_backward": (
        "4096x4096",
        "2048x16384",
        "8192x2880",
        "128x4096",
        "qwen3-8b:prefill:k-norm",
    ),
    "layer_norm_backward": (
        "4096x4096",
        "2048x16384",
        "8192x2880",
        "128x4096",
        "minilm-l6:prefill:hidden",
    ),
    "rope": ("llama3-8b:prefill:q", "llama3-8b:prefill:k"),
    "rope_batched": ("llama3-8b:decode:q",),
    "attention_decode": ("llama3-8b:decode:attention", "gpt-oss-20b:decode:attention"),
    "attention_decode_paged": ("llama3-8b:decode:attention",),
    "attention_decode_fp8": ("llama3-8b:decode:attention",),
    "attention_decode_paged_fp8": ("llama3-8b:decode:attention",),
    "mla_decode": ("deepseek-v3:decode:attention",),
    "mla_decode_paged": ("deepseek-v3:decode:attention",),
    "merge_attention": ("llama3-8b:prefill:attention", "8x32x1x128"),
    "attention_chunked_prefill": ("llama3-8b:chunk:attention",),
}


def cases(op: str, *tags: str) -> tuple[Case, ...]:
    """Return the named cases of `op` that carry all `tags`, in the order of the registry."""
    return tuple(case for case in _CASES.get(op, {}).values() if case.tags.issuperset(tags))


def parse(op: Operator, text: str) -> Case:
    """Return the case that `text` names: a registry name or a free-form shape.

    Raises:
        ShapeError: neither a known name nor positive sizes joined by "x", one per axis.
    """
    named = _CASES.get(op.name, {}).get(text)
    if named is not None:
        return named
    order = "x".join(op.axis_order)
    if not re.fullmatch(r"[+-]?[0-9]+(x[+-]?[0-9]+)*", text):
        near = difflib.get_close_matches(text, _CASES.get(op.name, {}), n=3, cutoff=0.5)
        hint = f"; close names: {', '.join(near)}" if near else ""
        raise ShapeError(
            f"{op.name}: shape {text!r} is neither a named shape nor {order}{hint}; "
            f"write for example {'x'.join(['2048'] * len(op.axis_order))}, or see the names with "
            f"'python -m bench list {op.name}'"
        )
    sizes = [int(part) for part in text.split("x")]
    if len(sizes) != len(op.axis_order):
        raise ShapeError(
            f"{op.name}: shape {text!r} has {len(sizes)} sizes; {len(op.axis_order)} are needed, "
            f"in the order {order}; write one size per axis"
        )
    if min(sizes) < 1:
        raise ShapeError(
            f"{op.name}: shape {text!r} has a size below 1; every axis ({order}) must be at least "
            "1; write positive sizes"
        )
    return Case(op.name, text, dict(zip(op.axis_order, sizes, strict=True)), frozenset({"free"}))
