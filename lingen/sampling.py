"""From a prompt to a clip: text, solver, latents, frames."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lingen import flow
from lingen.config import SampleConfig
from lingen.module import LinGenModule
from lingen.precision import set_precision
from lingen.weights import load_module

log = logging.getLogger("lingen")

GUIDANCE_TOKENS = 16_384
"""With `guidance_batch: auto`, up to this many tokens of all clips go with and without text in one batch [ours]: more
fill a GPU on their own."""

Progress = Callable[[int, int], None]
"""Called with (steps done, steps in all)."""


@dataclass(frozen=True)
class ClipSize:
    """What is asked for: frames, and height and width in pixels; fps says how long that lasts."""

    frames: int
    size: tuple[int, int]
    fps: float


def generate(
    run_or_checkpoint: str | Path | LinGenModule,
    prompts: str | Sequence[str],
    *,
    seed: int | None = None,
    steps: int | None = None,
    guidance: float | None = None,
    seconds: float | None = None,
    size: tuple[int, int] | None = None,
    progress: Progress | None = None,
) -> Iterator[np.ndarray]:
    """Samples a clip for each prompt; the same seed and prompt give the same clip on the same machine.

    Args:
        run_or_checkpoint: a run folder (its last finished stage), a .safetensors file, or a loaded module, whose
            denoiser is put into `sample.precision` for good (auto: bfloat16 on CUDA, where it was trained so).
        prompts: one or several.
        seed, steps, guidance: in place of the recipe's `sample` settings.
        seconds: length, at the recipe's frame rate; default: the recipe's clip.
        size: (height, width) in pixels; default: the recipe's.
    Yields:
        uint8 [t h w 3] for each prompt, in order.
    Raises:
        RecipeError: for a folder or file that holds no weights.
        ValueError: for a size that the model's strides and patch do not divide.
    """
    module = (
        run_or_checkpoint
        if isinstance(run_or_checkpoint, LinGenModule)
        else load_module(run_or_checkpoint, device=best_device())
    )
    settings = settings_with(module.recipe.sample, seed=seed, steps=steps, guidance=guidance)
    clip = clip_size(module, seconds, size)
    prompts = [prompts] if isinstance(prompts, str) else list(prompts)
    for index, prompt in enumerate(prompts):
        latents = sample_latents(module, [prompt], clip, settings, first=index, progress=progress)
        yield from decode(module.autoencoder, latents, clip.frames)


def settings_with(
    settings: SampleConfig, *, seed: int | None, steps: int | None, guidance: float | None
) -> SampleConfig:
    """The recipe's sampling settings with what was given in their place."""
    if steps is not None and steps < 1:
        raise ValueError(f"Sampling takes at least 1 step, got {steps}.")
    return replace(
        settings,
        seed=settings.seed if seed is None else seed,
        steps=settings.steps if steps is None else steps,
        guidance=settings.guidance if guidance is None else guidance,
    )


def best_device() -> torch.device:
    """The GPU where there is one, else the CPU."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def clip_size(module: LinGenModule, seconds: float | None = None, size: tuple[int, int] | None = None) -> ClipSize:
    """Checks what is asked for against the recipe and the model. ValueError names the cure."""
    data = module.recipe.data
    frames = data.frames if seconds is None else round(seconds * data.fps)
    if frames < 1:
        raise ValueError(f"{seconds} seconds at {data.fps:g} frames a second is less than one frame.")
    height, width = size or data.size
    _, stride_h, stride_w = module.autoencoder.strides
    _, patch_h, patch_w = module.recipe.model.patch
    unit_h, unit_w = stride_h * patch_h, stride_w * patch_w
    if height < 1 or width < 1 or height % unit_h or width % unit_w:
        raise ValueError(
            f"Size {height}x{width} (height x width) does not fit this model: the height must be a multiple of "
            f"{unit_h} and the width one of {unit_w}. Closest: {nearest(height, unit_h)}x{nearest(width, unit_w)}."
        )
    return ClipSize(frames, (height, width), data.fps)


def nearest(length: int, unit: int) -> int:
    """The positive multiple of `unit` that is closest to `length`."""
    return max(1, round(length / unit)) * unit


@torch.no_grad()
def sample_latents(
    module: LinGenModule,
    prompts: Sequence[str],
    clip: ClipSize,
    settings: SampleConfig,
    *,
    first: int = 0,
    progress: Progress | None = None,
) -> Tensor:
    """Solves the flow from noise for a batch of prompts, in `settings.precision` (see `lingen.precision`).

    Args:
        first: number of the first prompt; its noise is drawn from (seed, number), so that batches do not matter.
    Returns:
        latents [b c t h w], float32.
    """
    shape = (module.recipe.model.channels, *module.latent_size((clip.frames, *clip.size)))
    shift = flow.resolve_shift(module.recipe.time.shift, math.prod(module.model.grid_of(shape[1:])))
    times = flow.schedule(settings.steps, settings.schedule, settings.emulated_steps, shift)
    warn_untrained(module, times, shift)
    slots = torch.arange(first, first + len(prompts))
    noise = flow.draw(shape, slots, (settings.seed, "sample"), module.recipe.time, shift).noise.to(module.device)
    fps = clip.fps if clip.frames > 1 else 0.0
    null, text = module.encode_text([""] * len(prompts), fps), module.encode_text(list(prompts), fps)
    both = tuple(flow.stack_text(a, b) for a, b in zip(null, text, strict=True))
    tokens = len(prompts) * math.prod(module.model.grid_of(shape[1:]))
    one_batch = tokens <= GUIDANCE_TOKENS if settings.guidance_batch == "auto" else settings.guidance_batch
    low, high = settings.guidance_interval

    def velocity(latents: Tensor, time: Tensor) -> Tensor:
        time = time.expand(len(latents))
        if settings.guidance == 1 or not low <= float(time[0]) <= high:
            return module.model(latents, time, text).float()
        if one_batch:
            velocities = module.model(latents.repeat(2, 1, 1, 1, 1), time.repeat(2), both).float().chunk(2)
        else:
            velocities = tuple(module.model(latents, time, words).float() for words in (null, text))
        unconditional, conditional = velocities
        return flow.guided(conditional, unconditional, settings.guidance, settings.guidance_rescale)

    with torch.autocast(module.device.type, torch.bfloat16, enabled=set_precision(module, settings.precision)):
        return flow.solve(velocity, noise, times.to(module.device), settings.solver, progress)


def warn_untrained(module: LinGenModule, times: Tensor, shift: float) -> None:
    """Says so where many sampling steps lie at times that training hardly saw."""
    share = flow.untrained_share(times[1:], module.recipe.time, shift)  # every schedule starts at time 0
    if share > 0.25:
        log.warning(
            "%.0f%% of the sampling steps lie at times that training hardly saw; use a smaller sample.emulated_steps "
            "or sample.schedule=uniform.",
            100 * share,
        )


@torch.no_grad()
def decode(autoencoder: Any, latents: Tensor, frames: int) -> Iterator[np.ndarray]:
    """Latents [b c t h w] -> uint8 clips [frames h w 3], one by one; frames beyond `frames` are dropped."""
    for latent in latents:
        video = autoencoder.decode(latent[None])[0, :, :frames].float()
        yield ((video.clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8).permute(1, 2, 3, 0).cpu().numpy()
