"""Attention over whole sequences: fast where exponentials stay in range, exact where not.

Scores stand transposed, S^T[key, query] = K Q^T, 128 keys on partitions and a block of 512 queries
along the free axis. Then exp(S^T), evicted from PSUM as it is, is already the stationary operand of
O[query] += P^T · [V | 1]: no transposes of P, no pass of Vector over scores, and the last column
sums exactly the rounded P that multiplies V. A maximum per query does not fit this layout (Scalar's
bias is per partition, here a key), and the usual one, queries on partitions, pays for it: Vector's
maximum, Scalar's exponential, PE's transposes and their eviction take 870 ns a tile, 49 % of peak.
No shift at all is right whenever every row's sum stays in range, and the sums say so afterwards; a
device loop of 0 or 1 turns runs `exact.py` over everything where one did not.

Budget per tile of 128 x 512, D = 128 (useful: 427 ns): PE 217 + 4 * 57 = 445; Scalar 0.974 * 512 +
0.833 * 512 + 92 = 1017 over two banks, 508; Vector and GpSimd nothing but per block of queries.
Scalar limits: 84 % in the steady state. With one bank per exponential it is 591 and 72 %; whether
an instruction may span banks is documented nowhere, so that figure stands beside (S 16384 causal:
1081 us, 80.9 %, against 1286 us, 68 %; `banks=1` is the safe setting). PSUM: four output tiles own
a bank each, since their sums interleave, and two groups of two banks hold scores.

Where one group holds all scores of a block (a narrow window, a short sequence), output tiles are
summed one after another and share banks: three for a group, two for the output. Budget of a block
of 512 queries, window 128, D = 64: DMA 1.25 us, half of it rows of 128 bytes; GpSimd 1.1 us for all
masks in two instructions (`masks.py`); Scalar 1.02; PE 0.8, half of it throttled; Vector 0.44 for
the eviction and 0.45 for its share of two blocks' division. DMA limits: S 10240, 8 heads, 224 us,
201 of them DMA; 3,233 instructions.

A softcap is a second pass of Scalar, 1.02 us a group of 1024 columns, and costs two changes of
function, 2.57 us, so it is taken for many groups at once (2 heads of 2048, full: 321 us one by one,
162 by twelves, 90 without a cap).
"""

from __future__ import annotations

from dataclasses import dataclass

import nki
import nki.isa as nisa
import nki.language as nl

from nki_kernels.kernels.attention.alibi import Slopes, is_causal
from nki_kernels.kernels.attention.exact import exact_attention
from nki_kernels.kernels.attention.loads import Loads
from nki_kernels.kernels.attention.masks import Masks
from nki_kernels.kernels.attention.plan import block_of, groups_of, pieces_of, spans
from nki_kernels.kernels.attention.planes import Planes, fit
from nki_kernels.kernels.attention.segments import Segments
from nki_kernels.kernels.attention.sums import Sums


@dataclass(frozen=True)
class AttentionConfig(nl.NKIObject):
    """Tuning of the attention kernel. No field changes the mathematics.

    Attributes:
        banks: PSUM banks one exponential reads. Whether an instruction of Scalar may span banks is
            documented nowhere; 1 is safe.
        whole: the same where that many hold all scores of every block of queries.
        join: under a window, blocks divided and stored together, and chunks of one load.
        lag: groups between a group's exponentials and its product with V.
        batch: groups whose softcaps are taken together: two changes of function cost Scalar 2.6 us.
        ahead: groups between the loads for a group and its scores.
        chunk: key tiles per load of K and V.
        resident: K and V of a head stay in SBUF for all its queries.
        fill: pad the contraction of the scores to all rows of the array.
        section: output tiles whose row sums are kept before their logarithms are taken.
        hwdge: copy through the hardware descriptor engine (gen3 and later).
    """

    banks: int
    whole: int
    join: int
    lag: int
    batch: int
    ahead: int
    chunk: int
    resident: bool
    fill: bool
    section: int
    hwdge: bool


@nki.jit
def attention(q, k, v, sinks, mask, bias, rule, out_dtype, config):
    """out[b, h, i] = sum_j p_ij v[b, g, j], p = softmax_j of the scores, g = h * Hkv // H.

    Args:
        q: [B, H, Sq, D] HBM, bfloat16 | float16 | float32.
        k: [B, Hkv, Sk, D] HBM, dtype of q.
        v: [B, Hkv, Sk, Dv] HBM, dtype of q.
        sinks: [H] HBM float32 or None: one more logit per head, without a value.
        mask: [1 | B, 1 | H, Sq, Sk] HBM, uint8, 1 to attend and 0 not to, or None.
        bias: the same shape, dtype of q, added to the scores, or None.
        rule: AttentionRule.
        out_dtype: dtype of the result.
        config: AttentionConfig.

    Returns:
        out [B, H, Sq, Dv] of out_dtype and lse [B, H, Sq] float32, both HBM. A query that attends
        nothing has 0 and -inf.
    """
    batch, heads, rows, _ = q.shape
    out = nl.ndarray((batch, heads, rows, v.shape[3]), dtype=out_dtype, buffer=nl.shared_hbm)
    lse = nl.ndarray((batch, heads, rows), dtype=nl.float32, buffer=nl.shared_hbm)
    slopes = None
    if rule.slopes and sinks is None and is_causal(rule):
        slopes = Slopes(rule, rows, k.shape[2])
    extras = {"sinks": sinks, "slopes": slopes, "segments": None, "mask": mask, "bias": bias}
    if not fit(mask, rule) or (rule.slopes and slopes is None):
        exact_attention(q, k, v, extras, (out, lse), rule, config)
        return out, lse
    _twice(q, k, v, extras, (out, lse), rule, config)
    return out, lse


