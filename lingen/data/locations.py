"""The tar files and manifests, local or remote, that a recipe's shards name."""

from __future__ import annotations

import os
from functools import partial
from glob import glob, has_magic
from typing import NamedTuple

import braceexpand

from lingen.data.manifest import NAME, without_manifest
from lingen.data.remote import is_remote
from lingen.data.sources import Reader
from lingen.recipe.errors import RecipeError
from lingen.recipe.sections import Remote


class Location(NamedTuple):
    """A file by its path or address."""

    folder: str
    """Path or address of the folder, without a slash at its end; ``.`` is the current one."""
    name: str

    def __str__(self) -> str:
        return self.name if self.folder == "." else f"{self.folder.rstrip('/')}/{self.name}"

    @classmethod
    def of(cls, path: str) -> Location:
        """Of a path or an address; ``/a`` lies in the folder ``/``, and of a URL what follows a ``?`` belongs to the
        name."""
        plain = path.partition("?")[0] if is_remote(path) and not path.startswith("s3://") else path
        folder, slash, name = plain.rpartition("/")
        return cls(folder or slash or ".", name + path[len(plain) :])

    @property
    def is_manifest(self) -> bool:
        """Whether it is a manifest, not a tar file."""
        return self.name.partition("?")[0].endswith(".parquet")


def expand(patterns: str | list[str] | None, setting: str, timeout: float = 30.0) -> list[str]:
    """Paths and addresses of the tar files, and of the manifests, that a recipe names; sorted, each once.

    A manifest stands for all the samples of its kind in the shards beside it, and so does a folder that holds one.
    RecipeError for a pattern without a match, a missing file or manifest, or what cannot be read piece by piece.

    Args:
        patterns: a path, an address, a glob (``s3://`` and local only), a brace pattern (``clips-{000..127}.tar``), or
            a list of them. A path that exists is that one, whatever signs of a pattern stand in it.
        setting: where it stands in the recipe, for messages, e.g. ``data.shards.video``.
        timeout: seconds until a server that is asked for a list counts as silent."""
    listed = [patterns] if isinstance(patterns, str) else patterns or []
    return sorted({file for pattern in listed for file in _expand_one(pattern, setting, timeout)})


def _expand_one(pattern: str, setting: str, timeout: float) -> list[str]:
    if ("://" in pattern and not is_remote(pattern)) or pattern.startswith("pipe:"):
        cure = "copy the shards to where pieces of them can be read, and name them there."
        raise RecipeError(f"{setting}: '{pattern}' is neither a path nor an address at https:// or s3://; {cure}")
    folder, rest = ("", pattern) if is_remote(pattern) else _literal(os.path.expanduser(pattern))
    try:
        names = list(braceexpand.braceexpand(rest)) if rest else [""]
    except ValueError as error:
        told = "has unbalanced braces; write e.g. 'clips-{000..127}.tar'."
        raise RecipeError(f"{setting}: '{pattern}' {told}") from error
    look = partial(_remote, timeout=timeout) if is_remote(pattern) else partial(_local, folder=folder)
    found = [match for name in names for match in look(name, setting)]
    if not found:
        raise RecipeError(
            f"{setting}: no file matches '{pattern}'; correct the pattern, or the folder that lingen is started in. "
            "(`lingen data pack` makes shards of footage, and `lingen doctor` names all that a recipe misses.)"
        )
    return found


def _remote(name: str, setting: str, timeout: float) -> list[str]:
    if name.endswith("/"):
        raise RecipeError(f"{setting}: '{name}' is a folder; name its manifest: '{name}{NAME}'.")
    if not name.startswith("s3://"):
        return [name]  # a * or ? may be part of an address, as of a signed one
    try:
        return Reader(Remote(timeout=timeout)).find(name) if has_magic(name) else [name]
    except OSError as error:
        raise RecipeError(f"{setting}: {error}") from error


def _literal(pattern: str) -> tuple[str, str]:
    """The longest beginning of a pattern that is a path there is, whatever signs stand in its names; and the rest."""
    folder, rest = pattern, ""
    while folder and not os.path.exists(folder):
        folder, slash, name = folder.rpartition("/")
        folder, rest = folder + slash if not folder else folder, f"{name}/{rest}" if rest else name
        if folder == "/":
            break
    return folder, rest


def _local(name: str, setting: str, folder: str) -> list[str]:
    if has_magic(name) and not os.path.exists(os.path.join(folder, name)):
        matched = glob(name, root_dir=folder or None, recursive=True)
    else:
        matched = [name]
    return [_checked(os.path.join(folder, one) if one else folder, setting) for one in matched]


def _checked(name: str, setting: str) -> str:
    manifest = os.path.join(name, NAME)
    if os.path.isfile(manifest):
        return manifest
    if os.path.isdir(name):
        raise RecipeError(f"{setting}: {without_manifest(name)}")
    if not os.path.isfile(name):
        cure = "correct the path, or the folder that lingen is started in."
        raise RecipeError(f"{setting}: there is no file '{name}'; {cure}")
    return name
