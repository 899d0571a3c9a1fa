"""What a rank tells of itself while it trains, as signs of life (`lingen.ranks.heartbeat`)."""

from collections.abc import Iterator
from itertools import islice
from typing import Any, cast

import lightning
from lightning.pytorch.callbacks import Callback

from lingen.ranks.heartbeat import sign


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
