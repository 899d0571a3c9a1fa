"""Weights of a module: written when a stage is finished, read again with the recipe inside the file."""

from collections import deque
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor

from lingen import weights as stored
from lingen.plan.loading import load_recipe
from lingen.ranks.collectives import is_first_rank, on_first_rank
from lingen.recipe.errors import RecipeError
from lingen.recipe.reading import RecipeText
from lingen.recipe.sections import Recipe
from lingen.recipe.subjects import SUBJECTS
from lingen.run_folder.lock import check_held
from lingen.training.modules import StageModules, TextToVideo
from lingen.training.state import whole_of

M = TypeVar("M", bound=StageModules)


def save_weights(path: Path, module: StageModules, recipe_yaml: str, step: int) -> None:
    """Writes the raw and the averaged copy of everything trained, with the whole filled recipe, in one step. All ranks
    gather one tensor after the other, the first one writes; where it cannot, all raise.

    Keys are ``raw.NAME`` and ``averaged.NAME``; the metadata holds `recipe` (YAML), `stage` and `step`."""
    copies = {"raw": module.trained_state(), "averaged": averaged_state(module)}
    tensors = {f"{copy}.{name}": value for copy, state in copies.items() for name, value in state.items()}
    metadata = {"format": "lingen", "recipe": recipe_yaml, "stage": module.recipe.stage or "main", "step": str(step)}
    pieces = ((name, whole_of(tensor)) for name, tensor in stored.file_order(tensors))

    def write() -> None:
        try:
            check_held(look=True)
            stored.write_pieces(path, tensors, pieces, metadata)
        except Exception:
            deque(pieces, maxlen=0)  # each piece needs all ranks
            raise

    if not is_first_rank():
        deque(pieces, maxlen=0)
    on_first_rank(write)


def averaged_state(module: StageModules) -> dict[str, Tensor]:
    """Name -> tensor of everything trained, averaged where an average is kept: what clips are sampled with."""
    return module.trained_state() | (module.average.weights() if module.average is not None else {})


def load_into(module: StageModules, weights: dict[str, Tensor], source: Any) -> None:
    """Puts weights into a module; positional tables of another size are resized (model.resize_tables).
    RecipeError names what is missing, left over or of another shape."""
    own = module.trained_state()
    weights = module.fitted(stored.names_now(weights, own))
    both = sorted(own.keys() & weights.keys())
    wrong = {
        "missing": sorted(name for name in own.keys() - weights.keys() if not name.startswith(module.optional)),
        "not in this model": sorted(name for name in weights.keys() - own if not name.startswith(module.optional)),
        "of another shape": [name for name in both if own[name].shape != weights[name].shape],
    }
    parts = [f"{len(names)} {what} (such as {names[0]})" for what, names in wrong.items() if names]
    if parts:
        raise RecipeError(
            f"The weights in {source} do not fit this recipe's model: {', '.join(parts)}. Use the recipe that they "
            "were trained with."
        )
    module.load_state_dict({name: value for name, value in weights.items() if name in own}, strict=False)


def with_weights(module: M, path: Path) -> M:
    """A module with the averaged weights of a file, in eval mode. RecipeError where they do not fit."""
    load_into(module, stored.read_weights(path, "averaged"), path)
    return module.eval()


def load_denoiser(source: str | Path, device: str | torch.device = "cpu") -> TextToVideo:
    """What makes clips, of a run folder (its last finished stage), an export or another weights file, from the recipe
    inside; an autoencoder.safetensors beside the weights is its autoencoder. RecipeError: no weights there, weights
    that do not fit, or those of an autoencoder."""
    path = stored.find_weights(source)
    recipe = recipe_of(path)
    if recipe.subject is not SUBJECTS["denoiser"]:
        raise RecipeError(
            f"{path} holds the weights of an autoencoder, which makes no clips of its own. Train a denoiser with "
            f"autoencoder.path={source}."
        )
    module = with_weights(TextToVideo(recipe), path)
    if (autoencoder := path.with_name("autoencoder.safetensors")).is_file():
        module.autoencoder.path = str(autoencoder)
    return module.to(device)


def recipe_of(path: Path) -> Recipe:
    """The loaded stage whose weights a file holds, from the recipe inside."""
    metadata = stored.read_metadata(path, stored.OF_TRAINING)
    return load_recipe(RecipeText(metadata["recipe"], f"the recipe in {path}", path.stem), stage=metadata["stage"])
