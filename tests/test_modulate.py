"""The passes between a block's parts against float64: values and every gradient by name."""

import pytest
import torch

from lingen.kernels.fp8 import FLOAT8
from lingen.kernels.modulate import modulate
from tests.helpers.closeness import assert_close

SMALL, ODD = (3, 1, 2), (7, 5, 3)
NAMES = ("x", "update", "weight", "gate", "shift", "scale", "positions")


def operands(grid, frames, device, width=20, batch=2, dtype=torch.float64, stream=None):
    """Tokens that are slices of something wider; those in `dtype` hold numbers that float64 twins share."""
    generator = torch.Generator().manual_seed(3)
    stream = stream or dtype

    def randn(*shape, dtype=torch.float32):
        return torch.randn(*shape, generator=generator).to(dtype).to(device)

    tokens = {"x": stream, "update": dtype}
    found = {name: randn(batch, *grid, width + 5, dtype=kind)[..., 2:-3] for name, kind in tokens.items()}
    f = grid[0] if frames else 1
    modulation = randn(batch, f, 3, width).unbind(2)
    found |= {"weight": 1 + randn(width) / 4, "positions": randn(*grid, width, dtype=stream)}
    return found | dict(zip(("gate", "shift", "scale"), modulation, strict=True))


def run(given, names, dtype, kernel):
    """Results that these operands have, and gradients."""
    leaves = {name: given[name].detach().requires_grad_() for name in names}
    found = modulate(**leaves, dtype=dtype, kernel=kernel)
    results = [y for y, operand in zip(found, ("update", "weight"), strict=True) if operand in leaves]
    generator = torch.Generator().manual_seed(4)
    seeds = [torch.randn(y.shape, generator=generator).to(dtype or y.dtype).to(y) for y in results]
    grads = torch.autograd.grad(results, list(leaves.values()), seeds)
    assert all(grad.dtype == leaf.dtype for grad, leaf in zip(grads, leaves.values(), strict=True))
    return results, dict(zip(leaves, grads, strict=True))


USES = {
    "mixer": ("x", "weight", "shift", "scale", "positions"),
    "text": ("x", "update", "weight", "gate"),
    "ffn": ("x", "update", "weight", "shift", "scale"),
    "all": NAMES,
    "end": ("x", "update", "gate"),
    "plain": ("x", "weight"),
    "sum": ("x", "update"),
}


@pytest.mark.parametrize(
    ("use", "grid", "frames", "batch"),
    [(use, SMALL, frames, 2) for use in USES for frames in (False, True)]
    + [("all", (1, 2, 3), False, 2), ("all", ODD, True, 1), ("all", ODD, False, 1)],
)
def test_triton_in_float32_is_the_definition(use, grid, frames, batch, device):
    given = operands(grid, frames, device, batch=batch, dtype=torch.float32)
    wide = {name: value.double() for name, value in given.items()}
    (want, wanted), (got, grads) = run(wide, USES[use], None, "reference"), run(given, USES[use], None, "triton")
    assert_close("results", want, got, 1e-5)
    assert_close("gradient of", wanted, grads, 1e-5)


@pytest.mark.parametrize("stream", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("kernel", ["reference", "triton"])
def test_bfloat16_with_a_stream_in_either_precision(stream, kernel, device):
    given = operands(SMALL, False, device, dtype=torch.bfloat16, stream=stream)
    wide = {name: value.double() for name, value in given.items()}
    (want, wanted), (got, grads) = run(wide, NAMES, None, "reference"), run(given, NAMES, torch.bfloat16, kernel)
    assert [y.dtype for y in got] == [stream, torch.bfloat16]
    assert_close("results", want, got, 5e-3)
    limits = {name: 5e-3 if name in ("x", "update", "positions") else 1e-2 for name in NAMES}
    assert_close("gradient of", wanted, grads, limits)


def test_many_programs_share_the_tokens_and_only_the_asked_for_gradients_are_made(device, monkeypatch):
    modulate_triton = pytest.importorskip("lingen.kernels.modulate_triton")
    small = {kind: (3, *others) for kind, (_, *others) in modulate_triton.TUNING.items()}
    monkeypatch.setattr(modulate_triton, "TUNING", small)
    given = operands(SMALL, True, device, dtype=torch.float32, batch=1)
    wide = {name: value.double() for name, value in given.items()}
    for names in (NAMES, ("x", "update", "weight", "gate", "scale", "shift")):
        (_, wanted), (_, grads) = run(wide, names, None, "reference"), run(given, names, None, "triton")
        assert_close("gradient of", wanted, grads, 1e-5)
    x = given["x"].detach().requires_grad_()
    modulate(x, weight=given["weight"], positions=given["positions"], kernel="triton")[1].sum().backward()
    assert x.grad.isfinite().all()


@pytest.mark.parametrize("kernel", ["reference", "triton"])
def test_the_stream_is_written_where_it_is_asked_to_be(kernel, device):
    given = operands(SMALL, False, device, dtype=torch.bfloat16)
    x, update, weight, gate = (given[name] for name in ("x", "update", "weight", "gate"))
    want, want_normed = modulate(x, update=update, weight=weight, gate=gate, kernel=kernel)
    for out in (torch.full_like(want, torch.nan), x.contiguous(), x.clone()):  # also one with gaps between its rows
        source = x if out.isnan().any() else out
        got, normed = modulate(source, update=update, weight=weight, gate=gate, out=out, kernel=kernel)
        assert got is out and torch.equal(out, want) and torch.equal(normed, want_normed)
    ours = x.contiguous()
    got, normed = modulate(ours, update=update, gate=gate, out=ours, kernel=kernel)
    assert normed is None and torch.equal(got, want) and torch.equal(ours, want)


def test_mistakes_are_named(device):
    given = operands(SMALL, False, device, dtype=torch.float32)
    x, update, weight, scale = (given[name] for name in ("x", "update", "weight", "scale"))
    with pytest.raises(ValueError, match="has 2 frames and x has 3; give one, or one for each"):
        modulate(x, weight=weight, scale=scale.repeat(1, 2, 1))
    with pytest.raises(ValueError, match="8-bit results carry no gradient"):
        modulate(x.requires_grad_(), weight=weight, dtype=FLOAT8)
    with pytest.raises(ValueError, match="cannot be written over"):
        modulate(x, update=update, out=torch.empty_like(update))
