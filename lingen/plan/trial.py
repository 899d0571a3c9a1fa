"""Trying a recipe: its parts are built on the meta device, and what they refuse is told with its line."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from functools import lru_cache
from itertools import pairwise
from typing import TYPE_CHECKING, Any, cast

from lingen.frozen import on_meta
from lingen.recipe.errors import RecipeError, SettingError
from lingen.recipe.layers import Layered, Problem
from lingen.recipe.reading import components_of
from lingen.recipe.registry import AUTOENCODERS, FOR_TRAINING, MIXERS, PERCEPTUAL, TEXT_ENCODERS
from lingen.recipe.sections import LinGenConfig, Recipe, Triple
from lingen.recipe.signature import settings_of
from lingen.recipe.sizes import all_grids

if TYPE_CHECKING:
    from torch import nn

    from lingen.autoencoder import Autoencoder, TrainableAutoencoder
    from lingen.text import TextEncoder


CYCLE = 8
"""Layers whose scan orders are tried: a cycle is hardly longer."""


def faults_of_parts(draft: Layered, recipe: Recipe, *, to_train: bool) -> Iterator[Problem]:
    """Builds every component: the autoencoder and text encoders that the model has to fit, and the mixers. What only
    training needs is tried where it comes `to_train`."""
    from lingen.plan.contract import broken_contract
    from lingen.plan.practice import fault_in_training

    for path, component, registry in components_of(draft.tree):
        if path[:2] in FOR_TRAINING:
            fault = fault_in_training(registry, component, recipe) if to_train else None
        else:
            positional = (recipe.model.dim, 0) if registry is MIXERS else ()
            try:
                part = on_meta(registry, component, *positional)
            except Exception as error:  # a third party's part may raise anything
                yield _refused(draft, path, error, f"The {registry.kind} '{component['name']}' cannot be built")
                continue
            fault = broken_contract(registry, component, part, *positional)
            if registry is TEXT_ENCODERS and recipe.data.fps_prefix and component.get("parts"):
                fault = fault or "frames of later parts would not see the frame rate: set data.fps_prefix=false"
            on_cpu = registry is MIXERS and recipe.trainer.get("accelerator") == "cpu"
            if on_cpu and any(getattr(one, "cuda_only", False) for one in part.modules()):
                fault = fault or "it runs on CUDA alone, but trainer.accelerator is cpu: set trainer.accelerator=auto"
        if fault:
            yield draft.problem((*path, "name"), f"The {registry.kind} '{component['name']}': {fault}")


def grids_of_stage(recipe: Recipe) -> list[Triple]:
    """Every grid that a batch of a stage may have; SettingError where samples have none."""
    return all_grids(recipe, on_meta(AUTOENCODERS, recipe.autoencoder))


def faults_of_grids(draft: Layered, recipe: Recipe) -> Iterator[Problem]:
    """Whether samples of a stage's sizes go through its parts."""
    try:
        grids = grids_of_stage(recipe)
    except SettingError as error:
        yield draft.problem(("data", error.setting), str(error))
        return
    if recipe.subject.encoded:
        yield from _scans(draft, recipe, grids)
    yield from _decoding(draft, recipe)
    if recipe.subject.has_critic(recipe):
        yield from _critic(draft, recipe)


def _scans(draft: Layered, recipe: Recipe, grids: list[Triple]) -> Iterator[Problem]:
    """Mixers and scan orders of others, at every grid that a batch of the stage may have."""
    from lingen.plan.contract import fault_at_sizes, faults_of_scans, has_scan_of_others

    for path, component, registry in components_of(draft.tree):
        if registry is not MIXERS:
            continue
        if fault := fault_at_sizes(on_meta(registry, component, recipe.model.dim, 0), grids, recipe.model.dim):
            yield draft.problem((*path, "name"), f"The mixer '{component['name']}': {fault}")
        if not has_scan_of_others(component):
            continue
        layers = range(min(recipe.model.depth, CYCLE))
        mixers = [on_meta(registry, component, recipe.model.dim, layer) for layer in layers]
        told = dict.fromkeys(text for mixer in mixers for text in faults_of_scans(mixer, grids))
        yield from (draft.problem((*path, "scan" if "scan" in component else "name"), text) for text in told)


def derived(recipe: Recipe, largest: Triple) -> LinGenConfig:
    """The model's settings, with those that follow from autoencoder, text encoders and stages."""
    channels = on_meta(AUTOENCODERS, recipe.autoencoder).channels
    encoders = [on_meta(TEXT_ENCODERS, component) for component in recipe.text]
    dims, parts = tuple(one.dim for one in encoders), any(getattr(one, "parts", False) for one in encoders)
    return replace(recipe.model, channels=channels, text_dims=dims, text_parts=parts, max_grid=largest)


