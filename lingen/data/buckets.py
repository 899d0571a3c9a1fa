"""Buckets: the samples of a kind sorted by length and aspect ratio, from what the manifest says, without decoding."""

import contextlib
import hashlib
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
from jaxtyping import Int

from lingen.data.index import Index, Mapped, Numbers
from lingen.data.indexing import kept_folder
from lingen.data.order import Lane
from lingen.recipe.errors import RecipeError
from lingen.recipe.sections import DataConfig

SORTED_AT_ONCE = 1 << 20
"""Samples that are sorted at a time."""
REASONS = ("short clip: fewer than {frames} frames at {fps:g} fps", "other size: encoded for another clip")
"""Why a sample can be in no bucket."""


class Shape(NamedTuple):
    """Size of a clip; an image has one frame."""

    frames: int
    height: int
    width: int

    def __str__(self) -> str:
        return f"{self.frames}x{self.height}x{self.width}"


class LeftOut(NamedTuple):
    """Samples that are in no bucket."""

    number: int
    example: str
    """``shard:key`` of the first one."""


@dataclass(frozen=True)
class Pool:
    """The samples of a kind in their buckets. Buckets without samples are left out."""

    kind: str
    index: Index
    first: Shape
    """The shape of ``data.frames`` and ``data.size``."""
    shapes: list[Shape]
    """Shape of each bucket."""
    batches: list[int]
    """Samples in one rank's batch of each bucket."""
    rows: list[Numbers]
    """uint32: for each bucket the numbers of its samples in the index, ascending."""
    left_out: dict[str, LeftOut]
    """Reason -> the samples that are in no bucket because of it."""

    @property
    def lanes(self) -> list[Lane]:
        """The buckets as the order sees them."""
        return [Lane(len(rows), batch) for rows, batch in zip(self.rows, self.batches, strict=True)]

    def name_of(self, bucket: int) -> tuple[object, ...]:
        """The stream of random numbers of its order: the kind, and the shape unless it is the recipe's first."""
        shape = self.shapes[bucket]
        return (self.kind,) if shape == self.first else (self.kind, *shape)

    def __len__(self) -> int:
        return sum(map(len, self.rows))


