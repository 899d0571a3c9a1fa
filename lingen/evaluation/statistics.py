"""Intervals and tests whose unit is the prompt: clips of one prompt are alike, so they are no independent samples. By
SciPy and statsmodels (the extra `eval`)."""

from collections.abc import Hashable, Sequence
from typing import Any

import numpy as np
from jaxtyping import Float

from lingen.metrics.shapes import clustered_interval
from lingen.recipe.errors import RecipeError

SEED, FEW_PROMPTS = 0, 36
Interval = tuple[float, float] | None
"""95%, or None where fewer than two prompts give none."""


def check_extra() -> None:
    """RecipeError where SciPy or statsmodels is missing."""
    try:
        import scipy.stats  # noqa: F401
        import statsmodels.stats.multitest  # noqa: F401
    except ImportError as error:
        raise RecipeError(f"This needs {error.name}: pip install 'scipy>=1.15' statsmodels.") from error


def clusters_of(keys: Sequence[Hashable]) -> Float[np.ndarray, "n c"]:
    """Which of n samples belongs to which cluster, as 0 and 1; clusters in the order in which they appear."""
    known = {key: number for number, key in enumerate(dict.fromkeys(keys))}
    return np.eye(len(known))[[known[key] for key in keys]]


def mean_interval(values: Sequence[float], prompts: Sequence[Hashable]) -> Interval:
    """95% interval of a mean over clips: bootstrap-t over prompts (Efron 1981), which minds that few prompts may carry
    most of it, no narrower than a normal number's. Fewer than `FEW_PROMPTS` hide their long tail: on that side the
    quantile lies further out [ours]. Shares (0 and 1 alone) get `clustered_interval`."""
    from scipy import stats

    held, member = np.asarray(values, float), clusters_of(prompts)
    sums, counts, m = held @ member, member.sum(0), member.shape[1]
    if m < 2:
        return None
    if set(held.tolist()) <= {0.0, 1.0}:
        return clustered_interval([(int(right), int(n)) for right, n in zip(sums, counts, strict=True)])
    value, least = held.mean(), np.sqrt(m / (m - 1)) * max(1.96, stats.t.ppf(0.96, m - 1))
    draws = np.concatenate([np.ones((1, m)), np.random.default_rng(SEED).multinomial(m, np.ones(m) / m, 1999)])
    apart, sizes = sums - value * counts, draws @ counts
    moved = draws @ apart / sizes
    error = np.sqrt((draws * (apart - moved[:, None] * counts) ** 2).sum(1)) / sizes
    tail = 0.025 * min(1.0, max(m, 12) / FEW_PROMPTS)
    ends = [tail, 0.975] if (apart**3).sum() > 0 else [0.025, 1 - tail]  # a long tail on the right makes means low
    low, high = np.quantile(np.where(error > 1e-9 * error[0], moved / np.maximum(error, 1e-300), 0), ends)
    return float(value - max(high, least) * error[0]), float(value - min(low, -least) * error[0])


def paired_p(first: Sequence[float], second: Sequence[float], prompts: Sequence[Hashable]) -> float:
    """Two-sided p of "both have the same mean": the sides change places within each prompt, at random (all ways where
    they are few). Entry i of either side is of `prompts[i]`."""
    from scipy import stats

    difference = (np.asarray(first, float) - np.asarray(second, float)) @ clusters_of(prompts)
    if len(difference) < 2:
        return 1.0
    found: Any = stats.permutation_test((difference,), np.mean, permutation_type="samples", n_resamples=9999, rng=SEED)
    return float(found.pvalue)


def holm(p: Sequence[float]) -> list[float]:
    """Holm's adjusted p of several comparisons."""
    from statsmodels.stats.multitest import multipletests

    return multipletests(p, method="holm")[1].tolist() if len(p) else []