def faults_of_models(stages: list[tuple[str, Layered, Recipe]]) -> Iterator[Problem]:
    """Builds each distinct model, and compares the weights of each stage with those of the first."""
    first: dict[str, Any] | None = None
    for (_, _, before), (_, draft, recipe) in pairwise(stages):
        same_critic = before.subject.has_critic(before) == recipe.subject.has_critic(recipe)
        same = same_critic and before.train.optimizer["name"] == recipe.train.optimizer["name"]
        if recipe.train.keep_optimizer and not same:
            what = "with another optimiser" if same_critic else "other parameters (the critic)"
            text = f"The stage before trains {what}: its moments do not fit; take false."
            yield draft.problem(("train", "keep_optimizer"), text)
    for name, draft, recipe in stages:
        if recipe.subject is not stages[0][2].subject:
            text = f"Stage '{name}' trains another model than stage '{stages[0][0]}'"
            yield draft.problem(("trains",), f"{text}; give each a recipe of its own.")
            continue
        try:
            model = recipe.subject.build_weights(recipe)
        except Exception as error:
            path = (recipe.subject.section,) if recipe.subject.section == "model" else ()
            yield _refused(draft, path, error, "The model cannot be built")
            continue
        shapes = {weight: tuple(value.shape) for weight, value in model.state_dict().items()}
        first = shapes if first is None else first
        if shapes != first:
            text = f"The weights of stage '{name}' have other shapes than those of stage '{stages[0][0]}'."
            ours = stages[0][2].model
            differ = [key for key in settings_of(LinGenConfig) if getattr(ours, key) != getattr(recipe.model, key)]
            of_model = recipe.subject.section == "model"
            yield draft.problem(("model", *differ[:1]) if of_model else (recipe.subject.section,), text)


class ModelKey:
    """A model's settings as a key: equal where they read the same and name the same mixers."""

    def __init__(self, config: LinGenConfig):
        self.config = config
        mixers = config.mixer if isinstance(config.mixer, list | tuple) else [config.mixer]
        self.own = repr(config), tuple(MIXERS[one if isinstance(one, str) else one["name"]] for one in mixers)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, ModelKey) and other.own == self.own

    def __hash__(self) -> int:
        return hash(self.own)


def denoiser_on_meta(recipe: Recipe) -> nn.Module:
    """A stage's denoiser on the meta device; each distinct one is built once, so leave it as it is."""
    return _denoiser(ModelKey(recipe.model))


@lru_cache(maxsize=16)  # a recipe's stages share one, or have a few
def _denoiser(key: ModelKey) -> nn.Module:
    import torch

    from lingen.model import LinGen

    with torch.device("meta"):
        return LinGen(key.config)


def autoencoder_on_meta(recipe: Recipe) -> TrainableAutoencoder:
    """A stage's autoencoder on the meta device, if it is one that can be trained; SettingError else."""
    return trainable(on_meta(AUTOENCODERS, recipe.autoencoder), recipe.autoencoder["name"])


def parts_of_denoiser(recipe: Recipe, *, begun: bool = False) -> list[Autoencoder | TextEncoder]:
    """The autoencoder and the text encoders that a denoiser's stage uses, on the meta device."""
    encoders = (on_meta(TEXT_ENCODERS, component) for component in recipe.text)
    return [on_meta(AUTOENCODERS, recipe.autoencoder), *encoders]


def parts_of_autoencoder(recipe: Recipe, *, begun: bool = False) -> list[Any]:
    """What an autoencoder's stage reads from disk, on the meta device: its perceptual distance, and the weights that
    it starts from, unless it has `begun` and goes on from its checkpoint."""
    parts = [on_meta(PERCEPTUAL, features_of(recipe))]
    autoencoder = on_meta(AUTOENCODERS, recipe.autoencoder)
    return parts if begun or autoencoder.path is None else [*parts, autoencoder]


def features_of(recipe: Recipe) -> dict[str, Any]:
    """The perceptual distance that a stage uses."""
    return recipe.reconstruction.features if recipe.reconstruction.perceptual else {"name": "none"}


def _refused(draft: Layered, path: tuple[str | int, ...], error: Exception, what: str) -> Problem:
    """The place of a constructor's error: the setting that it names, else the component."""
    text = " ".join(str(error).split())
    if isinstance(error, SettingError):
        return draft.problem((*path, error.setting), text)
    if isinstance(error, ValueError):
        return draft.problem(path, text)
    return draft.problem(path, f"{what}: {type(error).__name__}: {text}")


def _decoding(draft: Layered, recipe: Recipe) -> Iterator[Problem]:
    """A mistake where the autoencoder cannot decode as `sample` says; found before anything is trained."""
    from lingen.autoencoder.ways import tiles_of, way_for

    settings, autoencoder = recipe.sample, on_meta(AUTOENCODERS, recipe.autoencoder)
    try:
        way_for(autoencoder, settings.decode, recipe.autoencoder["name"])
        tiles_of(settings.tile, autoencoder.strides)
    except SettingError as error:
        yield draft.problem(("sample", "tile"), str(error))
    except RecipeError as error:
        yield draft.problem(("sample", "decode"), str(error))


def _critic(draft: Layered, recipe: Recipe) -> Iterator[Problem]:
    """A mistake where the frames are too small for the discriminator."""
    import torch

    from lingen.autoencoder.network import Discriminator

    settings = recipe.reconstruction
    with torch.device("meta"):
        critic = Discriminator(settings.discriminator_width, settings.discriminator_layers)
        for height, width in (recipe.data.size, *recipe.data.sizes):
            try:
                critic(torch.empty(1, 3, 1, height, width))
            except RuntimeError:
                text = f"Frames of {height}x{width} pixels are too small for {settings.discriminator_layers} layers."
                yield draft.problem(("reconstruction", "discriminator_layers"), text)


def trainable(autoencoder: Autoencoder, name: str) -> TrainableAutoencoder:
    """The autoencoder, if it is one that can be trained; SettingError else."""
    # Asked by its methods: a check of the whole protocol does not see a module's buffers (Python 3.12).
    if not all(hasattr(autoencoder, method) for method in ("posterior", "reconstruct")):
        raise SettingError("autoencoder", f"The autoencoder '{name}' cannot be trained; take 'tae'.")
    return cast("TrainableAutoencoder", autoencoder)
