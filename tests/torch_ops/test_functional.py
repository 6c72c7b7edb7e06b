"""The functions with others' signatures, against the originals where these run on a CPU."""

from __future__ import annotations

import inspect
import itertools

import numpy as np
import pytest

torch = pytest.importorskip("torch")

from torch.nn import functional as original

from nki_kernels.machine.errors import OptionError, ShapeError
from nki_kernels.torch_ops import counters, functional, modules, use
from reference.attention import attention as reference
from tests.tolerance import assert_close
from tests.torch_ops.support import array, tensor


def close(got, want, op, chain=64):
    """Hold `got` to the original: one rounding each, and sums in another order."""
    ref = array(want).astype(np.float64)
    assert (got.dtype, got.shape) == (want.dtype, want.shape)
    magnitude = abs(ref) + (abs(ref).max() if ref.size else 0)
    assert_close(array(got), ref, magnitude, op=op, roundings=2, chain=chain, case="original")


@pytest.mark.parametrize(
    "name",
    [
        "scaled_dot_product_attention",
        "layer_norm",
        "group_norm",
        "rms_norm",
        "linear",
        "grouped_mm",
    ],
)
def test_signatures_are_the_original_ones(name):
    mine = inspect.signature(getattr(functional, name)).parameters
    theirs = getattr(original, name)
    if name in ("scaled_dot_product_attention", "linear"):  # built in, without a signature
        names = {
            "linear": ["input", "weight", "bias"],
            "scaled_dot_product_attention": [
                "query", "key", "value", "attn_mask", "dropout_p", "is_causal", "scale",
                "enable_gqa",
            ],
        }[name]  # fmt: skip
        assert list(mine) == names
        return
    parameters = inspect.signature(theirs).parameters
    assert [(p.name, p.kind, p.default) for p in mine.values()] == [
        (p.name, p.kind, p.default) for p in parameters.values()
    ]


# -- scaled_dot_product_attention ------------------------------------------------------------------

MASKS = {
    "none": None,
    "bool": torch.rand(2, 4, 5, 7, generator=torch.Generator().manual_seed(3)) < 0.5,
    "rows": torch.tensor([True, True, False, True, False])[:, None].expand(5, 7),
    "keys": torch.rand(2, 1, 1, 7, generator=torch.Generator().manual_seed(4)) < 0.7,
    "added": tensor((5, 7), torch.float32, 8),
    "infinite": torch.zeros(4, 5, 7).masked_fill(torch.arange(7) > 3, -torch.inf),
    "all infinite": torch.full((5, 7), -torch.inf),
}


@pytest.mark.parametrize("backend", ["torch", "simulator"])
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("mask", MASKS)
def test_sdpa_is_the_original(mask, causal, backend):
    q, k, v = (tensor((2, 4, n, 6), torch.float32, i) for i, n in enumerate((5, 7, 7)))
    if causal and MASKS[mask] is not None:
        seen = torch.ones(5, 7, dtype=torch.bool).tril()
        given = MASKS[mask]
        both = given & seen if given.dtype == torch.bool else given.masked_fill(~seen, -torch.inf)
        want = original.scaled_dot_product_attention(q, k, v, both)
    else:
        want = original.scaled_dot_product_attention(q, k, v, MASKS[mask], is_causal=causal)
    with use(backend):
        got = functional.scaled_dot_product_attention(q, k, v, MASKS[mask], is_causal=causal)
    assert counters()["attention", backend] == 1
    close(got, want, "attention")


SHAPES = {
    "no heads": ((5, 6), (7, 6), (7, 3)),
    "three axes": ((4, 5, 6), (4, 7, 6), (4, 7, 3)),
    "five axes": ((2, 3, 4, 5, 6), (2, 3, 4, 7, 6), (2, 3, 4, 7, 3)),
    "broadcast": ((2, 4, 5, 6), (1, 4, 7, 6), (1, 4, 7, 6)),
    "one row": ((2, 4, 1, 6), (2, 4, 7, 6), (2, 4, 7, 6)),
}


