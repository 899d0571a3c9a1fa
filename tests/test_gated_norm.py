"""The gated norm out of scan order against its plain twin, and the twin against the norm spelled out."""

import inspect
import re

import pytest
import torch

from lingen.blocks.scan import permutation, zigzag
from lingen.kernels.choice import interpreted
from lingen.kernels.gated_norm import gated_norm
from lingen.recipe.errors import RecipeError
from tests.helpers.closeness import assert_close

triton_twin = pytest.importorskip("lingen.kernels.gated_norm_triton", reason="Triton is not installed")

LIMITS = {torch.float32: (1e-5, 1e-5), torch.bfloat16: (5e-3, 1e-2)}  # of tokens and of weights
PARTS = ("y", "z", "weight")


@pytest.fixture(autouse=True)
def small_programs(monkeypatch):
    """Several pieces of a row and rows of a program at the sizes of a test."""
    for launch in triton_twin.LAUNCH.values():
        monkeypatch.setitem(launch, "LANES", 32)
    monkeypatch.setitem(triton_twin.LAUNCH["backward"], "PROGRAMS", 7)


def operands(grid, channels, device, dtype=torch.float32, extra=3, order=zigzag):
    """y with garbage behind the sequence, z as a slice of a wider projection, weight, index."""
    n = grid[0] * grid[1] * grid[2]
    torch.manual_seed(n + channels)
    y = torch.randn(2, n + extra, channels, device=device).to(dtype)
    y[:, n:] = torch.nan
    z = torch.randn(2, n, channels + 24, device=device).to(dtype)[..., 8 : 8 + channels]
    index = None if order is None else permutation(order, grid, torch.device(device))[0]
    return y, z, torch.randn(channels, device=device), index


def twin(operands, grad, groups):
    """Result and gradients of the reference in float64; what lies behind the sequence has no part in it."""
    y, z, weight, index = operands
    n = z.shape[1]
    parts = [part.detach().double().requires_grad_() for part in (y[:, :n], z, weight)]
    out = gated_norm(*parts, index, groups=groups, kernel="reference")
    dy, dz, dweight = torch.autograd.grad(out, parts, grad.double())
    return out, {"y": torch.nn.functional.pad(dy, (0, 0, 0, y.shape[1] - n)), "z": dz, "weight": dweight}


@pytest.mark.parametrize(
    "grid, channels, groups, dtype, order",
    [
        ((1, 1, 1), 40, 1, torch.float32, zigzag),
        ((7, 5, 3), 40, 1, torch.float32, zigzag),
        ((1, 4, 3), 80, 5, torch.float32, None),
        ((2, 3, 5), 72, 1, torch.bfloat16, zigzag),
        ((1, 3, 3), 96, 3, torch.bfloat16, zigzag),
        ((1, 3, 2), 80, 10, torch.float32, zigzag),  # heads of 8: four of them to a program, the last one holds two
    ],
)
def test_outputs_and_every_gradient(grid, channels, groups, dtype, order, device):
    args = operands(grid, channels, device, dtype, order=order)
    leaves = [part.requires_grad_() for part in args[:3]]
    out = gated_norm(*args, groups=groups, kernel="triton")
    assert out.shape == args[1].shape and out.dtype == dtype and out.is_contiguous()
    grad = torch.randn_like(out)
    want, wanted = twin(args, grad, groups)
    tokens, weights = LIMITS[dtype]
    assert_close("output", want, out, tokens)
    found = dict(zip(PARTS, torch.autograd.grad(out, leaves, grad), strict=True))
    behind = found["y"][:, args[1].shape[1] :]
    assert torch.equal(behind, torch.zeros_like(behind))
    assert_close("gradient of", wanted, found, {"y": tokens, "z": tokens, "weight": weights})


def test_the_gradient_goes_into_a_slice(device):
    args = operands((3, 3, 3), 40, device)
    grad = torch.randn(2, 27, 80, device=device)[..., 16:56]
    buffer = torch.full((2, 27, 64), torch.nan, device=device)
    backward = {"groups": 1, "eps": 1e-5}
    dy, dweight = triton_twin.gated_norm_backward(grad, *args, **backward, dz_out=buffer[..., 8:48])
    _, wanted = twin(args, grad, 1)
    assert_close("gradient of", wanted, {"y": dy, "z": buffer[..., 8:48], "weight": dweight}, 1e-5)
    assert buffer[..., :8].isnan().all() and buffer[..., 48:].isnan().all()
    again = triton_twin.gated_norm_backward(grad, *args, **backward, dz_out=torch.empty_like(grad))
    assert torch.equal(again[0], dy) and torch.equal(again[1], dweight)


