"""First half of loading a recipe: YAML, `extends`, stages and overrides, merged and checked without importing torch."""

import os
import re
from collections.abc import Iterable, Iterator, Sequence
from functools import reduce
from pathlib import Path as File
from typing import Any, NamedTuple

from lingen.recipe.errors import RecipeError, did_you_mean, no_such
from lingen.recipe.layers import Layered, Origin, Problem, read_override, read_yaml, resolve
from lingen.recipe.registry import COMPONENTS, MIXERS, Registry, import_module
from lingen.recipe.sections import DataConfig, Recipe, SampleConfig
from lingen.recipe.signature import Path, as_plain, check_settings
from lingen.recipe.text import NoText, decode_text

LISTED = (("text",), ("trainer", "callbacks"))
"""Where one alone is short for a list."""
MAY_LACK = (*LISTED, ("data", "synthetic"))
"""Where there need not be any."""

STAGE_NAME = re.compile(r"(?!\.|score$)[^/\\*?\[\]]+")
"""A stage has folders of its name in the run folder, where ``samples/score-STEP`` is what was judged."""
NOT_IN_A_STAGE = ("name", "stage", "stages", "extends")


class RecipeText(NamedTuple):
    """A recipe's text, and what is known of it beside."""

    text: str
    shown: str
    """What messages call it."""
    name: str
    """What the run is called, where the text does not say."""
    folder: File = File()
    """Where a path after `extends` is looked for."""


class Draft(NamedTuple):
    """A recipe read and merged, its sections checked; components are known by name only."""

    base: Layered
    """The recipe without any stage's overlay, command line included."""
    stages: dict[str, Layered]
    """Each stage merged; a recipe without `stages` has the one stage ``main``, or the one that it says it is."""
    staged: bool
    """Whether the recipe has `stages`."""


def shipped_recipes() -> dict[str, File]:
    """Name -> file of the recipes that come with lingen."""
    return {file.stem: file for file in sorted(shipped_folder("recipes").glob("*.yaml"))}


def shipped_folder(name: str) -> File:
    """A folder that comes with lingen, installed from a wheel or in its source tree."""
    inside = File(__file__).parents[1] / name
    return inside if inside.is_dir() else File(__file__).parents[2] / name


def read_draft(recipe: str | File | RecipeText, overrides: Sequence[str] = ()) -> Draft:
    """Reads and merges: defaults < `extends` < recipe < stage < command line. RecipeError with every mistake found."""
    base = _read(recipe if isinstance(recipe, RecipeText) else _find(recipe, File()), None)
    problems: list[Problem] = []
    plain, of_stage = _read_overrides(overrides, problems)
    stages = base.pop("stages")
    if not isinstance(stages.tree, dict):
        raise RecipeError(str(stages.problem((), "Stages are a mapping: a name and an overlay for each.")))
    staged = bool(stages.tree)
    names = list(stages.tree) or [str(base.tree.get("stage") or "main")]
    told = "names a folder: take letters and digits, and not 'score', which is where judged clips lie."
    wrong = [name for name in names if not STAGE_NAME.fullmatch(name)]
    problems += [stages.problem((name,), f"A stage's name, as '{name}', {told}") for name in wrong]
    unknown = [stage for stage in of_stage if stage not in names]
    problems += [Problem("command line", no_such("stage", stage, names), f"stages.{stage}") for stage in unknown]
    drafts = {name: _merge(base, [_overlay(stages, name), *plain, *of_stage.get(name, [])], problems) for name in names}
    whole = _merge(base, plain, problems)
    for draft in (whole, *drafts.values()):
        problems += resolve(draft, as_plain(Recipe()))
        spell_out(draft)
    raise_all(_import_modules([whole, *drafts.values()]))  # alone: what it would have registered is unknown
    for draft in (whole, *drafts.values()):
        problems += _problems_of_sections(draft)
    for draft in drafts.values():
        problems += _problems_of_data(draft)
    raise_all(problems)
    return Draft(whole, drafts, staged)


def raise_all(problems: Iterable[Problem]) -> None:
    """One RecipeError for all mistakes, each said once."""
    lines = list(dict.fromkeys(map(str, problems)))
    if lines:
        raise RecipeError(*lines)


def components_of(tree: dict[str, Any]) -> Iterator[tuple[Path, dict[str, Any], Registry]]:
    """Every component of a recipe: where it stands, its mapping, its registry."""
    for path, registry in COMPONENTS.items():
        node = Layered(tree, {}).get(path)
        for index, one in enumerate(node) if isinstance(node, list) else [(None, node)]:
            if isinstance(one, dict):
                yield path if index is None else (*path, index), one, registry


