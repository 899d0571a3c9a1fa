"""Making the index of some shards: from their manifests, or from the headers of the tar files.

From manifests it is made once, kept in lingen's cache folder and mapped into memory, so that a hundred million samples
take seconds to open and no memory of a process's own. Of local shards without a manifest the headers are read, each
time; then only the media themselves tell their size and length."""

import contextlib
import hashlib
import json
import os
from collections.abc import Callable, Iterable, Sequence
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from lingen.data import manifest
from lingen.data.batch import Drop
from lingen.data.fingerprint import content_of, hash_weights
from lingen.data.index import RECORD, Index, Mapped, short_names
from lingen.data.locations import Location
from lingen.data.remote import SourceError, is_remote
from lingen.data.shards import scan_shard
from lingen.data.sources import Reader
from lingen.files import cache_folder, remove_left, whole_folder
from lingen.recipe.errors import RecipeError

INDEX_FORMAT = 2
"""Raised whenever the files of an index change, so that an old one is not taken for a new one."""
ROWS_AT_ONCE = 1 << 20
"""Rows of a manifest that are taken at a time."""
UNUSED_DAYS = 30
"""An index that nobody opened for so long is deleted when another one is made."""
TAR_PIECES = 8
"""Pieces of a shard without a manifest that tell what it holds, beside its length."""
LOOKED_AT = 20_000
"""The most local shards whose length is checked when they are opened; among more, a cut shard shows only when read."""


class Set(NamedTuple):
    """Shards with one manifest."""

    folder: str
    path: Path
    """The manifest, a local file."""
    version: str
    """Changes when the manifest does."""
    shards: tuple[str, ...] | None
    """Names of the shards that are wanted; None: all."""


def open_index(locations: Sequence[str], kind: str, setting: str, reader: Reader) -> Index:
    """The index of some shards and manifests. RecipeError for a remote shard without a manifest, one that its manifest
    does not know, one of another kind, or some with and some without.

    Args:
        locations: as `expand` gives them. Shards that have a manifest beside them are looked up in it; local ones
            without one are scanned.
        kind: ``image`` or ``video``: which samples to take of a manifest that is named as a whole.
        setting: where the shards stand in the recipe, for messages."""
    sets, bare = _sort(locations, setting, reader)
    for shard in bare:
        if sets or is_remote(str(shard)):
            why = "as other shards here have one" if sets else "as it is not on a local disk"
            cure = "write it with `lingen data index` where the shards are."
            raise RecipeError(f"{setting}: {shard} needs a manifest, {why}; {cure}")
    if not sets:
        return scan_shards(bare)
    told = json.dumps([INDEX_FORMAT, kind, [(one.folder, one.version, one.shards) for one in sets]])
    mark = hashlib.sha256(told.encode()).hexdigest()[:16]
    return _open(kept_folder(mark, lambda work: _build(work, sets, kind, setting)))


def content_of_shards(locations: Sequence[str], setting: str, reader: Reader) -> str:
    """12 hex digits of what the shards hold, wherever they lie: of their manifests and the names that are wanted of
    them, or where there is none of the shards themselves. Arguments and errors as for `open_index`."""
    sets, bare = _sort(locations, setting, reader)
    told = [[content_of(one.path), one.shards] for one in sets]
    told += [[one.name, hash_weights(Path(str(one)), TAR_PIECES)] for one in bare if not is_remote(str(one))]
    return hashlib.blake2b(repr(told).encode(), digest_size=6).hexdigest()


def kept_folder(name: str, write: Callable[[Path], None]) -> Path:
    """A folder among the indexes in lingen's cache folder, written where it is missing, and marked as used."""
    folder = cache_folder() / "indexes" / name
    if not folder.is_dir():
        with whole_folder(folder) as work:
            write(work)
    with contextlib.suppress(OSError):  # of another user, it is no less readable
        os.utime(folder)  # so that it is not deleted
    return folder


def _sort(locations: Sequence[str], setting: str, reader: Reader) -> tuple[list[Set], list[Location]]:
    """The locations that have a manifest, by folder, and those that have none. RecipeError for those of a set that is
    not whole yet."""
    folders: dict[str, list[Location]] = {}
    for one in map(Location.of, locations):
        folders.setdefault(one.folder, []).append(one)
    sets: list[Set] = []
    bare: list[Location] = []
    for folder, named in folders.items():
        whole = [one for one in named if one.is_manifest]
        found = _fetch(whole[0] if whole else Location(folder, manifest.NAME), bool(whole), setting, reader)
        if found is None and manifest.is_unfinished(folder):
            raise RecipeError(f"{setting}: {manifest.without_manifest(folder)}")
        if found is None:
            bare += named
        else:
            sets.append(Set(folder, *found, None if whole else tuple(one.name for one in named)))
    return sets, bare


