"""A curriculum: ordered stages, each one Trainer; the same command goes on where it was stopped."""

import json
import signal
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import lightning
import torch

from lingen.data.datamodule import ClipData
from lingen.data.ledger import DataError, Ledger
from lingen.data.starved import starved
from lingen.frozen import Missing, missing_of, refuse
from lingen.plan.forecast import plan, too_large
from lingen.recipe import Curriculum, load_for_training, to_yaml
from lingen.recipe.errors import RecipeError
from lingen.recipe.sections import Recipe
from lingen.sampling.samples import sample_prompts, sample_reconstructions, score_samples
from lingen.tables import as_table
from lingen.training import heartbeat, lock, record, sessions, signals
from lingen.training.base import NonFiniteError, Trained
from lingen.training.callbacks import ClipsDuringTraining, MetricsFile, Rows, StageEnd, StepEdge, Steps
from lingen.training.denoiser import LinGenModule
from lingen.training.folder import RunFolder
from lingen.training.identity import Stage, described, ranks_here
from lingen.training.ranks import is_first_rank
from lingen.training.signs import LifeSigns
from lingen.training.trainer import build_trainer, quiet_lightning
from lingen.training.weights import load_into, save_weights
from lingen.weights import check_checkpoint, find_weights, read_weights

__all__ = ["NonFiniteError", "Outcome", "Reporter", "fit", "fit_curriculum"]


class Reporter:
    """Receives what a run reports; this base class ignores it."""

    def stage(self, recipe: Recipe, number: int, count: int, done: int) -> None:
        """Called when a stage starts, of which `done` steps are trained already."""

    def step(self, step: int) -> None:
        """Called after an optimiser step."""

    def row(self, row: dict[str, Any]) -> None:
        """Called with each row of metrics.csv."""

    def say(self, text: str) -> None:
        """Called with a line of text for the user."""


@dataclass(frozen=True)
class Outcome:
    """How a run ended."""

    folder: RunFolder

    @property
    def is_first_rank(self) -> bool:
        """Whether this process is rank 0, which reports for all ranks."""
        return is_first_rank()


def fit(
    recipe: str | Path, overrides: Sequence[str] = (), *, run: str | Path | None = None, stage: str | None = None
) -> Path:
    """Trains a recipe as ``lingen fit`` does: every stage that is not finished, each handing over to the next. The same
    call again goes on where it was stopped.

    Args:
        recipe: path or name.
        overrides: ``key=value`` and ``stages.NAME.key=value``.
        run: run folder; default ``runs/<recipe>-<fingerprint>`` in the current folder, by identity and first course.
        stage: train only this one.
    Returns:
        The run folder.
    Raises:
        RecipeError: before anything starts, for mistakes in any stage, a strategy that shards, a folder that holds
            another run or a finished stage of another course, or one that another process trains in.
        IncompleteError: a rank holds only a part of what is to be written.
        DataError: too many broken samples.
        NonFiniteError: too many steps without a finite gradient.
        KeyboardInterrupt, SystemExit: a signal stopped it, after a checkpoint; SystemExit has the code 75.
    """
    try:
        with signals.listening():
            return fit_curriculum(load_for_training(recipe, overrides, stage), run=run, stage=stage).folder.path
    except signals.Stopped as stopped:
        raise KeyboardInterrupt if stopped.number == signal.SIGINT else SystemExit(stopped.code) from None


def fit_curriculum(
    curriculum: Curriculum,
    *,
    run: str | Path | None = None,
    stage: str | None = None,
    reporter: Reporter | None = None,
) -> Outcome:
    """Trains a loaded recipe; arguments and errors of `fit`, but a signal raises `Stopped`."""
    reporter = reporter or Reporter()
    stages, chosen = curriculum.stages, curriculum.chosen(stage)
    told = described(stages) if is_first_rank() or not run else {}
    say = reporter.say if is_first_rank() else Reporter().say
    folder = RunFolder(Path(run) if run else record.default_path(stages[0].name, told, say))
    signals.promptly(lambda: check_inputs(chosen, folder))  # indexes of many shards take minutes to make
    for text in (too_large(plan(one), one) for one in _unfinished(folder, chosen) if is_first_rank()):
        if text is not None:
            say(f"warning: {text}")
    if not is_first_rank():
        return _train(folder, curriculum, chosen, reporter)
    with _on_record(folder, curriculum, told, chosen, reporter) as (written, alone):
        return _train(folder, written, chosen, alone)


@contextmanager
def _on_record(
    folder: RunFolder, curriculum: Curriculum, told: dict[str, Stage], chosen: Sequence[Recipe], reporter: Reporter
) -> Iterator[tuple[Curriculum, Reporter]]:
    """Inside the block the folder is this process's alone and says what is trained. Where nothing is left to do,
    nothing is written. Gives the recipe as it is on record, and a reporter that stops a run which another one took."""
    lock.check_unlocked(folder.path)
    unfinished = _unfinished(folder, chosen)
    begins = str((unfinished or [chosen[-1]])[0].stage)
    record.start(folder, curriculum, told, begins)  # refuses before anything is written
    if not unfinished and not _is_score_due(folder, curriculum.stages[-1]):
        yield curriculum, reporter
        return
    with lock.locked(folder.path) as held:
        if held.was:
            reporter.say(f"goes on in {folder.path}: {held.was}")
        begun = record.start(folder, curriculum, told, begins)  # anew: another process may have been here a moment ago
        record.put_on_record(folder, begun)
        for line in begun.lines:
            reporter.say(line)
        ranks = ranks_here(curriculum.stages[0])
        with (
            sessions.session(folder, stage=begins, ranks=ranks, was=held.was) as mark,
            heartbeat.beating(folder.ranks, 0, ranks, mark),
        ):
            yield curriculum._replace(base=begun.base), _Alone(reporter, held)


