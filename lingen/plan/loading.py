"""Recipes: YAML + stage + overrides -> a checked, frozen `Recipe`, and back to YAML."""

import os
from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from lingen.plan.trainer import fault_of_logger, faults_of_names, listed
from lingen.plan.trial import derived, faults_of_grids, faults_of_models, faults_of_parts, grids_of_stage
from lingen.recipe.errors import RecipeError, did_you_mean, no_such
from lingen.recipe.layers import Layered, Problem
from lingen.recipe.reading import Draft, RecipeText, components_of, raise_all, read_draft
from lingen.recipe.registry import FOR_TRAINING
from lingen.recipe.sections import Recipe
from lingen.recipe.signature import as_plain, check_settings

CUDA_KERNELS = ("triton", "stock", "flash", "cudnn")
"""Kernels that do not run on a CPU."""

OURS = {
    "max_steps": "train.steps", "max_epochs": "train.steps", "accumulate_grad_batches": "train.accumulate",
    "gradient_clip_val": "train.clip_grad", "log_every_n_steps": "train.log_every",
    "val_check_interval": "train.validate_every", "check_val_every_n_epoch": "train.validate_every",
    "default_root_dir": "--run", "plugins": "lingen's own",
}  # fmt: skip
"""Arguments of lightning.Trainer that another key of the recipe decides."""

STRATEGIES = ("auto", "ddp", "fsdp", "hsdp")
"""What `trainer.strategy` may be; Lightning's other spellings of the first two are taken as well."""


class Curriculum(NamedTuple):
    """A recipe, loaded and tried once: whoever needs its stages is handed this."""

    base: Recipe
    """Without any stage's overlay; `stages` holds what each stage changes."""
    stages: list[Recipe]
    """Every stage, complete, in order; a recipe without stages is one."""

    @property
    def names(self) -> list[str]:
        """Of the stages."""
        return [str(one.stage) for one in self.stages]

    def chosen(self, stage: str | None) -> list[Recipe]:
        """The stage of this name, or all of them for None. RecipeError says which there are."""
        _check_stage(stage, self.names)
        return self.stages if stage is None else [self.stages[self.names.index(stage)]]


def load_curriculum(
    recipe: str | Path | RecipeText, overrides: Sequence[str] = (), *, to_train: bool = False
) -> Curriculum:
    """Loads a recipe with all of its stages, as `load_recipe` does one.

    Args:
        recipe: a path, the name of a recipe that comes with lingen, or a text.
        overrides: see `load_recipe`.
        to_train: RecipeError also for what is used in training alone (loggers, optimisers, decays, losses, callbacks)
            and cannot be built here, or breaks its contract."""
    draft = read_draft(recipe, overrides)
    if to_train:
        _check_loggers(draft.stages.values())
    return _complete(draft, to_train=to_train)


def _check_loggers(stages: Iterable[Layered]) -> None:
    place = ("trainer", "logger")
    loggers = ((stage, one) for stage in stages for one in listed(stage.get(place)))
    raise_all(stage.problem(place, text) for stage, one in loggers if (text := fault_of_logger(one)))


def load_for_training(recipe: str | Path, overrides: Sequence[str] = (), stage: str | None = None) -> Curriculum:
    """As `load_curriculum` to train, of all stages or one. RecipeError, before anything is built and torch is imported,
    where a stage that will be trained asks for a strategy that lingen does not train with."""
    draft = read_draft(recipe, overrides)
    _check_stage(stage, list(draft.stages))
    chosen = [one for name, one in draft.stages.items() if stage in (None, name)]
    place = ("trainer", "strategy")
    raise_all(
        one.problem(place, text)
        for one in chosen
        if (text := fault_of_strategy(one.get(place), one.get(("trains",)), one.get(("trainer", "precision"))))
    )
    _check_loggers(chosen)
    return _complete(draft, to_train=True)


