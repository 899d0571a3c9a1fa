"""The video autoencoders of diffusers that meet lingen's contract, and what a folder of weights says of its model.
Nothing here imports diffusers or reads weights: a recipe is checked where there may be neither."""

import json
import math
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from lingen.recipe.errors import RecipeError
from lingen.recipe.sections import Triple
from lingen.weights import Lacking, check_file, weight_files

Config = Mapping[str, Any]
CHANNELS = ("latent_channels", "z_dim", "z_channels")
"""What the classes call the channels of a latent in their configs."""
DIFFUSERS_WEIGHTS = "diffusion_pytorch_model.safetensors"


class Known(NamedTuple):
    """A class that was tried with this adapter. In all of them the first frame has a latent frame of its own."""

    strides: Triple
    """Strides of the published weights; `channels` likewise."""
    channels: int
    weights: str
    """A public checkpoint; its folder ``vae`` is what a recipe's `path` wants."""
    sizes: Callable[[Config], tuple[int, int]]
    """Frames and pixels per latent of the model that a config describes. Configs of old weights lack newer keys."""
    unit: int | None = None
    """The number of frames is a multiple of this plus 1; None: a multiple of the stride plus 1."""
    batches: bool = True
    """Whether it takes several clips at once."""
    tiles: bool = True
    """Whether it can work in tiles."""
    tiles_time: bool = False
    """Whether tiling in time has a switch of its own, apart from tiling in space."""


def _named(config: Config, frames: int = 4, pixels: int = 8) -> tuple[int, int]:
    return config.get("temporal_compression_ratio") or frames, config.get("spatial_compression_ratio") or pixels


def _wan(config: Config) -> tuple[int, int]:
    halvings = len(config.get("dim_mult", (1, 2, 4, 4))) - 1
    frames = 2 ** sum(config.get("temperal_downsample", (False, True, True)))
    return frames, 2**halvings * (config.get("patch_size") or 1)


def _ltx(config: Config, scaling: tuple[bool, ...]) -> tuple[int, int]:
    factor = 2 ** sum(config.get("spatio_temporal_scaling", scaling))
    return _named(config, config.get("patch_size_t", 1) * factor, config.get("patch_size", 4) * factor)


def _halvings(config: Config) -> int:
    return len(config.get("block_out_channels", (0, 0, 0, 0))) - 1


KNOWN = {
    "AutoencoderKLWan": Known((4, 8, 8), 16, "Wan-AI/Wan2.1-T2V-1.3B-Diffusers", _wan),
    "AutoencoderKLHunyuanVideo": Known((4, 8, 8), 16, "hunyuanvideo-community/HunyuanVideo", _named),
    # Its mask of attention has the shape of one clip.
    "AutoencoderKLHunyuanVideo15": Known((4, 16, 16), 32, "hunyuanvideo-community/HunyuanVideo-1.5-480p_t2v",
                                         partial(_named, frames=4, pixels=16), batches=False),
    # It sets the first of an odd number of latent frames apart, and takes an even number for the middle of a clip.
    "AutoencoderKLCogVideoX": Known((4, 8, 8), 16, "THUDM/CogVideoX-5b",
                                    lambda config: (_named(config)[0], 2 ** _halvings(config)), unit=8),
    "AutoencoderKLLTXVideo": Known((8, 32, 32), 128, "Lightricks/LTX-Video",
                                   partial(_ltx, scaling=(True, True, True, False)), tiles_time=True),
    "AutoencoderKLLTX2Video": Known((8, 32, 32), 128, "Lightricks/LTX-2",
                                    partial(_ltx, scaling=(True, True, True, True)), tiles_time=True),
    # The class has the switch, but its encoder and decoder ignore it.
    "AutoencoderKLCosmos": Known((8, 8, 8), 16, "nvidia/Cosmos-1.0-Diffusion-7B-Text2World",
                                 partial(_named, frames=8, pixels=8), tiles=False),
    "AutoencoderKLMochi": Known((6, 8, 8), 12, "genmo/mochi-1-preview",
                                lambda config: (math.prod(config.get("temporal_expansions", (1, 2, 3))),
                                                math.prod(config.get("spatial_expansions", (2, 2, 2))))),
    "AutoencoderKLMagvit": Known((4, 8, 8), 16, "alibaba-pai/EasyAnimateV5.1-7b-zh-diffusers",
                                  lambda config: (2 ** (_halvings(config) - 1), 2 ** _halvings(config))),
}  # fmt: skip
"""Class of diffusers -> what is known of it. Any other takes a recipe that says its strides and channels."""

