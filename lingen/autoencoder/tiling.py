"""Long and large clips through any autoencoder in tiles, with memory that does not grow with the length.

Movie Gen (arXiv 2410.13720, section 3.1.1) cuts time into tiles of 32 frames: those of the encoder lie side by side,
those of the decoder overlap by 16 frames and are cross-faded linearly. Tiles in space, for clips of which a single tile
of time is too large, are ours. A tile does not see what lies beyond its edge: near an edge, within the network's reach,
the result differs from an untiled one, and there its weight is lower.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise, product
from typing import Annotated, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from lingen.autoencoder import Autoencoder
from lingen.recipe.bounds import AtLeast
from lingen.recipe.errors import SettingError
from lingen.recipe.signature import checked

Clip = Float[Tensor, "b 3 _t h w"]
Latents = Float[Tensor, "b c _t _h _w"]


@checked
@dataclass(frozen=True, kw_only=True)
class Tiles:
    """How a clip is cut, in frames and pixels of the clip, for the encoder and the decoder alike.

    Raises SettingError for what makes no sense by itself; `cells` for what does not fit an autoencoder.
    """

    frames: Annotated[int | None, AtLeast(1)] = 32
    """Frames of a tile; None: time is not cut."""
    overlap: Annotated[int, AtLeast(0)] = 16
    """Frames that two neighbours of the decoder share."""
    encoder_overlap: Annotated[int, AtLeast(0)] = 0
    """The same of the encoder."""
    size: Annotated[tuple[int, int] | None, AtLeast(1)] = None
    """Height and width of a tile; None: space is not cut."""
    size_overlap: Annotated[int, AtLeast(0)] = 64
    """Pixels that two neighbours share at least, both ways; they are spread evenly and so may share more."""

    def __post_init__(self) -> None:
        if self.frames is not None:
            _check_overlap("overlap", self.overlap, "frames", self.frames)
            _check_overlap("encoder_overlap", self.encoder_overlap, "frames", self.frames)
        for side in self.size or ():
            _check_overlap("size_overlap", self.size_overlap, "size", side)

    def cells(self, strides: tuple[int, int, int], overlap: str) -> _Cut:
        """The tiles counted in latents; `overlap` names the setting of the encoder or of the decoder.

        Raises:
            SettingError: names the number that is no multiple of its stride.
        """
        asked = {"frames": [self.frames], "size": [*(self.size or (None, None))]}
        lengths = [(name, length) for name, each in asked.items() for length in each]
        overlaps = [overlap, "size_overlap", "size_overlap"]
        found = [
            None if length is None else (_cells(name, length, stride), _cells(shared, getattr(self, shared), stride))
            for (name, length), shared, stride in zip(lengths, overlaps, strides, strict=True)
        ]
        return _Cut(*(one or (None, 0) for one in found))


class _Cut(NamedTuple):
    """Latents of a tile (None: all) and those that neighbours share, by axis."""

    t: tuple[int | None, int]
    h: tuple[int | None, int]
    w: tuple[int | None, int]


def _check_overlap(name: str, overlap: int, of: str, length: int) -> None:
    if overlap >= length:
        raise SettingError(name, f"{name}={overlap} must be less than the tile it is part of, {of}={length}.")


def _cells(name: str, length: int, stride: int) -> int:
    if length % stride:
        raise SettingError(name, f"{name}={length} is no multiple of the autoencoder's stride {stride}.")
    return length // stride


def encode_tiled(
    autoencoder: Autoencoder, pieces: Iterable[Clip], tiles: Tiles | None = None, *, batch: int = 1
) -> Iterator[Latents]:
    """A clip that comes piece by piece -> its latents, piece by piece.

    Args:
        pieces: in -1..1, of any number of frames each; their sizes do not change the result.
        tiles: None is Movie Gen's.
        batch: tiles in one call of the autoencoder: as many clips as it holds times as many as there are.
    Yields:
        latents whose concatenation in time has ceil(frames / strides[0]) latent frames. A clip that is no larger than
        a tile is one call.
    Raises:
        SettingError: tiles that do not fit the strides.
        ValueError: no frames, a size that is no multiple of the strides, an autoencoder that breaks its contract.
    """
    tiles = tiles or Tiles()
    strides = autoencoder.strides
    cut = tiles.cells(strides, "encoder_overlap")
    return _tiled(autoencoder.encode, pieces, cut, strides, (1, 1, 1), batch)


def decode_tiled(
    autoencoder: Autoencoder, latents: Latents, tiles: Tiles | None = None, *, batch: int = 1
) -> Iterator[Clip]:
    """Latents -> the clip, piece by piece, with the surplus frames that `decode` gives; arguments as `encode_tiled`."""
    tiles = tiles or Tiles()
    cut = tiles.cells(autoencoder.strides, "overlap")
    return _tiled(autoencoder.decode, [latents], cut, (1, 1, 1), autoencoder.strides, batch)


def _tiled(
    call: Callable[[Tensor], Tensor],
    pieces: Iterable[Tensor],
    cut: _Cut,
    before: tuple[int, int, int],
    after: tuple[int, int, int],
    batch: int,
) -> Iterator[Tensor]:
    """Cuts a stream into tiles, calls the network on each, joins the results. `before` and `after`: frames, rows and
    columns of the input and of the output for one latent."""
    if batch < 1:
        raise ValueError(f"batch={batch} tiles in a call; it must be 1 or more.")
    length, overlap = cut.t
    windows = _windows(pieces, None if length is None else length * before[0], overlap * before[0])
    expected = None if length is None else length * after[0]
    done = _call(call, (tile for window in windows for tile in _crops(*window, cut, before)), batch)
    yield from _fade(_joined(done, expected, after), overlap * after[0])


def _windows(pieces: Iterable[Tensor], length: int | None, overlap: int) -> Iterator[tuple[Tensor, bool]]:
    """Yields (window of `length` frames, is it the last); a window begins with the last `overlap` frames of the one
    before."""
    held: Tensor | None = None
    for piece in pieces:
        held = piece if held is None else torch.cat([held, piece], 2)
        while length is not None and held.shape[2] > length:
            yield held[:, :, :length], False
            held = held[:, :, length - overlap :]
    if held is None or not held.shape[2]:
        raise ValueError("There are no frames to cut into tiles.")
    yield held, True


class _Grid(NamedTuple):
    """How a window is cut in space."""

    last: bool
    """Whether the window ends the clip."""
    clips: int
    rows: tuple[list[int], int]
    """First latents of the tiles, and latents of each."""
    columns: tuple[list[int], int]


class _Tile(NamedTuple):
    """A tile on its way through the network."""

    values: Tensor
    grid: _Grid


def _crops(window: Tensor, last: bool, cut: _Cut, before: tuple[int, int, int]) -> Iterator[_Tile]:
    """The tiles of a window, row by row."""
    sizes = []
    for axis, pixels, stride in zip(("height", "width"), window.shape[3:], before[1:], strict=True):
        if pixels % stride:
            raise ValueError(f"The {axis} of {pixels} pixels is no multiple of the autoencoder's stride {stride}.")
        sizes.append(pixels // stride)
    grid = _Grid(last, len(window), _spread(sizes[0], *cut.h), _spread(sizes[1], *cut.w))
    (ys, height), (xs, width) = grid.rows, grid.columns
    for y, x in product(ys, xs):
        rows = slice(y * before[1], (y + height) * before[1])
        columns = slice(x * before[2], (x + width) * before[2])
        yield _Tile(window[..., rows, columns], grid)


def _spread(size: int, length: int | None, overlap: int) -> tuple[list[int], int]:
    """First latents of tiles that cover `size` latents evenly and share `overlap` or more, and a tile's length."""
    if length is None or length >= size:
        return [0], size
    count = -(-(size - overlap) // (length - overlap))
    return [number * (size - length) // (count - 1) for number in range(count)], length


def _call(call: Callable[[Tensor], Tensor], tiles: Iterable[_Tile], batch: int) -> Iterator[_Tile]:
    """Up to `batch` tiles of one shape in a call."""
    group: list[_Tile] = []

    def flush() -> Iterator[_Tile]:
        if not group:
            return
        values = call(torch.cat([tile.values for tile in group]) if len(group) > 1 else group[0].values)
        parts = values.split([tile.grid.clips for tile in group])
        found = [tile._replace(values=part) for tile, part in zip(group, parts, strict=True)]
        group.clear()
        yield from found

    for tile in tiles:
        if group and (len(group) == batch or group[0].values.shape != tile.values.shape):
            yield from flush()
        group.append(tile)
    yield from flush()


def _joined(done: Iterator[_Tile], expected: int | None, after: tuple[int, int, int]) -> Iterator[tuple[Tensor, bool]]:
    """Windows of which the tiles in space are cross-faded."""
    for first in done:
        _check(first, expected, after)
        if len(first.grid.rows[0]) == len(first.grid.columns[0]) == 1:
            yield first.values, first.grid.last
            continue
        wide = first.values.to(torch.promote_types(first.values.dtype, torch.float32))
        rows, columns = (
            _weights([start * stride for start in starts], length * stride, wide)
            for (starts, length), stride in zip((first.grid.rows, first.grid.columns), after[1:], strict=True)
        )
        sizes = [axis[-1][0] + len(axis[-1][1]) for axis in (rows, columns)]
        whole = wide.new_zeros(*wide.shape[:3], *sizes)
        for number, ((y, row), (x, column)) in enumerate(product(rows, columns)):
            values = next(done).values if number else wide
            whole[..., y : y + len(row), x : x + len(column)] += values * (row[:, None] * column)
        yield whole.to(first.values.dtype), first.grid.last


def _check(tile: _Tile, expected: int | None, after: tuple[int, int, int]) -> None:
    """ValueError where the network's output has another size than its strides say."""
    frames, *size = tile.values.shape[2:]
    promised = [tile.grid.rows[1] * after[1], tile.grid.columns[1] * after[2]]
    if size != promised:
        raise ValueError(f"The autoencoder's strides promise {promised} pixels or latents of a tile, it gave {size}.")
    if not tile.grid.last and frames != expected:
        raise ValueError(
            f"A tile should have become {expected} frames, as the autoencoder's stride says, it gave {frames}: such an "
            "autoencoder cannot be cut in time; leave time whole with Tiles(frames=None)."
        )


def _weights(starts: Sequence[int], length: int, like: Tensor) -> list[tuple[int, Tensor]]:
    """For each tile of an axis its start and its weights; those of all tiles at a place add up to 1."""
    shared = [one + length - other for one, other in pairwise(starts)]
    ramps = [_trapezoid(length, up, down, like) for up, down in zip([0, *shared], [*shared, 0], strict=True)]
    total = like.new_zeros(starts[-1] + length)
    for start, ramp in zip(starts, ramps, strict=True):
        total[start : start + length] += ramp
    return [(start, ramp / total[start : start + length]) for start, ramp in zip(starts, ramps, strict=True)]


def _trapezoid(length: int, up: int, down: int, like: Tensor) -> Tensor:
    """Rises along the first `up` places, falls along the last `down` ones, 1 between; never 0."""
    place = torch.arange(length, device=like.device, dtype=like.dtype) + 0.5
    ones = torch.ones_like(place)
    return torch.minimum(place / up if up else ones, (length - place) / down if down else ones).clamp(max=1)


def _fade(windows: Iterable[tuple[Tensor, bool]], overlap: int) -> Iterator[Tensor]:
    """Cross-fades windows in time; yields each piece as soon as no later window overlaps it."""
    total: Tensor | None = None
    weights: Tensor | None = None
    for window, last in windows:
        if not overlap or (last and total is None):
            yield window
            continue
        wide = window.to(torch.promote_types(window.dtype, torch.float32))
        ramp = _trapezoid(wide.shape[2], 0 if total is None else overlap, 0 if last else overlap, wide)
        wide = wide * ramp[:, None, None]
        if total is not None and weights is not None:
            wide[:, :, :overlap] += total
            ramp[:overlap] += weights
        ready = wide.shape[2] - (0 if last else overlap)
        yield (wide[:, :, :ready] / ramp[:ready, None, None]).to(window.dtype)
        total, weights = wide[:, :, ready:].clone(), ramp[ready:].clone()
