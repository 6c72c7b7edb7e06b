"""Functions with PyTorch's and FlashAttention's signatures and meaning, made of the ops.

They take a backend like the ops do: by `use` or NKI_SIMULATOR, else the default of the device.
What an original can do and this cannot (dropout, ALiBi ...) raises; nothing is passed on to it.
Results are dense, also where the original's follow the strides of its inputs.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor

from nki_kernels.machine.errors import OptionError, ShapeError
from nki_kernels.operators.norm import DEFAULT_EPS
from nki_kernels.torch_ops import functions as ops

__all__ = [
    "flash_attn_func",
    "flash_attn_varlen_func",
    "group_norm",
    "grouped_mm",
    "layer_norm",
    "linear",
    "rms_norm",
    "scaled_dot_product_attention",
]

_INFINITY = float("inf")


def _refuse(where: str, **given: object) -> None:
    """Raise for arguments that are not at the value that turns them off.

    Raises:
        OptionError: one of them is given.
    """
    found = [f"{name} is {value!r}" for name, value in given.items() if value]
    if found:
        raise OptionError(
            f"{where}: {', '.join(found)}; not supported here; leave it at its default, or call "
            "the original"
        )


# -- attention -------------------------------------------------------------------------------------


def scaled_dot_product_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    *,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """`torch.nn.functional.scaled_dot_product_attention`, as PyTorch 2.13 does it on CPUs.

    Causal is aligned to the top left; with a mask, a key must pass both; a row that attends nothing
    is 0; a mask of numbers is added to the scores, and its -inf excludes.

    Args:
        query: [..., H, L, E], or [..., L, E] without heads.
        key: [..., G, S, E].
        value: [..., G, S, Ev].
        attn_mask: bool (True attends) or of the dtype of `query`; broadcasts to [..., H, L, S].
        dropout_p: 0.
        is_causal: query i attends keys j <= i.
        scale: None is 1 / sqrt(E).
        enable_gqa: H may be a multiple of G.

    Returns:
        [..., H, L, Ev], dense.

    Raises:
        OptionError: dropout.
        ShapeError: heads or batches that do not fit each other.
    """
    _refuse("scaled_dot_product_attention", dropout_p=dropout_p)
    heads = _heads(query, key, enable_gqa)
    batch = _broadcast(*(x.shape[:-3] for x in (query, key, value)))
    q, k, v = (_four(x, batch) for x in (query, key, value))
    mask, bias = mask_and_bias(attn_mask, query, (*batch, heads, query.shape[-2], key.shape[-2]))
    out, _ = ops.attention(q, k, v, None, mask, bias, causal=is_causal, scale=scale)
    front = (*batch, heads) if max(x.dim() for x in (query, key, value)) > 2 else ()
    return out.reshape(*front, *out.shape[-2:])


def _broadcast(*shapes: Sequence[int]) -> torch.Size:
    found: torch.Size = torch.broadcast_shapes(*shapes)  # type: ignore[no-untyped-call]
    return found


def _heads(query: Tensor, key: Tensor, enable_gqa: bool) -> int:
    if query.dim() < 3:
        return 1
    ours, theirs = query.shape[-3], key.shape[-3]
    if ours != theirs and not (enable_gqa and theirs and ours % theirs == 0):
        raise ShapeError(
            f"scaled_dot_product_attention: query has {ours} heads, key {theirs}; they must be "
            "equal, or the first a multiple of the second with enable_gqa=True; repeat heads"
        )
    return ours


def _four(x: Tensor, batch: torch.Size) -> Tensor:
    """Return [..., H, L, E] as [B, H, L, E]."""
    if x.dim() < 3:
        return x[None, None]
    whole = x.expand(*batch, *x.shape[-3:])
    return whole.reshape(math.prod(batch), *x.shape[-3:])


def mask_and_bias(
    mask: Tensor | None, query: Tensor, shape: tuple[int, ...]
) -> tuple[Tensor | None, Tensor | None]:
    """Return a mask broadcast to the last four axes of `shape`, and a bias without infinities."""
    if mask is None:
        return None, None
    full = mask.expand(_broadcast(mask.shape, (1, 1, *shape[-2:])))
    if full.dim() > 4 or (len(shape) > 4 and math.prod(full.shape[:-3]) > 1):
        full = full.expand(shape).reshape(-1, *shape[-3:])
    full = full.reshape(-1, *full.shape[-3:])
    if full.dtype == torch.bool:
        return full, None
    if full.dtype != query.dtype:
        full = full.to(query.dtype)
    seen = full != -_INFINITY
    return seen, full.masked_fill(~seen, 0.0)


def flash_attn_func(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
) -> Tensor | tuple[Tensor, Tensor, None]:
    """`flash_attn.flash_attn_func`: causal is aligned to the bottom right.

    Query i attends keys j with p - left <= j <= p + right, p = i + Sk - Sq; -1 is no bound, and
    causal sets right to 0. A query that attends nothing is 0.

    Args:
        q: [B, Sq, H, D].
        k: [B, Sk, G, D], H a multiple of G.
        v: [B, Sk, G, E].
        dropout_p: 0.
        softmax_scale: None is 1 / sqrt(D).
        causal: see above.
        window_size: (left, right).
        softcap: 0 is no cap.
        alibi_slopes: None.
        deterministic: the results always are.
        return_attn_probs: return (out, lse, None).

    Returns:
        out [B, Sq, H, E]; lse [B, H, Sq] float32.

    Raises:
        OptionError: dropout, ALiBi.
    """
    _refuse("flash_attn_func", dropout_p=dropout_p, alibi_slopes=alibi_slopes is not None)
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    window, causal, mask = _window(q, k, causal, window_size)
    out, lse = ops.attention(
        q, k, v, None, mask,
        causal=causal, align="bottom-right", window=window, scale=softmax_scale,
        softcap=softcap or None,
    )  # fmt: skip
    out = out.transpose(1, 2).contiguous()
    return (out, lse, None) if return_attn_probs else out


def _window(
    q: Tensor, k: Tensor, causal: bool, window_size: tuple[int, int]
) -> tuple[int | None, bool, Tensor | None]:
    """Return (window, causal, mask) of the op: a mask where the two sides differ."""
    left, right = (None if size < 0 else size for size in window_size)
    if causal or right == 0:
        return None if left is None else left + 1, True, None
    if left == right:
        return None if left is None else left + 1, False, None
    rows, keys = q.shape[2], k.shape[2]
    p = torch.arange(rows, device=q.device)[:, None] + keys - rows
    j = torch.arange(keys, device=q.device)
    seen = torch.ones(rows, keys, dtype=torch.bool, device=q.device)
    if left is not None:
        seen = seen & (j >= p - left)
    if right is not None:
        seen = seen & (j <= p + right)
    return None, False, seen[None, None]


def flash_attn_varlen_func(  # noqa: PLR0913  (the published signature)
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
    block_table: Tensor | None = None,
) -> Tensor | tuple[Tensor, Tensor, None]:
    """`flash_attn.flash_attn_varlen_func`: sequences one behind the other, one kernel call each.

    Args:
        q: [total_q, H, D].
        k: [total_k, G, D].
        v: [total_k, G, E].
        cu_seqlens_q: [B + 1], where the queries of each sequence begin, and the end.
        cu_seqlens_k: likewise of the keys.
        max_seqlen_q: not needed; the lengths are read.
        max_seqlen_k: likewise.
        dropout_p: as in `flash_attn_func`.
        softmax_scale: likewise.
        causal: likewise.
        window_size: likewise.
        softcap: likewise.
        alibi_slopes: likewise.
        deterministic: likewise.
        return_attn_probs: likewise.
        block_table: None; see `attention_decode_paged`.

    Returns:
        out [total_q, H, E]; lse [H, total_q] float32.

    Raises:
        OptionError: dropout, ALiBi, a block table.
    """
    _refuse("flash_attn_varlen_func", block_table=block_table is not None)
    outs, sums = [q.new_empty(0, q.shape[1], v.shape[2])], []
    sums.append(q.new_empty(q.shape[1], 0, dtype=torch.float32))
    for (first, last), (start, stop) in zip(
        _spans(cu_seqlens_q), _spans(cu_seqlens_k), strict=True
    ):
        found = flash_attn_func(
            q[None, first:last], k[None, start:stop], v[None, start:stop],
            dropout_p, softmax_scale, causal, window_size, softcap, alibi_slopes,
            return_attn_probs=True,
        )  # fmt: skip
        outs.append(found[0][0])
        sums.append(found[1][0])
    out = torch.cat(outs)
    return (out, torch.cat(sums, dim=1), None) if return_attn_probs else out


def _spans(ends: Tensor) -> list[tuple[int, int]]:
    values: list[int] = ends.tolist()
    return list(pairwise(values))


# -- norms, products -------------------------------------------------------------------------------


def _rows(x: Tensor, normalized_shape: Sequence[int], where: str) -> Tensor:
    """Return [N, H]: the trailing axes that are normalized together as one."""
    shape = tuple(normalized_shape)
    if not shape or tuple(x.shape[-len(shape) :]) != shape:
        raise ShapeError(
            f"{where}: normalized_shape is {list(shape)}, input {list(x.shape)}; the last axes of "
            "the input must be normalized_shape; reshape it"
        )
    return x.reshape(-1, math.prod(shape))


def layer_norm(
    input: Tensor,
    normalized_shape: Sequence[int],
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = DEFAULT_EPS["layer_norm"],
) -> Tensor:
    """`torch.nn.functional.layer_norm`.

    Raises:
        ShapeError: a `normalized_shape` that the input does not end with.
    """
    rows = _rows(input, normalized_shape, "layer_norm")
    flat = (None if p is None else p.reshape(-1) for p in (weight, bias))
    return ops.layer_norm(rows, *flat, eps=eps).reshape(input.shape)


def group_norm(
    input: Tensor,
    num_groups: int,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = DEFAULT_EPS["layer_norm"],
) -> Tensor:
    """`torch.nn.functional.group_norm`, of [N, C, ...]."""
    rows = input.reshape(*input.shape[:2], math.prod(input.shape[2:]))
    y = ops.group_norm(rows, weight, bias, num_groups=num_groups, eps=eps)
    return y.reshape(input.shape)


def rms_norm(
    input: Tensor,
    normalized_shape: Sequence[int],
    weight: Tensor | None = None,
    eps: float | None = None,
) -> Tensor:
    """`torch.nn.functional.rms_norm`; eps None is the machine epsilon of float32 (float64).

    Raises:
        ShapeError: a `normalized_shape` that the input does not end with.
    """
    rows = _rows(input, normalized_shape, "rms_norm")
    if eps is None:
        eps = torch.finfo(torch.promote_types(input.dtype, torch.float32)).eps
    flat = None if weight is None else weight.reshape(-1)
    return ops.rms_norm(rows, flat, eps=eps).reshape(input.shape)


def linear(input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """`torch.nn.functional.linear`, of any leading axes.

    Args:
        input: [..., K].
        weight: [N, K], or [K].
        bias: [N], or a scalar with a weight [K].
    """
    matrix = weight[None] if weight.dim() == 1 else weight
    row = None if bias is None else bias.reshape(-1)
    y = ops.linear(input.reshape(-1, input.shape[-1]), matrix, row)
    return y.reshape(*input.shape[:-1], *weight.shape[:-1])


def grouped_mm(
    mat_a: Tensor,
    mat_b: Tensor,
    *,
    offs: Tensor | None = None,
    bias: Tensor | None = None,
    out_dtype: torch.dtype | None = None,
) -> Tensor:
    """`torch.nn.functional.grouped_mm`: rows in groups, or products side by side.

    Args:
        mat_a: [M, K] with `offs`; [G, M, K] without.
        mat_b: [G, K, N].
        offs: [G] int32, where each group of rows ends; rows from the last on are 0.
        bias: None.
        out_dtype: None means that of `mat_a`.

    Raises:
        OptionError: a bias.
        ShapeError: another pairing of ranks.
    """
    _refuse("grouped_mm", bias=bias is not None)
    if mat_a.dim() == 2 and mat_b.dim() == 3 and offs is not None:
        return ops.grouped_matmul(mat_a, mat_b, offs, out_dtype=out_dtype)
    if mat_a.dim() == 3 and mat_b.dim() == 3 and offs is None:
        return ops.bmm(mat_a, mat_b, out_dtype=out_dtype)
    raise ShapeError(
        f"grouped_mm: {mat_a.dim()}-D by {mat_b.dim()}-D {'without' if offs is None else 'with'} "
        "offs; allowed are 2-D by 3-D with offs and 3-D by 3-D without; use torch's for the others"
    )
