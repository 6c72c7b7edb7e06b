"""C = A·B for row-major A [M, K] and B [K, N].

The output is cut into *waves*: blocks of C whose float32 accumulators fill PSUM, one bank per tile.
A wave streams the contraction in slices of 128 rows: one slice of A, transposed, and one of B feed
every tile of the wave, so a slice of 128 x (512 + 1024) bf16 pays 1.1 us of DMA for 1.7 us of
Tensor engine. Nothing but PE limits a large product; the rest of this file keeps PE fed:

* slices are loaded `prefetch` steps ahead, across waves;
* B and the stores of C share one DMA queue, A has another: a store that waits for its eviction then
  holds back loads of B that are not urgent, and never those of A (with A behind the stores, the
  next block of rows starts 12 us late at 2048^3; with stores behind A, B runs so far ahead that A
  waits in the DMA engines);
* the last `tail` slices of a wave run tile by tile: accumulators finish one after another, and
  their eviction hides under the tiles that follow;
* evictions alternate between Vector and Scalar, which need 633 and 529 ns for a bank that PE fills
  in at least 217 ns.
"""

from __future__ import annotations

from dataclasses import dataclass

import nki
import nki.isa as nisa
import nki.language as nl


@dataclass(frozen=True)
class MatmulConfig(nl.NKIObject):
    """Tuning of the matmul kernel. No field changes a result.

    Attributes:
        wave_m: row tiles of a wave.
        wave_n: column tiles of a wave; wave_m * wave_n accumulators share PSUM.
        prefetch: slices loaded ahead of the one being multiplied, at least 1.
        tail: slices at the end of a wave that run tile by tile.
        hold_a: keep the transposed slices of A while the waves walk along N.
        transpose: "dma" (2-byte types) or "pe". The DMA figure rests on documented peaks; a
            toolchain that lowers it to PE transposes needs "pe" and its smaller waves.
        hwdge: load B through the hardware descriptor engine (gen3 and later).
        evict_scalar: let Scalar share the evictions (gen3 and later).
    """

    wave_m: int
    wave_n: int
    prefetch: int
    tail: int
    hold_a: bool
    transpose: str
    hwdge: bool
    evict_scalar: bool


@nki.jit
def matmul(a, b, out_dtype, config):
    """Matrix product: c[m, n] = sum_k a[m, k] * b[k, n], accumulated in float32, rounded once.

    Dimensions:
        M, N, K: any size >= 1; ragged edges are sliced, not padded.

    Args:
        a: [M, K] HBM, bfloat16 | float16 | float32.
        b: [K, N] HBM, dtype of a.
        out_dtype: dtype of the result.
        config: MatmulConfig.

    Returns:
        [M, N] HBM, out_dtype.
    Data flow: HBM -> SBUF (A transposed by DMA, or by PE through PSUM) -> PSUM -> SBUF -> HBM.
    """
    rows, columns = a.shape[0], b.shape[1]
    c = nl.ndarray((rows, columns), dtype=out_dtype, buffer=nl.shared_hbm)
    steps = _steps(rows, columns, a.shape[1], config)
    loaded = []
    held = {}
    transposed = []
    pending = []
    accumulators = []
    for at in range(len(steps)):
        while len(loaded) < len(steps) and len(loaded) <= at + config.prefetch:
            loaded.append(_load(a, b, steps[len(loaded)], held, config))
        # PE transposes run one step ahead, or PE would wait for their eviction.
        while len(transposed) < len(steps) and len(transposed) <= at + 1:
            transposed.append(_transposed(loaded[len(transposed)], steps[len(transposed)], held))
        step = steps[at]
        if step["first"]:
            pending = []
            accumulators = _accumulators(step)
        slices = (transposed[at], loaded[at]["b"])
        loaded[at] = None
        transposed[at] = None
        if step["in_tail"]:
            pending.append(slices)
        else:
            for tile in accumulators:
                _multiply(tile, slices, step["first"])
        if step["last"]:
            started = len(pending) < len(_spans(a.shape[1], nl.tile_size.pmax))
            _finish(c, step, accumulators, pending, started, config)
    return c


def _spans(extent, size):
    return [(start, min(start + size, extent)) for start in range(0, extent, size)]


def _steps(rows, columns, contraction, config):
    """One entry per wave and contraction slice, in the order of execution."""
    tile_k = nl.tile_size.pmax
    slices = _spans(contraction, tile_k)
    steps = []
    for m_start, m_stop in _spans(rows, config.wave_m * nl.tile_size.gemm_stationary_fmax):
        for n_start, n_stop in _spans(columns, config.wave_n * nl.tile_size.gemm_moving_fmax):
            for index in range(len(slices)):
                steps.append(
                    {
                        "m": (m_start, m_stop),
                        "n": (n_start, n_stop),
                        "k": slices[index],
                        "index": index,
                        "first": index == 0,
                        "last": index == len(slices) - 1,
                        "in_tail": index >= len(slices) - config.tail,
                        "new_a": n_start == 0 or not config.hold_a,
                        "final": m_stop == rows and n_stop == columns,
                    }
                )
    return steps


