"""Modules with random weights, made where they are measured."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from lingen.model import LinGen, Text
from lingen.recipe.registry import RecipeError, SettingError
from lingen.recipe.sections import LinGenConfig
from lingen.sampling import clips as sampling

Made = TypeVar("Made", bound=nn.Module)

TEXT_TOKENS = 512
"""Of all encoders together."""


def best_device(name: str | None = None) -> torch.device:
    """A device on which can be measured; else as `lingen.sampling.clips.best_device`."""
    kind = (name or "").partition(":")[0]
    if name and kind not in ("cpu", "cuda"):
        raise RecipeError(f"There is no device '{name}' to measure on; say cpu or cuda.")
    return sampling.best_device(name)


def precision_of(device: torch.device) -> torch.dtype:
    """What is measured where nothing else is said: bfloat16 on a GPU, float32 on a CPU."""
    return torch.bfloat16 if device.type == "cuda" else torch.float32


def built(make: Callable[[], Made], device: torch.device, dtype: torch.dtype) -> Made:
    """What `make` constructs, on the device and in the dtype from the start: 4B weights never exist in float32.

    On a GPU it is constructed on `meta`, which runs none of its own code there, and its weights are drawn by `draw`;
    one that holds buffers is constructed where it belongs. Parameters that it keeps in float32 by itself stay so.
    """
    torch.manual_seed(0)
    try:
        return _built(make, device, dtype)
    except SettingError as error:
        raise RecipeError(f"{error} (at {error.setting})") from error


def _built(make: Callable[[], Made], device: torch.device, dtype: torch.dtype) -> Made:
    if device.type == "cuda":
        empty = _constructed(make, torch.device("meta"), dtype)
        if not list(empty.buffers()):
            empty.to_empty(device=device)
            draw(empty)
            return empty
    return _constructed(make, device, dtype)


def _constructed(make: Callable[[], Made], device: torch.device, dtype: torch.dtype) -> Made:
    default = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with torch.device(device):
            return make()
    finally:
        torch.set_default_dtype(default)


@torch.no_grad()
def draw(module: nn.Module) -> None:
    """Draws all weights: matrices that keep the size of what they multiply, norms of 1, biases of 0, the scan's own
    numbers in the ranges that they start in (arXiv 2405.21060). None is zero: zeros take less power, so run faster."""
    for path, parameter in module.named_parameters():
        name = path.rpartition(".")[2]
        if name == "a_log":
            parameter.uniform_(1, 16).log_()
        elif name == "dt_bias":  # softplus of it is a time step of 1e-3 to 0.1
            parameter.uniform_(-6.9, -2.3).exp_().expm1_().log_()
        elif name == "modulation":
            parameter.normal_(std=0.1).add_(1)
        elif parameter.ndim > 1 and name != "d":
            parameter.normal_(std=parameter[0].numel() ** -0.5)
        else:
            parameter.fill_(0 if name.endswith("bias") else 1)


def denoiser(config: LinGenConfig, device: torch.device, dtype: torch.dtype) -> LinGen:
    """A denoiser for sampling, with random weights that let every part have its say."""
    model = built(lambda: LinGen(replace(config, gate_init=1.0, checkpointing=False)), device, dtype)
    draw(model)
    return model.eval().requires_grad_(False)


def sample_inputs(
    config: LinGenConfig, grid: tuple[int, int, int], device: torch.device, batch: int = 1
) -> tuple[Tensor, Tensor, Text]:
    """Latents [b c t h w] that make a grid of tokens, times [b], and `TEXT_TOKENS` tokens of text in all encoders."""
    size = [n * part for n, part in zip(grid, config.patch, strict=True)]
    latents = torch.randn(batch, config.channels, *size, device=device)
    widths = config.text_dims
    counts = [len(range(i, TEXT_TOKENS, len(widths))) for i in range(len(widths))]
    text = tuple(
        (torch.randn(batch, n, width, device=device), torch.ones(batch, n, dtype=torch.bool, device=device))
        for n, width in zip(counts, widths, strict=True)
    )
    return latents, torch.full((batch,), 0.5, device=device), text


def name_of(component: str | dict[str, Any]) -> str:
    """The registered name of a component."""
    return component if isinstance(component, str) else str(component["name"])


def kernel_of(module: nn.Module) -> str | None:
    """The kernel that a mixer, or the first of its branches that has one, was set to."""
    kernels = (getattr(part, "kernel", None) for part in module.modules())
    return next((kernel for kernel in kernels if isinstance(kernel, str)), None)


def dtype_name(dtype: torch.dtype) -> str:
    """``bfloat16``"""
    return str(dtype).removeprefix("torch.")
