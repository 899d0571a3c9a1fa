"""The ways through an autoencoder: exactly piece by piece, in tiles of its frames, or in one call."""

from collections.abc import Iterable, Iterator

import torch
from jaxtyping import Float
from torch import Tensor

from lingen.autoencoder import Autoencoder, streams
from lingen.autoencoder.tiling import Tiles, decode_tiled, encode_tiled
from lingen.recipe.errors import RecipeError

WAYS = ("exact", "tiled", "whole")
"""By its own streams; by its own streams, where it has them, in tiles of height and width that are cross-faded; in one
call, whose memory always grows with the pixels of the whole clip. The weights must be frozen: else one call keeps what
a backward pass would need."""

PIECE_FRAMES = 32
"""Frames in a piece that an autoencoder's stream gets."""


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


def encode(
    autoencoder: Autoencoder, pieces: Iterable[Float[Tensor, "b 3 _t h w"]], way: str, tiles: Tiles | None = None
) -> Float[Tensor, "b c _t _h _w"]:
    """A clip in -1..1 that comes piece by piece -> its latents."""
    if way == "whole":
        with torch.enable_grad():  # without gradients, one that has streams takes them
            return autoencoder.encode(torch.cat(list(pieces), 2))
    return torch.cat(list(encode_tiled(autoencoder, pieces, tiles if way == "tiled" else None)), 2)


def decode(
    autoencoder: Autoencoder, latents: Float[Tensor, "b c t h w"], way: str, tiles: Tiles | None = None
) -> Iterator[Float[Tensor, "b 3 _t _h _w"]]:
    """Latents -> the clip piece by piece, with surplus frames at its end."""
    if way == "whole":
        with torch.enable_grad():
            video = autoencoder.decode(latents)
        yield video
    else:
        yield from decode_tiled(autoencoder, latents, tiles if way == "tiled" else None)
