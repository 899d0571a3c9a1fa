"""From a place in the order to a batch: read, decode, and fill the slots of samples that cannot be used."""

from collections import deque
from collections.abc import Callable, Iterator, Mapping
from itertools import islice
from operator import attrgetter
from typing import NamedTuple

import torch
from torch import Tensor
from torch.utils.data import Dataset, DistributedSampler, default_collate

from lingen.data import order
from lingen.data.acting import DrawnIndex
from lingen.data.ahead import Ahead
from lingen.data.batch import Batch, Drop
from lingen.data.buckets import Pool, Shape
from lingen.data.cache import Cache
from lingen.data.captions import captions_of
from lingen.data.decode import decode_sample
from lingen.data.latents import LatentRequirements, StoredTokens, pad_tokens, read_encoded
from lingen.data.ledger import DataError
from lingen.data.order import RankBatch, StreamKey
from lingen.data.shards import parse_sample
from lingen.data.sources import Reader
from lingen.recipe.sections import DataConfig

ATTEMPTS = 20
"""Spares that are tried for one slot."""


class Sample(NamedTuple):
    """A sample, decoded."""

    pixels: Tensor
    """uint8 [3 t h w]; of an encoded sample latents [c t h w]."""
    starts: int
    """How many clips of this length the video holds: the number of different first frames."""
    captions: list[str]
    text: StoredTokens = StoredTokens({}, {})
    """Tokens of the text encoders, for an encoded sample."""


class ClipCache:
    """Decoded samples, see `Cache`.

    The key of a clip is its sample and its first frame. How many first frames a video offers is known after it was
    decoded; a video that is exactly as long as a clip has one, so it is decoded once.

    Args:
        limit: bytes of pixels to keep; 0 keeps nothing."""

    def __init__(self, limit: int):
        self.limit = limit
        self._samples = Cache[tuple[str, int, int], Sample](limit, attrgetter("pixels.nbytes"))
        self._starts: dict[tuple[str, int], int] = {}

    def get(self, kind: str, number: int, start: float, read: Callable[[], Sample]) -> Sample:
        """The sample, from memory or from `read`."""
        if not self.limit:
            return read()
        starts = self._starts.get((kind, number))
        found = None if starts is None else self._samples.get((kind, number, int(start * starts)))
        if found is None:
            found = read()
            self._starts[kind, number] = found.starts
            self._samples.put((kind, number, int(start * found.starts)), found)
        return found


class Choice(NamedTuple):
    """A sample of a pool in an epoch."""

    kind: str
    number: int
    """Number of the sample in the index."""
    shape: Shape
    stream: StreamKey
    epoch: int