@pytest.mark.parametrize("shapes", SHAPES)
def test_sdpa_of_other_ranks(shapes):
    q, k, v = (tensor(s, torch.float32, i) for i, s in enumerate(SHAPES[shapes]))
    want = original.scaled_dot_product_attention(q, k, v, scale=0.3)
    close(functional.scaled_dot_product_attention(q, k, v, scale=0.3), want, "attention")


def test_sdpa_shares_heads_only_when_asked():
    q, k, v = (tensor((2, h, 5, 6), torch.float32, h) for h in (4, 2, 2))
    with pytest.raises(ShapeError, match="query has 4 heads, key 2; they must be equal, or"):
        functional.scaled_dot_product_attention(q, k, v)
    want = original.scaled_dot_product_attention(q, k, v, enable_gqa=True)
    close(functional.scaled_dot_product_attention(q, k, v, enable_gqa=True), want, "attention")


def test_sdpa_takes_no_dropout():
    x = torch.ones(1, 1, 2, 2)
    with pytest.raises(OptionError, match=r"dropout_p is 0\.1; not supported here; leave it at"):
        functional.scaled_dot_product_attention(x, x, x, dropout_p=0.1)


def test_sdpa_of_no_keys_is_zero():
    q, k = torch.ones(1, 2, 3, 4), torch.ones(1, 2, 0, 4)
    assert not functional.scaled_dot_product_attention(q, k, k).any()


def test_sdpa_has_the_gradients_of_the_original():
    made = [tensor((2, 4, n, 6), torch.float32, i) for i, n in enumerate((5, 7, 7))]
    grads = []
    for function in (original, functional):
        leaves = [x.clone().requires_grad_() for x in made]
        out = function.scaled_dot_product_attention(*leaves, MASKS["bool"])
        grads.append(torch.autograd.grad(out.square().sum(), leaves))
    for got, want in zip(grads[1], grads[0], strict=True):
        close(got, want, "attention")


# -- flash_attn ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("causal", "window"),
    [*itertools.product([False, True], [(-1, -1), (2, 2), (2, 0), (3, 1), (-1, 2), (1, -1)])],
)
def test_flash_attn_func_is_aligned_to_the_bottom_right(causal, window):
    q, k, v = (tensor((2, n, h, 6), torch.float32, h + n) for n, h in ((5, 4), (8, 2), (8, 2)))
    got, lse, none = functional.flash_attn_func(
        q, k, v, causal=causal, window_size=window, softcap=3.0, return_attn_probs=True
    )
    assert (got.shape, lse.shape, none) == ((2, 5, 4, 6), (2, 4, 5), None)
    p, j = np.arange(5)[:, None] + 3, np.arange(8)[None]
    left, right = window[0], 0 if causal else window[1]
    seen = ((left < 0) | (j >= p - left)) & ((right < 0) | (j <= p + right))
    arrays = [array(x.transpose(1, 2)) for x in (q, k, v)]
    out, sums = reference(*arrays, mask=seen[None, None], softcap=3.0)
    for found, ref in ((got.transpose(1, 2), out), (lse, sums)):
        assert_close(array(found), ref.value, ref.magnitude, op="flash", roundings=1, chain=1,
                     case=str(window))  # fmt: skip


def test_flash_attn_varlen_func_is_one_call_per_sequence():
    q, k = tensor((9, 4, 6), torch.float32), tensor((11, 2, 6), torch.float32, 1)
    starts, keys = torch.tensor([0, 4, 4, 9]), torch.tensor([0, 5, 6, 11])
    got, lse, _ = functional.flash_attn_varlen_func(
        q, k, k, starts, keys, 5, 5, causal=True, return_attn_probs=True
    )
    parts = [((0, 4), (0, 5)), ((4, 9), (6, 11))]
    for (a, b), (c, d) in parts:
        want = functional.flash_attn_func(
            q[None, a:b], k[None, c:d], k[None, c:d], causal=True, return_attn_probs=True
        )
        assert got[a:b].tolist() == want[0][0].tolist()
        assert lse[:, a:b].tolist() == want[1][0].tolist()
    assert counters()["attention", "empty"] == 1


