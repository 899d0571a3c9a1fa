"""The autoencoder's norm and SiLU against float64: values and every gradient, short rows, odd widths, strided rows."""

import pytest
import torch

from lingen.kernels.norm_silu import norm_silu
from tests.helpers.closeness import assert_close

pytestmark = pytest.mark.usefixtures("poisoned")


def run(x, weight, bias, seed, kernel):
    leaves = [one.detach().requires_grad_() for one in (x, weight, bias)]
    y = norm_silu(*leaves, kernel=kernel)
    return dict(
        zip(("y", "x", "weight", "bias"), (y.detach(), *torch.autograd.grad(y, leaves, seed.to(y))), strict=True)
    )


@pytest.mark.parametrize(("dtype", "limit"), [(torch.float32, 1e-5), (torch.bfloat16, 5e-3)])
@pytest.mark.parametrize("kernel", ["reference", "triton"])
@pytest.mark.parametrize("shape", [(1, 2, 5, 7, 32), (1, 300), (700, 24)], ids=str)
def test_values_and_gradients(dtype, limit, kernel, shape, device, monkeypatch):
    triton_twin = pytest.importorskip("lingen.kernels.norm_silu_triton")
    monkeypatch.setattr(triton_twin, "PROGRAMS", 3)  # so that a program has several tiles
    draw = torch.Generator().manual_seed(0)
    wide = torch.randn(*shape[:-1], shape[-1] + 5, generator=draw).mul(2).to(device, dtype)
    x, weight = wide[..., 2:-3], (torch.rand(shape[-1], generator=draw) + 0.5).to(device)
    bias = torch.randn(shape[-1], generator=draw).to(device)
    seed = torch.randn(shape, generator=draw).to(device, dtype)
    want = run(x.double(), weight.double(), bias.double(), seed, "reference")
    got = run(x, weight, bias, seed, kernel)
    assert got["y"].dtype == got["x"].dtype == dtype and got["weight"].dtype == torch.float32
    assert_close(kernel, want, got, limit)


def test_a_row_of_zeros_stays_finite(device):
    x = torch.zeros(3, 8, device=device)
    for kernel in ("reference", "triton"):
        found = run(x, torch.ones(8, device=device), torch.zeros(8, device=device), torch.ones_like(x), kernel)
        assert all(torch.isfinite(value).all() for value in found.values())


def test_without_rows_there_is_nothing_to_do(device):
    x, one = torch.empty(0, 8, device=device, requires_grad=True), torch.ones(8, device=device, requires_grad=True)
    y = norm_silu(x, one, one, kernel="triton")
    y.sum().backward()
    assert y.shape == x.grad.shape == (0, 8) and not one.grad.any()
    meta = torch.empty(8, device="meta")
    assert norm_silu(torch.empty(5, 8, device="meta"), meta, meta).shape == (5, 8)
