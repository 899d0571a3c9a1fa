"""A model as a folder by diffusers' conventions, of safetensors and JSON, with a card: `lingen export --to diffusers`
writes it, `LinGenPipeline` loads it; diffusers itself is not needed."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from PIL import Image
from safetensors.torch import load_file

from lingen.autoencoder.stored import StoredAutoencoder, settings_from_shapes
from lingen.autoencoder.tae import TAE
from lingen.data.batch import Progress
from lingen.files import check_place, whole_folder, write_json, write_text
from lingen.frozen import is_trained
from lingen.kernels.choice import best_device
from lingen.plan.loading import load_recipe
from lingen.provenance import version_of
from lingen.recipe.errors import RecipeError
from lingen.recipe.reading import RecipeText, shipped_folder
from lingen.recipe.signature import as_plain
from lingen.recipe.text import decode_json
from lingen.run_folder.folder import RunFolder
from lingen.sampling.clips import generate
from lingen.training.modules import TextToVideo
from lingen.training.weights import averaged_state, load_denoiser, load_into
from lingen.weights import WeightsError, find_weights, read_metadata, write_tensors

_FORM = 1  # of such a folder; raised when an older reader could not use a new one
_INDEX, _TIMES, _WEIGHTS = "model_index.json", "scheduler/scheduler_config.json", "diffusion_pytorch_model.safetensors"
_CURE = "Copy the folder again, or make it anew with `lingen export RUN --to diffusers DIR`."


class LinGenOutput(NamedTuple):
    """Of each clip a list of PIL images; and how many of them are a second."""

    frames: list[list[Image.Image]]
    fps: float


class LinGenPipeline:
    """Prompts to clips, called as the pipelines of diffusers are. On the same machine a clip has the bits of that of
    `lingen sample` with the same weights, prompt, seed and settings. `module`: of `lingen.load_model`."""

    def __init__(self, module: TextToVideo):
        self.module = module.to(best_device())

    @classmethod
    def from_pretrained(cls, folder: str | Path) -> LinGenPipeline:
        """The pipeline of a folder that `lingen export --to diffusers` wrote; nothing is ever downloaded. RecipeError
        names the file that is missing, damaged or of a later version of lingen, and the cure."""
        path = Path(folder)
        if not path.is_dir():
            raise RecipeError(f"{path} is no folder. Download a model: `hf download NAME --local-dir DIR`.")
        index = _read(path / _INDEX)
        if (index.get("_class_name"), index.get("_lingen_form")) != (cls.__name__, _FORM):
            told = f"it is of a {index.get('_class_name')} by lingen {index.get('_lingen_version')}, in a form that"
            raise WeightsError(path / _INDEX, f"{told} this one does not read: install a later lingen.")
        names = ["denoiser", "autoencoder", *(name for name in index if re.fullmatch(r"text_encoder(_\d+)?", name))]
        model, autoencoder, *text = (_read(path / name / "config.json") for name in names)
        if autoencoder.get("path") == _WEIGHTS:
            autoencoder["path"] = str(_weights(path / "autoencoder"))
        words = {**index.get("recipe", {}), **_read(path / _TIMES), "model": model, "autoencoder": autoencoder}
        yaml = json.dumps(words | {"text": text}).replace("${", "\\\\${")
        module = TextToVideo(load_recipe(RecipeText(yaml, f"the model in {path}", path.resolve().name)))
        trained = [(f"text.{n}.", name) for n, name in enumerate(names[2:]) if is_trained(module.text[n])]
        stored = {start: load_file(_weights(path / name)) for start, name in (("model.", "denoiser"), *trained)}
        load_into(module, {start + k: v for start, state in stored.items() for k, v in state.items()}, path)
        return cls(module.eval())

    def to(self, device: str | torch.device) -> LinGenPipeline:
        """Clips are made there from now on."""
        self.module.to(device)
        return self

    def __call__(
        self, prompt: str | Sequence[str], *, num_frames: int | None = None, height: int | None = None,
        width: int | None = None, num_inference_steps: int | None = None, guidance_scale: float | None = None,
        num_videos_per_prompt: int = 1, generator: torch.Generator | None = None, seed: int | None = None,
        progress: Progress | None = None,
    ) -> LinGenOutput:  # fmt: skip
        """A clip of each prompt, by default as the model was trained to make them. Of a `generator` only the seed that
        it was made with counts. ValueError for a size, length or setting that the model cannot make."""
        data, repeat = self.module.recipe.data, num_videos_per_prompt
        seed = generator.initial_seed() if seed is None and generator is not None else seed
        how: Any = {"seed": seed, "steps": num_inference_steps, "guidance": guidance_scale, "progress": progress}
        how["size"] = (data.size[0] if height is None else height, data.size[1] if width is None else width)
        how["seconds"] = None if num_frames is None else num_frames / data.fps
        clips = generate(self.module, prompt, repeat=repeat, **how)
        return LinGenOutput([[Image.fromarray(frame) for frame in one] for one in clips], data.fps)


def export_folder(source: str | Path, out: str | Path, precision: str = "fp32") -> Path:
    """Writes a run folder's last finished stage, or a weights file, as a folder for `LinGenPipeline`, with a model card
    and the recipe. Weights of denoiser, TAE and trained text encoders go into it; of other parts the place or name that
    the recipe has. RecipeError where something lies there, nothing can be written, or no denoiser is at `source`.
    `precision`: ``fp32``, or ``bf16`` of everything of two or more axes."""
    path, weights = Path(out), find_weights(source)
    if path.exists() and (path.is_file() or any(path.iterdir())):
        raise RecipeError(f"{path} exists. Name a new or empty folder.")
    check_place(path.parent)
    module, metadata = load_denoiser(weights), read_metadata(weights)
    recipe, state = module.recipe, averaged_state(module)
    parts = [("denoiser", module.model, as_plain(recipe.model), "model."),
             ("autoencoder", module.autoencoder, recipe.autoencoder, "autoencoder.")]  # fmt: skip
    for n, pair in enumerate(zip(module.text, recipe.text, strict=True)):
        parts.append(("text_encoder" + f"_{n + 1}" * bool(n), *pair, f"text.{n}."))
    data = {key: as_plain(recipe.data)[key] for key in ("frames", "size", "fps", "fps_prefix", "mix")}
    known = {"imports": recipe.imports, "data": data | {"shards": {"image": "-", "video": "-"}}}
    known["trainer"] = {key: value for key, value in recipe.trainer.items() if key == "precision"}
    index: dict[str, Any] = {name: ["lingen", type(part).__name__] for name, part, *_ in parts}
    index |= {"scheduler": ["lingen", "Times"], "_class_name": "LinGenPipeline", "_lingen_form": _FORM}
    sample = {key: value for key, value in as_plain(recipe.sample).items() if key != "prompts"}
    times = {"_class_name": "Times", "time": as_plain(recipe.time), "sample": sample}
    with whole_folder(path, own=True) as work:
        for name, part, config, start in parts:
            tensors = {key.removeprefix(start): one for key, one in state.items() if key.startswith(start)}
            if isinstance(part, StoredAutoencoder):
                if not part.loaded:
                    part.load()
                tensors = part.state_dict()
                sizes = settings_from_shapes({key: tuple(value.shape) for key, value in tensors.items()})
                kind = {"name": "tae", "chunk": part.chunk} if isinstance(part, TAE) else {"name": "pca"}
                config = {**kind, **sizes, "strides": list(part.strides), "path": _WEIGHTS}
            if precision == "bf16":
                tensors = {k: v.bfloat16() if v.ndim > 1 and v.is_floating_point() else v for k, v in tensors.items()}
            write_json(work / name / "config.json", {"_class_name": type(part).__name__, **config})
            if tensors:
                write_tensors(work / name / _WEIGHTS, tensors, {"format": "lingen"})
        write_json(work / _TIMES, times)
        write_json(work / _INDEX, index | {"_lingen_version": version_of("lingen"), "recipe": known})
        write_text(work / "recipe.yaml", metadata["recipe"])
        write_text(work / "README.md", card_of(module, weights, metadata))
    return path


def _weights(folder: Path) -> Path:
    try:
        read_metadata(folder / _WEIGHTS)
    except WeightsError as error:
        raise WeightsError(folder / _WEIGHTS, f"{error.what} {_CURE}") from error
    return folder / _WEIGHTS


def _read(file: Path) -> dict[str, Any]:
    """The settings in a JSON file; but for the index, without those that only describe it."""
    try:
        held = dict(decode_json(file.read_bytes()))
    except (OSError, ValueError, TypeError) as error:
        raise WeightsError(file, f"it cannot be read ({error}): the folder is not whole. {_CURE}") from error
    return {key: value for key, value in held.items() if file.name == _INDEX or not key.startswith("_")}


def card_of(module: TextToVideo, weights: Path, about: Mapping[str, str]) -> str:
    """The model card of a weights file with this metadata: what is known of data, scores and how it was made."""
    folder, recipe = RunFolder(weights.resolve().parents[2]), module.recipe
    run = _held(folder.about)
    card = (shipped_folder("templates") / "model_card.md").read_text(encoding="utf-8")
    return card.format(
        parameters=sum(one.numel() for one in module.model.parameters()), **dict(about) | vars(recipe.data),
        name=recipe.name, height=recipe.data.size[0], width=recipe.data.size[1],
        prompt=(recipe.sample.prompts or ["a red circle moves right"])[0].replace('"', "'"),
        versions=", ".join(f"{one} {v}" for one, v in run.get("versions", {"lingen": version_of("lingen")}).items()),
        commit=f" (commit {run['commit']})" if run.get("commit") else "",
        sources=_table(["source", "samples used by the last stage", "licence"], _sources(module, folder)),
        metrics=_table(["metric", "value", "by chance", "95% interval", "clips"], _scores(folder) if run else []),
    )  # fmt: skip


def _sources(module: TextToVideo, folder: RunFolder) -> Iterator[Sequence[str]]:
    """Samples of the stage trained last by their source, with the licence that was written beside the shards."""
    own, shards = module.recipe.data.synthetic or {}, module.recipe.data.shards
    named = [[one] if isinstance(one, str) else one or [] for one in (shards.image, shards.video, own.get("sprites"))]
    beside = {Path(one).parent / "fetched.json": None for listed in named for one in listed}
    licences = [line.partition(": ") for file in beside for line in _held(file).get("licences", ())]
    for source, counts in _held(folder.ledger).get("sources", {}).items():
        found = "; ".join(licence for name, _, licence in licences if own or name == source)
        shown = "/".join(Path(source).parts[-2:]) if Path(source).is_absolute() else source  # others share no disk
        yield shown, f"{counts.get('used', 0):,}", found or ("drawn by lingen" if own else "not recorded")


def _scores(folder: RunFolder) -> Iterator[Sequence[str]]:
    """Judged clips of held-out captions, and what `lingen eval --out` wrote into the run folder."""
    sampled = _held(folder.score).get("sampled", {})
    for name, one in sampled.items():
        if isinstance(one, dict) and "share" in one:
            interval = f"{one['low']:.3g} to {one['high']:.3g}"
            yield name, f"{one['share']:.3g}", f"{one['chance']:.3g}", interval, str(sampled["clips"])
    for row in (row for file in folder.path.glob("**/results.json") for row in _held(file)["results"]):
        ends = "{:.3g} to {:.3g}".format(*row["interval"]) if row["interval"] else "-"
        yield f"{row['metric']} ({row['subject']})", f"{row['value']:.3g}", "-", ends, str(row["n"])


def _table(names: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """In Markdown; a sentence where there are no rows."""
    cells = [[cell.replace("|", "/") for cell in row] for row in (names, ["---"] * len(names), *rows)]
    return "\n".join(f"| {' | '.join(row)} |" for row in cells) if len(cells) > 2 else "Not recorded."


def _held(file: Path) -> dict[str, Any]:
    return dict(decode_json(file.read_bytes())) if file.is_file() else {}
