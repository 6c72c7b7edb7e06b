"""The references of the projections against their parts, and one by hand."""

from __future__ import annotations

import ml_dtypes
import numpy as np

from reference.matmul import linear
from reference.norm import rms_norm
from reference.projection import head_norm, norm_linear, qkv_projection
from reference.rope import rope


def test_norm_linear_is_the_norm_and_then_the_product():
    rng = np.random.default_rng(1)
    x, gain, weight, bias = (rng.standard_normal(s) for s in ((3, 5), (5,), (4, 5), (4,)))
    got = norm_linear(x, gain, weight, bias)
    want = linear(rms_norm(x, gain).value, weight, bias)
    assert np.abs(got.value - want.value).max() < 2.0**-48
    assert np.abs(got.magnitude - want.magnitude).max() < 2.0**-48


def test_what_enters_the_product_is_rounded_once():
    x = np.array([[1 + 2**-7]], ml_dtypes.bfloat16)
    got = norm_linear(x, x[0], np.ones((1, 1)), eps=None).value.item()
    exact = (1 + 2**-7) ** 2
    assert got == float(np.array(exact, ml_dtypes.bfloat16)) != exact


def test_an_eps_of_none_is_no_norm():
    x = np.array([[3.0, 4.0]])
    assert norm_linear(x, None, np.eye(2), eps=None).value.tolist() == [[3.0, 4.0]]
    assert norm_linear(x, None, np.eye(2), eps=3.5).value.tolist() == [[0.75, 1.0]]


def test_heads_are_cut_normalised_and_rotated():
    rng = np.random.default_rng(2)
    x, weight = rng.standard_normal((3, 6)), rng.standard_normal((5, 4, 6))
    gain, angle = rng.standard_normal(4), rng.uniform(-3, 3, (3, 2))
    cos, sin = np.cos(angle), np.sin(angle)
    q, k, v = qkv_projection(x, weight, None, None, gain, None, cos, sin, heads=3, kv_heads=1)
    heads = np.einsum("th,cdh->ctd", x, weight)
    wanted = rms_norm(heads[:3].reshape(-1, 4), gain).value.reshape(1, 3, 3, 4)
    assert np.abs(q.value.transpose(1, 0, 2) - rope(wanted, cos, sin).value[0]).max() < 2.0**-45
    assert np.abs(k.value[:, 0] - rope(heads[None, 3:4], cos, sin).value[0, 0]).max() < 2.0**-48
    assert np.abs(v.value[:, 0] - heads[4]).max() < 2.0**-48
    turned = weight.transpose(2, 0, 1)
    same = qkv_projection(x, turned, heads=3, kv_heads=1, transpose_weight=False)
    assert np.abs(same[2].value - v.value).max() < 2.0**-48


def test_the_magnitude_of_a_head_covers_a_shift_of_its_sums():
    rng = np.random.default_rng(3)
    value, gain = rng.standard_normal((50, 8)), rng.standard_normal(8)
    magnitude = np.abs(value) * 3
    whole = head_norm(type(norm_linear(value, None, gain[None]))(value, magnitude), gain, 1e-6)
    unit = 2.0**-30
    for sign in (-1.0, 1.0):
        moved = value + sign * unit * magnitude * rng.choice([-1, 1], value.shape)
        found = head_norm(type(whole)(moved, magnitude), gain, 1e-6).value
        assert (np.abs(found - whole.value) <= 1.001 * unit * whole.magnitude).all()
