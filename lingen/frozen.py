"""Parts that are used as they are, with weights on disk: autoencoders and text encoders."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, NamedTuple

from lingen.recipe.registry import RecipeError


class Missing(NamedTuple):
    """Something that a part needs and that is not there, or is not what it should be."""

    name: str
    """The part's, in its registry."""
    path: str
    """Where it was looked for; ``-`` where the recipe names no place."""
    cure: str
    """A sentence: what to download, and where to put it."""


def missing_of(parts: Iterable[Any]) -> list[Missing]:
    """What the parts lack, each once. A part that has no method `missing` needs nothing."""
    return list(dict.fromkeys(one for part in parts if hasattr(part, "missing") for one in part.missing()))


def check_ready(parts: Iterable[Any]) -> None:
    """What a run asks before it starts. RecipeError names everything that is missing, and the cure."""
    refuse(missing_of(parts))


def refuse(missing: Iterable[Missing]) -> None:
    """RecipeError with a sentence for each that is missing, if any is."""
    sentences = [f"missing: {one.name} {one.path}: {one.cure}" for one in missing]
    if sentences:
        raise RecipeError(*sentences)
