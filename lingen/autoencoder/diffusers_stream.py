"""Wan's autoencoder piece by piece: the same results as for the whole clip, in memory that does not grow with it. Its
convolutions see the past only, and its encoder and decoder take their memory of past frames as an argument."""

from collections import defaultdict
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor

FRAMES = 4
"""Frames after the first that Wan's encoder takes at a time, and its stride in time."""


Past = dict[int, Any]
"""What each convolution remembers of past frames."""


def no_past() -> Past:
    """At the beginning of a clip."""
    return defaultdict(lambda: None)


def encode_piece(vae: Any, past: Past, video: Tensor) -> Tensor:
    """The next piece of `cut_for_wan` [b 3 t h w] -> the posterior's mode [b c 1 h w]."""
    from diffusers.models.autoencoders.autoencoder_kl_wan import patchify

    if vae.config.patch_size is not None:
        video = patchify(video, vae.config.patch_size)
    return vae.quant_conv(vae.encoder(video, feat_cache=past, feat_idx=[0])).chunk(2, 1)[0]


def decode_piece(vae: Any, past: Past, latents: Tensor) -> Tensor:
    """The next latent frame [b c 1 h w] -> pixels [b 3 t h w], one frame for the first, then four."""
    from diffusers.models.autoencoders.autoencoder_kl_wan import unpatchify

    latents = vae.post_quant_conv(latents)
    video = vae.decoder(latents, feat_cache=past, feat_idx=[0], first_chunk=not past)
    if vae.config.patch_size is not None:
        video = unpatchify(video, vae.config.patch_size)
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