def spell_out(layered: Layered, prefix: Path = ()) -> None:
    """Bare words become mappings with a name, in place: ``mixer: mate`` is ``mixer: {name: mate}``."""
    for component in COMPONENTS:
        path = (*prefix, *component)
        value = layered.get(path)
        one = isinstance(value, dict) and "name" in value or isinstance(value, str) and "${" not in value
        if component in LISTED and one:
            layered.wrap(path, [value], 0)
            value = [value]
        places = [((*path, n), item) for n, item in enumerate(value)] if isinstance(value, list) else [(path, value)]
        for place, word in places:
            if isinstance(word, str) and "${" not in word:
                layered.wrap(place, {"name": word}, "name")


def _find(recipe: str | File, folder: File) -> RecipeText:
    """A recipe by its name, or by its path from a folder. RecipeError where there is none, or it cannot be read."""
    file = folder / recipe
    shipped = shipped_recipes()
    name = str(recipe).removesuffix(".yaml")
    if os.path.isfile(file):  # False also for what can be no path
        return _read_file(file)
    if name in shipped:
        return _read_file(shipped[name])
    if os.path.isdir(file) or os.sep in str(recipe) or str(recipe) != name:
        raise RecipeError(f"There is no recipe file {str(recipe)!r}.{did_you_mean(name, shipped)}")
    raise RecipeError(no_such("recipe", name, shipped))


def _read_file(file: File) -> RecipeText:
    relative = os.path.relpath(file)
    shown = str(file) if relative.startswith("..") else relative
    try:
        return RecipeText(decode_text(file.read_bytes()), shown, file.stem, file.parent)
    except NoText as error:
        raise RecipeError(str(Problem(shown, f"This is no text: {error}."))) from None
    except OSError as error:
        raise RecipeError(str(Problem(shown, f"Cannot be read: {error.strerror}."))) from None


def _read(source: RecipeText, child: str | None) -> Layered:
    """A recipe over the one that it extends over the defaults. `child` is where another one extends this one."""
    shown = source.shown
    layer, problems = read_yaml(source.text, shown)
    raise_all(problems)
    stages = layer.get(("stages",))
    for prefix in ((), *(("stages", name) for name in (stages if isinstance(stages, dict) else {}))):
        spell_out(layer, prefix)
    parent = layer.tree.pop("extends", None)
    if parent is None:
        base = _defaults(shown)
    else:
        if not isinstance(parent, str):
            raise_all([layer.problem(("extends",), "Expected the name or path of one recipe.")])
        if child is not None:
            told = f"'{shown}' extends another recipe itself; only one level is allowed. (at extends)"
            raise RecipeError(f"{child}: {told}")
        try:
            above = _find(parent, source.folder)
        except RecipeError as error:
            raise RecipeError(f"{layer.origin(('extends',)).where}: {error} (at extends)") from None
        base = _read(above, layer.origin(("extends",)).where)
        base.tree.pop("stage", None)
    base.tree["name"] = source.name
    base.origins[()] = Origin(shown, "")
    raise_all(_lay_over(base, layer))
    return base


def _defaults(shown: str) -> Layered:
    """The components that a recipe has without naming them, so that settings can be given to them."""
    tree: dict[Any, Any] = {}
    for path in COMPONENTS:
        if path not in MAY_LACK[1:]:
            section, key = (tree.setdefault(path[0], {}), path[1]) if len(path) > 1 else (tree, path[0])
            section[key] = reduce(getattr, map(str, path), Recipe())
    return Layered(tree, {(): Origin(shown, "")}).copy()


def _read_overrides(
    overrides: Sequence[str], problems: list[Problem]
) -> tuple[list[Layered], dict[str, list[Layered]]]:
    """Overrides of all stages, and those of one stage by its name."""
    plain: list[Layered] = []
    of_stage: dict[str, list[Layered]] = {}
    for text in overrides:
        override, found = read_override(text)
        problems += found
        if found:
            continue
        path = text.partition("=")[0].split(".")
        if path[0] != "stages":
            spell_out(override)
            plain.append(override)
        elif len(path) < 3:
            problems.append(Problem("command line", "Say stages.NAME.key=value.", ".".join(path)))
        else:
            one = override.pop("stages").pop(path[1])
            spell_out(one)
            of_stage.setdefault(path[1], []).append(one)
    return plain, of_stage


def _overlay(stages: Layered, name: str) -> Layered:
    overlay = stages.copy().pop(name)
    if not isinstance(overlay.tree, dict):
        raise_all([overlay.problem((), "A stage is a mapping of sections.")])
    wrong = (key for key in overlay.tree if key in NOT_IN_A_STAGE)
    raise_all(overlay.problem((key,), f"A stage cannot set '{key}'.") for key in wrong)
    return overlay


