"""y = (activation(x·gate) * (x·up))·down in one kernel; the hidden features never leave SBUF.

Tokens pass in blocks; for each block there are three products, each in the waves of the matmul
kernel. A wave of x·gate is activated into SBUF by Scalar, the wave of x·up of the same features is
multiplied by it on Vector, and what results is the stationary side of the last product.

* With a block of up to 512 tokens, PE limits. There the weights are stationary and x, transposed,
  moves: hidden features land on partitions, where the last product contracts them. Weights are read
  once per block, 42 % of what DMA can move meanwhile.
* With at most 128 tokens (`flip`), the stream of weights limits. There x is stationary, so that a
  slice of weights is as wide as all banks, in rows of 8 KiB: with features on partitions each tile
  of 128 would need a bank of its own for its sum. PE, idle anyway, transposes the hidden features
  before the last product (57 ns for 128 of them) while `down` is on its way.
"""

from __future__ import annotations

from dataclasses import dataclass

import nki
import nki.isa as nisa
import nki.language as nl

from nki_kernels.kernels.matmul.epilogue import Epilogue, activation_of
from nki_kernels.kernels.matmul.kernel import finish_wave, multiply, wave_accumulators
from nki_kernels.kernels.matmul.slices import in_passes, load_slice, spans


@dataclass(frozen=True)
class GatedMlpConfig(nl.NKIObject):
    """Tuning of the gated MLP. No field changes a result.

    Attributes:
        tokens: tokens of a block, at most the columns of a moving operand; with `flip` at most
            those of a stationary one.
        blocks: blocks of a pass of the device loop that walks over more than two passes of tokens,
            so that the program stays below 100,000 instructions.
        flip: x is stationary, and the hidden features are transposed by PE.
        wave_up: feature tiles of a wave of x·gate and x·up: of 512 with `flip`, of 128 without.
        wave_down: column tiles of a wave of the last product.
        prefetch: slices loaded ahead of the one being multiplied, at least 1.
        tail: slices at the end of a wave that run tile by tile.
        transpose: "dma" (2-byte types) or "pe", for what comes transposed from HBM.
        hwdge: plain copies go through the hardware descriptor engine (gen3 and later).
        evict_scalar: let Scalar share the evictions of the result (gen3 and later).
    """

    tokens: int
    blocks: int
    flip: bool
    wave_up: int
    wave_down: int
    prefetch: int
    tail: int
    transpose: str
    hwdge: bool
    evict_scalar: bool


@nki.jit
def gated_mlp(x, gate, up, down, transposed, activation, out_dtype, config):
    """Gated MLP: y[t, h] = sum_i f(sum_h x·gate)[t, i] * (sum_h x·up)[t, i] * down[i, h].

    Dimensions:
        T: tokens; H: width of x and y; I: hidden features. Any size >= 1.

    Args:
        x: [T, H] HBM, bfloat16 | float16 | float32.
        gate: [H, I] HBM, dtype of x; [I, H] when `transposed`.
        up: as gate.
        down: [I, H] HBM, dtype of x; [H, I] when `transposed`.
        transposed: the weights are stored as PyTorch does.
        activation: "silu" (SwiGLU), "gelu" or "gelu_tanh" (GeGLU), "relu".
        out_dtype: dtype of the result.
        config: GatedMlpConfig.

    Returns:
        [T, H] HBM, out_dtype. Sums are float32; the hidden features are rounded once, to the dtype
        of x, and the result once.
    Data flow: HBM -> SBUF -> PSUM -> SBUF (hidden) -> PSUM -> SBUF -> HBM.
    """
    y = nl.ndarray(x.shape, dtype=out_dtype, buffer=nl.shared_hbm)
    weights = {"gate": gate, "up": up, "down": down}

    def work(parts):
        _blocks(parts["y"], parts["x"], weights, transposed, activation, config)

    each = config.blocks * config.tokens
    in_passes({"y": (y, 0), "x": (x, 0)}, x.shape[0], each, work)
    return y


def _blocks(y, x, weights, transposed, activation, config):
    """Compute y [tokens, H] block by block."""
    inner = weights["gate"].shape[0 if transposed else 1]
    out_dtype = y.dtype
    steps = _steps(x.shape[0], x.shape[1], inner, config)
    loaded = []
    held = {}
    accumulators = []
    pending = []
    active = []
    features = []
    for at in range(len(steps)):
        while len(loaded) < len(steps) and len(loaded) <= at + config.prefetch:
            step = steps[len(loaded)]
            loaded.append(_load(x, weights[step["phase"]], step, held, transposed, config))
        step, slices = steps[at], loaded[at]
        if step["phase"] == "down":
            if step["first"] and step["new_block"] and config.flip:
                features = _flipped(features)
            slices["a"] = {"tile": features[step["index"]], "rows": []}
        if step["first"]:
            accumulators = wave_accumulators(step)
            pending = []
        if step["in_tail"]:
            pending.append(slices)
        else:
            for tile in accumulators:
                multiply(tile, slices, step["first"])
        if step["last"]:
            started = len(pending) < step["slices"]
            if step["phase"] == "down":
                nothing = {"bias": None, "residual": []}
                plain = Epilogue(out_dtype)
                finish_wave(y, step, accumulators, pending, started, nothing, plain, config)
            elif step["phase"] == "gate":
                active = _activate(accumulators, pending, started, activation)
            else:
                if step["new_block"]:
                    features = []
                features += _combine(accumulators, pending, started, active, x.dtype)
        loaded[at] = None


