"""Weights as one safetensors file with its recipe inside. Loading one never unpickles."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor

from lingen.files import check_target, whole_file
from lingen.recipe.registry import RecipeError
from lingen.recipe.sections import Recipe
from lingen.recipe.subjects import SUBJECTS

if TYPE_CHECKING:
    from lingen.training.base import Trained
    from lingen.training.denoiser import LinGenModule

Copy = Literal["averaged", "raw"]
"""The two copies in a file: training continues from the raw one, the averaged one is for sampling."""


class WeightsError(RecipeError):
    """Raised where a path holds no weights of lingen; `what` is the sentence without the path, with the cure."""

    def __init__(self, path: str | Path, what: str):
        super().__init__(f"{path}: {what}")
        self.what = what


class IncompleteError(RuntimeError):
    """Of what was to be written this process holds only a part; nothing was written."""


def check_whole(tensors: Mapping[str, Tensor], shapes: Mapping[str, torch.Size]) -> None:
    """Asked before anything is written: does this process hold every element of every tensor?

    Args:
        tensors: by name; what `shapes` does not name is not looked at.
        shapes: of all tensors, as the model declared them when it was built.
    Raises:
        IncompleteError: one is absent, a shard, or of another shape.
    """
    lacking = [name for name, shape in shapes.items() if not _is_whole(tensors.get(name), shape)]
    if lacking:
        raise IncompleteError(
            f"This rank does not hold the whole of {len(lacking)} of {len(shapes)} tensors (such as {lacking[0]}, "
            f"declared as {list(shapes[lacking[0]])}), so nothing was written. A strategy that splits the model over "
            "ranks cannot be saved yet: set trainer.strategy=ddp."
        )


def _is_whole(value: Tensor | None, shape: torch.Size) -> bool:
    """A DTensor and a ShardedTensor tell the shape of the whole, whatever part of it is here."""
    is_shard = hasattr(value, "full_tensor") or hasattr(value, "local_shards")
    return value is not None and not is_shard and value.shape == shape


def save_weights(path: Path, module: Trained, recipe_yaml: str, step: int) -> None:
    """Writes the raw and the averaged copy of everything trained, with the whole filled recipe, in one step.

    Keys are ``raw.NAME`` and ``averaged.NAME``; the metadata holds `recipe` (YAML), `stage` and `step`.
    IncompleteError where a tensor lacks elements.
    """
    raw = module.trained_state()
    averaged = raw | (module.average.weights() if module.average is not None else {})
    for copy in (raw, averaged):
        check_whole(copy, module.shapes)
    tensors = {f"raw.{name}": value for name, value in raw.items()} | {
        f"averaged.{name}": v for name, v in averaged.items()
    }
    metadata = {"format": "lingen", "recipe": recipe_yaml, "stage": module.recipe.stage or "main", "step": str(step)}
    # Both copies may be one tensor, which the library refuses to write twice.
    write_tensors(path, {name: value.detach().cpu().clone() for name, value in tensors.items()}, metadata)


def export_weights(source: str | Path, out: str | Path, precision: str = "bf16") -> Path:
    """Writes only what is needed to use a finished stage: the averaged copy, without a discriminator.

    Args:
        source: a run folder or a weights file.
        out: a .safetensors file.
        precision: ``bf16`` or ``fp32`` of everything of two or more axes; the rest stays as it is.
    Raises:
        RecipeError: no weights at `source`, or `out` cannot be written.
    """
    out = check_target(out, ".safetensors")
    path = find_weights(source)
    metadata = read_metadata(path)
    kept = {name: v for name, v in read_weights(path, "averaged").items() if not name.startswith("discriminator.")}
    if precision == "bf16":
        kept = {name: v.bfloat16() if v.ndim > 1 and v.is_floating_point() else v for name, v in kept.items()}
    write_tensors(out, {f"averaged.{name}": value for name, value in kept.items()}, metadata)
    return out


def write_tensors(path: Path, tensors: dict[str, Tensor], metadata: dict[str, str]) -> None:
    """Writes a safetensors file in one step, with the umask's permissions: the library's own are for the user alone."""
    from safetensors.torch import save_file

    with whole_file(path) as partial:
        partial.touch()
        mode = partial.stat().st_mode
        save_file({name: tensor.contiguous().cpu() for name, tensor in tensors.items()}, str(partial), metadata)
        partial.chmod(mode)


def read_metadata(path: Path) -> dict[str, str]:
    """The metadata of a weights file. WeightsError for a file that lingen did not write."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(str(path), "pt") as file:
            metadata = file.metadata() or {}
    except SafetensorError as error:
        raise WeightsError(path, f"it is cut off or no safetensors file ({error}).") from error
    except OSError as error:
        raise WeightsError(path, f"it cannot be read ({error.strerror or error}).") from error
    if metadata.get("format") != "lingen":
        raise WeightsError(
            path, "it holds no lingen weights (its metadata names no recipe). Use a file that `lingen fit` wrote."
        )
    return metadata


