"""The ways through an autoencoder: exactly piece by piece, in tiles of its frames, or in one call.

Tiles are for frames that are too large for the memory (ours). Time is not cut: each tile is a stream of its own where
the autoencoder has exact ones, and all tiles go on in step. A tile does not see what lies beyond its edge: near an
edge, within the network's reach, the result differs from that of the whole frame, and there its weight is lower."""

import math
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from itertools import chain, pairwise, product
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from lingen.autoencoder import Autoencoder, streams
from lingen.recipe.errors import RecipeError, SettingError

Video = Float[Tensor, "b 3 _t h w"]
Latents = Float[Tensor, "b c _t _h _w"]

WAYS = ("exact", "tiled", "whole")
"""By its own streams; by its own streams, where it has them, in tiles of height and width that are cross-faded; in one
call, whose memory always grows with the pixels of the whole clip. The weights must be frozen: else one call keeps what
a backward pass would need."""

PIECE_FRAMES = 32
"""Frames in a piece that an autoencoder's stream gets."""


class Tiles(NamedTuple):
    """How a frame is cut, counted in latents."""

    size: tuple[int, int]
    """Height and width of a tile."""
    shared: tuple[int, int]
    """Rows and columns that two neighbours share at least; tiles are spread evenly and so may share more."""


def tiles_of(tile: tuple[int, int] | None, strides: tuple[int, int, int]) -> Tiles | None:
    """The tiles that are asked for, of which neighbours share a quarter (ours). SettingError for sides that the strides
    do not divide, or of which a quarter is less than a latent: without overlap, the edges of tiles would be visible.

    Args:
        tile: height and width in pixels; None: space is not cut.
        strides: the autoencoder's."""
    if tile is None:
        return None
    (height, width), (_, stride_h, stride_w) = tile, strides
    if height % stride_h or width % stride_w:
        told = f"height and width must be multiples of {stride_h} and {stride_w}, the autoencoder's strides"
        raise SettingError("tile", f"tile={height}x{width}: {told}.")
    latent = math.lcm(stride_h, stride_w)
    shared = min(tile) // 4 // latent * latent
    if not shared:
        why = "neighbours share a quarter of a tile, which must be a latent or more"
        raise SettingError(
            "tile", f"tile={height}x{width} is too small: {why}; take {4 * latent} pixels a side or more."
        )
    return Tiles((height // stride_h, width // stride_w), (shared // stride_h, shared // stride_w))


def ways_of(autoencoder: Autoencoder) -> list[str]:
    """The entries of `WAYS` that an autoencoder supports: ``exact`` needs streams."""
    return list(WAYS if streams(autoencoder) else WAYS[1:])


def way_for(autoencoder: Autoencoder, asked: str | None, name: str) -> str:
    """The way that was asked for; for None or ``auto`` exact where the autoencoder has streams, else whole. RecipeError
    for a way that it does not have."""
    ways = ways_of(autoencoder)
    if asked in (None, "auto"):
        return "exact" if "exact" in ways else "whole"
    if asked not in ways:
        what = f"The autoencoder '{name}' cannot go the way '{asked}'"
        raise RecipeError(f"{what}: it has no streams of its own; take {' or '.join(ways)}.")
    return str(asked)


def encode(autoencoder: Autoencoder, pieces: Iterable[Video], way: str, tiles: Tiles | None = None) -> Latents:
    """A clip in -1..1 that comes piece by piece -> its latents."""
    if way == "whole":
        with torch.enable_grad():  # without gradients, one that has streams takes them
            return autoencoder.encode(torch.cat(list(pieces), 2))
    return torch.cat(list(encode_tiled(autoencoder, pieces, tiles if way == "tiled" else None)), 2)


def decode(autoencoder: Autoencoder, latents: Latents, way: str, tiles: Tiles | None = None) -> Iterator[Video]:
    """Latents -> the clip piece by piece, with surplus frames at its end."""
    if way == "whole":
        with torch.enable_grad():
            video = autoencoder.decode(latents)
        yield video
    else:
        yield from decode_tiled(autoencoder, latents, tiles if way == "tiled" else None)


def encode_tiled(autoencoder: Autoencoder, pieces: Iterable[Video], tiles: Tiles | None) -> Iterator[Latents]:
    """A clip in -1..1 that comes piece by piece -> its latents, piece by piece; in one where it has no streams. Raises
    ValueError where there are no pieces."""
    pieces = iter(pieces)
    first = next(pieces, None)
    if first is None:
        raise ValueError("There are no frames to cut into tiles.")
    across = autoencoder.strides[1:]
    # A frame that is no multiple of the strides goes on whole: the autoencoder says what it takes.
    cuts = _cuts([-(-side // stride) for side, stride in zip(first.shape[3:], across, strict=True)], tiles)
    places = _places(cuts, across)
    clips = map(map, places, _copies(chain([first], pieces), len(places)))
    encode = autoencoder.encode_stream if streams(autoencoder) else partial(_at_once, autoencoder.encode)
    return _faded([encode(clip) for clip in clips], cuts, (1, 1))


def _copies(pieces: Iterator[Tensor], count: int) -> list[Iterator[Tensor]]:
    """Iterators over the same pieces. Only those are held that one iterator took and another one did not yet;
    itertools.tee holds up to 57 more."""
    waiting: list[deque[Tensor]] = [deque() for _ in range(count)]

    def copy(own: deque[Tensor]) -> Iterator[Tensor]:
        while True:
            if not own:
                piece = next(pieces, None)
                if piece is None:
                    return
                for each in waiting:
                    each.append(piece)
                del piece
            yield own.popleft()

    return [copy(own) for own in waiting]


def decode_tiled(autoencoder: Autoencoder, latents: Latents, tiles: Tiles | None) -> Iterator[Video]:
    """Latents -> the clip, piece by piece, in one where it has no streams; with the surplus frames of `decode`."""
    cuts = _cuts(latents.shape[3:], tiles)
    decode = autoencoder.decode_stream if streams(autoencoder) else partial(_at_once, autoencoder.decode)
    return _faded([decode(place(latents)) for place in _places(cuts, (1, 1))], cuts, autoencoder.strides[1:])


def _at_once(call: Callable[[Tensor], Tensor], clip: Tensor | Iterable[Tensor]) -> Iterator[Tensor]:
    yield call(clip if isinstance(clip, Tensor) else torch.cat(list(clip), 2))


class _Cut(NamedTuple):
    """How an axis is cut, in latents."""

    starts: list[int]
    length: int


def _cuts(size: Sequence[int], tiles: Tiles | None) -> list[_Cut]:
    """The cuts of height and width."""
    length, shared = tiles or (size, (0, 0))
    return [_spread(*axis) for axis in zip(size, length, shared, strict=True)]


def _spread(size: int, length: int, shared: int) -> _Cut:
    """Tiles that cover `size` latents evenly and share `shared` or more."""
    if length >= size:
        return _Cut([0], size)
    count = -(-(size - shared) // (length - shared))
    return _Cut([number * (size - length) // (count - 1) for number in range(count)], length)


def _places(cuts: Sequence[_Cut], strides: Sequence[int]) -> list[Callable[[Tensor], Tensor]]:
    """What takes each tile out of a frame, row by row."""

    def place(y: int, x: int) -> Callable[[Tensor], Tensor]:
        sides = zip((y, x), cuts, strides, strict=True)
        down, across = (slice(start * each, (start + cut.length) * each) for start, cut, each in sides)
        return lambda frames: frames[..., down, across]

    return [place(y, x) for y, x in product(*(cut.starts for cut in cuts))]


def _faded(tiles: Sequence[Iterator[Tensor]], cuts: Sequence[_Cut], strides: Sequence[int]) -> Iterator[Tensor]:
    """The pieces of whole frames, from those of each tile."""
    if len(tiles) == 1:
        yield from tiles[0]
        return
    for first in tiles[0]:
        wide = first.to(torch.promote_types(first.dtype, torch.float32))
        sides = zip(cuts, strides, strict=True)
        rows, columns = (_weights([start * n for start in cut.starts], cut.length * n, wide) for cut, n in sides)
        whole = wide.new_zeros(*wide.shape[:3], *(axis[-1][0] + len(axis[-1][1]) for axis in (rows, columns)))
        for tile, ((y, row), (x, column)) in zip(tiles, product(rows, columns), strict=True):
            values = wide if tile is tiles[0] else next(tile)
            whole[..., y : y + len(row), x : x + len(column)] += values * (row[:, None] * column)
        yield whole.to(first.dtype)


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
