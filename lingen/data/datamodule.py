"""The LightningDataModule: shards in, batches of clips and captions out."""

import atexit
import contextlib
import math
import multiprocessing
import os
import signal
import sys
from collections.abc import Iterator, Mapping, Sequence
from functools import cache, cached_property, partial
from typing import Any

import lightning
import numpy as np
import torch
from torch.utils.data import DataLoader

from lingen.data import order
from lingen.data.acting import DrawnIndex, check_alike
from lingen.data.batch import Batch
from lingen.data.buckets import Pool, Shape, pool_of
from lingen.data.dataset import Clips, Places
from lingen.data.fingerprint import check_encoded
from lingen.data.follow import follow_parent
from lingen.data.index import Index
from lingen.data.indexing import open_index
from lingen.data.latents import LatentRequirements
from lingen.data.ledger import DataError
from lingen.data.locations import expand
from lingen.data.order import Anchor, BatchOrder, RankBatch
from lingen.data.sources import Reader
from lingen.data.synthetic import ensure
from lingen.data.theatre import Theatre
from lingen.frozen import is_trained, on_meta
from lingen.recipe.errors import RecipeError
from lingen.recipe.registry import AUTOENCODERS, SYNTHETIC, TEXT_ENCODERS
from lingen.recipe.sections import KINDS, Recipe, Shards
from lingen.recipe.sizes import patch_of, round_of


