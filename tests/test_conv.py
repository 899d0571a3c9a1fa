"""The conv into scan order against its plain twin, and the twin against torch's conv1d."""

import inspect
import re

import pytest
import torch
import torch.nn.functional as F

from lingen.blocks.scan import permutation, zigzag
from lingen.kernels.conv import conv_silu
from lingen.recipe.errors import RecipeError
from tests.helpers.closeness import assert_close

conv_triton = pytest.importorskip("lingen.kernels.conv_triton", reason="Triton is not installed")

LIMITS = {torch.float32: (1e-5, 1e-5), torch.bfloat16: (5e-3, 1e-2)}  # of tokens and of weights
PARTS = ("u", "weight", "bias")


@pytest.fixture
def small_programs(monkeypatch):
    """Several runs and blocks of channels at the sizes of a test."""
    for launch in conv_triton.LAUNCH.values():
        monkeypatch.setitem(launch, "CHANNELS", 32)
        monkeypatch.setitem(launch, "POSITIONS", 24)


def operands(grid, taps, device, dtype=torch.float32, channels=40, order=zigzag):
    """Arguments of conv_silu; u is a slice of a wider projection."""
    n = grid[0] * grid[1] * grid[2]
    torch.manual_seed(n + taps)
    u = torch.randn(2, n, channels + 24, device=device).to(dtype)[..., 8 : 8 + channels]
    index = None if order is None else permutation(order, grid, torch.device(device))[0]
    return u, torch.randn(channels, taps, device=device), torch.randn(channels, device=device), index


def twin(operands, grad, before, rows, segment=0):
    """Result and gradients of the reference in float64."""
    *parts, index = operands
    parts = [part.detach().double().requires_grad_() for part in parts]
    y = conv_silu(*parts, index, before=before, rows=rows, segment=segment, kernel="reference")
    return y, dict(zip(PARTS, torch.autograd.grad(y, parts, grad.double()), strict=True))


@pytest.mark.parametrize(
    "grid, taps, before, extra, segment, dtype",
    [
        ((1, 1, 1), 4, 2, 0, 0, torch.float32),
        ((1, 1, 7), 1, 0, 3, 0, torch.bfloat16),
        ((7, 5, 3), 4, 2, 23, 0, torch.float32),
        ((1, 4, 6), 4, 3, 0, 0, torch.bfloat16),
        ((3, 3, 3), 8, 0, 5, 0, torch.float32),
        ((7, 3, 2), 4, 2, 8, 7, torch.float32),
        ((5, 3, 2), 4, 3, 0, 15, torch.float32),
        ((2, 3, 3), 4, 3, 0, 2, torch.bfloat16),  # segments shorter than the taps
        ((1, 3, 3), 4, 2, 0, 1, torch.float32),
    ],
)
def test_outputs_and_every_gradient(grid, taps, before, extra, segment, dtype, device, small_programs):
    args = operands(grid, taps, device, dtype)
    leaves = [part.requires_grad_() for part in args[:3]]
    rows = grid[0] * grid[1] * grid[2] + extra
    y = conv_silu(*args, before=before, rows=rows, segment=segment, kernel="triton")
    assert y.shape == (2, rows, 40) and y.dtype == dtype and y.is_contiguous()
    assert torch.equal(y[:, rows - extra :], torch.zeros_like(y[:, rows - extra :]))
    grad = torch.randn_like(y)
    want, wanted = twin(args, grad, before, rows, segment)
    tokens, weights = LIMITS[dtype]
    assert_close("y", want, y, tokens)
    found = dict(zip(PARTS, torch.autograd.grad(y, leaves, grad), strict=True))
    assert_close("gradient of", wanted, found, {"u": tokens, "weight": weights, "bias": weights})


def test_as_shipped_in_raster_order(device):
    u, *others = operands((1, 5, 7), 4, device, order=None)
    args = (u[:1], *others)
    leaves = [part.requires_grad_() for part in args[:3]]
    y = conv_silu(*args, before=2, kernel="triton")
    want, wanted = twin(args, torch.ones_like(y), 2, None)
    assert_close("y", want, y, 1e-5)
    assert_close("gradient of", wanted, dict(zip(PARTS, torch.autograd.grad(y.sum(), leaves), strict=True)), 1e-5)


def test_the_gradient_goes_into_a_slice(device, small_programs):
    *parts, index = operands((3, 3, 3), 4, device)
    grad = torch.randn(2, 30, 80, device=device)[..., 16:56]
    grad[:, 27:] = torch.nan  # behind the sequence: not read
    buffer = torch.full((2, 27, 64), torch.nan, device=device)
    out = buffer[..., 8:48]
    dweight, dbias = conv_triton.conv_silu_backward(grad, *parts, index, before=2, out=out)
    _, wanted = twin((*parts, index), grad[:, :27], 2, None)
    found = {"u": out, "weight": dweight, "bias": dbias}
    assert_close("gradient of", wanted, found, 1e-5)
    assert buffer[..., :8].isnan().all() and buffer[..., 48:].isnan().all()
    again = conv_triton.conv_silu_backward(grad, *parts, index, before=2, out=torch.empty_like(out))
    assert torch.equal(again[0], dweight) and torch.equal(again[1], dbias)


