"""How many latents and tokens a sample has, and which lengths and sizes are allowed, from a recipe's sections alone."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import TYPE_CHECKING

from lingen.recipe.errors import SettingError
from lingen.recipe.sections import DataConfig, PerKind, Recipe, Triple

if TYPE_CHECKING:
    from lingen.autoencoder import Autoencoder

BY_MACHINE = ("auto", "-1")
"""Numbers of devices that say: as many as there are."""


def patch_of(recipe: Recipe) -> Triple:
    """Latents per token; one where what is trained has no tokens."""
    return recipe.model.patch if recipe.subject.encoded else (1, 1, 1)


def round_of(data: DataConfig) -> PerKind:
    """Optimiser steps of each kind in a round; in lowest terms where `mix_by` is samples. Ranks and accumulated batches
    multiply the samples of both kinds alike, so they do not count; buckets of other shapes count as the first."""
    if data.mix_by == "steps":
        return data.mix
    image, video = data.mix.image * data.batch.video, data.mix.video * data.batch.image
    shared = max(1, math.gcd(image, video))
    return PerKind(image=image // shared, video=video // shared)


def check_frames(frames: int, autoencoder: Autoencoder, patch: int = 1) -> None:
    """SettingError where an autoencoder does not take so many frames, or patches do not fill its latent frames. One
    whose first latent frame holds one frame alone takes 1 + a multiple of `frame_unit` (else: of its stride). `patch`:
    latent frames per token."""
    stride, alone = autoencoder.strides[0], getattr(autoencoder, "first_frame_alone", False)
    unit = getattr(autoencoder, "frame_unit", stride)
    latents = math.ceil(frames / stride)
    if alone and (frames - 1) % unit:
        fault = f"This autoencoder keeps the first frame alone, the others come by {unit}: {frames} frames do not fit"
    elif latents % patch:
        what = f"A clip of {frames} frames is {latents} latent frames (stride {stride})"
        fault = f"{what}, which patches of {patch} do not fill"
    else:
        return
    # Allowed lengths recur, at the latest after `patch` such steps.
    lengths = range(1 if alone else unit, frames + unit * patch + 1, unit)
    fits = [length for length in lengths if math.ceil(length / stride) % patch == 0]
    near = [*[length for length in fits if length < frames][-1:], *[length for length in fits if length > frames][:1]]
    cure = f"take {' or '.join(map(str, near))} frames" if near else "no length does; take patches of 1 along t"
    raise SettingError("frames", f"{fault}; {cure}.")


def grids_of(data: DataConfig, strides: Triple, patch: Triple) -> dict[str, Triple]:
    """Tokens (t, h, w) of a sample of each kind in the mix; SettingError if patches do not fill a frame."""
    grids, height, width = {}, *data.size
    for axis, pixels, stride, size in zip(("height", "width"), data.size, strides[1:], patch[1:], strict=True):
        if pixels % (stride * size):
            low = pixels // (stride * size) * stride * size
            fits = f"{low} or {low + stride * size}" if low else stride * size
            what = f"The {axis} of {pixels} pixels is no multiple of {stride * size}"
            why = f"the autoencoder's stride {stride} times the patch {size}"
            raise SettingError("size", f"{what}, {why}; take {fits}.")
    for kind, frames in (("image", 1), ("video", data.frames)):
        if getattr(data.mix, kind):
            t = math.ceil(math.ceil(frames / strides[0]) / patch[0])
            grids[kind] = (t, height // (strides[1] * patch[1]), width // (strides[2] * patch[2]))
    return grids


def all_grids(recipe: Recipe, autoencoder: Autoencoder) -> list[Triple]:
    """Tokens (t, h, w) of samples of every kind in the mix and every shape that a batch may have; errors as above."""
    data = recipe.data
    grids: list[Triple] = []
    for size in (data.size, *data.sizes):
        for frames in (data.frames, *data.lengths):
            try:
                if data.mix.video:
                    check_frames(frames, autoencoder, patch_of(recipe)[0])
                one = replace(data, frames=frames, size=size)
                grids += grids_of(one, autoencoder.strides, patch_of(recipe)).values()
            except SettingError as error:
                first = {"size": data.size == size, "frames": data.frames == frames}[error.setting]
                name = error.setting if first else {"size": "sizes", "frames": "lengths"}[error.setting]
                raise SettingError(name, str(error)) from error
    return grids


def ranks_of(recipe: Recipe, there: int = 1) -> int:
    """How many ranks lightning.Trainer makes of a stage: devices times nodes. `there`: devices of a machine, for a
    recipe that takes all of them."""
    devices, nodes = recipe.trainer.get("devices", "auto"), int(recipe.trainer.get("num_nodes", 1))
    if isinstance(devices, str) and "," in devices:
        devices = [one for one in devices.split(",") if one.strip()]
    if isinstance(devices, list | tuple):
        return max(1, len(devices)) * nodes
    return max(1, there if str(devices) in BY_MACHINE else int(devices)) * nodes