def test_rows_lie_more_than_two_to_the_31_elements_apart(device):
    # Only a few pages of this are ever touched on a CPU.
    z = torch.empty(2**31 + 8, dtype=torch.bfloat16, device=device).as_strided((1, 3, 8), (0, 2**30, 1))
    z.copy_(torch.randn(1, 3, 8))
    y, weight = torch.randn(1, 3, 8, device=device), torch.randn(8, device=device)
    args = (y, z, weight, torch.tensor([2, 0, 1], device=device))
    grad = torch.randn(1, 3, 8, device=device)
    want, wanted = twin(args, grad, 1)
    assert_close("output", want, gated_norm(*args, kernel="triton"), 1e-5)
    args = (y, z.clone(), *args[2:])
    triton_twin.gated_norm_backward(grad, *args, groups=1, eps=1e-5, dz_out=z)
    assert_close("gradient of z", wanted["z"], z, 5e-3)


@pytest.mark.parametrize("channels, groups", [(80, 1), (60, 3), (80, 10)])
def test_float8_with_a_scale_for_each_row(channels, groups, device):
    y, z, weight, index = operands((2, 3, 4), channels, device)
    y[:, 5] = 0  # a row that has no largest value
    args = (y, z, weight, index)
    values, scale = gated_norm(*args, groups=groups, quantize=True, kernel="triton")
    assert values.dtype == torch.float8_e4m3fn and scale.dtype == torch.float32 and scale.shape == (2, 24)
    exact = gated_norm(*(part.double() for part in args[:3]), index, groups=groups, kernel="reference")
    wanted, wanted_scale = gated_norm(
        *(part.double() for part in args[:3]), index, groups=groups, quantize=True, kernel="reference"
    )
    assert scale[:, index[5]].tolist() == pytest.approx([1e-12] * 2)
    assert (scale / wanted_scale - 1).abs().max() < 1e-6
    assert_close("in 8 bits", exact, wanted.double() * wanted_scale[..., None], 0.03)  # three bits of mantissa
    same = values.float() == wanted.float()
    if interpreted():
        # Triton's interpreter rounds a mantissa of all ones up to 0 without raising the exponent.
        same |= wanted.float().abs().log2().frac() == 0
    assert same.double().mean() > 0.999


def test_the_twin_is_a_gated_norm_in_scan_order():
    y, z, weight, _ = operands((3, 4, 5), 24, "cpu", torch.float64, extra=0)
    for order in ("hwt", zigzag):
        index, inverse = permutation(order, (3, 4, 5), torch.device("cpu"))
        gated = (y[:, inverse] * z * z.sigmoid()).unflatten(-1, (2, 12))
        want = gated / (gated.square().mean(-1, keepdim=True) + 1e-5).sqrt()
        assert_close("output", want.flatten(-2) * weight, gated_norm(y, z, weight, index, groups=2), 1e-12)


def test_on_meta_and_in_low_precision():
    args = operands((2, 3, 4), 24, "cpu", torch.bfloat16)
    got = gated_norm(*args)
    assert got.dtype == torch.bfloat16
    assert_close("output", gated_norm(*(part.double() for part in args[:3]), args[3]), got, 5e-3)
    y, z, weight, index = (part.to("meta") for part in args)
    assert gated_norm(y, z, weight, index).shape == (2, 24, 24)
    values, scale = gated_norm(y, z, weight, index, quantize=True)
    assert values.shape == (2, 24, 24) and scale.shape == (2, 24)


@pytest.mark.parametrize(
    "change, says",
    [
        ({"y": torch.zeros(2, 20, 24)}, "rows >= n >= 1"),
        ({"weight": torch.zeros(23)}, "weight [c]"),
        ({"index": torch.arange(23)}, "index of the 24 tokens"),
        ({"groups": 5}, "groups=5 does not divide the 24 channels"),
        ({"eps": 0.0}, "eps=0.0 of the gated norm must be above 0"),
        ({"weight": torch.zeros(24, requires_grad=True), "quantize": True}, "no gradient"),
    ],
)
def test_bad_input_is_named(change, says, device):
    y, z, weight, index = operands((2, 3, 4), 24, device)
    change = {name: value.to(device) if isinstance(value, torch.Tensor) else value for name, value in change.items()}
    unchecked = inspect.unwrap(gated_norm)  # the types that the tests watch would speak first
    with pytest.raises(ValueError, match=re.escape(says)):
        unchecked(**{"y": y, "z": z, "weight": weight, "index": index} | change)


def test_an_unknown_kernel_is_named():
    with pytest.raises(RecipeError, match="no gated norm kernel called 'fast'"):
        gated_norm(*operands((1, 1, 2), 8, "cpu"), kernel="fast")
