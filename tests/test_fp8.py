"""8-bit products: rounding, scales, which layers take part, and what producers hand over."""

import numpy as np
import pytest
import torch
from lingen_yardsticks.model import quality
from torch import nn

from lingen.kernels import fp8
from lingen.kernels.choice import interpreted
from lingen.kernels.fp8 import FLOAT8, Fp8Linear, Quantized, product, quantize, to_fp8, wants_fp8
from lingen.kernels.modulate import modulate
from lingen.kernels.swiglu import swiglu
from lingen.recipe.errors import RecipeError
from tests.helpers.closeness import assert_close, relative_error


@pytest.fixture(autouse=True)
def rounding_of_a_gpu(monkeypatch):
    """Triton's interpreter loses the carry when it rounds to 8 bits; torch rounds as a GPU does."""
    if not interpreted():
        return
    from triton.runtime.interpreter import InterpreterBuilder, TensorHandle, tl

    plain = InterpreterBuilder.create_fp_to_fp

    def create_fp_to_fp(self, source, kind, rounding):
        if kind.scalar != tl.float8e4nv:
            return plain(self, source, kind, rounding)
        values = torch.from_numpy(np.ascontiguousarray(source.data)).to(FLOAT8).view(torch.uint8)
        return TensorHandle(values.numpy(), kind.scalar)

    monkeypatch.setattr(InterpreterBuilder, "create_fp_to_fp", create_fp_to_fp)


def rows(*shape, dtype=torch.bfloat16, device="cpu"):
    """Rows of very different sizes."""
    x = torch.randn(*shape, generator=torch.Generator().manual_seed(1))
    return (x * torch.logspace(-3, 3, shape[-2])[:, None]).to(dtype).to(device)


@pytest.mark.parametrize("kernel", ["reference", "triton"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_each_row_keeps_three_bits_and_fills_the_range(kernel, dtype, device):
    x = rows(2, 5, 41, dtype=dtype, device=device)[..., 3:-5]
    values, scale = low = quantize(x, kernel=kernel)
    assert values.dtype == FLOAT8 and low.shape == x.shape and scale.shape == (2, 5, 1)
    assert (values.float().abs().amax(-1) == 448).all()
    torch.testing.assert_close(scale, x.float().abs().amax(-1, keepdim=True) / 448)
    # Half a step of the last of 3 bits, or of the smallest number.
    assert ((low.dequantize() - x.float()).abs() <= x.float().abs() / 16 + scale * 2**-10).all()
    assert 0.01 < relative_error(x, low.dequantize()) < 0.04
    assert torch.equal(values.float(), quantize(x, kernel="reference").values.float())


@pytest.mark.parametrize("kernel", ["reference", "triton"])
def test_a_row_of_zeros_stays_zeros(kernel, device):
    low = quantize(torch.zeros(2, 16, device=device), kernel=kernel)
    assert not low.dequantize().any() and low.scale.isfinite().all() and (low.scale > 0).all()


@pytest.mark.parametrize("kernel", ["reference", "triton"])
def test_norms_and_the_swiglu_hand_over_8_bits(kernel, device):
    x, update = rows(2, 3, 1, 5, 21, device=device)[..., :-1], rows(2, 3, 1, 5, 20, device=device)
    weight, gate, scale = torch.rand(20, device=device), *torch.randn(2, 2, 3, 20, device=device).unbind(0)
    positions = torch.randn(3, 1, 5, 20, device=device)
    moves = {"weight": weight, "scale": scale, "shift": gate, "positions": positions}
    x_new, normed = modulate(x, update=update, gate=gate, **moves, dtype=FLOAT8, kernel=kernel)
    _, exact = modulate(x_new.double(), **moves)
    gate_up = rows(3, 4, 22, device=device) / 100
    for low, want in [(normed, exact), (swiglu(gate_up, dtype=FLOAT8, kernel=kernel), swiglu(gate_up.double()))]:
        twin = quantize(want, kernel="reference")
        assert isinstance(low, Quantized) and low.values.dtype == FLOAT8
        torch.testing.assert_close(low.scale, twin.scale, rtol=1e-5, atol=0)
        # Numbers midway between two of the 8-bit ones may be rounded the other way.
        assert (low.values.float() != twin.values.float()).float().mean() < 0.01
        assert_close("values", want, low.dequantize(), 0.04)
    with pytest.raises(ValueError, match="8-bit results carry no gradient"):
        swiglu(gate_up.requires_grad_(), dtype=FLOAT8, kernel=kernel)


def test_the_product_is_that_of_the_numbers_meant(device):
    x, weight, bias = quantize(rows(2, 3, 32, device=device)), quantize(rows(16, 32, device=device)), torch.randn(16)
    want = x.dequantize(torch.float64) @ weight.dequantize(torch.float64).T + bias.bfloat16().double().to(device)
    got = product(x, weight, bias.bfloat16().to(device))
    assert got.dtype == torch.bfloat16 and got.shape == (2, 3, 16)
    assert_close("product", want, got, 5e-3)


def test_a_layer_takes_tensors_and_quantized_ones(device):
    plain = nn.Linear(64, 48).to(device)
    low, x = Fp8Linear(plain), torch.randn(2, 3, 64, device=device)
    assert_close("layer", plain(x).double(), low(x), 0.05)
    assert torch.equal(low(quantize(x)), low(x))
    assert low.values.dtype == FLOAT8 and low.scale.shape == (48, 1) and not list(low.parameters())
    assert low.weight.dtype == torch.bfloat16 and 0.01 < relative_error(plain.weight, low.weight) < 0.04
    with torch.device("meta"):
        assert Fp8Linear(nn.Linear(64, 48))(torch.empty(2, 64)).shape == (2, 48)


class Mixed(nn.Module):
    def __init__(self):
        super().__init__()
        self.wide = nn.Linear(32, 32)
        self.narrow = nn.Linear(32, 16)
        self.odd = nn.Linear(40, 32)
        self.attention = nn.MultiheadAttention(32, 2)  # its out_proj is a subclass, whose weight is read elsewhere
        self.inside = nn.Sequential(nn.Linear(32, 64, bias=False))

    def forward(self, x):
        return self.inside(self.wide(x))


def test_one_rule_says_which_layers_take_part(monkeypatch):
    monkeypatch.setattr(fp8, "SMALLEST_LAYER", 32)
    plain = Mixed()
    low = Mixed()
    low.load_state_dict(plain.state_dict())
    assert to_fp8(low) == ["wide", "inside.0"]
    assert wants_fp8(low.wide) and not wants_fp8(low.narrow) and not wants_fp8(low)
    layers, error, cosine = quality(plain, low, torch.randn(64, 32))
    assert layers.keys() == {"wide", "inside.0"}
    assert all(0.01 < error < 0.05 for error in layers.values())
    assert 0.01 < error < 0.1 and 0.99 < cosine < 1
    assert quality(plain, Mixed(), torch.randn(64, 32))[2] < 0.9


def test_a_gpu_without_8_bit_products_is_refused(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 0))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "A100")
    with pytest.raises(RecipeError, match=r"capability 8\.9 or more; A100 has 8\.0\. Use sample\.precision=bf16-true"):
        fp8.check_device(torch.device("cuda", 0))
    fp8.check_device(torch.device("cpu"))
