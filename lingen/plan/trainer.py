"""What a recipe asks of lightning.Trainer by name, held to what Lightning and this environment have."""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterator
from importlib.util import find_spec
from typing import Any

from lingen.recipe.errors import RecipeError, no_such
from lingen.recipe.registry import import_object

LOGGERS = {
    "tensorboard": ("TensorBoardLogger", "tensorboard", "tensorboardX"), "wandb": ("WandbLogger", "wandb"),
    "mlflow": ("MLFlowLogger", "mlflow"), "comet": ("CometLogger", "comet_ml"), "neptune": ("NeptuneLogger", "neptune"),
}  # fmt: skip
"""Short name of a logger -> its class in Lightning, and modules, one of which it needs."""
PROFILERS = ("simple", "advanced", "pytorch", "xla")
"""Names of profilers; Lightning keeps them inside of a function."""


def listed(value: Any) -> list[Any]:
    """`trainer.logger` in all its spellings: false or null, a name, a component, a list of them."""
    if value in (None, False):
        return []
    return list(value) if isinstance(value, list | tuple) else ["tensorboard" if value is True else value]


def logger_of(component: Any) -> tuple[str, Any, dict[str, Any]]:
    """Name, class and own arguments of a logger. RecipeError where there is none of that name."""
    settings = dict(component) if isinstance(component, dict) else {"name": component}
    name = settings.pop("name", None)
    if not isinstance(name, str):
        raise RecipeError(f"A logger is a name, or has one (name: ...); got {component!r}.")
    if name not in LOGGERS and ":" not in name:
        raise RecipeError(f"{no_such('logger', name, LOGGERS)} Or write 'module:Class'.")
    path = f"lightning.pytorch.loggers:{LOGGERS[name][0]}" if name in LOGGERS else name
    return name, import_object(path), settings


def fault_of_logger(component: Any) -> str | None:
    """Why a logger cannot be built here, as a sentence: no such name, package or argument; None where it can."""
    try:
        name, made_by, settings = logger_of(component)
    except RecipeError as error:
        return str(error)
    if not callable(made_by):
        return f"The logger '{name}' is no class: {made_by!r}."
    # Also where another one is made of Lightning's.
    parents = {one.__name__ for one in getattr(made_by, "__mro__", ()) if one.__module__.startswith("lightning.")}
    for made, *needs in LOGGERS.values():
        if made in parents and not any(map(find_spec, needs)):
            return f"The logger '{name}' needs the package {' or '.join(needs)}, which is not installed; install it."
    given = {"save_dir": ".", "version": ""} | settings if name == "tensorboard" else settings
    try:
        inspect.signature(made_by).bind(**given)
    except TypeError as error:
        return f"The logger '{name}' cannot be built: {error}."
    if isinstance(made_by, type) and not callable(getattr(made_by, "log_metrics", None)):
        return f"'{name}' is no logger of Lightning: it has no method `log_metrics`."
    return None


def faults_of_names(arguments: dict[str, Any]) -> Iterator[tuple[str, str]]:
    """(argument, sentence) for each accelerator, strategy and profiler that Lightning does not have, and for devices in
    words that are neither how many nor which."""
    devices = arguments.get("devices")
    if isinstance(devices, str) and not re.fullmatch(r"auto|\s*-?\d+\s*(,\s*\d+\s*)*,?", devices):
        yield "devices", f"Expected how many, which (as 0,1) or auto, got '{devices}'."
    for key, value in arguments.items():
        known = _known(key) if isinstance(value, str) else None
        if known is not None and value.lower() not in known:
            yield key, no_such(key, value, sorted(known))


def _known(key: str) -> set[str] | None:
    """The names that an argument may take; None where it takes none, or where they are in its type."""
    if key == "accelerator":
        from lightning.pytorch.accelerators import AcceleratorRegistry

        return {"auto", "gpu", *AcceleratorRegistry.available_accelerators()}
    if key == "strategy":
        from lightning.pytorch.strategies import StrategyRegistry

        return {"auto", "hsdp", *StrategyRegistry.available_strategies()}
    return set(PROFILERS) if key == "profiler" else None
