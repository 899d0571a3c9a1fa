"""From a prompt to a clip: text, solver, latents, frames."""

from __future__ import annotations

import logging
import math
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple, cast

import numpy as np
import torch
from jaxtyping import Float, Shaped
from torch import Tensor

from lingen import flow
from lingen.autoencoder import Autoencoder, ways
from lingen.autoencoder.ways import tiles_of, way_for
from lingen.data.batch import Progress
from lingen.frozen import check_ready
from lingen.kernels.choice import best_device, keep_memory, memory_here
from lingen.media import as_frames
from lingen.ranks.heartbeat import sign
from lingen.recipe.sections import SampleConfig
from lingen.recipe.sizes import check_frames
from lingen.sampling import find_demo
from lingen.sampling.precision import set_precision
from lingen.training.modules import TextToVideo
from lingen.training.weights import load_denoiser

log = logging.getLogger("lingen")

GUIDANCE_TOKENS = 16_384
"""With `guidance_batch: auto`, up to this many tokens of all clips go with and without text in one batch [ours]: more
fill a GPU on their own."""


@dataclass(frozen=True)
class ClipSize:
    """What is asked for: frames, and height and width in pixels; fps says how long that lasts."""

    frames: int
    size: tuple[int, int]
    fps: float


@dataclass(frozen=True)
class Take:
    """One clip that is asked for: its noise is a function of the seed, `words` and `repetition` alone."""

    prompt: str
    """As it was given."""
    rewritten: str | None
    """What it was rewritten to, where that was asked for."""
    repetition: int
    """0 for the first clip of these words, 1 for the second, ..."""

    @property
    def words(self) -> str:
        """What the text encoders read."""
        return self.prompt if self.rewritten is None else self.rewritten


def takes_of(prompts: Sequence[str], rewritten: Sequence[str] = (), repeat: int = 1) -> list[Take]:
    """`repeat` clips of each prompt, side by side; a prompt that comes again in the list goes on counting."""
    takes, counts = [], Counter[str]()
    shown: Sequence[str | None] = rewritten or [None] * len(prompts)
    for prompt, other in zip(prompts, shown, strict=True):
        for _ in range(repeat):
            take = Take(prompt, other, counts[prompt if other is None else other])
            counts[take.words] += 1
            takes.append(take)
    return takes


def generate(
    run_or_checkpoint: str | Path | TextToVideo, prompts: str | Sequence[str], *, seed: int | None = None,
    steps: int | None = None, guidance: float | None = None, seconds: float | None = None,
    size: tuple[int, int] | None = None, repeat: int = 1, progress: Progress | None = None,
) -> Iterator[np.ndarray]:  # fmt: skip
    """Samples `repeat` clips for each prompt. On the same machine a clip is a function of the weights, these settings,
    the prompt and the number of its repetition, whatever else is in the list.

    Args:
        run_or_checkpoint: a run folder (its last finished stage), a .safetensors file, a folder with a
            denoiser.safetensors, the name of a recipe whose weights come with lingen, or a loaded module, whose
            denoiser is put into `sample.precision` for good (auto: bfloat16 on CUDA, where it was trained so).
        prompts: one or several. The second time that a prompt stands in the list is its repetition 1, another clip.
        seed, steps, guidance: in place of the recipe's `sample` settings.
        seconds: length, at the recipe's frame rate; default: the recipe's clip, one frame of a stage of images.
        size: (height, width) in pixels; default: the recipe's.
        repeat: different clips of each prompt.
    Yields:
        uint8 [t h w 3] for each prompt and repetition, in order.
    Raises:
        RecipeError: for a folder or file that holds no weights.
        ValueError: for a size that the model's strides and patch do not divide, or what is no length, size, guidance
            or number of clips.
        TypeError: for a prompt that is no text."""
    prompts = [prompts] if isinstance(prompts, str) else list(prompts)
    for prompt in prompts:
        if not isinstance(prompt, str):
            raise TypeError(f"A prompt is a text, got {prompt!r}.")
    if repeat < 1:
        raise ValueError(f"Each prompt has at least 1 clip, got repeat={repeat}.")
    if isinstance(run_or_checkpoint, TextToVideo):
        module, device = run_or_checkpoint, run_or_checkpoint.device
    else:
        module, device = load_denoiser(run_or_checkpoint), best_device()
    settings = settings_with(module.recipe.sample, seed=seed, steps=steps, guidance=guidance)
    clip = clip_size(module, seconds, size)
    yield from clips_of(module, takes_of(prompts, repeat=repeat), clip, settings, device, progress)


def sample_demo(
    prompt: str, *, seconds: float = 4.0, seed: int = 0, steps: int | None = None, weights: str | Path = "theatre_128",
    progress: Progress | None = None,
) -> np.ndarray:  # fmt: skip
    """uint8 [t h w 3], 12 frames a second, of a sentence in words of `lingen.data.theatre`; weights and errors as of
    `generate`, and a WeightsError where they were trained on other data."""
    return next(generate(find_demo(weights), prompt, seconds=seconds, seed=seed, steps=steps, progress=progress))


