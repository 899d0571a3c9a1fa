"""A curriculum: ordered stages, each one Trainer; the same command goes on where it was stopped."""

import gc
import json
import signal
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, cast

import lightning
from lightning.pytorch.callbacks import Callback, LambdaCallback

from lingen.data.datamodule import ClipData
from lingen.plan.forecast import flop_a_step, plan
from lingen.plan.practice import note_of_warmup
from lingen.ranks import heartbeat, launch, local_ranks, signals, watchdog
from lingen.ranks.collectives import is_first_rank, on_first_rank, together
from lingen.ranks.environment import here
from lingen.recipe import Curriculum, load_for_training, to_yaml
from lingen.recipe.errors import RecipeError
from lingen.recipe.sections import Recipe
from lingen.run_folder import lock, record, sessions
from lingen.run_folder.folder import RunFolder
from lingen.run_folder.identity import described
from lingen.run_folder.intact import wait_for_files
from lingen.sampling import samples
from lingen.tables import as_table
from lingen.training.base import Trained
from lingen.training.begin import StageStart, hand_over, start_of
from lingen.training.callbacks import ClipsDuringTraining, LifeSigns, StageEnd, StepEdge
from lingen.training.denoiser import LinGenModule
from lingen.training.dry_run import too_large
from lingen.training.health import GoBack, NonFiniteError
from lingen.training.inputs import check_inputs
from lingen.training.reporter import LineReporter, Reporter, log_line
from lingen.training.rows import MetricsFile, Rows
from lingen.training.trainer import build_trainer, end_only, few_threads, quiet_lightning
from lingen.training.weights import save_weights

__all__ = ["NonFiniteError", "Reporter", "fit", "fit_curriculum"]


def fit(
    recipe: str | Path, overrides: Sequence[str] = (), *, run: str | Path | None = None, stage: str | None = None,
    callbacks: Sequence[Callback] = (),
) -> Path:  # fmt: skip
    """Trains a recipe as ``lingen fit`` does: every stage that is not finished, each handing over to the next. The same
    call again goes on where it was stopped. The lines of ``lingen fit`` (run folder, stages, losses) are INFO of the
    logger "lingen", or stand on stderr where nobody has set logging up.

    Args:
        recipe: path or name.
        overrides: ``key=value`` and ``stages.NAME.key=value``.
        run: run folder; default ``runs/<recipe>-<fingerprint>`` in the current folder, by identity and first course.
        stage: train only this one.
        callbacks: of Lightning's Trainer, beside lingen's own; the same objects in every stage.
    Returns:
        The run folder.
    Raises:
        RecipeError: before anything starts, for mistakes in any stage, a folder that holds
            another run or a finished stage of another course, or one that another process trains in.
        DataError: too many broken samples.
        NonFiniteError: too many steps without a finite gradient.
        KeyboardInterrupt, SystemExit: a signal stopped it, after a checkpoint; SystemExit has the code 75."""
    try:
        with signals.listening():
            curriculum = launch.load_together(lambda: load_for_training(recipe, overrides, stage))
            told = LineReporter(log_line)
            return fit_curriculum(curriculum, run=run, stage=stage, reporter=told, callbacks=callbacks).path
    except signals.Stopped as stopped:
        raise KeyboardInterrupt if stopped.number == signal.SIGINT else SystemExit(stopped.code) from None


def fit_curriculum(
    curriculum: Curriculum, *, run: str | Path | None = None, stage: str | None = None,
    reporter: Reporter | None = None, before: Callable[[RunFolder, list[Recipe]], None] | None = None,
    callbacks: Sequence[Callback] = (),
) -> RunFolder:  # fmt: skip
    """Trains a loaded recipe; arguments and errors of `fit`, but a signal raises `Stopped`. Returns the run folder.

    Args:
        before: called by all ranks with the stages that are not finished, before the first of them."""
    launch.join()
    reporter = reporter if reporter and is_first_rank() else Reporter()
    try:
        with ExitStack() as held:
            begun = on_first_rank(lambda: _begin(curriculum, stage, run, reporter, held))
            if local_ranks.start_ranks(begun.ranks):
                on_first_rank(lambda: begun)
            folder, place = RunFolder(begun.folder), here()
            if begun.session is not None:
                writer = held.enter_context(heartbeat.heartbeats(folder.ranks, place.rank, place.ranks, begun.session))
                limits = [one.train.watchdog for one in begun.curriculum.stages]
                held.enter_context(watchdog.watching(writer, begun.session, limits))
            signals.check()
            unfinished = on_first_rank(partial(_unfinished, folder, begun.curriculum.chosen(stage)))
            if before is not None and unfinished:
                before(folder, unfinished)
                signals.check()
            return _train(folder, begun.curriculum, begun.curriculum.chosen(stage), begun.start, reporter, callbacks)
    except signals.Stopped:  # on all ranks
        local_ranks.end_ranks()
        raise
    except BaseException as error:
        local_ranks.give_up(getattr(error, "hung", False))
        raise


