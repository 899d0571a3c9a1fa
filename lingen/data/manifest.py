"""The manifest of a set of shards: one Parquet file beside them, a row for every sample, in the order of the shards.
Whoever writes shards writes it (`lingen data pack`, `lingen encode`, `lingen data index`); the loader decides buckets
and finds samples by it and never opens a tar to learn what is in it. The format is ours."""

import hashlib
import json
import shlex
from collections.abc import Iterable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple, get_type_hints

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from lingen.files import whole_file
from lingen.recipe.errors import RecipeError
from lingen.recipe.text import decode_json

NAME = "manifest.parquet"
"""Its name in the folder of the shards."""
VERSION = 1
"""Format version; raised when an older reader could not use a new file."""
GROUP = 65536
"""Rows that are held in memory while a manifest is written, and in a row group."""


class Row(NamedTuple):
    """One sample. A 0 or an empty string says that something is not known; key, shard, offset and length always are."""

    key: str
    """Name of the sample in its shard: unique there, best in the whole set."""
    shard: str
    """File name of the shard, which lies in the manifest's folder."""
    offset: int
    """First byte of the sample in the shard, a tar header."""
    length: int
    """Bytes from there to the end of its last member's content: one read gives the whole sample, headers included."""
    kind: str
    """``image``, ``video`` or ``latents`` (made by `lingen encode`)."""
    height: int = 0
    """Pixels, as it is shown (upright, square pixels); of latents: of the clip that was encoded."""
    width: int = 0
    frames: int = 0
    """Frames of the video; 1 for an image; of latents: of the clip that was encoded."""
    fps: float = 0.0
    """Frames per second; 0 for an image."""
    captions: int = 0
    """How many captions it has."""
    caption_length: int = 0
    """Characters of the first one."""
    media: str = ""
    """Extension of the member that holds the pixels or latents, without a dot: ``mp4``, ``png``, ``latents.npy``."""
    hash: str = ""
    """`media_hash` of that member."""
    source: str = ""
    """Where it came from, for the ledger: few different values, such as the name of a folder or a data set."""


TYPES = {str: pa.string(), int: pa.int32(), float: pa.float32()}
WIDE = {"offset": pa.int64(), "length": pa.int64()}
SCHEMA = pa.schema(
    [pa.field(name, WIDE.get(name, TYPES[kind]), nullable=False) for name, kind in get_type_hints(Row).items()]
)


class About(NamedTuple):
    """What is true of the whole set."""

    fingerprint: str = ""
    """Hash of everything that the samples depend on: for encoded shards the encoders, their weights and settings."""
    settings: dict[str, Any] = {}
    """The same as plain values, for people."""
    version: int = VERSION


class ManifestError(RecipeError):
    """A manifest that cannot be used; the message names it and the cure."""


def without_manifest(folder: str | Path) -> str:
    """The sentence for a folder that has no manifest, with the cure."""
    if nothing := nothing_packed(Path(folder)):
        return nothing
    if is_unfinished(folder):
        return f"'{folder}' has no {NAME}, as not all parts of it have ended; start what makes it again, it goes on."
    return f"'{folder}' has no {NAME}; write it with {writer_of(folder)}."


def is_unfinished(folder: str | Path) -> bool:
    """Whether a command of lingen's began a set in this local folder and has not ended all of its parts."""
    return (Path(folder) / ".parts").is_dir() and not (Path(folder) / NAME).is_file()


def writer_of(folder: str | Path, *, encoded: bool = False) -> str:
    """The command that can write the manifest of a folder; that of a set also says what the set was made with."""
    if encoded or (Path(folder) / ".parts").is_dir():
        return "the command that made the set, such as `lingen encode`"
    return f"`lingen data index {shlex.quote(str(folder))}`"


def nothing_packed(folder: Path) -> str:
    """The sentence for a folder in which a command of lingen's began a set and wrote no shard; empty for others."""
    if not (folder / ".parts").is_dir() or any(folder.glob("*.tar")):
        return ""
    return f"'{folder}' holds no sample: nothing was packed there, or all was left out; its ledger.json says why."


def media_hash(content: bytes) -> str:
    """16 hex digits of BLAKE2b of a member's content."""
    return hashlib.blake2b(content, digest_size=8).hexdigest()