def settings_with(
    settings: SampleConfig, *, seed: int | None, steps: int | None, guidance: float | None
) -> SampleConfig:
    """The recipe's sampling settings with what was given in their place. SettingError for a number out of bounds."""
    given: dict[str, Any] = {"seed": seed, "steps": steps, "guidance": guidance}
    return replace(settings, **{key: value for key, value in given.items() if value is not None})


def clip_size(module: TextToVideo, seconds: float | None = None, size: tuple[int, int] | None = None) -> ClipSize:
    """Checks what is asked for against the recipe and the model. ValueError names the cure."""
    data = module.recipe.data
    if seconds is not None and not math.isfinite(seconds):
        raise ValueError(f"A clip lasts a finite number of seconds, got {seconds}.")
    if size is not None and not (isinstance(size, Sequence) and [isinstance(n, int) for n in size] == [True, True]):
        raise ValueError(f"A size is two whole numbers, (height, width) in pixels, got {size!r}.")
    own = data.frames if data.mix.video else 1  # a stage of images has learnt no motion
    frames = own if seconds is None else round(seconds * data.fps)
    if frames < 1:
        raise ValueError(f"{seconds} seconds at {data.fps:g} frames a second is less than one frame.")
    check_frames(frames, module.autoencoder)
    height, width = size or data.size
    _, stride_h, stride_w = module.autoencoder.strides
    _, patch_h, patch_w = module.recipe.model.patch
    unit_h, unit_w = stride_h * patch_h, stride_w * patch_w
    if height < 1 or width < 1 or height % unit_h or width % unit_w:
        closest = [max(1, round(side / unit)) * unit for side, unit in ((height, unit_h), (width, unit_w))]
        raise ValueError(
            f"Size {height}x{width} (height x width) does not fit this model: the height must be a multiple of "
            f"{unit_h} and the width one of {unit_w}. Closest: {closest[0]}x{closest[1]}."
        )
    # Not even the latents and one layer's tokens fit.
    sides = zip((frames, height, width), module.autoencoder.strides, strict=True)
    numbers = math.prod(math.ceil(pixels / stride) for pixels, stride in sides)
    model, there = module.recipe.model, memory_here()
    needed = 4 * numbers * (3 * model.channels + model.dim / math.prod(model.patch))
    if needed > there:
        raise ValueError(
            f"A clip of {frames:,} frames of {height}x{width} takes {needed / 2**30:,.0f} GiB or more, and this "
            f"machine has {there / 2**30:,.0f}. Take fewer seconds or a smaller size."
        )
    return ClipSize(frames, (height, width), data.fps)


Tokens = tuple[Float[Tensor, "b _ _"], Shaped[Tensor, "b _"]]
"""What one text encoder makes of some prompts, and where it is real."""


class Texts(NamedTuple):
    """Prompts as the denoiser reads them: of each text encoder tokens [b n w] and their mask [b n]."""

    null: list[Tokens]
    """Of no text."""
    text: list[Tokens]


@torch.no_grad()
def encode_prompts(module: TextToVideo, prompts: Sequence[str], clip: ClipSize) -> list[Texts]:
    """Encodes each prompt for itself (b = 1), so that it is the same whatever else is asked for.

    One text encoder comes after the other, and a frozen one is freed before the next is read: memory must hold the
    largest of them, not their sum."""
    fps = clip.fps if clip.frames > 1 else 0.0
    found = [Texts([], []) for _ in prompts]
    for number, encoder in enumerate(module.text):
        read = {words: module.encode_with(number, [words], fps) for words in dict.fromkeys(("", *prompts))}
        for texts, words in zip(found, prompts, strict=True):
            texts.null.append(read[""])
            texts.text.append(read[words])
        if hasattr(encoder, "release"):
            cast(Any, encoder).release()
    return found


@contextmanager
def as_sampled(module: TextToVideo) -> Iterator[None]:
    """Inside the block the module is in eval mode and holds the averaged weights, which clips are made with."""
    was_training = module.training
    module.eval()
    try:
        with module.averaged_weights():
            yield
    finally:
        module.train(was_training)


def sample_takes(
    module: TextToVideo, takes: Sequence[Take], clip: ClipSize, settings: SampleConfig,
    device: torch.device | None = None, progress: Progress | None = None,
) -> Iterator[Tensor]:  # fmt: skip
    """The one way from prompts to latents [c t h w], float32: of `lingen.generate`, `lingen sample`, clips during
    training and the score. A clip is solved for itself, so that its bits do not depend on what else is asked for.

    All prompts are encoded on the device first, and only then the denoiser is moved there: both need not fit at once.

    Args:
        module: in eval mode, or in training; it trains on with its own weights between and after the clips.
        device: where to sample; default: where the module is.
    Raises:
        RecipeError: weights of a frozen part are missing."""
    check_ready([module.autoencoder, *module.text])
    device = device or module.device
    keep_memory(device)
    module.text.to(device)
    with as_sampled(module):
        texts = encode_prompts(module, [take.words for take in takes], clip)
    module.to(device)
    for take, text in zip(takes, texts, strict=True):
        with as_sampled(module):
            latents = sample_latents(module, [take], text, clip, settings, progress)
        yield latents[0]