class _Begun(NamedTuple):
    """What rank 0 found and did before the first stage."""

    folder: Path
    curriculum: Curriculum
    """As it is on record."""
    ranks: int
    """Of the run, where the others are not there yet; else 1."""
    session: str | None = None
    """Its mark; None: there is nothing to train."""
    start: StageStart | None = None
    """Of the first stage that is trained."""


def _begin(
    curriculum: Curriculum, stage: str | None, run: str | Path | None, reporter: Reporter, held: ExitStack
) -> _Begun:
    """For rank 0: whatever would stop the run is said, then the folder is this run's alone until `held` is closed, and
    says what is trained. Where nothing is left to do, or a signal has come, nothing is written."""
    chosen, told = curriculum.chosen(stage), described(curriculum.stages)
    folder = RunFolder(Path(run) if run else record.default_path(curriculum.stages[0].name, told, reporter.say))
    unfinished = _unfinished(folder, chosen)
    ranks = launch.ranks_to_start(unfinished)
    signals.promptly(lambda: check_inputs(chosen, folder))  # indexes of many shards take minutes to make
    if signals.noted() is not None:
        return _Begun(folder.path, curriculum, 1)
    plans = {str(one.stage): plan(one) for one in unfinished}
    for text in filter(None, (too_large(one, plans[str(one.stage)]) for one in unfinished)):
        reporter.say(f"warning: {text}")
    lock.check_unlocked(folder.path)
    begins = str((unfinished or [chosen[-1]])[0].stage)
    record.start(folder, curriculum, told, begins)  # refuses before anything is written
    if not unfinished and not _is_score_due(folder, curriculum.stages[-1]):
        return _Begun(folder.path, curriculum, ranks)
    own = held.enter_context(lock.locked(folder.path))
    if own.was:
        reporter.say(f"goes on in {folder.path}: {own.was}")
    start = start_of(folder, curriculum.stages, curriculum.names.index(begins), reporter.say)
    step = start.step if start is not None else folder.last_step(begins)
    begun = record.start(folder, curriculum, told, begins, step)  # anew: another process may have just been here
    record.put_on_record(folder, begun)
    reporter.say(f"run folder: {folder.path}")
    for line in begun.lines:
        reporter.say(line)
    flop = {str(one.stage): flop_a_step(one, plans[str(one.stage)]) for one in unfinished}
    reporter.flop = {str(one.stage): one.train.steps * flop[str(one.stage)] for one in unfinished}
    mark = held.enter_context(
        sessions.session(folder, stage=begins, step=step, ranks=max(ranks, here().ranks), was=own.was, flop=flop)
    )
    return _Begun(folder.path, curriculum._replace(base=begun.base), ranks, mark, start)


def _unfinished(folder: RunFolder, stages: Sequence[Recipe]) -> list[Recipe]:
    return [one for one in stages if folder.finished_steps(str(one.stage)) < one.train.steps]


def is_complete(folder: RunFolder, curriculum: Curriculum) -> bool:
    """Whether `fit` has nothing left to do in a folder."""
    return not _unfinished(folder, curriculum.stages) and not _is_score_due(folder, curriculum.stages[-1])


def _is_score_due(folder: RunFolder, last: Recipe) -> bool:
    steps = folder.finished_steps(str(last.stage))
    scored = int(json.loads(folder.score.read_text())["step"]) if folder.score.is_file() else 0
    return bool(last.score.clips and steps and scored != steps)


def _train(
    folder: RunFolder, curriculum: Curriculum, chosen: Sequence[Recipe], first: StageStart | None, reporter: Reporter,
    callbacks: Sequence[Callback],
) -> RunFolder:  # fmt: skip
    """Every chosen stage that is not finished, the first of them from `first`, and the score."""
    stages, names, moved = curriculum.stages, curriculum.names, ""
    for index, settings in enumerate(stages):
        if settings not in chosen:
            continue
        writer = heartbeat.own_writer()
        writer.limit = settings.train.watchdog
        writer.sign("start")
        known = first is not None and first.stage == names[index]
        start = first if known else on_first_rank(partial(start_of, folder, stages, index, reporter.say))
        if moved and (start is None or start.step):
            told = "began from what that was before; for one that begins from what it is now, take another --run"
            reporter.say(f"stage {moved} was trained on, but stage {names[index]} {told}")
        if start is None:
            reporter.say(f"stage {names[index]} is finished: {folder.weights(names[index])}")
            continue
        signals.check()
        reporter.stage(settings, index + 1, len(stages), done=start.step)
        if note := note_of_warmup(settings):
            reporter.say(note)
        train_stage(folder, curriculum, index, start, reporter, callbacks)
        moved = names[index]
    signals.by_first_rank(lambda: _score(folder, stages[-1], reporter))
    return folder