def _steps(tokens, width, inner, config):
    """One entry per block, product, wave and contraction slice, in the order of execution.

    The columns of the stationary side are "m", those of the moving side "n", as in the matmul
    kernel; "t" and "i" are the tokens and features of the slices of x and of the weights.
    """
    pmax, moving = nl.tile_size.pmax, nl.tile_size.gemm_moving_fmax
    steps = []
    for t in spans(tokens, config.tokens):
        for i in spans(inner, config.wave_up * (moving if config.flip else pmax)):
            for phase in ("gate", "up"):
                base = {"phase": phase, "t": t, "i": i, "new_block": i[0] == 0}
                # The stationary columns may stand anywhere: only their number counts here.
                base["m"], base["n"] = (t, i) if config.flip else (i, t)
                _add_steps(steps, base, spans(width, pmax), config)
        for n in spans(width, config.wave_down * moving):
            base = {"phase": "down", "m": t, "n": n, "batch": 0, "new_block": n[0] == 0}
            _add_steps(steps, base, spans(inner, pmax), config)
    return steps


def _add_steps(steps, base, slices, config):
    for index in range(len(slices)):
        step = dict(base)
        step["k"] = slices[index]
        step["index"] = index
        step["slices"] = len(slices)
        step["first"] = index == 0
        step["last"] = index == len(slices) - 1
        step["in_tail"] = index >= len(slices) - config.tail
        steps.append(step)


def _load(x, weight, step, held, transposed, config):
    """Start the loads of one slice: of a weight, and of x when the block is new."""
    k = step["k"]
    if step["phase"] == "down":
        return {"b": load_slice(weight, k, step["n"], transposed, config)}
    if step["phase"] == "gate" and step["new_block"]:
        held[step["index"]] = load_slice(x, k, step["t"], True, config)
    weights = load_slice(weight, k, step["i"], transposed, config)
    if config.flip:
        return {"a": held[step["index"]], "b": weights}
    return {"a": weights, "b": held[step["index"]]}


def _complete(tile, pending, started):
    """Run the tail of a wave for one accumulator."""
    for index in range(len(pending)):
        multiply(tile, pending[index], index == 0 and not started)


def _activate(accumulators, pending, started, activation):
    """Finish a wave of x·gate: activated, float32, in SBUF."""
    results = []
    for tile in accumulators:
        _complete(tile, pending, started)
        result = nl.ndarray(tile["psum"].shape, dtype=nl.float32, buffer=nl.sbuf)
        nisa.activation(dst=result, op=activation_of(activation), data=tile["psum"])
        results.append(result)
    return results


def _combine(accumulators, pending, started, active, dtype):
    """Finish a wave of x·up: times the activated gate, rounded to `dtype`."""
    results = []
    for number in range(len(accumulators)):
        tile = accumulators[number]
        _complete(tile, pending, started)
        result = nl.ndarray(tile["psum"].shape, dtype=dtype, buffer=nl.sbuf)
        nisa.tensor_tensor(dst=result, data1=active[number], data2=tile["psum"], op=nl.multiply)
        results.append(result)
    return results


def _flipped(parts):
    """Return the hidden features [tokens, features] as tiles [128 features, tokens].

    Many tiles of few tokens share a bank, and so one eviction; the last, shorter one has its own.
    """
    pmax, tokens, dtype = nl.tile_size.pmax, parts[0].shape[0], parts[0].dtype
    # gen2 transposes through a matmul, whose result is float32.
    psum_dtype = nl.float32 if nisa.get_nc_version() == nisa.nc_version.gen2 else dtype
    columns = []
    for part in parts:
        columns += [part[:, start:stop] for start, stop in spans(part.shape[1], pmax)]
    full = len(columns) if columns[-1].shape[1] == pmax else len(columns) - 1
    groups = [columns[a:b] for a, b in spans(full, nl.tile_size.gemm_moving_fmax // tokens)]
    if full < len(columns):
        groups.append(columns[full:])
    results = []
    for group in groups:
        shape = (group[0].shape[1], len(group) * tokens)
        flipped = nl.ndarray(shape, dtype=psum_dtype, buffer=nl.psum)
        for number in range(len(group)):
            place = flipped[:, number * tokens : (number + 1) * tokens]
            nisa.nc_transpose(dst=place, data=group[number], engine=nisa.engine.tensor)
        result = nl.ndarray(shape, dtype=dtype, buffer=nl.sbuf)
        nisa.tensor_copy(dst=result, src=flipped, engine=nisa.engine.vector)
        for number in range(len(group)):
            results.append(result[:, number * tokens : (number + 1) * tokens])
    return results