class Clips(Dataset[Batch]):
    """Batches by their place in the order; a pure function of the place.

    Args:
        data: what a batch is made of.
        pools: kind -> its samples.
        stream: what the order depends on: the seed and the stage.
        reader: how shards are read.
        encoded: what encoded samples hold.
        shuffle: an order of its own for each epoch; without it the samples come as they lie in the shards."""

    def __init__(
        self, data: DataConfig, pools: Mapping[str, Pool], stream: StreamKey, reader: Reader,
        encoded: LatentRequirements, *, shuffle: bool = True,
    ):  # fmt: skip
        self.data, self.pools, self.stream, self.encoded, self.shuffle = data, pools, stream, encoded, shuffle
        self.cache = ClipCache(data.cache_mb << 20)
        self.ahead = {kind: Ahead(pool.index, reader) for kind, pool in pools.items()}
        held = [dict(zip(pool.index.names, pool.index.shards, strict=True)) for pool in pools.values()]
        alike = any(held[-1].get(name, shard) != shard for one in held[:1] for name, shard in one.items())
        self._before = {kind: f"{kind}/" if alike else "" for kind in pools}
        """What the names of shards begin with where other shards of the other kind have the same."""

    @property
    def faults(self) -> list[Drop]:
        """Shards and samples that were found to be broken when they were opened."""
        found = ((self._before[kind], drop) for kind, pool in self.pools.items() for drop in pool.index.faults)
        return [drop._replace(where=before + drop.where) for before, drop in found]

    def where(self, kind: str, number: int) -> str:
        """``shard:key`` of a sample, another one for each of both kinds."""
        return self._before[kind] + self.pools[kind].index.where(number)

    def __getitem__(self, place: RankBatch) -> Batch:
        """The samples of a place. DataError where no spare can fill a slot."""
        drops: list[Drop] = []
        retries: list[str] = []
        self._read_ahead(place)
        found = [self._fill(place, number, drops, retries) for number in place.numbers]
        samples, choices = zip(*found, strict=True)
        index = self.pools[place.kind].index
        told = [  # the caption that each has in this epoch
            int(order.uniform("caption", one.stream, one.epoch, index.where(one.number)) * len(sample.captions))
            for sample, one in found
        ]
        text, null = pad_tokens([sample.text for sample in samples], told)
        return Batch(
            kind=place.kind,
            step=place.step,
            clips=default_collate([sample.pixels for sample in samples]),  # in a worker, directly into shared memory
            captions=[sample.captions[number] for sample, number in zip(samples, told, strict=True)],
            fps=self.data.fps if place.kind == "video" else 0.0,
            keys=[self.where(place.kind, choice.number) for choice in choices],
            sources=[index.source(choice.number) for choice in choices],
            slots=torch.tensor(list(place.slots), dtype=torch.int64),
            drops=drops,
            retries=retries,
            text=text,
            null=null,
        )

    def names(self, place: RankBatch) -> list[str]:
        """``shard:key`` of the samples of a place, unless spares take their places."""
        return [self.where(place.kind, self._choose(place, number).number) for number in place.numbers]

    def _read_ahead(self, place: RankBatch) -> None:
        """Starts reading this batch and the next one in threads, unless decoded clips are cached."""
        if self.cache.limit:
            return
        coming: dict[str, list[int]] = {kind: [] for kind in self.pools}
        for one in (place, place.ahead):
            if one is not None:
                coming[one.kind] += [self._choose(one, number).number for number in one.numbers]
        for kind, numbers in coming.items():
            self.ahead[kind].ask(numbers)

    def _choose(self, place: RankBatch, number: int, attempt: int = 0) -> Choice:
        """The sample of a number in its bucket, or its `attempt`-th spare of the same bucket."""
        pool = self.pools[place.kind]
        shape, rows = pool.shapes[place.bucket], pool.rows[place.bucket]
        stream = (*self.stream, *pool.name_of(place.bucket))
        at = order.sample_at(number, len(rows), stream, self.data.block) if self.shuffle else divmod(number, len(rows))
        epoch, position = at
        if attempt:
            position = order.spare_for(number, attempt, len(rows), stream)
        return Choice(place.kind, int(rows[position]), shape, stream, epoch)

    def _fill(self, place: RankBatch, number: int, drops: list[Drop], retries: list[str]) -> tuple[Sample, Choice]:
        """The sample of this number, or its first spare that can be used."""
        index = self.pools[place.kind].index
        for attempt in range(ATTEMPTS):
            choice = self._choose(place, number, attempt)
            where = self.where(*choice[:2])
            try:
                return self._load(choice, where, retries), choice
            except (OSError, ValueError) as error:
                retries += [where] * getattr(error, "retries", 0)
                drops.append(Drop(where, str(error), index.source(choice.number)))
        shown = "; ".join(f"{drop.where}: {drop.reason}" for drop in drops[-3:])
        raise DataError(f"{ATTEMPTS} {place.kind} samples in a row cannot be used, the last of them: {shown}")

    def _load(self, choice: Choice, where: str, retries: list[str]) -> Sample:
        kind, number, (frames, height, width), stream, epoch = choice
        index = self.pools[kind].index
        start = order.uniform("start", stream, epoch, index.where(number))

        def read() -> Sample:
            if isinstance(index, DrawnIndex):
                pixels, captions = index.draw(number, choice.shape, self.data.fps)
                return Sample(pixels, 1, captions)
            piece = self.ahead[kind].get(number)
            retries.extend([where] * piece.retries)
            members = parse_sample(piece.data, index.key(number))
            if index.encoded:
                latents, captions, text = read_encoded(members, choice.shape, self.encoded)
                return Sample(latents, 1, captions, text)
            captions = captions_of(members)
            clip = decode_sample(members, kind, frames=frames, size=(height, width), fps=self.data.fps, start=start)
            return Sample(clip.pixels, clip.starts, captions)

        return self.cache.get(kind, number, start, read)


class Places(DistributedSampler):
    """Hands out places from wherever training stands when iteration begins. A subclass of `DistributedSampler`,
    because Lightning replaces any other sampler by its own.

    Args:
        places: called at the beginning of each iteration.
        length: how many there are; None: no end.
        workers: processes that take turns; each is told what it gets next."""

    def __init__(self, places: Callable[[], Iterator[RankBatch]], length: int | None = None, workers: int = 0):
        self.places, self.length, self.workers = places, length, workers

    def __iter__(self) -> Iterator[RankBatch]:
        places = self.places()
        coming = deque(islice(places, max(1, self.workers)))
        for place in places:
            coming.append(place)
            yield coming.popleft()._replace(ahead=place)
        yield from coming

    def __len__(self) -> int:
        if self.length is None:
            raise TypeError("the order of training has no end")
        return self.length

    def set_epoch(self, epoch: int) -> None:
        """Epochs follow from the step."""