class ClipData(lightning.LightningDataModule):
    """Batches of a stage, one kind and one shape at a time, from WebDataset shards.

    Which samples a batch holds follows from the seed, the stage, the optimiser step and the rank alone: not from the
    number of workers, and not from what was handed out before. A resumed run goes on after the last step trained; with
    other ranks, batches or another mix it goes on in the same epochs, and loses and repeats nothing.

    Args:
        recipe: a loaded stage."""

    def __init__(self, recipe: Recipe):
        super().__init__()
        self.recipe = recipe
        self.start_step = 0
        """Optimiser step of the first training batch; the trainer's, where that is further on."""
        self._resumed: dict[str, Any] | None = None
        self.passed = 0
        """Samples that were passed over when the stage went back to an earlier step."""

    @property
    def kinds(self) -> list[str]:
        """Kinds that the mix asks for."""
        return [kind for kind in KINDS if getattr(self.recipe.data.mix, kind) > 0]

    def check(self) -> None:
        """RecipeError where a pattern of the recipe's shards matches no file, or the theatre has no actors or two that
        look alike; no shard is read."""
        if self.theatre is not None:
            check_alike(self.theatre.sprites)
        for setting in ("shards", "validation"):
            for kind in self.kinds:
                self._expand(getattr(self.recipe.data, setting), kind, f"data.{setting}")

    def prepare_data(self) -> None:
        """Once per machine: draws the synthetic clips where the recipe names no shards, makes the indexes."""
        with contextlib.suppress(ValueError):  # every rank raises it in `setup`: none waits
            self.setup()

    def setup(self, stage: str | None = None) -> None:
        """Opens the indexes of all shards. RecipeError where a kind has none, DataError where no sample fits."""
        self._opened  # noqa: B018

    @property
    def train(self) -> Clips:
        """The training samples; errors as for `setup`."""
        return self._opened[0]

    @property
    def validation(self) -> Clips:
        """The held-out samples; errors as for `setup`."""
        return self._opened[1]

    @cached_property
    def _opened(self) -> tuple[Clips, Clips]:
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
        reader = Reader(data.remote)
        train, validation = self._open(shards, "data.shards", reader), self._open(held_out, "data.validation", reader)
        return (
            Clips(data, train, stream, reader, self._wanted),
            Clips(data, validation, ("validation",), reader, self._wanted, shuffle=False),
        )

    @cached_property
    def theatre(self) -> Theatre | None:
        """What draws clips, where no shards are named."""
        data = self.recipe.data
        made = data.synthetic and not (data.shards.image or data.shards.video) and SYNTHETIC.build(data.synthetic)
        return made if isinstance(made, Theatre) else None

    def _shards(self) -> tuple[Shards, Shards]:
        data = self.recipe.data
        if data.synthetic is None or data.shards.image or data.shards.video:
            return data.shards, data.validation
        if self.theatre is not None:
            shards = Shards(image="theatre", video="theatre")
            return shards, shards
        return ensure(self.recipe)

    def _expand(self, shards: Shards, kind: str, setting: str) -> list[str]:
        return expand(getattr(shards, kind), f"{setting}.{kind}", self.recipe.data.remote.timeout)

    def _open(self, shards: Shards, setting: str, reader: Reader) -> dict[str, Pool]:
        return {kind: self._pool(shards, kind, setting, reader) for kind in self.kinds if getattr(shards, kind)}

    def _pool(self, shards: Shards, kind: str, name: str, reader: Reader) -> Pool:
        setting = f"{name}.{kind}"
        if self.theatre is not None:
            index: Index = DrawnIndex.of(self.theatre, "train" if name == "data.shards" else "tune")
        else:
            index = open_index(self._expand(shards, kind, name), kind, setting, reader)
        if not len(index):
            faults = "; ".join(f"{drop.where}: {drop.reason}" for drop in index.faults[:3]) or "they are empty"
            raise DataError(f"{setting}: there is no whole sample in {len(index.shards)} shards ({faults}).")
        if index.encoded and not self.recipe.subject.encoded:
            raise RecipeError(f"{setting}: an autoencoder is trained on pixels, and these shards hold latents.")
        if index.encoded:
            check_encoded(index.abouts, self.recipe, setting)
        pool = pool_of(index, self.recipe.data, kind, self._tokens, setting)
        if not len(pool):
            reasons = "; ".join(f"{out.number} x {reason}, as {out.example}" for reason, out in pool.left_out.items())
            raise DataError(f"{setting}: none of {len(index)} samples fits this stage ({reasons}).")
        return pool

    def _tokens(self, shape: Shape) -> int:
        """Tokens of a sample of this shape."""
        latents = self._wanted.latents(shape)[1:]
        return math.prod(math.ceil(n / side) for n, side in zip(latents, patch_of(self.recipe), strict=True))

    @cached_property
    def _wanted(self) -> LatentRequirements:
        autoencoder = on_meta(AUTOENCODERS, self.recipe.autoencoder)
        encoders = [on_meta(TEXT_ENCODERS, component) for component in self.recipe.text]
        frozen = [number for number, encoder in enumerate(encoders) if not is_trained(encoder)]
        return LatentRequirements(autoencoder.channels, tuple(autoencoder.strides), frozenset(frozen))

    @property
    def needs_no_encoders(self) -> bool:
        """Whether all training and validation samples are encoded, with the tokens of the null text."""
        indexes = [pool.index for clips in (self.train, self.validation) for pool in clips.pools.values()]
        return all(one.encoded and all(about.settings.get("null_text") for about in one.abouts) for one in indexes)

    @property
    def left_out(self) -> dict[str, int]:
        """``kind: reason`` -> training samples that are in no bucket."""
        return {
            f"{kind}: {reason}": out.number
            for kind, pool in self.train.pools.items()
            for reason, out in pool.left_out.items()
        }

    def describe(self) -> list[str]:
        """A sentence for each kind: how many samples, in which buckets, and what was left out."""
        lines = []
        for kind, pool in self.train.pools.items():
            buckets = ", ".join(
                f"{lane.samples:,} of {shape} in batches of {lane.batch}"
                for shape, lane in zip(pool.shapes, pool.lanes, strict=True)
            )
            out = "".join(f"; left out: {one.number:,} x {reason}" for reason, one in pool.left_out.items())
            lines.append(f"{kind}: {buckets}{out}")
        return lines

    def train_dataloader(self) -> DataLoader[Batch]:
        """Endless; it begins at the step that training stands at whenever it is iterated anew."""
        workers = self.recipe.data.workers
        return _loader(self.train, Places(self._places_from_here, workers=workers), workers)

    def val_dataloader(self) -> DataLoader[Batch] | list[Any]:
        """The first `train.validation_samples` held-out samples of each kind, in fixed order; equally many a rank."""
        rank, world = self._ranks()
        places: list[RankBatch] = []
        for kind, pool in self.validation.pools.items():
            samples = min(self.recipe.train.validation_samples, len(pool))
            last = np.sort(np.concatenate([rows[:samples] for rows in pool.rows]))[samples - 1]
            for bucket, (rows, batch) in enumerate(zip(pool.rows, pool.batches, strict=True)):
                count = int((rows[:samples] <= last).sum())
                places += order.held_out_places(kind, count, batch, bucket=bucket, rank=rank, world=world)
        if not places:
            return []
        workers = min(self.recipe.data.workers, len(places))
        return _loader(self.validation, Places(lambda: iter(places), len(places), workers), workers)

    def transfer_batch_to_device(self, batch: Batch, device: torch.device, dataloader_idx: int) -> Batch:
        """The numbers of samples stay on the CPU, where random numbers are drawn."""
        moved: Batch = super().transfer_batch_to_device(batch, device, dataloader_idx)
        return moved._replace(slots=batch.slots)

    def held_out_captions(self, count: int) -> list[str]:
        """Up to `count` different captions of held-out clips, or of images where there are no clips."""
        kind, pool = min(self.validation.pools.items(), key=lambda one: one[0] != "video")
        bucket = max(range(len(pool.rows)), key=lambda number: len(pool.rows[number]))
        places = order.held_out_places(kind, min(4 * count, len(pool.rows[bucket])), 1, bucket=bucket)
        return list(dict.fromkeys(self.validation[place].captions[0] for place in places))[:count]

    def batches(self, start: int = 0, *, rank: int = 0, world: int = 1) -> Iterator[Batch]:
        """The training batches of one rank from an optimiser step on, without end and without a trainer or workers."""
        for place in Places(lambda: self.places(start, rank=rank, world=world)):
            yield self.train[place]

    def largest(self, rank: int = 0) -> Batch:
        """A training batch of the bucket whose batches have the most tokens, out of turn."""
        pools = self.train.pools
        buckets = [(kind, number) for kind, pool in pools.items() for number in range(len(pool.shapes))]
        sizes = [pools[kind].batches[number] * self._tokens(pools[kind].shapes[number]) for kind, number in buckets]
        kind, bucket = buckets[sizes.index(max(sizes))]
        count = pools[kind].batches[bucket]
        own = range(rank * count, (rank + 1) * count)
        return self.train[RankBatch(kind, 0, bucket, own, own)]

    def places(self, start: int = 0, *, rank: int = 0, world: int = 1) -> Iterator[RankBatch]:
        """The places of those batches."""
        return self.order(world).places(start, rank)

    def names(self) -> Iterator[list[str]]:
        """``shard:key`` of the samples of each batch of this rank, from where training stands."""
        return map(self.train.names, self._places_from_here())

    def order(self, world: int = 1) -> BatchOrder:
        """The order of the stage's batches for this number of ranks, from where a loaded checkpoint leaves it."""
        lanes = {kind: pool.lanes for kind, pool in self.train.pools.items()}
        ordered = partial(
            BatchOrder, lanes, round_of(self.recipe.data), self.train.stream,
            accumulate=self.recipe.train.accumulate, world=world,
        )  # fmt: skip
        if self._resumed is None:
            return ordered()
        here = Anchor(*self._resumed["here"])
        same = ordered(anchor=Anchor(*self._resumed["anchor"]))
        # Another batch, mix or number of ranks would have led elsewhere: then a new order begins where that one ends.
        return same if same.leads_to(here) else ordered(anchor=here)

    def _places_from_here(self) -> Iterator[RankBatch]:
        rank, world = self._ranks()
        return self.places(self._step(), rank=rank, world=world)

    def _step(self) -> int:
        return max(self.start_step, self.trainer.global_step if self.trainer is not None else 0)

    def _ranks(self) -> tuple[int, int]:
        return (self.trainer.global_rank, self.trainer.world_size) if self.trainer is not None else (0, 1)

    def state_dict(self) -> dict[str, Any]:
        """A few integers that follow from the steps trained, not from the batches handed out, which are ahead."""
        current, step = self.order(self._ranks()[1]), self._step()
        return {
            "samples": (self._resumed or {}).get("samples", {}) | self._samples(),
            "anchor": [current.anchor.step, dict(current.anchor.taken)],
            "here": [step, current.taken(step)],
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Goes on where a `state_dict` was made. DataError where the shards hold other samples now."""
        now = self._samples()
        before = {kind: held for kind, held in state_dict["samples"].items() if kind in now}  # the mix may have changed
        if before != {kind: now[kind] for kind in before}:
            raise DataError(
                f"The data of this run have changed since step {state_dict['here'][0]}: there were "
                f"{_count(before)}, now there are {_count(now)}. Bring the old shards back, "
                "or start a new run with init=RUN, which goes on from its weights with new epochs."
            )
        self._resumed = state_dict

    def taken(self, step: int) -> dict[str, list[int]]:
        """Samples of each bucket that all ranks have taken before a step."""
        return self.order(self._ranks()[1]).taken(step)

    def go_past(self, taken: Mapping[str, Sequence[int]]) -> None:
        """Goes on from this step with what comes after samples that were taken in later ones, see `Anchor`: those since
        then are passed over."""
        step = self._step()
        self.passed = sum(map(sum, taken.values())) - sum(map(sum, self.taken(step).values()))
        here = [step, {kind: list(counts) for kind, counts in taken.items()}]
        self._resumed = {"samples": (self._resumed or {}).get("samples", {}), "anchor": here, "here": here}

    def _samples(self) -> dict[str, dict[str, int]]:
        """Kind -> bucket -> samples."""
        return {
            kind: {str(shape): len(rows) for shape, rows in zip(pool.shapes, pool.rows, strict=True)}
            for kind, pool in self.train.pools.items()
        }


def _count(samples: dict[str, dict[str, int]]) -> str:
    parts = {kind: " + ".join(f"{n} of {shape}" for shape, n in of.items()) for kind, of in samples.items()}
    return ", ".join(f"{kind}: {part}" for kind, part in parts.items())


def _loader(clips: Clips, places: Places, workers: int) -> DataLoader[Batch]:
    # A forked worker starts at once and never touches the GPU; what else is safe imports torch anew in each worker.
    fork = workers > 0 and sys.platform == "linux"
    return DataLoader(
        clips, batch_size=None, sampler=places, collate_fn=as_it_is, num_workers=workers,
        worker_init_fn=partial(_start_worker, _closing()) if workers else None,
        multiprocessing_context="fork" if fork else None, pin_memory=torch.cuda.is_available(),
    )  # fmt: skip


def as_it_is(batch: Any) -> Any:
    """For a loader whose data set makes whole batches."""
    return batch


@cache
def _closing() -> Any:
    """An event that is set when the training process exits and waits for its workers."""
    flag = multiprocessing.get_context("fork" if sys.platform == "linux" else "spawn").Event()
    atexit.register(flag.set)  # runs before multiprocessing's own hook, which was registered earlier
    return flag


def _start_worker(closing: Any, worker: int) -> None:
    """Signals are for the training process, which ends its workers itself. A scheduler that stops a job signals all its
    processes, and a worker that ended at once would break the step that is still to be saved."""
    for number in (signal.SIGINT, signal.SIGUSR1):
        signal.signal(number, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, lambda *_: os._exit(0) if closing.is_set() else None)
    follow_parent()
