"""C = A·B and what follows it, for each way of storing A and B.

The output is cut into *waves*: blocks of C whose float32 accumulators fill PSUM, one bank per tile.
A wave streams the contraction in slices of 128 rows: one slice of A, transposed, and one of B feed
every tile of the wave, so a slice of 128 x (512 + 1024) bf16 pays 1.1 us of DMA for 1.7 us of
Tensor engine. Nothing but PE limits a large product; the rest of this file keeps PE fed:

* slices are loaded `prefetch` steps ahead, across waves and batches;
* B and the stores of C share one DMA queue, A has another: a store that waits for its eviction then
  holds back loads of B that are not urgent, and never those of A (with A behind the stores, the
  next block of rows starts 12 us late at 2048^3; with stores behind A, B runs so far ahead that A
  waits in the DMA engines);
* the last `tail` slices of a wave run tile by tile: accumulators finish one after another, and
  their eviction hides under the tiles that follow;
* evictions alternate between Vector and Scalar, which need 633 and 529 ns for a bank that PE fills
  in at least 217 ns; an epilogue takes their place (epilogue.py).

An operand whose contraction runs along its rows, A [M, K] or B [N, K], is transposed on the way in:
a DMA does it at 90 % of its rate, which makes B [N, K] the slower way of storing weights when few
rows of A leave nothing but their stream (86 against 94 % of the bandwidth at M <= 64).
"""

from __future__ import annotations

from dataclasses import dataclass

import nki
import nki.isa as nisa
import nki.language as nl

from nki_kernels.kernels.matmul.epilogue import evict, load_extras
from nki_kernels.kernels.matmul.slices import (
    in_passes,
    load_pairs,
    load_slice,
    matrix,
    mode_of,
    ready_slice,
    spans,
)


@dataclass(frozen=True)
class MatmulConfig(nl.NKIObject):
    """Tuning of the matmul kernel. No field changes a result.

    Attributes:
        wave_m: row tiles of a wave.
        wave_n: column tiles of a wave; wave_m * wave_n accumulators share PSUM.
        prefetch: slices loaded ahead of the one being multiplied, at least 1.
        tail: slices at the end of a wave that run tile by tile.
        hold_a: keep the transposed slices of A while the waves walk along N.
        transpose: "dma" (2-byte types) or "pe", for operands stored the other way. The DMA figure
            rests on documented peaks; a toolchain that lowers it to PE transposes needs "pe" and
            its smaller waves.
        hwdge: plain copies go through the hardware descriptor engine (gen3 and later).
        evict_scalar: let Scalar share the evictions (gen3 and later).
        rows: rows of a pass of the device loop that walks over more rows than two passes have, so
            that the program stays near 100,000 instructions; 0 writes everything out.
    """

    wave_m: int
    wave_n: int
    prefetch: int
    tail: int
    hold_a: bool
    transpose: str
    hwdge: bool
    evict_scalar: bool
    rows: int = 0


@dataclass(frozen=True)
class Layout(nl.NKIObject):
    """How the operands are stored.

    Attributes:
        transpose_a: A is [K, M] instead of [M, K].
        transpose_b: B is [N, K] instead of [K, N], as PyTorch stores the weight of a linear layer.
        double_row: the operands have 1 byte; PE contracts two rows at a time.
    """

    transpose_a: bool = False
    transpose_b: bool = False
    double_row: bool = False


@nki.jit
def matmul(a, b, bias, residual, layout, epilogue, config):
    """Matrix product: c[m, n] = epilogue(sum_k a[m, k] * b[k, n]), accumulated in float32.

    Dimensions:
        M, N, K: any size >= 1; ragged edges are sliced, not padded.

    Args:
        a: [M, K] HBM ([K, M] when layout.transpose_a), bfloat16 | float16 | float32, or
            float8_e4m3 | float8_e5m2 with layout.double_row and even K; all operands may have a
            batch axis in front, except the bias.
        b: [K, N] HBM ([N, K] when layout.transpose_b), dtype of a.
        bias: [N] HBM, dtype of a, or None.
        residual: [M, N] HBM, dtype of a, or None.
        layout: Layout.
        epilogue: Epilogue; its out_dtype is that of the result.
        config: MatmulConfig.

    Returns:
        [M, N] HBM, with the batch axis of `a`: activation(scale * sum + bias) + residual, rounded
        once.
    Data flow: HBM -> SBUF (transposed by DMA, or by PE through PSUM) -> PSUM -> SBUF -> HBM.
    """
    rows = a.shape[-1] if layout.transpose_a else a.shape[-2]
    columns = b.shape[-2] if layout.transpose_b else b.shape[-1]
    shape = (rows, columns) if len(a.shape) == 2 else (a.shape[0], rows, columns)
    c = nl.ndarray(shape, dtype=epilogue.out_dtype, buffer=nl.shared_hbm)
    operands = {"a": a, "b": b, "bias": bias, "residual": residual}
    product_in_passes(c, operands, layout, epilogue, config)
    return c


