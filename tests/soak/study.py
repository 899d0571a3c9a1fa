"""Do the intervals of a study's report cover? Votes of raters and prompts with effects of their own, many times."""

from __future__ import annotations

from collections import Counter

import numpy as np

from lingen.evaluation import study_report

DESIGNS = ((5, 40), (10, 30), (20, 20), (30, 60))
"""Raters, prompts; each rater votes once on each prompt."""


def outcomes_of(random: np.random.Generator, raters: int, prompts: int, spread: float, lead: float) -> np.ndarray:
    """[raters prompts] of 0 (win), 1 (tie), 2 (loss): a logistic taste with normal effects of raters and prompts."""
    taste = lead + spread * (random.normal(size=(raters, 1)) + random.normal(size=(1, prompts)))
    taste = taste + random.logistic(size=(raters, prompts))
    return np.where(taste > 0.5, 0, np.where(taste < -0.5, 2, 1))


def ballot_of(outcomes: np.ndarray) -> np.ndarray:
    rater, prompt = np.indices(outcomes.shape).reshape(2, -1)
    return np.stack([rater, prompt, prompt, 0 * prompt, outcomes.reshape(-1)], 1)


def coverage(seed: int, times: int, raters: int, prompts: int, spread: float, lead: float = 0.4) -> dict[str, float]:
    """Share of `times` studies whose intervals hold the truth, which is that of a thousand raters and prompts."""
    random = np.random.default_rng(seed)
    many = np.concatenate([outcomes_of(random, 1000, 1000, spread, lead).reshape(-1) for _ in range(20)])
    cells = np.bincount(many, minlength=3) / many.size
    truth = dict(zip(("win", "tie", "loss"), cells, strict=True)) | {"net": cells[0] - cells[2]}
    truth["strength"] = study_report.davidson(1e6 * cells[None], 2)[0, 0]
    hits: Counter[str] = Counter()
    for _ in range(times):
        ballot = ballot_of(outcomes_of(random, raters, prompts, spread, lead))
        row = study_report.preference_of(ballot, 0.1)
        values, half = study_report.strengths_of(ballot, 2)
        intervals = {name: row[name]["interval"] for name in ("win", "tie", "loss", "net")}
        intervals["strength"] = [values[0] - half[0], values[0] + half[0]]
        for name, (low, high) in intervals.items():
            hits[name] += bool(low <= truth[name] <= high)
    return {name: hits[name] / times for name in truth}
