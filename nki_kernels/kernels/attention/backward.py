"""Gradients of attention from its log-sums: five products per score, one transpose.

Scores stand with 128 queries on partitions and 512 keys along the free axis. Then lse is the bias
of Scalar's exponential and delta the scalar of Vector's instruction, both per partition; P and dS
leave their engines as the moving operands of dV^T += dO^T P and dK^T += Q^T dS, which stand turned
themselves: each is one sum in one bank of PSUM and one matmul a step, turned once per block of
keys. Only dQ += dS K contracts over keys and wants dS turned. With keys on partitions it would be
P and dS, two transposes for one. Blocks of keys are the outer loop: dK and dV stay in PSUM, over
all query heads of a key head, and Vector adds up dQ in SBUF. Every sum has one order: runs repeat.

Budget of a step of 128 x 512, D = 128 (useful: 1067 ns): PE S, dP, dV, dK 217 each and dQ 4 * 57,
1095 ns; Scalar exp 591; Vector dS 633 and dQ 233, 866; DMA turns dS from SBUF to SBUF, 712. PE
limits: 97 % in the steady state. 12 instructions: 8 matmuls, 1 exponential, 2 of Vector, 1 DMA.
If PE turned dS too (`dma_above` large) it would take 1322 and Scalar, which empties the
banks, 1120: 81 %. Causal 8192 (480 plain and 64 bounded steps, 6773 instructions): 621 us, 88.1 %,
against 743 us, 73.5 %, modelled; a toolchain that turns on PE after all gives the second figure.
What is lost: 13 us of start, as each step of the first block needs another tile from HBM beside the
transposes; a step on the diagonal costs Vector and GpSimd 0.3 us each for PE's 0.3.

PSUM: dK and dV a bank each (D to 128; else one per 128 of the depth), S, dP and dQ take turns in
the other six. One-bank instructions only. With Vector at two cycles an element in
scalar_tensor_tensor, as an old document says, it would limit, and causal 4096 take a third longer.
"""

from __future__ import annotations

from dataclasses import dataclass

import nki
import nki.language as nl

from nki_kernels.kernels.attention.backward_loads import BackwardLoads
from nki_kernels.kernels.attention.backward_plan import most_attended, steps_of
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
        ds_lag: steps between a step's scores and their gradients. Steps are as wide as a block of
            keys; narrow ones, on a diagonal, count by their width.
        dv_lag, dk_lag, dq_lag: steps between a step's scores and its products with dO, Q and K.
        dma_above: keys a query attends above which the DMA engines turn dS, not PE.
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
    ds_lag: int
    dv_lag: int
    dk_lag: int
    dq_lag: int
    dma_above: int
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
    by_dma = most_attended(k.shape[2], rule) > config.dma_above
    scores = Scores((q, sinks, mask, bias), rule, out_dtype, by_dma, config)
    sums = BackwardSums((q, k, v), rule, out_dtype, by_dma, config)
    # The DMA engines wait for ds by themselves; PE must have other work until it is there.
    stages = (
        (scores.derive, config.ds_lag),
        (scores.turn, config.ds_lag if by_dma else config.dk_lag),
        (sums.add_dv, config.dv_lag),
        (sums.add_dk, config.dk_lag),
        (sums.add_dq, config.dq_lag),
    )
    done, freed = [0, 0, 0, 0, 0], 0
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
        for number in range(freed, min(done)):
            # Nothing asks for it any more: let go of its tiles.
            steps[number] = None
        freed = min(done)
    sums.close()
    results = [sums.dq, sums.dk, sums.dv]
    if sinks is not None:
        results.append(scores.store_dsinks())
    if bias is not None:
        results.append(scores.store_dbias())
    return tuple(results)
