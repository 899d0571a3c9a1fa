"""What a change of a setting does to a run is said where the setting is declared."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any

import pytest

from lingen.recipe import load_recipe, load_stages
from lingen.recipe.bounds import COURSE, FREE, IDENTITY, Mark
from lingen.recipe.marks import entries_of
from lingen.recipe.reading import shipped_recipes
from lingen.recipe.registry import COMPONENTS
from lingen.recipe.sections import Recipe
from lingen.recipe.signature import as_plain, bare, settings_of

THEIRS = ("trainer", "stages")
"""Sections whose keys are not declared by us: Lightning's arguments, and overlays of our own sections."""


def unmarked(part: Any, name: str) -> Iterator[str]:
    """Settings without a mark of their own, in sections that have none either."""
    for key, setting in settings_of(part).items():
        if setting.mark is None and key not in THEIRS:
            kind = bare(setting.hint)
            yield from unmarked(kind, f"{name}.{key}") if dataclasses.is_dataclass(kind) else [f"{name}.{key}"]


def test_every_setting_of_ours_has_a_mark():
    parts = {f"{one.kind} {name}": one[name] for one in COMPONENTS.values() for name in one.names()}
    ours = {name: part for name, part in parts.items() if part.__module__.startswith("lingen.")} | {"recipe": Recipe}
    assert len(ours) >= 20
    assert [setting for name, part in ours.items() for setting in unmarked(part, name)] == []


def leaves(tree: Any, path: tuple[str, ...] = ()) -> Iterator[str]:
    """Dotted keys of all that is no mapping, no list of mappings."""
    if isinstance(tree, list) and tree and all(isinstance(one, dict) for one in tree):
        tree = {str(index): one for index, one in enumerate(tree)}
    if isinstance(tree, dict):
        for key, value in tree.items():
            yield from leaves(value, (*path, key))
    else:
        yield ".".join(path)


def marks_of(recipe: Recipe) -> dict[str, Mark]:
    return {key: entry.mark for key, entry in entries_of(recipe).items()}


@pytest.mark.parametrize("name", shipped_recipes())
def test_every_setting_of_a_filled_recipe_has_a_mark(name: str):
    for stage in load_stages(name):
        marks = marks_of(stage)
        assert list(marks) == list(leaves(as_plain(stage)))
        assert marks["data.shards.video"] is marks["seed"] is marks["autoencoder.name"] is IDENTITY
        assert marks["train.lr"] is marks["data.batch.video"] is marks["time.shift"] is COURSE
        assert marks["data.validation.video"] is marks["model.checkpointing"] is marks["trainer.accelerator"] is FREE


class Theirs:
    """A mixer of somebody else."""

    def __init__(self, dim: int, layer: int, *, gain: float = 1.0):
        pass


def test_branches_have_their_own_marks_and_what_has_none_is_identity():
    recipe = load_recipe(
        "quickstart_cpu",
        ["model.mixer={name: mate, ma: null, te: {name: attention, kernel: sdpa}}", "trainer.inference_mode=true"],
        stage="videos",
    )
    marks = marks_of(recipe)
    assert marks["model.mixer.te.kernel"] is marks["model.mixer.kernel"] is FREE
    assert marks["model.mixer.te.name"] is marks["model.mixer.ma"] is marks["trainer.inference_mode"] is IDENTITY
    mixers = [{"name": "attention", "kernel": "sdpa"}, {"name": f"{__name__}:Theirs", "gain": 2.0}]
    marks = marks_of(dataclasses.replace(recipe, model=dataclasses.replace(recipe.model, mixer=mixers)))
    assert marks["model.mixer.0.kernel"] is FREE and marks["model.mixer.1.gain"] is IDENTITY
