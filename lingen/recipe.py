"""Recipes: YAML + stage + overrides -> a checked, frozen `Recipe`, and back to YAML."""

from __future__ import annotations

import math
import os
from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lingen.config import DataConfig, LinGenConfig, Recipe
from lingen.draft import Draft, as_path, components_of, raise_all, read_draft, shipped_recipes, unknown_stage
from lingen.layered import Layered, Problem
from lingen.registry import AUTOENCODERS, MIXERS, TEXT_ENCODERS, RecipeError, Registry, SettingError
from lingen.schema import as_plain, check_settings, settings_of

if TYPE_CHECKING:
    from torch import nn

__all__ = ["grids_of", "load_recipe", "load_stages", "shipped_recipes", "stages_of", "to_yaml"]

Grid = tuple[int, int, int]

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


def patch_of(recipe: Recipe) -> Grid:
    """Latents per token: of an autoencoder's recipe, which has no tokens, one."""
    return recipe.model.patch if recipe.trains == "denoiser" else (1, 1, 1)


def check_frames(frames: int, autoencoder: Any, patch: int = 1) -> None:
    """SettingError where an autoencoder does not take so many frames, or patches do not fill its latent frames.

    One whose first latent frame holds one frame alone takes 1 + a multiple of `frame_unit` (else: of its stride).

    Args:
        patch: latent frames per token.
    """
    stride, alone = autoencoder.strides[0], getattr(autoencoder, "first_frame_alone", False)
    unit = getattr(autoencoder, "frame_unit", stride)
    latents = math.ceil(frames / stride)
    if alone and (frames - 1) % unit:
        fault = f"This autoencoder keeps the first frame alone, the others come by {unit}: {frames} frames do not fit"
    elif latents % patch:
        what = f"A clip of {frames} frames is {latents} latent frames (stride {stride})"
        fault = f"{what}, which patches of {patch} do not fill"
    else:
        return
    # What fits comes again and again, at the latest after a patch of such steps.
    lengths = range(1 if alone else unit, frames + unit * patch + 1, unit)
    fits = [length for length in lengths if math.ceil(length / stride) % patch == 0]
    near = [*[length for length in fits if length < frames][-1:], *[length for length in fits if length > frames][:1]]
    cure = f"take {' or '.join(map(str, near))} frames" if near else "no length does; take patches of 1 along t"
    raise SettingError("frames", f"{fault}; {cure}.")