def test_rows_lie_more_than_two_to_the_31_elements_apart(device):
    # Only a few pages of this are ever touched on a CPU.
    u = torch.empty(2**31 + 8, dtype=torch.bfloat16, device=device).as_strided((1, 3, 8), (0, 2**30, 1))
    u.copy_(torch.randn(1, 3, 8))
    weight, bias = torch.randn(8, 4, device=device), torch.randn(8, device=device)
    index = torch.tensor([2, 0, 1], device=device)
    got = conv_silu(u, weight, bias, index, before=2, kernel="triton")
    assert_close("y", conv_silu(u.double(), weight.double(), bias.double(), index, before=2), got, 5e-3)
    grad = torch.randn(1, 3, 8, device=device)
    _, wanted = twin((u, weight, bias, index), grad, 2, None)
    conv_triton.conv_silu_backward(grad, u.clone(), weight, bias, index, before=2, out=u)
    assert_close("gradient of u", wanted["u"], u, 5e-3)


@pytest.mark.parametrize("taps, before", [(4, 2), (4, 3), (1, 0), (7, 0)])
def test_the_twin_is_a_depthwise_conv1d(taps, before):
    u, weight, bias, index = operands((2, 3, 4), taps, "cpu", torch.float64)
    weight, bias = weight.double(), bias.double()
    padded = F.pad(u[:, index].mT, (before, taps - 1 - before))
    want = F.silu(F.conv1d(padded, weight[:, None], bias, groups=40)).mT
    assert_close("y", want, conv_silu(u, weight, bias, index, before=before), 1e-12)


@pytest.mark.parametrize("taps, before", [(4, 2), (4, 3), (7, 0)])
def test_each_segment_of_the_twin_is_a_conv1d_of_its_own(taps, before):
    u, weight, bias, index = operands((2, 3, 4), taps, "cpu", torch.float64)
    weight, bias = weight.double(), bias.double()
    pieces = u[:, index].mT.split(6, -1)
    want = [F.conv1d(F.pad(piece, (before, taps - 1 - before)), weight[:, None], bias, groups=40) for piece in pieces]
    got = conv_silu(u, weight, bias, index, before=before, segment=6)
    assert_close("y", F.silu(torch.cat(want, -1)).mT, got, 1e-12)


def test_nothing_crosses_an_end_not_even_nan(device):
    u, weight, bias, index = operands((2, 3, 4), 4, device)
    u = u.clone()
    u[:, index[6:12]] = torch.nan
    y = conv_silu(u, weight, bias, index, before=2, segment=6, kernel="triton")
    assert y[:, :6].isfinite().all() and y[:, 12:].isfinite().all() and y[:, 6:12].isnan().all()


def test_on_meta_and_in_low_precision():
    args = operands((2, 3, 4), 4, "cpu", torch.bfloat16)
    got = conv_silu(*args, before=2, rows=30)
    assert got.dtype == torch.bfloat16
    assert_close("y", conv_silu(args[0].double(), *args[1:], before=2, rows=30), got, 5e-3)
    u, weight, bias, index = (part.to("meta") for part in args)
    assert conv_silu(u, weight, bias, index, before=2, rows=30).shape == (2, 30, 40)


@pytest.mark.parametrize(
    "change, says",
    [
        ({"rows": 20}, "24 tokens: rows=20 is too few"),
        ({"before": 4}, "with 0 to m - 1 before, not 4 with 4"),
        ({"weight": torch.zeros(40, 9)}, "1 to 8 taps"),
        ({"weight": torch.zeros(39, 4)}, "weight [c m]"),
        ({"segment": 7}, "24 tokens into segments of 7"),
        ({"index": torch.arange(23)}, "index of the 24 tokens"),
    ],
)
def test_bad_input_is_named(change, says, device):
    u, weight, bias, index = operands((2, 3, 4), 4, device)
    change = {name: value.to(device) if isinstance(value, torch.Tensor) else value for name, value in change.items()}
    unchecked = inspect.unwrap(conv_silu)  # the types that the tests watch would speak first
    with pytest.raises(ValueError, match=re.escape(says)):
        unchecked(**{"u": u, "weight": weight, "bias": bias, "index": index, "before": 2} | change)


def test_channels_may_lie_apart(device):
    u, weight, bias, index = operands((2, 3, 4), 4, device)
    apart = u.mT.contiguous().mT
    told = [conv_silu(x, weight, bias, index, before=2, kernel="triton") for x in (u, apart)]
    assert apart.stride() != u.stride() and torch.equal(*told)


def test_an_unknown_kernel_is_named():
    with pytest.raises(RecipeError, match="no conv kernel called 'fast'"):
        conv_silu(*operands((1, 1, 2), 2, "cpu"), before=1, kernel="fast")
