"""Modules with random weights, made on the device on which they are measured."""

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from lingen.model import LinGen, Text
from lingen.plan.flops import forward_flops
from lingen.recipe.sections import LinGenConfig, Triple

from .place import Place

Made = TypeVar("Made", bound=nn.Module)
Result = TypeVar("Result")
MixerChoice = str | dict[str, Any]

TEXT_LENGTH = 512
"""Text tokens of all encoders together."""


def built(make: Callable[[], Made], place: Place) -> Made:
    """What `make` constructs, on the device and in the dtype from the start: 4B weights never exist in float32. On a
    GPU it is constructed on `meta`, which runs none of its own code there, and `draw_weights` draws its weights; one
    that holds buffers is constructed where it belongs. Parameters that it keeps in float32 by itself stay so.
    SettingError for a setting that it does not take."""
    torch.manual_seed(0)
    if place.cuda:
        empty = _constructed(make, torch.device("meta"), place.dtype)
        if not list(empty.buffers()):
            empty.to_empty(device=place.device)
            draw_weights(empty)
            return empty
    return _constructed(make, place.device, place.dtype)


def _constructed(make: Callable[[], Made], device: torch.device, dtype: torch.dtype) -> Made:
    default = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with torch.device(device):
            return make()
    finally:
        torch.set_default_dtype(default)


@torch.no_grad()
def draw_weights(module: nn.Module) -> None:
    """Draws all weights: matrices that keep the size of what they multiply, norms of 1, biases of 0, the scan's own
    numbers in the ranges that they start in (arXiv 2405.21060). None is zero: zeros take less power, so run faster."""
    for path, parameter in module.named_parameters():
        name = path.rpartition(".")[2]
        if name == "a_log":
            parameter.uniform_(1, 16).log_()
        elif name == "dt_bias":  # softplus of it is a time step of 1e-3 to 0.1
            parameter.uniform_(-6.9, -2.3).exp_().expm1_().log_()
        elif path.removesuffix(".weight").endswith("modulation") and not path.startswith("time."):
            parameter.normal_(std=0.1).add_(1)
        elif parameter.ndim > 1 and name != "d":
            parameter.normal_(std=parameter[0].numel() ** -0.5)
        else:
            parameter.fill_(0 if name.endswith("bias") else 1)


def denoiser(config: LinGenConfig, place: Place) -> LinGen:
    """A denoiser for sampling, with random weights of which none switches a part off."""
    model = built(partial(LinGen, replace(config, gate_init=1.0, checkpointing=False)), place)
    draw_weights(model)
    return model.eval().requires_grad_(False)


def sample_inputs(
    config: LinGenConfig, grid: Triple, device: torch.device, batch: int = 1
) -> tuple[Tensor, Tensor, Text]:
    """Latents [b c t h w] that make a grid of tokens, times [b], and `TEXT_LENGTH` tokens of text in all encoders."""
    size = [n * part for n, part in zip(grid, config.patch, strict=True)]
    latents = torch.randn(batch, config.channels, *size, device=device)
    text = tuple(
        (torch.randn(batch, n, width, device=device), torch.ones(batch, n, dtype=torch.bool, device=device))
        for n, width in zip(text_counts(config), config.text_dims, strict=True)
    )
    return latents, torch.full((batch,), 0.5, device=device), text


def text_counts(config: LinGenConfig) -> list[int]:
    """`TEXT_LENGTH`, shared out to the encoders."""
    encoders = len(config.text_dims)
    return [len(range(first, TEXT_LENGTH, encoders)) for first in range(encoders)]


def tflop_of(config: LinGenConfig, grid: Triple, place: Place) -> float:
    """Of a denoiser's forward at batch 1; NaN where it cannot be counted."""
    found = forward_flops(config, grid, text_counts(config), place.sixteen_bit, place.device.type)
    return float("nan") if found is None else found / 1e12


def compiled(run: Callable[..., Result]) -> Callable[..., Result]:
    """`run` under torch.compile, for sizes that stay, forward and backward. Without the fusion of sums over rows with
    sums over columns: torch 2.11 forgets the outer axes of a gradient [1 1 d] there, which autograd refuses (pytorch
    issue 178080), and writes others nowhere (issue 193061)."""
    made: Callable[..., Result] = torch.compile(run, dynamic=False, options={"triton.mix_order_reduction": False})
    return made


def name_of(component: MixerChoice) -> str:
    """The registered name of a component."""
    return component if isinstance(component, str) else str(component["name"])


def kernel_of(module: nn.Module) -> str | None:
    """The kernel that a mixer, or the first of its branches that has one, was set to."""
    kernels = (getattr(part, "kernel", None) for part in module.modules())
    return next((kernel for kernel in kernels if isinstance(kernel, str)), None)
