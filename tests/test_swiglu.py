"""The gate of the SwiGLU against float64: values and gradient, strided rows, several blocks of columns."""

import pytest
import torch

from lingen.kernels.swiglu import swiglu
from tests.helpers.closeness import assert_close


def both(gate_up, dtype, kernel, seed):
    leaf = gate_up.detach().requires_grad_()
    y = swiglu(leaf, dtype=dtype, kernel=kernel)
    return y, torch.autograd.grad(y, leaf, seed.to(y))[0]


@pytest.mark.parametrize(
    ("dtype", "out", "limit"),
    [(torch.float32, None, 1e-5), (torch.bfloat16, None, 5e-3), (torch.float32, torch.bfloat16, 5e-3)],
)
@pytest.mark.parametrize("kernel", ["reference", "triton"])
@pytest.mark.parametrize("shape", [(2, 7, 5, 3), (1,)])
def test_values_and_gradient(dtype, out, limit, kernel, shape, device, monkeypatch):
    swiglu_triton = pytest.importorskip("lingen.kernels.swiglu_triton")
    small = {kind: (64, warps) for kind, (_, warps) in swiglu_triton.TUNING.items()}
    monkeypatch.setattr(swiglu_triton, "TUNING", small)
    half = 150 if shape == (1,) else 5
    wide = torch.randn(*shape, 2 * half + 3, device=device).mul(3).to(dtype)
    gate_up, seed = wide[..., 1:-2], torch.randn(*shape, half, device=device).to(dtype)
    want, d_want = both(gate_up.double(), None, "reference", seed)
    got, d_got = both(gate_up, out, kernel, seed)
    assert got.dtype == (out or dtype) and d_got.dtype == dtype
    assert_close(kernel, {"y": want, "gradient": d_want}, {"y": got, "gradient": d_got}, limit)


def test_a_gradient_with_equal_entries_and_rows_of_any_strides(device):
    x = torch.randn(3, 8, 4, device=device).transpose(1, 2).requires_grad_()
    swiglu(x, kernel="triton").sum().backward()
    twin = x.detach().double().requires_grad_()
    swiglu(twin, kernel="reference").sum().backward()
    assert_close("gradient", twin.grad, x.grad, 1e-5)


def test_without_rows_there_is_nothing_to_do(device):
    assert swiglu(torch.empty(0, 8, device=device), kernel="triton").shape == (0, 4)
    assert swiglu(torch.empty(5, 8, device="meta")).shape == (5, 4)
