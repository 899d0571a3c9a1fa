"""The order of training as pure functions: which kind a step is, which samples it holds, which of them a rank takes.

Nothing here keeps state: everything follows from the seed and the number of the optimiser step. As long as
``ranks * batch * accumulate`` stays the same, a run may resume with any number of ranks and loses or repeats nothing.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from functools import lru_cache
from typing import NamedTuple

from lingen.config import DataConfig, PerKind

KINDS = ("image", "video")
ROUNDS = 6
WORD = (1 << 64) - 1


def kind_of(step: int, mix: PerKind) -> str:
    """``image`` or ``video``: exactly ``mix.image`` image steps in any ``mix.image + mix.video`` in a row, spread out.

    Where both kinds are mixed, step 0 is an image step, so that both are seen early. ValueError for an impossible mix.
    """
    return "image" if count_before("image", step + 1, mix) > count_before("image", step, mix) else "video"


def count_before(kind: str, step: int, mix: PerKind) -> int:
    """How many of the steps 0 .. step - 1 are of this kind; constant time."""
    period = mix.image + mix.video
    if min(mix.image, mix.video) < 0 or period == 0:
        raise ValueError(
            f"data.mix needs two numbers from 0 up, not both 0; got image: {mix.image}, video: {mix.video}."
        )
    images = (step * mix.image + period - 1) // period
    return images if kind == "image" else step - images


def digest(*parts: object) -> int:
    """A 64-bit number that depends on all parts (numbers and strings), the same on every machine."""
    return int.from_bytes(hashlib.blake2b(repr(parts).encode(), digest_size=8).digest(), "big")


def uniform(*parts: object) -> float:
    """A number in [0, 1) that depends on all parts."""
    return (digest(*parts) >> 11) / (1 << 53)


def permute(position: int, size: int, key: int) -> int:
    """Where `position` goes in the `key`-th pseudo-random order of ``range(size)``.

    A Feistel network over the smallest square of powers of two that holds `size`, walked until it lands inside (Black
    and Rogaway, "Ciphers with arbitrary finite domains", 2002): a bijection that takes no memory, whatever the size.
    """
    half = max(1, ((size - 1).bit_length() + 1) // 2)
    mask = (1 << half) - 1
    while True:
        left, right = position >> half, position & mask
        for turn in range(ROUNDS):
            left, right = right, left ^ (_scramble(right, key, turn) & mask)
        position = left << half | right
        if position < size:
            return position


def _scramble(value: int, key: int, turn: int) -> int:
    """The finaliser of SplitMix64 (Steele, Lea and Flood, 2014)."""
    value = (value * 0x9E3779B97F4A7C15 + key + turn * 0xD1B54A32D192ED03) & WORD
    value = ((value ^ value >> 30) * 0xBF58476D1CE4E5B9) & WORD
    value = ((value ^ value >> 27) * 0x94D049BB133111EB) & WORD
    return value ^ value >> 31


def sample_at(number: int, size: int, stream: tuple[object, ...]) -> tuple[int, int]:
    """The `number`-th sample of an endless stream over `size` samples: (epoch, index).

    An epoch holds each sample exactly once, each epoch in another order. `stream` is what the order depends on: the
    seed, the stage and the kind.
    """
    epoch, position = divmod(number, size)
    return epoch, permute(position, size, _epoch_key(stream, epoch))


@lru_cache(maxsize=64)
def _epoch_key(stream: tuple[object, ...], epoch: int) -> int:
    return digest("epoch", stream, epoch)


def spare_for(number: int, attempt: int, size: int, stream: tuple[object, ...]) -> int:
    """Index of the sample that stands in for the `number`-th one, at the `attempt`-th try (1, 2, ...)."""
    return digest("spare", stream, number, attempt) % size


class Place(NamedTuple):
    """What one rank takes for one batch."""

    kind: str
    step: int
    numbers: Sequence[int]
    """Numbers of its samples in the stream of this kind."""
    slots: Sequence[int]
    """Numbers of the same samples in the stream of both kinds."""
    first: bool = False
    """The first batch of a loader: it also reports what was found when the shards were opened."""


def place_of(step: int, micro: int, data: DataConfig, *, accumulate: int = 1, rank: int = 0, world: int = 1) -> Place:
    """The samples that `rank` of `world` takes for batch `micro` of `accumulate` of an optimiser step.

    A step of a kind holds ``world * batch * accumulate`` samples in a row of that kind's stream; the ranks of one micro
    batch stand next to each other. Hence 2 ranks with batch B see at each step what 1 rank with batch 2B sees, under
    the same numbers.
    """
    kind = kind_of(step, data.mix)
    per_step = {k: world * accumulate * getattr(data.batch, k) for k in KINDS}
    before = {k: count_before(k, step, data.mix) * per_step[k] for k in KINDS}
    batch = getattr(data.batch, kind)
    offset = (micro * world + rank) * batch
    number, slot = before[kind] + offset, sum(before.values()) + offset
    return Place(kind, step, range(number, number + batch), range(slot, slot + batch))


def places(start: int, data: DataConfig, *, accumulate: int = 1, rank: int = 0, world: int = 1) -> Iterator[Place]:
    """One rank's batches from optimiser step `start` on, without end."""
    step = start
    while True:
        for micro in range(accumulate):
            place = place_of(step, micro, data, accumulate=accumulate, rank=rank, world=world)
            yield place._replace(first=step == start and micro == 0)
        step += 1


def held_out_places(kind: str, count: int, batch: int, *, rank: int = 0, world: int = 1) -> list[Place]:
    """One rank's share of the first `count` held-out samples in their fixed order, in batches of up to `batch`.

    Every rank gets as many batches of the same sizes; where `count` is no multiple of `world`, the first samples come
    again.
    """
    share = -(-count // world)
    own = [(position * world + rank) % count for position in range(share)]
    return [Place(kind, 0, own[i : i + batch], own[i : i + batch], first=i == 0) for i in range(0, share, batch)]
