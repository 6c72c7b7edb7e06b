"""x·weight in the waves of the matmul kernel, with an RMS norm of x folded in at no cost of PE.

The norm of a row is one factor r, and a factor of a row passes through a product: x·gain enters PE
as it is, one rounding of a slice that Vector scales in place in 0.4 us while PE takes 1.7, and r
meets the sum on its way out of PSUM. Nothing waits for the statistics but the first eviction, and
no normalised row is ever transposed. r comes from the rows themselves, loaded once more per block
of rows, by Scalar (square and sum): 3.9 us for 4096 columns of 128 rows.

What a sink does with a sum comes in two parts. The first moves it out of PSUM, at once; the second
waits and is spread over the steps of the next wave, or Vector would come to the next wave's first
slices, and PE to its banks, after all of it.
"""

from __future__ import annotations

from dataclasses import dataclass

import nki.isa as nisa
import nki.language as nl

from nki_kernels.kernels.matmul.epilogue import load_bias
from nki_kernels.kernels.matmul.kernel import MatmulConfig, multiply
from nki_kernels.kernels.matmul.slices import load_slice, mode_of, ready_slice, spans
from nki_kernels.kernels.norm.rows import accumulate_chunk


@dataclass(frozen=True)
class ProjectionConfig(nl.NKIObject):
    """Tuning of a projection. No field changes the mathematics.

    Attributes:
        product: of the product; its wave_n counts the column tiles of the projection.
        chunk: columns of x per load and instruction of the row statistics; orders their sums.
        pool: GpSimd takes part in the rotation. Rests on GpSimd's assumed rate.
    """

    product: MatmulConfig
    chunk: int
    pool: bool


def stream(x, weight, extras, waves, transposed, sink, config):
    """Feed the sums of x·weight to a sink, column tile by column tile.

    Args:
        x: [M, K] HBM.
        weight: [K, N] HBM, [N, K] when `transposed`.
        extras: {"gain": [K] HBM or None, "eps": added to the mean square, None without a norm,
            "bias": [N] HBM or None}.
        waves: the column tiles (start, stop) of each wave, next to each other, each at most a
            moving operand's columns.
        transposed: how the weight is stored.
        sink: `prepare(m)` is called when the loads of the rows m begin; `evict(psum, place, factor,
            bias, engine)` moves a sum out of PSUM and returns what is left to do, as functions of
            no argument, one per stage.
            factor [rows, 1] and bias [rows, columns] are SBUF tiles or None; place says where the
            sum belongs: rows "m", columns "n", number of the column "tile", "first" and "last"
            tile of its row in the wave, and the columns of the "wave".
        config: ProjectionConfig.
    """
    steps = _steps(x.shape, waves, extras["eps"] is not None, config.product)
    norm = _norm(extras, x.shape[1], config)
    loaded = []
    held = {}
    accumulators = []
    pending = []
    waiting = []
    squares = []
    factors = {}
    for at in range(len(steps)):
        while len(loaded) < len(steps) and len(loaded) <= at + config.product.prefetch:
            step = steps[len(loaded)]
            if step["new_rows"] and step["first"]:
                held = {}
                sink.prepare(step["m"])
            loaded.append(_load(x, weight, extras, step, held, norm, transposed, config))
        step, slices = steps[at], loaded[at]
        if step["first"]:
            pending = []
            accumulators = _accumulators(step)
        # One step ahead, or PE would wait for the eviction of its transposes.
        for ahead in loaded[at : at + 2]:
            _ready(ahead["a"])
            ready_slice(ahead["b"])
        if step["in_tail"]:
            pending.append(slices)
        else:
            for tile in accumulators:
                multiply(tile, slices, step["first"])
        # Evenly over the wave: what the wave before has left.
        while len(waiting) > 0 and waiting[0]["step"] <= step["index"]:
            waiting.pop(0)["work"]()
        squares += slices["squares"]
        if step["last"]:
            # Not before: DMA transposes wait behind GpSimd's root for the rows, 8 us at the start.
            for rows, total in squares:
                factors[rows[0]] = inverse_rms(total, x.shape[1], norm["epsilon"])
            squares = []
            waiting = _finish(
                step, accumulators, pending, slices["bias"], factors, sink, config.product
            )
        loaded[at] = None
    for left in waiting:
        left["work"]()