def product_in_passes(c, operands, layout, epilogue, config):
    """Compute c; many rows of one matrix by a device loop."""
    if len(c.shape) == 3:
        product(c, operands, layout, epilogue, config)
        return
    residual = operands["residual"]
    by_row = {
        "c": (c, 0),
        "a": (operands["a"], 1 if layout.transpose_a else 0),
        "residual": None if residual is None else (residual, 0),
    }

    def work(parts):
        product(parts["c"], {**operands, **parts}, layout, epilogue, config)

    in_passes(by_row, c.shape[0], config.rows, work)


def product(c, operands, layout, epilogue, config, sums=None):
    """Compute c [M, N] in HBM; with `sums` [K], also sums[k] = sum_m a[m, k] on idle Vector."""
    steps = _steps(c, _contraction(operands["a"], layout), layout, config)
    loaded = []
    held = {}
    accumulators = []
    pending = []
    totals = None
    for at in range(len(steps)):
        while len(loaded) < len(steps) and len(loaded) <= at + config.prefetch:
            loaded.append(_load(operands, steps[len(loaded)], held, layout, epilogue, config))
        step, slices = steps[at], loaded[at]
        if step["first"]:
            pending = []
            accumulators = wave_accumulators(step)
        # PE transposes run one step ahead, or PE would wait for their eviction.
        for ahead in loaded[at : at + 2]:
            ready_slice(ahead["a"])
            ready_slice(ahead["b"])
        if sums is not None and step["n"][0] == 0:
            totals = _add_columns(totals, ready_slice(slices["a"]), step)
        if step["in_tail"]:
            pending.append(slices)
        else:
            for tile in accumulators:
                multiply(tile, slices, step["first"])
        if step["last"]:
            started = len(pending) < step["slices"]
            finish_wave(c, step, accumulators, pending, started, slices["extras"], epilogue, config)
        loaded[at] = None
    if sums is not None:
        _store_columns(sums, totals, config)


def _contraction(a, layout):
    return a.shape[-2] if layout.transpose_a else a.shape[-1]


def _steps(c, contraction, layout, config):
    """One entry per batch, wave and contraction slice, in the order of execution."""
    rows, columns = c.shape[-2], c.shape[-1]
    slices = spans(contraction, nl.tile_size.pmax * (2 if layout.double_row else 1))
    blocks = []
    for batch in range(1 if len(c.shape) == 2 else c.shape[0]):
        for m in spans(rows, config.wave_m * nl.tile_size.gemm_stationary_fmax):
            for n in spans(columns, config.wave_n * nl.tile_size.gemm_moving_fmax):
                blocks.append((batch, m, n))
    steps = []
    for batch, m, n in blocks:
        for index in range(len(slices)):
            steps.append(
                {
                    "batch": batch,
                    "m": m,
                    "n": n,
                    "k": slices[index],
                    "index": index,
                    "slices": len(slices),
                    "first": index == 0,
                    "last": index == len(slices) - 1,
                    "in_tail": index >= len(slices) - config.tail,
                    "new_a": n[0] == 0 or not config.hold_a,
                }
            )
    return steps


def _load(operands, step, held, layout, epilogue, config):
    """Start the loads of one slice; returns what the later stages pick up."""
    batch, k = step["batch"], step["k"]
    b = matrix(operands["b"], batch)
    load = load_pairs if layout.double_row else load_slice
    found = {"b": load(b, k, step["n"], layout.transpose_b, config)}
    if step["new_a"]:
        a = matrix(operands["a"], batch)
        held[step["index"]] = load(a, k, step["m"], not layout.transpose_a, config)
    found["a"] = held[step["index"]]
    if step["last"]:
        activated = epilogue.activation is not None
        extras = load_extras(operands, batch, step["m"], step["n"], activated, config)
        found["extras"] = extras
    return found


