"""Feature networks by name, and the files that they need; no torch here: a missing one is told at once."""

from pathlib import Path
from typing import Any

from lingen.recipe.errors import RecipeError
from lingen.recipe.registry import Registry

FEATURES = Registry(
    "feature network",
    "lingen.features",
    {"i3d": "lingen.evaluation.networks:VideoI3D", "efficientnet": "lingen.evaluation.networks:FrameNet"},
)
"""Modules with keyword settings (`path`, say), whose ``forward`` takes uint8 [b 3 t h w] and gives [b d]; one whose
``video`` is False gets single frames, t = 1."""


def check_files(asked: list[str]) -> None:
    """RecipeError where the weights of one of lingen's own networks, ``NAME`` or ``NAME=PATH``, are not there."""
    for name, _, path in (words.partition("=") for words in asked):
        path = path or f"weights/{name}.safetensors"
        if name in ("i3d", "efficientnet") and not Path(path).is_file():
            cure = f"lingen data fetch {name}, or say where it is, --features {name}=PATH"
            raise RecipeError(f"{path} is not there: {cure}. Without any network: --features none.")


def network_of(words: str) -> Any:
    """``NAME`` or ``NAME=PATH``, with NAME a registered one or ``module:Class``; frozen, in eval mode. Errors as for
    `check_files`."""
    check_files([words])
    name, _, path = words.partition("=")
    return FEATURES.build({"name": name, **({"path": path} if path else {})}).eval().requires_grad_(False)