def _fetch(place: Location, needed: bool, setting: str, reader: Reader) -> tuple[Path, str] | None:
    """A manifest as a local file, and its version; None where there is none."""
    if not is_remote(str(place)):
        path = Path(str(place))
        if not path.is_file():
            return None
        return path.absolute(), f"{hash_weights(path)} {path.stat().st_mtime_ns}"
    try:
        size, version = reader.stat(str(place))
        spans = ((start, min(1 << 26, size - start)) for start in range(0, size, 1 << 26))
        content: Iterable[bytes | bytearray] = (reader.read(str(place), *span, version).data for span in spans)
        if not version:  # the server does not tell when the file changes: it is fetched each time
            whole = b"".join(content)
            content, version = [whole], hashlib.sha256(whole).hexdigest()
        name = hashlib.sha256(repr((str(place), size, version)).encode()).hexdigest()[:16]
        folder = cache_folder() / "manifests" / name
        if not folder.is_dir():
            with whole_folder(folder) as work, (work / manifest.NAME).open("wb") as file:
                file.writelines(content)
    except SourceError as error:
        if needed or not error.missing:
            raise RecipeError(f"{setting}: {error}") from error
        return None
    return folder / manifest.NAME, version


def _build(work: Path, sets: Sequence[Set], kind: str, setting: str) -> None:
    """Writes the files of an index: ``records``, ``keys`` and ``about.json``."""
    remove_left(work.parent, "*", UNUSED_DAYS * 86400)
    shards: dict[Location, int] = {}
    sources: dict[str, int] = {}
    ends = np.zeros(0, np.int64)
    kinds: set[str] = set()
    written = 0
    with (work / "records").open("wb") as records, (work / "keys").open("wb") as keys:
        for one in sets:
            before = len(shards)
            for batch in manifest.batches(one.path, ROWS_AT_ONCE):
                batch = _chosen(batch, one, kind, setting)
                kinds |= {"latents" if found == "latents" else "media" for found in batch["kind"].unique().to_pylist()}
                rows, text = _records(batch, one.folder, shards, sources)
                rows["key_at"] += written
                written += len(text)
                ends = np.pad(ends, (0, len(shards) - len(ends)))
                np.maximum.at(ends, rows["shard"], rows["offset"] + rows["length"])
                records.write(rows.tobytes())
                keys.write(text)
            if unknown := sorted(set(one.shards or ()) - {shard.name for shard in list(shards)[before:]}):
                more = f" and {len(unknown) - 1} more" if len(unknown) > 1 else ""
                cure = f"write it anew with {manifest.writer_of(one.folder, encoded='latents' in kinds)}."
                raise RecipeError(f"{setting}: {one.path} knows nothing of {unknown[0]}{more}; {cure}")
    if len(kinds) > 1:
        raise RecipeError(f"{setting}: some shards hold latents and some do not; name those of one sort.")
    version_of = {one.folder: one.version for one in sets}
    about = {
        "shards": list(shards), "ends": ends.tolist(), "sources": list(sources), "encoded": kinds == {"latents"},
        "versions": [version_of[shard.folder] for shard in shards],
        "abouts": [manifest.about(one.path) for one in sets],
    }  # fmt: skip
    (work / "about.json").write_text(json.dumps(about), encoding="utf-8")


def _chosen(batch: pa.RecordBatch, one: Set, kind: str, setting: str) -> pa.RecordBatch:
    """The rows of the shards and of the kind that are wanted."""
    if one.shards is not None:
        batch = batch.filter(pc.is_in(batch["shard"], pa.array(one.shards)))
    still = pc.equal(batch["frames"], 1)
    latents = pc.and_(pc.equal(batch["kind"], "latents"), still if kind == "image" else pc.invert(still))
    right = pc.or_(pc.equal(batch["kind"], kind), latents)
    if one.shards is not None and not pc.all(right).as_py() and len(batch):
        wrong = batch.filter(pc.invert(right)).slice(0, 1).to_pylist()[0]
        raise RecipeError(
            f"{setting}: {wrong['shard']} holds something else than {kind}s (by its manifest, {wrong['key']} is "
            f"{wrong['kind']} of {wrong['frames']} frames); name it where it belongs."
        )
    return batch.filter(right)


