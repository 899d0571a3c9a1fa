"""From a prompt to a clip: text, solver, latents, frames."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from jaxtyping import Bool, Float
from torch import Tensor

from lingen import flow
from lingen.autoencoder import Autoencoder, ways
from lingen.autoencoder.tiling import tiles_of
from lingen.autoencoder.ways import way_for
from lingen.frozen import check_ready
from lingen.kernels.choice import best_device
from lingen.media import as_frames
from lingen.recipe.sections import SampleConfig
from lingen.recipe.sizes import check_frames
from lingen.sampling.precision import set_precision
from lingen.training.denoiser import LinGenModule
from lingen.training.weights import load_module

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
        ValueError: for a size that the model's strides and patch do not divide, or what is no length, size or guidance.
        TypeError: for a prompt that is no text.
    """
    prompts = [prompts] if isinstance(prompts, str) else list(prompts)
    for prompt in prompts:
        if not isinstance(prompt, str):
            raise TypeError(f"A prompt is a text, got {prompt!r}.")
    if isinstance(run_or_checkpoint, LinGenModule):
        module, device = run_or_checkpoint, run_or_checkpoint.device
    else:
        module, device = load_module(run_or_checkpoint), best_device()
    settings = settings_with(module.recipe.sample, seed=seed, steps=steps, guidance=guidance)
    clip = clip_size(module, seconds, size)
    words = encode_and_place(module, prompts, clip, device)
    for index in range(len(prompts)):
        row = words.rows(slice(index, index + 1))
        latents = sample_latents(module, row, clip, settings, first=index, progress=progress)
        yield np.stack(list(decode_frames(module.autoencoder, latents[0], clip.frames, settings.decode, settings.tile)))


def settings_with(
    settings: SampleConfig, *, seed: int | None, steps: int | None, guidance: float | None
) -> SampleConfig:
    """The recipe's sampling settings with what was given in their place. SettingError for a number out of bounds."""
    given: dict[str, Any] = {"seed": seed, "steps": steps, "guidance": guidance}
    return replace(settings, **{key: value for key, value in given.items() if value is not None})


def clip_size(module: LinGenModule, seconds: float | None = None, size: tuple[int, int] | None = None) -> ClipSize:
    """Checks what is asked for against the recipe and the model. ValueError names the cure."""
    data = module.recipe.data
    if seconds is not None and not math.isfinite(seconds):
        raise ValueError(f"A clip lasts a finite number of seconds, got {seconds}.")
    if size is not None and not (isinstance(size, Sequence) and [isinstance(n, int) for n in size] == [True, True]):
        raise ValueError(f"A size is two whole numbers, (height, width) in pixels, got {size!r}.")
    frames = data.frames if seconds is None else round(seconds * data.fps)
    if frames < 1:
        raise ValueError(f"{seconds} seconds at {data.fps:g} frames a second is less than one frame.")
    check_frames(frames, module.autoencoder)
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


Tokens = tuple[Float[Tensor, "b _ _"], Bool[Tensor, "b _"]]
"""What one text encoder makes of some prompts, and where it is real."""


@dataclass(frozen=True)
class EncodedPrompts:
    """Prompts, encoded: of each text encoder tokens [b n w] and their mask [b n]."""

    count: int
    """Number of prompts, b."""
    null: list[Tokens]
    """Tokens and mask of no text, for each text encoder."""
    text: list[Tokens]

    def rows(self, rows: slice) -> EncodedPrompts:
        """The encoded prompts of these rows."""
        null, text = ([(tokens[rows], mask[rows]) for tokens, mask in each] for each in (self.null, self.text))
        return EncodedPrompts(len(range(self.count)[rows]), null, text)


@torch.no_grad()
def encode_prompts(module: LinGenModule, prompts: Sequence[str], clip: ClipSize) -> EncodedPrompts:
    """Encodes prompts with one text encoder after the other. A frozen one is freed before the next is read: memory must
    hold the largest of them, not their sum."""
    fps = clip.fps if clip.frames > 1 else 0.0
    null, text = [], []
    for number, encoder in enumerate(module.text):
        null.append(module.encode_with(number, [""] * len(prompts), fps))
        text.append(module.encode_with(number, list(prompts), fps))
        if hasattr(encoder, "release"):
            cast(Any, encoder).release()
    return EncodedPrompts(len(prompts), null, text)


