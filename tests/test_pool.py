"""Pooling against its plain twin, and the twin against torch's pooling."""

import re

import pytest
import torch
import torch.nn.functional as F

from lingen.kernels.pool import pool
from lingen.recipe.errors import RecipeError
from tests.helpers.closeness import assert_close

pool_triton = pytest.importorskip("lingen.kernels.pool_triton", reason="Triton is not installed")

LIMITS = {torch.float32: 1e-5, torch.bfloat16: 5e-3}
CASES = [
    ((1, 1, 1), (2, 2, 2), torch.float32),
    ((7, 5, 3), (2, 2, 2), torch.float32),
    ((1, 6, 5), (2, 2, 2), torch.bfloat16),
    ((5, 2, 4), (3, 1, 3), torch.float32),
    ((4, 4, 4), (1, 9, 4), torch.bfloat16),
]


@pytest.fixture(autouse=True)
def small_programs(monkeypatch):
    """Several blocks of channels at the sizes of a test."""
    monkeypatch.setitem(pool_triton.LAUNCH, "CHANNELS", 32)


def tokens(grid, device, dtype=torch.float32):
    """A slice of a wider projection."""
    torch.manual_seed(sum(grid))
    return torch.randn(2, *grid, 64, device=device).to(dtype)[..., 8:48]


@pytest.mark.parametrize("grid, size, dtype", CASES)
def test_outputs_and_gradient(grid, size, dtype, device):
    x = tokens(grid, device, dtype).requires_grad_()
    exact = x.detach().double().requires_grad_()
    got, want = pool(x, size, kernel="triton"), pool(exact, size, kernel="reference")
    assert got.shape == want.shape and got.dtype == dtype and got.is_contiguous()
    assert_close("output", want, got, LIMITS[dtype])
    grad = torch.randn_like(got)
    (dx,), (wanted,) = torch.autograd.grad(got, x, grad), torch.autograd.grad(want, exact, grad.double())
    assert_close("gradient", wanted, dx, LIMITS[dtype])


@pytest.mark.parametrize("add", [False, True])
def test_the_gradient_goes_into_a_slice(add, device):
    x = tokens((3, 5, 4), device).double().requires_grad_()
    want = pool(x, (2, 2, 2), kernel="reference")
    grad = torch.randn(want.shape, device=device)
    (wanted,) = torch.autograd.grad(want, x, grad.double())
    buffer = torch.full((2, 3, 5, 4, 64), torch.nan, device=device)
    out = buffer[..., 8:48]
    before = torch.randn_like(out)
    if add:
        out.copy_(before)
    pool_triton.pool_backward(grad, (2, 2, 2), out, add)
    assert_close("gradient", wanted, out - before if add else out, 1e-5)
    assert buffer[..., :8].isnan().all() and buffer[..., 48:].isnan().all()


def test_tokens_lie_more_than_two_to_the_31_elements_apart(device):
    # Only a few pages of this are ever touched on a CPU.
    x = torch.empty(2**31 + 64, dtype=torch.bfloat16, device=device).as_strided((1, 3, 2, 2, 8), (0, 2**30, 16, 8, 1))
    x.copy_(torch.randn(1, 3, 2, 2, 8))
    exact = x.double().requires_grad_()
    want = pool(exact, (2, 2, 2), kernel="reference")
    got = pool(x, (2, 2, 2), kernel="triton")
    assert_close("output", want, got, 5e-3)
    (wanted,) = torch.autograd.grad(want, exact, got.double())
    pool_triton.pool_backward(got, (2, 2, 2), x, False)
    assert_close("gradient", wanted, x, 5e-3)


@pytest.mark.parametrize("grid, size", [case[:2] for case in CASES])
def test_the_twin_is_torch_s_pooling(grid, size):
    x = tokens(grid, "cpu", torch.float64)
    clamped = tuple(map(min, size, grid))
    want = F.avg_pool3d(x.movedim(-1, 1), clamped, ceil_mode=True, count_include_pad=False).movedim(1, -1)
    assert_close("output", want, pool(x, size), 1e-12)


def test_on_meta_and_in_low_precision():
    x = tokens((3, 4, 5), "cpu", torch.bfloat16)
    got = pool(x, (2, 2, 2))
    assert got.dtype == torch.bfloat16
    assert_close("output", pool(x.double(), (2, 2, 2)), got, 5e-3)
    assert pool(x.to("meta"), (2, 2, 2)).shape == (2, 2, 2, 3, 40)


def test_bad_input_is_named(device):
    x = tokens((2, 3, 4), device)
    with pytest.raises(ValueError, match=re.escape("not [2, 0, 2]")):
        pool(x, (2, 0, 2))
    apart = x.mT.contiguous().mT
    assert torch.equal(pool(apart, (2, 2, 2), kernel="triton"), pool(x, (2, 2, 2), kernel="triton"))
    with pytest.raises(RecipeError, match="no pool kernel called 'fast'"):
        pool(x, (2, 2, 2), kernel="fast")
