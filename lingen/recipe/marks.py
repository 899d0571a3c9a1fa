"""What a change of each setting of a recipe does to its run: the marks that stand where the settings are declared."""

import dataclasses
from collections.abc import Iterator
from typing import Any

from lingen.recipe.bounds import COURSE, FREE, IDENTITY, Mark
from lingen.recipe.reading import COMPONENTS
from lingen.recipe.registry import Registry
from lingen.recipe.sections import Recipe
from lingen.recipe.signature import Path, settings_of

TRAINER: dict[str, Mark] = dict.fromkeys(("devices", "num_nodes", "precision", "max_time"), COURSE) | dict.fromkeys(
    ("accelerator", "strategy", "logger", "benchmark", "deterministic", "profiler", "detect_anomaly"), FREE
)
"""Arguments of lightning.Trainer that are no part of what a run is; those that do not stand here are."""


def marks_of(recipe: Recipe) -> dict[str, Mark]:
    """The mark of each setting of one filled stage, as `load_stages` gives it, by its dotted key: ``data.batch.video``.

    ``stages`` is left out: what it holds are settings of other stages. Imports the recipe's parts.
    """
    return {".".join(map(str, path)): mark for path, mark in _of_section(recipe, (), IDENTITY)}


def _of_section(section: Any, path: Path, above: Mark) -> Iterator[tuple[Path, Mark]]:
    for name, setting in settings_of(type(section)).items():
        value, here, mark = getattr(section, name), (*path, name), setting.mark or above
        if here in COMPONENTS:
            yield from _of_components(value, COMPONENTS[here], here, mark)
        elif dataclasses.is_dataclass(value):
            yield from _of_section(value, here, mark)
        elif here == ("trainer",):
            yield from (((*here, key), TRAINER.get(key, mark)) for key in value)
        elif here != ("stages",):
            yield here, mark


def _of_components(value: Any, registry: Registry, path: Path, mark: Mark) -> Iterator[tuple[Path, Mark]]:
    """Of a part's settings, by its signature; a part inside of it, such as a branch of MATE, has its own."""
    if isinstance(value, list):
        for index, one in enumerate(value):
            yield from _of_components(one, registry, (*path, index), mark)
    elif isinstance(value, dict) and isinstance(value.get("name"), str) and value["name"] in registry:
        known = settings_of(registry[value["name"]])
        for key, item in value.items():
            own = known[key].mark if key in known else None
            yield from _of_components(item, registry, (*path, key), own or mark)
    else:
        yield path, mark
