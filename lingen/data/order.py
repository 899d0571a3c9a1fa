"""The order of training as pure functions: which kind and bucket a step is, which samples it holds, who takes which.

Nothing here keeps state: everything follows from the seed, the sizes and the number of the optimiser step, plus, after
a run went on with another number of ranks, another batch or another mix, a few integers (`Anchor`).

- Kinds: exactly ``mix.image`` image steps in any ``mix.image + mix.video`` in a row; `round_of` a stage's data tells
  that mix of steps where the recipe counts samples.
- Buckets: all ranks take samples of one bucket in a step, so that their tensors have one shape. Buckets take turns in
  shuffled rounds, in proportion to their samples.
- Samples: each bucket is an endless stream of epochs, each of which holds each of its samples exactly once, in another
  order. The last samples of an epoch that do not fill a step stand at the beginning of the next one: none is left out.

Reading is by random access: a sample is one ranged read, made ahead of time. Clips are megabytes, so that a read costs
little beside its bytes on network disks and in object stores; for small samples on disks that are slow to seek, `block`
keeps neighbours of a shard near each other."""

from __future__ import annotations

import hashlib
import itertools
from bisect import bisect_right
from collections.abc import Iterator, Mapping, Sequence
from fractions import Fraction
from functools import lru_cache
from typing import NamedTuple

from lingen.recipe.sections import KINDS, PerKind, Recipe
from lingen.recipe.sizes import round_of

ROUND = 512
"""Steps, about, in a round of buckets."""
WINDOW = 64
"""Blocks that are open at a time, where the order goes by blocks."""
TURNS = 6
WORD = (1 << 64) - 1

StreamKey = tuple[object, ...]
"""What an order depends on, e.g. the seed, the stage and the kind."""


def digest(*parts: object) -> int:
    """A 64-bit hash of all parts (numbers and strings), the same on every machine."""
    return int.from_bytes(hashlib.blake2b(repr(parts).encode(), digest_size=8).digest(), "big")


def uniform(*parts: object) -> float:
    """A hash of all parts as a number in [0, 1)."""
    return (digest(*parts) >> 11) / (1 << 53)


