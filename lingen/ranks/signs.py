"""What a rank tells of itself while it trains, as signs of life (`lingen.ranks.heartbeat`)."""

from typing import Any

import lightning
from lightning.pytorch.callbacks import Callback

from lingen.ranks.heartbeat import sign


class LifeSigns(Callback):
    """A sign at each batch that comes, each that is done, and each of a validation. Whatever other callbacks do after a
    step, a checkpoint or clips, counts as the step's, so it is to be the last one.

    Args:
        stage: that is trained.
    """

    def __init__(self, stage: str):
        self.stage = stage

    def on_train_start(self, trainer: lightning.Trainer, pl_module: Any) -> None:
        sign("data", self.stage, trainer.global_step)

    def on_train_batch_start(self, trainer: lightning.Trainer, pl_module: Any, batch: Any, batch_idx: int) -> None:
        sign("step", self.stage, trainer.global_step)

    def on_train_batch_end(self, trainer: lightning.Trainer, *args: Any) -> None:
        sign("data", self.stage, trainer.global_step)

    def on_validation_batch_start(self, trainer: lightning.Trainer, *args: Any) -> None:
        sign("validation", self.stage, trainer.global_step)

    def on_train_end(self, trainer: lightning.Trainer, pl_module: Any) -> None:
        sign("end of the stage", self.stage, trainer.global_step)