def pool_of(index: Index, data: DataConfig, kind: str, tokens: Callable[[Shape], int], setting: str) -> Pool:
    """Sorts the samples of an index.

    A video goes to the longest clip that it fills, and among those to the frame whose aspect ratio is nearest. What the
    manifest does not tell counts as fitting ``data.frames`` and ``data.size``. Encoded samples must have been encoded
    for the very shape and frame rate. Drawn ones are dealt out, as many pixels of each shape. A batch holds as many
    samples as come to the tokens of ``data.batch`` samples of the first shape. RecipeError where several shapes are
    asked for, and there is no manifest to sort by, and where one sample of a shape comes to more tokens than a batch
    may have.

    Args:
        tokens: of one sample of a shape.
        setting: where the shards stand in the recipe, for messages."""
    lengths = [data.frames, *data.lengths] if kind == "video" else [1]
    shapes = list(dict.fromkeys(Shape(frames, *size) for frames in lengths for size in [data.size, *data.sizes]))
    if len(shapes) > 1 and not (index.mark or index.drawn):
        cure = f"write it with `lingen data index {index.shards[0].folder}`."
        raise RecipeError(f"{setting}: data.sizes and data.lengths need a manifest to sort the samples by; {cure}")
    chunks = _sorted(index, shapes, kind, data.fps)
    if index.mark:
        name = hashlib.sha256(repr((shapes, data.fps, kind)).encode()).hexdigest()[:8]
        folder = kept_folder(f"{index.mark}-{name}", lambda work: _write(work, chunks, len(shapes)))
        parts: list[Numbers] = [Mapped(folder / str(part), np.uint32) for part in range(len(shapes) + len(REASONS))]
    else:
        parts = [np.concatenate(part) for part in zip(*chunks, strict=True)]
    rows, out = parts[: len(shapes)], parts[len(shapes) :]
    budget = getattr(data.batch, kind) * tokens(shapes[0])
    used = [number for number, part in enumerate(rows) if len(part)]
    for number in used:
        if tokens(shapes[number]) > budget:
            raise RecipeError(
                f"{setting}: one sample of {shapes[number]} comes to {tokens(shapes[number]):,} tokens, more than the "
                f"{budget:,} of a batch (data.batch.{kind} samples of {shapes[0]}); make the largest size and length "
                f"data.size and data.frames, or raise data.batch.{kind} to "
                f"{math.ceil(tokens(shapes[number]) / tokens(shapes[0]))}."
            )
    least = min(shape.frames for shape in shapes)
    left_out = {
        reason.format(frames=least, fps=data.fps): LeftOut(len(part), index.where(int(part[0])))
        for reason, part in zip(REASONS, out, strict=True)
        if len(part)
    }
    batches = [budget // tokens(shapes[number]) for number in used]
    own, rows = [shapes[number] for number in used], [rows[number] for number in used]
    return Pool(kind, index, shapes[0], own, batches, rows, left_out)


def _write(folder: Path, chunks: Iterator[list[np.ndarray]], shapes: int) -> None:
    with contextlib.ExitStack() as stack:
        files = [stack.enter_context((folder / str(part)).open("wb")) for part in range(shapes + len(REASONS))]
        for chunk in chunks:
            for file, rows in zip(files, chunk, strict=True):
                file.write(rows.tobytes())


def _sorted(index: Index, shapes: Sequence[Shape], kind: str, fps: float) -> Iterator[list[np.ndarray]]:
    """For some samples at a time: the numbers of those of each shape, then of those left out for each reason."""
    sort = _deal if index.drawn else _sort_encoded if index.encoded else _sort_media
    for start in range(0, len(index), SORTED_AT_ONCE) or [0]:
        records = index.records[start : start + SORTED_AT_ONCE]
        found = sort(records, shapes, kind, fps)
        yield [
            (np.flatnonzero(found == part) + start).astype(np.uint32)
            for part in [*range(len(shapes)), *range(-1, -1 - len(REASONS), -1)]
        ]


def _sort_media(records: np.ndarray, shapes: Sequence[Shape], kind: str, fps: float) -> Int[np.ndarray, " n"]:
    """The number of each sample's shape, or -1 - the number of the reason why it has none."""
    lengths = np.array(sorted({shape.frames for shape in shapes}))
    sizes = list(dict.fromkeys(shape[1:] for shape in shapes))
    numbers = {shape: number for number, shape in enumerate(shapes)}
    table = np.array([[numbers[Shape(int(frames), *size)] for size in sizes] for frames in lengths])
    with np.errstate(divide="ignore", invalid="ignore"):
        ratio = np.log(records["width"] / records["height"].astype(np.float64))
        filled = np.floor(records["frames"] / records["fps"].astype(np.float64) * fps + 1e-3)
    distance = np.abs(ratio[:, None] - np.log([width / height for height, width in sizes]))
    nearest = np.where(np.isfinite(ratio), np.argmin(distance, 1), 0)
    if kind == "image":
        return table[0, nearest]
    filled = np.where(np.isfinite(filled) & (records["frames"] > 0), filled, shapes[0].frames)
    longest = np.searchsorted(lengths, filled, side="right") - 1
    return np.where(longest < 0, -1, table[longest, nearest])


def _sort_encoded(records: np.ndarray, shapes: Sequence[Shape], kind: str, fps: float) -> Int[np.ndarray, " n"]:
    """As `_sort_media`, for latents, whose shape is fixed."""
    found = np.full(len(records), -2)
    for number, (frames, height, width) in enumerate(shapes):
        same = (records["frames"] == frames) & (records["height"] == height) & (records["width"] == width)
        if kind == "video":
            same &= np.isclose(records["fps"], fps)
        found[same] = number
    return found


def _deal(records: np.ndarray, shapes: Sequence[Shape], kind: str, fps: float) -> Int[np.ndarray, " n"]:
    """As `_sort_media`, for what can be drawn in any shape: any run of numbers holds all shapes by their shares."""
    shares = np.cumsum([1 / math.prod(shape) for shape in shapes])
    return np.searchsorted(shares[:-1] / shares[-1], np.arange(len(records)) * (5**0.5 - 1) / 2 % 1, side="right")
