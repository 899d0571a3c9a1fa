"""A table as a line of columns: what its rows are, and which cells each row gets."""

from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, NamedTuple

from .results import Fields

Files = Mapping[str, Fields]
"""Name of a result file -> what it holds."""
Lines = list[list[str]]
"""Rows of cells, the head first."""


class Table(NamedTuple):
    """Which rows of the result files, and which columns. ``tokens | GiB=gib | share=share:.1%``: a field that is its
    own heading; heading and field; with a form (`as_text`)."""

    rows: Callable[[Files], Iterable[Fields]]
    columns: str
    computed: Mapping[str, Callable[[Fields], object]] = {}
    """Fields that a row does not hold, but that are made of others."""

    def lines(self, files: Files) -> Lines:
        """The head, and a line for each row."""
        columns = [one.strip().partition("=") for one in self.columns.split("|")]
        body = [[self._cell(row, field or heading) for heading, _, field in columns] for row in self.rows(files)]
        return [[heading for heading, _, _ in columns], *body]

    def _cell(self, row: Fields, cell: str) -> str:
        field, _, form = cell.partition(":")
        return as_text(self.computed.get(field, lambda row: row.get(field))(row), form)


def named(name: str) -> Callable[[Files], Iterator[Fields]]:
    """The rows of that name, each with its file's."""
    return lambda files: (row for row in every(files) if row["name"] == name)


def every(files: Files) -> Iterator[Fields]:
    """All rows, each with the name of its file."""
    return ({**row, "file": name} for name, file in files.items() for row in file.get("rows", []))


def row_of(result: Fields, **fields: Any) -> Fields:
    """The last row of a result file with these fields, or an empty one."""
    rows = reversed(result.get("rows", []))
    return next((row for row in rows if all(row.get(key) == value for key, value in fields.items())), {})


def ratio(above: float | None, below: float | None) -> float | None:
    """above / below where both are known."""
    return above / below if above and below else None


def as_text(value: Any, form: str = "") -> str:
    """Three digits of a number, or in another form; a size as 512x512; an exponent with its interval; nothing for
    None."""
    if value is None or isinstance(value, str):
        return value or ""
    if isinstance(value, Mapping):
        return f"{value['exponent']:.2f} ({value['low']:.2f} to {value['high']:.2f})"
    if isinstance(value, list | tuple):
        return "x".join(map(str, value))
    return format(value, form) if form else f"{value:,.0f}" if value >= 1000 else f"{value:.3g}"


def source(file: Fields) -> str:
    """Where a file's numbers come from: device, date, commit and command."""
    commit = f"commit {file['commit'][:12]}, " if file.get("commit") else ""
    return f"{file['device']}, {file['date']}, {commit}`{file['command']}`"


def as_markdown(lines: Lines) -> str:
    """Rows of cells, the head first, as a table."""
    head, *rest = [f"| {' | '.join(line)} |" for line in lines]
    return "\n".join([head, "|" + " --- |" * len(lines[0]), *rest])
