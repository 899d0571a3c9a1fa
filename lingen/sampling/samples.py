"""Clips sampled during a run: of the recipe's prompts while it trains, of held-out captions for the score."""

from __future__ import annotations

import io
import itertools
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from lingen.data.datamodule import ClipData
from lingen.files import write_json
from lingen.kernels.choice import best_device
from lingen.media import as_floats, as_frames, beside, contact_sheet, error_frames, gif_of, save_video
from lingen.metrics.measures import measure_clip
from lingen.ranks import signals
from lingen.ranks.collectives import on_first_rank
from lingen.ranks.heartbeat import sign
from lingen.recipe.sections import Recipe
from lingen.run_folder.folder import RunFolder
from lingen.sampling.clips import Take, clip_size, clips_of, decoded, sample_takes, takes_of
from lingen.sampling.notes import notes_of, notes_on
from lingen.training.base import Trained
from lingen.training.denoiser import LinGenModule
from lingen.training.weights import load_denoiser

if TYPE_CHECKING:
    from lingen.training.autoencoder import AutoencoderModule


def sample_prompts(module: LinGenModule, folder: RunFolder, step: int, prompts: Sequence[str]) -> None:
    """Clips of the prompts with the averaged weights: MP4s and a contact sheet, which go to loggers of pictures too.
    All ranks sample every clip together, since each may hold a part of the weights; the first one decodes and writes.
    Stopped, on all of them, between two clips where any got a signal.

    The MP4s note what `lingen sample` notes: with the stage's weights, once it is finished, they can be made again."""
    if not prompts:
        return
    target, takes = folder.samples(str(module.recipe.stage), step), takes_of(prompts)
    clip, how = clip_size(module), module.recipe.sample
    shared = notes_of(module, folder.weights(str(module.recipe.stage)), clip, how)
    clips: list[np.ndarray] = []

    def write(take: Take, latents: Tensor) -> None:
        clips.append(decoded(module, latents, clip, how))
        path = target / f"{len(clips) - 1:02d}.mp4"
        save_video(clips[-1], path, clip.fps, title=take.prompt, about=notes_on(shared, take, module.device))

    for take, latents in zip(takes, sample_takes(module, takes, clip, how), strict=True):
        on_first_rank(partial(write, take, latents))
        signals.check()
    on_first_rank(lambda: log_samples(module, contact_sheet(clips, target / SHEET, prompts, about=shared), step))


def evaluate_prompts(module: LinGenModule, captions: Sequence[str]) -> None:
    """Adds means over a clip of each caption to this step's row of metrics.csv; with the averaged weights, always from
    the same noise. All ranks sample together, the first one decodes and measures. Stopped as in `sample_prompts`."""
    clip, how, takes = clip_size(module), module.recipe.sample, takes_of(captions)
    found = {"evaluation/clips": [float(len(takes))]}

    def measure(take: Take, latents: Tensor) -> None:
        for name, value in measure_clip(decoded(module, latents, clip, how), clip.fps, take.prompt).items():
            found.setdefault(f"evaluation/{name}", []).append(value)

    for take, latents in zip(takes, sample_takes(module, takes, clip, how), strict=True):
        on_first_rank(partial(measure, take, latents))
        signals.check()
    module.log_row(on_first_rank(lambda: {name: float(np.mean(values)) for name, values in found.items()}))


SHEET = "sheet.png"
"""The last file of the clips of a step."""
EVALUATED = 8
"""Held-out captions whose clips are measured during training."""
RECONSTRUCTIONS = 4
"""Clips in the sample sheet of an autoencoder that is trained."""


def sample_reconstructions(module: AutoencoderModule, data: ClipData, folder: RunFolder, step: int) -> None:
    """Clips, held-out ones where there are any, beside what the autoencoder in training makes of them: MP4s and a
    contact sheet with rows of clips, reconstructions and four times their difference. For the first rank alone: an
    autoencoder is whole on every rank."""
    target, strips = folder.samples(str(module.recipe.stage), step), []
    shown = data.val_dataloader() or data.batches()
    clips = itertools.islice((clip for batch in shown for clip in batch.clips), RECONSTRUCTIONS)
    with module.averaged_weights(), torch.no_grad():
        for number, clip in enumerate(clips):
            sign("sampling")
            video = as_floats(clip[None].to(module.device))
            rebuilt = module.reconstruct(module.posterior(video)[0], video.shape[2])
            one, other = as_frames(video), as_frames(rebuilt)
            strips += [one, other, error_frames(one, other)]
            save_video(beside(one, other), target / f"{number:02d}.mp4", module.recipe.data.fps, title="clip | latents")
    sheet = contact_sheet(strips, target / SHEET, ["clip", "reconstruction", "error x 4"] * (len(strips) // 3))
    log_samples(module, sheet, step)


def log_samples(module: Trained, sheet: Path, step: int) -> None:
    """Gives loggers of pictures a contact sheet and, as video, the clips in its folder: W&B MP4s, TensorBoard GIFs."""
    from lightning.pytorch.loggers import TensorBoardLogger, WandbLogger
    from PIL import Image
    from tensorboard.compat.proto.summary_pb2 import Summary

    tag, step = f"{module.recipe.stage or 'main'}/samples", module.steps_before + step
    films = sorted(sheet.parent.glob("[0-9]*.mp4"))
    for logger in module.loggers:
        if isinstance(logger, TensorBoardLogger):
            for name, data in {tag: sheet.read_bytes(), **{f"{tag}/{one.stem}": gif_of(one) for one in films}}.items():
                width, height = Image.open(io.BytesIO(data)).size
                image = Summary.Image(height=height, width=width, colorspace=3, encoded_image_string=data)
                logger.experiment.file_writer.add_summary(Summary(value=[Summary.Value(tag=name, image=image)]), step)
        elif isinstance(logger, WandbLogger):
            logger.log_image(tag, [str(sheet)], step=step)
            logger.log_video(f"{tag}/clips", [str(one) for one in films], step=step)


def score_samples(folder: RunFolder, recipe: Recipe) -> Iterator[None]:
    """Judges colour, shape and motion of clips sampled for held-out captions, and of real ones to measure the judge
    itself. Yields after each clip: there it may be left."""
    from lingen.data.synthetic import captions as captions_of
    from lingen.data.synthetic import held_out_clips
    from lingen.metrics.shapes import score_clips as judge

    sign("score")
    module = load_denoiser(folder.weights(str(recipe.stage)), best_device())
    captions = list(itertools.islice(itertools.cycle(captions_of(recipe.score.split)), recipe.score.clips))
    clip, how, takes = clip_size(module, recipe.data.frames / recipe.data.fps), recipe.sample, takes_of(captions)
    shared = notes_of(module, folder.weights(str(recipe.stage)), clip, how)
    clips = []
    for frames in clips_of(module, takes, clip, how):
        clips.append(frames)
        yield
    sign("score")
    real, real_captions = held_out_clips(recipe, recipe.score.clips, recipe.score.split)
    step = folder.finished_steps(str(recipe.stage))
    scores = {"sampled": asdict(judge(clips, captions)), "real": asdict(judge(real, real_captions))}
    target = folder.samples("score", step)
    for number, (frames, take) in enumerate(zip(clips, takes, strict=True)):
        about = notes_on(shared, take, module.device)
        save_video(frames, target / f"{number:02d}.mp4", clip.fps, title=take.prompt, about=about)
        yield
    contact_sheet(clips, target / SHEET, captions, about=shared)
    for file in (target / folder.score.name, folder.score):
        write_json(file, {"step": step, "split": recipe.score.split, **scores})
