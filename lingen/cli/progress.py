"""How the command line shows a run: a bar on a terminal, plain lines elsewhere."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from lingen.recipe.sections import Recipe
from lingen.training.reporter import LINE_SECONDS, LineReporter


def bar(console: Console) -> Progress:
    """lingen's progress bar; where there is no terminal, it shows nothing."""
    shown = console if console.is_terminal else Console(quiet=True)
    return Progress(
        TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TimeRemainingColumn(),
        TextColumn("{task.fields[note]}"), console=shown, disable=not console.is_terminal,
    )  # fmt: skip


@contextmanager
def count_progress(console: Console, description: str) -> Iterator[Callable[[int, int], None]]:
    """A bar to be called with (done, total); where there is no terminal, a line every `LINE_SECONDS`."""
    told = time.monotonic()
    with bar(console) as shown:
        task = shown.add_task(description, total=None, note="")

        def tell(done: int, total: int) -> None:
            nonlocal told
            shown.update(task, completed=done, total=total)
            if not console.is_terminal and time.monotonic() - told >= LINE_SECONDS:
                told = time.monotonic()
                console.print(f"{description} {done:,}/{total:,}", markup=False, highlight=False)

        yield tell


class ConsoleReporter(LineReporter):
    """Shows stages, steps and losses on a console: a terminal gets a bar, and anything else lines.

    Args:
        every: see `LineReporter`."""

    def __init__(self, console: Console, every: float = 5.0):
        super().__init__(partial(console.print, markup=False, highlight=False, soft_wrap=True), every)
        self._is_terminal, self._bar = console.is_terminal, bar(console)
        self._task: Any = None

    def __enter__(self) -> ConsoleReporter:
        self._bar.start()
        return self

    def __exit__(self, *error: Any) -> None:
        self._bar.stop()

    def stage(self, recipe: Recipe, number: int, count: int, done: int) -> None:
        super().stage(recipe, number, count, done)
        self._task = self._bar.add_task(str(recipe.stage), total=recipe.train.steps, completed=done, note="")

    def step(self, step: int) -> None:
        self._bar.update(self._task, completed=step)
        if not self._is_terminal:
            super().step(step)

    def row(self, row: dict[str, Any]) -> None:
        if not self._is_terminal:
            super().row(row)
        elif note := self.note_of(row):
            self._bar.update(self._task, note=note + self.left_of_run(int(row["step"])))
