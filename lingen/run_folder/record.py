"""``run.json``: what a run is, its course, every start and change; and whether a recipe may go on with it."""

import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lingen.files import write_json, write_text
from lingen.plan.loading import Curriculum, load_curriculum, to_yaml, with_stages
from lingen.provenance import git_commit, time_now, versions
from lingen.recipe.errors import RecipeError
from lingen.recipe.reading import shipped_folder
from lingen.recipe.sections import Recipe
from lingen.run_folder.folder import RunFolder
from lingen.run_folder.identity import SAMPLES, Stage, described, fingerprint, other_course, other_identity, shown
from lingen.weights import read_run

OLD_TRIED = 8
"""Runs of an earlier version that are looked at, where a default folder is about to be made."""
SETTINGS_NAMED = 8
"""Settings that a message names."""

Changes = dict[str, dict[str, list[Any]]]
"""Stage -> setting -> [old, new]."""


@dataclass
class Held:
    """What a run folder says of its run."""

    about: dict[str, Any]
    """What run.json holds; ``asked`` are courses that were asked for beside, for stages that were finished by then and
    so kept theirs."""
    stages: dict[str, Stage]
    """Identity, and the course that each stage takes; of a finished one, that it took."""


@dataclass
class Start:
    """What a start of training makes of a run folder."""

    about: dict[str, Any]
    """What run.json will hold."""
    base: Recipe
    """What recipe.yaml will hold: the recipe, with finished stages as they were trained."""
    lines: list[str]
    """What is said."""


def read_held(folder: RunFolder) -> Held:
    """The record of a run folder. One made by an earlier version has no identity: it is that of its recipe.yaml.
    RecipeError where it cannot be read."""
    about = read_run(folder.about)
    try:
        kept = about["stages"] if "identity" in about else []
        stages = {name: Stage(about["identity"][name], about["course"][name]) for name in kept}
    except (KeyError, TypeError, AttributeError) as error:
        raise RecipeError(f"{folder.about} cannot be read ({error}). Name another folder with --run.") from error
    return Held(about, stages if "identity" in about else described(_curriculum_of(folder).stages))


def _curriculum_of(folder: RunFolder) -> Curriculum:
    try:
        return load_curriculum(folder.recipe)
    except RecipeError as error:
        raise RecipeError(
            f"{folder.path} holds a run whose recipe cannot be loaded any more, so that nothing can go on with it: "
            f"{error} Name another folder with --run, or none."
        ) from error


def start(
    folder: RunFolder, curriculum: Curriculum, here: dict[str, Stage], begins: str, step: int | None = None
) -> Start:
    """What training this recipe makes of a folder; nothing is written.

    Args:
        here: the recipe's stages, as `described` gives them.
        begins: the stage that is trained first.
        step: that it goes on from; default: that of its newest checkpoint, which may be damaged.
    Raises:
        RecipeError: the folder holds another run, something that is no run, a finished stage of which another course
            is asked for, or one that is further on than it is to go."""
    name = curriculum.stages[0].name
    is_new = not folder.about.is_file()
    held = _new(folder, name, here) if is_new else _completed(folder, read_held(folder), here)
    _check_identity(folder, held, here, name)
    for stage, asked_for in ((str(one.stage), one.train.steps) for one in curriculum.stages):
        if not folder.finished_steps(stage) and folder.last_step(stage) > asked_for:
            raise RecipeError(
                f"{folder.path}: stage '{stage}' has been trained for {folder.last_step(stage)} steps, more than "
                f"train.steps={asked_for}. Ask for as many or more, or name another folder with --run."
            )
    finished = {str(one.stage) for one in curriculum.stages if folder.finished_steps(str(one.stage)) >= one.train.steps}
    changes = _changes(held, here, finished)
    acting = {name: change for name, change in changes.items() if name not in finished}
    if changes and not acting:
        parts = "; ".join(
            f"stage '{one}' is finished at step {folder.finished_steps(one)} and was trained otherwise: {told(change)}"
            for one, change in changes.items()
        )
        raise RecipeError(
            f"{folder.path}: {parts}. Nothing was changed. To train on with the new settings, ask for more steps than "
            "it has (stages.NAME.train.steps); to train it anew, name another folder with --run, or none; else take "
            "the settings that it was trained with."
        )
    course = {name: held.stages[name].course if name in finished else stage.course for name, stage in here.items()}
    asked = {name: stage.course for name, stage in here.items() if stage.course != course[name]}
    steps = {name: folder.last_step(name) for name in here} | ({} if step is None else {begins: step})
    # A record of an earlier version kept no history: it has had its first start.
    history = held.about.get("history", [_entry(next(iter(held.about["stages"])), 0, {}, held.about)])
    entries = [_entry(name, steps[name], change, _now()) for name, change in (acting or {begins: {}}).items()]
    about = held.about | {
        "identity": {name: _known(held.stages[name].identity, stage.identity) for name, stage in here.items()},
        "first_course": held.about.get("first_course", {name: one.course for name, one in held.stages.items()}),
        "course": course,
        "asked": asked,
        "history": history + entries,
    }
    begun = {name: change for name, change in acting.items() if steps[name]}
    lines = [f"stage {name} goes on from step {steps[name]} with {told(change)}" for name, change in begun.items()]
    return Start(about, _true_recipe(folder, curriculum, set(asked)), lines)


