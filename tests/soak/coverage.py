"""Do the intervals of `lingen eval` and of `lingen study report` hold their 95%, simulated so often that another way of
taking them would show? The tables of docs/evaluation.md and docs/study.md are wider and coarser."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from tests.soak import study
from tests.yardsticks.coverage import cases

BAR = (0.93, 0.97)
OTHERS = {
    ("share of 0.5", 12): (0.95, 0.99), ("share of 0.9", 12): (0.95, 0.99), ("share of 0.9", 40): (0.95, 0.98),
    ("kernel distance, equal", 12): (0.94, 0.98), ("kernel distance, 0.1 sd apart", 12): (0.94, 0.98),
}  # fmt: skip
"""Of cells that are too wide, as the page says."""
DESIGNS = (("strong effects", 20, 20), ("strong effects", 5, 20), ("weak effects", 20, 10))
"""Taste, raters and prompts of a study."""
MANY = 60
"""Prompts at most: cells of more take long."""
STUDIES = 4
"""A study takes as long as so many of the others."""


def covered(times: int) -> Iterator[tuple[str, int, float, int]]:
    """Interval, prompts, share that holds, of how many."""
    for number, (what, prompts, sort, case) in enumerate(cases()):
        if sort == "interval" and prompts <= MANY:
            rng = np.random.default_rng([26, number])
            yield what, prompts, sum(case(rng) for _ in range(times)) / times, times
    for number, (name, raters, prompts) in enumerate(DESIGNS):
        few = times // STUDIES
        found = study.coverage(26 + number, few, raters, prompts, study.TASTES[name])
        for what in ("win", "net", "strength"):
            yield f"{what} of a study, {name}, {raters} raters", prompts, found[what], few


def coverage(times: int) -> Iterator[str]:
    """A line for each, which begins with `failed` where the share is beyond its bar."""
    for what, prompts, share, of in covered(times):
        low, high = OTHERS.get((what, prompts), BAR)
        told = f"{what}, {prompts} prompts: {share:.1%} of {of}, {low:.1%} to {high:.1%} asked for"
        yield told if low <= share <= high else f"failed: {told}"
