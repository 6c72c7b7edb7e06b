"""`patch` on models of plain PyTorch, and of classes that only look like transformers'."""

from __future__ import annotations

import pytest

torch = pytest.importorskip("torch")

from torch import nn

from nki_kernels.machine.errors import DtypeError
from nki_kernels.torch_ops import counters, patch, reset_counters, use
from tests.torch_ops.support import tensor
from tests.torch_ops.test_functional import close


class LikeRMSNorm(nn.Module):
    """Rounds before the weight, as Llama's does."""

    def __init__(self, size, eps=1e-6):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.variance_epsilon = eps

    def scale(self):
        return self.weight

    def forward(self, hidden_states):
        wide = hidden_states.float()
        root = torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + self.variance_epsilon)
        return self.scale() * (wide * root).to(hidden_states.dtype)


class OffsetRMSNorm(LikeRMSNorm):
    """Adds 1 to its weight in float32, as Gemma's does."""

    def forward(self, x):
        wide = x.float()
        root = torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + self.variance_epsilon)
        return (wide * root * (1 + self.weight.float())).to(x.dtype)


class SquaredRMSNorm(LikeRMSNorm):
    def scale(self):
        return self.weight * self.weight


class BareRMSNorm(nn.Module):
    def forward(self, x):
        return x


class Gated(nn.Module):
    def __init__(self, size, hidden, act):
        super().__init__()
        self.gate_proj = nn.Linear(size, hidden, bias=False)
        self.up_proj = nn.Linear(size, hidden, bias=False)
        self.down_proj = nn.Linear(hidden, size, bias=False)
        self.act_fn = act

    def forward(self, x):
        return self.down_proj(self.act_fn(self.gate_proj(x)) * self.up_proj(x))


def model(act=None):
    torch.manual_seed(0)
    parts = [nn.Linear(6, 9), LikeRMSNorm(9), Gated(9, 13, act or nn.SiLU()), nn.LayerNorm(9),
             nn.RMSNorm(9), OffsetRMSNorm(9), SquaredRMSNorm(9), BareRMSNorm()]  # fmt: skip
    made = nn.Sequential(*parts)
    for parameter in made.parameters():
        nn.init.normal_(parameter)
    return made


@pytest.mark.parametrize("backend", ["torch", "simulator"])
def test_the_patched_model_computes_the_same_and_counters_prove_what_ran(backend):
    m, x = model(), tensor((2, 5, 6), torch.float32)
    want = m(x)
    keys = list(m.state_dict())
    handle = patch(m)
    assert list(m.state_dict()) == keys
    with use(backend):
        close(m(x), want, "model", chain=1024)
    norms = ("rms_norm", "rms_norm_llama", "rms_norm_gemma", "layer_norm")
    ran = dict.fromkeys(("linear", "gated_mlp", *norms), 1)
    assert counters() == {(name, backend): n for name, n in ran.items()}
    assert handle.report().splitlines() == [
        "   1 x Linear -> linear",
        "   1 x LikeRMSNorm -> rms_norm_llama",
        "   1 x Gated -> gated_mlp",
        "   1 x LayerNorm -> layer_norm",
        "   1 x RMSNorm -> rms_norm",
        "   1 x OffsetRMSNorm -> rms_norm_gemma",
        "not replaced: 6: SquaredRMSNorm computes something else",
        "not replaced: 7: no weight [H] or no eps where an RMSNorm has them",
    ]
    handle.undo()
    handle.undo()
    reset_counters()
    assert m(x).tolist() == want.tolist()
    assert not counters()


@pytest.mark.parametrize("norm", [LikeRMSNorm, OffsetRMSNorm])
def test_a_bfloat16_norm_is_replaced_bit_by_bit(norm):
    m, x = norm(33).bfloat16(), tensor((64, 33), torch.bfloat16)
    nn.init.normal_(m.weight)
    want = m(x)
    patch(m)
    assert m(x).tolist() == want.tolist()


def test_a_norm_wider_than_its_rows_is_refused():
    m = LikeRMSNorm(4)
    patch(m)
    with pytest.raises(
        DtypeError, match=r"rows are torch\.bfloat16, the weight torch\.float32; one"
    ):
        m(torch.ones(2, 4, dtype=torch.bfloat16))


@pytest.mark.parametrize(
    ("act", "replaced"),
    [(nn.GELU(), True), (nn.GELU(approximate="tanh"), True), (nn.ReLU(), True), (nn.Tanh(), False)],
)
def test_the_activation_is_found_by_trying(act, replaced):
    m = model(act)
    handle = patch(m, ["mlp"])
    assert ("gated_mlp" in handle.report()) == replaced
    if not replaced:
        assert "not replaced: 2: Gated is no gated MLP of ['relu', 'silu'" in handle.report()
    x = tensor((3, 6), torch.float32)
    want = model(act)(x)
    close(m(x), want, "model", chain=256)


def test_a_patched_layer_is_left_alone():
    m = nn.Sequential(nn.Linear(3, 4))
    first = patch(m)
    second = patch(m)
    assert second.skipped == [("0", "its forward is replaced already")]
    second.undo()
    m(torch.ones(2, 3))
    assert counters() == {("linear", "torch"): 1}
    first.undo()
    assert patch(nn.Sequential(nn.ReLU())).report() == "nothing to replace"


def test_an_unknown_kind_is_refused():
    with pytest.raises(ValueError, match="kind is 'conv'; allowed are attention, experts, mlp"):
        patch(model(), ["conv"])


def test_training_through_a_patched_model_is_training():
    curves = []
    for patched in (False, True):
        m = model().double()
        if patched:
            patch(m)
        optimizer = torch.optim.SGD(m.parameters(), lr=1e-3)
        x = tensor((8, 6), torch.float64)
        losses = []
        for _ in range(5):
            loss = m(x).square().mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.detach())
        curves.append(torch.stack(losses).float())
    assert curves[0][-1] < curves[0][0]
    close(curves[1], curves[0], "training")