def encode_and_place(
    module: LinGenModule, prompts: Sequence[str], clip: ClipSize, device: torch.device
) -> EncodedPrompts:
    """Encodes prompts on the device and then moves the denoiser there, so that both need not fit at once.

    Raises:
        RecipeError: weights of a frozen part are missing.
    """
    check_ready([module.autoencoder, *module.text])
    module.text.to(device)
    words = encode_prompts(module, prompts, clip)
    module.to(device)
    return words


@torch.no_grad()
def sample_latents(
    module: LinGenModule,
    words: EncodedPrompts,
    clip: ClipSize,
    settings: SampleConfig,
    *,
    first: int = 0,
    progress: Progress | None = None,
) -> Tensor:
    """Solves the flow from noise for a batch of prompts, in `settings.precision` (see `lingen.sampling.precision`).

    Args:
        words: of `encode_prompts`.
        first: number of the first prompt; its noise is drawn from (seed, number), so that batches do not matter.
    Returns:
        latents [b c t h w], float32.
    """
    shape = (module.recipe.model.channels, *module.latent_size((clip.frames, *clip.size)))
    shift = flow.resolve_shift(module.recipe.time.shift, math.prod(module.model.grid_of(shape[1:])))
    times = flow.schedule(settings.steps, settings.schedule, settings.emulated_steps, shift)
    warn_untrained(module, times, shift)
    slots = torch.arange(first, first + words.count)
    noise = flow.sample_draws(shape, slots, (settings.seed, "sample"), module.recipe.time, shift).noise.to(
        module.device
    )
    null, text = tuple(words.null), tuple(words.text)
    both = tuple(flow.stack_text(a, b) for a, b in zip(null, text, strict=True))
    tokens = words.count * math.prod(module.model.grid_of(shape[1:]))
    one_batch = tokens <= GUIDANCE_TOKENS if settings.guidance_batch == "auto" else settings.guidance_batch
    low, high = settings.guidance_interval

    def velocity(latents: Tensor, time: Tensor) -> Tensor:
        time = time.expand(len(latents))
        if settings.guidance == 1 or not low <= float(time[0]) <= high:
            return module.model(latents, time, text).float()
        if one_batch:
            velocities = module.model(latents.repeat(2, 1, 1, 1, 1), time.repeat(2), both).float().chunk(2)
        else:
            velocities = tuple(module.model(latents, time, tokens).float() for tokens in (null, text))
        unconditional, conditional = velocities
        return flow.guided(conditional, unconditional, settings.guidance, settings.guidance_rescale)

    with torch.autocast(module.device.type, torch.bfloat16, enabled=set_precision(module, settings.precision)):
        return flow.solve(velocity, noise, times.to(module.device), settings.solver, progress)


def warn_untrained(module: LinGenModule, times: Tensor, shift: float) -> None:
    """Warns where many sampling steps lie at times that are rare in training."""
    share = flow.untrained_share(times[1:], module.recipe.time, shift)  # every schedule starts at time 0
    if share > 0.25:
        log.warning(
            "%.0f%% of the sampling steps lie at times that training hardly saw; use a smaller sample.emulated_steps "
            "or sample.schedule=uniform.",
            100 * share,
        )


@torch.no_grad()
def decode_frames(
    autoencoder: Autoencoder, latents: Tensor, frames: int, way: str = "auto", tile: tuple[int, int] | None = None
) -> Iterator[np.ndarray]:
    """Latents [c t h w] -> uint8 frames [h w 3], one by one, so that memory does not grow with the length unless they
    are decoded in one call. On CUDA products are in bfloat16.

    Args:
        frames: number of frames; further ones are dropped.
        way, tile: `sample.decode` and `sample.tile`.
    Raises:
        RecipeError: a way that the autoencoder does not have.
        SettingError: a tile that its strides do not divide.
    """
    way = way_for(autoencoder, "tiled" if tile is not None else way, type(autoencoder).__name__)
    with torch.autocast(latents.device.type, torch.bfloat16, enabled=latents.device.type == "cuda"):
        pieces = ways.decode(autoencoder, latents[None], way, tiles_of(tile, autoencoder.strides))
        while frames > 0 and (piece := next(pieces, None)) is not None:
            shown = as_frames(piece[:, :, :frames])
            frames -= len(shown)
            del piece  # otherwise it would be held while the next piece is made
            yield from shown
