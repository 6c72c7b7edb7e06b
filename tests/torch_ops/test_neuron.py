"""The backend "neuron" without a device: it refuses with all reasons, or calls the kernel.

A child process renames PyTorch's spare device to `neuron`, as TorchNeuron does, and makes tensors
without values on it.
"""

from __future__ import annotations

import importlib.metadata
import json
import sys
import types
from pathlib import Path

import pytest

torch = pytest.importorskip("torch")

from nki_kernels import toolchain
from nki_kernels.torch_ops import BackendError, counters, explain, matmul
from tests.child import REPO, run_python

ONES = torch.ones(2, 3), torch.ones(3, 4)


def test_without_a_device_every_reason_is_given():
    with pytest.raises(BackendError) as caught:
        matmul(ONES[0].double(), ONES[1][1:], backend="neuron")
    for text in (
        "backend 'neuron', asked for by the argument backend=, cannot run this call: 6 reasons",
        "torch_neuronx is not installed; pip install 'nki-kernels[neuron]' --extra",
        "the nki in force is the embedded one (",
        "a is on cpu; a device takes tensors on neuron; pass a.to('neuron')",
        "b is on cpu; a device takes tensors on neuron; pass b.to('neuron')",
        "a has dtype torch.float64; allowed are",
        "K is 3 in a [M, K] = [2, 3] but 2 in b",
    ):
        assert text in str(caught.value)
    assert not counters()


def test_empties_do_not_hide_that_there_is_no_device():
    with pytest.raises(BackendError, match="torch_neuronx is not installed"):
        matmul(torch.ones(0, 3), ONES[1], backend="neuron")


@pytest.mark.parametrize(
    ("version", "text"),
    [
        ("1.0", "torch_neuronx 1.0 is too old, or the public index's placeholder; allowed is 2.13"),
        ("2.9.0.2.15", "torch_neuronx 2.9.0.2.15 is too old"),
        ("unknown", "torch_neuronx unknown is too old"),
        ("2.13.3.0", "torch_neuronx 2.13.3.0 fails to import: ImportError: no runtime; repair it"),
    ],
)
def test_an_installation_that_cannot_be_used(version, text, monkeypatch, tmp_path):
    (tmp_path / "torch_neuronx.py").write_text("raise ImportError('no runtime')")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(importlib.metadata, "version", lambda _: version)
    assert text in explain(matmul, *ONES).reasons["neuron"][0]


def test_only_what_is_missing_is_listed(monkeypatch):
    monkeypatch.setattr(importlib.metadata, "version", lambda _: "2.14.3.0")
    monkeypatch.setitem(sys.modules, "torch_neuronx", types.ModuleType("torch_neuronx"))
    real = toolchain.Toolchain("real", "0.7.0", Path("nki"), "it is installed")
    monkeypatch.setattr(toolchain, "current", lambda: real)
    reasons = explain(matmul, *ONES).reasons["neuron"]
    assert [reason.partition(";")[0] for reason in reasons] == ["a is on cpu", "b is on cpu"]


_CHILD = """
import dataclasses, json, sys
import torch
from torch.utils.backend_registration import _setup_privateuseone_for_python_backend
_setup_privateuseone_for_python_backend("neuron")
import nki_kernels
from nki_kernels import toolchain
from nki_kernels.torch_ops import BackendError, counters, explain, matmul
from nki_kernels.torch_ops.registration import register
from nki_kernels.torch_ops.products import MATMUL

def tensor(*shape, dtype=torch.bfloat16):
    return torch._C._acc.create_empty_tensor(shape, dtype)

def refusal(*args, **kwargs):
    try:
        matmul(*args, **kwargs)
    except BackendError as error:
        return str(error)

calls = []
def kernel(*args):
    calls.append(args)
    return tensor(args[0].shape[0], args[1].shape[1])

a, b = tensor(2, 3), tensor(3, 4)
told = {
    "default": refusal(a, b),
    "simulator": refusal(a, b, backend="simulator"),
    "float64": explain(matmul, *(tensor(2, 2, dtype=torch.float64),) * 2).backend,
}
toolchain.current = lambda: toolchain.Toolchain("real", "0.7.0", None, "a test")
op = dataclasses.replace(MATMUL.op, name="probe", kernel=kernel)
probe = register(dataclasses.replace(MATMUL, op=op))
c = probe(a, b, out_dtype=torch.float32)
told["same tensors"] = [x.data_ptr() for x in calls[0][:2]] == [x.data_ptr() for x in (a, b)]
*_, epilogue, config = calls[0]
told["arguments"] = [str(epilogue.out_dtype), type(config).__name__]
told["result"] = [str(c.device.type), list(c.shape)]
told["counters"] = {" ".join(key): n for key, n in counters().items()}
print(json.dumps(told))
"""


def test_neuron_tensors_go_to_the_device_kernel(tmp_path):
    (tmp_path / "torch_neuronx.py").write_text("")
    dist = tmp_path / "torch_neuronx-2.13.3.0.dist-info"
    dist.mkdir()
    (dist / "METADATA").write_text(
        "Metadata-Version: 2.1\nName: torch-neuronx\nVersion: 2.13.3.0\n"
    )
    path = (REPO, tmp_path)
    env = {"NEURON_PLATFORM_TARGET_OVERRIDE": "trn2"}
    done = run_python(["-c", _CHILD], cwd=tmp_path, path=path, env=env)
    assert done.returncode == 0, done.stderr
    told = json.loads(done.stdout)
    assert "backend 'neuron', the default for tensors on neuron, cannot run" in told["default"]
    assert "1 reason\n" in told["default"]
    assert "the nki in force is the embedded one" in told["default"]
    assert "a is on neuron:0; the simulator takes tensors on cpu" in told["simulator"]
    assert told["float64"] == "torch"
    assert told["same tensors"]
    assert told["arguments"] == ["float32", "MatmulConfig"]
    assert told["result"] == ["neuron", [2, 4]]
    assert told["counters"] == {"probe neuron": 1}
