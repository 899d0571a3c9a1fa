"""Rows of metrics.csv: what is measured every few steps, and the file."""

import csv
import math
import re
from collections.abc import Callable, Iterable
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from statistics import fmean
from typing import Any, cast

import lightning
import torch
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.utilities import rank_zero_only
from torch import Tensor, nn

from lingen.data.batch import Batch
from lingen.files import naming, whole_file
from lingen.ranks.collectives import gather_objects, is_first_rank
from lingen.training.base import Trained
from lingen.training.denoiser import LinGenModule
from lingen.training.sharding import whole_float32
from lingen.training.state import whole_of

PLACES = ("stage", "step", "loss", "validation", "lr", "grad_norm", "tokens_per_second", "", "time", "data", "mixer")
"""First words of columns of metrics.csv in their order, "" for all others; of one word they go by name."""


class MetricsFile:
    """metrics.csv: a row for each logged step of every stage; a resumed stage drops the rows past its checkpoint.

    Args:
        path: the file.
        stage: goes into each row.
        resumed: step from which the stage goes on.
        listen: a function that is called with each row."""

    def __init__(self, path: Path, stage: str, resumed: int, listen: Callable[[dict[str, Any]], None]):
        self.path, self.stage, self.listen = path, stage, listen
        self._rows: list[dict[str, Any]] = []
        if is_first_rank() and path.is_file():
            with path.open(newline="", encoding="utf-8") as file:
                whole = (row for row in csv.DictReader(file) if row["step"])
                # But those of steps that are trained again.
                self._rows = [row for row in whole if row["stage"] != stage or int(row["step"]) <= resumed]
        self._columns = sorted({"stage", "step", *(name for row in self._rows for name in row)}, key=_place)
        self._began = False

    def holds(self, step: int, name: str) -> bool:
        """Whether a row of this stage has a value of that name."""
        return any((row["stage"], int(row["step"])) == (self.stage, step) and row.get(name) for row in self._rows)

    @rank_zero_only
    def write(self, step: int, values: dict[str, float]) -> None:
        """Adds a row; values of the step that was written last join its row."""
        row = {"stage": self.stage, "step": step, **values}
        self.listen(row)
        joins = bool(self._rows) and (self._rows[-1]["stage"], int(self._rows[-1]["step"])) == (self.stage, step)
        if joins:
            self._rows[-1] |= row
        else:
            self._rows.append(row)
        new = [name for name in row if name not in self._columns]
        self._columns = sorted([*self._columns, *new], key=_place)
        if joins or new or not self._began:
            with whole_file(self.path) as partial, partial.open("w", newline="", encoding="utf-8") as file:
                writer = csv.DictWriter(file, self._columns)
                writer.writeheader()
                writer.writerows(self._rows)
        else:
            with naming(self.path), self.path.open("a", newline="", encoding="utf-8") as file:
                csv.DictWriter(file, self._columns).writerow(row)
        self._began = True


def _place(column: str) -> tuple[int, list[Any]]:
    """Where a column stands; numbers in a name count as such."""
    parts: list[Any] = re.split(r"(\d+(?:\.\d+)?)", column)
    parts[1::2] = map(float, parts[1::2])
    head = column.partition("/")[0]
    return PLACES.index(head if head in PLACES else ""), parts


class Rows(Callback):
    """Logs a row every `train.log_every` steps, before a checkpoint of the same step is written.

    The row includes measures of the mixers at that step: the memory horizon of every scan, in tokens, and the output
    RMS of both branches of every MATE layer."""

    def __init__(self) -> None:
        self._hooks: list[Any] = []

    @staticmethod
    def _is_due(pl_module: Any, steps: int) -> bool:
        settings = pl_module.recipe.train
        return steps % settings.log_every == 0 or steps >= settings.steps

    def on_train_batch_start(self, trainer: lightning.Trainer, pl_module: Any, batch: Batch, batch_idx: int) -> None:
        if (batch_idx + 1) % pl_module.recipe.train.accumulate or not self._is_due(pl_module, trainer.global_step + 1):
            return
        pl_module.rms = {}
        for index, block in enumerate(blocks_of(pl_module)):
            for branch in ("ma", "te"):
                part = getattr(block.mixer, branch, None)
                if isinstance(part, nn.Module):
                    name = f"mixer/{index:02d}/{branch}_rms"
                    self._hooks.append(part.register_forward_hook(partial(self._note, pl_module, name)))

    @staticmethod
    def _note(module: Trained, name: str, part: nn.Module, inputs: Any, output: Tensor) -> None:
        if module.rms is not None:
            module.rms[name] = output.detach().float().square().mean()

    def on_train_batch_end(
        self, trainer: lightning.Trainer, pl_module: Any, outputs: Any, batch: Batch, batch_idx: int
    ) -> None:
        if (batch_idx + 1) % pl_module.recipe.train.accumulate or not self._is_due(pl_module, trainer.global_step):
            return
        for hook in self._hooks:
            hook.remove()
        pl_module.settle()
        ranks = gather_objects(_read(pl_module.rms or {}))
        # Over the tokens of all ranks, which have as many each.
        rms = {name: math.sqrt(fmean(one[name] for one in ranks)) for name in ranks[0]}
        for name, value in (rms | _read(horizons(pl_module))).items():
            pl_module.meter.add(name, torch.tensor([value]))
        self._hooks, pl_module.rms = [], None
        pl_module.log_row(pl_module.collect_metrics())


def blocks_of(module: Trained) -> Iterable[Any]:
    """The denoiser's blocks; an autoencoder has none."""
    return module.own_parts() if isinstance(module, LinGenModule) else ()


def _read(values: dict[str, Tensor]) -> dict[str, float]:
    """Numbers of a device, fetched at once."""
    return dict(zip(values, torch.stack([*values.values()]).tolist(), strict=True)) if values else {}


def horizons(module: Trained) -> dict[str, Tensor]:
    """Memory horizon of each scan, in tokens, see `Mamba2.horizon`. All ranks ask: where the model is sharded, what
    sets the horizons of all blocks is gathered at once."""
    values: dict[str, Tensor] = {}
    with whole_float32(module.model) if isinstance(module, LinGenModule) else nullcontext():
        for index, block in enumerate(blocks_of(module)):
            for part in cast(nn.Module, block.mixer).modules():
                if hasattr(part, "horizon"):
                    values[f"mixer/{index:02d}/horizon"] = whole_of(cast(Any, part).horizon()).mean()
    return values
