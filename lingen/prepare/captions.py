"""Captions of files to be packed: beside a file, or in a table that is joined by key; never by position. A list whose
lines have to match the order of files shifts all later captions as soon as one file is skipped; a file name is no
caption. So both are refused, and a source without a caption is dropped and counted."""

import csv
import io
import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, NoReturn

import pyarrow as pa
import pyarrow.parquet as pq

from lingen.data.captions import captions_of, clean_captions
from lingen.prepare.footage import CAPTIONS, MediaSource, extensions
from lingen.recipe.errors import RecipeError
from lingen.recipe.text import decode_json, read_text_file

DELIMITERS = ",;\t|"
"""What may stand between the columns of a CSV file."""


class Captions:
    """The captions of sources: those of a table where it has some, else those of a file's sidecar.

    The table is CSV, JSONL or Parquet with the columns ``key`` and ``caption`` (or ``captions``, lists), or a JSON
    object of key -> caption. A key is the path of a file below the folder that was named, with or without its
    extension. Several rows of a key are several captions. RecipeError for no such file, another format, or no column of
    keys or of captions."""

    def __init__(self, table: str | Path | None = None):
        self.table = Path(table) if table is not None else None
        self._listed: tuple[Path | None, dict[tuple[str, str], Path]] = (None, {})
        """The folder that was listed last, and its files of captions by stem and extension."""
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
        return captions_of({name: path.read_bytes() for name, path in self._beside(source.path).items()})

    def _beside(self, path: Path) -> dict[str, Path]:
        """``json`` and ``txt`` -> the files of captions beside a file, however their extensions are written."""
        if self._listed[0] != path.parent:
            try:
                names = sorted(os.listdir(path.parent), reverse=True)  # of a.TXT and a.txt the second one counts
            except FileNotFoundError:
                names = []
            endings = [(name, *os.path.splitext(name)) for name in names]
            files = {(stem, end.lower()): path.parent / name for name, stem, end in endings if end.lower() in CAPTIONS}
            self._listed = (path.parent, files)
        found = ((end[1:], self._listed[1].get((path.stem, end))) for end in CAPTIONS)
        return {name: file for name, file in found if file is not None and file.is_file()}

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
    readers = {".csv": _csv, ".tsv": _csv, ".jsonl": _jsonl, ".json": _json, ".parquet": _parquet}
    if not table.is_file():
        raise RecipeError(f"There is no table of captions '{table}'.")
    if table.suffix.lower() not in readers:
        _refuse(table)
    try:
        yield from readers[table.suffix.lower()](table)
    except (csv.Error, pa.ArrowException, OSError, UnicodeError) as error:
        raise RecipeError(f"'{table}' cannot be read: {error}.") from error


def _refuse(table: Path, columns: Iterable[Any] = ()) -> NoReturn:
    found = ", ".join(f"'{str(one)[:40]}'" for one in columns)
    raise RecipeError(
        f"'{table}' is no table of captions by key{f'; its columns are {found}' if found else ''}. A list that goes by "
        "position is refused, since one skipped file would shift all later captions. Give a .csv, .jsonl or .parquet "
        "file with the columns 'key' and 'caption', or a .json object of key -> caption."
    )


def _plain(key: Any) -> str:
    """A key with forward slashes and without the extension of a media file."""
    key = str(key).strip().replace("\\", "/").removeprefix("./")
    stem, dot, extension = key.rpartition(".")
    return stem if dot and f".{extension.lower()}" in extensions("video") | extensions("image") else key


def _pair(row: dict[Any, Any], where: str) -> tuple[Any, Any]:
    row = {str(name).strip().lower(): value for name, value in row.items()}
    caption = row.get("captions") or row.get("caption")
    if row.get("key") in (None, "") or ("caption" not in row and "captions" not in row):
        columns = ", ".join(f"'{name}'" for name in row if name != "none")
        raise RecipeError(f"{where}: a row needs 'key' and 'caption' (or 'captions', a list); it has {columns}.")
    return row["key"], caption


def _csv(table: Path) -> Iterator[tuple[Any, Any]]:
    text = read_text_file(table)
    first, _, rest = text.partition("\n")
    if first.lower().startswith("sep="):  # what Excel writes and reads, as if it were a row
        text, first = rest, rest.partition("\n")[0]
    headers = {mark: next(csv.reader([first], delimiter=mark), []) for mark in DELIMITERS}
    mark = max(headers, key=lambda one: (_has_key(headers[one]), len(headers[one])))
    if not _has_key(headers[mark]):
        _refuse(table, headers[mark])
    reader = csv.DictReader(io.StringIO(text), delimiter=mark)
    for row in reader:
        yield _pair(row, f"{table}:{reader.line_num}")


def _has_key(columns: Iterable[str]) -> bool:
    return "key" in [name.strip().lower() for name in columns]


def _jsonl(table: Path) -> Iterator[tuple[Any, Any]]:
    for number, line in enumerate(read_text_file(table).split("\n"), 1):
        if line.strip():
            row = _value(line, f"{table}:{number}")
            if not isinstance(row, dict):
                _refuse(table)
            yield _pair(row, f"{table}:{number}")


def _json(table: Path) -> Iterator[tuple[Any, Any]]:
    found = _value(read_text_file(table), str(table))
    if not isinstance(found, dict):
        _refuse(table)
    yield from found.items()


def _value(text: str, where: str) -> Any:
    try:
        return decode_json(text.encode())
    except ValueError as error:
        raise RecipeError(f"'{where}' cannot be read: {error}.") from error


def _parquet(table: Path) -> Iterator[tuple[Any, Any]]:
    file = pq.ParquetFile(table)
    columns = [name for name in ("key", "caption", "captions") if name in file.schema_arrow.names]
    if len(columns) < 2 or columns[0] != "key":
        _refuse(table, file.schema_arrow.names)
    rows = (row for batch in file.iter_batches(columns=columns) for row in batch.to_pylist())
    for number, row in enumerate(rows):
        yield _pair(row, f"{table}, row {number}")
