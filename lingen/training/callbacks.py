"""What happens between optimiser steps: checkpoints, signals, the ledger, samples, signs of life."""

import logging
from collections.abc import Callable, Iterator
from itertools import islice
from typing import Any, cast

import lightning
from lightning.pytorch.callbacks import Callback

from lingen.data.batch import Batch, Drop
from lingen.data.ledger import DataError, Ledger
from lingen.ranks import signals
from lingen.ranks.collectives import gather_objects, largest, on_first_rank
from lingen.ranks.heartbeat import sign
from lingen.run_folder.folder import RunFolder
from lingen.run_folder.lock import check_held
from lingen.run_folder.saver import Saver
from lingen.training.base import Trained
from lingen.training.checkpoint import planned_tensors, state_of, tensors_of
from lingen.training.health import GoBack, NonFiniteError

log = logging.getLogger("lingen")


class StepEdge(Callback):
    """Keeps the ledger and, between two optimiser steps, saves and stops where that is due.

    Each rank counts its own samples since the last checkpoint; at a checkpoint the counts of all ranks are added up.

    One reduction a step tells all ranks whether any of them got a signal (`lingen.ranks.signals`) or too many
    broken samples: they stop at the same step, with a checkpoint of it."""

    def __init__(self, folder: RunFolder, stage: str, say: Callable[[str], None]):
        self.folder, self.stage, self.say = folder, stage, say
        self.ledger = Ledger()
        """The counts of all ranks, up to the last checkpoint."""
        self.saver: Any = None
        """A `Saver`, made when training starts."""
        self.stopped: int | None = None
        """The signal that stops the stage, on all ranks."""
        self._saved = 0
        """The step of the newest checkpoint."""
        self._own = Ledger()
        self._said: set[Drop] = set()

    def on_train_start(self, trainer: lightning.Trainer, pl_module: Any) -> None:
        settings, data = pl_module.recipe.train, cast(Any, trainer).datamodule
        back = settings.checkpoint_every if settings.on_spike == "rollback" else None
        self.saver = Saver(self.folder, self.stage, settings.keep_checkpoints, settings.keep_every, back)
        no_room = self.saver.prepare(planned_tensors(pl_module), pinned=pl_module.device.type == "cuda")
        if no_room and trainer.is_global_zero:
            self.say(no_room)
        self._own.open(data.train.faults, data.left_out)
        self.ledger.passed += data.passed
        self._saved = trainer.global_step
        if trainer.is_global_zero:
            for line in data.describe():
                self.say(line)
            for drop in data.validation.faults:
                log.warning("a fault in held-out shards: %s: %s", drop.where, drop.reason)
        if number := signals.agreed():
            self.stop(trainer, number)

    def on_train_batch_end(
        self, trainer: lightning.Trainer, pl_module: Any, outputs: Any, batch: Batch, batch_idx: int
    ) -> None:
        check_held()
        self._own.record(batch)
        recipe = pl_module.recipe
        if (batch_idx + 1) % recipe.train.accumulate:
            return
        error, step = None, trainer.global_step
        try:
            self._own.check(recipe.data.max_dropped, self.ledger)
        except DataError as found:  # too many of this rank's samples
            error = str(found)
        number, is_broken, is_writing = largest(signals.noted() or 0, error is not None, self.saver.is_writing)
        if not is_writing:
            self.saver.finish()
        ends = bool(number or is_broken) or step >= recipe.train.steps
        if ends or step % recipe.train.checkpoint_every == 0 or self.saver.stays(step):
            self.save(trainer, step, wait=ends)
        if is_broken:
            raise DataError(next(filter(None, gather_objects(error))))
        if number:
            self.stop(trainer, number)

    def stop(self, trainer: lightning.Trainer, number: int) -> None:
        """Ends the stage here, by a signal that all ranks know of, with a checkpoint. Lightning would validate once
        more, also where that is not due."""
        self.stopped, trainer.should_stop = number, True
        settings, step = cast(Any, trainer.lightning_module).recipe.train, trainer.global_step
        if step != self._saved:
            self.save(trainer, step, wait=True)
        if step % min(settings.validate_every or settings.steps, settings.steps):
            trainer.limit_val_batches = 0

    def on_validation_batch_end(
        self, trainer: lightning.Trainer, pl_module: Any, outputs: Any, batch: Batch, batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:  # fmt: skip
        for drop in batch.drops:
            if drop not in self._said:
                self._said.add(drop)
                log.warning("a held-out sample was dropped and replaced: %s: %s", drop.where, drop.reason)

    def save(self, trainer: lightning.Trainer, step: int, *, wait: bool = False) -> None:
        """Begins a checkpoint, which is complete as a whole or not there at all; one that is on its way is waited for.

        Args:
            wait: return when this one is complete, too."""
        module = cast(Trained, trainer.lightning_module)
        module.settle()
        self._saved = step
        for state in gather_objects(self._own.state_dict()):
            self.ledger.add(state)
        self._own = Ledger()
        tensors, state = tensors_of(module, trainer.optimizers[0]), state_of(trainer, module)
        self.saver.begin(step, tensors, state, self.ledger.as_json())
        if wait:
            self.saver.finish()

    def state_dict(self) -> dict[str, Any]:
        return {"ledger": self.ledger.state_dict()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.ledger.load_state_dict(state_dict["ledger"])

    def on_train_end(self, trainer: lightning.Trainer, pl_module: Any) -> None:
        self.saver.finish()
        self.saver = None  # and its buffer

    def on_exception(self, trainer: lightning.Trainer, pl_module: Any, exception: BaseException) -> None:
        if self.saver is not None:
            self.saver.abandon(together=isinstance(exception, NonFiniteError | GoBack))


class ClipsDuringTraining(Callback):
    """Clips with the averaged weights every `train.sample_every` steps: of the recipe's prompts, or reconstructions; or
    every `train.evaluate_every` steps of held-out captions, to be measured. Those that a signal or a kill kept from
    being made are made when the stage goes on from their step.

    Args:
        sample: makes the clips of a step, on all ranks; it raises `Stopped` on all of them at a signal.
        is_made: whether all clips of a step are there; rank 0 is asked.
        edge: stops the stage.
        every: the setting."""

    def __init__(
        self, sample: Callable[[Trained, int], None], is_made: Callable[[int], bool], edge: StepEdge, every: str
    ):
        self.sample, self.is_made, self.edge, self.every = sample, is_made, edge, every

    def on_train_start(self, trainer: lightning.Trainer, pl_module: Any) -> None:
        step = trainer.global_step
        if self._is_due(pl_module, step) and not on_first_rank(lambda: self.is_made(step)):
            self._make(trainer, pl_module)

    def on_train_batch_end(
        self, trainer: lightning.Trainer, pl_module: Any, outputs: Any, batch: Batch, batch_idx: int
    ) -> None:
        if (batch_idx + 1) % pl_module.recipe.train.accumulate == 0 and self._is_due(pl_module, trainer.global_step):
            self._make(trainer, pl_module)

    def _is_due(self, pl_module: Any, step: int) -> bool:
        settings = pl_module.recipe.train
        every = getattr(settings, self.every)
        return bool(every) and step % every == 0 and 0 < step < settings.steps and self.edge.stopped is None

    def _make(self, trainer: lightning.Trainer, pl_module: Any) -> None:
        try:
            self.sample(pl_module, trainer.global_step)
        except signals.Stopped as stopped:
            self.edge.stop(trainer, stopped.number)


class StageEnd(Callback):
    """Calls `finish(module, step)` on all ranks after the stage's last step, while the module is still on its device.

    Args:
        finish: raises `Stopped` on all ranks at a signal. What is left of it is done when the run goes on.
        edge: is told of it."""

    def __init__(self, finish: Callable[[Trained, int], None], edge: StepEdge):
        self.finish, self.edge = finish, edge

    def on_train_end(self, trainer: lightning.Trainer, pl_module: Any) -> None:
        if trainer.global_step < pl_module.recipe.train.steps or self.edge.stopped is not None:
            return
        sign("end of the stage", pl_module.recipe.stage, trainer.global_step)
        try:
            signals.check()  # one may have come in validation
            self.finish(pl_module, trainer.global_step)
        except signals.Stopped as stopped:
            self.edge.stop(trainer, stopped.number)


class LifeSigns(Callback):
    """A sign at each batch that comes, each that is done, and each of a validation. Whatever other callbacks do after a
    step, a checkpoint or clips, counts as the step's, so it is to be the last one.

    The first step of a stage, which may compile, is part of its start.

    Args:
        stage: that is trained."""

    def __init__(self, stage: str):
        self.stage = stage
        self._coming: Iterator[list[str]] = iter(())

    def on_train_start(self, trainer: lightning.Trainer, pl_module: Any) -> None:
        # Lightning reads a batch ahead: after the first one has come, it waits for the second.
        self._doing = "start"
        self._coming = islice(cast(Any, trainer).datamodule.names(), 1, None)
        sign("start", self.stage, trainer.global_step, ([], next(self._coming)))

    def on_train_batch_start(self, trainer: lightning.Trainer, pl_module: Any, batch: Any, batch_idx: int) -> None:
        sign(self._doing, self.stage, trainer.global_step, (batch.keys, []))
        self._doing = "step"

    def on_train_batch_end(
        self, trainer: lightning.Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        sign("data", self.stage, trainer.global_step, (batch.keys, next(self._coming)))

    def on_validation_batch_start(self, trainer: lightning.Trainer, *args: Any) -> None:
        sign("validation", self.stage, trainer.global_step)