def load_recipe(recipe: str | Path | RecipeText, overrides: Sequence[str] = (), stage: str | None = None) -> Recipe:
    """Loads a recipe with every default filled in; nothing that it names has to exist on disk.

    Strength: defaults < `extends` < recipe < stage < ``key=value`` < ``stages.NAME.key=value``. All stages are checked
    and their models built on the meta device, whichever is asked for.

    Args:
        recipe: a path, or the name of a recipe that comes with lingen.
        overrides: ``key=value``, e.g. ``model.depth=4``, ``text.0.dim=64``, ``stages.NAME.key=value``.
        stage: merge this stage's overlay; None: none of them, and `stages` holds what each stage changes.

    Raises:
        RecipeError: one sentence for each mistake, with file and line or ``command line``."""
    draft = read_draft(recipe, overrides)
    _check_stage(stage, list(draft.stages))  # before anything is built
    curriculum = _complete(draft, of_weights=isinstance(recipe, RecipeText))
    return curriculum.base if stage is None else curriculum.chosen(stage)[0]


def _check_stage(stage: str | None, names: list[str]) -> None:
    if stage is not None and stage not in names:
        raise RecipeError(no_such("stage", stage, names))


def load_stages(recipe: str | Path, overrides: Sequence[str] = ()) -> list[Recipe]:
    """All stages of a recipe in order, as `load_recipe` gives each."""
    return load_curriculum(recipe, overrides).stages


def stages_of(recipe: str | Path, overrides: Sequence[str] = ()) -> list[str]:
    """Names of the stages in order; ``['main']`` for a recipe without stages. Imports no torch."""
    return list(read_draft(recipe, overrides).stages)


def fault_of_strategy(strategy: Any, trains: Any, precision: Any) -> str | None:
    """Why `lingen fit` refuses a `trainer.strategy`, with the cure; None for one that it takes.

    Args:
        trains: the recipe's subject.
        precision: `trainer.precision`."""
    name = str(strategy or "auto").lower()
    if name in ("fsdp", "hsdp") and str(precision) in ("16", "16-mixed"):
        return (
            f"strategy '{strategy}' does not go with precision {precision}, whose gradients each rank would scale for "
            "itself. Set trainer.precision=bf16-mixed."
        )
    if name in ("fsdp", "hsdp") and trains == "autoencoder":
        return (
            f"strategy '{strategy}' splits a denoiser over ranks; an autoencoder is whole on every rank. Set "
            "trainer.strategy=ddp."
        )
    if name in STRATEGIES or name == "single_device" or name.startswith("ddp"):
        return None
    known = f"{did_you_mean(name, STRATEGIES)} Known: {', '.join(STRATEGIES)}"
    return (
        f"There is no strategy called '{strategy}'.{known}. Set trainer.strategy=fsdp to split the model over ranks "
        "(FSDP2), hsdp to split it over the devices of each node, or ddp to keep it whole on every rank."
    )


def to_yaml(recipe: Recipe) -> str:
    """The filled recipe as YAML; loading it again gives an equal recipe."""

    def text(dumper: yaml.SafeDumper, value: str) -> yaml.Node:
        value, style = value.replace("${", "\\${"), None
        with suppress(ValueError):  # OmegaConf would read it as a number though YAML 1.1 does not, e.g. 1e-4
            float(value)
            style = "'"
        return dumper.represent_scalar("tag:yaml.org,2002:str", value, style=style)

    class Dumper(yaml.SafeDumper):
        yaml_representers = {**yaml.SafeDumper.yaml_representers, str: text}

    tree = {key: value for key, value in as_plain(recipe).items() if value or key not in ("stage", "stages")}
    return yaml.dump(tree, Dumper=Dumper, sort_keys=False, default_flow_style=None, width=120, allow_unicode=True)