UNFIT = {
    "AutoencoderKLAllegro": "it takes no images and no clips below 24 frames and 320x320 pixels",
    "AutoencoderKLMiniMaxH3": "its 17n + 5 frames become 5n + 2 latent frames, which is no stride",
    "AutoencoderVidTok": "its encoder wants clips that are padded by hand",
    "AutoencoderKLTemporalDecoder": "its encoder takes pictures, not clips",
    "AutoencoderKL": "it takes pictures, not clips", "AutoencoderDC": "it takes pictures, not clips",
    "AutoencoderTiny": "it takes pictures, not clips",
}  # fmt: skip
"""Class of diffusers -> why it cannot keep the contract."""


def unusable_class(class_name: str) -> str | None:
    """A sentence where a class cannot be used."""
    reason = UNFIT.get(class_name)
    return reason and f"'{class_name}' cannot be used: {reason}. Known: {', '.join(KNOWN)}."


def advice(class_name: str | None) -> str:
    """What to download, and where to put it."""
    if class_name in KNOWN:
        return f"Download the folder 'vae' of {KNOWN[class_name].weights} and set 'path' to it"
    what = f"a {class_name}" if class_name else "a video autoencoder"
    return f"Set 'path' to the folder of {what} that diffusers saved, with its config.json"


def find_folder(path: str, subfolder: str | None) -> Path:
    """The folder of a model: `path` itself, or below it `subfolder` or, where it holds a whole pipeline, ``vae``."""
    top = Path(path).expanduser()
    if subfolder is not None:
        return top / subfolder
    return top / "vae" if not (top / "config.json").exists() and (top / "vae").is_dir() else top


def read_config(folder: Path, class_name: str | None) -> Config:
    """A model's config.json. RecipeError where there is none or it is no model's."""
    file = folder / "config.json"
    if not file.is_file():
        raise RecipeError(f"there is no {file}. {advice(class_name)}.")
    try:
        config = json.loads(file.read_text())
    except ValueError as error:
        raise RecipeError(f"{file} is not JSON ({error}). {advice(class_name)}.") from error
    if not isinstance(config, dict) or not isinstance(config.get("_class_name"), str):
        raise RecipeError(f"{file} names no class of diffusers ('_class_name'). {advice(class_name)}.")
    return config


def config_differences(config: Config, class_name: str | None, strides: Triple, channels: int) -> Iterator[str]:
    """How a config differs from a recipe's settings, each with the right value."""
    found = config["_class_name"]
    if class_name is not None and found != class_name:
        yield f"the folder holds a '{found}', the recipe says class_name: {class_name}. Set class_name: {found}."
        return
    refusal = unusable_class(found)
    if refusal:
        yield refusal
        return
    real_channels = next((config[key] for key in CHANNELS if key in config), channels)
    if real_channels != channels:
        yield f"the model has {real_channels} channels, the recipe {channels}. Set channels: {real_channels}."
    if found in KNOWN:
        frames, pixels = KNOWN[found].sizes(config)
        if (frames, pixels, pixels) != strides:
            real = [frames, pixels, pixels]
            yield f"the model has strides {real}, the recipe {list(strides)}. Set strides: {real}."


def fault_of_weights(folder: Path, class_name: str | None) -> str | None:
    """A sentence where the weights are not all there; only their headers are read."""
    names = (f"{DIFFUSERS_WEIGHTS}.index.json", DIFFUSERS_WEIGHTS)
    try:
        for file in weight_files(folder, names):
            check_file(file)
    except Lacking as lacking:
        others = [one.name for one in sorted(folder.glob("diffusion_pytorch_model.*")) if one.name not in names]
        return f"{folder}: {lacking}{f' (there is {others[0]})' if others else ''}. {advice(class_name)}."
    return None
