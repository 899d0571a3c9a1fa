"""Result files: one format for all measurements, written row by row, so that an interrupted run loses nothing."""

import logging
import os
import shlex
import sys
import time
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch

from lingen.files import write_json
from lingen.provenance import git_commit, versions
from lingen.recipe.errors import RecipeError

from .place import device_name

Fields = dict[str, Any]
Say = Callable[[str], None]

FIRST = ("name", "mixer", "kernel", "dtype", "tokens", "ms", "gib", "tflop")
"""The fields that every measurement has where they mean something, in this order; others follow."""

GIB = 2**30


class Results:
    """A result file: device, versions, date, commit, command, further fields of the measurement, rows. RecipeError
    where it cannot be written.

    Args:
        path: of the JSON file; its folder is made.
        about: further fields of the head.
        say: gets a line for each row.
        commit: where there is no checkout that could tell it.
    """

    def __init__(self, path: Path, about: Fields, device: torch.device, say: Say, commit: str | None = None):
        self.path, self.say, self.device = path, say, device
        cuda = {"cuda": str(torch.version.cuda)} if device.type == "cuda" else {}
        self.rows: list[Fields] = []
        """Those that were added."""
        self.data: Fields = {"device": device_name(device), **head(cuda, commit), **about, "rows": self.rows}
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            if not os.access(path.parent, os.W_OK):
                raise PermissionError("the folder is not writable")
        except OSError as error:
            raise RecipeError(f"Results cannot be written to {path}: {error}. Choose another --out.") from error
        _twins().results = self

    def add(self, row: Fields) -> Fields:
        """Appends a row, fields that are None left out and numbers rounded to five digits, and writes the file."""
        kept = {key: _rounded(row[key]) for key in (*FIRST, *row) if row.get(key) is not None}
        self.rows.append(kept)
        self.write()
        self.say("  ".join(str(value) if key == "name" else f"{key}={value}" for key, value in kept.items()))
        return kept

    def write(self) -> None:
        """Replaces the file in one step."""
        write_json(self.path, self.data, indent=1, end="\n")


def head(more_versions: dict[str, str], commit: str | None = None, program: str = "lingen") -> Fields:
    """What every result file says of where its numbers come from.

    Args:
        program: that runs; ``python -m tests.soak``, say."""
    return {
        "versions": versions() | more_versions,
        "date": time.strftime("%Y-%m-%d"),
        "commit": commit or git_commit(),
        "command": command_line(sys.argv, program),
    }


def command_line(argv: list[str], program: str = "lingen") -> str:
    """The command without what does not affect the numbers: places of files, and --commit."""
    idle = ("--out", "--commit") if program == "lingen" else ("--json", "--keep")
    words, skip = program.split(), False
    for word in argv[1:]:
        if skip or word in idle:
            skip = not skip
        elif not word.startswith(tuple(f"{one}=" for one in idle)):
            words.append(word)
    return shlex.join(words)


class _Twins(logging.Handler):
    """Hears which twin `kernel: auto` took, and notes it in the head of the newest result file."""

    results: Results | None = None

    def emit(self, record: logging.LogRecord) -> None:
        operation, found, twin = record.getMessage().partition(": kernel=auto runs ")
        if self.results is not None and found and not twin.endswith("meta"):
            self.results.data.setdefault("auto", {})[operation] = twin
            self.results.say(record.getMessage())


@lru_cache
def _twins() -> _Twins:
    log, handler = logging.getLogger("lingen"), _Twins(logging.INFO)
    log.addHandler(handler)
    if not log.isEnabledFor(logging.INFO):
        log.setLevel(logging.INFO)
    return handler


def _rounded(value: Any) -> Any:
    if isinstance(value, float):
        return float(f"{value:.5g}")
    if isinstance(value, dict):
        return {key: _rounded(item) for key, item in value.items()}
    return [_rounded(item) for item in value] if isinstance(value, list | tuple) else value