def _load(a, b, step, held, config):
    """Start the loads of one slice; returns what the later stages pick up."""
    (m_start, m_stop), (n_start, n_stop), (k_start, k_stop) = step["m"], step["n"], step["k"]
    mode = nisa.dge_mode.hwdge if config.hwdge else nisa.dge_mode.unknown
    b_slice = nl.ndarray((k_stop - k_start, n_stop - n_start), dtype=b.dtype, buffer=nl.sbuf)
    nisa.dma_copy(dst=b_slice, src=b[k_start:k_stop, n_start:n_stop], dge_mode=mode)
    found = {"b": b_slice, "a_rows": None}
    if not step["new_a"]:
        return found
    if config.transpose == "dma":
        a_slice = nl.ndarray((k_stop - k_start, m_stop - m_start), dtype=a.dtype, buffer=nl.sbuf)
        nisa.dma_transpose(dst=a_slice, src=a[m_start:m_stop, k_start:k_stop])
        found["a"] = a_slice
    else:
        found["a_rows"] = []
        for start, stop in _spans(m_stop - m_start, nl.tile_size.gemm_stationary_fmax):
            tile = nl.ndarray((stop - start, k_stop - k_start), dtype=a.dtype, buffer=nl.sbuf)
            source = a[m_start + start : m_start + stop, k_start:k_stop]
            nisa.dma_copy(dst=tile, src=source, dge_mode=mode)
            found["a_rows"].append(tile)
    return found


def _transposed(found, step, held):
    """Return the slice of A with the contraction on partitions."""
    if not step["new_a"]:
        return held[step["index"]]
    if found["a_rows"] is None:
        held[step["index"]] = found["a"]
        return found["a"]
    tiles = found["a_rows"]
    k_size, m_size = step["k"][1] - step["k"][0], step["m"][1] - step["m"][0]
    dtype = tiles[0].dtype
    # gen2 transposes through a matmul, whose result is float32.
    psum_dtype = nl.float32 if nisa.get_nc_version() == nisa.nc_version.gen2 else dtype
    flipped = nl.ndarray((k_size, m_size), dtype=psum_dtype, buffer=nl.psum)
    start = 0
    for tile in tiles:
        stop = start + tile.shape[0]
        nisa.nc_transpose(dst=flipped[:, start:stop], data=tile, engine=nisa.engine.tensor)
        start = stop
    result = nl.ndarray((k_size, m_size), dtype=dtype, buffer=nl.sbuf)
    nisa.tensor_copy(dst=result, src=flipped, engine=nisa.engine.vector)
    held[step["index"]] = result
    return result


def _accumulators(step):
    """Allocate the accumulators of a wave, one PSUM bank each."""
    (m_start, m_stop), (n_start, n_stop) = step["m"], step["n"]
    tiles = []
    for m_from, m_to in _spans(m_stop - m_start, nl.tile_size.gemm_stationary_fmax):
        for n_from, n_to in _spans(n_stop - n_start, nl.tile_size.gemm_moving_fmax):
            psum = nl.ndarray((m_to - m_from, n_to - n_from), dtype=nl.float32, buffer=nl.psum)
            tiles.append({"psum": psum, "m": (m_from, m_to), "n": (n_from, n_to)})
    return tiles


def _multiply(tile, slices, first):
    """Add one contraction slice to one accumulator."""
    (m_from, m_to), (n_from, n_to) = tile["m"], tile["n"]
    nisa.nc_matmul(
        dst=tile["psum"],
        stationary=slices[0][:, m_from:m_to],
        moving=slices[1][:, n_from:n_to],
        accumulate=not first,
    )


def _finish(c, step, accumulators, pending, started, config):
    """Run the tail of a wave tile by tile, evict each accumulator and store each row of tiles."""
    m_start, n_start = step["m"][0], step["n"][0]
    width = step["n"][1] - n_start
    row = None
    for number in range(len(accumulators)):
        tile = accumulators[number]
        for index in range(len(pending)):
            _multiply(tile, pending[index], index == 0 and not started)
        (m_from, m_to), (n_from, n_to) = tile["m"], tile["n"]
        if n_from == 0:
            row = nl.ndarray((m_to - m_from, width), dtype=c.dtype, buffer=nl.sbuf)
        scalar = config.evict_scalar and number % 2 == 1
        engine = nisa.engine.scalar if scalar else nisa.engine.vector
        nisa.tensor_copy(dst=row[:, n_from:n_to], src=tile["psum"], engine=engine)
        if n_to == width:
            nisa.dma_copy(
                dst=c[m_start + m_from : m_start + m_to, n_start : n_start + width],
                src=row,
                dge_mode=nisa.dge_mode.hwdge if config.hwdge else nisa.dge_mode.unknown,
            )
