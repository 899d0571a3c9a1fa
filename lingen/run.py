"""A curriculum: ordered stages, each one Trainer; the same command goes on where it was stopped."""

from __future__ import annotations

import itertools
import json
import logging
import os
import warnings
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import lightning
import torch
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.loggers.logger import Logger

from lingen.callbacks import ClipsDuringTraining, MetricsFile, Rows, StageEnd, StepEdge, Steps
from lingen.config import Component, Recipe
from lingen.data.datamodule import ClipData
from lingen.data.ledger import Ledger
from lingen.folder import RunFolder, as_json, default_path, write_text
from lingen.generate import best_device, clip_size, decode, sample_latents
from lingen.module import LinGenModule, NonFiniteError
from lingen.ranks import is_first_rank
from lingen.recipe import load_recipe, load_stages, to_yaml
from lingen.registry import RecipeError, import_object
from lingen.video import contact_sheet, save_video
from lingen.weights import find_weights, load_into, load_module, read_weights, save_weights

__all__ = ["NonFiniteError", "Outcome", "Reporter", "fit"]


class Reporter:
    """Hears what a run does; this one keeps quiet."""

    def stage(self, recipe: Recipe, number: int, count: int, done: int) -> None:
        """A stage starts, `done` of its steps are trained already."""

    def step(self, step: int) -> None:
        """An optimiser step is done."""

    def row(self, row: dict[str, Any]) -> None:
        """A line of metrics.csv."""

    def say(self, text: str) -> None:
        """Something worth a line."""


@dataclass(frozen=True)
class Outcome:
    """How a run ended."""

    folder: RunFolder
    signal: int | None = None
    """The signal that stopped it before its end."""

    @property
    def is_first_rank(self) -> bool:
        """Is this the process that speaks for all ranks?"""
        return is_first_rank()


def fit(
    recipe: str | Path,
    overrides: Sequence[str] = (),
    *,
    run: str | Path | None = None,
    stage: str | None = None,
    reporter: Reporter | None = None,
) -> Outcome:
    """Trains every stage that is not finished, hands over from each to the next, samples and scores.

    Args:
        recipe: path or name.
        overrides: ``key=value`` and ``stages.NAME.key=value``.
        run: run folder; default ``runs/<recipe>-<fingerprint>`` in the current folder.
        stage: train only this one.
    Raises:
        RecipeError: before anything starts, for mistakes in any stage or a folder of another run.
        DataError: too many broken samples.
        NonFiniteError: too many steps without a finite gradient.
    """
    reporter = reporter or Reporter()
    base, stages = load_recipe(recipe, overrides), load_stages(recipe, overrides)
    names = [str(s.stage) for s in stages]
    if stage is not None:
        load_recipe(recipe, overrides, stage=stage)  # says which stages there are
    folder = RunFolder(Path(run) if run else default_path(stages))
    if is_first_rank():
        folder.open(stages, to_yaml(base))
    for index, settings in enumerate(stages):
        if stage not in (None, names[index]):
            continue
        if folder.finished_steps(names[index]) >= settings.train.steps:
            reporter.say(f"stage {names[index]} is finished: {folder.weights(names[index])}")
            continue
        reporter.stage(settings, index + 1, len(stages), done=last_step(folder, names[index]))
        number = train_stage(folder, base, stages, index, reporter)
        if number is not None:
            return Outcome(folder, number)
    if stages[-1].score.clips and folder.weights(names[-1]).is_file() and is_first_rank():
        score(folder, stages[-1], reporter)
    return Outcome(folder)


def last_step(folder: RunFolder, stage: str) -> int:
    """Step of the newest checkpoint; 0: none."""
    checkpoints = folder.checkpoints(stage)
    return int(checkpoints[-1].stem.removeprefix("step-")) if checkpoints else 0


def train_stage(
    folder: RunFolder, base: Recipe, stages: Sequence[Recipe], index: int, reporter: Reporter
) -> int | None:
    """One Trainer's fit. Returns the signal that stopped it, if one did."""
    recipe = stages[index]
    name = str(recipe.stage)
    done = last_step(folder, name)
    lightning.seed_everything(recipe.seed, verbose=False)
    module = LinGenModule(recipe)
    if done == 0:
        hand_over(module, folder, stages, index, reporter)
    data = ClipData(recipe)
    data.start_step = done
    edge = StepEdge(folder, name, Ledger())

    def sample(module: LinGenModule, step: int) -> None:
        sample_prompts(module, folder, step, recipe.sample.prompts)

    def finish(module: LinGenModule, step: int) -> None:
        save_weights(folder.weights(name), module, to_yaml(base), step)
        sample(module, step)

    callbacks = [Rows(), edge, ClipsDuringTraining(sample), StageEnd(finish), Steps(reporter.step)]
    metrics = MetricsFile(folder.metrics, name, done, reporter.row)
    trainer = build_trainer(recipe, folder, callbacks, metrics)
    with warnings.catch_warnings():
        quiet_lightning()
        trainer.fit(module, datamodule=data, ckpt_path=checkpoint_path(folder, name), weights_only=True)
    if trainer.global_step >= recipe.train.steps > folder.finished_steps(name) and trainer.is_global_zero:
        finish(module, trainer.global_step)  # killed between the last checkpoint and the weights
    dropped = edge.ledger.summary()
    if dropped:
        reporter.say(dropped)
    return edge.signal if trainer.global_step < recipe.train.steps else None


def checkpoint_path(folder: RunFolder, stage: str) -> str | None:
    checkpoints = folder.checkpoints(stage)
    return str(checkpoints[-1]) if checkpoints else None


