"""rms_norm and the linear layer behind it in one kernel: the normalised rows never exist."""

from __future__ import annotations

import nki
import nki.isa as nisa
import nki.language as nl

from nki_kernels.kernels.matmul.slices import in_passes, mode_of, spans
from nki_kernels.kernels.projection.stream import evict_scaled, stream


@nki.jit
def norm_linear(x, gain, weight, bias, eps, transposed, out_dtype, config):
    """y[m, n] = r[m] * sum_k round(x[m, k] * gain[k]) * weight[k, n] + bias[n].

    r[m] = 1 / sqrt(mean_k(x[m, :]^2) + eps)

    Dimensions:
        M, N, K: any size >= 1.

    Args:
        x: [M, K] HBM, bfloat16 | float32.
        gain: [K] HBM, dtype of x, the weight of the norm, or None for ones.
        weight: [K, N] HBM, dtype of x; [N, K] when `transposed`.
        bias: [N] HBM, dtype of x, or None.
        eps: added to the mean square.
        transposed: the weight is stored as PyTorch does.
        out_dtype: dtype of the result.
        config: ProjectionConfig.

    Returns:
        [M, N] HBM, out_dtype. Sums and statistics are float32.

    Data flow: that of the matmul kernel; x once more HBM -> SBUF -> Scalar for the statistics.
    Limits: PE, as for the product alone; with few rows the stream of the weights.
    """
    rows = x.shape[0]
    columns = weight.shape[0] if transposed else weight.shape[1]
    y = nl.ndarray((rows, columns), dtype=out_dtype, buffer=nl.shared_hbm)
    tiles = spans(columns, nl.tile_size.gemm_moving_fmax)
    extras = {"gain": gain, "eps": eps, "bias": bias}
    waves = [tiles[first:last] for first, last in spans(len(tiles), config.product.wave_n)]

    def work(parts):
        sink = Rows(parts["y"], config.product)
        stream(parts["x"], weight, extras, waves, transposed, sink, config)

    in_passes({"x": (x, 0), "y": (y, 0)}, rows, config.product.rows, work)
    return y


class Rows:
    """A sink that stores the sums as they are, a row of tiles of a wave at a time."""

    def __init__(self, y, config):
        """Store to y [M, N] in HBM."""
        self.y = y
        self.config = config
        self.row = None

    def prepare(self, m):
        """Nothing is needed."""

    def evict(self, psum, place, factor, bias, engine):
        """Round a sum, scaled and biased; store the row of tiles with its last one."""
        (start, stop), (left, right) = place["n"], place["wave"]
        m_start, m_stop = place["m"]
        if place["first"]:
            self.row = nl.ndarray(
                (m_stop - m_start, right - left), dtype=self.y.dtype, buffer=nl.sbuf
            )
        evict_scaled(self.row[:, start - left : stop - left], psum, factor, bias, engine)
        if place["last"]:
            nisa.dma_copy(
                dst=self.y[m_start:m_stop, left:right], src=self.row, dge_mode=mode_of(self.config)
            )
        return []
