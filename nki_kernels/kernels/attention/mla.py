"""Multi-head latent attention of a few new queries, absorbed: all heads share one latent cache."""

from __future__ import annotations

import nki

from nki_kernels.kernels.attention.decode import Contiguous, decode, outputs
from nki_kernels.kernels.attention.decode_steps import fitted, rows_of
from nki_kernels.kernels.attention.paged import Paged


@nki.jit
def mla_decode(q, cache, table, lengths, depth, rule, config):
    """softmax(scale * q c^T) c[:, :depth] over the first lengths[b] rows c of each sequence.

    What `attention_decode` computes with one KV head, whose values are the first columns of its
    keys: the cache is read once.

    Dimensions:
        B: sequences. H: query heads, at most P. T: new queries. S: rows of the cache. D: row
        length: 512 of the latent and 64 of the rotary part in DeepSeek's models.

    Args:
        q: [B, H, T, D] HBM, bfloat16 | float16 | float32: queries multiplied by the
            up-projection of the keys, beside their rotary part.
        cache: [B, S, D] HBM, dtype of q; or, with a table, pages [N, P, D].
        table: [B, W] HBM int32 as in attention_decode_paged, or None.
        lengths: [B] HBM int32.
        depth: columns of a row that are its value.
        rule: DecodeRule.
        config: DecodeConfig.

    Returns:
        [B, H, T, depth] HBM, dtype of q, to be multiplied by the up-projection of the values, and
        the log of the sum of exponentials [B, H, T] float32.

    Limits: PE and Vector. 128 rows of 576 columns under 128 queries take DMA 400 ns; PE 285 for
        five transposes, 290 for scores, 233 for values, 58 for the sums; Vector 133 each for mask,
        maximum and shift, and some 200 for its share of the evictions.
    """
    one = cache.reshape((cache.shape[0], 1, cache.shape[1], cache.shape[2]))
    page = None if table is None else cache.shape[1]
    config = fitted(config, 1, rows_of(q, one), page)
    if table is None:
        found = Contiguous(one, None, config, depth)
    else:
        found = Paged(one, None, table, config, depth)
    target = outputs(q, depth)
    decode(q, found, lengths, None, (None, None), target, rule, config)
    return target
