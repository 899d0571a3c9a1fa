"""Whether training is well: a loss or a gradient norm that stands far above those of steps like it."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from statistics import median
from typing import Any, NamedTuple

from torch import Tensor

ALIKE_MOST = 128
"""Steps that a step is compared with: the last ones of its like [ours]."""
ALIKE_LEAST = 32
"""Steps that must be known before one is judged [ours]."""
SPIKE = 12.0
"""Score from which a number is a spike [ours: docs/health.md says what healthy runs come to]."""
LEAST_SPREAD = 0.05
"""Of a logarithm: where numbers hardly differ, those 1.8 times as large are spikes, not those 5% larger [ours]."""
NORMAL = 1.4826
"""Standard deviation of normal numbers by their median absolute deviation."""
SAMPLES_NAMED = 16
"""Samples that a message names."""
RETURNS = 3
"""Times that a stage goes back to the same step [ours]."""


class NonFiniteError(RuntimeError):
    """Losses or gradients are not finite, or spike: several steps in a row were thrown away, or going back did not
    help."""


class GoBack(Exception):
    """Raised on all ranks: the stage is to go on from an earlier step, past all samples that were taken since.

    Args:
        step: at which the spike is.
        taken: samples of each bucket that were taken up to and with it, see `Anchor`.
        returns: see `SpikeWatch.returns`.
        what: the spike and its samples, for people."""

    def __init__(self, step: int, taken: Mapping[str, Sequence[int]], returns: tuple[int, int], what: str):
        super().__init__(what)
        self.step, self.taken, self.returns = step, taken, returns

    def count_return(self, place: int) -> None:
        """Notes the step from which the stage goes on. NonFiniteError where it went back there too often."""
        before, times = self.returns
        if place == before and times >= RETURNS:
            raise NonFiniteError(
                f"Training went back to step {place} {times} times, and the samples after it spike again: {self}. "
                "Lower train.lr, or look at these samples."
            )
        self.returns = (place, times + 1 if place == before else 1)


def robust_score(value: float, others: Sequence[float]) -> float:
    """How many spreads a number is above the median of others; the spread is 1.4826 times their median absolute
    deviation, as in Iglewicz and Hoaglin, "How to detect and handle outliers" (1993), and at least `LEAST_SPREAD`."""
    middle = median(others)
    spread = NORMAL * median(abs(other - middle) for other in others)
    return (value - middle) / max(spread, LEAST_SPREAD)


class Spike(NamedTuple):
    """A step whose loss or gradient norm is far above those of steps like it."""

    like: str
    loss: float
    norm: float
    scores: Sequence[float]
    """Of loss and norm."""
    is_news: bool
    """Not so the next ones of a row."""

    def __str__(self) -> str:
        return (
            f"loss {self.loss:.4g} ({self.scores[0]:.1f} spreads above the median of {self.like}), "
            f"gradient norm {self.norm:.4g} ({self.scores[1]:.1f})"
        )


class Step(NamedTuple):
    """What an optimiser step tells of itself."""

    number: int
    """Within the stage, counted from 1."""
    kind: str
    like: str
    """Names the steps that it is compared with."""
    seen: list[tuple[list[str], Tensor]]
    """Of each batch, its samples and their losses [b]."""
    loss: float
    """Mean of all ranks."""
    norms: Sequence[float]
    """Of gradients that are clipped together; the first one counts."""


class SpikeWatch:
    """Compares each step with the last ones of its like, by robust scores of the logarithms of its loss and gradient
    norm: both are positive, and spread in proportion to their size.

    Plain numbers that are the same on all ranks go in, so that all come to the same end. A stage begins with none."""

    def __init__(self) -> None:
        self._known: dict[str, list[list[float]]] = {}
        """Like -> logarithms of loss and norm of its last steps."""
        self._in_spike: set[str] = set()
        self.returns = (-1, 0)
        """The step to which the stage went back last, and how often."""

    def look(self, like: str, loss: float, norm: float) -> Spike | None:
        """The spike that a step is, if it is one."""
        known = self._known.get(like, [])
        if len(known) < ALIKE_LEAST:
            return None
        scores = [robust_score(*pair) for pair in zip(_logs(loss, norm), zip(*known, strict=True), strict=True)]
        if max(scores) < SPIKE:
            self._in_spike.discard(like)
            return None
        spike = Spike(like, loss, norm, scores, like not in self._in_spike)
        self._in_spike.add(like)
        return spike

    def learn(self, like: str, loss: float, norm: float) -> None:
        """Takes a step that was kept into the window."""
        self._known[like] = [*self._known.get(like, []), _logs(loss, norm)][-ALIKE_MOST:]

    def state_dict(self) -> dict[str, Any]:
        """Plain values, for a checkpoint."""
        return {"known": dict(self._known), "in_spike": sorted(self._in_spike), "returns": list(self.returns)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Goes on from a `state_dict`; checkpoints of earlier versions have none."""
        self._known = {like: list(known) for like, known in state.get("known", {}).items()}
        self._in_spike = set(state.get("in_spike", ()))
        self.returns = tuple(state.get("returns", (-1, 0)))  # type: ignore[assignment]


def _logs(*values: float) -> list[float]:
    return [math.log(max(value, 1e-30)) for value in values]


def told_samples(ranks: Sequence[Sequence[tuple[str, float]]]) -> str:
    """Of each rank the samples of a step and their losses -> a text: those that are not finite, else all, the highest
    loss first."""
    of = [f" (rank {rank})" if len(ranks) > 1 else "" for rank in range(len(ranks))]
    named = [(loss, key + of[rank]) for rank, pairs in enumerate(ranks) for key, loss in pairs]
    found = [name for loss, name in named if not math.isfinite(loss)]
    shown = found or [f"{name} {loss:.4g}" for loss, name in sorted(named, reverse=True)]
    more = f" and {len(shown) - SAMPLES_NAMED} more" if len(shown) > SAMPLES_NAMED else ""
    what = "samples whose loss was not finite" if found else "samples and their losses"
    return f"{what}: {', '.join(shown[:SAMPLES_NAMED])}{more}"
