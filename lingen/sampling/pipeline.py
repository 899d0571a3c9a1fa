"""A model as a folder by diffusers' conventions, of safetensors and JSON: `lingen export --to diffusers` writes it,
`LinGenPipeline` loads it; diffusers itself is not needed."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor

from lingen.autoencoder.stored import settings_from_shapes
from lingen.autoencoder.tae import TAE
from lingen.data.batch import Progress
from lingen.files import check_place, whole_folder, write_json, write_text
from lingen.frozen import is_trained
from lingen.kernels.choice import best_device
from lingen.plan.loading import load_recipe
from lingen.provenance import version_of
from lingen.recipe.errors import RecipeError
from lingen.recipe.reading import RecipeText
from lingen.recipe.signature import as_plain
from lingen.recipe.text import decode_json
from lingen.sampling.card import card_of
from lingen.sampling.clips import clip_size, clips_of, settings_with, takes_of
from lingen.training.denoiser import LinGenModule
from lingen.training.weights import averaged_state, load_denoiser, load_into
from lingen.weights import WeightsError, find_weights, lowered, read_metadata, write_tensors

_FORM = 1
"""Of such a folder; raised when an older reader could not use a new one."""
_INDEX, _CONFIG, _SCHEDULER = "model_index.json", "config.json", "scheduler/scheduler_config.json"
_WEIGHTS = "diffusion_pytorch_model.safetensors"
_CURE = "Copy the folder again, or make it anew with `lingen export --run RUN --to diffusers --out DIR`."


class LinGenOutput(NamedTuple):
    """What a `LinGenPipeline` returns. `frames`: of each clip a list of PIL images, or all as float32 [b t h w 3] in
    0..1; `fps`: of them a second."""

    frames: Any
    fps: float


class LinGenPipeline:
    """Prompts to clips, called as the pipelines of diffusers are. On the same machine a clip has the bits of that of
    `lingen sample` with the same weights, prompt, seed and settings. `module`: of `lingen.load_model`."""

    def __init__(self, module: LinGenModule):
        self.module, self.device = module, best_device()

    @classmethod
    def from_pretrained(cls, folder: str | Path) -> LinGenPipeline:
        """The pipeline of a folder that `lingen export --to diffusers` wrote; nothing is ever downloaded. RecipeError
        names the file that is missing, damaged or of a later version of lingen, and the cure."""
        path = Path(folder)
        if not path.is_dir():
            raise RecipeError(f"{path} is no folder. Download a model: `hf download NAME --local-dir DIR`.")
        index = _read(path / _INDEX)
        if index.get("_class_name") != cls.__name__ or not isinstance(form := index.get("_lingen_form"), int):
            raise WeightsError(path / _INDEX, f"it tells of no {cls.__name__}, but of {index.get('_class_name')}.")
        if form > _FORM:
            told = f"lingen {index.get('_lingen_version')} wrote it in form {form}, this one reads up to {_FORM}"
            raise WeightsError(path / _INDEX, f"{told}: pip install -U lingen.")
        names = ["denoiser", "autoencoder", *(name for name in index if re.fullmatch(r"text_encoder(_\d+)?", name))]
        parts = {name: _read(path / name / _CONFIG) for name in names}
        if parts["autoencoder"].get("path") == _WEIGHTS:
            parts["autoencoder"]["path"] = str(_weights(path / "autoencoder"))
        words = {**index.get("recipe", {}), **_read(path / _SCHEDULER)}
        words |= dict(model=parts.pop("denoiser"), autoencoder=parts.pop("autoencoder"), text=list(parts.values()))
        yaml = json.dumps(words).replace("${", "\\\\${")
        module = LinGenModule(load_recipe(RecipeText(yaml, f"the model in {path}", path.resolve().name)))
        trained = [(f"text.{n}.", name) for n, name in enumerate(parts) if is_trained(module.text[n])]
        stored = {start: load_file(_weights(path / name)) for start, name in (("model.", "denoiser"), *trained)}
        load_into(module, {start + k: v for start, state in stored.items() for k, v in state.items()}, path)
        return cls(module.eval())

    def save_pretrained(self, folder: str | Path, *, precision: str = "fp32", also: Mapping[str, str] = {}) -> Path:
        """Writes the folder. Weights of denoiser, TAE and trained text encoders go into it; of other parts the place or
        name that the recipe has. RecipeError where something lies there, or nothing can be written.

        Args:
            precision: ``fp32``, or ``bf16`` of everything of two or more axes.
            also: further files, by name."""
        path, recipe = Path(folder), self.module.recipe
        if path.exists() and (path.is_file() or any(path.iterdir())):
            raise RecipeError(f"{path} exists. Name a new or empty folder.")
        check_place(path.parent)
        state = averaged_state(self.module)
        parts = {
            "denoiser": (self.module.model, as_plain(recipe.model), _below(state, "model.")),
            "autoencoder": (self.module.autoencoder, *_autoencoder(self.module.autoencoder, recipe.autoencoder)),
        }
        for n, (encoder, component) in enumerate(zip(self.module.text, recipe.text, strict=True)):
            parts["text_encoder" + f"_{n + 1}" * bool(n)] = (encoder, component, _below(state, f"text.{n}."))
        data = {key: as_plain(recipe.data)[key] for key in ("frames", "size", "fps", "fps_prefix", "mix")}
        known = {"imports": recipe.imports, "data": data | {"shards": {"image": "-", "video": "-"}}}
        known["trainer"] = {key: value for key, value in recipe.trainer.items() if key == "precision"}
        index: dict[str, Any] = {"_class_name": type(self).__name__, "_lingen_form": _FORM}
        index |= {"_lingen_version": version_of("lingen")}
        index |= {name: ["lingen", type(part).__name__] for name, (part, *_) in parts.items()} | {"recipe": known}
        sample = {key: value for key, value in as_plain(recipe.sample).items() if key != "prompts"}
        with whole_folder(path) as work:
            for name, (part, config, tensors) in parts.items():
                write_json(work / name / _CONFIG, {"_class_name": type(part).__name__, **config})
                if tensors:
                    write_tensors(_file(work / name), lowered(tensors, precision), {"format": "lingen"})
            write_json(work / _SCHEDULER, {"_class_name": "Times", "time": as_plain(recipe.time), "sample": sample})
            for name, text in also.items():
                write_text(work / name, text)
            write_json(work / _INDEX, index | {"scheduler": ["lingen", "Times"]})
        return path

    def to(self, device: str | torch.device) -> LinGenPipeline:
        """Clips are made there from now on."""
        self.device = torch.device(device)
        return self

    def __call__(
        self, prompt: str | Sequence[str], *, num_frames: int | None = None, height: int | None = None,
        width: int | None = None, num_inference_steps: int | None = None, guidance_scale: float | None = None,
        num_videos_per_prompt: int = 1, generator: torch.Generator | None = None, seed: int | None = None,
        output_type: Literal["pil", "np"] = "pil", progress: Progress | None = None,
    ) -> LinGenOutput:  # fmt: skip
        """A clip of each prompt, by default as the model was trained to make them. Of a `generator` only the seed that
        it was made with counts. ValueError for a size, length or setting that the model cannot make."""
        if output_type not in ("pil", "np"):
            raise ValueError(f"output_type is 'pil' or 'np', got {output_type!r}.")
        seed = generator.initial_seed() if seed is None and generator is not None else seed
        how = settings_with(self.module.recipe.sample, seed=seed, steps=num_inference_steps, guidance=guidance_scale)
        own, fps = self.module.recipe.data.size, self.module.recipe.data.fps
        size = (own[0] if height is None else height, own[1] if width is None else width)
        clip = clip_size(self.module, None if num_frames is None else num_frames / fps, size)
        takes = takes_of([prompt] if isinstance(prompt, str) else prompt, repeat=num_videos_per_prompt)
        clips = list(clips_of(self.module, takes, clip, how, self.device, progress))
        if output_type == "np":
            return LinGenOutput(np.stack(clips).astype(np.float32) / 255, fps)
        return LinGenOutput([[Image.fromarray(frame) for frame in one] for one in clips], fps)


def export_folder(source: str | Path, out: str | Path, precision: str = "fp32") -> Path:
    """`LinGenPipeline.save_pretrained` of a run folder (its last finished stage) or a weights file, with a model card
    and the recipe. RecipeError as there, and where there are no weights of a denoiser."""
    weights = find_weights(source)
    module, about = load_denoiser(weights), read_metadata(weights)
    also = {"README.md": card_of(module, weights, about), "recipe.yaml": about["recipe"]}
    return LinGenPipeline(module).save_pretrained(out, precision=precision, also=also)


def _autoencoder(part: Any, component: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """The autoencoder's config, and its weights where they are lingen's own."""
    if not isinstance(part, TAE):
        return component, {}
    if not part.loaded:
        part.load()
    sizes = settings_from_shapes({name: tuple(value.shape) for name, value in part.state_dict().items()})
    return {"name": "tae", **sizes, "chunk": part.chunk, "path": _WEIGHTS}, part.state_dict()


def _below(state: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): value for name, value in state.items() if name.startswith(prefix)}


def _file(folder: Path) -> Path:
    return folder / ("model.safetensors" if folder.name.startswith("text") else _WEIGHTS)


def _read(file: Path) -> dict[str, Any]:
    """The settings in a JSON file; but for the index, without those that only describe it."""
    try:
        held = dict(decode_json(file.read_bytes()))
    except (OSError, ValueError, TypeError) as error:
        raise WeightsError(file, f"it cannot be read ({error}): the folder is not whole. {_CURE}") from error
    return held if file.name == _INDEX else {key: value for key, value in held.items() if not key.startswith("_")}


def _weights(folder: Path) -> Path:
    try:
        read_metadata(_file(folder))
    except WeightsError as error:
        raise WeightsError(_file(folder), f"{error.what} {_CURE}") from error
    return _file(folder)