@pytest.mark.parametrize(
    ("name", "given"),
    [("dropout_p", 0.5), ("alibi_slopes", torch.ones(4)), ("block_table", torch.ones(1, 1))],
)
def test_what_flash_attn_can_and_this_cannot_is_refused(name, given):
    q, ends = torch.ones(2, 4, 6), torch.tensor([0, 2])
    with pytest.raises(OptionError, match=f"{name} is .*not supported here"):
        functional.flash_attn_varlen_func(q, q, q, ends, ends, 2, 2, **{name: given})


# -- norms, products, modules ----------------------------------------------------------------------


@pytest.mark.parametrize("backend", ["torch", "simulator"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_norms_are_the_original_ones(dtype, backend):
    x, weight, bias = (tensor(s, dtype, i) for i, s in enumerate(((2, 3, 4, 5), (4, 5), (4, 5))))
    with use(backend):
        pairs = [
            (functional.layer_norm(x, (4, 5), weight, bias, 0.1),
             original.layer_norm(x, (4, 5), weight, bias, 0.1)),
            (functional.group_norm(x, 3, weight[:3, 0], bias[:3, 0]),
             original.group_norm(x, 3, weight[:3, 0], bias[:3, 0])),
            (functional.layer_norm(x, (5,)), original.layer_norm(x, (5,))),
            (functional.rms_norm(x, (4, 5), weight), original.rms_norm(x, (4, 5), weight)),
            (functional.rms_norm(x, [5], eps=0.1), original.rms_norm(x, [5], eps=0.1)),
        ]  # fmt: skip
    for got, want in pairs:
        close(got, want, "norm")


def test_a_norm_of_other_axes_is_refused():
    with pytest.raises(ShapeError, match=r"normalized_shape is \[4\], input \[2, 5\]; the last"):
        functional.layer_norm(torch.ones(2, 5), (4,))


@pytest.mark.parametrize(
    ("x", "weight", "bias"),
    [((2, 3, 5), (4, 5), (4,)), ((5,), (4, 5), None), ((2, 5), (5,), None)],
)
def test_linear_is_the_original(x, weight, bias):
    x, weight = tensor(x, torch.float32), tensor(weight, torch.float32, 1)
    bias = None if bias is None else tensor(bias, torch.float32, 2)
    close(functional.linear(x, weight, bias), original.linear(x, weight, bias), "linear")


def test_linear_of_no_rows_has_the_right_shape():
    assert functional.linear(torch.ones(2, 0, 5), torch.ones(4, 5)).shape == (2, 0, 4)


def test_grouped_mm_is_the_original():
    a, b = tensor((9, 16), torch.bfloat16), tensor((3, 16, 8), torch.bfloat16, 1)
    offs = torch.tensor([4, 4, 9], dtype=torch.int32)
    close(functional.grouped_mm(a, b, offs=offs), original.grouped_mm(a, b, offs=offs), "grouped")
    side = a[:6].reshape(3, 2, 16)
    close(functional.grouped_mm(side, b), original.grouped_mm(side, b), "grouped")


def test_grouped_mm_refuses_the_other_pairings():
    a = torch.ones(4, 4)
    with pytest.raises(ShapeError, match="2-D by 2-D without offs; allowed are 2-D by 3-D with"):
        functional.grouped_mm(a, a)
    with pytest.raises(OptionError, match="bias is True; not supported"):
        functional.grouped_mm(a, a, bias=a)


@pytest.mark.parametrize(
    ("name", "arguments"),
    [("Linear", (5, 4)), ("Linear", (5, 4, False)), ("LayerNorm", (5, 0.1)),
     ("LayerNorm", (5, 1e-5, False)), ("RMSNorm", (5,)), ("RMSNorm", ((3, 5), 0.1)),
     ("GroupNorm", (3, 6))],
)  # fmt: skip
def test_modules_have_the_keys_and_the_values_of_the_original(name, arguments):
    mine, theirs = getattr(modules, name)(*arguments), getattr(torch.nn, name)(*arguments)
    for parameter in theirs.parameters():
        torch.nn.init.normal_(parameter)
    mine.load_state_dict(theirs.state_dict())
    x = tensor((2, 6, 5) if name == "GroupNorm" else (2, 3, 5), torch.float32)
    close(mine(x), theirs(x), name)
    assert sum(counters().values()) == 1
