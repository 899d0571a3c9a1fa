"""Exponents of costs over tokens with their confidence, and where two costs cross."""

import math
import statistics
from collections.abc import Sequence
from typing import NamedTuple


class Fit(NamedTuple):
    """cost ~ tokens ** exponent, with a 95% confidence interval of the exponent."""

    exponent: float
    low: float
    high: float


def fit_exponent(tokens: Sequence[float], costs: Sequence[float]) -> Fit:
    """Least squares of log cost over log tokens; the interval is Student's t on the slope.

    Raises:
        ValueError: for fewer than three points.
    """
    if len(tokens) < 3:
        raise ValueError(f"An exponent needs at least three sizes, got {len(tokens)}.")
    x, y = [math.log(n) for n in tokens], [math.log(c) for c in costs]
    slope, intercept = statistics.linear_regression(x, y)
    residual = sum((b - intercept - slope * a) ** 2 for a, b in zip(x, y, strict=True))
    spread = sum((a - statistics.fmean(x)) ** 2 for a in x)
    freedom = len(x) - 2
    error = math.sqrt(residual / freedom / spread) * student_t(freedom)
    return Fit(round(slope, 4), round(slope - error, 4), round(slope + error, 4))


def student_t(freedom: int) -> float:
    """97.5% quantile of Student's t (table up to 10, then the normal's with a first correction)."""
    table = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228)
    return table[freedom - 1] if freedom <= len(table) else 1.96 + 2.4 / freedom


def crossover(tokens: Sequence[float], steep: Sequence[float], flat: Sequence[float]) -> float | None:
    """Tokens at which two measured curves meet, by interpolation in log-log; None where they do not within the sizes.

    Args:
        tokens: rising.
        steep: costs of the one that is cheaper at first.
        flat: costs of the one that is cheaper at last.
    """
    gaps = [math.log(a / b) for a, b in zip(steep, flat, strict=True)]
    for i, (here, there) in enumerate(zip(gaps, gaps[1:], strict=False)):
        if here <= 0 < there:
            low, high = math.log(tokens[i]), math.log(tokens[i + 1])
            return math.exp(low + (high - low) * here / (here - there))
    return None
