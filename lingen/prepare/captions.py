"""Captions of files to be packed: beside a file, or in a table that is joined by key; never by position.

A list whose lines have to match the order of files shifts all later captions as soon as one file is skipped; a file
name is no caption. So both are refused, and a source without a caption is dropped and counted.
"""

import csv
import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from lingen.data.captions import captions_of, clean_captions
from lingen.prepare.footage import EXTENSIONS, MediaSource
from lingen.recipe.errors import RecipeError

MEDIA = frozenset(extension for extensions in EXTENSIONS.values() for extension in extensions)


class Captions:
    """The captions of sources: those of a table where it has some, else those of a file's sidecar.

    Args:
        table: CSV, JSONL or Parquet with the columns ``key`` and ``caption`` (or ``captions``, lists), or a JSON object
            of key -> caption. A key is the path of a file below the folder that was named, with or without its
            extension. Several rows of a key are several captions.
    Raises:
        RecipeError: no such file, another format, or no column of keys or of captions.
    """

    def __init__(self, table: str | Path | None = None):
        self.table = Path(table) if table is not None else None
        self._found: dict[str, list[Any]] = {}
        for key, caption in read_table(self.table) if self.table is not None else ():
            self._found.setdefault(_plain(key), []).extend(caption if isinstance(caption, list) else [caption])

    def of(self, source: MediaSource) -> list[str]:
        """At least one caption; errors as for `captions_of`."""
        if source.key in self._found:
            try:
                return clean_captions(self._found[source.key])
            except UnicodeError as error:
                raise ValueError("caption is not UTF-8") from error
        beside = {name: source.path.with_suffix(f".{name}") for name in ("json", "txt")}
        return captions_of({name: path.read_bytes() for name, path in beside.items() if path.is_file()})

    def unused(self, sources: Iterable[MediaSource]) -> list[str]:
        """Keys of the table that none of the sources has. RecipeError where that is all of them."""
        keys = {source.key for source in sources}
        left = [key for key in self._found if key not in keys]
        if left and len(left) == len(self._found):
            raise RecipeError(
                f"No key of {self.table} is that of a file: its keys look like '{left[0]}', those of the files like "
                f"'{min(keys)}' (the path below the folder that was named). Correct the column 'key'."
            )
        return left


def read_table(table: Path) -> Iterator[tuple[Any, Any]]:
    """(key, caption or list of captions) of each row; errors as for `Captions`."""
    readers = {".csv": _csv, ".jsonl": _jsonl, ".json": _json, ".parquet": _parquet}
    if not table.is_file():
        raise RecipeError(f"There is no table of captions '{table}'.")
    if table.suffix.lower() not in readers:
        raise _refused(table)
    try:
        yield from readers[table.suffix.lower()](table)
    except UnicodeDecodeError as error:
        raise RecipeError(f"'{table}' is not UTF-8 (byte {error.start}). Save it as UTF-8.") from error
    except (csv.Error, json.JSONDecodeError) as error:
        raise RecipeError(f"'{table}' cannot be read: {error}.") from error


def _refused(table: Path) -> RecipeError:
    return RecipeError(
        f"'{table}' is no table of captions by key. A list that goes by position is refused, since one skipped file "
        "would shift all later captions. Give a .csv, .jsonl or .parquet file with the columns 'key' and 'caption', or "
        "a .json object of key -> caption."
    )


def _plain(key: Any) -> str:
    """A key with forward slashes and without the extension of a media file."""
    key = str(key).strip().replace("\\", "/").removeprefix("./")
    stem, dot, extension = key.rpartition(".")
    return stem if dot and f".{extension.lower()}" in MEDIA else key


def _pair(row: dict[str, Any], where: str) -> tuple[Any, Any]:
    caption = row.get("captions") or row.get("caption")
    if row.get("key") in (None, "") or ("caption" not in row and "captions" not in row):
        columns = ", ".join(map(str, row))
        raise RecipeError(f"{where}: a row needs 'key' and 'caption' (or 'captions', a list); it has {columns}.")
    return row["key"], caption


def _csv(table: Path) -> Iterator[tuple[Any, Any]]:
    with table.open(encoding="utf-8-sig", newline="") as file:
        reader = csv.DictReader(file)
        if "key" not in (reader.fieldnames or ()):
            raise _refused(table)
        for row in reader:
            yield _pair(row, f"{table}:{reader.line_num}")


def _jsonl(table: Path) -> Iterator[tuple[Any, Any]]:
    with table.open(encoding="utf-8-sig") as file:
        for number, line in enumerate(file, 1):
            if line.strip():
                row = json.loads(line)
                if not isinstance(row, dict):
                    raise _refused(table)
                yield _pair(row, f"{table}:{number}")


def _json(table: Path) -> Iterator[tuple[Any, Any]]:
    found = json.loads(table.read_text(encoding="utf-8-sig"))
    if not isinstance(found, dict):
        raise _refused(table)
    yield from found.items()


def _parquet(table: Path) -> Iterator[tuple[Any, Any]]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        file = pq.ParquetFile(table)
    except pa.ArrowInvalid as error:
        raise RecipeError(f"'{table}' cannot be read: {error}.") from error
    columns = [name for name in ("key", "caption", "captions") if name in file.schema_arrow.names]
    if len(columns) < 2 or columns[0] != "key":
        raise _refused(table)
    for batch in file.iter_batches(columns=columns):
        for number, row in enumerate(batch.to_pylist()):
            yield _pair(row, f"{table}, row {number}")