def _complete(draft: Draft, *, to_train: bool = False, of_weights: bool = False) -> Curriculum:
    """Second half of loading: checks settings against signatures, derives settings from other parts, builds models on
    `meta`. Parts that only training needs may be missing unless it comes `to_train`. Of one `of_weights` nobody
    looks at arguments of the trainer: weights are of use whatever Lightning knows, and its import takes seconds."""
    everything = [draft.base, *draft.stages.values()]
    raise_all(
        problem
        for one in everything
        for problem in (
            *_fill_components(one, to_train),
            *(() if of_weights else _check_trainer(one)),
            *_check_kernels(one),
        )  # fmt: skip
    )
    loaded = [Recipe(**check_settings(Recipe, one.tree)[0]) for one in everything]
    pairs = list(zip(everything, loaded, strict=True))
    raise_all(problem for pair in pairs for problem in faults_of_parts(*pair, to_train=to_train))
    raise_all(problem for pair in pairs[1:] for problem in faults_of_grids(*pair))
    grids = [grid for recipe in loaded[1:] for grid in grids_of_stage(recipe)]
    grids += [recipe.model.max_grid for one, recipe in pairs if one.get(("model", "max_grid"))]
    largest = tuple(max(axis) for axis in zip(*grids, strict=True))
    base, *stages = (replace(recipe, model=derived(recipe, largest)) for recipe in loaded)
    raise_all(faults_of_models(list(zip(draft.stages, everything[1:], stages, strict=True))))
    stages = [replace(recipe, stage=name) for name, recipe in zip(draft.stages, stages, strict=True)]
    return Curriculum(with_stages(base, stages) if draft.staged else base, stages)


def with_stages(base: Recipe, stages: Sequence[Recipe]) -> Recipe:
    """The recipe that has these stages: a base, and what each changes of it."""
    plain = ((one, as_plain(replace(base, stage=one.stage, stages={}))) for one in stages)
    return replace(base, stages={str(one.stage): _difference(below, as_plain(one)) for one, below in plain})


def _fill_components(draft: Layered, to_train: bool) -> Iterator[Problem]:
    """Checks every component against its signature and fills it in, in place."""
    for path, component, registry in components_of(draft.tree):
        settings = {key: value for key, value in component.items() if key != "name"}
        try:
            filled, found = check_settings(registry[component["name"]], settings, registry.given)
        except RecipeError as error:
            if to_train or path[:2] not in FOR_TRAINING:
                yield draft.problem((*path, "name"), str(error))
            continue
        for one in found:
            yield draft.problem((*path, *one.path), one.text)
        component.update(filled)


def _check_trainer(draft: Layered) -> Iterator[Problem]:
    """Arguments of lightning.Trainer that are not there, or name what is not there, such as an accelerator."""
    arguments = {k: v for k, v in (draft.tree.get("trainer") or {}).items() if k not in ("logger", "callbacks")}
    callbacks = draft.get(("trainer", "callbacks")) or []
    if not isinstance(callbacks, list) or not all(isinstance(one, dict) for one in callbacks):
        text = f"Callbacks are a list of components (name: 'module:Class'), got {callbacks!r}."
        yield draft.problem(("trainer", "callbacks"), text)
    if not arguments:
        return
    from lightning import Trainer

    for one in check_settings(Trainer, arguments, OURS)[1]:
        yield draft.problem(("trainer", *one.path), one.text)
    yield from (draft.problem(("trainer", key), text) for key, text in faults_of_names(arguments))


def _check_kernels(draft: Layered) -> Iterator[Problem]:
    """A mistake where a kernel needs CUDA and the trainer is set to the CPU; found before data is read."""
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
    """The overlay that turns `base` into `stage`; a changed part is given with all its settings."""
    found = {}
    for key, value in stage.items():
        one = base.get(key)
        same_part = isinstance(one, dict) and isinstance(value, dict) and one.get("name") == value.get("name")
        if key not in base or one != value:
            found[key] = _difference(base[key], value) if same_part else value
    return found
