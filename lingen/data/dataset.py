"""From a place in the order to a batch: read, decode, and fill the slots of samples that cannot be used."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterator

import torch
from torch.utils.data import Dataset, DistributedSampler

from lingen.config import DataConfig
from lingen.data import order
from lingen.data.batch import Batch, Drop
from lingen.data.decode import Clip, caption_of, decode_sample
from lingen.data.ledger import DataError
from lingen.data.order import Place
from lingen.data.shards import ShardIndex

ATTEMPTS = 20
"""Spares that are tried for one slot."""


class ClipCache:
    """Decoded clips, the least recently used ones forgotten first.

    A clip is found by its sample and by where it begins. How many beginnings a video has is known once it was decoded;
    a video that is exactly as long as a clip has one, so it is decoded once.

    Args:
        limit: bytes of pixels to keep; 0 keeps nothing.
    """

    def __init__(self, limit: int):
        self.limit = limit
        self.size = 0
        self._clips: OrderedDict[tuple[str, int, int], tuple[Clip, str]] = OrderedDict()
        self._starts: dict[tuple[str, int], int] = {}

    def get(self, kind: str, number: int, start: float, read: Callable[[], tuple[Clip, str]]) -> tuple[Clip, str]:
        """The clip and the caption, from memory or from `read`."""
        if not self.limit:
            return read()
        starts = self._starts.get((kind, number))
        if starts is not None and (key := (kind, number, int(start * starts))) in self._clips:
            self._clips.move_to_end(key)
            return self._clips[key]
        found = read()
        starts = self._starts[kind, number] = found[0].starts
        self._clips[kind, number, int(start * starts)] = found
        self.size += found[0].pixels.nbytes
        while self.size > self.limit:
            _, (clip, _) = self._clips.popitem(last=False)
            self.size -= clip.pixels.nbytes
        return found


class Clips(Dataset[Batch]):
    """Batches by their place in the order; a pure function of the place.

    Args:
        data: what a batch is made of.
        indexes: kind -> its shards.
        stream: what the order depends on: the seed and the stage.
        shuffle: an order of its own for each epoch; without it the samples come as they lie in the shards.
    """

    def __init__(
        self, data: DataConfig, indexes: dict[str, ShardIndex], stream: tuple[object, ...], *, shuffle: bool = True
    ):
        self.data = data
        self.indexes = indexes
        self.stream = stream
        self.shuffle = shuffle
        self.cache = ClipCache(data.cache_mb << 20)

    def __getitem__(self, place: Place) -> Batch:
        """The samples of a place. DataError where no spare can fill a slot."""
        drops = [drop for index in self.indexes.values() for drop in index.faults] if place.first else []
        samples = [self._fill(place.kind, number, drops) for number in place.numbers]
        clips, captions, keys = zip(*samples, strict=True)
        fps = self.data.fps if place.kind == "video" else 0.0
        slots = torch.tensor(list(place.slots), dtype=torch.int64)
        return Batch(place.kind, place.step, torch.stack(clips), list(captions), fps, list(keys), slots, drops)

    def _fill(self, kind: str, number: int, drops: list[Drop]) -> tuple[torch.Tensor, str, str]:
        """Pixels, caption and ``shard:key`` of the sample of this number, or of its first spare that can be used."""
        index, stream = self.indexes[kind], (*self.stream, kind)
        epoch, chosen = order.sample_at(number, len(index), stream) if self.shuffle else divmod(number, len(index))
        for attempt in range(1, ATTEMPTS + 1):
            where = index.where(chosen)
            try:
                clip, caption = self._load(kind, chosen, order.uniform("start", stream, epoch, where))
                return clip.pixels, caption, where
            except (OSError, ValueError) as error:
                drops.append(Drop(where, str(error)))
            chosen = order.spare_for(number, attempt, len(index), stream)
        shown = "; ".join(f"{drop.where}: {drop.reason}" for drop in drops[-3:])
        raise DataError(f"{ATTEMPTS} {kind} samples in a row cannot be used, the last of them: {shown}")

    def _load(self, kind: str, number: int, start: float) -> tuple[Clip, str]:
        def read() -> tuple[Clip, str]:
            sample = self.indexes[kind].read(number)
            caption = caption_of(sample)
            frames = self.data.frames if kind == "video" else 1
            clip = decode_sample(sample, kind, frames=frames, size=self.data.size, fps=self.data.fps, start=start)
            return clip, caption

        return self.cache.get(kind, number, start, read)


class Places(DistributedSampler):
    """Hands out places from wherever training stands when iteration begins. A `DistributedSampler` because it does the
    work of one: Lightning would put its own in the place of any other.

    Args:
        places: called at the beginning of each iteration.
        length: how many there are; None: no end.
    """

    def __init__(self, places: Callable[[], Iterator[Place]], length: int | None = None):
        self.places = places
        self.length = length

    def __iter__(self) -> Iterator[Place]:
        return self.places()

    def __len__(self) -> int:
        if self.length is None:
            raise TypeError("the order of training has no end")
        return self.length

    def set_epoch(self, epoch: int) -> None:
        """Epochs follow from the step."""
