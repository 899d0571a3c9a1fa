"""Registries of interchangeable parts. Nothing heavy is imported until a part is asked for."""

import contextlib
import importlib
import importlib.metadata
import os
import sys
import traceback
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

from lingen.recipe.errors import RecipeError, did_you_mean, no_such
from lingen.recipe.signature import Path, Setting, check_settings, refusal, settings_of

T = TypeVar("T")


def import_object(path: str) -> Any:
    """The object at ``module:Name``; modules in the current folder are found too. RecipeError where that fails."""
    module, _, name = path.partition(":")
    try:
        with _folder_on_path():
            return getattr(importlib.import_module(module), name)
    except (Exception, SystemExit) as error:  # a plugin may raise anything; it is reported, never hidden
        told = f"Cannot load '{path}': {type(error).__name__}: {error}"
        if isinstance(error, AttributeError) and error.name == name:
            close = did_you_mean(name, vars(sys.modules[module]))
            told += f".{close} What a module registers under a name is named alone, with --import {module}."
        elif isinstance(error, ModuleNotFoundError) and error.name == module:
            told += ". It is looked for in the current folder, on PYTHONPATH and among what is installed."
        raise RecipeError(told) from error


def import_module(name: str) -> None:
    """Imports a module that registers parts. The current folder comes first, and stays on the path, at its end: what
    the module imports later, and processes that are started from this one, find it too. RecipeError, with the place and
    the cure, where it cannot be imported, or raises."""
    here = os.getcwd()
    try:
        with _folder_on_path():
            importlib.import_module(name)
    except (Exception, SystemExit) as error:
        raise RecipeError(f"Cannot import '{name}': {_why(name, error)}") from error
    if here not in sys.path:
        sys.path.append(here)


def _why(name: str, error: BaseException) -> str:
    told = " ".join(str(error).split())
    if name.endswith(".py") or os.sep in name:
        return "this is a path; write the module's name, as in `import my_mixers`: dots for folders, without .py."
    if isinstance(error, ModuleNotFoundError) and error.name and f"{name}.".startswith(f"{error.name}."):
        return f"there is no module '{error.name}' in the current folder or installed. Run where it lies or install it."
    if isinstance(error, SyntaxError):
        return f"{type(error).__name__}: {told.rstrip('.')}. Mend it."
    frames = traceback.extract_tb(error.__traceback__)
    own = [frame for frame in frames if "importlib" not in frame.filename and frame.filename != __file__]
    place = f" at {os.path.relpath(own[-1].filename)}:{own[-1].lineno}" if own else ""
    return f"it raises {type(error).__name__}{place}: {told.rstrip('.')}. Mend it, or take the module out of `imports`."


@contextlib.contextmanager
def _folder_on_path() -> Iterator[None]:
    """The current folder before all else that modules are looked for in."""
    here = os.getcwd()
    added = here not in sys.path
    if added:
        sys.path.insert(0, here)
    try:
        yield
    finally:
        if added and here in sys.path:
            sys.path.remove(here)