def _unfinished(folder: RunFolder, stages: Sequence[Recipe]) -> list[Recipe]:
    return [one for one in stages if folder.finished_steps(str(one.stage)) < one.train.steps]


def _is_score_due(folder: RunFolder, last: Recipe) -> bool:
    steps = folder.finished_steps(str(last.stage))
    return bool(last.score.clips and steps and scored_steps(folder) != steps)


class _Alone(Reporter):
    """Hands everything on, and ends the run at the next step where another process has taken its folder over."""

    def __init__(self, reporter: Reporter, held: lock.Lock):
        self.stage, self.row, self.say = reporter.stage, reporter.row, reporter.say  # type: ignore[method-assign]
        self._step, self._held = reporter.step, held

    def step(self, step: int) -> None:
        self._held.check()
        self._step(step)


def _train(folder: RunFolder, curriculum: Curriculum, chosen: Sequence[Recipe], reporter: Reporter) -> Outcome:
    """Every chosen stage that is not finished, and the score."""
    stages, names = curriculum.stages, curriculum.names
    for index, settings in enumerate(stages):
        if settings not in chosen:
            continue
        if folder.finished_steps(names[index]) >= settings.train.steps:
            reporter.say(f"stage {names[index]} is finished: {folder.weights(names[index])}")
            continue
        signals.check()
        reporter.stage(settings, index + 1, len(stages), done=folder.last_step(names[index]))
        train_stage(folder, curriculum, index, reporter)
    if stages[-1].score.clips and folder.weights(names[-1]).is_file() and is_first_rank():
        if not _is_score_due(folder, stages[-1]):
            reporter.say(f"the score stands in {folder.score}")
        else:
            reporter.say(f"judging {stages[-1].score.clips} clips of held-out captions")
            score_samples(folder, stages[-1])
    return Outcome(folder)


def check_inputs(stages: Sequence[Recipe], folder: RunFolder) -> None:
    """RecipeError where weights of a frozen part, shards or `init` are not there, before anything is built."""
    for recipe in stages:
        for checkpoint in folder.checkpoints(str(recipe.stage))[-1:]:
            check_checkpoint(checkpoint)
        _check_samples(recipe)
        refuse(missing_parts(recipe, begun=bool(folder.checkpoints(str(recipe.stage)))))
        if recipe.init is not None:
            find_weights(recipe.init)


def _check_samples(recipe: Recipe) -> None:
    """RecipeError where shards are not there, or hold too few samples that fit the stage for a step. Shards are opened,
    nothing is decoded; clips that lingen draws itself fit."""
    data = ClipData(recipe)
    data.check()
    if recipe.data.shards.image or recipe.data.shards.video:
        try:
            data.setup()
        except DataError as error:
            raise RecipeError(f"stage {recipe.stage}: {error}") from error
        if problems := list(starved(recipe, data, ranks_here(recipe))):
            raise RecipeError(*problems)


def missing_parts(recipe: Recipe, *, begun: bool = False) -> list[Missing]:
    """What the frozen parts of a stage lack. Shards are opened only where something is missing: with encoded
    shards, text encoders and autoencoder are needed for sampled clips alone.

    Args:
        begun: there is a checkpoint of the stage, so it needs no weights to start from.
    """
    lacks = missing_of(recipe.subject.frozen_parts(recipe, begun=begun))
    if not lacks or not recipe.subject.encoded or not _is_encoded(recipe):
        return lacks
    if not (recipe.sample.prompts or recipe.score.clips):
        return []
    reason = "needed for clips alone, since the shards are encoded: sample.prompts=[] score.clips=0 trains without"
    return [one._replace(cure=f"{one.cure.rstrip('.')} ({reason}).") for one in lacks]


def _is_encoded(recipe: Recipe) -> bool:
    shards = recipe.data.shards
    return bool(shards.image or shards.video) and ClipData(recipe).needs_no_encoders


def scored_steps(folder: RunFolder) -> int:
    """Steps of the weights that were scored; 0: none."""
    return int(json.loads(folder.score.read_text())["step"]) if folder.score.is_file() else 0


def train_stage(folder: RunFolder, curriculum: Curriculum, index: int, reporter: Reporter) -> None:
    """One Trainer's fit. Stopped, after a checkpoint, where a signal came."""
    recipe = curriculum.stages[index]
    name = str(recipe.stage)
    done = folder.last_step(name)
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
        save_weights(folder.weights(name), module, to_yaml(curriculum.base), step)
        sample(module, step)

    callbacks = [Rows(), edge, ClipsDuringTraining(sample), StageEnd(finish), Steps(reporter.step), LifeSigns(name)]
    trainer = build_trainer(recipe, folder, callbacks)
    lightning.seed_everything(recipe.seed, verbose=False)
    module = recipe.subject.build_module(recipe)
    module.write_row = MetricsFile(folder.metrics, name, done, reporter.row).write
    module.steps_before = sum(stage.train.steps for stage in curriculum.stages[:index])
    if done == 0:
        hand_over(module, folder, curriculum.stages, index, reporter)
    signals.check()
    with warnings.catch_warnings():
        quiet_lightning()
        trainer.fit(module, datamodule=data, ckpt_path=checkpoint_path(folder, name), weights_only=True)
    if trainer.global_step >= recipe.train.steps > folder.finished_steps(name) and trainer.is_global_zero:
        finish(module, trainer.global_step)  # killed between the last checkpoint and the weights
    reporter.say(report(edge.ledger))
    if edge.stopped is not None:
        raise signals.Stopped(edge.stopped)


def report(ledger: Ledger) -> str:
    """How many samples of a stage were used and dropped: a sentence, and a table where any was dropped."""
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
