"""Gradients of attention from its log-sums."""

from __future__ import annotations

from dataclasses import dataclass

import nki
import nki.language as nl

from nki_kernels.kernels.attention.backward_loads import BackwardLoads
from nki_kernels.kernels.attention.backward_plan import steps_of
from nki_kernels.kernels.attention.backward_scores import Scores
from nki_kernels.kernels.attention.backward_sums import BackwardSums


@dataclass(frozen=True)
class AttentionBackwardConfig(nl.NKIObject):
    """Tuning of the kernel for gradients of attention. No field changes the mathematics.

    Attributes:
        keys: keys of a block, whole tiles.
        segment: tiles of queries that stay in SBUF for all blocks of keys.
        chunk: tiles of queries per load.
        near, ahead: steps between the loads for a step and its scores: at least, and as far as one
            load per step reaches.
        ready: steps between a step's row statistics and its scores.
        batch: steps whose softcap is taken together.
        dv_lag, dk_lag, dq_lag: steps as wide as a block between a step's scores and its products
            with dO, Q and K; narrow ones, on a diagonal, count by their width.
        dma_transposes: the DMA engines transpose dS, not PE.
        fill: pad the contraction of the scores to all rows of the array.
        hwdge: copy through the hardware descriptor engine (gen3 and later).
    """

    keys: int
    segment: int
    chunk: int
    near: int
    ahead: int
    ready: int
    batch: int
    dv_lag: int
    dk_lag: int
    dq_lag: int
    dma_transposes: bool
    fill: bool
    hwdge: bool


@nki.jit
def attention_backward(do, q, k, v, out, lse, sinks, mask, bias, rule, out_dtype, config):
    """Gradients of a loss, from do = dloss/dout, through `forward.attention`.

    p_ij = exp(s_ij - lse_i), delta_i = do_i·out_i, ds_ij = p_ij (do_i·v_j - delta_i)
    dv_j = sum_i p_ij do_i; dk_j = scale sum_i ds_ij q_i; dq_i = scale sum_j ds_ij k_j
    dsink = -sum_i exp(sink - lse_i) delta_i; dbias = ds. A softcap multiplies the ds of dq and dk
    by 1 - (s / softcap)^2.

    Args:
        do: [B, H, Sq, Dv] HBM, dtype of q.
        q: [B, H, Sq, D] HBM, bfloat16 | float16 | float32.
        k: [B, Hkv, Sk, D] HBM, dtype of q.
        v: [B, Hkv, Sk, Dv] HBM, dtype of q.
        out: [B, H, Sq, Dv] HBM, dtype of q, as the forward pass returned it.
        lse: [B, H, Sq] HBM float32, likewise.
        sinks: [H] HBM float32 or None.
        mask: [1 | B, 1 | H, Sq, Sk] HBM, uint8, 1 to attend and 0 not to, or None.
        bias: the same shape, dtype of q, added to the scores, or None.
        rule: AttentionRule.
        out_dtype: dtype of the results but dsinks.
        config: AttentionBackwardConfig.

    Returns:
        dq, dk, dv in HBM, in the shapes of q, k and v, and where they exist dsinks [H] float32 and
        dbias in the shape of bias. What attends nothing has 0.
    """
    steps = steps_of(q.shape, k.shape, rule, config)
    loads = BackwardLoads((do, q, k, v, out, lse), steps, config)
    scores = Scores((q, sinks, mask, bias), rule, out_dtype, config)
    sums = BackwardSums(q, k, v, rule, out_dtype, config)
    # The DMA engines wait for ds by themselves; PE must have other work until it is there.
    stages = (
        (scores.turn, 0 if config.dma_transposes else config.dk_lag),
        (sums.add_dv, config.dv_lag),
        (sums.add_dk, config.dk_lag),
        (sums.add_dq, config.dq_lag),
    )
    done = [0, 0, 0, 0]
    # Columns of scores up to each step, and up to the one in turn.
    ends, behind = [], 0
    for at in range(len(steps)):
        if rule.softcap and at % config.batch == 0:
            loads.run_to(at + config.batch, at + config.ahead)
            scores.cap(steps[at : at + config.batch])
        loads.run_to(at + config.near, at + config.ahead)
        loads.prepare(at + config.ready)
        scores.weigh(steps[at])
        sums.flush()
        if steps[at]["closes segment"]:
            scores.close(steps[at]["tile"]["segment"])
        behind += steps[at]["columns"][1] - steps[at]["columns"][0]
        ends.append(behind)
        for number in range(len(stages)):
            add, lag = stages[number]
            last = at == len(steps) - 1
            while done[number] <= at and (last or behind - ends[done[number]] >= lag * config.keys):
                add(steps[done[number]])
                done[number] += 1
    sums.close()
    results = [sums.dq, sums.dk, sums.dv]
    if sinks is not None:
        results.append(scores.store_dsinks())
    if bias is not None:
        results.append(scores.store_dbias())
    return tuple(results)