@nki.jit
def attention_varlen(q, k, v, boundaries, rule, out_dtype, config):
    """Attention within each of the sequences that stand one behind the other.

    Args:
        q: as in `attention`, Sq = Sk.
        k: as in `attention`.
        v: as in `attention`.
        boundaries: [N + 1] HBM int32, increasing: sequence n is the tokens boundaries[n] to
            boundaries[n + 1] - 1. Tokens outside count as one sequence before and one behind.
        rule: AttentionRule; `longest` bounds the length of a sequence, and what is computed.
        out_dtype: dtype of the result.
        config: AttentionConfig.

    Returns:
        out and lse, as in `attention`.
    """
    batch, heads, rows, _ = q.shape
    out = nl.ndarray((batch, heads, rows, v.shape[3]), dtype=out_dtype, buffer=nl.shared_hbm)
    lse = nl.ndarray((batch, heads, rows), dtype=nl.float32, buffer=nl.shared_hbm)
    segments = Segments(boundaries, rows, config)
    extras = {"sinks": None, "slopes": None, "segments": segments, "mask": None, "bias": None}
    _twice(q, k, v, extras, (out, lse), rule, config)
    return out, lse


def _twice(q, k, v, extras, results, rule, config):
    """Compute without a shift, then exactly if a row left the range."""
    wrong = _optimistic(q, k, v, extras, results, rule, config)

    def again(_):
        exact_attention(q, k, v, extras, results, rule, config)

    nl.fori_loop(0, wrong, again)


def _optimistic(q, k, v, extras, results, rule, config):
    """Compute with exponentials of unshifted scores; return a register: 1 if a row left the range.

    A row is right whenever its sum of exponentials neither overflows nor comes near the subnormals,
    whatever the shift; 0 is free. The sums and the results show it afterwards.
    """
    steps = _steps(q, k, v, rule, config)
    loads = Loads(q, k, v, steps, rule, config)
    masks, planes = Masks(rule), Planes(extras["mask"], extras["bias"], config)
    sums = Sums(q, k, extras, results, rule, config)
    outputs = Outputs(v.shape[3])
    lagging, scores = [], []
    batch = config.batch if rule.softcap else 1
    for at in range(len(steps) + config.lag):
        if at < len(steps):
            if at % batch == 0:
                for step in loads.run_to(at + batch - 1 + config.ahead):
                    planes.load(step)
                scores = [_scores(step, rule, planes) for step in steps[at : at + batch]]
            scale = rule.softcap or rule.scale
            s, scale = planes.add(scores[at % batch], scale, steps[at])
            lagging.append(_exponentials(steps[at], s, scale, masks, extras))
            scores[at % batch] = None
        if at >= config.lag:
            step = steps[at - config.lag]
            o = outputs.of(step)
            _multiply(o, step, lagging[at - config.lag], v.shape[3])
            lagging[at - config.lag] = None
            if step["last"]:
                sums.finish(o, step, v.shape[3], planes.attending(step))
            if step["head"] is not None:
                sums.close(step["head"])
            loads.done(at - config.lag)
    if not steps:
        for head in range(q.shape[0] * q.shape[1]):
            sums.close(head)
    return sums.verdict()


