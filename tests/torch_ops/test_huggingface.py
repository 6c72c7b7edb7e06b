"""Tiny random models of transformers, patched; the extra ``hf``. Nothing is loaded from a hub."""

from __future__ import annotations

import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

from nki_kernels.machine.errors import OptionError
from nki_kernels.torch_ops import counters, huggingface, patch, reset_counters, use
from tests.torch_ops.test_functional import close

pytestmark = [pytest.mark.filterwarnings("ignore"), pytest.mark.usefixtures("offline")]

SIZES = {
    "vocab_size": 61, "hidden_size": 32, "intermediate_size": 40, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8,
    "max_position_embeddings": 64, "num_local_experts": 4, "num_experts": 4,
    "num_experts_per_tok": 2, "moe_intermediate_size": 24, "sliding_window": 6,
}  # fmt: skip
MODELS = ("Llama", "Qwen3", "Mixtral", "Qwen3Moe", "GptOss", "Gemma2")
#: Ops beside the linear layers, per forward pass of two layers.
RUNS = {
    "Llama": {"rms_norm_llama": 5, "attention": 2, "gated_mlp": 2},
    "Qwen3": {"rms_norm_llama": 9, "attention": 2, "gated_mlp": 2},
    "Mixtral": {
        "rms_norm_llama": 5,
        "attention": 2,
        "dispatch": 2,
        "grouped_matmul": 4,
        "combine": 2,
    },
    "Qwen3Moe": {
        "rms_norm_llama": 9,
        "attention": 2,
        "dispatch": 2,
        "grouped_matmul": 4,
        "combine": 2,
    },
    "GptOss": {"rms_norm": 5, "attention": 2, "dispatch": 2, "grouped_matmul": 4, "combine": 2},
    "Gemma2": {"rms_norm_gemma": 9, "attention": 2, "gated_mlp": 2},
}


@pytest.fixture
def offline(monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")


def made(name, **changes):
    torch.manual_seed(0)
    config = getattr(transformers, f"{name}Config")(**{**SIZES, **changes})
    model = getattr(transformers, f"{name}ForCausalLM")(config).eval()
    for key, parameter in model.named_parameters():
        if parameter.dim() == 1 or "bias" in key or "sinks" in key:
            torch.nn.init.normal_(parameter, 0.5)
    return model


def tokens(count=12, batch=2):
    numbers = torch.Generator().manual_seed(1)
    return torch.randint(1, 61, (batch, count), generator=numbers)


def ran(backend):
    return {name: n for (name, what), n in counters().items() if what == backend}


@pytest.mark.parametrize("name", MODELS)
def test_logits_generation_and_undo(name):
    model, ids = made(name), tokens()
    options = {"max_new_tokens": 5, "do_sample": False, "pad_token_id": 0}
    with torch.no_grad():
        want, text = model(ids).logits, model.generate(ids, **options)
        before = model.config._attn_implementation
        handle = patch(model)
        reset_counters()
        close(model(ids).logits, want, name, chain=4096)
        assert ran("torch") == {**RUNS[name], "linear": ran("torch")["linear"]}
        reset_counters()
        assert model.generate(ids, **options).tolist() == text.tolist()
        once = ran("torch")
        # A new token that sees every key takes the decoding kernel; a window is a mask.
        assert once["attention"] + once.get("attention_decode", 0) == 2 * 5
        assert ("attention_decode" in once) == (name != "Mixtral")
        handle.undo()
        reset_counters()
        assert model.config._attn_implementation == before
        assert model(ids).logits.tolist() == want.tolist()
        assert not counters()


@pytest.mark.parametrize("name", ["Llama", "Qwen3Moe", "GptOss"])
def test_kernels_compute_the_model_on_the_simulator(name):
    model, ids = made(name, num_hidden_layers=1), tokens(7, 1)
    with torch.no_grad():
        want = model(ids).logits
        patch(model)
        with use("simulator"):
            got = model(ids).logits
    close(got, want, name, chain=4096)
    assert not ran("torch")
    assert {"linear", "attention"} <= set(ran("simulator"))
    assert {"rms_norm", "rms_norm_llama"} & set(ran("simulator"))


def test_padding_is_masked():
    model, ids = made("Llama"), tokens()
    mask = torch.ones_like(ids)
    mask[0, :4] = 0
    with torch.no_grad():
        want = model(ids, attention_mask=mask).logits[:, 4:]
        patch(model, ["attention"])
        close(model(ids, attention_mask=mask).logits[:, 4:], want, "padding", chain=4096)


@pytest.mark.parametrize("name", ["Llama", "Qwen3Moe"])
def test_training_has_the_same_loss_curve(name):
    curves = []
    for patched in (False, True):
        model, ids = made(name).train(), tokens()
        if patched:
            patch(model)
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
        losses = []
        for _ in range(20):
            loss = model(ids, labels=ids).loss
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.detach())
        curves.append(torch.stack(losses).float())
    assert curves[0][-1] < curves[0][0]
    close(curves[1], curves[0], name, chain=4096)


@pytest.mark.parametrize(
    ("given", "text"),
    [({"dropout": 0.1}, r"dropout is 0\.1; set attention_dropout to 0"),
     ({"position_bias": 1}, "position_bias is given; use 'sdpa'"),
     ({"cache": 1}, "cache is given; use 'sdpa'")],
)  # fmt: skip
def test_what_the_attention_cannot_is_refused(given, text):
    x = torch.ones(1, 1, 2, 2)
    with pytest.raises(OptionError, match=text):
        huggingface.attention_forward(torch.nn.Identity(), x, x, x, None, **given)
