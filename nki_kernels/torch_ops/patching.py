"""`patch`: the layers of a model computed by the ops, undone as easily.

| name | replaces | by |
|---|---|---|
| linear | `torch.nn.Linear` | `linear` |
| norm | `torch.nn.LayerNorm`, `GroupNorm`, `RMSNorm`, any ...RMSNorm | the norms, as cast |
| mlp | gate_proj, up_proj, down_proj and act_fn (SwiGLU, GeGLU) | `gated_mlp` |
| attention, experts | those of transformers models | see `huggingface.py` |

A class that is not PyTorch's own is replaced only after its forward and ours agreed on random rows.
"""

from __future__ import annotations

import copy
import sys
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from functools import partial
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

from nki_kernels.machine.errors import DtypeError
from nki_kernels.torch_ops import functional
from nki_kernels.torch_ops import functions as ops
from nki_kernels.torch_ops.backends import use
from nki_kernels.torch_ops.counts import uncounted
from nki_kernels.torch_ops.linears import ACTIVATIONS

KINDS = ("attention", "experts", "mlp", "norm", "linear")

#: Two float32 computations of the same formula differ by some roundings of 2^-24, also over
#: thousands of terms; formulas that differ at all differ by more than this of the largest value.
_SAME = 2.0**-14
_ROWS = 4

#: What an RMSNorm may be: rounded once, or as Llama's or Gemma's.
_RMS_NORMS: dict[str, Callable[..., Tensor]] = {
    "rms_norm": ops.rms_norm,
    "rms_norm_llama": ops.rms_norm_llama,
    "rms_norm_gemma": ops.rms_norm_gemma,
}

#: From a layer to the forward that replaces its own.
Maker: TypeAlias = Callable[[Any], Callable[[Tensor], Tensor]]


@dataclass(frozen=True, slots=True)
class Change:
    """One replaced layer: its path in the model, its class, the op that computes it now."""

    path: str
    kind: str
    op: str


@dataclass(slots=True)
class Patch:
    """What `patch` did.

    Attributes:
        changes: the replaced layers.
        skipped: path and reason of layers that look like one of ours and are not replaced.
    """

    changes: list[Change] = field(default_factory=list)
    skipped: list[tuple[str, str]] = field(default_factory=list)
    _undo: list[Callable[[], None]] = field(default_factory=list)

    def report(self) -> str:
        """Return a line per class and op with their number, and a line per skipped layer."""
        counts: dict[tuple[str, str], int] = {}
        for change in self.changes:
            key = change.kind, change.op
            counts[key] = counts.get(key, 0) + 1
        lines = [f"{number:4} x {kind} -> {op}" for (kind, op), number in counts.items()]
        lines += [f"not replaced: {path}: {why}" for path, why in self.skipped]
        return "\n".join(lines) or "nothing to replace"

    def undo(self) -> None:
        """Give the model its own layers back; twice does no harm."""
        while self._undo:
            self._undo.pop()()

    def replace(self, path: str, module: nn.Module, op: str, forward: Callable[..., Any]) -> None:
        """Let `forward` compute a layer: an attribute of this one object, not of its class."""
        module.forward = forward
        self._undo.append(lambda: module.__dict__.pop("forward", None))
        self.changes.append(Change(path, type(module).__name__, op))

    def add(self, change: Change, undo: Callable[[], None]) -> None:
        """Note a change of the whole model."""
        self.changes.append(change)
        self._undo.append(undo)


def patch(model: nn.Module, kinds: Iterable[str] = KINDS) -> Patch:
    """Compute the layers of a model by the ops.

    Parameters, state dict and classes stay as they are. Which backend runs is asked at each call:
    `use`, NKI_SIMULATOR, else the default of the device; `counters` says what ran.

    Args:
        model: any module; changed in place.
        kinds: which layers, of the table above.

    Returns:
        The handle: `report()` and `undo()`.

    Raises:
        ValueError: an unknown kind.
    """
    wanted = tuple(kinds)
    unknown = [kind for kind in wanted if kind not in KINDS]
    if unknown:
        raise ValueError(f"patch: kind is {unknown[0]!r}; allowed are {', '.join(KINDS)}")
    done = Patch()
    if "transformers" in sys.modules:
        _patch_interfaces(model, wanted, done)
    inside: set[nn.Module] = set()
    for path, module in model.named_modules():
        if module in inside:
            continue
        if "forward" in module.__dict__:
            done.skipped.append((path, "its forward is replaced already"))
            continue
        if "mlp" in wanted and _is_gated(module) and _patch_mlp(path, module, done):
            inside |= set(module.modules())
        elif "norm" in wanted:
            _patch_norm(path, module, done)
        if "linear" in wanted and type(module) is nn.Linear:
            done.replace(path, module, "linear", _linear(module))
    return done


# -- one layer -------------------------------------------------------------------------------------


def _linear(module: nn.Linear) -> Callable[[Tensor], Tensor]:
    return lambda input: functional.linear(input, module.weight, module.bias)


def _patch_norm(path: str, module: nn.Module, done: Patch) -> None:
    if type(module) is nn.LayerNorm:
        done.replace(path, module, "layer_norm", _layer_norm(module))
    elif type(module) is nn.GroupNorm:
        done.replace(path, module, "group_norm", _group_norm(module))
    elif type(module) is nn.RMSNorm:
        done.replace(path, module, "rms_norm", _torch_rms_norm(module))
    elif "RMSNorm" in type(module).__name__:
        weight, eps = getattr(module, "weight", None), _eps(module)
        if not isinstance(weight, Tensor) or weight.dim() != 1 or eps is None:
            done.skipped.append((path, "no weight [H] or no eps where an RMSNorm has them"))
        else:
            _patch_rms_norm(path, module, eps, done)