def _records(
    batch: pa.RecordBatch, folder: str, shards: dict[Location, int], sources: dict[str, int]
) -> tuple[np.ndarray, bytes]:
    """`RECORD` of the rows, and their keys, one behind the other; new shards and sources get the next numbers."""
    rows = np.zeros(len(batch), RECORD)
    for name in ("offset", "length", "frames", "fps", "height", "width"):
        rows[name] = batch[name].to_numpy()
    rows["shard"] = _numbered(batch["shard"], lambda name: shards.setdefault(Location(folder, name), len(shards)))
    rows["source"] = _numbered(batch["source"], lambda name: sources.setdefault(name or folder, len(sources)))
    if len(sources) > np.iinfo(RECORD["source"]).max:
        raise RecipeError(f"{folder}/{manifest.NAME} names more than 65,535 sources; name folders or sets, not files.")
    starts, text = _texts(batch["key"])
    rows["key_at"], rows["key_length"] = starts[:-1], np.minimum(np.diff(starts), np.iinfo(RECORD["key_length"]).max)
    starts, digits = _texts(batch["hash"])
    if (np.diff(starts) == 16).all():
        rows["hash"] = np.frombuffer(bytes.fromhex(digits.decode()), ">u8")
    return rows, text


def _numbered(column: pa.Array, number: Any) -> np.ndarray:
    """The number of each value; `number` is asked once for each different one."""
    encoded = column.dictionary_encode()
    return np.array([number(value) for value in encoded.dictionary.to_pylist()], np.int64)[encoded.indices.to_numpy()]


def _texts(column: pa.Array) -> tuple[np.ndarray, bytes]:
    """Offsets of the texts (and the end of the last one), and all texts joined, in UTF-8."""
    column = pa.concat_arrays([column])  # a slice begins at its own first byte
    _, offsets, text = column.buffers()
    starts = np.frombuffer(offsets, np.int32)[column.offset : column.offset + len(column) + 1].astype(np.int64)
    first, last = (int(starts[0]), int(starts[-1])) if len(column) else (0, 0)
    return starts - first, text.to_pybytes()[first:last] if text is not None else b""


def _open(folder: Path) -> Index:
    about = json.loads((folder / "about.json").read_text(encoding="utf-8"))
    shards = [Location(*one) for one in about["shards"]]
    return Index(
        shards, Mapped(folder / "records", RECORD), Mapped(folder / "keys", np.uint8), about["sources"],
        about["encoded"], [manifest.About(*one) for one in about["abouts"]], _cut(shards, about["ends"]),
        folder.name, about["versions"],
    )  # fmt: skip


def _cut(shards: Sequence[Location], ends: Sequence[int]) -> list[Drop]:
    """Local shards that are missing or end before their last sample does. Their samples stay in the order, which is the
    same on all ranks whatever each of them sees, and are replaced when they are read."""
    faults = []
    told = zip(shards, short_names(shards), ends, strict=True)
    for shard, name, end in islice((one for one in told if not is_remote(str(one[0]))), LOOKED_AT):
        try:
            size = os.stat(str(shard)).st_size
        except OSError as error:
            faults.append(Drop(name, f"unreadable shard: {error.strerror}"))
            continue
        if size == 0:
            faults.append(Drop(name, "empty shard: zero bytes"))
        elif size < end:
            faults.append(Drop(name, f"truncated shard: {size} bytes, its last sample ends at {end}"))
    return faults


def scan_shards(shards: Iterable[Location]) -> Index:
    """Reads the headers of local shards. One that is cut gives the samples before the cut, and a fault."""
    shards = list(shards)
    folders = list(dict.fromkeys(shard.folder for shard in shards))
    index = Index(shards, np.zeros(0, RECORD), np.zeros(0, np.uint8), folders)
    keys: list[bytes] = []
    places: list[tuple[int, int, int, int]] = []
    for number, (shard, name) in enumerate(zip(shards, index.names, strict=True)):
        try:
            for entry in scan_shard(Path(str(shard))):
                if entry.fault:
                    index.faults.append(Drop(f"{name}:{entry.key}" if entry.key else name, entry.fault))
                    continue
                places.append((number, folders.index(shard.folder), entry.start, entry.end - entry.start))
                keys.append(entry.key.encode(errors="replace"))
        except OSError as error:
            index.faults.append(Drop(name, f"unreadable shard: {error.strerror or error}"))
    records = np.zeros(len(keys), RECORD)
    records[["shard", "source", "offset", "length"]] = places
    records["key_length"] = [len(key) for key in keys]
    records["key_at"] = np.cumsum(records["key_length"].astype(np.int64)) - records["key_length"]
    return Index(shards, records, np.frombuffer(b"".join(keys), np.uint8), folders, faults=index.faults)