def clips_of(
    module: TextToVideo, takes: Sequence[Take], clip: ClipSize, settings: SampleConfig,
    device: torch.device | None = None, progress: Progress | None = None,
) -> Iterator[np.ndarray]:  # fmt: skip
    """`sample_takes`, decoded: uint8 [t h w 3] of each take."""
    for latents in sample_takes(module, takes, clip, settings, device, progress):
        yield decoded(module, latents, clip, settings)


def decoded(module: TextToVideo, latents: Tensor, clip: ClipSize, settings: SampleConfig) -> np.ndarray:
    """Latents [c t h w] of a clip -> uint8 [t h w 3], by `decode_frames`."""
    return np.stack(list(decode_frames(module.autoencoder, latents, clip.frames, settings.decode, settings.tile)))


@torch.no_grad()
def sample_latents(
    module: TextToVideo, takes: Sequence[Take], texts: Texts, clip: ClipSize, settings: SampleConfig,
    progress: Progress | None = None,
) -> Tensor:  # fmt: skip
    """Solves the flow from noise for a batch of clips, in `settings.precision` (see `lingen.sampling.precision`).

    Args:
        takes: the clips of the batch.
        texts: of `encode_prompts` for the words of each, as one batch (`flow.stack_text`).
        progress: one that has a `show(autoencoder, latents)` is shown the first clip as it is foreseen at each step.
    Returns:
        latents [b c t h w], float32. Those of a clip are the same bits in every batch of as many clips and tokens, and
        agree to 1e-5 in others."""
    model, (frames, *sides) = module.recipe.model, module.latent_size((clip.frames, *clip.size))
    if frames > model.patch[0]:  # the last patch is filled with frames that nobody sees
        frames += -frames % model.patch[0]
    shape = (model.channels, frames, *sides)
    training = module.times_of(shape[1:])
    times = training.schedule(settings)
    if (share := training.untrained_share(times)) > 0.25:
        told = "%.0f%% of the sampling steps lie at times that training hardly saw; use a smaller "
        log.warning(told + "sample.emulated_steps or sample.schedule=uniform.", 100 * share)
    noise = torch.stack([flow.clip_noise(shape, settings.seed, take.words, take.repetition) for take in takes])
    null, text = tuple(texts.null), tuple(texts.text)
    both = tuple(flow.stack_text(a, b) for a, b in zip(null, text, strict=True))
    if (parts := max((int(mask.max()) for _, mask in text), default=1)) > frames:
        log.warning("A prompt has %d parts, and the clip %d latent frames: some are not shown.", parts, frames)
    tokens = len(takes) * training.tokens
    one_batch = tokens <= GUIDANCE_TOKENS if settings.guidance_batch == "auto" else settings.guidance_batch
    low, high = settings.guidance_interval
    always = low <= 0 and high >= 1  # then no time is fetched from the device, which would wait for it at every step

    def velocity(latents: Tensor, time: Tensor) -> Tensor:
        sign("sampling")
        time = time.expand(len(latents))
        if settings.guidance == 1 or not (always or low <= float(time[0]) <= high):
            return module.model(latents, time, text).float()
        if one_batch:
            velocities = module.model(latents.repeat(2, 1, 1, 1, 1), time.repeat(2), both).float().chunk(2)
        else:
            velocities = tuple(module.model(latents, time, tokens).float() for tokens in (null, text))
        unconditional, conditional = velocities
        return flow.guided(conditional, unconditional, settings.guidance, settings.guidance_rescale)

    def shown(latents: Tensor, time: Tensor) -> Tensor:
        found = velocity(latents, time)
        cast(Any, progress).show(module.autoencoder, (latents + (1 - time) * found)[0])
        return found

    seen = shown if hasattr(progress, "show") else velocity
    with torch.autocast(module.device.type, torch.bfloat16, enabled=set_precision(module, settings.precision)):
        return flow.solve(seen, noise.to(module.device), times.to(module.device), settings.solver, progress)


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
        SettingError: a tile that its strides do not divide."""
    way = way_for(autoencoder, "tiled" if tile is not None else way, type(autoencoder).__name__)
    with torch.autocast(latents.device.type, torch.bfloat16, enabled=latents.device.type == "cuda"):
        pieces = ways.decode(autoencoder, latents[None], way, tiles_of(tile, autoencoder.strides))
        while frames > 0 and (piece := next(pieces, None)) is not None:
            shown = as_frames(piece[:, :, :frames])
            frames -= len(shown)
            sign("decoding")
            del piece  # otherwise it would be held while the next piece is made
            yield from shown
