"""The index: the place of every sample of a kind and its row in the manifest, for fast look-up."""

import mmap
import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from lingen.data.batch import Drop
from lingen.data.locations import Location
from lingen.data.manifest import About

RECORD = np.dtype([
    ("offset", "<i8"), ("length", "<i8"), ("key_at", "<i8"), ("hash", "<u8"), ("shard", "<u4"), ("frames", "<i4"),
    ("fps", "<f4"), ("height", "<i4"), ("width", "<i4"), ("key_length", "<u2"), ("source", "<u2"),
])  # fmt: skip
"""What is kept of a row of a manifest; `key_at` and `key_length` say where its key stands in the file of keys."""
FORGET = 512
"""Look-ups after which a process releases the pages of the mapped file that it touched."""


class Mapped:
    """A file of numbers, mapped into memory wherever it is used; in another process it is opened anew.

    Args:
        path: the file.
        dtype: of its numbers."""

    def __init__(self, path: Path, dtype: np.dtype | type):
        self.path = path
        self.dtype = np.dtype(dtype)
        self._lookups = 0

    def __len__(self) -> int:
        return len(self.array)

    def __getitem__(self, where: Any) -> Any:
        self._lookups += 1
        if self._lookups % FORGET == 0 and self._map is not None:
            self._map.madvise(mmap.MADV_DONTNEED)
        return self.array[where]

    def __reduce__(self) -> Any:
        return Mapped, (self.path, self.dtype)

    @cached_property
    def _map(self) -> mmap.mmap | None:
        with self.path.open("rb") as file:  # an empty file cannot be mapped
            empty = os.fstat(file.fileno()).st_size == 0
            return None if empty else mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)

    @cached_property
    def array(self) -> np.ndarray:
        """The whole array."""
        return np.frombuffer(self._map, self.dtype) if self._map is not None else np.empty(0, self.dtype)


Numbers = np.ndarray | Mapped


def short_names(shards: Sequence[Location]) -> list[str]:
    """Short, distinct names of different shards: paths below their common folder."""
    folders = [shard.folder.replace("://", "/").split("/") for shard in shards]
    common = os.path.commonprefix(folders)
    below = [folder[len(common) :] for folder in folders]
    return ["/".join([*folder, shard.name]) for folder, shard in zip(below, shards, strict=True)]


@dataclass(frozen=True)
class Index:
    """The samples of a kind, in the order of their shards."""

    shards: list[Location]
    records: Numbers
    """`RECORD` [samples]."""
    keys: Numbers
    """uint8: the keys of all samples in UTF-8, one behind the other."""
    sources: list[str]
    """The sources that `source` of a record numbers."""
    encoded: bool = False
    """Whether the samples are latents, not pixels."""
    abouts: list[About] = field(default_factory=list)
    """The description of each set from its manifest; empty without manifests."""
    faults: list[Drop] = field(default_factory=list)
    """Shards that are cut or unreadable, and samples that cannot be used because of it."""
    mark: str = ""
    """Hex digits that change whenever any sample does; empty where there is no manifest."""
    versions: list[str] = field(default_factory=list)
    """For each shard the version of its manifest, which changes when the manifest does; empty without manifests."""
    drawn: bool = False
    """Whether they are drawn when they are asked for, in any shape."""

    def __len__(self) -> int:
        return len(self.records)

    @cached_property
    def names(self) -> list[str]:
        """`short_names` of the shards."""
        return short_names(self.shards)

    def key(self, number: int) -> str:
        """Name of a sample in its shard."""
        record = self.records[number]
        start = int(record["key_at"])
        return bytes(self.keys[start : start + int(record["key_length"])]).decode(errors="replace")

    def source(self, number: int) -> str:
        """Where it came from."""
        return self.sources[self.records[number]["source"]]

    def where(self, number: int) -> str:
        """``shard:key``. What is drawn for a sample follows from it, so it stays what it is."""
        return f"{self.names[self.records[number]['shard']]}:{self.key(number)}"
