"""Parts that are used as they are, with weights on disk: autoencoders, text encoders, perceptual distances."""

import json
from collections.abc import Iterable
from functools import lru_cache
from typing import Any, NamedTuple

from lingen.recipe.errors import RecipeError
from lingen.recipe.registry import Registry


class Missing(NamedTuple):
    """Something that a part needs and that is not there, or is not what it should be."""

    name: str
    """Name of the part in its registry."""
    path: str
    """Where it was looked for; ``-`` where the recipe names no place."""
    cure: str
    """A sentence: what to download, and where to put it."""


def on_meta(registry: Registry, component: dict[str, Any], *positional: Any) -> Any:
    """A recipe's part on the meta device, where nothing is read or computed. Each distinct one is built once, so what
    is returned is shared: look at it, do not change it. Errors are those of the part's constructor."""
    part = registry[component["name"]]  # a name may be registered anew
    return _built(registry, part, json.dumps(component, sort_keys=True), positional)


@lru_cache(maxsize=64)
def _built(registry: Registry, part: Any, component: str, positional: tuple[Any, ...]) -> Any:
    import torch

    with torch.device("meta"):
        return registry.build(json.loads(component), *positional)


def is_trained(part: Any) -> bool:
    """Whether a text encoder says that it is trained with the denoiser, instead of used as it is."""
    return bool(getattr(part, "trainable", False))


def missing_of(parts: Iterable[Any]) -> list[Missing]:
    """What the parts lack, each once. A part that has no method `missing` needs nothing."""
    return list(dict.fromkeys(one for part in parts if hasattr(part, "missing") for one in part.missing()))


def check_ready(parts: Iterable[Any]) -> None:
    """The check before a run: RecipeError names everything that the parts lack, and the cure."""
    refuse(missing_of(parts))


def refuse(missing: Iterable[Missing]) -> None:
    """RecipeError with a sentence for each that is missing, if any is."""
    sentences = [f"missing: {one.name} {one.path}: {one.cure}" for one in missing]
    if sentences:
        raise RecipeError(*sentences)
