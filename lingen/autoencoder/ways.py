"""The ways through an autoencoder: exactly piece by piece, in tiles, or in one call."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from lingen.autoencoder import streams
from lingen.autoencoder.tiling import Tiles, decode_tiled, encode_tiled
from lingen.registry import RecipeError

WAYS = ("exact", "tiled", "whole")
"""By its own streams; in tiles that are cross-faded; in one call, the only one whose memory grows with the pixels of
the whole clip. The weights must be frozen: else one call keeps what a backward pass would need."""


def ways_of(autoencoder: Any) -> list[str]:
    """Those of the `WAYS` that an autoencoder has."""
    tiled = not getattr(autoencoder, "first_frame_alone", False)
    return [way for way, has in zip(WAYS, (streams(autoencoder), tiled, True), strict=True) if has]


def way_for(autoencoder: Any, asked: str | None, name: str) -> str:
    """The way that is asked for; None or ``auto``: exact where the autoencoder has streams, else whole.

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


def tiles_of(size: tuple[int, int] | None) -> Tiles:
    """Movie Gen's tiles in time; in space those that are asked for (h, w): neighbours share a quarter of one, in steps
    of 32 pixels, which every stride divides (ours)."""
    return Tiles() if size is None else Tiles(size=size, size_overlap=min(size) // 128 * 32)


def encode(
    autoencoder: Any, pieces: Iterable[Float[Tensor, "b 3 _t h w"]], way: str, tiles: Tiles | None = None
) -> Float[Tensor, "b c _t _h _w"]:
    """A clip in -1..1 that comes piece by piece -> its latents."""
    if way == "whole":
        with torch.enable_grad():  # without gradients, one that has streams takes them
            return autoencoder.encode(torch.cat(list(pieces), 2))
    stream = autoencoder.encode_stream(pieces) if way == "exact" else encode_tiled(autoencoder, pieces, tiles)
    return torch.cat(list(stream), 2)


def decode(
    autoencoder: Any, latents: Float[Tensor, "b c t h w"], way: str, tiles: Tiles | None = None
) -> Iterator[Float[Tensor, "b 3 _t _h _w"]]:
    """Latents -> the clip piece by piece, with surplus frames at its end."""
    if way == "whole":
        with torch.enable_grad():
            video = autoencoder.decode(latents)
        yield video
    else:
        yield from autoencoder.decode_stream(latents) if way == "exact" else decode_tiled(autoencoder, latents, tiles)