def _steps(q, k, v, rule, config):
    """One entry per group of scores, in the order of execution."""
    batch, heads, rows, _ = q.shape
    keys = k.shape[2]
    width, sub = nl.tile_size.gemm_moving_fmax, nl.tile_size.gemm_stationary_fmax
    plans = []
    for block in spans(rows, block_of(v.shape[3])[0]):
        plans.append((block, pieces_of(block, keys, rows, rule, sub)))
    # Blocks of one group each have room for a bank more, the way their output is summed.
    banks = max(config.whole, config.banks)
    alone = all(len(groups_of(pieces, width, banks)) <= 1 for _, pieces in plans)
    if not alone:
        banks = config.banks
    for number in range(len(plans)):
        block, pieces = plans[number]
        groups, started = groups_of(pieces, width, banks), set()
        for group in groups:
            for piece in group["pieces"]:
                # The first product of an output tile overwrites what PSUM holds.
                piece["first"] = [
                    column for column in range(*piece["columns"], sub) if column not in started
                ]
                started.update(piece["first"])
        plans[number] = (block, groups)
    steps = []
    for b in range(batch):
        for h in range(heads):
            for block, groups in plans:
                for number in range(len(groups)):
                    steps.append(
                        {
                            "q": (b, h),
                            "kv": (b, h * k.shape[1] // heads),
                            "block": block,
                            "group": groups[number],
                            "last": number == len(groups) - 1,
                            "alone": alone,
                            "head": None,
                        }
                    )
            if steps:
                steps[-1]["head"] = b * heads + h
    return steps


def _scores(step, rule, planes):
    """Return the scores of a group, [keys, columns]: raw in PSUM, or tanh of the capped in SBUF."""
    group, tiles = step["group"], step["tiles"]
    keys, used = group["keys"], group["used"]
    s = nl.ndarray((keys, used), dtype=nl.float32, buffer=nl.psum)
    for piece in group["pieces"]:
        (left, right), at = piece["columns"], piece["at"]
        start = piece["keys"][0]
        for number in range(len(tiles["q"])):
            nisa.nc_matmul(
                dst=s[:, at : at + right - left],
                stationary=_keys(tiles, number, start, keys),
                moving=tiles["q"][number][:, tiles["q_at"] + left : tiles["q_at"] + right],
                accumulate=number > 0,
            )
        planes.hide(s, step, piece)
    if not rule.softcap:
        return s
    capped = nl.ndarray((keys, used), dtype=nl.float32, buffer=nl.sbuf)
    nisa.activation(dst=capped, op=nl.tanh, data=s, scale=rule.scale / rule.softcap)
    return capped


def _exponentials(step, scores, scale, masks, extras):
    """Return exp(scale * scores) of a group, [keys, columns], masked."""
    keys, used = scores.shape
    p = nl.ndarray((keys, used), dtype=step["tiles"]["p_dtype"], buffer=nl.sbuf)
    if extras["slopes"] is None:
        nisa.activation(dst=p, op=nl.exp, data=scores, scale=scale)
    else:
        _sloping(p, scores, scale, step, extras["slopes"])
    masks.apply(p, step)
    if extras["segments"] is not None:
        extras["segments"].apply(p, step)
    return p


def _sloping(p, scores, scale, step, slopes):
    """p = exp(scale * scores + what the slope of the head adds)."""
    first, (_, head), keys = step["block"][0], step["q"], p.shape[0]
    for piece in step["group"]["pieces"]:
        key = piece["keys"][0]
        for left, right in slopes.cells(head, piece["columns"]):
            at = piece["at"] + left - piece["columns"][0]
            nisa.activation(
                dst=p[:, at : at + right - left],
                op=nl.exp,
                data=scores[:, at : at + right - left],
                scale=scale,
                bias=slopes.bias(head, key, first + left, keys),
            )


def _keys(tiles, number, start, keys):
    """Return the transposed keys start .. start + keys - 1, rows `number` of the depth."""
    row = tiles["base"] + start
    at = row % tiles["size"]
    return tiles["k"][row // tiles["size"]][number][:, at : at + keys]


class Outputs:
    """Where in PSUM the output tiles of a block are summed.

    Groups bring their products key tile by key tile, so the sums of the output tiles interleave,
    which one bank would not bear: each has its own. A block of one group takes output tile by
    output tile instead, and as many share a bank as fit: then two blocks find room. Rows too long
    for a bank take several, and a block has fewer queries.
    """

    def __init__(self, depth):
        self.depth = depth
        self.spread = None

    def of(self, step):
        """Return a view [queries, output tile, columns] for the block of a step."""
        width, sub = nl.tile_size.gemm_moving_fmax, nl.tile_size.gemm_stationary_fmax
        queries, banks = block_of(self.depth)
        count = queries // sub
        if step["alone"]:
            self.spread = None
            size, share = banks * width, count
            while width // share <= self.depth and share > 1:
                share //= 2
            if share > 1:
                size = width // share
            return nl.ndarray((sub, count, size), dtype=nl.float32, buffer=nl.psum)
        if self.spread is None:
            self.spread = nl.ndarray((sub, count, banks * width), dtype=nl.float32, buffer=nl.psum)
        return self.spread


def _multiply(o, step, p, depth):
    """Add a group's products with [V | 1] to the output tiles of its block."""
    group, tiles = step["group"], step["tiles"]
    sub = nl.tile_size.gemm_stationary_fmax
    size = step["block"][1] - step["block"][0]
    products = [
        (piece, column) for piece in group["pieces"] for column in range(*piece["columns"], sub)
    ]
    if step["alone"]:
        products.sort(key=lambda product: product[1])
    for piece, column in products:
        row = tiles["base"] + piece["keys"][0]
        chunk = tiles["v"][row // tiles["size"]]
        count, keys = min(sub, size - column), piece["keys"][1] - piece["keys"][0]
        at = piece["at"] + column - piece["columns"][0]
        for left, right in spans(depth + 1, nl.tile_size.gemm_moving_fmax):
            nisa.nc_matmul(
                dst=o[:count, column // sub, left:right],
                stationary=p[:keys, at : at + count],
                moving=chunk[:keys, row % tiles["size"] // nl.tile_size.pmax, left:right],
                accumulate=column not in piece["first"],
            )
