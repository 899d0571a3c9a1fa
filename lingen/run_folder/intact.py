"""The form of a checkpoint on the disk: whether one is whole, which is the newest whole one, and reading it.

A checkpoint is a folder of safetensors files and `ABOUT`, a JSON file with a hash of each of them and of itself."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import zipfile
import zlib
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from lingen.files import wait_for
from lingen.ranks.heartbeat import sign
from lingen.recipe.text import decode_json
from lingen.run_folder.folder import RunFolder, step_of
from lingen.run_folder.storage import CHUNK, Written, is_covered
from lingen.weights import STORED_TYPES

ABOUT = "checkpoint.json"
"""Holds what is no tensor, and where each row of each tensor is; written last."""
FORMAT = "lingen checkpoint 1"
_DTYPES = {name: getattr(torch, words.removeprefix("torch.")) for words, name in STORED_TYPES.items()}
THREADS = 8
"""Files that are hashed at once [ours]: about what a disk can read."""


class BrokenError(ValueError):
    """Why a checkpoint cannot be read, as the end of a sentence."""


class Checkpoint:
    """A checkpoint of this form: `state`, and rows of its tensors. BrokenError where its JSON file is none."""

    def __init__(self, path: Path):
        self.path, self.about = path, read_about(path)
        self.tensors, self.state = self.about["tensors"], self.about["state"]
        self._open: dict[str, Any] = {}

    def shape(self, name: str) -> torch.Size:
        """Of the whole tensor."""
        return torch.Size(self.tensors[name]["shape"])

    def dtype(self, name: str) -> torch.dtype:
        return _DTYPES[self.tensors[name]["dtype"]]

    def read(self, name: str, start: int = 0, stop: int | None = None) -> Tensor:
        """Rows of a tensor, on the CPU; all of them unless told."""
        about, shape = self.tensors[name], self.shape(name)
        if not shape:
            return self._file(about["pieces"][0][0]).get_tensor(name)
        stop = shape[0] if stop is None else stop
        found = torch.empty((stop - start, *shape[1:]), dtype=self.dtype(name))
        for file, first, end in about["pieces"]:
            low, high = max(start, first), min(stop, end)
            if low < high:
                found[low - start : high - start] = self._file(file).get_slice(name)[low - first : high - first]
        return found

    def _file(self, name: str) -> Any:
        if name not in self._open:
            self._open[name] = safe_open(str(self.path / name), "pt")
        return self._open[name]


def about_of(state: dict[str, Any], tensors: dict[str, Any], files: Sequence[Written]) -> bytes:
    """The JSON file of a checkpoint.

    Args:
        state: as `checkpoint.state_of` makes it.
        tensors: as `storage.describe_tensors` makes it; their pieces are filled in.
        files: what each rank wrote."""
    for one in files:
        for name, start, stop in one.pieces:
            tensors[name]["pieces"].append([one.file, start, stop])
    sums = {one.file: {"size": one.size, "sha256": one.sha256} for one in files}
    about = {"format": FORMAT, "state": state, "files": sums, "tensors": tensors}
    return json.dumps({"sha256": _hash_of(about), **about}, indent=1).encode()


def read_about(path: Path) -> dict[str, Any]:
    """What the JSON file of a checkpoint holds. BrokenError where it lacks something or was changed."""
    try:
        about = decode_json((path / ABOUT).read_bytes())
        form, told = about.get("format"), about.pop("sha256", None)
    except (FileNotFoundError, NotADirectoryError) as error:
        raise BrokenError(f"it has no {ABOUT}") from error
    except (ValueError, AttributeError) as error:
        raise BrokenError(f"its {ABOUT} is damaged ({error})") from error
    if form != FORMAT:
        raise BrokenError(f"its {ABOUT} is of another format")
    if told != _hash_of(about):
        raise BrokenError(f"its {ABOUT} was changed or damaged")
    return about  # type: ignore[no-any-return]


def _hash_of(about: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(about, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def wait_for_files(path: Path) -> Path:
    """The path of a checkpoint that rank 0 found whole, once this machine sees all of its files."""
    wait_for(path)
    if path.is_dir():
        wait_for(path / ABOUT)
        for name in read_about(path)["files"]:
            wait_for(path / name)
    return path


def newest_intact(folder: RunFolder, stage: str, every: int = 1) -> tuple[Path | None, list[str]]:
    """The newest checkpoint of a stage in which every byte is as it was written, None where there is none; and for
    people: what was passed over and why.

    All of its files are read. For one rank; the others are told. OSError where a file is there and may not be read.

    Args:
        every: only those of multiples of this step count."""
    lines = []
    for path in (path for path in reversed(folder.checkpoints(stage)) if step_of(path) % every == 0):
        try:
            check_intact(path)
        except BrokenError as error:
            lines.append(f"{path} is passed over: {error}")
            continue
        if lines:
            lines.append(f"stage {stage} goes on from step {step_of(path)} instead")
        return path, lines
    if lines:
        lines.append(f"stage {stage} has no whole checkpoint left, so it begins again")
    return None, lines


def check_intact(path: Path) -> None:
    """Reads a checkpoint to its end. BrokenError where something is missing, cut or changed."""
    if not path.is_dir():  # one file of the earlier form: a zip archive of torch's, with a checksum of each member
        try:
            with zipfile.ZipFile(path) as archive:
                broken = archive.testzip()
        except (zipfile.BadZipFile, zlib.error, EOFError, NotImplementedError) as error:
            raise BrokenError(f"it is cut off or empty ({path.stat().st_size:,} bytes)") from error
        if broken is not None:
            raise BrokenError(f"its part {broken} holds other bytes than were written")
        return
    about = read_about(path)
    lacking = [name for name, of in about["tensors"].items() if not is_covered(of)]
    if lacking:
        raise BrokenError(f"rows of {len(lacking)} tensors are missing (such as {lacking[0]})")
    files = [path / name for name in about["files"]]
    for file, of in zip(files, about["files"].values(), strict=True):
        if not file.is_file():
            raise BrokenError(f"{file.name} is missing")
        if (size := file.stat().st_size) != of["size"]:
            raise BrokenError(f"{file.name} has {size:,} bytes in place of {of['size']:,}")
    with ThreadPoolExecutor(THREADS) as pool:
        for file, found, of in zip(files, pool.map(_hash_file, files), about["files"].values(), strict=True):
            if found != of["sha256"]:
                raise BrokenError(f"{file.name} holds other bytes than were written")


def _hash_file(path: Path) -> str:
    digest, buffer = hashlib.sha256(), memoryview(bytearray(CHUNK))
    try:
        with path.open("rb", buffering=0) as file:
            while count := file.readinto(buffer):
                sign()
                digest.update(buffer[:count])
    except OSError as error:
        if error.errno != errno.EIO:
            raise
        return f"unreadable: {os.strerror(errno.EIO)}"
    return digest.hexdigest()
