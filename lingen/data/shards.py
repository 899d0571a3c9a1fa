"""Tar files of samples: what is in one, taking a sample apart, writing them. Members that stand next to each other and
share the name up to its first dot are one sample (the convention of WebDataset). Headers alone tell where each sample
lies, so that any one is one contiguous read away, in any order."""

import contextlib
import io
import json
import re
import shlex
import tarfile
from collections.abc import Iterable, Iterator
from itertools import groupby
from operator import attrgetter
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple, cast

from lingen.files import whole_file

META = re.compile(r"__[^/]*__($|/)")
"""Members that webdataset does not take for samples."""
LARGEST_SHARD = 3_000_000_000
"""Bytes after which `write_shards` begins another shard, however few samples there are in it."""


def parse_sample(data: bytes | bytearray, key: str) -> dict[str, bytes]:
    """The members of the one sample in a piece of a tar file: extension in lower case -> content. ValueError: ``damaged
    sample`` (no tar, or another sample), ``cut off``, ``unsafe member``.

    Args:
        data: from its first header to the end of its last member's content.
        key: its name, as a manifest or `scan_shard` tells it."""
    from webdataset.tariterators import base_plus_ext

    members: dict[str, bytes] = {}
    try:
        with tarfile.open(fileobj=io.BytesIO(data), mode="r:") as tar:
            member = tar.next()
            while member is not None:
                found, suffix = base_plus_ext(member.name)
                if fault := _fault_of(member, len(data)):
                    raise ValueError(fault)
                if found != key or suffix.lower() in members:
                    raise ValueError(f"damaged sample: '{member.name}' stands in the place of '{key}'")
                content = memoryview(data)[member.offset_data : member.offset_data + member.size]
                # Arrays are large, and their readers accept any buffer: no copy.
                members[suffix.lower()] = cast(bytes, content) if suffix.endswith(".npy") else bytes(content)
                # The last member's padding is missing, and tarfile would complain about that.
                member = tar.next() if tar.offset < len(data) else None
            if tar.offset < len(data):
                raise ValueError(f"damaged sample: no tar header at byte {tar.offset} of {len(data)}")
    except tarfile.TarError as error:
        raise ValueError(f"damaged sample: {error}") from error
    return members


def read_sample(shard: BinaryIO, start: int, length: int, key: str) -> dict[str, bytes]:
    """`parse_sample` of a piece of an open shard."""
    shard.seek(start)
    return parse_sample(shard.read(length), key)


class ScannedSample(NamedTuple):
    """A sample in a shard, or, with an empty key, the shard itself."""

    key: str
    start: int = 0
    """First byte: a tar header."""
    end: int = 0
    """One past the last byte of the last member's content."""
    fault: str = ""
    """``reason: detail`` where it cannot be used."""
    suffixes: frozenset[str] = frozenset()
    """Extensions of its members, in lower case."""


def tar_files(folder: Path) -> list[Path]:
    """The tar files of a folder, sorted, however their extension is written."""
    return sorted(path for path in folder.glob("*") if path.suffix.lower() == ".tar")


def scan_shard(path: Path) -> Iterator[ScannedSample]:
    """The samples of a shard in order, each with its fault if it has one; last, with an empty key, the shard's own
    fault if it has one. tarfile and webdataset both end silently at a cut: here the archive must end in a block of
    zeros. OSError where the file cannot be read."""
    entries = list(_scan(path))
    places: dict[str, list[ScannedSample]] = {}
    for entry in entries:
        places.setdefault(entry.key, []).append(entry)
    suffixes = {key: [end for one in found for end in one.suffixes] for key, found in places.items()}
    # Entries of one key without a common extension are pieces of one sample, not several samples.
    apart = {key for key, ends in suffixes.items() if key and len(places[key]) > 1 and len({*ends}) == len(ends)}
    for entry in entries:
        if entry.key and entry is not places[entry.key][0]:
            entry = entry._replace(fault=entry.fault or "same key twice: in one shard")
        if entry.key not in apart:
            yield entry
    if apart:
        first, *_, last = places[next(key for key in places if key in apart)]
        one, other = (f"{entry.key}.{min(entry.suffixes)}" for entry in (first, last))
        name = shlex.quote(path.name)
        yield ScannedSample(
            "",
            fault=f"unsorted tar: the files of {len(apart)} samples do not stand beside each other, such as {one} and "
            f"{other}. Sort it: `mkdir sorted && tar -xf {name} -C sorted && tar --sort=name -cf {name} -C sorted .`",
        )


