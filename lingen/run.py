"""A curriculum: ordered stages, each one Trainer; the same command goes on where it was stopped."""

from __future__ import annotations

import json
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import lightning
import torch

from lingen.data.datamodule import ClipData
from lingen.data.ledger import Ledger
from lingen.frozen import Missing, missing_of, refuse
from lingen.recipe import load_recipe, load_stages, refuse_sharding, to_yaml
from lingen.recipe.registry import AUTOENCODERS, TEXT_ENCODERS
from lingen.recipe.sections import Recipe
from lingen.sampling.samples import sample_prompts, sample_reconstructions, score
from lingen.tables import as_table
from lingen.training.base import NonFiniteError, Trained
from lingen.training.callbacks import ClipsDuringTraining, MetricsFile, Rows, StageEnd, StepEdge, Steps
from lingen.training.denoiser import LinGenModule
from lingen.training.folder import RunFolder, default_path
from lingen.training.ranks import is_first_rank
from lingen.training.trainer import build_trainer, quiet_lightning
from lingen.weights import find_weights, load_into, read_weights, save_weights

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
        RecipeError: before anything starts, for mistakes in any stage, a strategy that shards, or a folder of another
            run.
        IncompleteError: a rank holds only a part of what is to be written.
        DataError: too many broken samples.
        NonFiniteError: too many steps without a finite gradient.
    """
    reporter = reporter or Reporter()
    refuse_sharding(recipe, overrides, stage)
    base, stages = load_recipe(recipe, overrides), load_stages(recipe, overrides)
    names = [str(s.stage) for s in stages]
    if stage is not None:
        load_recipe(recipe, overrides, stage=stage)  # says which stages there are
    folder = RunFolder(Path(run) if run else default_path(stages))
    check_inputs([s for s in stages if stage in (None, s.stage)], folder)
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
        if scored_steps(folder) == folder.finished_steps(names[-1]):
            reporter.say(f"the score stands in {folder.score}")
        else:
            reporter.say(f"judging {stages[-1].score.clips} clips of held-out captions")
            score(folder, stages[-1])
    return Outcome(folder)


def check_inputs(stages: Sequence[Recipe], folder: RunFolder) -> None:
    """RecipeError where weights of a frozen part, shards or `init` are not there, before anything is built."""
    for recipe in stages:
        ClipData(recipe).check()
        refuse(missing_parts(recipe, begun=bool(folder.checkpoints(str(recipe.stage)))))
        if recipe.init is not None:
            find_weights(recipe.init)


def missing_parts(recipe: Recipe, *, begun: bool = False) -> list[Missing]:
    """What of the frozen parts a stage needs, and is not there. Shards are opened only where something is missing: of
    encoded ones, text encoders and autoencoder are needed for samples alone.

    Args:
        begun: there is a checkpoint of the stage, so it needs no weights to start from.
    """
    lacks = missing_of(frozen_parts(recipe, begun=begun))
    if not lacks or recipe.trains == "autoencoder" or not _is_encoded(recipe):
        return lacks
    if not (recipe.sample.prompts or recipe.score.clips):
        return []
    reason = "needed for clips alone, since the shards are encoded: sample.prompts=[] score.clips=0 trains without"
    return [one._replace(cure=f"{one.cure.rstrip('.')} ({reason}).") for one in lacks]


def _is_encoded(recipe: Recipe) -> bool:
    shards = recipe.data.shards
    return bool(shards.image or shards.video) and ClipData(recipe).needs_no_encoders


def frozen_parts(recipe: Recipe, *, begun: bool = False) -> list[Any]:
    """What a stage uses as it is: built on the meta device, nothing is read."""
    if recipe.trains == "autoencoder":
        from lingen.training.autoencoder import frozen_parts_of

        return frozen_parts_of(recipe, begun=begun)
    with torch.device("meta"):
        return [AUTOENCODERS.build(recipe.autoencoder), *(TEXT_ENCODERS.build(one) for one in recipe.text)]


def build_module(recipe: Recipe) -> Trained:
    """The LightningModule of what a stage trains."""
    if recipe.trains == "autoencoder":
        from lingen.training.autoencoder import AutoencoderModule

        return AutoencoderModule(recipe)
    return LinGenModule(recipe)


def scored_steps(folder: RunFolder) -> int:
    """Steps of the weights that were scored; 0: none."""
    return int(json.loads(folder.score.read_text())["step"]) if folder.score.is_file() else 0


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
    edge = StepEdge(folder, name, reporter.say)

    data = ClipData(recipe)
    data.start_step = done

    def sample(module: Trained, step: int) -> None:
        if isinstance(module, LinGenModule):
            sample_prompts(module, folder, step, recipe.sample.prompts)
        else:
            sample_reconstructions(cast(Any, module), data, folder, step)

    def finish(module: Trained, step: int) -> None:
        module.before_saving(data)
        save_weights(folder.weights(name), module, to_yaml(base), step)
        sample(module, step)

    callbacks = [Rows(), edge, ClipsDuringTraining(sample), StageEnd(finish), Steps(reporter.step)]
    trainer = build_trainer(recipe, folder, callbacks, MetricsFile(folder.metrics, name, done, reporter.row))
    lightning.seed_everything(recipe.seed, verbose=False)
    module = build_module(recipe)
    if done == 0:
        hand_over(module, folder, stages, index, reporter)
    with warnings.catch_warnings():
        quiet_lightning()
        trainer.fit(module, datamodule=data, ckpt_path=checkpoint_path(folder, name), weights_only=True)
    if trainer.global_step >= recipe.train.steps > folder.finished_steps(name) and trainer.is_global_zero:
        finish(module, trainer.global_step)  # killed between the last checkpoint and the weights
    reporter.say(report(edge.ledger))
    return edge.signal if trainer.global_step < recipe.train.steps else None


def report(ledger: Ledger) -> str:
    """What became of the samples of a stage: a sentence, and a table where anything went wrong."""
    rows = ledger.rows()
    return ledger.summary() + (f"\n{as_table(rows, terminal=False)}" if len(rows) > 1 else "")


def checkpoint_path(folder: RunFolder, stage: str) -> str | None:
    checkpoints = folder.checkpoints(stage)
    return str(checkpoints[-1]) if checkpoints else None


def hand_over(module: Trained, folder: RunFolder, stages: Sequence[Recipe], index: int, reporter: Reporter) -> None:
    """Gives a fresh stage its weights: its own `init`, else the last finished stage's, else the recipe's `init`."""
    recipe = stages[index]
    before = folder.finished([str(s.stage) for s in stages[:index]])
    own_init = recipe.init if index == 0 or recipe.init != stages[0].init or not before else None
    if own_init is not None:
        source = find_weights(own_init)
    elif before:
        source = folder.weights(before[-1])
    else:
        reporter.say(f"stage {recipe.stage} starts from {module.begin()}")
        return
    load_into(module, read_weights(source, "raw") or read_weights(source, "averaged"), source)  # `lingen export`
    reporter.say(f"stage {recipe.stage} starts from {source}")
    if recipe.train.keep_optimizer and own_init is None:
        module.optimizer_state = read_optimizer(folder, before[-1])


def read_optimizer(folder: RunFolder, stage: str) -> dict[str, Any]:
    """AdamW's moments at the end of a stage."""
    state = torch.load(folder.checkpoints(stage)[-1], map_location="cpu", weights_only=True)
    return state["optimizer_states"][0]
