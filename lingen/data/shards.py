"""WebDataset shards: finding them, knowing what is in them without reading it, reading one sample, writing them.

A shard is a tar file; members that stand next to each other and share the name up to its first dot are one sample.
Only tar headers are read in advance, so that any sample is one contiguous read away, in any order.
"""

from __future__ import annotations

import io
import itertools
import json
import os
import re
import tarfile
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from glob import glob, has_magic
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from lingen.data.batch import Drop
from lingen.registry import RecipeError

FAULTS = ("empty shard", "not a tar", "unreadable shard", "truncated shard", "cut off", "unsafe member")
"""What can be wrong with a shard or a sample when shards are opened; such samples never enter the order."""

META = re.compile(r"__[^/]*__($|/)")
"""Members that webdataset does not take for samples."""


def expand(patterns: str | list[str] | None, setting: str) -> list[Path]:
    """Files that a recipe's shards stand for, sorted, each once.

    Args:
        patterns: a path, a glob, a brace pattern (``clips-{000..127}.tar``), or a list of them.
        setting: where it stands in the recipe, for messages, e.g. ``data.shards.video``.
    Raises:
        RecipeError: a pattern that matches nothing, a missing file, or a folder.
    """
    listed = [patterns] if isinstance(patterns, str) else patterns or []
    return sorted({file for pattern in listed for file in _expand_one(pattern, setting)})


def _expand_one(pattern: str, setting: str) -> list[Path]:
    import braceexpand

    if "://" in pattern or pattern.startswith("pipe:"):
        raise RecipeError(
            f"{setting}: '{pattern}' is not a local file; copy the shards to a local disk and name them there."
        )
    try:
        names = [os.path.expanduser(name) for name in braceexpand.braceexpand(pattern)]
    except ValueError as error:
        raise RecipeError(
            f"{setting}: '{pattern}' has unbalanced braces; write e.g. 'clips-{{000..127}}.tar'."
        ) from error
    found = [match for name in names for match in (glob(name, recursive=True) if has_magic(name) else [name])]
    if not found:
        raise RecipeError(
            f"{setting}: no file matches '{pattern}'; correct the pattern, or the folder that lingen is started in. "
            "(`lingen data fetch emoji` and `lingen data fetch footage` make data/emoji and data/footage.)"
        )
    for name in found:
        if os.path.isdir(name):
            raise RecipeError(f"{setting}: '{name}' is a folder; name the tar files in it: '{Path(name) / '*.tar'}'.")
        if not os.path.isfile(name):
            raise RecipeError(
                f"{setting}: there is no file '{name}'; correct the path, or the folder that lingen is started in."
            )
    return [Path(name) for name in found]


@dataclass(frozen=True)
class ShardIndex:
    """Where every whole sample of a list of shards lies: 20 bytes and a key each."""

    paths: list[Path]
    names: list[str]
    """Short, distinct names of the shards: paths below their common folder."""
    shard: np.ndarray
    """int32 [samples]: which of `paths`."""
    offset: np.ndarray
    """int64 [samples]: first byte."""
    length: np.ndarray
    """int64 [samples]: bytes up to the end of the last member's content, tar headers included."""
    keys: np.ndarray
    """bytes [samples], UTF-8."""
    faults: list[Drop]
    """Shards that are cut or unreadable, and samples that cannot be used because of it."""

    def __len__(self) -> int:
        return len(self.shard)

    def where(self, number: int) -> str:
        """``shard:key``."""
        return f"{self.names[self.shard[number]]}:{self.keys[number].decode(errors='replace')}"

    def read(self, number: int) -> dict[str, bytes]:
        """The members of a sample: extension in lower case -> content. OSError or ValueError if it cannot be read."""
        with self.paths[self.shard[number]].open("rb") as file:
            file.seek(int(self.offset[number]))
            data = file.read(int(self.length[number]))
        if len(data) < self.length[number]:
            raise ValueError("damaged sample: the shard has become shorter since it was opened")
        return parse(data)


def parse(data: bytes) -> dict[str, bytes]:
    """The one sample in a piece of a tar file, taken apart by webdataset. ValueError where it is damaged."""
    from webdataset.tariterators import group_by_keys, tar_file_expander

    padded = data + bytes(-len(data) % tarfile.BLOCKSIZE)  # a shard may be cut right after the last member's content
    try:
        files = tar_file_expander([{"url": "", "stream": io.BytesIO(padded)}], eof_value=None)
        samples = list(group_by_keys(files))
    except (ValueError, tarfile.TarError) as error:
        raise ValueError(f"damaged sample: {str(error.args[0]).partition(' @ ')[0]}") from error
    if len(samples) != 1:
        raise ValueError("damaged sample: the shard has changed since it was opened")
    (sample,) = samples
    return {suffix: content for suffix, content in sample.items() if not suffix.startswith("__")}


