"""Formulas, gradients and rows of a mixture of experts in parts.

What a gradient needs of products goes through the ops; gathers, sums over choices and the slopes of
the scores are plain PyTorch in float32, on every backend.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from nki_kernels.operators import OPERATORS
from nki_kernels.operators.router import DEFAULTS
from nki_kernels.torch_ops.products import wide_type
from nki_kernels.torch_ops.row import Calls, Grads, Row, Tensors

_INFINITY = float("inf")
_LARGEST = torch.finfo(torch.float32).max

# -- router ----------------------------------------------------------------------------------------


def _logits(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Logits beyond float32 count as its largest number, NaN as the negative of that."""
    wide = wide_type(x)
    logits = torch.mm(x.to(wide), weight.to(wide))
    if bias is not None:
        logits = logits + bias.to(wide)
    return logits.nan_to_num(nan=-_LARGEST, posinf=_LARGEST, neginf=-_LARGEST)


def _scored(logits: Tensor, score: str) -> Tensor:
    return torch.softmax(logits, -1) if score == "softmax" else torch.sigmoid(logits)


def _in_best_groups(ranked: Tensor, groups: int, top_groups: int, group_score: str) -> Tensor:
    """Return [T, E], whether an expert belongs to one of the best groups of its token."""
    members = ranked.reshape(ranked.shape[0], groups, -1).sort(-1, descending=True).values
    value = members[..., 0] if group_score == "max" else members[..., :2].sum(-1)
    best = value.sort(dim=-1, descending=True, stable=True).indices[:, :top_groups]
    inside = torch.zeros_like(value, dtype=torch.bool).scatter_(1, best, True)
    return inside.repeat_interleave(ranked.shape[1] // groups, 1)


def router(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    selection_bias: Tensor | None = None,
    **options: Any,
) -> Tensors:
    """Return indices, weights and counts; see `nki_kernels.ops.router`."""
    given = {**DEFAULTS, **options}
    score, groups, top_groups = given["score"], given["groups"], given["top_groups"]
    logits = _logits(x, weight, bias)
    ranked = _scored(logits, score) if given["score_first"] else logits
    if selection_bias is not None:
        ranked = (ranked + selection_bias.to(ranked.dtype)).clamp(-_LARGEST, _LARGEST)
    # The softmax is monotone, and scores that underflow to the same number are still ordered.
    order = logits if selection_bias is None and score == "softmax" else ranked
    if top_groups is not None and top_groups < groups:
        inside = _in_best_groups(ranked, groups, top_groups, given["group_score"])
        order = order.masked_fill(~inside, -_INFINITY)
    indices = order.sort(dim=-1, descending=True, stable=True).indices[:, : given["top_k"]]
    weights = _weights(logits, indices, given)
    chosen = torch.nn.functional.one_hot(indices.flatten(), weight.shape[1]).sum(0)
    return indices.to(torch.int32), weights.to(torch.float32), chosen.to(torch.int32)


def _weights(logits: Tensor, indices: Tensor, given: dict[str, Any]) -> Tensor:
    score = given["score"]
    over_chosen = given["renormalize"] or not given["score_first"]
    if score == "softmax" and not over_chosen:
        weights = torch.softmax(logits, -1).gather(1, indices)
    else:
        weights = _scored(logits.gather(1, indices), score)
        if score == "sigmoid" and given["renormalize"]:
            weights = weights / weights.sum(-1, keepdim=True)
    scaled: Tensor = weights * given["scale"]
    return scaled


def _router_gradient(
    call: Calls, needs: tuple[bool, ...], grads: Grads, *saved: Any, **options: Any
) -> Grads:
    """Return the gradients of x, weight and bias; the choice itself has none."""
    x, weight, bias = saved[:3]
    indices = saved[4].long()
    given = {**DEFAULTS, **options}
    logits = _logits(x, weight, bias)
    dweights = grads[1]
    if dweights is None:
        return None, None, None, None
    dlogits = _logits_gradient(logits, indices, dweights.to(logits.dtype), given)
    narrow = dlogits.to(x.dtype)
    return (
        call["matmul_nt"](narrow, weight) if needs[0] else None,
        call["matmul_tn"](x, narrow) if needs[1] else None,
        dlogits.sum(0).to(bias.dtype) if bias is not None and needs[2] else None,
        None,
    )


def _logits_gradient(
    logits: Tensor, indices: Tensor, dweights: Tensor, given: dict[str, Any]
) -> Tensor:
    """d weights / d logits, applied to the gradients of the weights."""
    grad = dweights * given["scale"]
    zeros = torch.zeros_like(logits)
    if given["score"] == "softmax":
        if given["score_first"] and not given["renormalize"]:
            s = torch.softmax(logits, -1)
            ds = zeros.scatter(1, indices, grad)
            return s * (ds - (ds * s).sum(-1, keepdim=True))
        s = torch.softmax(logits.gather(1, indices), -1)
        return zeros.scatter(1, indices, s * (grad - (grad * s).sum(-1, keepdim=True)))
    s = torch.sigmoid(logits.gather(1, indices))
    if given["renormalize"]:
        total = s.sum(-1, keepdim=True)
        grad = (grad - (grad * s).sum(-1, keepdim=True) / total) / total
    return zeros.scatter(1, indices, grad * s * (1 - s))


# -- dispatch and combine --------------------------------------------------------------------------


def dispatch(x: Tensor, indices: Tensor, *, experts: int) -> Tensors:
    """Sort the choices of all tokens by expert, stable; absent ones last."""
    flat = indices.flatten().long()
    absent = (flat < 0) | (flat >= experts)
    ids = flat.masked_fill(absent, experts)
    order = ids.sort(stable=True).indices
    places = torch.arange(flat.shape[0], device=x.device)
    slots = torch.zeros_like(flat).scatter(0, order, places).masked_fill(absent, flat.shape[0])
    offsets = torch.nn.functional.one_hot(ids, experts + 1).sum(0)[:experts].cumsum(0)
    rows = x[order // max(indices.shape[1], 1)]
    return rows, slots.reshape(indices.shape).to(torch.int32), offsets.to(torch.int32)


def _dispatch_gradient(
    call: Calls, needs: tuple[bool, ...], grads: Grads, *saved: Any, experts: int
) -> Grads:
    """dx[t] = sum_k drows[slots[t, k]]: `combine`, with the places of absent choices filled in."""
    indices, slots, offsets = saved[1], saved[3], saved[4]
    if grads[0] is None or not needs[0]:
        return None, None
    flat = slots.flatten().long()
    absent = flat == flat.shape[0]
    behind = offsets[-1].long() + absent.long().cumsum(0) - 1
    places = torch.where(absent, behind, flat).reshape(indices.shape)
    return call["combine"](grads[0], places.to(torch.int32)), None


def combine(
    rows: Tensor,
    slots: Tensor,
    weights: Tensor | None = None,
    *,
    out_dtype: torch.dtype | None = None,
) -> Tensors:
    """y[t] = sum_k weights[t, k] * rows[slots[t, k]], absent slots left out."""
    taken = _gathered(rows, slots)
    if weights is not None:
        taken = taken * weights.to(taken.dtype)[..., None]
    return (taken.sum(1).to(out_dtype or rows.dtype),)


def _gathered(rows: Tensor, slots: Tensor) -> Tensor:
    """Return [T, K, H] in the wide dtype, 0 where a slot is absent."""
    wide = wide_type(rows)
    if rows.shape[0] == 0:
        return rows.new_zeros((*slots.shape, rows.shape[1]), dtype=wide)
    present = (slots >= 0) & (slots < rows.shape[0])
    taken = rows[slots.long().clamp(0, rows.shape[0] - 1)].to(wide)
    return taken.masked_fill(~present[..., None], 0.0)


def _combine_gradient(
    call: Calls,
    needs: tuple[bool, ...],
    grads: Tensors,
    rows: Tensor,
    slots: Tensor,
    weights: Tensor | None = None,
    *,
    out_dtype: torch.dtype | None = None,
) -> Grads:
    """drows[s] = sum of weights[t, k] * dy[t] over slots[t, k] = s; dweights = dy·rows[slots]."""
    wide = wide_type(rows, grads[0])
    dy, count = grads[0].to(wide), rows.shape[0]
    drows = dweights = None
    if needs[0]:
        parts = dy[:, None, :].expand(-1, slots.shape[1], -1)
        if weights is not None:
            parts = parts * weights.to(wide)[..., None]
        places = slots.long()
        places = torch.where((places >= 0) & (places < count), places, count).flatten()
        room = dy.new_zeros((count + 1, rows.shape[1]))
        drows = room.index_add(0, places, parts.reshape(-1, rows.shape[1]))[:count].to(rows.dtype)
    if needs[2] and weights is not None:
        dweights = (_gathered(rows, slots).to(wide) * dy[:, None, :]).sum(-1).to(weights.dtype)
    return drows, None, dweights


# -- grouped_matmul --------------------------------------------------------------------------------


def grouped_matmul(
    a: Tensor, b: Tensor, offsets: Tensor, *, out_dtype: torch.dtype | None = None
) -> Tensors:
    """c[m] = a[m]·b[g] for offsets[g - 1] <= m < offsets[g]; later rows are 0."""
    if a.dtype != b.dtype or a.shape[1] != b.shape[1]:
        torch.mm(a, b[0])  # refused in PyTorch's words
    wide = wide_type(a)
    c = a.new_zeros((a.shape[0], b.shape[2]), dtype=wide)
    for group, (start, stop) in enumerate(_spans(offsets)):
        c[start:stop] = torch.mm(a[start:stop].to(wide), b[group].to(wide))
    return (c.to(out_dtype or a.dtype),)


def _spans(offsets: Tensor) -> list[tuple[int, int]]:
    if offsets.is_meta:
        return []
    ends: list[int] = offsets.tolist()
    return list(zip([0, *ends[:-1]], ends, strict=True))


@torch.library.custom_op("nki_kernels::_grouped_outer", mutates_args=())
def _grouped_outer(a: Tensor, dc: Tensor, offsets: Tensor) -> Tensor:
    """Return aᵀ·dc of each group, [G, K, N], in the wide dtype: plain PyTorch, opaque to graphs."""
    wide = wide_type(a, dc)
    found = a.new_empty((offsets.shape[0], a.shape[1], dc.shape[1]), dtype=wide)
    for group, (start, stop) in enumerate(_spans(offsets)):
        found[group] = torch.mm(a[start:stop].t().to(wide), dc[start:stop].to(wide))
    return found


@_grouped_outer.register_fake
def _(a: Tensor, dc: Tensor, offsets: Tensor) -> Tensor:
    shape = (offsets.shape[0], a.shape[1], dc.shape[1])
    return a.new_empty(shape, dtype=wide_type(a, dc))


def _grouped_gradient(
    call: Calls,
    needs: tuple[bool, ...],
    grads: Tensors,
    a: Tensor,
    b: Tensor,
    offsets: Tensor,
    *,
    out_dtype: torch.dtype | None = None,
) -> Grads:
    """da is the op itself with every matrix transposed; db is a product per group in PyTorch."""
    wide = torch.promote_types(grads[0].dtype, a.dtype)
    dc = grads[0].to(wide)
    da = call(dc, b.mT.to(wide), offsets, out_dtype=a.dtype) if needs[0] else None
    db = _grouped_outer(a, dc, offsets).to(b.dtype) if needs[1] else None
    return da, db, None


_ROUTER_OPTIONS = (
    "int top_k, str score='softmax', bool score_first=True, bool renormalize=False, "
    "float scale=1.0, int groups=1, int? top_groups=None, str group_score='max'"
)

ROWS = (
    Row(
        op=OPERATORS["router"],
        options=_ROUTER_OPTIONS,
        notes=("the options are those of `nki_kernels.ops.router`.",),
        plain=router,
        backward=_router_gradient,
        keeps_outputs=True,
    ),
    Row(
        op=OPERATORS["dispatch"],
        options="int experts",
        notes=("experts: number of experts; other ids are absent.",),
        plain=dispatch,
        backward=_dispatch_gradient,
        keeps_outputs=True,
    ),
    Row(
        op=OPERATORS["combine"],
        options="ScalarType? out_dtype=None",
        notes=("out_dtype: dtype of the result; None means that of rows.",),
        plain=combine,
        backward=_combine_gradient,
    ),
    Row(
        op=OPERATORS["grouped_matmul"],
        options="ScalarType? out_dtype=None",
        notes=("out_dtype: dtype of the result; None means that of a.",),
        plain=grouped_matmul,
        backward=_grouped_gradient,
        autocast="low",
    ),
)
