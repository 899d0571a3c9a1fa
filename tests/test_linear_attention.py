"""Linear attention against its quadratic definition; what holds for every mixer is in test_blocks.py."""

import pytest
import torch
from torch.nn.functional import relu

from lingen.blocks import attention
from lingen.blocks.attention import LinearAttention, relu_attention
from lingen.recipe.errors import SettingError
from tests.helpers.closeness import assert_close


def by_pairs(q, k, v, eps=1e-6):
    """All weights written out."""
    weights = torch.einsum("bike,bjke->bkij", relu(q), relu(k))
    weights = weights / (weights.sum(-1, keepdim=True) + eps * k.shape[1])
    return torch.einsum("bkij,bjke->bike", weights, v)


@pytest.mark.parametrize("n", [1, 5, 16, 37])
def test_equals_the_quadratic_form_in_outputs_and_gradients(n, monkeypatch):
    monkeypatch.setattr(attention, "_BLOCK", 16)
    torch.manual_seed(n)
    inputs = {name: torch.randn(2, n, 3, 8, dtype=torch.float64, requires_grad=True) for name in "qkv"}
    got, want = relu_attention(**inputs, eps=0.1), by_pairs(**inputs, eps=0.1)
    assert_close("output", want, got, 1e-12)
    seed = torch.randn_like(got)
    mine, theirs = (
        dict(zip(inputs, torch.autograd.grad(y, list(inputs.values()), seed), strict=True)) for y in (got, want)
    )
    assert_close("gradient of", theirs, mine, 1e-11)


@pytest.mark.parametrize("dtype, limit", [(torch.float32, 1e-5), (torch.bfloat16, 1.5e-2), (torch.float16, 2e-3)])
def test_sums_over_long_sequences_keep_their_digits(dtype, limit):
    torch.manual_seed(0)
    q, k, v = torch.randn(3, 1, 5000, 2, 8).to(dtype)
    v = v + 1  # else the mean of many values is nothing but rounding
    got = relu_attention(q, k, v)
    assert got.dtype == dtype
    assert_close("output", by_pairs(q.double(), k.double(), v.double()), got, limit)


def test_a_query_without_a_positive_channel_gets_zeros():
    q, k, v = -torch.rand(1, 4, 1, 8), torch.rand(1, 4, 1, 8), torch.rand(1, 4, 1, 8)
    assert relu_attention(q, k, v).eq(0).all()


def test_every_token_sees_every_other():
    mixer, x = LinearAttention(16, 0).double(), torch.randn(1, 3, 2, 4, 16, dtype=torch.float64, requires_grad=True)
    seen = torch.autograd.grad(mixer(x)[0, 0, 0, 0].square().sum(), x)[0].abs().amax(-1)
    assert (seen > 0).all()


def test_a_wrong_setting_is_named():
    with pytest.raises(SettingError, match="num_heads=3 does not divide the width 16"):
        LinearAttention(16, 0, num_heads=3)
