"""What a run is and which course it takes, as plain values: the settings of its stages by their marks.

A path counts by what lies there (`Content`), shards by their manifests, so that a moved data set or a renamed file of
weights is the same run, and other weights in the same place are another one."""

import hashlib
import inspect
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import lightning

from lingen.data.fingerprint import content_of
from lingen.data.indexing import content_of_shards
from lingen.data.locations import expand
from lingen.data.sources import Reader
from lingen.frozen import on_meta
from lingen.ranks.launch import ranks_here
from lingen.recipe.bounds import COURSE, IDENTITY
from lingen.recipe.marks import Entry, entries_of
from lingen.recipe.reading import components_of
from lingen.recipe.registry import AUTOENCODERS, PERCEPTUAL, TEXT_ENCODERS
from lingen.recipe.sections import KINDS, Recipe
from lingen.recipe.signature import as_plain
from lingen.recipe.sizes import BY_MACHINE

Values = dict[str, Any]
"""Dotted key -> plain value; of a file ``{"content": HASH}``, with null for one that is not on this machine."""

SAMPLES = "samples."
"""Start of the keys of a course that count the samples of all ranks in a step: they follow from `PER_STEP`."""
PER_STEP = ("data.batch.image", "data.batch.video", "train.accumulate", "trainer.devices", "trainer.num_nodes")
"""Settings that are no change of course as long as a step holds as many samples: only rounding differs."""
PRECISION_SPELLINGS = {"None": "32-true", "32": "32-true", "64": "64-true", "16": "16-mixed", "bf16": "bf16-mixed"}
"""Other spellings that Lightning knows, as texts; numbers are some, too."""


class Stage(NamedTuple):
    """One stage as a record holds it."""

    identity: Values
    course: Values


def described(stages: Sequence[Recipe]) -> dict[str, Stage]:
    """Identity and course of each stage by its name. Files are read to tell what they hold; they are cached by size and
    time for the life of the process."""
    found = {str(one.stage or "main"): [identity_of(one), course_of(one)] for one in stages}
    return {name: Stage(*json.loads(json.dumps(one, default=str))) for name, one in found.items()}


def identity_of(recipe: Recipe) -> Values:
    """Every setting of a stage that is marked as `IDENTITY`, or has no mark."""
    # Arguments of lightning.Trainer that are given as they would be without a word say nothing.
    known = inspect.signature(lightning.Trainer).parameters
    unsaid = {f"trainer.{name}": one.default for name, one in known.items()}
    entries = {key: entry for key, entry in entries_of(recipe).items() if entry.mark is IDENTITY}
    told = {key: entry for key, entry in entries.items() if key not in unsaid or unsaid[key] != entry.value}
    return {key: _identity(key, entry, recipe) for key, entry in told.items()} | _packaged(recipe)


def course_of(recipe: Recipe) -> Values:
    """Every setting that is marked as `COURSE`, and the samples of each kind in a step of all ranks: 0 of one that the
    mix does not ask for."""
    told = {key: as_plain(entry.value) for key, entry in entries_of(recipe).items() if entry.mark is COURSE}
    precision = recipe.trainer.get("precision")
    told |= {"trainer.devices": recipe.trainer.get("devices", "auto"), "trainer.num_nodes": 1} | told
    told["trainer.precision"] = PRECISION_SPELLINGS.get(str(precision), precision)
    per_rank, data = recipe.train.accumulate * ranks_here(recipe), recipe.data
    asked = {kind: per_rank if getattr(data.mix, kind) else 0 for kind in KINDS}
    return told | {f"{SAMPLES}{kind}": getattr(data.batch, kind) * times for kind, times in asked.items()}


def _identity(key: str, entry: Entry, recipe: Recipe) -> Any:
    if key.startswith("data.shards."):
        return _shards(recipe, key, entry.value)
    if entry.content is not False and isinstance(entry.value, str):
        found = content_of(Path(entry.value).expanduser())
        # What nothing is declared of is a path where it names something on this disk, else a text.
        return {"content": found} if found or entry.content is True else entry.value
    return as_plain(entry.value)


def _shards(recipe: Recipe, key: str, named: str | list[str] | None) -> Any:
    if not named:
        return None
    remote = recipe.data.remote
    try:
        return {"content": content_of_shards(expand(named, key, remote.timeout), key, Reader(remote))}
    except (OSError, ValueError):  # the check of shards says what is wrong; those of another stage may come later
        return {"content": None}


def _packaged(recipe: Recipe) -> Values:
    """Weights that come with a part, which may differ in another release."""
    found = {}
    for path, component, registry in components_of(as_plain(recipe)):
        if registry in (AUTOENCODERS, TEXT_ENCODERS, PERCEPTUAL) and "path" not in component:
            place = getattr(on_meta(registry, component), "path", None)
            if isinstance(place, str):
                found[".".join(map(str, (*path, "weights")))] = {"content": content_of(Path(place))}
    return found


# comparing


def alike(held: Any, here: Any) -> bool:
    """Whether two values of an identity agree. What a file holds that is not there, here or there, is not compared."""
    if isinstance(held, dict) and isinstance(here, dict) and "content" in held and "content" in here:
        return None in (held["content"], here["content"]) or held == here
    return bool(held == here)


def other_identity(held: dict[str, Stage], here: dict[str, Stage]) -> dict[str, tuple[str, Any, Any]]:
    """``stage key`` -> (what to call it, old, new) of every setting that makes another run."""
    if list(held) != list(here):
        return {"stages": ("stages", list(held), list(here))}
    found = {}
    for name, stage in here.items():
        old = held[name].identity
        for key in dict.fromkeys([*old, *stage.identity]):
            if not alike(old.get(key), stage.identity.get(key)):
                found[f"{name} {key}"] = (key, old.get(key), stage.identity.get(key))
    return found


def other_course(held: Values, here: Values) -> dict[str, list[Any]]:
    """Setting -> [old, new] where two courses differ."""
    keys = dict.fromkeys([*held, *here])
    found = {key: [held.get(key), here.get(key)] for key in keys if held.get(key) != here.get(key)}
    counts = {key: found.pop(key) for key in list(found) if key.startswith(SAMPLES)}
    per_step = {key: found.pop(key) for key in PER_STEP if key in found}
    return found | (per_step or counts if counts else {})


def fingerprint(stages: dict[str, Stage]) -> str:
    """8 hex digits of identity and course of all stages, however many ranks share the samples of a step. Where the
    machine decides how many ranks there are, they are the same on every machine."""
    parts = []
    for name, one in stages.items():
        counted = str(one.course["trainer.devices"]) not in BY_MACHINE
        idle = PER_STEP if counted else [key for key in one.course if key.startswith(SAMPLES)]
        parts.append([name, one.identity, {key: value for key, value in one.course.items() if key not in idle}])
    return hashlib.sha256(json.dumps(parts, sort_keys=True, default=str).encode()).hexdigest()[:8]


def shown(value: Any) -> str:
    """A value in a sentence."""
    if isinstance(value, dict) and "content" in value:
        return f"content {value['content']}"
    return json.dumps(value, ensure_ascii=False) if not isinstance(value, str) else value
