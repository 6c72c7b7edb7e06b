"""What the benchmark needs of an operator beyond its contract: the reference, and inputs."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt

import reference.attention
import reference.attention_backward
import reference.decode
import reference.matmul
import reference.mlp
import reference.moe
import reference.norm
import reference.projection
import reference.rope
from bench.moe import (
    combine_inputs,
    dispatch_inputs,
    expert_choices,
    expert_inputs,
    grouped_inputs,
    router_inputs,
)
from nki_kernels.machine.dtypes import as_dtype
from nki_kernels.machine.tensor import Abstract
from nki_kernels.operators import OPERATORS
from nki_kernels.operators.contract import Axes, Operator
from nki_kernels.operators.matmul import MATMULS

Shapes: TypeAlias = Sequence[tuple[int, ...]]
Arrays: TypeAlias = tuple[npt.NDArray[Any], ...]


def normal_inputs(shapes: Shapes, dtype: str, seed: int) -> Arrays:
    """Return one array of standard normal values, rounded to `dtype`, per shape."""
    rng = np.random.default_rng(seed)
    host = as_dtype(dtype).host
    return tuple(rng.standard_normal(shape, np.float32).astype(host) for shape in shapes)


def rope_inputs(shapes: Shapes, dtype: str, seed: int) -> Arrays:
    """Return rows, and cosine and sine of random angles in float32."""
    (x,) = normal_inputs(shapes[:1], dtype, seed)
    angles = np.random.default_rng(seed + 1).uniform(-np.pi, np.pi, shapes[1])
    return x, np.cos(angles).astype(np.float32), np.sin(angles).astype(np.float32)


def qkv_inputs(shapes: Shapes, dtype: str, seed: int) -> Arrays:
    """Return operands of the projection, and cosine and sine of random angles in float32."""
    *given, angle, _ = shapes
    angles = np.random.default_rng(seed + 1).uniform(-np.pi, np.pi, angle)
    tables = np.cos(angles).astype(np.float32), np.sin(angles).astype(np.float32)
    return (*normal_inputs(given, dtype, seed), *tables)


def attention_backward_inputs(
    shapes: Shapes, dtype: str, seed: int, *, causal: bool = False
) -> Arrays:
    """Return do, q, k, v, and the out and lse that belong to them."""
    given = normal_inputs(shapes[:4], dtype, seed)
    return reference.attention_backward.inputs_of(*given, causal=causal)


def decode_inputs(shapes: Shapes, dtype: str, seed: int, *, quantized: bool = False) -> Arrays:
    """Return queries, a full cache (its pages shuffled, if it has a table), sinks and scales."""
    shapes, scales = (shapes[:-2], shapes[-2:]) if quantized else (shapes, ())
    q, k, v, *tables, lengths, sinks = shapes
    rng = np.random.default_rng(seed + 1)
    context = k[2] * (tables[0][1] if tables else 1)
    order = [rng.permutation(k[0])[: math.prod(t)].reshape(t).astype(np.int32) for t in tables]
    full = np.full(lengths, context, np.int32)
    extra = rng.standard_normal(sinks).astype(np.float32)
    factors = [rng.uniform(0.5, 2.0, scale).astype(np.float32) for scale in scales]
    cache = normal_inputs((k, v), "float8_e4m3" if quantized else dtype, seed + 2)
    return (*normal_inputs((q,), dtype, seed), *cache, *order, full, extra, *factors)


def merge_inputs(shapes: Shapes, dtype: str, seed: int) -> Arrays:
    """Return two outputs and their logarithms, which are float32."""
    a, b = normal_inputs(shapes[::2], dtype, seed)
    la, lb = normal_inputs(shapes[1::2], "float32", seed + 1)
    return a, la, b, lb


def mla_inputs(shapes: Shapes, dtype: str, seed: int) -> Arrays:
    """Return queries and a full cache of latents, its pages shuffled, if it has a table."""
    q, cache, *tables, lengths = shapes
    one = (cache[0], 1, *cache[1:])
    found = decode_inputs((q, one, one, *tables, lengths, (1,)), dtype, seed)
    return (found[0], found[1][:, 0], *found[3:-1])


def varlen_inputs(shapes: Shapes, dtype: str, seed: int) -> Arrays:
    """Return queries, keys, values, and the boundaries of sequences of equal length."""
    *tensors, (count,) = shapes
    cuts = np.linspace(0, tensors[0][2], count).astype(np.int32)
    return (*normal_inputs(tensors, dtype, seed), cuts)


@dataclass(frozen=True, slots=True)
class Entry:
    """One benchmarked operator.

    Attributes:
        op: its contract.
        reference: maps the inputs, and by name the options that give axes their sizes, to (value,
            sum of absolute terms), float64; with several outputs, to a tuple of such pairs.
        inputs: makes inputs from shapes, dtype and seed.
        absent: optional operands that are left out.
        steering: the integer inputs alone, None elsewhere, where making all of them costs too much.
    """

    op: Operator
    reference: Callable[..., Any]
    inputs: Callable[[Shapes, str, int], Arrays] = normal_inputs
    absent: tuple[str, ...] = ()
    steering: Callable[[Shapes, str, int], Sequence[Any]] | None = None

    def shapes_only(self, axes: Axes, dtype: str) -> list[Any]:
        """Return inputs to time a case with: shapes, but values for integers, which steer."""
        operands, shapes = self.op.inputs, self.op.input_shapes(axes)
        found: list[Any] = [
            None if operand.name in self.absent else Abstract(shape, operand.dtype or dtype)
            for operand, shape in zip(operands, shapes, strict=True)
        ]
        steering = [at for at, operand in enumerate(operands) if operand.dtype == "int32"]
        if steering:
            values = (self.steering or self.inputs)(shapes, dtype, 0)
            for at in steering:
                found[at] = values[at]
        return found


#: Every benchmarked operator by name; one line each.
ENTRIES: Mapping[str, Entry] = {
    **{
        op.name: Entry(
            op, partial(reference.matmul.matmul, transpose_a=stored[0], transpose_b=stored[1])
        )
        for (_, *stored), op in MATMULS.items()
    },
    "matmul_fp8": Entry(OPERATORS["matmul_fp8"], reference.matmul.matmul),
    "matmul_fp8_nt": Entry(
        OPERATORS["matmul_fp8_nt"], partial(reference.matmul.matmul, transpose_b=True)
    ),
    "linear": Entry(OPERATORS["linear"], reference.matmul.linear),
    "linear_kn": Entry(
        OPERATORS["linear_kn"], partial(reference.matmul.linear, transpose_weight=False)
    ),
    "gated_mlp": Entry(OPERATORS["gated_mlp"], reference.mlp.gated_mlp),
    "gated_mlp_kn": Entry(
        OPERATORS["gated_mlp_kn"], partial(reference.mlp.gated_mlp, transposed=False)
    ),
    **{
        "gated_mlp_backward" + form: Entry(
            OPERATORS["gated_mlp_backward" + form], reference.mlp.gated_mlp_backward
        )
        for form in ("", "_kept")
    },
    "linear_backward": Entry(OPERATORS["linear_backward"], reference.matmul.linear_backward),
    **{
        "norm_linear" + form: Entry(
            OPERATORS["norm_linear" + form],
            partial(reference.projection.norm_linear, transpose_weight=not form),
        )
        for form in ("", "_kn")
    },
    **{
        "qkv_projection" + form: Entry(
            OPERATORS["qkv_projection" + form],
            partial(reference.projection.qkv_projection, transpose_weight=not form),
            qkv_inputs,
        )
        for form in ("", "_kn")
    },
    "router": Entry(
        OPERATORS["router"], reference.moe.router, router_inputs, ("bias", "selection_bias")
    ),
    "dispatch": Entry(OPERATORS["dispatch"], reference.moe.dispatch, dispatch_inputs),
    "combine": Entry(OPERATORS["combine"], reference.moe.combine, combine_inputs),
    "experts": Entry(
        OPERATORS["experts"],
        reference.moe.experts,
        expert_inputs,
        ("up_bias", "down_bias"),
        expert_choices,
    ),
    "grouped_matmul": Entry(
        OPERATORS["grouped_matmul"], reference.moe.grouped_matmul, grouped_inputs
    ),
    "rms_norm": Entry(OPERATORS["rms_norm"], reference.norm.rms_norm),
    "layer_norm": Entry(OPERATORS["layer_norm"], reference.norm.layer_norm),
    **{
        name: Entry(OPERATORS[name], getattr(reference.norm, name))
        for name in ("add_rms_norm", "add_layer_norm", "rms_norm_llama", "rms_norm_gemma")
    },
    "group_norm": Entry(OPERATORS["group_norm"], reference.norm.group_norm),
    "rms_norm_backward": Entry(OPERATORS["rms_norm_backward"], reference.norm.rms_norm_backward),
    "layer_norm_backward": Entry(
        OPERATORS["layer_norm_backward"], reference.norm.layer_norm_backward
    ),
    "attention": Entry(OPERATORS["attention"], reference.attention.attention),
    "causal_attention": Entry(
        OPERATORS["causal_attention"], partial(reference.attention.attention, causal=True)
    ),
    "window_attention": Entry(
        OPERATORS["window_attention"], partial(reference.attention.attention, causal=True)
    ),
    **{
        name: Entry(
            OPERATORS[name],
            partial(reference.attention.attention_varlen, causal=name.startswith("causal")),
            varlen_inputs,
        )
        for name in ("attention_varlen", "causal_attention_varlen")
    },
    "attention_backward": Entry(
        OPERATORS["attention_backward"],
        reference.attention_backward.attention_backward,
        attention_backward_inputs,
    ),
    "causal_attention_backward": Entry(
        OPERATORS["causal_attention_backward"],
        partial(reference.attention_backward.attention_backward, causal=True),
        partial(attention_backward_inputs, causal=True),
    ),
    **{
        "attention_decode" + form: Entry(
            OPERATORS["attention_decode" + form],
            getattr(reference.decode, "attention_decode" + form),
            partial(decode_inputs, quantized=form.endswith("fp8")),
        )
        for form in ("", "_paged", "_fp8", "_paged_fp8")
    },
    **{
        name: Entry(OPERATORS[name], getattr(reference.decode, name), mla_inputs)
        for name in ("mla_decode", "mla_decode_paged")
    },
    "merge_attention": Entry(
        OPERATORS["merge_attention"], reference.decode.merge_attention, merge_inputs
    ),
    "attention_chunked_prefill": Entry(
        OPERATORS["attention_chunked_prefill"],
        reference.decode.attention_decode_paged,
        decode_inputs,
    ),
    "rope": Entry(OPERATORS["rope"], reference.rope.rope, rope_inputs),
    "rope_batched": Entry(OPERATORS["rope_batched"], reference.rope.rope, rope_inputs),
}