def write(path: Path, rows: Iterable[Row], about: About) -> int:
    """Writes a manifest that is there whole or not at all; returns the number of its rows.

    Args:
        path: usually ``FOLDER/manifest.parquet``.
        rows: in the order of the shards and of the samples in them; taken as they come, so there may be many millions.
        about: what holds for all of them."""
    remaining = iter(rows)
    groups = iter(lambda: list(islice(remaining, GROUP)), [])
    return write_batches(path, map(_columns, groups), about)


def _columns(rows: list[Row]) -> pa.RecordBatch:
    columns = zip(zip(*rows, strict=True), SCHEMA.types, strict=True)
    return pa.RecordBatch.from_arrays([pa.array(values, kind) for values, kind in columns], schema=SCHEMA)


def write_batches(path: Path, batches: Iterable[pa.RecordBatch], about: About) -> int:
    """`write` for rows that are columns already."""
    metadata = {"lingen": json.dumps(about._asdict(), ensure_ascii=False, sort_keys=True)}
    count = 0
    with (
        whole_file(path) as partial,
        pq.ParquetWriter(partial, SCHEMA.with_metadata(metadata), compression="zstd") as writer,
    ):
        for batch in batches:
            writer.write_batch(batch)
            count += len(batch)
    return count


def about(path: Path) -> About:
    """What a manifest says of the whole set. ManifestError where it is none of ours or of a later version."""
    _, stored = _open(path)
    return About(stored.get("fingerprint", ""), stored.get("settings", {}), stored.get("version", VERSION))


def batches(path: Path, size: int = GROUP) -> Iterator[pa.RecordBatch]:
    """The rows of a manifest as columns of `SCHEMA`, at most `size` at a time, in order."""
    try:
        for batch in _open(path)[0].iter_batches(size, columns=SCHEMA.names):
            batch = batch.cast(SCHEMA)
            _check_values(path, batch)
            yield batch
    except (pa.ArrowException, OSError, UnicodeError) as error:
        raise _damaged(path, error) from error


def _check_values(path: Path, batch: pa.RecordBatch) -> None:
    """ManifestError for shards elsewhere than beside the manifest, and numbers that can be no size or place."""
    shards = batch["shard"].unique().to_pylist()
    wrong = [f"shard {name!r}"[:80] for name in shards if name in ("", ".", "..") or "/" in name or "\0" in name]
    for name, kind in zip(SCHEMA.names, SCHEMA.types, strict=True):
        if kind != pa.string() and len(batch) and not pc.all(pc.greater_equal(batch[name], 0)).as_py():
            wrong.append(f"a {name} below 0")
    if wrong:
        raise ManifestError(f"{path} is wrong: it names {wrong[0]}. Write it anew with {writer_of(path.parent)}.")


def rows(path: Path) -> Iterator[Row]:
    """The rows of a manifest, one by one: for thousands of rows, not for millions."""
    for batch in batches(path):
        yield from (Row(*values) for values in zip(*(column.to_pylist() for column in batch.columns), strict=True))


def _open(path: Path) -> tuple[pq.ParquetFile, dict[str, Any]]:
    """The file, and what is stored beside its rows; empty where it is nothing of ours."""
    if not path.is_file():
        raise ManifestError(without_manifest(path.parent))
    try:
        file = pq.ParquetFile(path, memory_map=True)
        stored, names = decode_json((file.schema_arrow.metadata or {}).get(b"lingen", b"{}")), file.schema_arrow.names
        if not isinstance(stored, dict) or not isinstance(stored.get("settings", {}), dict):
            raise ValueError("what it says of the whole set is no mapping")
    except (pa.ArrowException, OSError, ValueError) as error:
        raise _damaged(path, error) from error
    version = stored.get("version", 0)
    missing = [name for name in SCHEMA.names if name not in names]
    if not version or missing or not isinstance(version, int):
        raise ManifestError(f"{path} is no manifest of lingen's ({', '.join(missing) or 'no version'}).")
    if version > VERSION:
        raise ManifestError(f"{path} is of version {version}, this lingen reads up to {VERSION}; install a newer one.")
    return file, stored


def _damaged(path: Path, error: Exception) -> ManifestError:
    said = " ".join(str(error).split())
    return ManifestError(f"{path} is no manifest: {said}. Write it anew with {writer_of(path.parent)}.")
