"""The gradients of a gated MLP y = (f(x·gateᵀ) * (x·upᵀ))·downᵀ in one kernel.

With a = x·gateᵀ, b = x·upᵀ and e = dy·down, all [tokens, features],

    h = f(a) * b, da = e * b * f'(a), db = e * f(a)
    ddown = dyᵀ·h; dgate = daᵀ·x; dup = dbᵀ·x; dx = da·gate + db·up

First the three products of a wave of features, one after the other in the same banks: a leaves PSUM
as float32 and Scalar takes f and f' of it, wave by wave, while PE forms b; b turns into h and
b * f'(a), e into da and db, on Vector. h, da and db go to HBM once, rounded to the dtype of x. Then
five products of the matmul kernel; the second half of dx adds the first, float32, on its way out.
PE limits: eight products of 2 T H I operations, of which a and b, formed again, are two. Where the
caller kept a and b, six are left, and a wave loads its part of them instead.
"""

from __future__ import annotations

from dataclasses import dataclass

import nki
import nki.isa as nisa
import nki.language as nl

from nki_kernels.kernels.matmul.epilogue import Epilogue, activation_of
from nki_kernels.kernels.matmul.kernel import (
    Layout,
    MatmulConfig,
    multiply,
    product_in_passes,
    wave_accumulators,
)
from nki_kernels.kernels.matmul.slices import in_passes, load_slice, mode_of, ready_slice, spans
from nki_kernels.kernels.mlp.slopes import slope


@dataclass(frozen=True)
class GatedMlpBackwardConfig(nl.NKIObject):
    """Tuning of the products. No field changes a result.

    Attributes:
        hidden: of the three products that make the gradients of the hidden features.
        dx: of the two of dx.
        dweight: of dgate and dup.
        ddown: of ddown.
    """

    hidden: MatmulConfig
    dx: MatmulConfig
    dweight: MatmulConfig
    ddown: MatmulConfig


@nki.jit
def gated_mlp_backward(dy, x, gate, up, down, x_gate, x_up, activation, out_dtype, config):
    """Gradients of a gated MLP, accumulated in float32, each rounded once.

    Dimensions:
        T: tokens; H: width of x and dy; I: hidden features. Any size >= 1.

    Args:
        dy: [T, H] HBM, bfloat16 | float16 | float32, the gradient of the result.
        x: [T, H] HBM, dtype of dy.
        gate: [I, H] HBM, dtype of dy.
        up: as gate.
        down: [H, I] HBM, dtype of dy.
        x_gate: [T, I] HBM, dtype of dy, a as the forward pass had it, or None: form it again.
        x_up: likewise, b; both or none.
        activation: "silu", "gelu", "gelu_tanh" or "relu".
        out_dtype: dtype of the results.
        config: GatedMlpBackwardConfig.

    Returns:
        dx [T, H], dgate [I, H], dup [I, H], ddown [H, I]. The hidden features and their gradients
        are rounded once, to the dtype of x.
    Data flow: three products, PSUM -> SBUF (features) -> HBM, then five of the matmul kernel.
    """
    hidden = {}
    for name in ("h", "da", "db"):
        shape = (x.shape[0], gate.shape[0])
        hidden[name] = nl.ndarray(shape, dtype=x.dtype, buffer=nl.private_hbm)
    operands = {"x": x, "dy": dy, "gate": gate, "up": up, "down": down}
    by_token = {name: (whole, 0) for name, whole in {**hidden, "x": x, "dy": dy}.items()}
    for name, saved in (("x_gate", x_gate), ("x_up", x_up)):
        by_token[name] = None if saved is None else (saved, 0)

    def work(parts):
        _hidden(parts, {**operands, **parts}, activation, config.hidden)

    in_passes(by_token, x.shape[0], config.hidden.rows, work)
    results = []
    for shape in (x.shape, gate.shape, up.shape, down.shape):
        results.append(nl.ndarray(shape, dtype=out_dtype, buffer=nl.shared_hbm))
    dx, dgate, dup, ddown = results
    _multiply(ddown, dy, hidden["h"], None, Layout(transpose_a=True), config.ddown)
    _multiply(dgate, hidden["da"], x, None, Layout(transpose_a=True), config.dweight)
    _multiply(dup, hidden["db"], x, None, Layout(transpose_a=True), config.dweight)
    half = nl.ndarray(x.shape, dtype=nl.float32, buffer=nl.private_hbm)
    _multiply(half, hidden["da"], gate, None, Layout(), config.dx)
    _multiply(dx, hidden["db"], up, half, Layout(), config.dx)
    return dx, dgate, dup, ddown


def _multiply(c, a, b, residual, layout, config):
    operands = {"a": a, "b": b, "bias": None, "residual": residual}
    product_in_passes(c, operands, layout, Epilogue(c.dtype), config)


