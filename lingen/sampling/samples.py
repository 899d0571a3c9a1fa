"""Clips sampled during a run: of the recipe's prompts while it trains, of held-out captions for the score."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from lingen.data.datamodule import ClipData
from lingen.files import write_json
from lingen.kernels.choice import best_device
from lingen.media import as_floats, as_frames, beside, contact_sheet, error_frames, save_video
from lingen.recipe.sections import Recipe
from lingen.sampling.clips import clip_size, decode_frames, encode_prompts, sample_latents
from lingen.training.base import Trained
from lingen.training.denoiser import LinGenModule
from lingen.training.folder import RunFolder
from lingen.training.weights import load_module

if TYPE_CHECKING:
    from lingen.training.autoencoder import AutoencoderModule


def sample_prompts(module: LinGenModule, folder: RunFolder, step: int, prompts: Sequence[str]) -> None:
    """Clips of the prompts with the averaged weights: MP4s and a contact sheet, which goes to loggers of images too."""
    if not prompts:
        return
    clips = sample_clips(module, prompts)
    target = folder.samples(str(module.recipe.stage), step)
    for number, (clip, prompt) in enumerate(zip(clips, prompts, strict=True)):
        save_video(clip, target / f"{number:02d}.mp4", module.recipe.data.fps, title=prompt)
    sheet = contact_sheet(clips, target / "sheet.png", prompts)
    log_sheet(module, sheet, step)


def sample_clips(module: LinGenModule, prompts: Sequence[str], batch: int = 8) -> list[Any]:
    """uint8 [t h w 3] for each prompt, in eval mode, with the averaged weights where the module holds both copies."""
    clip, how = clip_size(module), module.recipe.sample
    was_training = module.training
    module.eval()
    clips: list[Any] = []
    with module.averaged_weights():
        words = encode_prompts(module, prompts, clip)
        for first in range(0, len(prompts), batch):
            rows = words.rows(slice(first, first + batch))
            latents = sample_latents(module, rows, clip, how, first=first)
            decoded = (decode_frames(module.autoencoder, one, clip.frames, how.decode, how.tile) for one in latents)
            clips += [np.stack(list(frames)) for frames in decoded]
    module.train(was_training)
    return clips


RECONSTRUCTIONS = 4
"""Clips in the sample sheet of an autoencoder that is trained."""


def sample_reconstructions(module: AutoencoderModule, data: ClipData, folder: RunFolder, step: int) -> None:
    """Clips, held-out ones where there are any, beside what the autoencoder in training makes of them: MP4s and a
    contact sheet with rows of clips, reconstructions and four times their difference."""
    target, strips = folder.samples(str(module.recipe.stage), step), []
    shown = data.val_dataloader() or data.batches()
    clips = itertools.islice((clip for batch in shown for clip in batch.clips), RECONSTRUCTIONS)
    with module.averaged_weights(), torch.no_grad():
        for number, clip in enumerate(clips):
            video = as_floats(clip[None].to(module.device))
            rebuilt = module.reconstruct(module.posterior(video)[0], video.shape[2])
            one, other = as_frames(video), as_frames(rebuilt)
            strips += [one, other, error_frames(one, other)]
            save_video(beside(one, other), target / f"{number:02d}.mp4", module.recipe.data.fps, title="clip | latents")
    sheet = contact_sheet(strips, target / "sheet.png", ["clip", "reconstruction", "error x 4"] * (len(strips) // 3))
    log_sheet(module, sheet, step)


def log_sheet(module: Trained, sheet: Path, step: int) -> None:
    from lightning.pytorch.loggers import TensorBoardLogger, WandbLogger
    from PIL import Image

    tag, step = f"{module.recipe.stage or 'main'}/samples", module.steps_before + step
    for logger in module.loggers:
        if isinstance(logger, TensorBoardLogger):
            logger.experiment.add_image(tag, np.asarray(Image.open(sheet)), step, dataformats="HWC")
        elif isinstance(logger, WandbLogger):
            logger.log_image(tag, [str(sheet)], step=step)


def score_samples(folder: RunFolder, recipe: Recipe) -> None:
    """Judges colour, shape and motion of clips sampled for held-out captions, and of real ones to measure the judge
    itself."""
    from lingen.data.synthetic import captions as captions_of
    from lingen.data.synthetic import held_out_clips
    from lingen.metrics.shapes import score_clips as judge

    module = load_module(folder.weights(str(recipe.stage)), device=best_device())
    captions = list(itertools.islice(itertools.cycle(captions_of(recipe.score.split)), recipe.score.clips))
    clips = sample_clips(module, captions)
    real, real_captions = held_out_clips(recipe, recipe.score.clips, recipe.score.split)
    step = folder.finished_steps(str(recipe.stage))
    result = {
        "step": step,
        "split": recipe.score.split,
        "sampled": asdict(judge(clips, captions)),
        "real": asdict(judge(real, real_captions)),
    }
    target = folder.samples("score", step)
    contact_sheet(clips, target / "sheet.png", captions)
    save_video(clips[0], target / "00.mp4", recipe.data.fps, title=captions[0])
    write_json(folder.score, result)