def _new(folder: RunFolder, name: str, here: dict[str, Stage]) -> Held:
    """A run that has not begun."""
    # Left by a first start that was killed before it wrote its record, or by `lingen submit`, which comes before it.
    left = ("lock.json", "run.json.")
    held = [one for one in folder.path.glob("*") if one.name != "submit" and not one.name.startswith(left)]
    if held or folder.path.exists() and not folder.path.is_dir():
        raise RecipeError(f"{folder.path} exists and is no run folder. Name a new or empty folder with --run.")
    about = {"recipe": name, "fingerprint": fingerprint(here), "stages": list(here), **_now(), "history": []}
    return Held(about, here)


def _completed(folder: RunFolder, held: Held, here: dict[str, Stage]) -> Held:
    """With the settings that the version which wrote the record did not know: it trained as their defaults say. What it
    called otherwise is as its recipe says."""
    both = [(held.stages[name], one) for name, one in here.items() if name in held.stages]
    if all(one.identity.keys() <= old.identity.keys() and one.course.keys() <= old.course.keys() for old, one in both):
        return held
    try:
        known = described(_curriculum_of(folder).stages)
    except RecipeError:
        return held  # what differs is told
    for name, old in held.stages.items():
        pairs = zip(known[name], old, strict=True)
        held.stages[name] = Stage(*({key: there.get(key, now[key]) for key in now} for now, there in pairs))
    return held


def _check_identity(folder: RunFolder, held: Held, here: dict[str, Stage], name: str) -> None:
    found = other_identity(held.stages, here)
    if found:
        differ = _first_of(f"{key} is {shown(new)} here and {shown(old)} there" for key, old, new in found.values())
        names = "" if held.about.get("recipe") == name else f" ('{held.about.get('recipe')}'; this one is '{name}')"
        raise RecipeError(
            f"{folder.path} holds a run of another recipe{names}: {differ}. Name another folder with --run, or none, "
            "to train it as a run of its own."
        )


def _known(held: dict[str, Any], here: dict[str, Any]) -> dict[str, Any]:
    """What a run is, with what its record knows of files that are not on this machine."""
    unknown = [key for key, value in here.items() if value == {"content": None} and key in held]
    return here | {key: held[key] for key in unknown}


def told(changes: dict[str, list[Any]]) -> str:
    """``train.lr 0.002 -> 1e-05`` of each setting."""
    return _first_of(f"{key} {shown(old)} -> {shown(new)}" for key, (old, new) in changes.items())


def _first_of(words: Iterable[str]) -> str:
    parts = list(dict.fromkeys(words))
    more = f" and {len(parts) - SETTINGS_NAMED} more" if len(parts) > SETTINGS_NAMED else ""
    return ", ".join(parts[:SETTINGS_NAMED]) + more