def _steps(shape, waves, normalised, config):
    """One entry per wave and contraction slice, in the order of execution.

    "measure" are the row tiles whose statistics are taken at a step: those of a block in the last
    wave of the block before it, in their own only where there is none.
    """
    rows, size = shape
    slices = spans(size, nl.tile_size.pmax)
    blocks = spans(rows, config.wave_m * nl.tile_size.gemm_stationary_fmax)
    steps = []
    for block in range(len(blocks)):
        before = 0
        for number in range(len(waves)):
            wave = waves[number]
            measured = _row_tiles(blocks[0]) if normalised and block == number == 0 else []
            if normalised and number == len(waves) - 1 and block + 1 < len(blocks):
                measured += _row_tiles(blocks[block + 1])
            for index in range(len(slices)):
                steps.append(
                    {
                        "m": blocks[block],
                        "n": (wave[0][0], wave[-1][1]),
                        "tiles": [(before + tile, wave[tile]) for tile in range(len(wave))],
                        "k": slices[index],
                        "index": index,
                        "slices": len(slices),
                        "first": index == 0,
                        "last": index == len(slices) - 1,
                        "in_tail": index >= len(slices) - config.tail,
                        "new_rows": number == 0,
                        "new_a": number == 0 or not config.hold_a,
                        "measure": [
                            measured[row]
                            for row in range(len(measured))
                            if row * len(slices) // len(measured) == index
                        ],
                    }
                )
            before += len(wave)
    return steps


def _row_tiles(m):
    """Return the row tiles (start, stop) of a block of rows."""
    tiles = spans(m[1] - m[0], nl.tile_size.gemm_stationary_fmax)
    return [(m[0] + start, m[0] + stop) for start, stop in tiles]


def _norm(extras, size, config):
    """Return what the norm needs, or None: the gain [128, slices], and epsilon."""
    if extras["eps"] is None:
        return None
    norm = {"epsilon": epsilon_tile(extras["eps"]), "gain": None}
    if extras["gain"] is not None:
        norm["gain"] = _load_gain(extras["gain"], size, config)
    return norm


def _load_gain(gain, size, config):
    """Return gain [K] as float32 [128, slices]: element k on partition k % 128 of its slice.

    Rows of 128 elements, transposed by PE: element by element the load would take 8 us longer.
    """
    pmax = nl.tile_size.pmax
    full, rest = size // pmax, size % pmax
    wide = nl.ndarray((pmax, full + (rest > 0)), dtype=nl.float32, buffer=nl.sbuf)
    # gen2 transposes through a matmul, whose result is float32.
    by_matmul = nisa.get_nc_version() == nisa.nc_version.gen2
    cuts = [(start * pmax, stop - start, pmax) for start, stop in spans(full, pmax)]
    if rest > 0:
        cuts.append((full * pmax, 1, rest))
    for offset, rows, width in cuts:
        raw = nl.ndarray((rows, width), dtype=gain.dtype, buffer=nl.sbuf)
        source = gain.ap(pattern=[[width, rows], [1, width]], offset=offset)
        nisa.dma_copy(dst=raw, src=source, dge_mode=mode_of(config.product))
        dtype = nl.float32 if by_matmul else gain.dtype
        turned = nl.ndarray((width, rows), dtype=dtype, buffer=nl.psum)
        nisa.nc_transpose(dst=turned, data=raw, engine=nisa.engine.tensor)
        first = offset // pmax
        place = wide[0:width, first : first + rows]
        nisa.tensor_copy(dst=place, src=turned, engine=nisa.engine.vector)
    return wide


def _load(x, weight, extras, step, held, norm, transposed, config):
    """Start the loads of one slice; returns what the later stages pick up."""
    index, m = step["index"], step["m"]
    found = {"b": load_slice(weight, step["k"], step["n"], transposed, config.product)}
    if step["new_a"]:
        held[index] = load_slice(x, step["k"], m, True, config.product)
        held[index]["gain"] = None
        if norm is not None and norm["gain"] is not None:
            size = step["k"][1] - step["k"][0]
            held[index]["gain"] = norm["gain"][0:size, index : index + 1]
    found["a"] = held[index]
    found["squares"] = [(rows, _squares(x, rows, config)) for rows in step["measure"]]
    if step["last"]:
        rows = min(m[1] - m[0], nl.tile_size.gemm_stationary_fmax)
        found["bias"] = load_bias(extras["bias"], step["n"], rows, config.product)
    return found


def _squares(x, rows, config):
    """Return the sum of squares of each row, [rows, 1] float32."""
    start, stop = rows
    size = x.shape[1]
    total = nl.ndarray((stop - start, 1), dtype=nl.float32, buffer=nl.sbuf)
    for left, right in spans(size, config.chunk):
        tile = nl.ndarray((stop - start, right - left), dtype=x.dtype, buffer=nl.sbuf)
        source = x[start:stop, left:right]
        nisa.dma_copy(dst=tile, src=source, dge_mode=mode_of(config.product))
        accumulate_chunk(nl.square, tile, total if right == size else None, left == 0)
    return total


