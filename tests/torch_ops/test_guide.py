"""Every block of the guide and of the README here runs as it stands."""

from __future__ import annotations

import re

import pytest

torch = pytest.importorskip("torch")

from tests.child import REPO, run_python

ROOM = REPO / "nki_kernels" / "torch_ops"
BLOCKS = re.findall(r"<!-- (.*?) -->\n```python\n(.*?)```", (ROOM / "GUIDE.md").read_text(), re.S)
(README,) = re.findall(r"```python\n(.*?)```", (ROOM / "README.md").read_text(), re.S)
#: What a block prints, among other things.
PRINTS = {
    "hf": ["LlamaMLP -> gated_mlp", "('attention', 'simulator'): 1"],
    "hf switch": [],
    "torch": ["raises: cannot run on simulator", "b has dtype torch.float64"],
    "kernel": ["[2., 2., 2., 2.]"],
}


def test_the_guide_has_the_blocks_named_here():
    assert [name for name, _ in BLOCKS] == list(PRINTS)


@pytest.mark.parametrize(("name", "code"), BLOCKS)
def test_the_guide_runs_as_pasted(name, code):
    if name.startswith("hf"):
        pytest.importorskip("transformers")
    env = {"NEURON_PLATFORM_TARGET_OVERRIDE": "trn2", "HF_HUB_OFFLINE": "1"}
    done = run_python(["-c", code], cwd=REPO, env=env)
    assert done.returncode == 0, done.stderr
    for text in PRINTS[name]:
        assert text in done.stdout


def test_the_readme_runs_as_pasted():
    done = run_python(["-c", README], cwd=REPO, env={"NEURON_PLATFORM_TARGET_OVERRIDE": "trn2"})
    assert done.returncode == 0, done.stderr
    assert "('matmul', 'simulator'): 2" in done.stdout
