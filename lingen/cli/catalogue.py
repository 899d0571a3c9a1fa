"""What `lingen list` shows: parts with their settings, and shipped recipes. A broken part shows its error."""

import inspect
from typing import Any

from lingen.recipe.errors import RecipeError
from lingen.recipe.reading import shipped_recipes
from lingen.recipe.registry import AUTOENCODERS, FOR_TRAINING, MIXERS, PERCEPTUAL, SCANS, TEXT_ENCODERS, Registry
from lingen.recipe.signature import REQUIRED

REGISTRIES = {"mixers": MIXERS, "scans": SCANS, "autoencoders": AUTOENCODERS, "text": TEXT_ENCODERS}
REGISTRIES["perceptual"] = PERCEPTUAL
REGISTRIES |= {str(key): registry for (_, key), registry in FOR_TRAINING.items() if registry.names()}
GRID = (8, 16, 16)
"""Tokens (t, h, w) on which scan orders are compared."""

CatalogueRow = dict[str, Any]


def parts(what: str) -> list[CatalogueRow]:
    """A row for each part of a registry (``mixers``, ``scans``, ``autoencoders``, ``text``), plugins included."""
    registry = REGISTRIES[what]
    rows = [_row(registry, name) for name in registry.names()]
    return rows + [{"name": name, "origin": origin, "error": error} for name, origin, error in registry.refused()]


def recipes() -> list[CatalogueRow]:
    """A row for each recipe that comes with lingen: its stages, and the first line that says what it is."""
    from lingen.recipe import stages_of

    rows = []
    for name, file in shipped_recipes().items():
        comments = [line.lstrip("# ") for line in file.read_text(encoding="utf-8").splitlines() if line.startswith("#")]
        about = next((line for line in comments if not line.startswith("yaml-language-server")), "")
        try:
            rows.append({"name": name, "stages": stages_of(file), "about": about})
        except RecipeError as error:
            rows.append({"name": name, "error": str(error)})
    return rows


def _row(registry: Registry, name: str) -> CatalogueRow:
    row: CatalogueRow = {"name": name, "origin": registry.origin(name)}
    try:
        part = registry[name]
        if registry is SCANS:
            return row | {f"steps between neighbours at {GRID}": _distances(part), "about": _about(part)}
        defaults = {key: setting.default for key, setting in registry.settings(name).items()}
        settings = {key: "required" if value is REQUIRED else value for key, value in defaults.items()}
        return row | {"settings": settings, "about": _about(part)}
    except Exception as error:  # a plugin may raise anything; other rows are still shown
        return row | {"error": " ".join(str(error).split())}


def _distances(scan: Any) -> dict[str, float]:
    """Mean distance in the sequence of neighbours in t, h and w; of a cycle, over its entries."""
    from lingen.blocks.scan import adjacency

    layers = range(len(scan)) if isinstance(scan, tuple) else range(1)
    scores = [adjacency(scan, GRID, layer) for layer in layers]
    means = [sum(values) / len(scores) for values in zip(*scores, strict=True)]
    return {axis: round(mean, 1) for axis, mean in zip("thw", means, strict=True)}


def _about(part: Any) -> str:
    if isinstance(part, str):
        return f"slowest axis {part[0]}, fastest axis {part[-1]}"
    if isinstance(part, tuple):
        entries = ", ".join(one if isinstance(one, str) else one.__name__ for one in part)
        return f"layer i takes entry i % {len(part)} of {entries}"
    return (inspect.getdoc(part) or "").partition("\n")[0]
