"""Exponents of costs over tokens with their confidence, and where two costs cross."""

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from lingen.metrics.shapes import student


class Fit(NamedTuple):
    """cost ~ tokens ** exponent, with a 95% confidence interval of the exponent."""

    exponent: float
    low: float
    high: float


def fit_exponent(tokens: Sequence[float], costs: Sequence[float]) -> Fit:
    """Least squares of log cost over log tokens; the interval is Student's t on the slope. ValueError for fewer than
    three points."""
    if len(tokens) < 3:
        raise ValueError(f"An exponent needs at least three sizes, got {len(tokens)}.")
    (slope, _), covariance = np.polyfit(np.log(tokens), np.log(costs), 1, cov=True)
    error = math.sqrt(covariance[0, 0]) * student(len(tokens) - 2)
    return Fit(*(round(float(one), 4) for one in (slope, slope - error, slope + error)))


def crossover(tokens: Sequence[float], steep: Sequence[float], flat: Sequence[float]) -> float | None:
    """Tokens (rising) at which two measured curves meet, by interpolation in log-log; None where they do not within the
    sizes. `steep` are the costs of the one that is cheaper at first, `flat` of the one that is cheaper at last."""
    gaps = [math.log(a / b) for a, b in zip(steep, flat, strict=True)]
    for i, (here, there) in enumerate(zip(gaps, gaps[1:], strict=False)):
        if here <= 0 < there:
            low, high = math.log(tokens[i]), math.log(tokens[i + 1])
            return math.exp(low + (high - low) * here / (here - there))
    return None
