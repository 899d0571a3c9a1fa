"""Intervals and tests whose unit is the prompt: clips of one prompt are alike, so they are no independent samples. How
far two sets of features are apart, and the floors: what two sets of the same real clips have. By SciPy and statsmodels
(the extra `eval`)."""

from collections.abc import Hashable, Sequence
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float

from lingen.metrics.shapes import clustered_interval
from lingen.recipe.errors import RecipeError

SEED, FEW_PROMPTS = 0, 36
REAL_SPLITS, SWAPS = 100, 999
"""Splits of a floor, permutations of a test."""
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


class FeatureSet(NamedTuple):
    """Features of clips, and the prompt of each row."""

    rows: Float[np.ndarray, "_n d"]
    prompts: list[Hashable]


def polynomial_kernel(x: Float[np.ndarray, "_n d"], y: Float[np.ndarray, "_m d"]) -> Float[np.ndarray, "_n _m"]:
    """(x y / d + 1)^3, of KID (Binkowski et al., arXiv 1801.01401)."""
    return (x.astype(np.float64) @ y.T.astype(np.float64) / x.shape[1] + 1) ** 3


class KernelDistance:
    """The unbiased squared MMD of two sets under `polynomial_kernel`: KVD of video features, KID of Inception's. Pairs
    within a prompt are left out, since they are not independent: 0 on average where both sides are drawn alike."""

    def __init__(self, first: FeatureSet, second: FeatureSet):
        self.members = [clusters_of(one.prompts) for one in (first, second)]
        apart = [1 - member @ member.T for member in self.members]
        self.within = [polynomial_kernel(one.rows, one.rows) * mask for one, mask in zip((first, second), apart)]  # noqa: B905
        self.across = polynomial_kernel(first.rows, second.rows)

    def of(self, first: Float[np.ndarray, "s _n"], second: Float[np.ndarray, "s _m"]) -> Float[np.ndarray, " s"]:
        """The distance of s choices of samples, given as 0 and 1 for the samples of either side."""
        total = -2 * ((first @ self.across) * second).sum(1) / (first.sum(1) * second.sum(1))
        for chosen, within, member in zip((first, second), self.within, self.members, strict=True):
            pairs = chosen.sum(1) ** 2 - ((chosen @ member) ** 2).sum(1)
            total += ((chosen @ within) * chosen).sum(1) / pairs
        return total

    def value(self) -> float:
        return float(self.of(*(np.ones((1, len(member))) for member in self.members))[0])

    def interval(self) -> Interval:
        """95%, in Wilson's way: the distances from which the estimate lies within Student's t, by the variance that it
        would have at each of them [ours]. That rises on a line from what is left where sides are alike (doubly centred
        kernels, Hoeffding 1948) to the jackknife's at the estimate. A bootstrap draws a clip twice, at distance 0."""
        from scipy import stats

        m, n = (member.shape[1] for member in self.members)
        if min(m, n) < 4:
            return None
        means = [member / member.sum(0) for member in self.members]  # over the clips of each prompt
        first, second = (one.T @ within @ one for one, within in zip(means, self.within, strict=True))
        across = means[0].T @ self.across @ means[1]
        joint, value, both = np.block([[first, across], [across.T, second]]), self.value(), m + n
        effects = (joint.sum(1) - joint.sum() / (2 * both - 2)) / (both - 2)
        centred = (joint - effects[:, None] - effects) * (1 - np.eye(both))
        alike = 2 * (centred**2).sum() / (both * (both - 3)) * (1 / (m * m - m) + 1 / (n * n - n) + 2 / (m * n))
        moves = first.sum(1) / (m - 1) - across.mean(1), second.sum(1) / (n - 1) - across.mean(0)
        slope = max(sum(4 * one.var(ddof=1) / len(one) for one in moves) - alike, 0.0) / max(value, alike**0.5, 1e-300)
        t = float(stats.t.ppf(0.975, min(m, n) - 1))
        centre, spread = value + t**2 * slope / 2, alike + slope * value + (t * slope / 2) ** 2
        half = t * max(spread, 0.0) ** 0.5
        return float(centre - half), float(centre + half)


def paired_kernel_p(first: FeatureSet, second: FeatureSet, real: FeatureSet) -> tuple[float, float]:
    """Distance of `first` to the real clips minus that of `second`, and two-sided p of "as far": the sides change
    places within each prompt. Row i of either side is of the same prompt."""
    joint = FeatureSet(np.concatenate([first.rows, second.rows]), [*first.prompts, *second.prompts])
    distance, member = KernelDistance(joint, real), clusters_of(first.prompts)
    swaps = np.random.default_rng(SEED).random((SWAPS, member.shape[1])) < 0.5
    kept = np.concatenate([np.ones((1, len(member))), 1.0 - swaps @ member.T])
    everything = np.ones((len(kept), len(real.rows)))
    sides = [np.concatenate(pair, 1) for pair in ((kept, 1 - kept), (1 - kept, kept))]
    apart = distance.of(sides[0], everything) - distance.of(sides[1], everything)
    return float(apart[0]), float((abs(apart) >= abs(apart[0]) * (1 - 1e-9)).mean())


def frechet_distance(x: Float[np.ndarray, "_n d"], y: Float[np.ndarray, "_m d"]) -> float:
    """|mean difference|^2 + tr(Sx + Sy - 2 (Sx Sy)^1/2) of Gaussians with the sets' moments (Dowson and Landau 1982;
    Heusel et al., arXiv 1706.08500). The trace of the root is the sum of singular values of the product of the centred
    sets, which needs no root of a matrix and no full rank. It grows as sets get smaller: compare at equal numbers."""
    from scipy import linalg

    mean, roots = x.mean(0, dtype=np.float64) - y.mean(0, dtype=np.float64), []
    for one in (x, y):
        centred = (one - one.mean(0, dtype=np.float64)) / np.sqrt(len(one) - 1)
        roots.append(linalg.qr(centred, mode="r")[0][: one.shape[1]] if len(one) > one.shape[1] else centred)
    spread = sum(float((root**2).sum()) for root in roots)
    return float(mean @ mean + spread - 2 * linalg.svdvals(roots[0] @ roots[1].T).sum())


def kernel_floor(real: FeatureSet, n: int) -> float | None:
    """What 95% of distances between two disjoint sets of n real clips (of half of them, where they are fewer) stay
    below; None for fewer than four."""
    member = clusters_of(real.prompts)
    half = min(member.shape[1] // 2, round(n * member.shape[1] / len(real.rows)))
    if half < 2:
        return None
    rank = np.random.default_rng(SEED).random((REAL_SPLITS, member.shape[1])).argsort(1).argsort(1)
    sides = [((rank >= low) & (rank < low + half)).astype(float) @ member.T for low in (0, half)]
    return float(np.quantile(KernelDistance(real, real).of(*sides), 0.95))


def frechet_floor(real: Float[np.ndarray, "_n d"], n: int) -> float:
    """The mean Frechet distance between two disjoint sets of n real clips, over five splits."""
    rng = np.random.default_rng(SEED)
    splits = [rng.permutation(len(real))[: 2 * n] for _ in range(5)]
    return float(np.mean([frechet_distance(real[one[:n]], real[one[n:]]) for one in splits]))
