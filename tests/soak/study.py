"""Do the intervals of a study's report cover? Votes of raters and prompts with effects of their own, many times."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

import numpy as np

from lingen.evaluation import study_report

RATERS, PROMPTS = (5, 10, 20), (10, 20, 50)


class Taste(NamedTuple):
    """Votes of a logistic taste, whose standard deviation is 1.8."""

    effects: float = 1.0
    """Standard deviation of raters, and that of prompts."""
    lead: float = 0.4
    """Of the first side."""
    tie: float = 0.5
    """A taste that is nearer to 0 is a tie: some 20% of the votes at 0.5, 4% at 0.1, 43% at 1."""
    part: float = 1.0
    """Share of the prompts on which a rater votes."""


TASTES = {
    "weak effects": Taste(0.3), "weak, many ties": Taste(0.3, tie=1.0),
    "strong effects": Taste(), "strong, few ties": Taste(tie=0.1), "strong, half of the prompts": Taste(part=0.5),
    "strong, a clear lead": Taste(lead=2.0), "no effects": Taste(0.0),
}  # fmt: skip


def outcomes_of(random: np.random.Generator, raters: int, prompts: int, taste: Taste) -> np.ndarray:
    """[raters prompts] of 0 (win), 1 (tie), 2 (loss)."""
    effects = random.normal(size=(raters, 1)) + random.normal(size=(1, prompts))
    found = taste.lead + taste.effects * effects + random.logistic(size=(raters, prompts))
    return np.where(found > taste.tie, 0, np.where(found < -taste.tie, 2, 1))


def ballot_of(outcomes: np.ndarray) -> np.ndarray:
    rater, prompt = np.indices(outcomes.shape).reshape(2, -1)
    return np.stack([rater, prompt, prompt, 0 * prompt, outcomes.reshape(-1)], 1)


def truth_of(taste: Taste) -> dict[str, float]:
    """What all raters and prompts would say: the taste integrated over both effects (Gauss and Hermite)."""
    places, weights = np.polynomial.hermite_e.hermegauss(80)
    centre, weights = taste.lead + 2**0.5 * taste.effects * places, weights / weights.sum()
    win, loss = (float(weights @ (1 / (1 + np.exp(taste.tie - sign * centre)))) for sign in (1, -1))
    strength = study_report.davidson(1e6 * np.array([[win, 1 - win - loss, loss]]), 2)[0, 0]
    return {"win": win, "tie": 1 - win - loss, "loss": loss, "net": win - loss, "strength": float(strength)}


def coverage(seed: int, times: int, raters: int, prompts: int, taste: Taste) -> dict[str, float]:
    """Share of `times` studies whose intervals hold the truth."""
    random, truth, hits, ballots = np.random.default_rng(seed), truth_of(taste), Counter[str](), []
    for _ in range(times):
        ballot = ballot_of(outcomes_of(random, raters, prompts, taste))
        voted = random.random((raters, prompts)).argsort(1) < taste.part * prompts
        ballots.append(ballot[voted.reshape(-1)])
    counts = np.stack([np.bincount(ballot[:, study_report.VOTED], minlength=3) for ballot in ballots])
    nearby = counts[:, None] + study_report.STEP * np.eye(4, 3)
    strengths = study_report.davidson(nearby.reshape(-1, 3), 2).reshape(times, 4, 2)  # all at once, which is quick
    for ballot, near in zip(ballots, strengths, strict=True):
        row, half = (
            study_report.preference_of(ballot, 0.1),
            study_report.spread(ballot, 1, lambda _, near=near: near)[0],
        )
        intervals = {name: row[name]["interval"] for name in ("win", "tie", "loss", "net")}
        intervals["strength"] = [near[-1, 0] - half[0], near[-1, 0] + half[0]]
        for name, (low, high) in intervals.items():
            hits[name] += bool(low <= truth[name] <= high)
    return {name: hits[name] / times for name in truth}


def cells(seed: int, times: int, done: Iterable[dict[str, Any]] = ()) -> Iterator[dict[str, Any]]:
    """A row for each taste and design that is not `done`, each of random numbers of its own."""
    there = {(row["taste"], row["raters"], row["prompts"]) for row in done}
    asked = [(name, raters, prompts) for name in TASTES for raters in RATERS for prompts in PROMPTS]
    for number, (name, raters, prompts) in enumerate(asked):
        if (name, raters, prompts) in there:
            continue
        found = coverage(1000 * seed + number, times, raters, prompts, TASTES[name])
        yield {"taste": name, "raters": raters, "prompts": prompts, **found}
