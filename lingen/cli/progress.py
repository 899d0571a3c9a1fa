"""How the command line shows a run: a bar on a terminal, plain lines elsewhere."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from lingen.recipe.sections import Recipe
from lingen.run import Reporter
from lingen.tables import as_duration

LINE_SECONDS = 30.0
"""Seconds between progress lines in the log of a job."""


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


class ConsoleReporter(Reporter):
    """Shows stages, steps and losses on a console.

    Args:
        console: where to; one that is no terminal gets a line for a row of metrics.csv, at most one in `every` seconds.
    """

    def __init__(self, console: Console, every: float = 5.0):
        self.console = console
        self.every = every
        self._bar = bar(console)
        self._task: Any = None
        self._said = self._began = 0.0
        self._name, self._steps, self._done = "", 0, 0
        self._dropped = 0
        """Samples that were replaced since the stage began or went on."""

    def __enter__(self) -> ConsoleReporter:
        self._bar.start()
        return self

    def __exit__(self, *error: Any) -> None:
        self._bar.stop()

    def say(self, text: str) -> None:
        self.console.print(text, markup=False, highlight=False, soft_wrap=True)

    def stage(self, recipe: Recipe, number: int, count: int, done: int) -> None:
        self._name, self._steps, self._done, self._dropped = str(recipe.stage), recipe.train.steps, done, 0
        self._began = time.monotonic()
        self._said = self._began - self.every
        going_on = f", going on from step {done}" if done else ""
        self.say(f"stage {number}/{count} {self._name}: {self._steps} steps{going_on}")
        self._task = self._bar.add_task(self._name, total=self._steps, completed=done, note="")

    def step(self, step: int) -> None:
        self._bar.update(self._task, completed=step)
        if not self.console.is_terminal and time.monotonic() - self._said > LINE_SECONDS:
            self._line(step, "")

    def row(self, row: dict[str, Any]) -> None:
        if "loss" not in row:
            return
        self._dropped += int(row.get("data/dropped", 0))
        dropped = f"  {self._dropped:,} dropped" if self._dropped else ""
        note = f"loss {row['loss']:.4f}  {row.get('tokens_per_second', 0):,.0f} tokens/s{dropped}"
        last = int(row["step"]) >= self._steps
        self._bar.update(self._task, note=note)
        if not self.console.is_terminal and (last or time.monotonic() - self._said > self.every):
            self._line(int(row["step"]), f"  {note}")

    def _line(self, step: int, note: str) -> None:
        self._said = time.monotonic()
        pace = (self._said - self._began) / max(1, step - self._done)
        left = f", {as_duration(pace * (self._steps - step))} left" if step < self._steps else ""
        self.say(f"{self._name} {step}/{self._steps}{left}{note}")
