"""`bench device` without a device: the real adapter on a stand-in of the documented interface.

The stand-in is a module `torch_neuronx`, and CPU tensors that count as the device's: a `@nki.jit`
kernel called with tensors returns tensors, which is what TorchNeuron documents and what the
embedded NKI does as well.
"""

from __future__ import annotations

import dataclasses
import importlib.metadata
import itertools
import json
import sys
import types
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest

torch = pytest.importorskip("torch")

import bench.device
from bench.__main__ import main
from bench.device import ACTIVATION_ERROR, DeviceResult, measure_device, modelled, read_device
from bench.record import BenchError
from bench.running import Work
from nki_kernels import toolchain
from nki_kernels.torch_ops import backends, neuron

CASES = (
    Work("matmul", "5x7x9", "bfloat16", "trn2"),
    Work("rms_norm", "3x8", "float32", "trn2"),
    Work("matmul_fp8", "4x6x8", "float8_e5m2", "trn2"),
)
FACTS = {"modelled_us": 12.5, "activations": False}
REAL_VERSION = importlib.metadata.version


@pytest.fixture
def chip(monkeypatch):
    versions = {"torch-neuronx": "2.13.3.0", "nki": "0.7.0", "neuronx-cc": "2.28.7631.0"}
    monkeypatch.setattr(
        importlib.metadata, "version", lambda name: versions.get(name) or REAL_VERSION(name)
    )
    monkeypatch.setitem(sys.modules, "torch_neuronx", types.ModuleType("torch_neuronx"))
    real = toolchain.Toolchain("real", "0.7.0", Path("nki"), "it is installed")
    monkeypatch.setattr(toolchain, "current", lambda: real)
    monkeypatch.setattr(backends, "NEURON_DEVICE", "cpu")
    monkeypatch.setattr(neuron, "NEURON_DEVICE", "cpu")
    waits = []
    monkeypatch.setattr(torch.accelerator, "synchronize", lambda: waits.append(1))
    return waits


def test_the_model_says_what_a_case_takes_and_whether_it_uses_activations():
    facts = modelled(CASES[:2])
    assert all(fact["modelled_us"] > 1 for fact in facts)
    assert [fact["activations"] for fact in facts] == [False, True]


@pytest.mark.parametrize("work", CASES, ids=str)
def test_a_case_is_checked_timed_and_recorded(work, chip):
    assert not neuron.missing()
    seconds = itertools.count()
    result = measure_device(work, neuron.NeuronDevice(), FACTS, lambda: next(seconds) * 0.25)
    # A call takes 0.25 s by this clock: the fewest calls, five rounds of them.
    assert (result.correct, result.failure, result.calls, result.rounds) == (True, None, 3, 5)
    assert result.device_us == result.median_us == 0.25e6 / 3
    assert (result.modelled_us, result.source) == (12.5, "device")
    assert result.software == {
        "torch": REAL_VERSION("torch"), "torch-neuronx": "2.13.3.0", "nki": "0.7.0",
        "neuronx-cc": "2.28.7631.0",
    }  # fmt: skip
    assert len(chip) == 1 + 2 * 6  # once for the check, around each of six spans


class Wrong(neuron.NeuronDevice):
    """A device whose results are off by a relative error."""

    def __init__(self, error):
        self.error = error

    def get(self, value):
        return super().get(value) * np.float32(1 + self.error)


@pytest.mark.parametrize("error", [ACTIVATION_ERROR / 2, 4 * ACTIVATION_ERROR])
@pytest.mark.parametrize("activations", [True, False])
def test_a_wrong_result_is_not_timed_and_activations_have_their_allowance(error, activations, chip):
    facts = FACTS | {"activations": activations}
    result = measure_device(CASES[1], Wrong(error), facts)
    right = activations and error < ACTIVATION_ERROR
    assert result.correct is right
    assert (result.device_us is not None) is right
    if not right:
        assert "rms_norm [3x8 y on the device] float32: worst at" in result.failure


def test_the_command_writes_one_file_which_validate_reads(chip, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(bench.device, "modelled", lambda works: [FACTS] * len(works))
    path = tmp_path / "device.json"
    assert main(["device", "matmul", "--shape", "5x7x9", "--json", str(path)]) == 0
    assert "us (device)" in capsys.readouterr().out
    (record,) = json.loads(path.read_text())["results"]
    (read,) = read_device(path)
    assert isinstance(read, DeviceResult)
    assert dataclasses.asdict(read) == record
    assert main(["validate", "--device", str(path)]) == 0
    told = capsys.readouterr().out
    error = 100 * (12.5 - read.device_us) / read.device_us
    assert f"{error:+.1f}" in told
    assert "torch-neuronx 2.13.3.0" in told


def test_without_a_device_every_reason_is_given():
    with pytest.raises(BenchError, match=r"torch_neuronx is not installed; .*; the nki in force"):
        bench.device.neuron()


@pytest.mark.parametrize(
    ("text", "told"),
    [
        (None, "cannot be read"),
        ("{", "is no JSON"),
        ("[]", "holds no figures of a device"),
        (json.dumps({"source": "model", "results": []}), "holds no figures of a device"),
        (json.dumps({"source": "device", "results": [{"op": "x"}]}), "of another version"),
    ],
)
def test_another_file_is_refused(text, told, tmp_path):
    path = tmp_path / "f.json"
    if text is not None:
        path.write_text(text)
    with pytest.raises(BenchError, match=told):
        read_device(path)


def test_a_file_without_a_time_is_refused(tmp_path):
    with pytest.raises(BenchError, match="no case that was right and timed"):
        bench.device.device_errors([])


def test_a_model_that_fails_is_named():
    with pytest.raises(BenchError, match=r"the timing model failed: .*no operator 'nothing'"):
        modelled([Work("nothing", "1", "float32", "trn2")])


def test_eight_bit_floats_go_to_the_device_under_the_type_of_the_same_bits(chip):
    array = np.arange(128, dtype=np.uint8).view(ml_dtypes.float8_e4m3)
    value = neuron.NeuronDevice().put(array)
    assert value.dtype == torch.float8_e4m3fn
    assert value.view(torch.uint8).tolist() == list(range(128))
