"""Video autoencoders of diffusers (Wan, HunyuanVideo, CogVideoX, LTX, Cosmos, ...) as lingen's own, called in one way,
whatever a class returns; and Wan's piece by piece, with the same results as for the whole clip, in memory that does not
grow with it: its convolutions see the past only, and take their memory of past frames as an argument."""

import logging
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn

from lingen.autoencoder import diffusers_known as known
from lingen.autoencoder.stored import check_sides
from lingen.autoencoder.temporal import regroup
from lingen.frozen import Missing
from lingen.recipe.bounds import CONTENT, IDENTITY, Above, AtLeast
from lingen.recipe.errors import RecipeError, SettingError, did_you_mean
from lingen.recipe.sections import Triple
from lingen.recipe.signature import checked
from lingen.recipe.sizes import check_frames
from lingen.weights import DTYPES

log = logging.getLogger(__name__)

FRAMES = 4
"""Frames after the first that Wan's encoder takes at a time, and its stride in time."""
Past = dict[int, Any]
"""What each convolution of Wan's remembers of past frames."""
LoadedVae = tuple[Any, Tensor, Tensor]
"""A model, and mean and standard deviation of its own latents, [1 c t 1 1]; t is 1 where all frames have the same."""


@checked
class DiffusersVAE(nn.Module):
    """A video autoencoder of diffusers, from a local folder, frozen: `encode` gives the posterior's mode.

    The folder is one that ``save_pretrained`` wrote, or a pipeline's that has it as ``vae``. It is read at the first
    `encode` or `decode`, and the weights lie where the video or the latents lie. Latents are brought to the spread that
    the config states: ``(z - shift_factor) * scaling_factor``, or by ``latents_mean`` and ``latents_std``.

    In these models the first frame has a latent frame of its own: t = 1 + strides[0] * n frames are n + 1 latent
    frames, and decode gives exactly the t frames again. An image is t = 1.

    Raises SettingError for settings that are not enough, out of range, or not for this class."""

    without_effect = ("strides", "channels", "first_frame_alone")
    """Settings without effect on latents and pixels: they only describe the model, and wrong ones are refused."""

    def __init__(
        self,
        *,
        path: Annotated[str | None, IDENTITY, CONTENT, "folder of the model, or of a pipeline with it as 'vae'"] = None,
        class_name: Annotated[str | None, IDENTITY, "class of diffusers; null: what config.json says"] = None,
        subfolder: Annotated[str | None, IDENTITY, "of the model below path; null: found"] = None,
        strides: Annotated[
            Triple | None, AtLeast(1), IDENTITY, "pixels per latent (t, h, w); null: the class's"
        ] = None,
        channels: Annotated[int | None, AtLeast(1), IDENTITY, "channels of a latent; null: the class's"] = None,
        first_frame_alone: Annotated[bool, IDENTITY, "frames come as 1 + n strides; in all known classes"] = True,
        scale: Annotated[float, Above(0), IDENTITY, "factor on latents beside the config's, for a spread near 1"] = 1.0,
        tiling: Annotated[bool, IDENTITY, "clip by clip, in blended tiles: less memory, not quite the same"] = False,
        precision: Annotated[Literal["fp32", "bf16", "fp16"], IDENTITY, "of the weights"] = "fp32",
    ):
        super().__init__()
        refusal = known.unusable_class(class_name or "")
        if refusal:
            raise SettingError("class_name", refusal)
        model = known.KNOWN.get(class_name or "")
        if tiling and model is not None and not model.tiles:
            raise SettingError("tiling", f"'{class_name}' of diffusers does not work in tiles.")
        self.strides: tuple[int, int, int] = tuple(_given("strides", strides, class_name))
        self.channels: int = _given("channels", channels, class_name)
        self.path, self.class_name, self.subfolder = path, class_name, subfolder
        self.first_frame_alone, self.scale, self.tiling = first_frame_alone, scale, tiling
        self.dtype: torch.dtype = getattr(torch, DTYPES[precision])
        # In a list, so that no checkpoint holds it and no cast of the module around it reaches it.
        self._loaded: list[LoadedVae] = []

    def missing(self) -> list[Missing]:
        """What would make a run with these settings fail; reads config.json and the header of the weights."""
        return [Missing("diffusers", self.path or "-", problem) for problem in self._problems()]

    def _problems(self) -> Iterator[str]:
        if find_spec("diffusers") is None:
            yield "the package diffusers is not installed. pip install 'diffusers>=0.35'."
        if self.path is None:
            yield f"the recipe does not say where the weights are. {known.advice(self.class_name)}."
            return
        folder = known.find_folder(self.path, self.subfolder)
        try:
            config = known.read_config(folder, self.class_name)
        except RecipeError as error:
            yield from error.problems
            return
        different = list(known.config_differences(config, self.class_name, self.strides, self.channels))
        yield from different
        fault = None if different else known.fault_of_weights(folder, config["_class_name"])
        if fault:
            yield fault

    @property
    def frame_unit(self) -> int:
        """The number of frames is a multiple of this, plus 1 where the first frame has a latent frame of its own: the
        stride, or twice the stride for CogVideoX."""
        return (self._model and self._model.unit) or self.strides[0]

    def encode(self, video: Float[Tensor, "b 3 t h w"]) -> Float[Tensor, "b c _t _h _w"]:
        """Pixels in -1..1 -> float32 latents: the posterior's mode, in the spread of the config. Raises ValueError for
        sizes that do not fit, RecipeError where the weights cannot be used."""
        vae, mean, std = self._ready(video.device)
        self._check_size(video, video.shape[2])
        latents = self._run(lambda clips: mode_of(vae.encode(clips)), video)
        size = (-(-n // stride) for n, stride in zip(video.shape[2:], self.strides, strict=True))
        self._check_shape("encode", latents, (len(video), self.channels, *size))
        return (latents - frames_of(mean, latents)) / frames_of(std, latents)

    def decode(self, latents: Float[Tensor, "b c t h w"]) -> Float[Tensor, "b 3 _t _h _w"]:
        """Latents -> float32 pixels, about -1..1: 1 + strides[0] * (t - 1) frames where the first stands alone. Raises
        ValueError for a number of frames that does not fit, RecipeError where the weights cannot be used."""
        vae, mean, std = self._ready(latents.device)
        frames = self.strides[0] * latents.shape[2] - (self.strides[0] - 1 if self.first_frame_alone else 0)
        check_frames(frames, self)
        latents = latents.float() * frames_of(std, latents) + frames_of(mean, latents)
        video = self._run(lambda clips: self._decode(vae, clips), latents)
        _, stride_h, stride_w = self.strides
        height, width = latents.shape[3] * stride_h, latents.shape[4] * stride_w
        self._check_shape("decode", video, (len(latents), 3, frames, height, width))
        return video

    @property
    def streams(self) -> bool:
        """Whether `encode_stream` and `decode_stream` hold a few frames at a time: Wan's classes do, without tiles.
        Reads config.json where the recipe names no class."""
        return self._class() == "AutoencoderKLWan" and self.strides[0] == FRAMES and not self.tiling

    def encode_stream(self, pieces: Iterable[Float[Tensor, "b 3 _t h w"]]) -> Iterator[Float[Tensor, "b c _t _h _w"]]:
        """`encode` of a clip that comes in pieces, where it can (`streams`)."""
        frames, past = 0, defaultdict[int, Any](lambda: None)
        for video, _ in regroup(pieces, FRAMES, first=1):
            frames += video.shape[2]
            vae, mean, std = self._ready(video.device)
            self._check_size(video, frames)
            yield (self._run(partial(encode_piece, vae, past), video) - mean) / std

    def decode_stream(self, latents: Float[Tensor, "b c t h w"]) -> Iterator[Float[Tensor, "b 3 _t _h _w"]]:
        """`decode`, piece by piece, where it can (`streams`)."""
        vae, mean, std = self._ready(latents.device)
        decode = partial(decode_piece, vae, defaultdict(lambda: None))
        for latent in latents.split(1, 2):
            yield self._run(decode, latent.float() * std + mean)

    def _decode(self, vae: Any, latents: Tensor) -> Tensor:
        # LTX's decoder also denoises: nothing is noised here, so time is 0.
        time = [latents.new_zeros(len(latents))] if vae.config.get("timestep_conditioning") else []
        decoded = vae.decode(latents, *time)
        return decoded.sample if hasattr(decoded, "sample") else decoded

    def _run(self, run: Callable[[Tensor], Tensor], clips: Tensor) -> Tensor:
        """In this part's own precision; tiles take one clip at a time, because some classes slice a batch wrongly."""
        alone = self.tiling or (self._model is not None and not self._model.batches)
        with torch.autocast(clips.device.type, enabled=False):
            clips = clips.to(self.dtype)
            return torch.cat([run(clip) for clip in (clips.split(1) if alone else [clips])]).float()

    def _class(self) -> str:
        """The model's class as far as it is known: from the weights, else the recipe, else config.json."""
        if self._loaded:
            return type(self._loaded[0][0]).__name__
        if self.class_name is not None or self.path is None:
            return self.class_name or ""
        try:
            return str(known.read_config(known.find_folder(self.path, self.subfolder), None)["_class_name"])
        except RecipeError:  # `missing` tells, and so does the first use
            return ""

    @property
    def _model(self) -> known.Known | None:
        return known.KNOWN.get(self._class())

    def _check_size(self, video: Tensor, frames: int) -> None:
        check_frames(frames, self)
        check_sides(video, self.strides, "diffusers")

    def _check_shape(self, what: str, found: Tensor, wanted: tuple[int, ...]) -> None:
        if tuple(found.shape) != wanted:
            raise RecipeError(
                f"{what} of {self._class()} gave [b c t h w] = {list(found.shape)}, not "
                f"{list(wanted)}: strides {list(self.strides)}, channels {self.channels} and first_frame_alone "
                f"{str(self.first_frame_alone).lower()} are not those of this model."
            )

    def _ready(self, device: torch.device) -> LoadedVae:
        """The model on a device, loaded once."""
        vae, mean, std = self._loaded[0] if self._loaded else self._load()
        if not self._loaded or mean.device != device:
            self._loaded = [(vae.to(device), mean.to(device), std.to(device))]
        return self._loaded[0]

    def _load(self) -> LoadedVae:
        problems = list(self._problems())
        if problems or self.path is None:
            raise RecipeError(*(f"autoencoder 'diffusers': {problem}" for problem in problems))
        folder = known.find_folder(self.path, self.subfolder)
        name = known.read_config(folder, self.class_name)["_class_name"]
        vae = from_pretrained(folder, name, self.dtype)
        if self.tiling:
            switch_on_tiles(vae)
        return vae, *spread_of(vae, self.channels, self.scale)


def _given(setting: str, value: Any, class_name: str | None) -> Any:
    """The setting where the recipe gives it, else the value of the known class."""
    if value is not None:
        return value
    if class_name in known.KNOWN:
        return getattr(known.KNOWN[class_name], setting)
    hint = did_you_mean(class_name, known.KNOWN) if class_name else ""
    raise SettingError(
        setting, f"'diffusers' needs {setting}, but for a class_name of these: {', '.join(known.KNOWN)}.{hint}"
    )


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
    model = known.KNOWN.get(name)
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
