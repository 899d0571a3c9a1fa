"""Do the intervals, floors and tests of `lingen eval` hold what they promise? By simulation: clips of prompts with
effects of their own, many times over, with a truth that is known."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

from lingen.data.batch import Progress
from lingen.evaluation.statistics import (
    FeatureSet,
    KernelDistance,
    kernel_floor,
    mean_interval,
    paired_kernel_p,
    paired_p,
)
from lingen.metrics.shapes import wilson

CLIPS = 3
"""Of each prompt, in means and shares."""
WIDTH = 6
"""Of simulated features."""
MANY = 4000
"""Samples a side that stand for the true distance."""


def normal_mean(rng: np.random.Generator, prompts: int) -> bool:
    """Of normal clips with normal effects of prompts."""
    return _holds(rng.normal(size=prompts), rng.normal(size=(prompts, CLIPS)), 0.0)


def skewed_mean(rng: np.random.Generator, prompts: int) -> bool:
    """Of log-normal effects: few prompts with large values, as motion has."""
    return _holds(np.exp(rng.normal(size=prompts)), rng.normal(size=(prompts, CLIPS)), float(np.exp(0.5)))


def _holds(effects: np.ndarray, noise: np.ndarray, truth: float) -> bool:
    values = (effects[:, None] + noise).reshape(-1)
    low, high = mean_interval(values.tolist(), np.repeat(range(len(effects)), CLIPS).tolist()) or (0, 0)
    return low <= truth <= high


def share(rng: np.random.Generator, prompts: int, truth: float) -> bool:
    """Of clips that are right with a probability that differs from prompt to prompt (beta, a + b = 2)."""
    right = rng.random((prompts, CLIPS)) < rng.beta(2 * truth, 2 * (1 - truth), (prompts, 1))
    of = np.repeat(range(prompts), CLIPS).tolist()
    low, high = mean_interval(right.reshape(-1).astype(float).tolist(), of) or (0, 0)
    return low <= truth <= high


def side(rng: np.random.Generator, prompts: int, shift: float) -> FeatureSet:
    return FeatureSet(rng.normal(size=(prompts, WIDTH)) + shift, list(range(prompts)))


def distance(rng: np.random.Generator, prompts: int, shift: float, truth: float) -> bool:
    """The kernel distance of two sets whose means differ by `shift` in each of six features."""
    low, high = KernelDistance(side(rng, prompts, 0), side(rng, prompts, shift)).interval() or (0, 0)
    return low <= truth <= high


def true_distance(shift: float) -> float:
    """Of ten times two sets of 4,000, without an error that matters here."""
    rng = np.random.default_rng(1)
    found = [KernelDistance(side(rng, MANY // 4, 0), side(rng, MANY // 4, shift)).value() for _ in range(40)]
    return float(np.mean(found)) if shift else 0.0


def floor(rng: np.random.Generator, prompts: int) -> bool:
    """A set of real clips lies below the floor that twice as many others give."""
    real = side(rng, 2 * prompts, 0)
    return KernelDistance(side(rng, prompts, 0), real).value() <= (kernel_floor(real, prompts) or 0)


def mean_test(rng: np.random.Generator, prompts: int) -> bool:
    """Two models that are alike are not told apart at 5%."""
    of = np.repeat(range(prompts), CLIPS)
    sides = [(rng.normal(size=prompts)[of] + rng.normal(size=len(of))).tolist() for _ in range(2)]
    return paired_p(*sides, of.tolist()) >= 0.05


def distance_test(rng: np.random.Generator, prompts: int) -> bool:
    """The same of their kernel distances to real clips."""
    return paired_kernel_p(side(rng, prompts, 0.3), side(rng, prompts, 0.3), side(rng, 2 * prompts, 0))[1] >= 0.05


def cases() -> Iterator[tuple[str, int, str, Callable[[np.random.Generator], bool]]]:
    for n in (12, 40, 100):
        yield "mean, normal", n, "interval", lambda rng, n=n: normal_mean(rng, n)
        yield "mean, skewed", n, "interval", lambda rng, n=n: skewed_mean(rng, n)
        for p in (0.5, 0.9):
            yield f"share of {p:g}", n, "interval", lambda rng, n=n, p=p: share(rng, n, p)
    for shift in (0.0, 0.1, 0.3, 1.0):
        truth = true_distance(shift)
        for n in (12, 24, 60):
            name = f"kernel distance, {shift:g} sd apart" if shift else "kernel distance, equal"
            yield name, n, "interval", lambda rng, n=n, s=shift, t=truth: distance(rng, n, s, t)
    for n in (12, 24, 60):
        yield "kernel distance, floor", n, "floor", lambda rng, n=n: floor(rng, n)
        yield "kernel distances, equal models", n, "test", lambda rng, n=n: distance_test(rng, n)
        yield "means, equal models", n, "test", lambda rng, n=n: mean_test(rng, n)


def coverage(times: int, progress: Progress) -> list[dict[str, Any]]:
    """A row for each case: how often it holds what it promises for 95%, with Wilson's interval of that share."""
    rows, asked = [], list(cases())
    for done, (what, prompts, sort, case) in enumerate(asked, start=1):
        rng = np.random.default_rng(done)
        hits = sum(case(rng) for _ in range(times))
        low, high = wilson(hits, times)
        about = {"what": what, "sort": sort, "prompts": prompts, "times": times, "covers": hits / times}
        rows.append(about | {"interval": [round(low, 3), round(high, 3)]})
        progress(done, len(asked))
    return rows