def _changes(held: Held, here: dict[str, Stage], finished: set[str]) -> Changes:
    found = {}
    for name, stage in here.items():
        change = other_course(held.stages[name].course, stage.course)
        if name in finished:  # how many ranks this machine would make is no wish
            change = {key: pair for key, pair in change.items() if not key.startswith(SAMPLES)}
        asked = held.about.get("asked", {}).get(name, {})
        if change and other_course(held.stages[name].course | asked, stage.course):
            found[name] = change
    return found


def _true_recipe(folder: RunFolder, curriculum: Curriculum, kept: set[str]) -> Recipe:
    """The recipe, with these stages as they were trained."""
    if not kept or not curriculum.base.stages:
        return curriculum.base
    trained = {str(one.stage): one for one in _curriculum_of(folder).stages}
    stages = [trained[str(one.stage)] if str(one.stage) in kept else one for one in curriculum.stages]
    return with_stages(curriculum.base, stages)


def _now() -> dict[str, Any]:
    return {"command": sys.argv, "started": time_now(), "commit": git_commit(), "versions": versions()}


def _entry(stage: str, step: int, changes: dict[str, list[Any]], by: dict[str, Any]) -> dict[str, Any]:
    """A start, or a change of a stage: from `step` on settings have other values, ``[old, new]``. `by`: of `_now`."""
    kept = {key: by.get(key) for key in ("command", "commit", "versions")}
    return {"stage": stage, "step": step, "changes": changes, "time": by.get("started"), **kept}


def put_on_record(folder: RunFolder, begun: Start) -> None:
    """Puts a start on record: first what the run is, so that whatever is left by a kill can be told apart."""
    write_json(folder.about, begun.about)
    write_text(folder.recipe, to_yaml(begun.base))
    write_text(folder.readme, (shipped_folder("templates") / "run_readme.md").read_text(encoding="utf-8"))


# default folders


def default_path(name: str, here: dict[str, Stage], say: Callable[[str], None]) -> Path:
    """``runs/<recipe>-<fingerprint>`` in the current folder: that of a run with this identity which began with this
    course. Where there is none, a run of the same identity with another course is named."""
    path = Path("runs") / f"{name}-{fingerprint(here)}"
    if (path / "run.json").is_file():
        return path
    kin = list(_kin(path.parent, here, name))
    for folder, held in kin:
        first = held.about.get("first_course")
        if first and not any(other_course(first[name], one.course) for name, one in here.items()):
            return folder.path  # it named a file that was not on this machine, or on that one
    if kin:
        apart = [(folder, _apart(held, here)) for folder, held in reversed(kin)]
        nearest, change = min(apart, key=lambda one: len(one[1]))
        more = f" More of the kind: {len(kin) - 1}." if len(kin) > 1 else ""
        say(
            f"{nearest.path} is a run of the same model and data; this one, {path}, differs in {', '.join(change)}. "
            f"--run {nearest.path} would go on with it.{more}"
        )
    return path


def _apart(held: Held, here: dict[str, Stage]) -> list[str]:
    """``train.lr 0.002 -> 1e-05`` of each setting of the course that differs, with its stage unless all have it."""
    of = {name: other_course(held.stages[name].course, one.course) for name, one in here.items()}
    lines = {name: [told({key: pair}) for key, pair in change.items()] for name, change in of.items()}
    named = [
        line if all(line in one for one in lines.values()) else f"stages.{name}.{line}"
        for name, changes in lines.items()
        for line in changes
    ]
    return list(dict.fromkeys(named)) or ["how it was started"]


def _kin(runs: Path, here: dict[str, Stage], name: str) -> Iterator[tuple[RunFolder, Held]]:
    """The runs of the same identity, the newest last. Of those without an identity a few of the same name are tried,
    since each has to have its recipe loaded."""
    abouts = sorted(runs.glob("*/run.json"), key=lambda path: path.stat().st_mtime, reverse=True)
    found, loaded = [], 0
    for folder in (RunFolder(path.parent) for path in abouts):
        with suppress(OSError, ValueError):  # something else is in nobody's way
            if '"identity"' not in folder.about.read_text(encoding="utf-8"):
                loaded += 1
                if loaded > OLD_TRIED or not folder.path.name.startswith(f"{name}-"):
                    continue
            held = read_held(folder)
            if not other_identity(held.stages, here):
                found.append((folder, held))
    yield from reversed(found)
