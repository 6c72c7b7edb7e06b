"""How AWS's kernels are called at one of our shapes: arguments as data, outputs where they lack.

Every call takes the module of the kernel and the sizes of our operator's axes, and returns a
function and its arguments by name. Arrays are shapes without values, except those that steer.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, TypeAlias

import nki
import nki.isa as nisa
import nki.language as nl
import numpy as np

from bench.moe import expert_choices
from nki_kernels.machine.tensor import Abstract
from nki_kernels.operators import OPERATORS
from nki_kernels.operators.contract import Axes

#: The kernel and its arguments by name.
Called: TypeAlias = tuple[Any, dict[str, Any]]
#: From the kernel's module, our axes and the number of cores.
Call: TypeAlias = Callable[[Any, Axes, int], Called]

_DTYPE = "bfloat16"


def _array(*shape: int, dtype: str = _DTYPE) -> Abstract:
    return Abstract(shape, dtype)


def mlp(module: Any, axes: Axes, lnc: int) -> Called:
    """SwiGLU without norm; weights [H, I]."""
    tokens, hidden, inner = axes["T"], axes["H"], axes["I"]
    return module.mlp, {
        "hidden_tensor": _array(1, tokens, hidden),
        "gate_proj_weights_tensor": _array(hidden, inner),
        "up_proj_weights_tensor": _array(hidden, inner),
        "down_proj_weights_tensor": _array(inner, hidden),
    }


def qkv(module: Any, axes: Axes, lnc: int) -> Called:
    """The projection alone: no norm, no rotation, no bias."""
    return module.qkv, {
        "input": _array(1, axes["M"], axes["K"]),
        "fused_qkv_weights": _array(axes["K"], axes["N"]),
    }


def qkv_fused(module: Any, axes: Axes, lnc: int) -> Called:
    """RMS norm before, half-split rotation after; no bias."""
    tokens, hidden, heads, groups, size = (axes[letter] for letter in "THQGD")
    angles = _array(1, tokens, size)
    return module.qkv, {
        "input": _array(1, tokens, hidden),
        "fused_qkv_weights": _array(hidden, axes["C"] * size),
        "fused_norm_type": module.NormType.RMS_NORM,
        "gamma_norm_weights": _array(1, hidden),
        "fused_rope": True, "cos_cache": angles, "sin_cache": angles,
        "d_head": size, "num_q_heads": heads, "num_kv_heads": groups,
    }  # fmt: skip


def output_projection_cte(module: Any, axes: Axes, lnc: int) -> Called:
    """Attention [1, heads, 128, tokens]: the sum runs over heads and their size, K of ours."""
    head = nl.tile_size.pmax
    return module.output_projection_cte, {
        "attention": _array(1, axes["K"] // head, head, axes["M"]),
        "weight": _array(axes["K"], axes["N"]),
    }


def output_projection_tkg(module: Any, axes: Axes, lnc: int) -> Called:
    """Attention [128, tokens, heads, 1]."""
    head = nl.tile_size.pmax
    return module.output_projection_tkg, {
        "attention": _array(head, axes["M"], axes["K"] // head, 1),
        "weight": _array(axes["K"], axes["N"]),
    }


def rmsnorm_quant(module: Any, axes: Axes, lnc: int) -> Called:
    """RMS norm and fp8 by row; its tests give the weight another rank on two cores."""
    rows, width = axes["N"], axes["H"]
    return module.rmsnorm_quant_kernel, {
        "hidden": _array(1, rows, width),
        "ln_w": _array(width) if lnc == 1 else _array(1, width),
        "kargs": module.RmsNormQuantKernelArgs(),
    }


def rope(module: Any, axes: Axes, lnc: int) -> Called:
    """Half-split rotation, head size outermost."""
    batch, heads, rows, size = (axes[letter] for letter in "BHSD")
    return module.RoPE, {
        "x_in": _array(size, batch, heads, rows),
        "cos": _array(size // 2, batch, rows),
        "sin": _array(size // 2, batch, rows),
        "lnc_shard": lnc > 1,
    }


def rope_hf(module: Any, axes: Axes, lnc: int) -> Called:
    """Half-split rotation in our layout; four fifths of the heads as queries, the rest as keys."""
    batch, heads, rows, size = (axes[letter] for letter in "BHSD")
    keys = max(1, heads // 5)
    q, k = (batch, heads - keys, rows, size), (batch, keys, rows, size)
    angles = _array(batch, rows, size)
    given = {"q": _array(*q), "k": _array(*k), "q_out": _array(*q), "k_out": _array(*k)}
    return module.rope_hf, {**given, "cos": angles, "sin": angles}


def attention_cte(module: Any, axes: Axes, lnc: int, *, causal: bool = True) -> Called:
    """Queries and values with tokens before the head size, keys the other way round."""
    batch, heads, groups, m, n, d, e = (axes[letter] for letter in "BHGMNDE")
    return module.attention_cte, {
        "q": _array(batch * heads, m, d),
        "k": _array(batch * groups, d, n),
        "v": _array(batch * groups, n, e),
        "scale": d**-0.5,
        "causal_mask": causal,
    }


def attention_full(module: Any, axes: Axes, lnc: int) -> Called:
    """The same without a mask."""
    return attention_cte(module, axes, lnc, causal=False)


def attention_bwd(module: Any, axes: Axes, lnc: int) -> Called:
    """Every operand [batch, heads, head size, tokens]; the LSE in tiles of a partition's rows."""
    batch, heads, groups, m, n, d = (axes[letter] for letter in "BHGMND")
    rows = nl.tile_size.pmax
    query, key = _array(batch, heads, d, m), _array(batch, groups, d, n)
    return module.attention_bwd, {
        "q_ref": query, "k_ref": key, "v_ref": key, "o_ref": query, "dy_ref": query,
        "lse_ref": _array(batch, heads, rows, m // rows, dtype="float32"),
        "use_causal_mask": True, "mixed_precision": True,
    }  # fmt: skip


def attention_tkg(module: Any, axes: Axes, lnc: int) -> Called:
    """One KV head: ours become sequences; the mask comes as positions, q and k lie in SBUF."""
    groups, rows, d = axes["G"], axes["T"], axes["D"]
    batch, queries, keys = axes["B"] * groups, axes["H"] // groups, axes["S"]
    config = module.AttnTKGConfig(
        bs=batch, q_head=queries, s_active=rows, curr_sprior=keys, full_sprior=keys, d_head=d,
        tp_k_prior=True, use_pos_id=True, qk_in_sb=True,
    )  # fmt: skip
    prior = _array(batch, 1, keys, d)
    given = {
        "q": _array(d, batch * queries * rows), "k_active": _array(d, batch * rows),
        "v_active": _array(batch, 1, rows, d), "k_prior": prior, "v_prior": prior,
        "mask": _array(rows, batch, queries, rows, dtype="uint8"),
        "positions": _array(batch, rows, dtype="float32"),
    }  # fmt: skip
    return _decode(module, config), given


def _decode(module: Any, config: Any) -> Any:
    """A kernel round `attention_tkg`, which is none: output, SBUF and operands on the chip."""

    @nki.jit
    def attention_tkg(
        q: Any, k_active: Any, v_active: Any, k_prior: Any, v_prior: Any, mask: Any, positions: Any
    ) -> Any:
        # Its tests leave the same margin to the compiler.
        space = module.SbufManager(0, nl.tile_size.total_available_sbuf_size - 16 * 1024)
        space.open_scope()
        inside = []
        for array in (q, k_active):
            inside.append(space.alloc_stack(array.shape, dtype=array.dtype, buffer=nl.sbuf))
            nisa.dma_copy(dst=inside[-1], src=array)
        shape = (config.bs, config.q_head, config.d_head, config.s_active)
        out = nl.ndarray(shape, dtype=q.dtype, buffer=nl.shared_hbm)
        result, _ = module.attention_tkg(
            *inside, v_active, k_prior, v_prior, mask, out, config, space, rope_pos_ids=positions
        )
        space.close_scope()
        return result

    return attention_tkg


def router_topk(module: Any, axes: Axes, lnc: int, *, turned: bool = False) -> Called:
    """Softmax before the choice; affinities in a row of all experts; x [T, H] or [H, T]."""
    tokens, hidden, experts, top_k = (axes[letter] for letter in "THEK")

    @nki.jit
    def router(x: Any, w: Any) -> Any:
        shapes = (((tokens, experts), nl.bfloat16), ((tokens, experts), nl.bfloat16),
                  ((tokens, top_k), nl.uint32))  # fmt: skip
        outputs = [nl.ndarray(s, dtype=t, buffer=nl.shared_hbm) for s, t in shapes]
        module.router_topk(
            x, w, None, *outputs, act_fn=module.common_types.RouterActFnType.SOFTMAX, k=top_k,
            x_hbm_layout=0 if turned else 1, x_sb_layout=0, shard_on_tokens=lnc > 1,
        )  # fmt: skip
        return tuple(outputs)

    x = _array(hidden, tokens) if turned else _array(tokens, hidden)
    return router, {"x": x, "w": _array(hidden, experts)}


def router_topk_turned(module: Any, axes: Axes, lnc: int) -> Called:
    """The same with x as it comes from a kernel that leaves it turned."""
    return router_topk(module, axes, lnc, turned=True)


def _choices(axes: Axes) -> Any:
    """The experts of every token that our operator is timed with."""
    op = OPERATORS["experts"]
    return expert_choices(op.input_shapes(axes), _DTYPE, 0)[1]


def moe_tkg(module: Any, axes: Axes, lnc: int) -> Called:
    """The selected experts of a few tokens, weighted after them."""
    tokens, hidden, inner, experts = (axes[letter] for letter in "THIE")
    after = module.ExpertAffinityScaleMode.POST_SCALE
    return module.moe_tkg, {
        "hidden_input": _array(tokens, hidden),
        "expert_gate_up_weights": _array(experts, hidden, 2, inner),
        "expert_down_weights": _array(experts, inner, hidden),
        "expert_affinities": _array(tokens, experts),
        "expert_index": _choices(axes),
        "is_all_expert": False,
        "expert_affinities_scaling_mode": after,
    }


def moe_cte(module: Any, axes: Axes, lnc: int) -> Called:
    """Experts on a schedule of blocks made beforehand; each expert's last block is padded."""
    tokens, hidden, inner, experts, top_k = (axes[letter] for letter in "THIEK")
    # The blocks it takes; the smaller one where an expert's rows would not fill the larger.
    size = 512 if tokens * top_k // experts >= 512 else 256
    order, owner = schedule(_choices(axes), experts, size)
    return module.moe_cte, {
        "hidden_states": _array(tokens, hidden),
        "expert_affinities_masked": _array(tokens * experts, 1),
        "gate_up_proj_weight": _array(experts, hidden, 2, inner),
        "down_proj_weight": _array(experts, inner, hidden),
        "token_position_to_id": order,
        "block_to_expert": owner,
        "block_size": size,
        "spec": module.MoECTESpec(implementation=module.MoECTEImplementation.shard_on_block),
        "skip_dma": module.SkipMode(True, False),
    }


def schedule(chosen: Any, experts: int, size: int) -> tuple[Any, Any]:
    """The rows of every block (-1: padding) and the expert of every block."""
    blocks, owners = [], []
    for expert in range(experts):
        rows = np.flatnonzero((chosen == expert).any(axis=1)).astype(np.int32)
        padded = np.full(-(-len(rows) // size) * size, -1, np.int32)
        padded[: len(rows)] = rows
        blocks.append(padded)
        owners += [expert] * (len(padded) // size)
    return np.concatenate(blocks), np.array(owners, np.int32).reshape(-1, 1)


def tutorial(name: str, **keywords: int) -> Call:
    """A matmul of AWS's tutorial: A [K, M], B [K, N]."""

    def call(module: Any, axes: Axes, lnc: int) -> Called:
        given: Mapping[str, Any] = {
            "lhsT": _array(axes["K"], axes["M"]), "rhs": _array(axes["K"], axes["N"])
        }  # fmt: skip
        return getattr(module, name), {**given, **keywords}

    return call