def wave_accumulators(step):
    """Allocate the accumulators of a wave, one PSUM bank each."""
    (m_start, m_stop), (n_start, n_stop) = step["m"], step["n"]
    tiles = []
    for m in spans(m_stop - m_start, nl.tile_size.gemm_stationary_fmax):
        for n in spans(n_stop - n_start, nl.tile_size.gemm_moving_fmax):
            psum = nl.ndarray((m[1] - m[0], n[1] - n[0]), dtype=nl.float32, buffer=nl.psum)
            tiles.append({"psum": psum, "m": m, "n": n})
    return tiles


def multiply(tile, slices, first):
    """Add one contraction slice to one accumulator."""
    (m_from, m_to), (n_from, n_to) = tile["m"], tile["n"]
    a, b = ready_slice(slices["a"]), ready_slice(slices["b"])
    if len(a.shape) == 3:  # pairs of rows
        nisa.nc_matmul(
            dst=tile["psum"],
            stationary=a[:, :, m_from:m_to],
            moving=b[:, :, n_from:n_to],
            accumulate=not first,
            perf_mode=nisa.matmul_perf_mode.double_row,
        )
    else:
        nisa.nc_matmul(
            dst=tile["psum"],
            stationary=a[:, m_from:m_to],
            moving=b[:, n_from:n_to],
            accumulate=not first,
        )


def finish_wave(c, step, accumulators, pending, started, extras, epilogue, config):
    """Run the tail of a wave tile by tile, evict each accumulator and store each row of tiles."""
    m_start, (n_start, n_stop) = step["m"][0], step["n"]
    width = n_stop - n_start
    row = None
    for number in range(len(accumulators)):
        tile = accumulators[number]
        for index in range(len(pending)):
            multiply(tile, pending[index], index == 0 and not started)
        (m_from, m_to), (n_from, n_to) = tile["m"], tile["n"]
        if n_from == 0:
            row = nl.ndarray((m_to - m_from, width), dtype=c.dtype, buffer=nl.sbuf)
        bias, residual = extras["bias"], None
        if bias is not None:
            bias = bias[0 : m_to - m_from, n_from:n_to]
        if len(extras["residual"]) > 0:
            number_m = m_from // nl.tile_size.gemm_stationary_fmax
            residual = extras["residual"][number_m][:, n_from:n_to]
        scalar = config.evict_scalar and number % 2 == 1
        engine = nisa.engine.scalar if scalar else nisa.engine.vector
        evict(row[:, n_from:n_to], tile["psum"], epilogue, bias, residual, engine)
        if n_to == width:
            target = matrix(c, step["batch"])
            nisa.dma_copy(
                dst=target[m_start + m_from : m_start + m_to, n_start:n_stop],
                src=row,
                dge_mode=mode_of(config),
            )


def _add_columns(totals, a_slice, step):
    """Add the sums over m of a transposed slice of A [k, m] to column `index` of the totals."""
    p, index = a_slice.shape[0], step["index"]
    if totals is None:
        totals = nl.ndarray((nl.tile_size.pmax, step["slices"]), dtype=nl.float32, buffer=nl.sbuf)
    column = totals[0:p, index : index + 1]
    if step["m"][0] == 0:
        nisa.tensor_reduce(dst=column, op=nl.add, data=a_slice, axis=1)
        return totals
    part = nl.ndarray((p, 1), dtype=nl.float32, buffer=nl.sbuf)
    nisa.tensor_reduce(dst=part, op=nl.add, data=a_slice, axis=1)
    nisa.tensor_tensor(dst=column, data1=column, data2=part, op=nl.add)
    return totals


def _store_columns(sums, totals, config):
    """Store totals: sums[k] stands on partition k % 128 of column k // 128."""
    size, pmax = sums.shape[0], nl.tile_size.pmax
    full = size // pmax
    rounded = nl.ndarray(totals.shape, dtype=sums.dtype, buffer=nl.sbuf)
    for p, first, last in ((pmax, 0, full), (size - full * pmax, full, totals.shape[1])):
        if p > 0 and first < last:
            tile = rounded[0:p, first:last]
            nisa.tensor_copy(dst=tile, src=totals[0:p, first:last], engine=nisa.engine.vector)
            target = sums.ap(pattern=[[1, p], [pmax, last - first]], offset=first * pmax)
            nisa.dma_copy(dst=target, src=tile, dge_mode=mode_of(config))
