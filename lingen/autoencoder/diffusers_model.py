"""A model of diffusers, read from a folder and called in one way, whatever its class returns; and Wan's piece by piece,
with the same results as for the whole clip, in memory that does not grow with it: its convolutions see the past only,
and its encoder and decoder take their memory of past frames as an argument."""

from __future__ import annotations

import logging
from collections import defaultdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lingen.autoencoder.diffusers_known import KNOWN
from lingen.recipe.errors import RecipeError, did_you_mean

log = logging.getLogger(__name__)

FRAMES = 4
"""Frames after the first that Wan's encoder takes at a time, and its stride in time."""
Past = dict[int, Any]
"""What each convolution of Wan's remembers of past frames."""


LoadedVae = tuple[Any, Tensor, Tensor]
"""A model, and mean and standard deviation of its own latents, [1 c t 1 1]; t is 1 where all frames have the same."""


def spread_of(vae: Any, channels: int, scale: float) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation of the model's own latents, each [1 c t 1 1], by its config or its buffers."""
    config, buffers = vae.config, dict(vae.named_buffers())
    means, stds = (buffers.get(key, config.get(key)) for key in ("latents_mean", "latents_std"))
    factor = config.get("scaling_factor")
    if factor is None and stds is None and scale == 1:
        told = "%s does not say how far its latents spread; the noise has a standard deviation of 1. Set 'scale' of "
        log.warning(told + "the autoencoder to 1 / that of its latents.", type(vae).__name__)
    shift = config.get("shift_factor") or 0.0
    values = [shift] * channels if means is None else means, [1.0] * channels if stds is None else stds
    mean, std = (torch.as_tensor(one, dtype=torch.float32).reshape(1, channels, -1, 1, 1) for one in values)
    return mean, std / (scale * (1.0 if factor is None else factor))


def from_pretrained(folder: Path, class_name: str, dtype: torch.dtype) -> Any:
    """The frozen model. RecipeError where weights cannot be read, or are missing and would be random."""
    import diffusers

    model: Any = getattr(diffusers, class_name, None)
    if not hasattr(model, "from_pretrained"):
        names = [name for name in dir(diffusers) if name.startswith("Autoencoder")]
        what = f"diffusers {diffusers.__version__} has no model called '{class_name}'"
        raise RecipeError(f"{what}.{did_you_mean(class_name, names)}")
    try:
        # Never a pickle; low_cpu_mem_usage=True needs the package accelerate.
        vae, about = model.from_pretrained(
            folder, torch_dtype=dtype, local_files_only=True, use_safetensors=True, low_cpu_mem_usage=False,
            output_loading_info=True,
        )  # fmt: skip
    except Exception as error:  # diffusers, safetensors and torch each have their own
        reason = f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
        raise RecipeError(f"{class_name} of diffusers cannot read {folder}: {reason}") from error
    strange = {key: about[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys") if about.get(key)}
    if strange:
        named = [f"{key.replace('_keys', '')}: {', '.join(map(str, keys[:3]))}" for key, keys in strange.items()]
        what = "; ".join(named)
        raise RecipeError(f"The weights in {folder} are not those of its config.json ({what}). Download them again.")
    return vae.eval().requires_grad_(False)


def switch_on_tiles(vae: Any) -> None:
    """Tiles that are blended, in space and, where the class has them, in time. RecipeError where it has none."""
    name = type(vae).__name__
    model = KNOWN.get(name)
    try:
        if model is not None and not model.tiles:
            raise NotImplementedError
        vae.enable_tiling()
    except (AttributeError, NotImplementedError) as error:
        raise RecipeError(f"'{name}' of diffusers does not work in tiles; set tiling: false.") from error
    if model is not None and model.tiles_time:
        vae.use_framewise_encoding = vae.use_framewise_decoding = True


def mode_of(encoded: Any) -> Tensor:
    """The mode of the distribution that an encoder returns, or the latents where it returns latents."""
    if hasattr(encoded, "latent_dist"):
        return encoded.latent_dist.mode()
    return encoded.latent if hasattr(encoded, "latent") else encoded


def frames_of(statistic: Tensor, latents: Tensor) -> Tensor:
    """A statistic for the frames of these latents; some models have one for each frame, and not for more."""
    known_frames, frames = statistic.shape[2], latents.shape[2]
    if known_frames == 1:
        return statistic
    if frames > known_frames:
        known = f"the spread of its latents for {known_frames} latent frames"
        raise ValueError(f"This autoencoder knows {known}, not for {frames}: use shorter clips.")
    return statistic[:, :, :frames]


def no_past() -> Past:
    """At the beginning of a clip."""
    return defaultdict(lambda: None)


def encode_piece(vae: Any, past: Past, video: Tensor) -> Tensor:
    """The next frames [b 3 t h w] of a clip, first one, then up to `FRAMES`, -> the posterior's mode [b c 1 h w]."""
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
