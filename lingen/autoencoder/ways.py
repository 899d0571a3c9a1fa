"""The ways through an autoencoder: exactly piece by piece, in tiles, or in one call."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from typing import cast

import torch
from jaxtyping import Float
from torch import Tensor

from lingen.autoencoder import Autoencoder, StreamingAutoencoder, streams
from lingen.autoencoder.tiling import Tiles, decode_tiled, encode_tiled
from lingen.recipe.errors import RecipeError, SettingError

WAYS = ("exact", "tiled", "whole")
"""By its own streams; in tiles that are cross-faded; in one call, the only one whose memory grows with the pixels of
the whole clip. The weights must be frozen: else one call keeps what a backward pass would need."""


def ways_of(autoencoder: Autoencoder) -> list[str]:
    """The entries of `WAYS` that an autoencoder supports."""
    tiled = not getattr(autoencoder, "first_frame_alone", False)
    return [way for way, has in zip(WAYS, (streams(autoencoder), tiled, True), strict=True) if has]


def way_for(autoencoder: Autoencoder, asked: str | None, name: str) -> str:
    """The way that was asked for; for None or ``auto`` exact where the autoencoder has streams, else whole.

    Raises:
        RecipeError: a way that it does not have.
    """
    ways = ways_of(autoencoder)
    if asked in (None, "auto"):
        return "exact" if "exact" in ways else "whole"
    if asked not in ways:
        why = "it has no streams of its own" if asked == "exact" else "its first latent holds one frame alone"
        raise RecipeError(f"The autoencoder '{name}' cannot go the way '{asked}': {why}; take {' or '.join(ways)}.")
    return str(asked)


def tiles_of(tile: tuple[int, int] | None, strides: tuple[int, int, int]) -> Tiles:
    """Movie Gen's tiles in time; in space those that are asked for, of which neighbours share a quarter (ours).

    Args:
        tile: height and width in pixels; None: space is not cut.
        strides: the autoencoder's.
    Raises:
        SettingError: sides that the strides do not divide, or of which a quarter is less than a latent: without
            overlap, the edges of tiles would be visible.
    """
    if tile is None:
        return Tiles()
    (height, width), (_, stride_h, stride_w) = tile, strides
    if height % stride_h or width % stride_w:
        raise SettingError(
            "tile",
            f"tile={height}x{width}: height and width must be multiples of {stride_h} and {stride_w}, the "
            "autoencoder's strides.",
        )
    latent = math.lcm(stride_h, stride_w)
    shared = min(tile) // 4 // latent * latent
    if not shared:
        raise SettingError(
            "tile",
            f"tile={height}x{width} is too small: neighbours share a quarter of a tile, which must be a latent or "
            f"more; take {4 * latent} pixels a side or more.",
        )
    return Tiles(size=tile, size_overlap=shared)


def encode(
    autoencoder: Autoencoder, pieces: Iterable[Float[Tensor, "b 3 _t h w"]], way: str, tiles: Tiles | None = None
) -> Float[Tensor, "b c _t _h _w"]:
    """A clip in -1..1 that comes piece by piece -> its latents."""
    if way == "whole":
        with torch.enable_grad():  # without gradients, one that has streams takes them
            return autoencoder.encode(torch.cat(list(pieces), 2))
    if way == "exact":
        return torch.cat(list(cast(StreamingAutoencoder, autoencoder).encode_stream(pieces)), 2)
    return torch.cat(list(encode_tiled(autoencoder, pieces, tiles)), 2)


def decode(
    autoencoder: Autoencoder, latents: Float[Tensor, "b c t h w"], way: str, tiles: Tiles | None = None
) -> Iterator[Float[Tensor, "b 3 _t _h _w"]]:
    """Latents -> the clip piece by piece, with surplus frames at its end."""
    if way == "whole":
        with torch.enable_grad():
            video = autoencoder.decode(latents)
        yield video
    elif way == "exact":
        yield from cast(StreamingAutoencoder, autoencoder).decode_stream(latents)
    else:
        yield from decode_tiled(autoencoder, latents, tiles)
