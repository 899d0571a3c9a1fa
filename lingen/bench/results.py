"""Result files: one form for all measurements, written row by row, so that a run that is cut loses nothing."""

from __future__ import annotations

import json
import logging
import os
import shlex
import sys
import time
from collections.abc import Callable, Iterator
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch

from lingen.files import write_json
from lingen.provenance import git_commit, versions
from lingen.recipe.registry import RecipeError

Row = dict[str, Any]
Say = Callable[[str], None]

FIRST = ("name", "mixer", "kernel", "dtype", "tokens", "ms", "gib", "tflop")
"""The fields that every measurement has where they mean something, in this order; others follow."""

GIB = 2**30


class Results:
    """A result file: device, versions, date, commit, command, what the measurement says about itself, rows.

    Args:
        path: of the JSON file; its folder is made.
        about: further fields of the head.
        device: what is measured.
        say: gets a line for each row.
        commit: where there is no checkout that could tell it.
    """

    def __init__(self, path: Path, about: Row, device: torch.device, say: Say, commit: str | None = None):
        self.path, self.say = path, say
        self.data: Row = {
            "device": device_name(device),
            "versions": versions() | ({"cuda": str(torch.version.cuda)} if device.type == "cuda" else {}),
            "date": time.strftime("%Y-%m-%d"),
            "commit": commit or git_commit(),
            "command": command_line(sys.argv),
            **about,
            "rows": [],
        }
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            if not os.access(path.parent, os.W_OK):
                raise PermissionError("the folder is not writable")
        except OSError as error:
            raise RecipeError(f"Results cannot be written to {path}: {error}. Choose another --out.") from error
        _listen().results = self

    def add(self, row: Row) -> Row:
        """Appends a row, fields that are None left out and numbers rounded to five digits, and writes the file."""
        kept = {key: _rounded(row[key]) for key in (*FIRST, *row) if row.get(key) is not None}
        self.data["rows"].append(kept)
        self.write()
        self.say(as_line(kept))
        return kept

    def write(self) -> None:
        """Replaces the file in one step."""
        write_json(self.path, self.data, indent=1, end="\n")


class _Twins(logging.Handler):
    """Hears which twin `kernel: auto` took, and notes it in the head of the result file."""

    results: Results | None = None

    def emit(self, record: logging.LogRecord) -> None:
        message = record.getMessage()
        if self.results is not None and "kernel=auto runs" in message and not message.endswith("meta"):
            operation, _, twin = message.partition(": kernel=auto runs ")
            self.results.data.setdefault("auto", {})[operation] = twin
            self.results.say(message)


@lru_cache
def _listen() -> _Twins:
    log, handler = logging.getLogger("lingen"), _Twins(logging.INFO)
    log.addHandler(handler)
    if not log.isEnabledFor(logging.INFO):
        log.setLevel(logging.INFO)
    return handler


def device_name(device: torch.device) -> str:
    """``NVIDIA H100 80GB HBM3``, or the CPU with the threads that torch uses."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    threads = torch.get_num_threads()
    return f"CPU, {threads} thread{'s' if threads > 1 else ''}"


def command_line(argv: list[str]) -> str:
    """The command without where its results went and which commit it was: those say nothing about the numbers."""
    words, skip = ["lingen"], False
    for word in argv[1:]:
        if skip or word in ("--out", "--commit"):
            skip = not skip
        elif not word.startswith(("--out=", "--commit=")):
            words.append(word)
    return shlex.join(words)


def as_line(row: Row) -> str:
    """A row as a line to read."""
    return "  ".join(f"{key}={value}" if key != "name" else str(value) for key, value in row.items())


def read_all(folder: Path) -> Iterator[tuple[str, Row]]:
    """(name of the file without its ending, what it holds) of every result file of a folder, by name."""
    for file in sorted(folder.glob("*.json")):
        yield file.stem, json.loads(file.read_text(encoding="utf-8"))


def _rounded(value: Any) -> Any:
    if isinstance(value, float):
        return float(f"{value:.5g}")
    if isinstance(value, dict):
        return {key: _rounded(item) for key, item in value.items()}
    return [_rounded(item) for item in value] if isinstance(value, list | tuple) else value
