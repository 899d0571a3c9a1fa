"""Recipes: YAML + stage + overrides -> a checked, frozen `Recipe`, and back to YAML."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from lingen.plan.trial import Workshop
from lingen.recipe.layers import Layered, Problem
from lingen.recipe.reading import Draft, components_of, raise_all, read_draft, shipped_recipes, unknown_stage
from lingen.recipe.registry import RecipeError
from lingen.recipe.sections import Recipe
from lingen.recipe.signature import as_plain, check_settings

__all__ = ["load_recipe", "load_stages", "refuse_sharding", "shipped_recipes", "stages_of", "to_yaml"]

CUDA_KERNELS = ("triton", "stock", "flash", "cudnn")
"""Twins that no CPU runs."""

OURS = {
    "max_steps": "train.steps",
    "max_epochs": "train.steps",
    "accumulate_grad_batches": "train.accumulate",
    "gradient_clip_val": "train.clip_grad",
    "log_every_n_steps": "train.log_every",
    "val_check_interval": "train.validate_every",
    "check_val_every_n_epoch": "train.validate_every",
    "default_root_dir": "--run",
    "callbacks": "lingen's own",
}
"""Arguments of lightning.Trainer that another key of the recipe decides."""

SHARDING = ("fsdp", "deepspeed", "model_parallel")
"""What the names of Lightning's strategies contain that split the weights or AdamW's moments over ranks."""


def load_recipe(recipe: str | Path, overrides: Sequence[str] = (), stage: str | None = None) -> Recipe:
    """Loads a recipe with every default filled in; nothing that it names has to exist on disk.

    Strength: defaults < `extends` < recipe < stage < ``key=value`` < ``stages.NAME.key=value``. All stages are checked
    and their models built on the meta device, whichever is asked for.

    Args:
        recipe: a path, or the name of a recipe that comes with lingen.
        overrides: ``key=value``, e.g. ``model.depth=4``, ``text.0.dim=64``, ``stages.NAME.key=value``.
        stage: merge this stage's overlay; None: none of them, and `stages` holds what each stage changes.

    Raises:
        RecipeError: one sentence for each mistake, with file and line or ``command line``.
    """
    draft = read_draft(recipe, overrides)
    if stage is not None and stage not in draft.stages:
        raise RecipeError(unknown_stage(stage, list(draft.stages)))
    base, stages = _complete(draft)
    if stage is not None:
        return stages[stage]
    if not draft.staged:
        return base
    changes = {name: _difference(as_plain(replace(base, stage=name)), as_plain(one)) for name, one in stages.items()}
    return replace(base, stages=changes)


def load_stages(recipe: str | Path, overrides: Sequence[str] = ()) -> list[Recipe]:
    """All stages of a recipe in order, as `load_recipe` gives each."""
    return list(_complete(read_draft(recipe, overrides))[1].values())


def stages_of(recipe: str | Path, overrides: Sequence[str] = ()) -> list[str]:
    """Names of the stages in order; ``['main']`` for a recipe without stages. Imports no torch."""
    return list(read_draft(recipe, overrides).stages)


def sharding(strategy: Any) -> str | None:
    """Why `lingen fit` refuses a strategy of lightning.Trainer, with the cure; None for one that it takes."""
    if not isinstance(strategy, str) or not any(word in strategy.lower() for word in SHARDING):
        return None
    return (
        f"strategy '{strategy}' splits the model over ranks, which lingen can neither train nor save yet; set "
        "trainer.strategy=ddp, which keeps the whole model on every rank."
    )


def refuse_sharding(recipe: str | Path, overrides: Sequence[str] = (), stage: str | None = None) -> None:
    """RecipeError where a stage, or the one named, asks for a strategy that shards. Imports no torch."""
    drafts = read_draft(recipe, overrides).stages
    chosen = [draft for name, draft in drafts.items() if stage in (None, name)]
    place = ("trainer", "strategy")
    raise_all(draft.problem(place, text) for draft in chosen if (text := sharding(draft.get(place))))


def to_yaml(recipe: Recipe) -> str:
    """The filled recipe as YAML; loading it again gives an equal recipe."""
    import yaml

    class Dumper(yaml.SafeDumper):
        pass

    def text(dumper: yaml.SafeDumper, value: str) -> yaml.Node:
        value = value.replace("${", "\\${")
        return dumper.represent_scalar("tag:yaml.org,2002:str", value, style="'" if _is_number(value) else None)

    Dumper.add_representer(str, text)
    tree = as_plain(recipe)
    tree = {key: value for key, value in tree.items() if not (key in ("stage", "stages") and not value)}
    return yaml.dump(tree, Dumper=Dumper, sort_keys=False, default_flow_style=None, width=120, allow_unicode=True)


def _is_number(text: str) -> bool:
    """Is this text that OmegaConf would read as a number, e.g. 1e-4, though YAML 1.1 does not?"""
    try:
        return bool(float(text)) or True
    except ValueError:
        return False


def _complete(draft: Draft) -> tuple[Recipe, dict[str, Recipe]]:
    """Second half of loading: settings against signatures, what follows from the neighbours, models on `meta`."""
    everything = [draft.base, *draft.stages.values()]
    raise_all(
        problem
        for one in everything
        for problem in (*_fill_components(one), *_check_trainer(one), *_check_kernels(one))
    )
    loaded = [Recipe(**check_settings(Recipe, one.tree)[0]) for one in everything]
    workshop = Workshop()
    raise_all(problem for pair in zip(everything, loaded, strict=True) for problem in workshop.neighbours(*pair))
    raise_all(problem for pair in zip(everything[1:], loaded[1:], strict=True) for problem in workshop.grids(*pair))
    written = [recipe.model.max_grid for one, recipe in zip(everything, loaded, strict=True) if _writes_grid(one)]
    largest = tuple(max(axis) for axis in zip(*workshop.seen, *written, strict=True))
    base, *stages = (replace(recipe, model=workshop.derive(recipe, largest)) for recipe in loaded)
    raise_all(workshop.trials(list(zip(draft.stages, everything[1:], stages, strict=True))))
    return base, {name: replace(recipe, stage=name) for name, recipe in zip(draft.stages, stages, strict=True)}


def _writes_grid(draft: Layered) -> bool:
    return draft.get(("model", "max_grid")) is not None


def _fill_components(draft: Layered) -> Iterator[Problem]:
    """Checks every component against its signature and fills it in, in place."""
    for path, component, registry in components_of(draft.tree):
        settings = {key: value for key, value in component.items() if key != "name"}
        try:
            filled, found = check_settings(registry[component["name"]], settings)
        except RecipeError as error:
            yield draft.problem((*path, "name"), str(error))
            continue
        for one in found:
            yield draft.problem((*path, *one.path), one.text)
        component.update(filled)


def _check_trainer(draft: Layered) -> Iterator[Problem]:
    arguments = {key: value for key, value in (draft.tree.get("trainer") or {}).items() if key != "logger"}
    if not arguments:
        return
    from lightning import Trainer

    for key in arguments:
        if key in OURS:
            yield draft.problem(("trainer", key), f"'{key}' is not set here but by {OURS[key]}.")
    for one in check_settings(Trainer, {k: v for k, v in arguments.items() if k not in OURS})[1]:
        yield draft.problem(("trainer", *one.path), one.text)


def _check_kernels(draft: Layered) -> Iterator[Problem]:
    """A kernel that only CUDA has is no choice where the trainer is told to take the CPU: said before data is read."""
    if draft.get(("trainer", "accelerator")) != "cpu":
        return
    for path, component, _ in components_of(draft.tree):
        branches = [((*path, key), value) for key, value in component.items() if isinstance(value, dict)]
        for place, part in [(path, component), *branches]:
            kernel = part.get("kernel")
            if kernel in CUDA_KERNELS and not (kernel == "triton" and os.environ.get("TRITON_INTERPRET") == "1"):
                text = f"kernel='{kernel}' runs on CUDA, but trainer.accelerator is cpu; take kernel='auto'."
                yield draft.problem((*place, "kernel"), text)


def _difference(base: dict[str, Any], stage: dict[str, Any]) -> dict[str, Any]:
    """What has to be laid over `base` in order to get `stage`; another part is given whole."""
    return {
        key: _difference(base[key], value) if _same_part(base.get(key), value) else value
        for key, value in stage.items()
        if key not in base or base[key] != value
    }


def _same_part(one: Any, other: Any) -> bool:
    return isinstance(one, dict) and isinstance(other, dict) and one.get("name") == other.get("name")