class Registry:
    """Names of one kind of part. Third parties add theirs by the decorator, as ``module:Class``, or by an entry point.

    Args:
        kind: what a part is called in messages, e.g. ``mixer``.
        group: the entry-point group that other packages use, e.g. ``lingen.mixers``.
        builtin: lingen's own parts; a ``module:Name`` is imported when asked for, anything else is the part itself.
        given: arguments that a recipe does not give a part -> what does; all others are its settings. None: only its
            keyword-only arguments are."""

    def __init__(self, kind: str, group: str, builtin: dict[str, Any], given: dict[str, str] | None = None):
        self.kind = kind
        self.group = group
        self.given = given
        self._parts: dict[str, Any] = dict(builtin)
        self._origin: dict[str, str] = dict.fromkeys(builtin, "lingen")

    def register(self, name: str) -> Callable[[T], T]:
        """Decorator: ``@MIXERS.register("mine")``. A name that is taken, or that holds a colon, is a ValueError."""

        def add(part: T) -> T:
            if ":" in name:
                raise ValueError(f"A {self.kind}'s name cannot hold ':' (got '{name}').")
            if name in self.names():
                told = f"exists already, from {self.origin(name)}; choose another name."
                raise ValueError(f"The {self.kind} '{name}' {told}")
            self._parts[name] = part
            self._origin[name] = getattr(part, "__module__", "here")
            return part

        return add

    def names(self) -> list[str]:
        """All known names, sorted; plugins are not imported."""
        return sorted({*self._parts, *self._plugins()})

    def origin(self, name: str) -> str:
        """``lingen``, or the package or module that brings the part."""
        if name in self._origin:
            return self._origin[name]
        packages = [_package(plugin) for plugin in self._plugins().get(name, [])]
        return " and ".join(packages) if packages else name.partition(":")[0]

    def __contains__(self, name: str) -> bool:
        return ":" in name or name in self._parts or name in self._plugins()

    def __getitem__(self, name: str) -> Any:
        """The part called `name`, or at ``module:Name``. RecipeError for one that is unknown or cannot be imported."""
        if ":" in name:
            return import_object(name)
        if name in self._parts:
            part = self._parts[name]
            if isinstance(part, str) and ":" in part:
                part = self._parts[name] = import_object(part)
            return part
        plugins = self._plugins().get(name, [])
        if len(plugins) > 1:
            raise RecipeError(
                f"The {self.kind} '{name}' comes from {self.origin(name)}. Uninstall one, or write 'module:Class'."
            )
        if plugins:
            return import_object(plugins[0].value)
        raise RecipeError(self.unknown(name))

    def unknown(self, name: str) -> str:
        """The sentence for a name that does not exist."""
        return f"{no_such(self.kind, name, self.names())} To use your own, write 'module:Class'."

    def settings(self, name: str) -> dict[str, Setting]:
        """What a recipe can set of a part. Errors as for the part itself."""
        return settings_of(self[name], self.given)

    def build(self, component: str | dict[str, Any], *positional: Any, **offered: Any) -> Any:
        """Calls the named part with the model's arguments and the recipe's settings. ``MIXERS.build({"name":
        "mate", "window": (8, 4, 4)}, dim, layer)``. Settings are checked against the part's signature: SettingError for
        an unknown or missing one, a wrong type, a number out of bounds, naming it. It may leave what is `offered`."""
        settings = {"name": component} if isinstance(component, str) else dict(component)
        name = settings.pop("name", None)
        if not isinstance(name, str):
            raise RecipeError(f"A {self.kind} is named by a word, got {name!r}.")
        part = self[name]
        filled, found = check_settings(part, settings, self.given)
        if found:
            raise refusal(found, f"{self.kind} '{name}'")
        taken = {key: value for key, value in offered.items() if key in settings_of(part, ())}
        return part(*positional, **taken, **filled)

    def refused(self) -> list[tuple[str, str, str]]:
        """Entry points that are not used, because their name is taken: (name, package, why)."""
        taken = [one for one in importlib.metadata.entry_points(group=self.group) if one.name in self._parts]
        return [
            (one.name, _package(one), f"The name '{one.name}' belongs to {self.origin(one.name)}; choose another one.")
            for one in taken
        ]

    def _plugins(self) -> dict[str, list[importlib.metadata.EntryPoint]]:
        """Entry points by name, several where packages claim the same one; without those of a name that is taken."""
        found: dict[str, list[importlib.metadata.EntryPoint]] = {}
        for plugin in importlib.metadata.entry_points(group=self.group):
            if plugin.name not in self._parts:
                found.setdefault(plugin.name, []).append(plugin)
        return found


def _package(plugin: importlib.metadata.EntryPoint) -> str:
    return plugin.dist.name if plugin.dist else plugin.value


MIXERS = Registry("mixer", "lingen.mixers", {
    "attention": "lingen.blocks.attention:Attention",
    "linear_attention": "lingen.blocks.attention:LinearAttention",
    "mamba2": "lingen.blocks.mamba2:Mamba2",
    "temporal_swin": "lingen.blocks.temporal_swin:TemporalSwin",
    "mate": "lingen.blocks.mate:MATE",
})  # fmt: skip
"""Token mixers: ``Mixer(dim, layer, *, settings...)`` with ``forward(x [b t h w d]) -> [b t h w d]``; no base class.
The whole contract is `lingen.blocks.Mixer`."""

SCANS = Registry("scan order", "lingen.scans", {
    **{axes: axes for axes in ("thw", "twh", "htw", "hwt", "wth", "wht")},
    "rotary_major": "lingen.blocks.scan:ROTARY_MAJOR",
    "rotary_major_folded": "lingen.blocks.scan:ROTARY_MAJOR_FOLDED",
    "zigzag": "lingen.blocks.scan:zigzag", "hilbert": "lingen.blocks.scan:hilbert",
})  # fmt: skip
"""Scan orders: an axis string (slowest axis first), a function ``(t, h, w) -> LongTensor [t*h*w]`` that gives the flat
raster index of each position in the sequence, or a tuple of those, of which layer i takes entry ``i % len``."""

