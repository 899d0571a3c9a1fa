"""Whether several ranks train what one process trains: every strategy, in float64, float32 and bfloat16."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from lingen.weights import read_weights
from tests.helpers.ranks import Steps, steps_of, steps_of_ranks

SIZES = (
    "model.dim=48", "model.depth=4", "model.mixer={name: mate, state_dim: 8, head_dim: 16, review: [1, 2, 2]}",
    "model.pool_text=true", "model.checkpointing=4e-4", "train.steps=20", "train.log_every=5",
    "train.validate_every=10", "data.mix={image: 1, video: 1}", "trainer.accelerator=cpu", "trainer.logger=false",
)  # fmt: skip
"""Of the tiny recipe: widths that three ranks cannot share evenly, and some of the blocks recomputed."""
SAMPLES = 12
"""Of a step, over all ranks."""
STAGE = "clips"
SAME = {
    "64-true": {"velocity": 1e-12, "gradients": 1e-12, "last gradients": 1e-10, "weights": 1e-10},
    "32-true": {"velocity": 1e-6, "gradients": 1e-6},
}
"""Precision -> the largest relative difference from one process."""


class Difference(NamedTuple):
    """How far ranks are from one process, relative to the largest number of each tensor."""

    what: str
    size: float
    limit: float


def overrides(precision: str, strategy: str, ranks: int) -> list[str]:
    """Of the tiny recipe, for one of these numbers of ranks."""
    share = SAMPLES // ranks
    return [
        *SIZES, f"data.batch={{image: {share}, video: {share}}}", f"trainer.precision={precision}",
        f"trainer.strategy={strategy}",
    ]  # fmt: skip


def alone(recipe: Path, folder: Path, precision: str) -> Steps:
    """One process with all samples."""
    return steps_of(recipe, [*overrides(precision, "auto", 1)], folder / f"one-{precision}", STAGE)


def together(recipe: Path, folder: Path, chosen: list[tuple[str, str]], ranks: int, nodes: int = 1) -> list[Steps]:
    """Ranks that share the samples, for each (strategy, precision)."""
    trials = [
        {
            "recipe": str(recipe),
            "overrides": overrides(precision, strategy, ranks),
            "run": folder / f"{strategy}-{precision}-{ranks}",
            "stage": STAGE,
        }
        for strategy, precision in chosen
    ]
    return steps_of_ranks(trials, ranks, nodes)


def weights_of(run: Path) -> dict[str, Tensor]:
    return read_weights(run / "stages" / STAGE / "weights.safetensors", "raw")


def differences(one: Steps, other: Steps, limits: dict[str, float]) -> Iterator[Difference]:
    """Of what the first and the last step did."""
    first, last = min(one.gradients), max(one.gradients)
    start = {key: value for key, value in one.velocity.items() if key[0] == min(one.velocity)[0]}
    yield Difference("velocity", _apart(start, {key: other.velocity[key] for key in start}), limits["velocity"])
    yield Difference("gradients", _apart(one.gradients[first], other.gradients[first]), limits["gradients"])
    if "last gradients" in limits:
        yield Difference("last gradients", _apart(one.gradients[last], other.gradients[last]), limits["last gradients"])


def weight_difference(one: Path, other: Path, limits: dict[str, float]) -> Difference:
    """Of two runs' weights."""
    return Difference("weights", _apart(weights_of(one), weights_of(other)), limits["weights"])


def _apart(one: dict, other: dict) -> float:
    assert one.keys() == other.keys()
    return max(float((one[key] - other[key]).abs().max() / one[key].abs().max().clamp(min=1e-3)) for key in one)


def forward_error(exact: Steps, other: Steps) -> float:
    """Root mean square of the error of the first step's velocities, relative to their own."""
    keys = [key for key in exact.velocity if key[0] == min(exact.velocity)[0]]
    want, got = (torch.stack([steps.velocity[key].flatten()[:96] for key in keys]) for steps in (exact, other))
    return float((want - got).square().mean().sqrt() / want.square().mean().sqrt())
