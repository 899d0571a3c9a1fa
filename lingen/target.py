"""Files to be written: whether they can be is asked before the work, and they appear in one step or not at all."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from lingen.registry import RecipeError


def check_target(path: str | Path, suffix: str) -> Path:
    """The path of a file to be written, looked at before any work is done.

    Raises:
        RecipeError: it is a folder, it does not end with `suffix`, or nothing can be written where it is to be.
    """
    path = Path(path)
    if path.is_dir():
        raise RecipeError(f"{path} is a folder; name a file to write, such as {path / 'name'}{suffix}.")
    if path.suffix.lower() != suffix:
        raise RecipeError(f"{path} does not end with {suffix}, which is what is written; name {path}{suffix}, say.")
    check_place(path.parent)
    return path


def check_place(folder: Path) -> None:
    """RecipeError where nothing can be written into a folder, which need not be there yet."""
    around = next(one for one in (folder, *folder.parents) if one.exists())
    if not around.is_dir():
        raise RecipeError(f"Nothing can be written into {folder}: {around} is a file, not a folder. Name another one.")
    if not os.access(around, os.W_OK | os.X_OK):
        raise RecipeError(f"Nothing can be written into {folder}: this user may not. Name another one.")


@contextmanager
def in_one_step(path: Path) -> Iterator[Path]:
    """Gives the name to write to; the file is moved to `path` at the end, and after an error nothing is left of it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(path.name + ".partial")
    partial.unlink(missing_ok=True)
    try:
        yield partial
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)
