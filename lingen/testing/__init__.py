"""For the tests of a package that brings parts: each check raises AssertionError where lingen's contract is broken.
Parts are classes, or functions, at the top of a module."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from lingen.blocks.scan import permutation
from lingen.frozen import on_meta
from lingen.plan.contract import TEXTS, broken_contract
from lingen.recipe.errors import RecipeError
from lingen.recipe.registry import AUTOENCODERS, MIXERS, SCANS, TEXT_ENCODERS, Registry

GRIDS = ((1, 4, 4), (2, 4, 4), (3, 5, 6))
"""Tokens (t, h, w): an image, a clip, and one that windows do not fill."""


def check_mixer(cls: Callable[..., nn.Module], *, dim: int = 32, **settings: Any) -> None:
    """[b t h w d] keeps its shape, alike each time, samples apart; gradients reach the input and all parameters."""
    mixer = _kept(MIXERS, cls, settings, dim, 0)
    for grid in GRIDS:
        x = torch.randn(2, *grid, dim, requires_grad=True)
        output = mixer(x)
        assert output.shape == x.shape, f"A {grid} grid gives {list(output.shape)}; expected {list(x.shape)}."
        assert torch.equal(mixer(x), output), "The same tokens give something else the second time."
        torch.testing.assert_close(mixer(x[1:]), output[1:], msg="A sample's tokens depend on the others of its batch.")
        output.square().sum().backward()
    unused = [name for name, one in mixer.named_parameters() if one.requires_grad and one.grad is None]
    assert not unused, f"No gradient reaches {', '.join(unused)}."


def check_scan(order: Callable[[int, int, int], Tensor]) -> None:
    """It visits each token of every grid once, and is found as ``module:function``."""
    found = SCANS[f"{order.__module__}:{order.__qualname__}"]
    for grid in GRIDS:
        permutation(found, grid, torch.device("cpu"))


def check_text_encoder(cls: Callable[..., Any], **settings: Any) -> None:
    """Texts give tokens [b n w] and a mask [b n], alike each time."""
    encoder = _kept(TEXT_ENCODERS, cls, settings)
    for first, second in zip(encoder.encode(TEXTS), encoder.encode(TEXTS), strict=True):
        assert torch.equal(first, second), "The same texts give something else the second time."


def check_autoencoder(cls: Callable[..., Any], **settings: Any) -> None:
    """Latents and clips have the sizes that `strides` and `channels` say, alike each time."""
    autoencoder = _kept(AUTOENCODERS, cls, settings)
    t, h, w = autoencoder.strides
    video = torch.rand(1, 3, 2 * t, 2 * h, 2 * w) * 2 - 1
    latents = autoencoder.encode(video)
    assert latents.shape == (1, autoencoder.channels, 2, 2, 2), f"{list(video.shape)} gives {list(latents.shape)}."
    assert torch.equal(autoencoder.encode(video), latents), "The same clip gives something else the second time."
    decoded = autoencoder.decode(latents).shape
    assert decoded == video.shape, f"Latents of {list(video.shape)} decode to {list(decoded)}."


def _kept(registry: Registry, cls: Any, settings: dict[str, Any], *positional: Any) -> Any:
    """The part on the CPU, built from a recipe's words, if it keeps the contract that a recipe is tried for."""
    component = {"name": f"{cls.__module__}:{cls.__qualname__}", **settings}
    try:
        fault = broken_contract(registry, component, on_meta(registry, component, *positional), *positional)
        torch.manual_seed(0)
        part = registry.build(component, *positional)
    except RecipeError as error:
        raise AssertionError(str(error)) from error
    assert fault is None, fault
    return part