AUTOENCODERS = Registry("autoencoder", "lingen.autoencoders", {
    "pixels": "lingen.autoencoder.pixels:Pixels",
    "pca": "lingen.autoencoder.pca:PCA", "pca_theatre": "lingen.autoencoder.pca:PCATheatre",
    "tae": "lingen.autoencoder.tae:TAE", "tae_small": "lingen.autoencoder.tae:TAESmall",
    "diffusers": "lingen.autoencoder.diffusers_vae:DiffusersVAE",
})  # fmt: skip
"""Video autoencoders: ``encode(video [b 3 t h w] in -1..1) -> latents [b c t h w]``, ``decode``; ``.strides``,
``.channels``."""

TEXT_ENCODERS = Registry("text encoder", "lingen.text_encoders", {
    "words": "lingen.text.small:Words", "bytes": "lingen.text.small:Bytes", "ul2": "lingen.text.pretrained:UL2",
    "byt5": "lingen.text.pretrained:ByT5", "t5": "lingen.text.pretrained:T5",
    "metaclip": "lingen.text.metaclip:MetaCLIP", "llama": "lingen.text.pretrained:Llama",
    "bert": "lingen.text.pretrained:BERT",
})  # fmt: skip
"""Text encoders: ``encode(list[str]) -> (tokens [b n w], mask [b n])`` and ``.dim`` = w."""

PERCEPTUAL = Registry("perceptual distance", "lingen.perceptual", {
    "vgg16": "lingen.autoencoder.perceptual:VGG16Distance", "lpips": "lingen.autoencoder.perceptual:LPIPS",
    "none": "lingen.autoencoder.perceptual:NoDistance",
})  # fmt: skip
"""Perceptual distances: frozen `nn.Module`s, ``forward(a [n 3 h w] in -1..1, b) -> [n]`` with gradients into a and b,
``missing() -> list[Missing]``."""

SYNTHETIC = Registry("synthetic data set", "lingen.synthetic", {
    "shapes": "lingen.data.synthetic:Shapes", "theatre": "lingen.data.theatre:Theatre",
})  # fmt: skip
"""Data sets that lingen draws itself, by name; their settings are the fields of a dataclass."""

OPTIMIZERS = Registry(
    "optimiser",
    "lingen.optimizers",
    {"adamw": "lingen.training.named:adamw", "muon": "lingen.training.named:Muon"},
    {"params": "lingen"} | {key: f"train.{key}" for key in ("lr", "betas", "weight_decay")},
)
"""Optimisers: ``Class(params, settings...)``, a torch.optim.Optimizer; `params` are groups with ``lr``, ``betas``,
``weight_decay`` and ``decays`` (whether weight decay is for them). What it keeps lies in ``state[parameter]``."""

DECAYS = Registry(
    "decay", "lingen.decays", {name: f"lingen.training.named:{name}" for name in ("constant", "cosine", "wsd")}
)
"""Of the learning rate: ``f(step, steps, *, settings...) -> factor``; `step` goes from 0 to `steps` after warm-up."""

LOSSES = Registry(
    "loss", "lingen.losses", {"mse": "lingen.training.named:SquaredError", "huber": "lingen.training.named:Huber"}
)
"""Losses: ``Module(*, settings...)``, ``forward(velocity [b c t h w], target, time [b]) -> [b]``, from 0 on."""

CALLBACKS = Registry("callback", "lingen.callbacks", {}, {})
"""Lightning's callbacks: ``Class(settings...)``; its ``state_dict`` is plain values."""

FOR_TRAINING: dict[Path, Registry] = {
    ("train", "optimizer"): OPTIMIZERS,
    ("train", "decay"): DECAYS,
    ("train", "loss"): LOSSES,
    ("trainer", "callbacks"): CALLBACKS,
}
"""Where a recipe names parts that nothing but training needs: weights are used where they are not installed."""

COMPONENTS: dict[Path, Registry] = {
    ("model", "mixer"): MIXERS, ("autoencoder",): AUTOENCODERS, ("text",): TEXT_ENCODERS,
    ("data", "synthetic"): SYNTHETIC, ("reconstruction", "features"): PERCEPTUAL, **FOR_TRAINING,
}  # fmt: skip
"""Where a recipe names registered parts: one of them, or a list."""


def registries() -> dict[str, Registry]:
    """What `lingen list` shows beside recipes."""
    for_training = {str(key): registry for (_, key), registry in FOR_TRAINING.items() if registry.names()}
    models = {"mixers": MIXERS, "scans": SCANS, "autoencoders": AUTOENCODERS, "text": TEXT_ENCODERS}
    return models | {"perceptual": PERCEPTUAL} | for_training | {"synthetic": SYNTHETIC}