def grids_of(data: DataConfig, strides: Grid, patch: Grid) -> dict[str, Grid]:
    """Tokens (t, h, w) of a sample of each kind in the mix; SettingError if patches do not fill a frame."""
    grids, height, width = {}, *data.size
    for axis, pixels, stride, size in (
        ("height", height, strides[1], patch[1]),
        ("width", width, strides[2], patch[2]),
    ):
        if pixels % (stride * size):
            fits = _neighbours_of(pixels, stride * size)
            raise SettingError(
                "size",
                f"The {axis} of {pixels} pixels is no multiple of {stride * size}, the autoencoder's stride {stride} "
                f"times the patch {size}; take {fits}.",
            )
    for kind, frames in (("image", 1), ("video", data.frames)):
        if getattr(data.mix, kind):
            t = math.ceil(math.ceil(frames / strides[0]) / patch[0])
            grids[kind] = (t, height // (strides[1] * patch[1]), width // (strides[2] * patch[2]))
    return grids


def all_grids(recipe: Recipe, autoencoder: Any) -> list[Grid]:
    """Tokens (t, h, w) of samples of every kind in the mix and every shape that a batch may have; errors as above."""
    data = recipe.data
    grids: list[Grid] = []
    for size in (data.size, *data.sizes):
        for frames in (data.frames, *data.lengths):
            try:
                if data.mix.video:
                    check_frames(frames, autoencoder, patch_of(recipe)[0])
                one = replace(data, frames=frames, size=size)
                grids += grids_of(one, tuple(autoencoder.strides), patch_of(recipe)).values()
            except SettingError as error:
                first = {"size": data.size == size, "frames": data.frames == frames}[error.setting]
                name = error.setting if first else {"size": "sizes", "frames": "lengths"}[error.setting]
                raise SettingError(name, str(error)) from error
    return grids


def _neighbours_of(number: int, step: int) -> str:
    low = number // step * step
    return f"{low} or {low + step}" if low else str(step)


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
    workshop = _Workshop()
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
        for key, text in found:
            yield draft.problem((*path, *as_path(key)), text)
        component.update(filled)


def _check_trainer(draft: Layered) -> Iterator[Problem]:
    arguments = {key: value for key, value in (draft.tree.get("trainer") or {}).items() if key != "logger"}
    if not arguments:
        return
    from lightning import Trainer

    for key in arguments:
        if key in OURS:
            yield draft.problem(("trainer", key), f"'{key}' is not set here but by {OURS[key]}.")
    for key, text in check_settings(Trainer, {k: v for k, v in arguments.items() if k not in OURS})[1]:
        yield draft.problem(("trainer", *as_path(key)), text)


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


class _Workshop:
    """Builds parts on the meta device, each distinct one once, and turns what they refuse into problems."""

    def __init__(self) -> None:
        self.parts: dict[str, Any] = {}
        self.models: dict[str, nn.Module] = {}
        self.seen: list[Grid] = []

    def neighbours(self, draft: Layered, recipe: Recipe) -> Iterator[Problem]:
        """Builds every component: the autoencoder and text encoders that the model has to fit, each mixer once."""
        for path, component, registry in components_of(draft.tree):
            positional = (recipe.model.dim, 0) if registry is MIXERS else ()
            key = repr((registry.kind, component, positional))
            if key in self.parts:
                continue
            try:
                self.parts[key] = _on_meta(registry, component, positional)
            except Exception as error:  # a third party's part may fail in any way
                yield _refused(draft, path, error, f"The {registry.kind} '{component['name']}' cannot be built")

    def grids(self, draft: Layered, recipe: Recipe) -> Iterator[Problem]:
        """Notes the largest grid of a stage."""
        autoencoder = self._part(AUTOENCODERS, recipe.autoencoder)
        try:
            self.seen += all_grids(recipe, autoencoder)
        except SettingError as error:
            yield draft.problem(("data", error.setting), str(error))
            return
        yield from _decoding(draft, recipe, autoencoder)
        if recipe.trains == "autoencoder" and recipe.reconstruction.adversarial:
            yield from _critic(draft, recipe)

    def derive(self, recipe: Recipe, largest: Grid) -> LinGenConfig:
        """The model's settings with what follows from its neighbours."""
        channels = self._part(AUTOENCODERS, recipe.autoencoder).channels
        text_dims = tuple(self._part(TEXT_ENCODERS, component).dim for component in recipe.text)
        return replace(recipe.model, channels=channels, text_dims=text_dims, max_grid=largest)

    def trials(self, stages: list[tuple[str, Layered, Recipe]]) -> Iterator[Problem]:
        """Builds each distinct model, and compares the weights of each stage with those of the first."""
        first: dict[str, Any] | None = None
        for (_, _, before), (_, draft, recipe) in pairwise(stages):
            critics = [bool(one.trains == "autoencoder" and one.reconstruction.adversarial) for one in (before, recipe)]
            if recipe.train.keep_optimizer and critics[0] != critics[1]:
                text = "The stage before trains other parameters (the critic): its moments do not fit; take false."
                yield draft.problem(("train", "keep_optimizer"), text)
        for name, draft, recipe in stages:
            if recipe.trains != stages[0][2].trains:
                text = (
                    f"Stage '{name}' trains another model than stage '{stages[0][0]}'; give each a recipe of its own."
                )
                yield draft.problem(("trains",), text)
                continue
            try:
                model = self._trained(recipe)
            except Exception as error:
                path = ("model",) if recipe.trains == "denoiser" else ()
                yield _refused(draft, path, error, "The model cannot be built")
                continue
            shapes = {weight: tuple(value.shape) for weight, value in model.state_dict().items()}
            first = shapes if first is None else first
            if shapes != first:
                text = f"The weights of stage '{name}' have other shapes than those of stage '{stages[0][0]}'."
                yield draft.problem(_changed(stages[0][2], recipe), text)

    def _trained(self, recipe: Recipe) -> nn.Module:
        """What a stage trains, on the meta device."""
        import torch

        from lingen.model import LinGen

        if recipe.trains == "autoencoder":
            return trainable(self._part(AUTOENCODERS, recipe.autoencoder), recipe.autoencoder["name"])
        key = repr(recipe.model)
        if key not in self.models:
            with torch.device("meta"):
                self.models[key] = LinGen(recipe.model)
        return self.models[key]

    def _part(self, registry: Registry, component: dict[str, Any]) -> Any:
        return self.parts[repr((registry.kind, component, ()))]


def _on_meta(registry: Registry, component: dict[str, Any], positional: tuple[Any, ...]) -> Any:
    import torch

    with torch.device("meta"):
        return registry.build(component, *positional)


def _refused(draft: Layered, path: tuple[str | int, ...], error: Exception, what: str) -> Problem:
    """Where a constructor's refusal belongs: the setting that it names, else the component."""
    text = " ".join(str(error).split())
    if isinstance(error, SettingError):
        return draft.problem((*path, *as_path(error.setting)), text)
    if isinstance(error, ValueError):
        return draft.problem(path, text)
    return draft.problem(path, f"{what}: {type(error).__name__}: {text}")


def _decoding(draft: Layered, recipe: Recipe, autoencoder: Any) -> Iterator[Problem]:
    """Can the autoencoder decode as `sample` says? Said before anything is trained, not when the first clip is made."""
    from lingen.autoencoder.ways import tiles_of, way_for

    settings = recipe.sample
    try:
        way = "tiled" if settings.tile is not None else settings.decode
        if way_for(autoencoder, way, recipe.autoencoder["name"]) == "tiled":
            tiles_of(settings.tile, autoencoder.strides).cells(autoencoder.strides, "overlap")
    except SettingError as error:
        yield draft.problem(("sample", "tile"), str(error))
    except RecipeError as error:
        yield draft.problem(("sample", "decode"), str(error))


def _critic(draft: Layered, recipe: Recipe) -> Iterator[Problem]:
    """Are the frames large enough for the discriminator?"""
    import torch

    from lingen.autoencoder.discriminator import Discriminator

    settings = recipe.reconstruction
    with torch.device("meta"):
        critic = Discriminator(settings.discriminator_width, settings.discriminator_layers)
        for height, width in (recipe.data.size, *recipe.data.sizes):
            try:
                critic(torch.empty(1, 3, 1, height, width))
            except RuntimeError:
                text = f"Frames of {height}x{width} pixels are too small for {settings.discriminator_layers} layers."
                yield draft.problem(("reconstruction", "discriminator_layers"), text)


def trainable(autoencoder: Any, name: str) -> Any:
    """The autoencoder, if it is one that can be trained; SettingError else."""
    if not (hasattr(autoencoder, "posterior") and hasattr(autoencoder, "reconstruct")):
        raise SettingError("autoencoder", f"The autoencoder '{name}' cannot be trained; take 'tae'.")
    return autoencoder


def _changed(one: Recipe, other: Recipe) -> tuple[str, ...]:
    """The setting of the model in which two stages differ."""
    if one.trains == "autoencoder":
        return ("autoencoder",)
    names = [name for name in settings_of(LinGenConfig) if getattr(one.model, name) != getattr(other.model, name)]
    return ("model", *names[:1])


def _difference(base: dict[str, Any], stage: dict[str, Any]) -> dict[str, Any]:
    """What has to be laid over `base` in order to get `stage`; another part is given whole."""
    return {
        key: _difference(base[key], value) if _same_part(base.get(key), value) else value
        for key, value in stage.items()
        if key not in base or base[key] != value
    }


def _same_part(one: Any, other: Any) -> bool:
    return isinstance(one, dict) and isinstance(other, dict) and one.get("name") == other.get("name")
