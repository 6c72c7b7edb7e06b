"""Hugging Face transformers: attention, its mask and the experts under one name, "nki_kernels".

Only this file knows `transformers`; it needs the extra ``hf``. `register` makes the name known:

    model.set_attn_implementation("nki_kernels"); model.set_experts_implementation("nki_kernels")
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from nki_kernels.machine.errors import OptionError
from nki_kernels.torch_ops import functional
from nki_kernels.torch_ops import functions as ops

NAME = "nki_kernels"


def register() -> None:
    """Make attention, mask and experts known to transformers under `NAME`; twice does no harm.

    Raises:
        ImportError: transformers is not installed.
    """
    from transformers import (  # type: ignore[import-not-found, unused-ignore]
        AttentionInterface,
        AttentionMaskInterface,
    )
    from transformers.integrations.moe import (  # type: ignore[import-not-found, unused-ignore]
        ExpertsInterface,
    )
    from transformers.masking_utils import (  # type: ignore[import-not-found, unused-ignore]
        ALL_MASK_ATTENTION_FUNCTIONS,
    )

    AttentionInterface.register(NAME, attention_forward)
    # True to attend, or None where "causal" or "everything" says it.
    AttentionMaskInterface.register(NAME, ALL_MASK_ATTENTION_FUNCTIONS["sdpa"])
    ExpertsInterface.register(NAME, experts_forward)


def attention_forward(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    is_causal: bool | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    **others: Any,
) -> tuple[Tensor, None]:
    """Attention of a transformers model: `attention`, or `attention_decode` for one new token.

    Args:
        module: the attention layer; `is_causal` may be its attribute.
        query: [B, H, L, D], strided.
        key: [B, G, S, D], H a multiple of G.
        value: [B, G, S, E].
        attention_mask: bool [B, 1, L, S], numbers to add, or None: causal, or everything.
        scaling: None is 1 / sqrt(D).
        dropout: 0.
        is_causal: None means the module's.
        softcap: None is no cap.
        s_aux: [H], the sinks.
        others: what the mask says already (a window, positions), and what changes no value.

    Returns:
        [B, L, H, E], dense, and None: no weights.

    Raises:
        OptionError: dropout, a position bias, a paged cache of transformers.
    """
    for name in ("position_bias", "cache"):
        if others.get(name) is not None:
            raise OptionError(f"attention of {NAME}: {name} is given; use 'sdpa' for this model")
    if dropout:
        raise OptionError(f"attention of {NAME}: dropout is {dropout}; set attention_dropout to 0")
    causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
    causal = bool(causal) and attention_mask is None and query.shape[2] > 1
    sinks = None if s_aux is None else s_aux.float()
    options: dict[str, Any] = {"scale": scaling, "softcap": softcap}
    if query.shape[2] == 1 and attention_mask is None and not torch.compiler.is_compiling():
        lengths = torch.full((key.shape[0],), key.shape[2], dtype=torch.int32, device=key.device)
        if torch.is_grad_enabled() and any(x.requires_grad for x in (query, key, value)):
            out, _ = ops.attention(query, key, value, sinks, **options)
        else:
            out, _ = ops.attention_decode(query, key, value, lengths, sinks, **options)
        return out.transpose(1, 2).contiguous(), None
    if causal and key.shape[2] > query.shape[2]:  # a static cache, empty behind the new tokens
        key, value = (x[:, :, : query.shape[2]] for x in (key, value))
    mask, bias = functional.mask_and_bias(attention_mask, query, (*query.shape[:3], key.shape[2]))
    out, _ = ops.attention(query, key, value, sinks, mask, bias, causal=causal, **options)
    return out.transpose(1, 2).contiguous(), None


def experts_forward(
    self: Any, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor
) -> Tensor:
    """The experts of a transformers model: `dispatch`, two `grouped_matmul`, `combine`.

    Args:
        self: the module of the experts, with gate_up_proj (or up_proj) and down_proj.
        hidden_states: [T, H].
        top_k_index: [T, K]; from the number of experts on: absent.
        top_k_weights: [T, K].

    Returns:
        [T, H].
    """
    count = self.num_experts
    indices = top_k_index.to(torch.int32)
    rows, slots, offsets = ops.dispatch(hidden_states, indices, experts=count)
    first = "gate_up_proj" if self.has_gate else "up_proj"
    hidden = _projected(self, first, rows, offsets)
    hidden = self._apply_gate(hidden) if self.has_gate else self.act_fn(hidden)
    out = _projected(self, "down_proj", hidden.to(rows.dtype), offsets)
    return ops.combine(out, slots, top_k_weights.float())


def _projected(module: Any, name: str, rows: Tensor, offsets: Tensor) -> Tensor:
    weight = getattr(module, name)
    matrices = weight if module.is_transposed else weight.mT
    y = ops.grouped_matmul(rows, matrices, offsets)
    if not module.has_bias:
        return y
    places = torch.arange(rows.shape[0], device=rows.device, dtype=torch.int32)
    expert = torch.searchsorted(offsets, places, right=True).clamp(max=offsets.shape[0] - 1)
    biased: Tensor = y + getattr(module, f"{name}_bias")[expert]
    return biased