def _score(folder: RunFolder, last: Recipe, reporter: Reporter) -> Iterator[None]:
    if not last.score.clips or not folder.weights(str(last.stage)).is_file():
        return
    if not _is_score_due(folder, last):
        reporter.say(f"the score stands in {folder.score}")
        return
    reporter.say(f"judging {last.score.clips} clips of held-out captions")
    yield from samples.score_samples(folder, last)


def train_stage(
    folder: RunFolder, curriculum: Curriculum, index: int, start: StageStart, reporter: Reporter,
    callbacks: Sequence[Callback] = (),
) -> None:  # fmt: skip
    """Trains a stage, and goes back in it where `train.on_spike` says so. Stopped, after a checkpoint, where a signal
    came; NonFiniteError where the way back to one place does not help."""
    stages, past = curriculum.stages, None
    while (past := _fit_once(folder, curriculum, index, start, past, reporter, callbacks)) is not None:
        heartbeat.sign("start")
        gc.collect()  # the Trainer and the model that it was left with are a circle
        every = stages[index].train.checkpoint_every
        start = cast(StageStart, on_first_rank(partial(start_of, folder, stages, index, reporter.say, every)))
        past.count_return(start.step)
        reporter.say(f"goes back to step {start.step}, and past the samples up to step {past.step}")


def _fit_once(
    folder: RunFolder, curriculum: Curriculum, index: int, start: StageStart, past: GoBack | None, reporter: Reporter,
    more: Sequence[Callback],
) -> GoBack | None:  # fmt: skip
    """One Trainer's fit; the spike for which it was left, if it was.

    Args:
        past: the spike for which the stage went back to `start`.
        more: callbacks of the user's."""
    recipe = curriculum.stages[index]
    name = str(recipe.stage)
    edge = StepEdge(folder, name, reporter.say)

    data = ClipData(recipe)
    data.start_step = start.step
    rows = together(lambda: MetricsFile(folder.metrics, name, start.step, reporter.row))
    is_evaluated = partial(rows.holds, name="evaluation/clips")

    def sample(module: Trained, step: int) -> None:
        if isinstance(module, LinGenModule):
            samples.sample_prompts(module, folder, step, recipe.sample.prompts)
        else:
            on_first_rank(partial(samples.sample_reconstructions, cast(Any, module), data, folder, step))
        signals.check()

    def evaluate(module: Trained, step: int) -> None:
        captions = on_first_rank(lambda: data.held_out_captions(samples.EVALUATED))
        samples.evaluate_prompts(cast(LinGenModule, module), captions)

    def finish(module: Trained, step: int) -> None:
        module.before_saving(data)
        sample(module, step)
        if recipe.train.evaluate_every and not on_first_rank(lambda: is_evaluated(step)):
            evaluate(module, step)
        if index == len(curriculum.stages) - 1:  # it is of weights that go now; samples/score-STEP keeps it
            on_first_rank(partial(folder.score.unlink, missing_ok=True))
        # They come last: a stage that has weights owes nothing.
        save_weights(folder.weights(name), module, to_yaml(curriculum.base), step)

    def build() -> tuple[lightning.Trainer, Trained]:
        clips = ClipsDuringTraining(
            sample, lambda step: (folder.samples(name, step) / samples.SHEET).is_file(), edge, "sample_every"
        )
        measured = ClipsDuringTraining(evaluate, is_evaluated, edge, "evaluate_every")
        steps = LambdaCallback(on_train_batch_end=lambda trainer, *_: reporter.step(trainer.global_step))
        callbacks = [*more, Rows(), edge, clips, measured, StageEnd(finish, edge), steps, LifeSigns(name)]
        trainer = build_trainer(recipe, folder, callbacks)
        lightning.seed_everything(recipe.seed, verbose=False)
        module = recipe.subject.build_module(recipe)
        module.write_row = rows.write
        module.say, module.past = reporter.say, past
        module.steps_before = sum(stage.train.steps for stage in curriculum.stages[:index])
        if start.checkpoint is None:
            hand_over(module, start, reporter.say)
        else:
            module.checkpoint = wait_for_files(start.checkpoint)
        return trainer, module

    trainer, module = together(build)
    signals.check()
    if start.step >= recipe.train.steps:
        end_only(trainer)
    with warnings.catch_warnings(), few_threads(recipe):
        quiet_lightning()
        try:
            trainer.fit(module, datamodule=data)
        except GoBack as found:
            return found.with_traceback(None)  # which holds the model
    dropped = edge.ledger.rows()
    reporter.say(edge.ledger.summary() + (f"\n{as_table(dropped, terminal=False)}" if len(dropped) > 1 else ""))
    if edge.stopped is not None:
        raise signals.Stopped(edge.stopped)
    if trainer.global_step < recipe.train.steps:
        raise RecipeError(
            f"A callback ended stage '{name}' at step {trainer.global_step} of {recipe.train.steps}. Stages end by "
            "train.steps: take it out of trainer.callbacks, and the same command goes on from the last checkpoint."
        )
    return None
