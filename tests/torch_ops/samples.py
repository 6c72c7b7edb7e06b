"""One small legal call of every op, with its reference; shapes are ragged on the toy core."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np
import torch

from nki_kernels.torch_ops.rows import ROWS
from reference import attention, decode, matmul, mlp, moe, norm, projection, rope
from tests.torch_ops.support import tensor


@dataclass(frozen=True, kw_only=True)
class Sample:
    """A call.

    Attributes:
        op: name of the op.
        make: inputs for a dtype of those operands that have none of their own.
        options: of the call.
        reference: (arrays, options) -> a Reference per output; None where the test of the
            operator's backward has it.
        kinds: dtypes beside which the op takes no other.
    """

    op: str
    make: Callable[[torch.dtype], tuple[Any, ...]]
    options: dict[str, Any] = field(default_factory=dict)
    reference: Callable[..., Any] | None = None
    kinds: tuple[str, ...] = ("bfloat16", "float32")


def _some(*shapes: tuple[int, ...], fixed: tuple[Any, ...] = ()) -> Callable[..., Any]:
    """Make inputs of the shapes, then the fixed ones."""

    def make(dtype):
        return (*(tensor(shape, dtype, 3 + i) for i, shape in enumerate(shapes)), *fixed)

    return make


def _ints(*values, shape=None):
    made = torch.tensor(values, dtype=torch.int32)
    return made if shape is None else made.reshape(shape)


def _product(a, b, *, layout="nn", scale=1.0, out_dtype=None):
    letters = {"transpose_a": layout[0] == "t", "transpose_b": layout[1] == "t"}
    if a.ndim == 2:
        found = matmul.matmul(a, b, **letters)
        return [matmul.Reference(found.value * scale, found.magnitude * abs(scale))]
    parts = [matmul.matmul(*pair, **letters) for pair in zip(a, b, strict=True)]
    return [matmul.Reference(*(np.stack(x) for x in zip(*map(_pair, parts), strict=True)))]


def _pair(found):
    return found.value, found.magnitude


def _products():
    for layout in ("nn", "nt", "tn", "tt"):
        a, b = (
            ((9, 21) if layout[0] == "n" else (21, 9)),
            ((21, 11) if layout[1] == "n" else (11, 21)),
        )
        suffix = "" if layout == "nn" else f"_{layout}"
        reference = partial(_product, layout=layout)
        yield Sample(op=f"matmul{suffix}", make=_some(a, b), reference=reference)
        yield Sample(op=f"bmm{suffix}", make=_some((2, *a), (2, *b)), reference=reference)


def _fp8(shapes, dtype):
    return tuple(tensor(shape, torch.float32, 3 + i).to(dtype) for i, shape in enumerate(shapes))


def _linear(x, weight, bias, residual, *, kn=False, **options):
    return [matmul.linear(x, weight.T if kn else weight, bias=bias, residual=residual, **options)]


def _layer(x, weight, bias, **options):
    return [norm.layer_norm(x, weight, bias, **options)]


def _project(x, weight, bias, norm_weight, q_norm, k_norm, cos, sin, **options):
    if norm_weight is None:
        options["eps"] = 1e-6
    return projection.qkv_projection(
        x, weight, bias, norm_weight, q_norm, k_norm, cos, sin, **options
    )


def _attend(*inputs, **options):
    return attention.attention(*inputs, depth=8, **options)


def _decode(q, k, v, *others, paged=False, **options):
    rest = list(others)
    if paged:
        table = rest.pop(0)
        k, v = (
            x[table].swapaxes(1, 2).reshape(len(table), x.shape[1], -1, x.shape[3]) for x in (k, v)
        )
    lengths, sinks, *scales = rest
    if scales:
        k, v = (
            (x.astype(np.float32) * s[:, None, None]).astype(np.float32)
            for x, s in zip((k, v), scales, strict=True)
        )
    return decode.attention_decode(q, k, v, lengths, sinks, depth=8, **options)


_QKV = (2, 4, 7, 6), (2, 2, 11, 6), (2, 2, 11, 5)
_SINKS = torch.tensor([0.5, -1.0, 2.0, 0.0])
_MASK = torch.rand(2, 1, 7, 11, generator=torch.Generator().manual_seed(1)) < 0.6
_ANGLES = tensor((7, 3), torch.float32, 20), tensor((7, 3), torch.float32, 21)
_MORE_ANGLES = tuple(torch.stack([a, -a]) for a in _ANGLES)
_IDS = _ints(0, 2, 3, 0, 2, 1, 9, 3, 3, -1, shape=(5, 2))
_SLOTS = _ints(3, 0, 1, 8, 7, 2, -1, 4, 5, 6, shape=(5, 2))
_WEIGHTS = tensor((5, 2), torch.float32, 22)
_LENGTHS = _ints(11, 6)
_TABLE = _ints(4, 0, 2, 1, 3, 5, shape=(2, 3))


def _masked(dtype):
    bias = tensor((1, 4, 7, 11), dtype, 9)
    return (*_some(*_QKV)(dtype), _SINKS, _MASK, bias)


def _after(inputs, dtype, **options):
    """What `attention` leaves for its gradient."""
    row = ROWS["attention"]
    out, lse = row.plain(*row.complete(inputs), **options)
    return (tensor(out.shape, dtype, 11), *inputs[:3], out, lse, *inputs[3:])


def _after_attention(dtype):
    return _after(_masked(dtype), dtype)


def _after_causal(dtype):
    return _after(_some(*_QKV)(dtype), dtype, causal=True)


def _no_gain(dtype):
    return tensor((9, 21), dtype), None, tensor((21, 11), dtype, 1)


def _mixture(columns, *biases):
    def make(dtype):
        more = (tensor(shape, dtype, 31) for shape in biases)
        weights = tensor((4, 11, columns), dtype, 4), tensor((4, 13, 11), dtype, 5)
        return (tensor((5, 11), dtype), _IDS, _WEIGHTS, *weights, *more)

    return make


def _two_parts(dtype):
    empty = tensor((2, 3, 5), torch.float32, 8)
    empty[0, 0, 0] = -torch.inf
    other = tensor((2, 3, 5), torch.float32, 9)
    return tensor((2, 3, 5, 4), dtype), empty, tensor((2, 3, 5, 4), dtype, 1), other


def _cache(dtype):
    return _some((2, 2, 3, 6), (2, 2, 3, 5), (2, 2, 8, 6), (2, 2, 8, 5), fixed=(_ints(0, 5),))(
        dtype
    )


def _quantized(shapes, fixed, dtype):
    q = tensor(shapes[0], dtype, 3)
    k, v = (tensor(shape, torch.float32, 4).to(torch.float8_e4m3fn) for shape in shapes[1:])
    return (q, k, v, *fixed, torch.tensor([0.5, 2.0]), torch.tensor([1.0, 0.25]))


_PAGES = (2, 4, 2, 6), (6, 2, 4, 6), (6, 2, 4, 5)
_CONTIGUOUS = (2, 4, 2, 6), (2, 2, 11, 6), (2, 2, 11, 5)

SAMPLES = (
    *_products(),
    Sample(op="matmul_fp8", make=partial(_fp8, ((9, 22), (22, 11))), options={"scale": 0.5},
           reference=_product, kinds=("float8_e4m3fn", "float8_e5m2")),
    Sample(op="matmul_fp8_nt", make=partial(_fp8, ((9, 22), (11, 22))),
           reference=partial(_product, layout="nt"), kinds=("float8_e4m3fn", "float8_e5m2")),
    Sample(op="linear", make=_some((9, 21), (11, 21), (11,), (9, 11)),
           options={"activation": "silu", "scale": 0.5}, reference=_linear),
    Sample(op="linear_kn", make=_some((9, 21), (21, 11), (11,), (9, 11)),
           options={"activation": "gelu_tanh"}, reference=partial(_linear, kn=True)),
    Sample(op="linear_backward", make=_some((9, 11), (9, 21), (11, 21))),
    Sample(op="gated_mlp", make=_some((9, 13), (19, 13), (19, 13), (13, 19)),
           reference=lambda *x, **o: [mlp.gated_mlp(*x, **o)]),
    Sample(op="gated_mlp_kn", make=_some((9, 13), (13, 19), (13, 19), (19, 13)),
           options={"activation": "gelu"},
           reference=lambda *x, **o: [mlp.gated_mlp(*x, transposed=False, **o)]),
    Sample(op="rms_norm", make=_some((9, 21), (21,)), reference=lambda *x: [norm.rms_norm(*x)]),
    Sample(op="layer_norm", make=_some((9, 21), (21,), (21,)), reference=_layer),
    Sample(op="rms_norm_backward", make=_some((9, 21), (9, 21), (21,))),
    Sample(op="layer_norm_backward", make=_some((9, 21), (9, 21), (21,))),
    Sample(op="attention", make=_masked, options={"causal": True, "align": "bottom-right"},
           reference=_attend),
    Sample(op="attention", make=_some(*_QKV), options={"window": 3, "softcap": 2.0, "scale": 0.7},
           reference=lambda q, k, v, *_, **o: _attend(q, k, v, **o)),
    Sample(op="causal_attention", make=_some(*_QKV),
           reference=lambda *x, **o: _attend(*x, causal=True, **o)),
    Sample(op="attention_decode", make=_some(*_CONTIGUOUS, fixed=(_LENGTHS, _SINKS)),
           options={"window": 5}, reference=_decode),
    Sample(op="attention_decode_paged", make=_some(*_PAGES, fixed=(_TABLE, _LENGTHS, None)),
           reference=partial(_decode, paged=True)),
    Sample(op="attention_decode_fp8", make=partial(_quantized, _CONTIGUOUS, (_LENGTHS, _SINKS)),
           reference=_decode, kinds=("bfloat16",)),
    Sample(op="attention_decode_paged_fp8",
           make=partial(_quantized, _PAGES, (_TABLE, _LENGTHS, None)),
           reference=partial(_decode, paged=True), kinds=("bfloat16",)),
    Sample(op="kv_cache_write", make=_cache),
    Sample(op="kv_cache_write_paged", make=_some(
        (2, 2, 3, 6), (2, 2, 3, 5), (3, 2, 4, 6), (3, 2, 4, 5),
        fixed=(_ints(4, -1, 3, 11, 0, 7, shape=(2, 3)),))),
    Sample(op="gated_mlp_backward", make=_some((9, 13), (9, 13), (19, 13), (19, 13), (13, 19))),
    Sample(op="norm_linear", make=_some((9, 21), (21,), (11, 21), (11,)),
           reference=lambda *x, **o: [projection.norm_linear(*x, **o)]),
    Sample(op="norm_linear_kn", make=_no_gain,
           reference=lambda *x, **o: [projection.norm_linear(*x, transpose_weight=False, **o)]),
    Sample(op="qkv_projection",
           make=_some((7, 13), (8, 8, 13), (8, 8), (13,), (8,), (8,), fixed=_ANGLES),
           options={"heads": 4, "kv_heads": 2}, reference=_project),
    Sample(op="qkv_projection_kn", make=_some((7, 13), (13, 8, 8)),
           options={"heads": 4, "kv_heads": 2},
           reference=partial(_project, transpose_weight=False)),
    Sample(op="attention_backward", make=_after_attention),
    Sample(op="attention_backward", make=_after_causal, options={"causal": True}),
    Sample(op="causal_attention_backward", make=_after_causal),
    Sample(op="add_rms_norm", make=_some((9, 21), (9, 21), (21,)), reference=norm.add_rms_norm),
    Sample(op="add_layer_norm", make=_some((9, 21), (9, 21), (21,), (21,)),
           reference=norm.add_layer_norm),
    Sample(op="rms_norm_llama", make=_some((9, 21), (21,)),
           reference=lambda *x: [norm.rms_norm_llama(*x)]),
    Sample(op="rms_norm_gemma", make=_some((9, 21), (21,)),
           reference=lambda *x: [norm.rms_norm_gemma(*x)]),
    Sample(op="attention_varlen",
           make=_some((1, 4, 9, 6), (1, 2, 9, 6), (1, 2, 9, 5), fixed=(_ints(0, 2, 2, 7),)),
           options={"max_seqlen": 5}, reference=partial(attention.attention_varlen, depth=8)),
    Sample(op="causal_attention_varlen",
           make=_some((1, 4, 9, 6), (1, 2, 9, 6), (1, 2, 9, 5), fixed=(_ints(0, 3, 9),)),
           options={"max_seqlen": 6, "window": 3},
           reference=partial(attention.attention_varlen, depth=8, causal=True)),
    Sample(op="attention_chunked_prefill",
           make=_some((2, 4, 5, 6), *_PAGES[1:], fixed=(_TABLE, _LENGTHS, None)),
           reference=partial(_decode, paged=True)),
    Sample(op="mla_decode", make=_some((2, 4, 2, 6), (2, 11, 6), fixed=(_LENGTHS,)),
           options={"value_size": 4}, reference=partial(decode.mla_decode, depth=8)),
    Sample(op="mla_decode_paged", make=_some((2, 4, 2, 6), (6, 4, 6), fixed=(_TABLE, _LENGTHS)),
           options={"value_size": 4, "window": 5},
           reference=partial(decode.mla_decode_paged, depth=8)),
    Sample(op="experts", make=_mixture(26), reference=lambda *x: [moe.experts(*x)]),
    Sample(op="experts", make=_mixture(26, (4, 26), (4, 11)),
           options={"interleaved": True, "limit": 0.75},
           reference=lambda *x, **o: [moe.experts(*x, **o)]),
    Sample(op="group_norm", make=_some((2, 6, 11), (6,), (6,)), options={"num_groups": 3},
           reference=lambda *x, **o: [norm.group_norm(*x, **o)]),
    Sample(op="merge_attention", make=_two_parts, reference=decode.merge_attention),
    Sample(op="gated_mlp_backward_kept",
           make=_some((9, 13), (9, 13), (19, 13), (19, 13), (13, 19), (9, 19), (9, 19))),
    Sample(op="rope", make=_some((2, 3, 7, 8), fixed=_ANGLES), options={"interleaved": True},
           reference=lambda *x, **o: [rope.rope(*x, **o)]),
    Sample(op="rope_batched", make=_some((2, 3, 7, 8), fixed=_MORE_ANGLES),
           options={"inverse": True}, reference=lambda *x, **o: [rope.rope(*x, **o)]),
    Sample(op="router", make=_some((9, 13), (13, 8), (8,)), options={"top_k": 2},
           reference=moe.router),
    Sample(op="router", make=_some((9, 13), (13, 8), fixed=(None, tensor((8,), torch.float32, 5))),
           options={"top_k": 2, "score": "sigmoid", "renormalize": True, "scale": 2.5, "groups": 4,
                    "top_groups": 2}, reference=moe.router),
    Sample(op="router", make=_some((9, 13), (13, 8)), options={"top_k": 3, "score_first": False},
           reference=moe.router),
    Sample(op="dispatch", make=_some((5, 6), fixed=(_IDS,)), options={"experts": 4},
           reference=moe.dispatch),
    Sample(op="combine", make=_some((9, 6), fixed=(_SLOTS, _WEIGHTS)),
           reference=lambda *x: [moe.combine(*x)]),
    Sample(op="grouped_matmul", make=_some((9, 13), (3, 13, 7), fixed=(_ints(4, 4, 8),)),
           reference=lambda *x: [moe.grouped_matmul(*x)]),
)  # fmt: skip