def hand_over(
    module: LinGenModule, folder: RunFolder, stages: Sequence[Recipe], index: int, reporter: Reporter
) -> None:
    """Gives a fresh stage its weights: its own `init`, else the last finished stage's, else the recipe's `init`."""
    recipe = stages[index]
    before = folder.finished([str(s.stage) for s in stages[:index]])
    own_init = recipe.init if index == 0 or recipe.init != stages[0].init or not before else None
    if own_init is not None:
        source = find_weights(own_init)
    elif before:
        source = folder.weights(before[-1])
    else:
        reporter.say(f"stage {recipe.stage} starts from random weights")
        return
    load_into(module, read_weights(source, "raw"), source)
    reporter.say(f"stage {recipe.stage} starts from {source}")
    if recipe.train.keep_optimizer and own_init is None:
        module.optimizer_state = read_optimizer(folder, before[-1])


def read_optimizer(folder: RunFolder, stage: str) -> dict[str, Any]:
    """AdamW's moments at the end of a stage."""
    state = torch.load(folder.checkpoints(stage)[-1], map_location="cpu", weights_only=True)
    return state["optimizer_states"][0]


def build_trainer(recipe: Recipe, folder: RunFolder, callbacks: list[Callback], metrics: Logger) -> lightning.Trainer:
    """lightning.Trainer with the recipe's arguments and ours."""
    arguments = dict(recipe.trainer)
    loggers = [metrics, *(build_logger(one, folder) for one in listed(arguments.pop("logger", "tensorboard")))]
    settings = recipe.train
    batches = settings.steps * settings.accumulate
    every = settings.validate_every * settings.accumulate or batches
    from lightning.pytorch.plugins.environments import SLURMEnvironment

    if SLURMEnvironment.detect():
        # Lightning's own requeue handler saves inside the signal handler; ours waits for the step's edge.
        arguments.setdefault("plugins", [SLURMEnvironment(auto_requeue=False)])
    with warnings.catch_warnings():
        quiet_lightning()
        return lightning.Trainer(
            **arguments,
            max_steps=settings.steps,
            max_epochs=-1,
            min_epochs=0,
            accumulate_grad_batches=settings.accumulate,
            val_check_interval=min(every, batches),
            check_val_every_n_epoch=None,
            num_sanity_val_steps=0,
            log_every_n_steps=1,
            logger=loggers,
            callbacks=callbacks,
            default_root_dir=folder.path,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            use_distributed_sampler=False,
        )


LOGGERS = {
    "tensorboard": "lightning.pytorch.loggers:TensorBoardLogger",
    "wandb": "lightning.pytorch.loggers:WandbLogger",
    "mlflow": "lightning.pytorch.loggers:MLFlowLogger",
    "comet": "lightning.pytorch.loggers:CometLogger",
    "neptune": "lightning.pytorch.loggers:NeptuneLogger",
}


def listed(value: Any) -> list[Any]:
    """`trainer.logger` in all its spellings: false or null, a name, a component, a list of them."""
    if value in (None, False):
        return []
    return list(value) if isinstance(value, list | tuple) else ["tensorboard" if value is True else value]


def build_logger(component: str | Component, folder: RunFolder) -> Logger:
    """Any Lightning logger: a short name or ``module:Class``, with its own arguments."""
    settings = {"name": component} if isinstance(component, str) else dict(component)
    name = settings.pop("name")
    if name not in LOGGERS and ":" not in name:
        raise RecipeError(
            f"There is no logger called '{name}'. Known: {', '.join(LOGGERS)}. Or write 'module:Class'. "
            "(at trainer.logger)"
        )
    if name == "tensorboard":
        settings = {"save_dir": str(folder.path), "name": "tensorboard", "version": ""} | settings
    return import_object(LOGGERS.get(name, name))(**settings)


def quiet_lightning() -> None:
    """Silences advice that does not apply: the loader is endless by design, and its workers are a setting."""
    for text in (
        ".*does not have many workers.*",
        ".*max_epochs.*",
        ".*GPU available but not used.*",
        ".*in eval mode.*",
        ".*isinstance.treespec.*",
        ".*Total length of.*",
    ):
        warnings.filterwarnings("ignore", message=text)
    if not os.environ.get("LINGEN_DEBUG"):
        for name in ("lightning.pytorch", "lightning.fabric"):
            logging.getLogger(name).setLevel(logging.WARNING)


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
    clip = clip_size(module)
    was_training = module.training
    module.eval()
    clips: list[Any] = []
    with module.averaged_weights():
        for first in range(0, len(prompts), batch):
            latents = sample_latents(module, prompts[first : first + batch], clip, module.recipe.sample, first=first)
            clips += decode(module.autoencoder, latents, clip.frames)
    module.train(was_training)
    return clips


def log_sheet(module: LinGenModule, sheet: Path, step: int) -> None:
    from lightning.pytorch.loggers import TensorBoardLogger, WandbLogger
    from PIL import Image

    for logger in module.loggers:
        if isinstance(logger, TensorBoardLogger):
            import numpy as np

            logger.experiment.add_image("samples", np.asarray(Image.open(sheet)), step, dataformats="HWC")
        elif isinstance(logger, WandbLogger):
            logger.log_image("samples", [str(sheet)], step=step)


def score(folder: RunFolder, recipe: Recipe, reporter: Reporter) -> None:
    """Judges colour, shape and motion of clips sampled for held-out captions, and of real ones to judge the judge."""
    from lingen.data.synthetic import captions as captions_of
    from lingen.data.synthetic import held_out_clips
    from lingen.metrics.shapes import score as judge

    if folder.score.is_file() and json.loads(folder.score.read_text())["step"] == folder.finished_steps(
        str(recipe.stage)
    ):
        reporter.say(f"the score stands in {folder.score}")
        return
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
    write_text(folder.score, as_json(result))
