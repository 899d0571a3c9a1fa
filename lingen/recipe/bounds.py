"""What is said of a setting beside its type, where it is declared: which numbers make sense, what a change of it does.
``steps: Annotated[int, AtLeast(1), Mark.COURSE, "optimiser steps of the stage"]``. The loader, the JSON Schema and the
marks of a run read it from there. A bound holds for each number of a list or section. Nothing here imports torch."""

import enum
import math
from collections.abc import Callable
from dataclasses import dataclass, field


class Mark(enum.Enum):
    """What a change of a setting does to a run. A setting without a mark is `IDENTITY`."""

    IDENTITY = "identity"
    """It makes another run."""
    COURSE = "course"
    """It may change while the run goes on, and then acts."""
    FREE = "free"
    """It changes nothing that is learned."""


IDENTITY, COURSE, FREE = Mark


class Content(enum.Enum):
    """Says of a setting that it is a path, and that what lies there counts, not what it is called."""

    CONTENT = "content"


CONTENT = Content.CONTENT


@dataclass(frozen=True)
class Bound:
    """Which numbers make sense."""

    text: str
    """In words, after "Expected"."""
    schema: dict[str, float] = field(compare=False)
    """In the keywords of JSON Schema."""
    holds: Callable[[float], bool] = field(compare=False)


def AtLeast(low: float) -> Bound:
    """`low` or more."""
    return Bound(f"at least {low:g}", {"minimum": low}, lambda number: number >= low)


def Above(low: float) -> Bound:
    """More than `low`."""
    return Bound(f"a number above {low:g}", {"exclusiveMinimum": low}, lambda number: number > low)


def Between(low: float, high: float) -> Bound:
    """From `low` to `high`, both included."""
    schema = {"minimum": low, "maximum": high}
    return Bound(f"a number from {low:,} to {high:,}", schema, lambda number: low <= number <= high)


def Finite() -> Bound:
    """Not infinite; JSON knows no other numbers."""
    return Bound("a finite number", {}, math.isfinite)
