"""Rows of strings as the text of a table; values as words."""

import json
import math
from collections.abc import Iterable, Sequence
from typing import Any


def as_table(rows: Sequence[dict[str, str]], *, terminal: bool) -> str:
    """A table for a terminal; else columns without frames that no line break cuts."""
    from rich.box import SIMPLE_HEAD
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table(box=SIMPLE_HEAD if terminal else None, pad_edge=False, header_style="bold")
    for name in dict.fromkeys(name for row in rows for name in row):
        table.add_column(name, overflow="fold", no_wrap=not terminal)
    for row in rows:
        table.add_row(*(Text(row.get(str(column.header), "")) for column in table.columns))
    console = Console(width=None if terminal else 10_000, soft_wrap=not terminal, highlight=False)
    with console.capture() as captured:
        console.print(table)
    return "\n".join(line.rstrip() for line in captured.get().splitlines())


def as_cell(value: Any) -> str:
    """A setting's value in a cell: ``window=[8, 4, 4], ma=mamba2``."""
    if isinstance(value, dict):
        return ", ".join(f"{key}={as_cell(item)}" for key, item in value.items())
    if isinstance(value, Iterable) and not isinstance(value, str):
        return "[" + ", ".join(map(as_cell, value)) + "]"
    return str(value) if isinstance(value, str) else json.dumps(value)


def as_duration(seconds: float | None) -> str:
    """Minutes, hours or days, rounded up; of None ``unknown``."""
    if seconds is None:
        return "unknown"
    minutes = math.ceil(seconds / 60)
    hours, days = minutes // 60, minutes // 1440
    if days:
        return f"{days} d {hours % 24} h"
    return f"{hours} h {minutes % 60} min" if hours else f"{minutes} min"