def _scan(path: Path) -> Iterator[ScannedSample]:
    """Members of one name beside each other as an entry; last, with an empty key, the shard's own fault."""
    size = path.stat().st_size
    if size == 0:
        yield ScannedSample("", fault="empty shard: zero bytes")
        return
    try:
        with path.open("rb") as file, tarfile.open(fileobj=file, mode="r:") as tar:
            for key, beside in groupby(_members(tar, size), attrgetter("key")):
                members = list(beside)
                fault = next((member.fault for member in members if member.fault), "")
                suffixes = frozenset().union(*(member.suffixes for member in members))
                yield ScannedSample(key, members[0].start, members[-1].end, fault, suffixes)
            file.seek(tar.offset)
            if file.read(tarfile.BLOCKSIZE) != bytes(tarfile.BLOCKSIZE):
                where = f"at byte {min(tar.offset, size)} of {size}"
                yield ScannedSample("", fault=f"truncated shard: no end-of-archive block {where}")
    except (tarfile.TarError, ValueError) as error:
        yield ScannedSample("", fault=f"not a tar: {error}")


def _members(tar: tarfile.TarFile, size: int) -> Iterator[ScannedSample]:
    """Each member that belongs to a sample, as an entry of its own."""
    from webdataset.tariterators import base_plus_ext

    while True:
        try:
            member = tar.next()
        except tarfile.ReadError:
            return  # the last member's data ends early; its sample reports that
        if member is None or member.size < 0:
            return
        tar.members = []  # type: ignore[attr-defined]  # tarfile would keep every header
        key, suffix = base_plus_ext(member.name)
        if key is None or member.isdir() or META.match(member.name):
            continue
        end, fault = member.offset_data + member.size, _fault_of(member, size)
        yield ScannedSample(key, member.offset, end, fault, frozenset([suffix.lower()]))


def _fault_of(member: tarfile.TarInfo, size: int) -> str:
    if not member.isreg():
        return f"unsafe member: {member.name} is a link or a device"
    if member.name.startswith("/") or ".." in member.name.split("/"):
        return f"unsafe member: {member.name} leaves the folder"
    if member.offset_data + member.size > size:
        return f"cut off: {member.name} ends after the end of the file"
    return ""


def read_shard(path: Path) -> Iterator[dict[str, Any]]:
    """The whole samples of a local shard in order: extension -> content, and the name under ``__key__``."""
    with path.open("rb") as file:
        for entry in scan_shard(path):
            if entry.key and not entry.fault:
                yield {"__key__": entry.key, **read_sample(file, entry.start, entry.end - entry.start, entry.key)}


def write_shards(samples: Iterable[dict[str, Any]], pattern: str, *, per_shard: int = 1000) -> list[Path]:
    """Writes samples to shards; the same samples give the same bytes. A shard gets its name when it is complete.
    ValueError for no samples.

    Args:
        samples: ``{"__key__": "000001", "mp4": bytes, "json": {"caption": "..."}}``; a member is bytes, a string, or a
            mapping (JSON).
        pattern: path of a shard with a place for its number, e.g. ``out/video-%05d.tar``.
        per_shard: samples in a shard.
    Returns:
        the shards written."""
    written: list[Path] = []
    tar, count = None, 0
    with contextlib.ExitStack() as shard:
        for sample in samples:
            if tar is None or count == per_shard or tar.tarstream.offset >= LARGEST_SHARD:
                shard.close()
                written.append(Path(pattern % len(written)))
                tar, count = open_shard(shard, written[-1]), 0
            tar.write({name: _encoded(name, value) for name, value in sample.items()})
            count += 1
    if not written:
        raise ValueError(f"There are no samples to write to {pattern}.")
    return written


def open_shard(opened: contextlib.ExitStack, path: Path) -> Any:
    """A `webdataset.TarWriter` whose shard gets its name when `opened` is closed, and is removed after an error."""
    from webdataset import TarWriter

    file = opened.enter_context(opened.enter_context(whole_file(path)).open("wb"))
    tar = TarWriter(file, encoder=False, mtime=0)
    # Else tarfile writes once more when it is collected, after a full disk ended it, and prints what happens then.
    opened.callback(setattr, tar.tarstream.fileobj, "closed", True)
    return opened.enter_context(tar)


def _encoded(name: str, value: Any) -> Any:
    if isinstance(value, dict):
        value = json.dumps(value, ensure_ascii=False, sort_keys=True)
    return value.encode() if isinstance(value, str) and name != "__key__" else value