def _patch_rms_norm(path: str, module: nn.Module, eps: float, done: Patch) -> None:
    """Replace a norm by the op that computes the same, of several the one that rounds the same."""
    width = next(module.parameters()).shape[0]
    found = {}
    for name in _RMS_NORMS:
        make = partial(_rms_norm, name=name, eps=eps)
        if _agree(module, make, width):
            found[name] = _differing(module, make, width)
    if not found:
        done.skipped.append((path, f"{type(module).__name__} computes something else"))
        return
    best = min(found, key=lambda name: found[name])
    done.replace(path, module, best, _rms_norm(module, best, eps))


def _differing(module: nn.Module, make: Maker, width: int) -> int:
    """Return how many bfloat16 results differ at all: casts are told apart by their rounding."""
    theirs, ours = _both(module, make, width, torch.bfloat16)
    return int((theirs != ours).sum())


def _layer_norm(module: nn.LayerNorm) -> Callable[[Tensor], Tensor]:
    return lambda input: functional.layer_norm(
        input, module.normalized_shape, module.weight, module.bias, module.eps
    )


def _group_norm(module: nn.GroupNorm) -> Callable[[Tensor], Tensor]:
    return lambda input: functional.group_norm(
        input, module.num_groups, module.weight, module.bias, module.eps
    )


def _torch_rms_norm(module: nn.RMSNorm) -> Callable[[Tensor], Tensor]:
    return lambda x: functional.rms_norm(x, module.normalized_shape, module.weight, module.eps)


def _eps(module: nn.Module) -> float | None:
    for name in ("variance_epsilon", "eps", "epsilon"):
        value = getattr(module, name, None)
        if isinstance(value, float):
            return value
    return None


def _rms_norm(module: Any, name: str, eps: float) -> Callable[[Tensor], Tensor]:
    def forward(hidden_states: Tensor) -> Tensor:
        rows = hidden_states.reshape(-1, hidden_states.shape[-1])
        if rows.dtype != module.weight.dtype:
            raise DtypeError(
                f"{type(module).__name__}, patched: its rows are {rows.dtype}, the weight "
                f"{module.weight.dtype}; one dtype is needed, models differ in what they make of "
                "two; cast the module, or patch without 'norm'"
            )
        y = _RMS_NORMS[name](rows, module.weight, eps=eps)
        return y.reshape(hidden_states.shape)

    return forward


def _is_gated(module: nn.Module) -> bool:
    layers = [getattr(module, name, None) for name in ("gate_proj", "up_proj", "down_proj")]
    return all(type(x) is nn.Linear and x.bias is None for x in layers) and callable(
        getattr(module, "act_fn", None)
    )


def _patch_mlp(path: str, module: Any, done: Patch) -> bool:
    for activation in ACTIVATIONS:
        if _agree(module, partial(_gated, activation=activation), module.gate_proj.in_features):
            done.replace(path, module, "gated_mlp", _gated(module, activation))
            return True
    done.skipped.append((path, f"{type(module).__name__} is no gated MLP of {list(ACTIVATIONS)}"))
    return False


def _gated(module: Any, activation: str) -> Callable[[Tensor], Tensor]:
    def forward(x: Tensor) -> Tensor:
        weights = (getattr(module, name).weight for name in ("gate_proj", "up_proj", "down_proj"))
        y = ops.gated_mlp(x.reshape(-1, x.shape[-1]), *weights, activation=activation)
        return y.reshape(x.shape)

    return forward


def _agree(module: nn.Module, make: Maker, width: int) -> bool:
    """Tell whether a layer's own forward and ours give the same, in float32 on random rows."""
    if next(module.parameters()).is_meta:
        return False
    try:
        theirs, ours = _both(module, make, width, torch.float32)
    except (RuntimeError, TypeError, ValueError):  # another signature: not one of ours
        return False
    if not isinstance(theirs, Tensor) or theirs.shape != ours.shape or theirs.dtype != ours.dtype:
        return False
    return bool((theirs - ours).abs().max() <= _SAME * theirs.abs().max())


def _both(module: nn.Module, make: Maker, width: int, dtype: torch.dtype) -> tuple[Any, Tensor]:
    """Return what a copy of the layer and its replacement make of random rows."""
    probe = copy.deepcopy(module).to("cpu", dtype).eval()
    numbers = torch.Generator().manual_seed(0)
    with torch.no_grad(), use("torch"), uncounted():
        for parameter in probe.parameters():  # a weight of ones hides how it is applied
            noise = torch.rand(parameter.shape, generator=numbers)
            parameter.copy_(noise + 0.5 if parameter.dim() == 1 else noise - 0.5)
        x = torch.randn(_ROWS, width, generator=numbers).to(dtype)
        return probe(x), make(probe)(x)


def _is_experts(module: nn.Module) -> bool:
    return type(module).__name__.endswith("Experts")


# -- transformers ----------------------------------------------------------------------------------


def _patch_interfaces(model: Any, wanted: tuple[str, ...], done: Patch) -> None:
    """Switch attention and experts of a transformers model to the registered name."""
    from nki_kernels.torch_ops import huggingface

    huggingface.register()
    config = getattr(model, "config", None)
    for kind, stem in (("attention", "attn"), ("experts", "experts")):
        setter = getattr(model, f"set_{stem}_implementation", None)
        before = getattr(config, f"_{stem}_implementation", None)
        if kind not in wanted or setter is None or before is None:
            continue
        if kind == "experts" and not any(map(_is_experts, model.modules())):
            continue
        setter(huggingface.NAME)
        done.add(Change("", type(model).__name__, kind), partial(setter, before))