def permute(position: int, size: int, key: int) -> int:
    """Where `position` goes in the `key`-th pseudo-random order of ``range(size)``. A Feistel network over the smallest
    square of powers of two that holds `size`, repeated until the result is below `size` (Black and Rogaway, "Ciphers
    with arbitrary finite domains", 2002): a bijection that takes no memory, whatever the size."""
    half = max(1, ((size - 1).bit_length() + 1) // 2)
    mask = (1 << half) - 1
    while True:
        left, right = position >> half, position & mask
        for turn in range(TURNS):  # each by the finaliser of SplitMix64 (Steele, Lea and Flood, 2014)
            mixed = (right * 0x9E3779B97F4A7C15 + key + turn * 0xD1B54A32D192ED03) & WORD
            mixed = ((mixed ^ mixed >> 30) * 0xBF58476D1CE4E5B9) & WORD
            mixed = ((mixed ^ mixed >> 27) * 0x94D049BB133111EB) & WORD
            left, right = right, left ^ ((mixed ^ mixed >> 31) & mask)
        position = left << half | right
        if position < size:
            return position


def sample_at(number: int, size: int, stream: StreamKey, block: int = 1) -> tuple[int, int]:
    """The `number`-th sample of an endless stream over `size` samples: (epoch, index). An epoch holds each sample
    exactly once, each epoch in another order. With a `block` above 1, the order is one of blocks of as many neighbours,
    shuffled within windows of `WINDOW` blocks: reads of the same time fall into few places. Where blocks begin differs
    from epoch to epoch."""
    epoch, position = divmod(number, size)
    key = _epoch_key(stream, epoch)
    return epoch, permute(position, size, key) if block == 1 else _in_blocks(position, size, key, block)


def _in_blocks(position: int, size: int, key: int, block: int) -> int:
    """A bijection of ``range(size)``: shuffled whole blocks, the rest last, then positions shuffled within a window."""
    window, within = divmod(position, block * WINDOW)
    first = window * block * WINDOW
    position = first + permute(within, min(block * WINDOW, size - first), digest(key, window))
    number, within = divmod(position, block)
    if number < size // block:
        number = permute(number, size // block, key)
    return (number * block + within + key) % size


@lru_cache(maxsize=64)
def _epoch_key(stream: StreamKey, epoch: int) -> int:
    return digest("epoch", stream, epoch)


def spare_for(number: int, attempt: int, size: int, stream: StreamKey) -> int:
    """Index of the sample that stands in for the `number`-th one, at the `attempt`-th try (1, 2, ...)."""
    return digest("spare", stream, number, attempt) % size


def kind_of(step: int, mix: PerKind) -> str:
    """``image`` or ``video``: exactly ``mix.image`` image steps in any ``mix.image + mix.video`` in a row, spread out.
    Of two kinds step 0 is an image step, so that both are seen early. ValueError for an impossible mix."""
    return "image" if count_before("image", step + 1, mix) > count_before("image", step, mix) else "video"


def count_before(kind: str, step: int, mix: PerKind) -> int:
    """How many of the steps 0 .. step - 1 are of this kind; constant time."""
    period = mix.image + mix.video
    if min(mix.image, mix.video) < 0 or period == 0:
        raise ValueError(f"data.mix needs two numbers from 0 up, not both 0; got {mix.image} and {mix.video}.")
    images = (step * mix.image + period - 1) // period
    return images if kind == "image" else step - images


def steps_of(recipe: Recipe) -> dict[str, int]:
    """Optimiser steps of each kind in a whole stage."""
    mix = round_of(recipe.data)
    return {kind: count_before(kind, recipe.train.steps, mix) for kind in KINDS if getattr(mix, kind)}


class Lane(NamedTuple):
    """A bucket as the order sees it."""

    samples: int
    batch: int
    """Samples in one rank's batch."""


class Turns:
    """Which bucket each step of a kind takes, and how often each was taken before; a pure function of the step.

    A round holds about `ROUND` steps, and an epoch a whole number of rounds. Before round r, bucket b was taken
    ``floor(r n_b / (g_b rounds))`` times, where n_b samples in steps of g_b fill it: after an epoch it is less than one
    step behind, and the difference is carried over. Within a round the turns are shuffled.

    Args:
        lanes: the buckets.
        per_batch: batches of all ranks in a step: ranks times batches accumulated.
        stream: what the order depends on."""

    def __init__(self, lanes: Sequence[Lane], per_batch: int, stream: StreamKey):
        self.lanes = lanes
        self.sizes = [lane.batch * per_batch for lane in lanes]
        """Samples in a step of each bucket."""
        self.stream = stream
        self.steps = sum((Fraction(lane.samples, size) for lane, size in zip(lanes, self.sizes, strict=True)))
        """Steps in an epoch, a fraction."""
        self.rounds = max(1, round(self.steps / ROUND))
        """Rounds in an epoch."""
        self._round = lru_cache(maxsize=2)(self._draw_round)

    def at(self, step: int) -> tuple[int, list[int]]:
        """The bucket that the `step`-th step of this kind takes, and how often each was taken before."""
        low = int(step * self.rounds / self.steps)
        high = int((step + len(self.lanes) + 1) * self.rounds / self.steps) + 1
        number = low + bisect_right(range(low, high), step, key=lambda number: sum(self._before(number + 1)))
        before = self._before(number)
        turns = self._round(number)
        position = step - sum(before)
        return turns[position], [count + turns[:position].count(lane) for lane, count in enumerate(before)]

    def taken(self, step: int) -> list[int]:
        """Samples of each bucket in the steps before this one."""
        return [count * size for count, size in zip(self.at(step)[1], self.sizes, strict=True)]

    def _before(self, number: int) -> list[int]:
        """How often each bucket was taken before a round."""
        pairs = zip(self.lanes, self.sizes, strict=True)
        return [number * lane.samples // (size * self.rounds) for lane, size in pairs]

    def _draw_round(self, number: int) -> list[int]:
        before, after = self._before(number), self._before(number + 1)
        turns = [lane for lane, (a, b) in enumerate(zip(before, after, strict=True)) for _ in range(b - a)]
        key = digest("round", self.stream, number)
        return [turns[permute(position, len(turns), key)] for position in range(len(turns))]


class RankBatch(NamedTuple):
    """What one rank takes for one batch."""

    kind: str
    step: int
    bucket: int
    """Number of the bucket among those of its kind."""
    numbers: Sequence[int]
    """Numbers of its samples in this bucket's endless stream."""
    slots: Sequence[int]
    """Numbers of the same samples in the stream of all kinds and buckets."""
    ahead: RankBatch | None = None
    """The batch that the same process makes next."""


class Anchor(NamedTuple):
    """The start of an order: a step, and how many samples of each bucket were taken before it."""

    step: int
    taken: Mapping[str, Sequence[int]]
    """Of every kind that was taken: one that the mix asks for no more may come again."""


class BatchOrder:
    """The places of a stage's batches.

    Ranks of one micro batch stand next to each other: 2 ranks with batch B see at each step what 1 rank with batch 2B
    sees, under the same numbers.

    Args:
        lanes: kind -> its buckets; each holds samples.
        mix: steps of each kind in a round of kinds.
        stream: what the order depends on: the seed and the stage.
        accumulate: batches in an optimiser step.
        world: ranks.
        anchor: where it begins; None: at the first step, with nothing taken."""

    def __init__(
        self, lanes: Mapping[str, Sequence[Lane]], mix: PerKind, stream: StreamKey, *, accumulate: int = 1,
        world: int = 1, anchor: Anchor | None = None,
    ):  # fmt: skip
        self.mix, self.accumulate, self.world = mix, accumulate, world
        self.anchor = anchor or Anchor(0, {kind: [0] * len(of_kind) for kind, of_kind in lanes.items()})
        self.turns = {kind: Turns(of_kind, accumulate * world, (*stream, kind)) for kind, of_kind in lanes.items()}

    def place(self, step: int, micro: int = 0, rank: int = 0) -> RankBatch:
        """The samples that `rank` takes for batch `micro` of an optimiser step."""
        kind = kind_of(step, self.mix)
        bucket, _ = self.turns[kind].at(self._steps_before(kind, step))
        taken = self.taken(step)
        batch = self.turns[kind].lanes[bucket].batch
        offset = (micro * self.world + rank) * batch
        number, slot = taken[kind][bucket] + offset, sum(map(sum, taken.values())) + offset
        return RankBatch(kind, step, bucket, range(number, number + batch), range(slot, slot + batch))

    def places(self, start: int, rank: int = 0) -> Iterator[RankBatch]:
        """One rank's batches from optimiser step `start` on, without end."""
        for step in itertools.count(start):
            yield from (self.place(step, micro, rank) for micro in range(self.accumulate))

    def taken(self, step: int) -> dict[str, list[int]]:
        """Samples of each bucket that were taken before a step, by all ranks."""
        since = {kind: turns.taken(self._steps_before(kind, step)) for kind, turns in self.turns.items()}
        taken = {kind: list(before) for kind, before in self.anchor.taken.items()}
        for kind, counts in since.items():
            before = taken.get(kind, [0] * len(counts))
            taken[kind] = [sum(pair) for pair in zip(before, counts, strict=True)]
        return taken

    def leads_to(self, later: Anchor) -> bool:
        """Whether these samples were taken before that step, had this order been followed from its anchor on."""
        taken = self.taken(later.step)
        return all(list(later.taken.get(kind, [])) == taken[kind] for kind in self.turns)

    def _steps_before(self, kind: str, step: int) -> int:
        """Steps of a kind between the anchor and `step`."""
        return count_before(kind, step, self.mix) - count_before(kind, self.anchor.step, self.mix)


def held_out_places(
    kind: str, count: int, batch: int, *, bucket: int = 0, rank: int = 0, world: int = 1
) -> list[RankBatch]:
    """One rank's share of the first `count` held-out samples of a bucket in their fixed order, in batches of up to
    `batch`. Every rank gets as many batches of the same sizes; where `count` is no multiple of `world`, the first come
    again with slot -1, to be left out of means, which are then the same for any number of ranks."""
    share = -(-count // world)
    own = [position * world + rank for position in range(share)]
    slots = [number if number < count else -1 for number in own]
    numbers = [number % count for number in own]
    return [RankBatch(kind, 0, bucket, numbers[i : i + batch], slots[i : i + batch]) for i in range(0, share, batch)]