def _merge(base: Layered, layers: Sequence[Layered], problems: list[Problem]) -> Layered:
    merged = base.copy()
    for layer in layers:
        problems += _lay_over(merged, layer)
    if merged.tree.get("train") is None:  # all of its lines are commented out
        merged.tree["train"] = _defaults("").tree["train"]
    spell_out(merged)
    return merged


def _lay_over(below: Layered, over: Layered) -> list[Problem]:
    """Merges; `imports` add up, because a recipe that extends another one needs its parts too."""
    place: Path = ("imports",)
    held, given = below.get(place), over.get(place)
    if not (isinstance(held, list) and isinstance(given, list)):
        return below.merge(over)
    added = [number for number, module in enumerate(given) if module not in held]
    origins = [below.origin((*place, number)) for number in range(len(held))]
    origins += [over.origin((*place, number)) for number in added]
    over = over.copy()
    over.tree["imports"] = [*held, *(given[number] for number in added)]
    over.origins |= {(*place, number): origin for number, origin in enumerate(origins)}
    return below.merge(over)


def _import_modules(drafts: Sequence[Layered]) -> Iterator[Problem]:
    """Imports the modules that these drafts name, each once, before their parts are looked up."""
    seen: set[str] = set()
    for draft in drafts:
        modules = draft.get(("imports",))
        for number, name in enumerate(modules if isinstance(modules, list) else ()):
            if not isinstance(name, str) or name in seen:
                continue  # what is no text is told with the sections
            seen.add(name)
            try:
                import_module(name)
            except RecipeError as error:
                yield draft.problem(("imports", number), str(error))


def _problems_of_sections(draft: Layered) -> Iterator[Problem]:
    """Keys, types, numbers out of bounds, names of components."""
    for one in check_settings(Recipe, draft.tree)[1]:
        if "${" not in str(draft.get(one.path)):  # an unresolved ${...} is reported elsewhere
            yield draft.problem(one.path, one.text)
    for path, registry in COMPONENTS.items():
        if draft.get(path) is None and path not in MAY_LACK or draft.get(path) == [] and registry is MIXERS:
            yield draft.problem(path, f"There is no {registry.kind} named here. Known: {', '.join(registry.names())}.")
    for path, component, registry in components_of(draft.tree):
        name = component.get("name")
        if not isinstance(name, str):
            text = f"This {registry.kind} has no name. Known: {', '.join(registry.names())}."
            yield draft.problem((*path, "name"), text)
        elif name not in registry:
            yield draft.problem((*path, "name"), registry.unknown(name))


def _problems_of_data(draft: Layered) -> Iterator[Problem]:
    """What a stage needs in order to run: samples for each kind that its mix names, and settings that go together."""
    filled, _ = check_settings(Recipe, draft.tree)
    data = filled.get("data")
    if not isinstance(data, DataConfig) or not isinstance(filled["sample"], SampleConfig):
        return  # mistakes of the sections are reported elsewhere
    shards = {kind: getattr(data.shards, kind) for kind in ("image", "video")}
    if not data.mix.image and not data.mix.video:
        yield draft.problem(("data", "mix"), "This mix is empty; image or video must be above 0.")
    for kind, source in shards.items():
        if getattr(data.mix, kind) > 0 and not source and (data.synthetic is None or any(shards.values())):
            drawn = "" if any(shards.values()) else ", or data.synthetic=shapes (as `extends: quickstart_cpu` has it)"
            cure = f"set data.shards.{kind}, or data.mix.{kind}=0{drawn}"
            text = f"The mix asks for {kind} batches, and there are no {kind} shards; {cure}."
            yield draft.problem(("data", "mix", kind), text)
    if getattr(filled["score"], "clips", None) and (data.synthetic or {}).get("name") in (None, "theatre"):
        text = "Only clips of data.synthetic=shapes can be scored; set it, or score.clips=0."
        yield draft.problem(("score", "clips"), text)
    held_out = data.synthetic or any(getattr(data.validation, kind) for kind in shards if getattr(data.mix, kind) > 0)
    if getattr(filled["train"], "evaluate_every", 0) and (filled["trains"] == "autoencoder" or not held_out):
        text = "Only clips of a denoiser's held-out captions can be evaluated"
        yield draft.problem(("train", "evaluate_every"), f"{text}: name data.validation of this stage, or 0.")
    low, high = filled["sample"].guidance_interval
    if low > high:
        text = f"The interval ends at {high:g}, before it begins at {low:g}."
        yield draft.problem(("sample", "guidance_interval"), text)
