"""Wan's autoencoder piece by piece: the same results as for the whole clip, in memory that does not grow with it.

Its convolutions see the past only, and its encoder and decoder take their memory of past frames as an argument.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor

FRAMES = 4
"""Frames after the first that Wan's encoder takes at a time, and its stride in time."""


class WanEncoder:
    """Encodes a clip: call it with the pieces of `cut_for_wan`, in order."""

    def __init__(self, vae: Any):
        self.vae = vae
        self.past: dict[int, Any] = defaultdict(lambda: None)

    def __call__(self, video: Tensor) -> Tensor:
        """[b 3 t h w] -> the posterior's mode [b c 1 h w]."""
        from diffusers.models.autoencoders.autoencoder_kl_wan import patchify

        if self.vae.config.patch_size is not None:
            video = patchify(video, self.vae.config.patch_size)
        moments = self.vae.quant_conv(self.vae.encoder(video, feat_cache=self.past, feat_idx=[0]))
        return moments.chunk(2, 1)[0]


class WanDecoder:
    """Decodes a clip: call it with one latent frame after the other."""

    def __init__(self, vae: Any):
        self.vae = vae
        self.past: dict[int, Any] = defaultdict(lambda: None)

    def __call__(self, latents: Tensor) -> Tensor:
        """[b c 1 h w] -> pixels [b 3 t h w], one frame for the first, then four."""
        from diffusers.models.autoencoders.autoencoder_kl_wan import unpatchify

        latents = self.vae.post_quant_conv(latents)
        video = self.vae.decoder(latents, feat_cache=self.past, feat_idx=[0], first_chunk=not self.past)
        if self.vae.config.patch_size is not None:
            video = unpatchify(video, self.vae.config.patch_size)
        return video.clamp(-1, 1)


def cut_for_wan(pieces: Iterable[Tensor]) -> Iterator[Tensor]:
    """Pieces [b 3 t h w] of any length -> the first frame, then four at a time, and at the end what is left."""
    held: Tensor | None = None
    wanted = 1
    for piece in pieces:
        held = piece if held is None else torch.cat([held, piece], 2)
        while held.shape[2] >= wanted:
            yield held[:, :, :wanted]
            held, wanted = held[:, :, wanted:], FRAMES
    if held is not None and held.shape[2]:
        yield held
