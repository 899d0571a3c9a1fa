"""A file or a folder appears whole or not at all; whether it can be written is asked before the work."""

import contextlib
import errno
import json
import os
import re
import secrets
import shutil
import socket
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from lingen.recipe.errors import RecipeError

BUILDING = ".lingen-building-"
"""Start of the name of a folder that is not finished."""
LEFT = 86400
"""Seconds after which what is not finished, and nobody touched, counts as left by a killed process."""

SLOW_DISK = 60.0
"""Seconds that a file which another machine has written may take to be seen here."""


def cache_folder() -> Path:
    """Where lingen keeps what it made or fetched: ``$LINGEN_CACHE``, else ``$XDG_CACHE_HOME/lingen``, else
    ``~/.cache/lingen``."""
    if own := os.environ.get("LINGEN_CACHE"):
        return Path(own).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "lingen"


def check_target(path: str | Path, suffix: str) -> Path:
    """The path of an output file, checked before any work is done, its suffix in small letters. RecipeError where it is
    a folder, does not end with `suffix`, or nothing can be written where it is to be."""
    path = Path(path)
    if path.is_dir():
        raise RecipeError(f"{path} is a folder; name a file to write, such as {path / 'name'}{suffix}.")
    if path.suffix.lower() != suffix:
        raise RecipeError(f"{path} does not end with {suffix}, which is what is written; name {path}{suffix}, say.")
    check_place(path.parent)
    return path.with_suffix(suffix)


def check_place(folder: Path) -> None:
    """RecipeError where nothing can be written into a folder, which need not exist."""
    around = next(one for one in (folder, *folder.parents) if one.exists())
    if not around.is_dir():
        raise RecipeError(f"Nothing can be written into {folder}: {around} is a file, not a folder. Name another one.")
    try:
        tempfile.TemporaryFile(dir=around).close()  # rights alone do not tell: root has them in /proc, too
    except OSError as error:
        raise RecipeError(f"Nothing can be written into {folder}: {error.strerror}. Name another one.") from error


@contextlib.contextmanager
def whole_file(path: Path, *, durable: bool = True) -> Iterator[Path]:
    """Gives a name to write to, in the folder of `path`, which is made; at the end the file is moved to `path`.

    After an error nothing is left of it, and `path` is what it was. The name is this call's own: of several processes
    that write one file the last one to end wins, whole.

    Args:
        durable: the file is on the disk before it is moved, so that after a loss of power `path` is the old one or the
            new one, never an empty one. It costs time, in vain for what can be had again."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f"{path.name}.{_mark()}.partial")
    try:
        with naming(path):
            yield partial
        if durable:
            with partial.open("rb") as file:
                os.fsync(file.fileno())
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


@contextlib.contextmanager
def naming(path: Path) -> Iterator[None]:
    """Inside the block an OSError that names no file names this one: that of a full disk does not, and libraries in
    other languages tell theirs as errors of their own ("os error 28")."""
    try:
        yield
    except OSError as error:
        if error.filename is None and error.errno is not None:
            error.filename = str(path)
        raise
    except Exception as error:
        if found := re.search(r"os error (\d+)|: (No space left on device|File too large)", str(error)):
            number = int(found[1]) if found[1] else {"No": errno.ENOSPC, "Fi": errno.EFBIG}[found[2][:2]]
            raise OSError(number, os.strerror(number), str(path)) from error
        raise


@contextlib.contextmanager
def whole_folder(path: Path, *, own: bool = False) -> Iterator[Path]:
    """Gives a new folder to fill, beside `path`, and renames it at the end; after an error nothing is left of it. Where
    another process came first, its folder stays; with `own` that is a RecipeError. What killed processes left beside it
    is removed."""
    path.parent.mkdir(parents=True, exist_ok=True)
    remove_left(path.parent, f"{BUILDING}*")
    work = path.parent / f"{BUILDING}{_mark()}"
    work.mkdir()
    try:
        with naming(path):
            yield work
        try:
            work.rename(path)
        except OSError:
            if not path.is_dir():
                raise
            if own:
                raise RecipeError(f"{path} was made by another process meanwhile. Name another folder.") from None
    finally:
        shutil.rmtree(work, ignore_errors=True)


def wait_for(path: Path) -> Path:
    """The path of a file or folder that another machine sees, once it is seen here, too: a network file system may take
    a while. FileNotFoundError with this machine's name after `SLOW_DISK`."""
    last = time.monotonic() + SLOW_DISK
    while not path.exists():
        if time.monotonic() > last:
            told = f"not seen on {socket.gethostname()} after {SLOW_DISK:.0f} s, though rank 0 has it: is it shared?"
            raise FileNotFoundError(errno.ENOENT, told, str(path))
        time.sleep(0.2)
    return path


def write_text(path: Path, text: str) -> None:
    """A text file in UTF-8, as `whole_file` writes."""
    with whole_file(path) as partial:
        partial.write_text(text, encoding="utf-8")


def write_json(path: Path, value: Any, indent: int | None = 2, end: str = "") -> None:
    """A JSON file, as `whole_file` writes."""
    write_text(path, json.dumps(value, indent=indent, ensure_ascii=False) + end)


def remove_left(folder: Path, pattern: str, seconds: float = LEFT) -> None:
    """Removes what nobody touched for so long; by default what killed processes left unfinished in a folder."""
    for left in folder.glob(pattern):
        with contextlib.suppress(FileNotFoundError):  # another process was first
            if time.time() - left.stat().st_mtime < seconds:
                continue
            if left.is_dir():
                shutil.rmtree(left, ignore_errors=True)
            else:
                left.unlink()


def _mark() -> str:
    """What no other process, thread or machine has in its names."""
    return f"{os.getpid()}-{secrets.token_hex(4)}"