def index(paths: Iterable[Path]) -> ShardIndex:
    """Reads the headers of all shards. A shard that is cut gives the samples before the cut, and a fault."""
    paths = list(paths)
    common = os.path.commonpath([path.absolute().parent for path in paths]) if paths else ""
    names = [path.absolute().relative_to(common).as_posix() for path in paths]
    rows: list[tuple[int, int, int]] = []
    keys: list[bytes] = []
    faults: list[Drop] = []
    for number, (path, name) in enumerate(zip(paths, names, strict=True)):
        try:
            for entry in _entries(path):
                where = f"{name}:{entry.key}" if entry.key else name
                if entry.fault:
                    faults.append(Drop(where, entry.fault))
                else:
                    rows.append((number, entry.start, entry.end - entry.start))
                    keys.append(entry.key.encode(errors="replace"))
        except OSError as error:
            faults.append(Drop(name, f"unreadable shard: {error.strerror or error}"))
    table = np.array(rows, np.int64).reshape(-1, 3)
    return ShardIndex(
        paths, names, table[:, 0].astype(np.int32), table[:, 1], table[:, 2], np.array(keys, bytes), faults
    )


class _Entry(NamedTuple):
    key: str
    start: int = 0
    end: int = 0
    fault: str = ""


def _entries(path: Path) -> Iterator[_Entry]:
    """The samples of a shard in order, whole or with what is wrong with them; last, with an empty key, what is wrong
    with the shard. tarfile and webdataset both end silently at a cut: here the archive must end in a block of zeros."""
    size = path.stat().st_size
    if size == 0:
        yield _Entry("", fault="empty shard: zero bytes")
        return
    sample: _Entry | None = None
    try:
        with path.open("rb") as file, tarfile.open(fileobj=file, mode="r:") as tar:
            for member in _members(tar, size):
                if sample is not None and sample.key != member.key:
                    yield sample
                    sample = None
                sample = (
                    member if sample is None else sample._replace(end=member.end, fault=sample.fault or member.fault)
                )
            if sample is not None:
                yield sample
            file.seek(tar.offset)
            if file.read(tarfile.BLOCKSIZE) != bytes(tarfile.BLOCKSIZE):
                yield _Entry(
                    "", fault=f"truncated shard: no end-of-archive block at byte {min(tar.offset, size)} of {size}"
                )
    except (tarfile.TarError, ValueError) as error:
        yield _Entry("", fault=f"not a tar: {error}")


def _members(tar: tarfile.TarFile, size: int) -> Iterator[_Entry]:
    """Each member that belongs to a sample, as an entry of its own."""
    from webdataset.tariterators import base_plus_ext

    while True:
        try:
            member = tar.next()
        except tarfile.ReadError:
            return  # the last member's data ends early, which its own fault says
        if member is None or member.size < 0:
            return
        tar.members = []  # type: ignore[attr-defined]  # tarfile would keep every header
        key, _ = base_plus_ext(member.name)
        if key is None or member.isdir() or META.match(member.name):
            continue
        yield _Entry(key, member.offset, member.offset_data + member.size, _fault_of(member, size))


def _fault_of(member: tarfile.TarInfo, size: int) -> str:
    if not member.isreg():
        return f"unsafe member: {member.name} is a link or a device"
    if member.name.startswith("/") or ".." in member.name.split("/"):
        return f"unsafe member: {member.name} leaves the folder"
    if member.offset_data + member.size > size:
        return f"cut off: {member.name} ends after the end of the file"
    return ""


def write_shards(samples: Iterable[dict[str, Any]], pattern: str, *, per_shard: int = 1000) -> list[Path]:
    """Writes samples to shards; the same samples give the same bytes. A shard gets its name when it is complete.

    Args:
        samples: ``{"__key__": "000001", "mp4": bytes, "json": {"caption": "..."}}``; a member is bytes, a string, or a
            mapping (JSON).
        pattern: path of a shard with a place for its number, e.g. ``out/video-%05d.tar``.
        per_shard: samples in a shard.
    Returns:
        the shards written.
    Raises:
        ValueError: no samples.
    """
    from webdataset import ShardWriter

    Path(pattern).parent.mkdir(parents=True, exist_ok=True)
    written: list[Path] = []

    def finish(partial: str) -> None:
        written.append(Path(partial.removesuffix(".partial")))
        os.replace(partial, written[-1])

    remaining = iter(samples)
    first = next(remaining, None)
    if first is None:
        raise ValueError(f"There are no samples to write to {pattern}.")
    writer = ShardWriter(f"{pattern}.partial", maxcount=per_shard, post=finish, verbose=0, encoder=False, mtime=0)
    for sample in itertools.chain([first], remaining):
        writer.write({name: _encoded(name, value) for name, value in sample.items()})
    writer.close()  # not in a `with`: after an error the last shard stays partial
    return written


def _encoded(name: str, value: Any) -> Any:
    if isinstance(value, dict):
        value = json.dumps(value, ensure_ascii=False, sort_keys=True)
    return value.encode() if isinstance(value, str) and name != "__key__" else value