def _hidden(hidden, operands, activation, config):
    """Store h, da and db [T, I] in HBM."""
    rows, size = operands["x"].shape
    phases = ("gate", "up", "down") if operands["x_gate"] is None else ("down",)
    steps = _steps(rows, operands["gate"].shape[0], size, phases, config)
    loaded = []
    held = {}
    accumulators = []
    pending = []
    features = []
    for at in range(len(steps)):
        while len(loaded) < len(steps) and len(loaded) <= at + config.prefetch:
            loaded.append(_load(operands, steps[len(loaded)], held, config))
        step, slices = steps[at], loaded[at]
        if step["first"]:
            pending = []
            accumulators = wave_accumulators(step)
            if "features" in slices:
                features = slices["features"]
                _activate(features, activation)
                for number in range(len(accumulators)):
                    tile, feature = accumulators[number], features[number]
                    _take_up(hidden, step, tile, feature["b"], feature, config)
        # PE transposes run one step ahead, or PE would wait for their eviction.
        for ahead in loaded[at : at + 2]:
            ready_slice(ahead["a"])
            ready_slice(ahead["b"])
        if step["in_tail"]:
            pending.append(slices)
        else:
            for tile in accumulators:
                multiply(tile, slices, step["first"])
        if step["last"]:
            started = len(pending) < step["slices"]
            for number in range(len(accumulators)):
                for index in range(len(pending)):
                    first = index == 0 and not started
                    multiply(accumulators[number], pending[index], first)
                if step["phase"] == "gate":
                    if number == 0:
                        features = []
                    features.append(_evict_gate(accumulators[number]["psum"], number, config))
                else:
                    _evict(hidden, step, accumulators[number], features[number], config)
            if step["phase"] == "gate":
                _activate(features, activation)
        loaded[at] = None


def _steps(rows, columns, size, phases, config):
    """One entry per wave, product and contraction slice, in the order of execution."""
    slices = spans(size, nl.tile_size.pmax)
    steps = []
    for m in spans(rows, config.wave_m * nl.tile_size.gemm_stationary_fmax):
        for n in spans(columns, config.wave_n * nl.tile_size.gemm_moving_fmax):
            for phase in phases:
                for index in range(len(slices)):
                    steps.append(
                        {
                            "phase": phase,
                            "m": m,
                            "n": n,
                            "k": slices[index],
                            "index": index,
                            "slices": len(slices),
                            "first": index == 0,
                            "last": index == len(slices) - 1,
                            "in_tail": index >= len(slices) - config.tail,
                            "new_a": not config.hold_a or (n[0] == 0 and phase != "up"),
                        }
                    )
    return steps


def _load(operands, step, held, config):
    """Start the loads of one slice of a weight, and of x or dy where it is not held."""
    phase, k = step["phase"], step["k"]
    b = load_slice(operands[phase], k, step["n"], phase != "down", config)
    name = "dy" if phase == "down" else "x"
    key = (name, step["index"])
    if step["new_a"]:
        held[key] = load_slice(operands[name], k, step["m"], True, config)
    found = {"a": held[key], "b": b}
    if step["first"] and operands["x_gate"] is not None:
        found["features"] = _load_features(operands, step, config)
    return found


def _load_features(operands, step, config):
    """Load what the forward pass kept of a wave: {"a", "b"} per accumulator."""
    (m_start, m_stop), (n_start, n_stop) = step["m"], step["n"]
    features = []
    for top, bottom in spans(m_stop - m_start, nl.tile_size.gemm_stationary_fmax):
        row = {}
        for name, source in (("a", operands["x_gate"]), ("b", operands["x_up"])):
            shape = (bottom - top, n_stop - n_start)
            row[name] = nl.ndarray(shape, dtype=source.dtype, buffer=nl.sbuf)
            part = source[m_start + top : m_start + bottom, n_start:n_stop]
            nisa.dma_copy(dst=row[name], src=part, dge_mode=mode_of(config))
        for left, right in spans(n_stop - n_start, nl.tile_size.gemm_moving_fmax):
            features.append({name: row[name][:, left:right] for name in row})
    return features


def _evict_gate(psum, number, config):
    """Move a sum of x·gateᵀ out of PSUM: {"a": float32 in SBUF}."""
    tile = nl.ndarray(psum.shape, dtype=nl.float32, buffer=nl.sbuf)
    scalar = config.evict_scalar and number % 2 == 1
    engine = nisa.engine.scalar if scalar else nisa.engine.vector
    nisa.tensor_copy(dst=tile, src=psum, engine=engine)
    return {"a": tile}


def _activate(features, activation):
    """Add f(a) and f'(a) to each tile; one function after the other: each has a table to load."""
    for tile in features:
        tile["f"] = nl.ndarray(tile["a"].shape, dtype=nl.float32, buffer=nl.sbuf)
        nisa.activation(dst=tile["f"], op=activation_of(activation), data=tile["a"])
    for tile in features:
        tile["slope"] = slope(activation, tile["a"])


def _evict(hidden, step, tile, feature, config):
    """Store what a sum b = x·upᵀ or e = dy·down gives."""
    if step["phase"] == "up":
        _take_up(hidden, step, tile, tile["psum"], feature, config)
    else:
        _store(hidden["db"], step, tile, feature["f"], tile["psum"], config)
        _store(hidden["da"], step, tile, feature["weighted"], tile["psum"], config)


def _take_up(hidden, step, tile, b, feature, config):
    """Store h = f(a) * b, and keep b * f'(a) for da."""
    _store(hidden["h"], step, tile, feature["f"], b, config)
    feature["weighted"] = nl.ndarray(b.shape, dtype=nl.float32, buffer=nl.sbuf)
    nisa.tensor_tensor(dst=feature["weighted"], data1=feature["slope"], data2=b, op=nl.multiply)


def _store(target, step, tile, factor, data, config):
    """target = factor * data, rounded, at the place of a tile."""
    (m_from, m_to), (n_from, n_to) = tile["m"], tile["n"]
    rounded = nl.ndarray(data.shape, dtype=target.dtype, buffer=nl.sbuf)
    nisa.tensor_tensor(dst=rounded, data1=factor, data2=data, op=nl.multiply)
    m, n = step["m"][0], step["n"][0]
    place = target[m + m_from : m + m_to, n + n_from : n + n_to]
    nisa.dma_copy(dst=place, src=rounded, dge_mode=mode_of(config))