def epsilon_tile(eps):
    """Return eps on every partition, as `inverse_rms` takes it."""
    tile = nl.ndarray((nl.tile_size.pmax, 1), dtype=nl.float32, buffer=nl.sbuf)
    nisa.memset(dst=tile, value=eps)
    return tile


def inverse_rms(squares, size, epsilon):
    """Return 1 / sqrt(squares / size + eps) [rows, columns]: inf of 0, 0 of inf, NaN of NaN.

    The root is GpSimd's: Scalar's takes nothing outside 2^-87 to 2^97.
    """
    rows = squares.shape[0]
    mean, root = [nl.ndarray(squares.shape, dtype=nl.float32, buffer=nl.sbuf) for _ in range(2)]
    bias = epsilon[0:rows, :]
    nisa.activation(dst=mean, op=nl.copy, data=squares, scale=1.0 / size, bias=bias)
    nisa.tensor_scalar(dst=root, data=mean, op0=nl.rsqrt, operand0=0.0, engine=nisa.engine.gpsimd)
    return root


def _ready(found):
    """Make a slice of x ready for PE: transposed, and times the gain of its columns, in place."""
    tile = ready_slice(found)
    if found["gain"] is not None:
        engine = nisa.engine.vector
        nisa.tensor_scalar(
            dst=tile, data=tile, op0=nl.multiply, operand0=found["gain"], engine=engine
        )
        found["gain"] = None


def _accumulators(step):
    """Allocate the accumulators of a wave, one PSUM bank each."""
    (m_start, m_stop), n_start = step["m"], step["n"][0]
    found = []
    for m in spans(m_stop - m_start, nl.tile_size.gemm_stationary_fmax):
        for number, (start, stop) in step["tiles"]:
            psum = nl.ndarray((m[1] - m[0], stop - start), dtype=nl.float32, buffer=nl.psum)
            n = (start - n_start, stop - n_start)
            found.append({"psum": psum, "m": m, "n": n, "number": number})
    return found


def _finish(step, accumulators, pending, bias_row, factors, sink, config):
    """Run the tail of a wave tile by tile and hand each sum to the sink; return what is left."""
    started = len(pending) < step["slices"]
    left = []
    for number in range(len(accumulators)):
        tile = accumulators[number]
        for index in range(len(pending)):
            multiply(tile, pending[index], index == 0 and not started)
        (m_from, m_to), (n_from, n_to) = tile["m"], tile["n"]
        row = step["m"][0] + m_from
        factor = factors.get(row)
        bias = None if bias_row is None else bias_row[0 : m_to - m_from, n_from:n_to]
        place = {
            "m": (row, step["m"][0] + m_to),
            "n": (step["n"][0] + n_from, step["n"][0] + n_to),
            "tile": tile["number"],
            "first": n_from == 0,
            "last": step["n"][0] + n_to == step["n"][1],
            "wave": step["n"],
        }
        scalar = config.evict_scalar and number % 2 == 1
        engine = nisa.engine.scalar if scalar else nisa.engine.vector
        left.append(sink.evict(tile["psum"], place, factor, bias, engine))
    return _in_turn(left, step["slices"])


def _in_turn(left, slices):
    """Order the stages that tiles have left, and spread them over the steps of a wave.

    A stage of one tile is followed by an earlier stage of the next tile: an engine has something to
    do while another one works at what it needs.
    """
    stages = max([len(stage) for stage in left])
    slots = len(left) + stages - 1
    waiting = []
    for slot in range(slots):
        for stage in range(stages - 1, -1, -1):
            tile = slot - stage
            if 0 <= tile < len(left) and stage < len(left[tile]):
                waiting.append({"work": left[tile][stage], "step": slot * slices // slots})
    return waiting


def evict_scaled(dst, psum, factor, bias, engine):
    """dst = psum * factor + bias, where factor [rows, 1] and bias may be absent.

    `engine` takes what has no bias; a bias is Vector's.
    """
    if bias is not None and factor is not None:
        nisa.scalar_tensor_tensor(
            dst=dst, data=psum, op0=nl.multiply, operand0=factor, op1=nl.add, operand1=bias
        )
    elif bias is not None:
        nisa.tensor_tensor(dst=dst, data1=psum, data2=bias, op=nl.add)
    elif factor is None:
        nisa.tensor_copy(dst=dst, src=psum, engine=engine)
    elif engine == nisa.engine.scalar:
        nisa.activation(dst=dst, op=nl.copy, data=psum, scale=factor)
    else:
        nisa.tensor_scalar(dst=dst, data=psum, op0=nl.multiply, operand0=factor)