def read_weights(path: Path, copy: Copy) -> dict[str, Tensor]:
    """name -> tensor (CPU) of one copy."""
    from safetensors import safe_open

    prefix = f"{copy}."
    with safe_open(str(path), "pt") as file:
        return {name.removeprefix(prefix): file.get_tensor(name) for name in file.keys() if name.startswith(prefix)}  # noqa: SIM118


def load_into(module: Trained, weights: dict[str, Tensor], source: Any) -> None:
    """Puts weights into a module; positional tables of another size are resized (model.resize_tables).

    Raises:
        RecipeError: names what is missing, left over or of another shape.
    """
    own, weights = module.trained_state(), module.fitted(weights)
    missing, extra = (
        sorted(name for name in names if not name.startswith(module.optional))
        for names in (own.keys() - weights.keys(), weights.keys() - own.keys())
    )
    shapes = [name for name in own.keys() & weights.keys() if own[name].shape != weights[name].shape]
    if missing or extra or shapes:
        parts = [
            f"{len(names)} {what} (such as {names[0]})"
            for names, what in (
                (missing, "missing"),
                (extra, "not in this model"),
                (sorted(shapes), "of another shape"),
            )
            if names
        ]
        raise RecipeError(
            f"The weights in {source} do not fit this recipe's model: {', '.join(parts)}. Use the recipe that they "
            "were trained with."
        )
    module.load_state_dict({name: value for name, value in weights.items() if name in own}, strict=False)


def part_of(weights: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """The entries under a prefix, without it."""
    return {name.removeprefix(prefix): value for name, value in weights.items() if name.startswith(prefix)}


def find_weights(source: str | Path) -> Path:
    """A weights file, or that of the last finished stage of a run folder. WeightsError where there is none."""
    path = Path(source)
    if path.is_file():
        return path
    if not path.is_dir():
        raise WeightsError(path, "there is no run folder or weights file.")
    about = path / "run.json"
    if not about.is_file():
        raise WeightsError(
            path, "it is no run folder: it has no run.json. Name one that `lingen fit` made, or a .safetensors file."
        )
    stages = json.loads(about.read_text())["stages"]
    finished = [file for stage in stages if (file := path / "stages" / stage / "weights.safetensors").is_file()]
    if not finished:
        raise WeightsError(path, "no stage of it is finished yet. Go on with `lingen fit`.")
    return finished[-1]


def load_module(source: str | Path, copy: Copy = "averaged", device: str | torch.device = "cpu") -> LinGenModule:
    """The module of a run folder or weights file, from the recipe inside, with one copy of its weights, in eval.

    Raises:
        RecipeError: no weights there, weights that do not fit, or those of an autoencoder.
    """
    from lingen.training.denoiser import LinGenModule

    path = find_weights(source)
    recipe = recipe_of(path)
    if recipe.subject is not SUBJECTS["denoiser"]:
        raise RecipeError(
            f"{path} holds the weights of an autoencoder, which makes no clips of its own. Train a denoiser with "
            f"autoencoder.path={source}."
        )
    module = LinGenModule(recipe)
    load_into(module, read_weights(path, copy), path)
    return module.to(device).eval()


def recipe_of(path: Path) -> Recipe:
    """The loaded stage whose weights a file holds, from the recipe inside."""
    from lingen.recipe import load_recipe
    from lingen.recipe.reading import Source

    metadata = read_metadata(path)
    return load_recipe(Source(metadata["recipe"], f"the recipe in {path}", path.stem), stage=metadata["stage"])
