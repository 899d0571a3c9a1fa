"""What a run reports while it goes on, and how that reads as lines of text."""

import logging
import sys
import time
from collections.abc import Callable, Mapping
from typing import Any

from lingen.recipe.sections import Recipe
from lingen.tables import as_duration

LINE_SECONDS = 30.0
"""Seconds between lines that tell nothing but the step."""
log = logging.getLogger("lingen")


class Reporter:
    """Receives what a run reports; this base class ignores it."""

    flop: Mapping[str, float] = {}
    """Of each stage that is to be trained, in order, set before the first one; 0: not known."""

    def stage(self, recipe: Recipe, number: int, count: int, done: int) -> None:
        """Called when a stage starts, of which `done` steps are trained already."""

    def step(self, step: int) -> None:
        """Called after an optimiser step."""

    def row(self, row: dict[str, Any]) -> None:
        """Called with each row of metrics.csv."""

    def say(self, text: str) -> None:
        """Called with a line of text for the user."""


class LineReporter(Reporter):
    """Tells stages, steps and losses in lines of text.

    Args:
        write: takes a line.
        every: seconds from one line of a row of metrics.csv to the next, at least."""

    def __init__(self, write: Callable[[str], None], every: float = 5.0):
        self._write, self.every = write, every
        self._said = self._began = 0.0
        self._name, self._steps, self._done = "", 0, 0
        self._dropped = 0
        """Samples that were replaced since the stage began or went on."""
        self._later = 0.0
        """What later stages cost, in steps of this one; 0 where that is not known."""

    def say(self, text: str) -> None:
        self._write(text)

    def stage(self, recipe: Recipe, number: int, count: int, done: int) -> None:
        self._name, self._steps, self._done, self._dropped = str(recipe.stage), recipe.train.steps, done, 0
        names = list(self.flop)
        own, *later = [self.flop[one] for one in names[names.index(self._name) :]] if self._name in names else [0.0]
        self._later = self._steps * sum(later) / own if own and all(later) else 0.0
        self._began = time.monotonic()
        self._said = self._began - self.every
        going_on = f", going on from step {done}" if done else ""
        self.say(f"stage {number}/{count} {self._name}: {self._steps} steps{going_on}")

    def step(self, step: int) -> None:
        if time.monotonic() - self._said > LINE_SECONDS:
            self._line(step, "")

    def row(self, row: dict[str, Any]) -> None:
        note = self.note_of(row)
        if note and (int(row["step"]) >= self._steps or time.monotonic() - self._said > self.every):
            self._line(int(row["step"]), f"  {note}")

    def note_of(self, row: dict[str, Any]) -> str:
        """Loss and speed of a row of training, and what was dropped up to it; of other rows nothing."""
        if "loss" not in row:
            return ""
        self._dropped += int(row.get("data/dropped", 0))
        dropped = f"  {self._dropped:,} dropped" if self._dropped else ""
        return f"loss {row['loss']:.4f}  {row.get('tokens_per_second', 0):,.0f} tokens/s{dropped}"

    def left_of_run(self, step: int) -> str:
        """How long the run still takes, where stages follow."""
        return f", {self._time_of(self._steps - step + self._later, step)} of the run" if self._later else ""

    def _time_of(self, steps: float, step: int) -> str:
        return as_duration((time.monotonic() - self._began) / max(1, step - self._done) * steps)

    def _line(self, step: int, note: str) -> None:
        self._said = time.monotonic()
        left = f", {self._time_of(self._steps - step, step)} left{self.left_of_run(step)}" if step < self._steps else ""
        self.say(f"{self._name} {step}/{self._steps}{left}{note}")


def log_line(text: str) -> None:
    """A line as INFO of the logger "lingen", and on stderr where nobody has set logging up."""
    if log.hasHandlers():
        log.info(text)
    else:
        print(text, file=sys.stderr, flush=True)
