"""The LightningDataModule: shards in, batches of clips and captions out."""

from __future__ import annotations

import atexit
import multiprocessing
import os
import signal
import sys
from collections.abc import Iterator
from functools import cache, partial
from typing import Any

import lightning
import torch
from torch.utils.data import DataLoader

from lingen.config import Recipe, Shards
from lingen.data import order
from lingen.data.batch import Batch
from lingen.data.dataset import Clips, Places
from lingen.data.ledger import DataError
from lingen.data.order import KINDS, Place
from lingen.data.shards import ShardIndex, expand, index
from lingen.registry import RecipeError


class ClipData(lightning.LightningDataModule):
    """Batches of a stage, one kind at a time, from WebDataset shards.

    Which samples a batch holds follows from the seed, the stage, the optimiser step and the rank alone: not from the
    number of workers, and not from what was handed out before. A resumed run goes on after the last step trained.

    Args:
        recipe: a loaded stage.
    """

    def __init__(self, recipe: Recipe):
        super().__init__()
        self.recipe = recipe
        self.start_step = 0
        """Optimiser step of the first training batch; the trainer's, where that is further on."""
        self.train: Clips | None = None
        self.validation: Clips | None = None

    @property
    def kinds(self) -> list[str]:
        """Kinds that the mix asks for."""
        return [kind for kind in KINDS if getattr(self.recipe.data.mix, kind) > 0]

    def check(self) -> None:
        """RecipeError where a pattern of the recipe's shards matches no file; nothing is read."""
        for setting in ("shards", "validation"):
            for kind in self.kinds:
                expand(getattr(getattr(self.recipe.data, setting), kind), f"data.{setting}.{kind}")

    def prepare_data(self) -> None:
        """Draws the synthetic clips where the recipe names no shards; done once per machine."""
        self._shards()

    def setup(self, stage: str | None = None) -> None:
        """Reads the headers of all shards. RecipeError where a kind has none, DataError where they hold no sample."""
        if self.train is not None:
            return
        data, stream = self.recipe.data, (self.recipe.seed, self.recipe.stage or "main")
        shards, held_out = self._shards()
        if not self.kinds:
            raise RecipeError("data.mix is 0 for both kinds; set data.mix.image or data.mix.video above 0.")
        for kind in self.kinds:
            if not getattr(shards, kind):
                raise RecipeError(
                    f"data.mix.{kind} is {getattr(data.mix, kind)}, but data.shards.{kind} names no shards; "
                    f"name some, or set data.mix.{kind} to 0."
                )
        self.train = Clips(data, self._open(shards, "data.shards"), stream)
        self.validation = Clips(data, self._open(held_out, "data.validation"), ("validation",), shuffle=False)

    def _shards(self) -> tuple[Shards, Shards]:
        data = self.recipe.data
        if data.synthetic is None or data.shards.image or data.shards.video:
            return data.shards, data.validation
        from lingen.data.synthetic import ensure

        return ensure(self.recipe)

    def _open(self, shards: Shards, setting: str) -> dict[str, ShardIndex]:
        opened = {
            kind: index(expand(getattr(shards, kind), f"{setting}.{kind}"))
            for kind in self.kinds
            if getattr(shards, kind)
        }
        for kind, found in opened.items():
            if not len(found):
                faults = "; ".join(f"{drop.where}: {drop.reason}" for drop in found.faults[:3]) or "they are empty"
                raise DataError(f"{setting}.{kind}: there is no whole sample in {len(found.paths)} shards ({faults}).")
        return opened

    # loaders

    def train_dataloader(self) -> DataLoader[Batch]:
        """Endless; it begins at the step that training stands at whenever it is iterated anew."""
        self.setup()
        assert self.train is not None
        workers = self.recipe.data.workers
        return _loader(self.train, Places(self._places_from_here), workers)

    def val_dataloader(self) -> DataLoader[Batch] | list[Any]:
        """The first `train.validation_samples` held-out samples of each kind, in fixed order; equally many a rank."""
        self.setup()
        assert self.validation is not None
        data, rank, world = self.recipe.data, *self._ranks()
        places: list[Place] = []
        for kind, found in self.validation.indexes.items():
            samples = min(self.recipe.train.validation_samples, len(found))
            places += order.held_out_places(kind, samples, getattr(data.batch, kind), rank=rank, world=world)
        if not places:
            return []
        return _loader(self.validation, Places(lambda: iter(places), len(places)), min(data.workers, len(places)))

    def batches(self, start: int = 0, *, rank: int = 0, world: int = 1) -> Iterator[Batch]:
        """The training batches of one rank from an optimiser step on, without end and without a trainer or workers."""
        self.setup()
        assert self.train is not None
        for place in self.places(start, rank=rank, world=world):
            yield self.train[place]

    def places(self, start: int = 0, *, rank: int = 0, world: int = 1) -> Iterator[Place]:
        """The places of those batches."""
        return order.places(start, self.recipe.data, accumulate=self.recipe.train.accumulate, rank=rank, world=world)

    def _places_from_here(self) -> Iterator[Place]:
        rank, world = self._ranks()
        return self.places(self._step(), rank=rank, world=world)

    def _step(self) -> int:
        return max(self.start_step, self.trainer.global_step if self.trainer is not None else 0)

    def _ranks(self) -> tuple[int, int]:
        return (self.trainer.global_rank, self.trainer.world_size) if self.trainer is not None else (0, 1)


def _loader(clips: Clips, places: Places, workers: int) -> DataLoader[Batch]:
    # A forked worker starts at once and never touches the GPU; what else is safe imports torch anew in each worker.
    fork = workers > 0 and sys.platform == "linux"
    return DataLoader(
        clips,
        batch_size=None,
        sampler=places,
        collate_fn=_as_it_is,
        num_workers=workers,
        worker_init_fn=partial(_start_worker, _closing()) if workers else None,
        multiprocessing_context="fork" if fork else None,
        pin_memory=torch.cuda.is_available(),
    )


def _as_it_is(batch: Any) -> Any:
    return batch


@cache
def _closing() -> Any:
    """A flag that is up once the training process exits and waits for its workers."""
    flag = multiprocessing.get_context("fork" if sys.platform == "linux" else "spawn").Event()
    atexit.register(flag.set)  # runs before multiprocessing's own hook, which was registered earlier
    return flag


def _start_worker(closing: Any, worker: int) -> None:
    """One thread each; signals are for the training process, which ends its workers itself.

    A scheduler that stops a job signals all its processes: a worker that went at once would break the step that is
    still to be saved. So it goes only when the training process does.
    """
    torch.set_num_threads(1)
    for number in ("SIGINT", "SIGUSR1"):
        if hasattr(signal, number):
            signal.signal(getattr(signal, number), signal.SIG_IGN)
    signal.signal(signal.SIGTERM, lambda *_: os._exit(0) if closing.is_set() else None)
