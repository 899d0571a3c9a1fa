"""What a change of each setting of a recipe does to its run: the marks that stand where the settings are declared."""

import dataclasses
from collections.abc import Iterator
from typing import Any, NamedTuple

from lingen.recipe.bounds import CONTENT, COURSE, FREE, IDENTITY, Mark
from lingen.recipe.registry import COMPONENTS, Registry
from lingen.recipe.sections import Recipe
from lingen.recipe.signature import Path, Setting, settings_of

TRAINER: dict[str, Mark] = dict.fromkeys(("devices", "num_nodes", "precision", "max_time", "callbacks"), COURSE)
TRAINER |= dict.fromkeys(
    ("accelerator", "strategy", "logger", "benchmark", "deterministic", "profiler", "detect_anomaly"), FREE
)
"""Arguments of lightning.Trainer that are no part of what a run is; those that do not stand here are."""


class Entry(NamedTuple):
    """A setting of a filled stage."""

    value: Any
    mark: Mark
    content: bool | None = False
    """The value is a path, of which the content counts (`CONTENT`); None: nothing is declared, so it may be one."""


def entries_of(recipe: Recipe) -> dict[str, Entry]:
    """The settings of one filled stage, as `load_stages` gives it, by their dotted keys: ``data.batch.video``.
    ``stages`` is left out: what it holds are settings of other stages. Imports the recipe's parts."""
    return {".".join(map(str, path)): entry for path, entry in _of_section(recipe, (), IDENTITY)}


def _of_section(section: Any, path: Path, above: Mark) -> Iterator[tuple[Path, Entry]]:
    for name, setting in settings_of(type(section)).items():
        value, here, mark = getattr(section, name), (*path, name), setting.mark or above
        if here in COMPONENTS:
            yield from _of_components(value, COMPONENTS[here], here, Entry(value, mark))
        elif dataclasses.is_dataclass(value):
            yield from _of_section(value, here, mark)
        elif here == ("trainer",):
            for key, item in value.items():
                entry = Entry(item, TRAINER.get(key, mark))
                registry = COMPONENTS.get((*here, key))
                yield from _of_components(item, registry, (*here, key), entry) if registry else [((*here, key), entry)]
        elif here != ("stages",):
            yield here, Entry(value, mark, bool(is_content(setting)))


def _of_components(value: Any, registry: Registry, path: Path, above: Entry) -> Iterator[tuple[Path, Entry]]:
    """Of a part's settings, by its signature; a part inside of it, such as a branch of MATE, has its own."""
    if isinstance(value, list):
        for index, one in enumerate(value):
            yield from _of_components(one, registry, (*path, index), above)
    elif isinstance(value, dict) and isinstance(value.get("name"), str) and value["name"] in registry:
        known = registry.settings(value["name"])
        for key, item in value.items():
            own = known.get(key)
            mark = own.mark if own and own.mark else above.mark
            inside = Entry(item, mark, key != "name" and is_content(own))
            yield from _of_components(item, registry, (*path, key), inside)
    else:
        yield path, above._replace(value=value)


def is_content(setting: Setting | None) -> bool | None:
    """Whether a part's setting is declared a path whose content counts; None where nothing is declared of it."""
    if setting is not None and CONTENT in getattr(setting.hint, "__metadata__", ()):
        return True
    return False if setting is not None and setting.mark else None
