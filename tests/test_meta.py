"""The denoiser where nothing is computed: on the meta device and under FakeTensorMode, whole passes with gradients."""

from contextlib import nullcontext

import pytest
import torch
from torch._subclasses import FakeTensorMode

from lingen.blocks.scan import order_of, permutation
from lingen.model import LinGen
from lingen.recipe.registry import MIXERS, TEXT_ENCODERS
from lingen.recipe.sections import LinGenConfig
from lingen.recipe.signature import settings_of

TEXT = ((4, 5), (3, 7))
SMALL = {"state_dim": 4, "head_dim": 8, "window": (2, 2, 2)}


def component(name, **settings):
    known = settings_of(MIXERS[name])
    return {"name": name} | {key: value for key, value in (SMALL | settings).items() if key in known}


MATE = component("mate")
CASES = {name: {"mixer": component(name)} for name in MIXERS.names()} | {
    f"{name} reference": {"mixer": component(name, kernel="reference")} for name in ("mamba2", "temporal_swin", "mate")
}
CASES |= {
    "hybrid": {"mixer": [MATE, component("attention")], "depth": 2},
    "recomputed": {"mixer": MATE, "checkpointing": True},
    "recomputed in part": {"mixer": MATE, "checkpointing": 1e-5, "depth": 2},
    "clip": {"mixer": MATE, "predict": "clip", "pool_text": True},
    "permuted": {"mixer": component("mate", scan="hilbert", conv="per_direction")},
}


def inputs(frames, padding, size=(4, 6)):
    """Latents, time and text on the default device; with `padding`, rows with some text and one with none."""
    masks = [torch.ones(2, n, dtype=torch.bool) for n, _ in TEXT]
    if padding:
        masks[0][:, -1] = False
        for mask in masks:
            mask[0] = False
    text = tuple((torch.randn(2, n, width), mask) for (n, width), mask in zip(TEXT, masks, strict=True))
    return torch.randn(2, 3, frames, *size), torch.rand(2), text


def config(**changes):
    return LinGenConfig(**dict(dim=16, depth=1, channels=3, text_dims=(5, 7), max_grid=(4, 3, 5)) | changes)


@pytest.mark.parametrize("frames", [1, 3])
@pytest.mark.parametrize("place", ["meta", "fake"])
@pytest.mark.parametrize("case", CASES)
def test_a_whole_pass_and_its_gradients(case, place, frames):
    device = torch.device("meta" if place == "meta" else "cpu")
    with FakeTensorMode() if place == "fake" else nullcontext(), device:
        model = LinGen(config(**CASES[case]))
        latents, time, text = inputs(frames, padding=frames > 1)
        velocity = model(latents, time, text)
        velocity.sum().backward()
        assert (velocity.shape, velocity.device) == (latents.shape, device)
        assert [name for name, p in model.named_parameters() if p.grad is None or p.grad.shape != p.shape] == []
        with torch.no_grad():
            assert model(latents, time[:, None].expand(-1, frames), text).shape == latents.shape


@pytest.mark.parametrize("case", ["permuted", "temporal_swin"])
def test_numbers_that_are_kept_survive_a_fake_pass(case):
    """Tables and permutations are kept between calls: neither way may hand a fake to the other."""
    torch.manual_seed(0)
    model, (latents, time, text) = LinGen(config(**CASES[case], gate_init=1.0)), inputs(3, True, (8, 8))
    torch.nn.init.normal_(model.unpatchify.weight)
    for size in ((8, 8), (4, 8)):  # seen first by a fake, and seen first by a real model
        with FakeTensorMode():
            LinGen(config(**CASES[case]))(*inputs(3, True, size))
        real = model(latents[..., : size[0], :], time, text)
        assert real.any() and real.isfinite().all()
        with FakeTensorMode():
            LinGen(config(**CASES[case]))(*inputs(3, True, size))


def test_a_scan_order_is_checked_under_fake_mode_too():
    with FakeTensorMode():
        assert callable(order_of("hilbert", 0))
        with pytest.raises(ValueError, match="does not visit each of the 24 tokens"):
            order_of(lambda t, h, w: torch.zeros(t * h * w, dtype=torch.long), 0)
        fake, _ = permutation("hwt", (2, 3, 4), torch.device("cpu"))
    real, _ = permutation("hwt", (2, 3, 4), torch.device("cpu"))
    assert fake.shape == real.shape and real.sort().values.tolist() == list(range(24))


@pytest.mark.parametrize("kernel", ["triton", "stock", "flash"])
def test_the_plain_twin_stands_for_a_kernel_that_cannot_run(kernel):
    for place in (FakeTensorMode(), torch.device("meta")):
        with place:
            velocity = LinGen(config(mixer=component("mate", kernel=kernel)))(*inputs(1, False))
        assert velocity.shape == (2, 3, 1, 4, 6)


@pytest.mark.parametrize("name", ["words", "bytes"])
def test_small_text_encoders_run_on_meta(name):
    with torch.device("meta"):
        encoder = TEXT_ENCODERS.build({"name": name, "dim": 8})
    tokens, mask = encoder.encode(["a red square", "", "hello"])
    tokens.sum().backward()
    assert tokens.is_meta and mask.is_meta and tokens.shape[:2] == mask.shape
