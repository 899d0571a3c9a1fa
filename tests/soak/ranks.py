"""Whether several ranks train what one process trains: every strategy, in float64, float32 and bfloat16."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from lingen.recipe import load_recipe, to_yaml
from lingen.training.denoiser import LinGenModule
from lingen.training.weights import save_weights
from lingen.weights import read_weights
from tests.helpers.closeness import relative_error
from tests.helpers.ranks import Steps, steps_of, steps_of_ranks
from tests.helpers.tiny import write_recipe, write_shapes

SIZES = (
    "model.dim=48", "model.depth=4", "model.mixer={name: mate, state_dim: 8, head_dim: 16, review: [1, 2, 2]}",
    "model.pool_text=true", "model.checkpointing=1.5e-3", "train.log_every=5", "train.validate_every=10",
    "data.mix={image: 1, video: 1}", "trainer.accelerator=cpu", "trainer.logger=false", "sample.prompts=[]",
)  # fmt: skip
"""Of the tiny recipe: widths that three ranks cannot share evenly, and blocks that keep more or less."""
SAMPLES = 12
"""Of a step, over all ranks."""
STAGE = "clips"
STEPS = {"64-true": 20, "32-true": 1, "bf16-mixed": 1}
"""Precision -> how many steps are compared."""
LIMITS = {
    "64-true": {"velocity": 1e-12, "gradients": 1e-12, "last gradients": 1e-10, "weights": 1e-10},
    "32-true": {"velocity": 1e-6, "gradients": 1e-6},
}
"""Precision -> the largest `relative_error`: of a tensor, in float32 of all gradients together."""
FORWARD = 1.001
"""The largest error of a forward pass in bfloat16, in errors of autocast in one process: of fewer samples the products
are summed in another order."""


class Difference(NamedTuple):
    """How far ranks are from one process."""

    what: str
    size: float
    limit: float

    @property
    def is_too_large(self) -> bool:
        return not self.size <= self.limit


class Ranks(NamedTuple):
    """Ranks that train together."""

    strategy: str
    count: int
    nodes: int = 1

    def __str__(self) -> str:
        return f"{self.strategy} on {self.nodes} x {self.count // self.nodes}"


EVERY = [
    *(Ranks(strategy, count) for count in (2, 3) for strategy in ("fsdp", "ddp")),
    *(Ranks(strategy, 4, 2) for strategy in ("fsdp", "hsdp", "ddp")),
]


class Alone:
    """What one process does with all samples, in each precision once.

    Args:
        folder: for the shards, the recipe and the runs.
        steps: of a stage in float64.
    """

    def __init__(self, folder: Path, steps: int = STEPS["64-true"]):
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "shards").mkdir()
        self.folder, self.steps = folder, STEPS | {"64-true": steps}
        self.recipe = write_recipe(folder / "tiny.yaml", write_shapes(folder / "shards"))
        self._known: dict[str, Steps] = {}
        self.start = _write_start(self.recipe, folder / "start.safetensors")

    def overrides(self, precision: str, strategy: str, ranks: int) -> list[str]:
        """Of the tiny recipe: ranks share the samples of a step."""
        share = SAMPLES // ranks
        return [
            *SIZES, f"init={self.start}", f"data.batch={{image: {share}, video: {share}}}",
            f"train.steps={self.steps[precision]}", f"trainer.precision={precision}", f"trainer.strategy={strategy}",
        ]  # fmt: skip

    def run(self, precision: str) -> Path:
        return self.folder / f"one-{precision}"

    def found(self, precision: str) -> Steps:
        if precision not in self._known:
            overrides = self.overrides(precision, "auto", 1)
            self._known[precision] = steps_of(self.recipe, overrides, self.run(precision), STAGE)
        return self._known[precision]


@torch.no_grad()
def _write_start(recipe: Path, path: Path) -> Path:
    """Weights of which none switches a part off, as those do that training begins with."""
    torch.manual_seed(0)
    loaded = load_recipe(recipe, SIZES, stage=STAGE)
    module = LinGenModule(loaded)
    for parameter in module.trained_parameters().values():
        parameter.add_(0.05 * torch.randn_like(parameter))
    save_weights(path, module, to_yaml(loaded), 1)
    return path


def compare(one: Alone, chosen: Sequence[tuple[Ranks, str]]) -> Iterator[tuple[Ranks, str, list[Difference]]]:
    """Ranks in a precision with one process. All have the same count and nodes, and train one after the other in the
    same processes."""
    trials = [
        {
            "recipe": str(one.recipe),
            "overrides": one.overrides(precision, each.strategy, each.count),
            "run": str(one.folder / f"{each.strategy}-{precision}-{each.count}"),
            "stage": STAGE,
        }
        for each, precision in chosen
    ]
    found = steps_of_ranks(trials, chosen[0][0].count, chosen[0][0].nodes)
    for (each, precision), trial, steps in zip(chosen, trials, found, strict=True):
        yield each, precision, list(differences(one, steps, precision, Path(trial["run"])))


def differences(one: Alone, other: Steps, precision: str, run: Path) -> Iterator[Difference]:
    """Of velocities and gradients of the first and the last step, and of the weights."""
    if precision == "bf16-mixed":
        exact = one.found("32-true")  # in float64 other noise is drawn
        yield Difference(
            "forward error", forward_error(exact, other), FORWARD * forward_error(exact, one.found(precision))
        )
        return
    held, limits = one.found(precision), LIMITS[precision]
    yield Difference("velocity", _apart(first_of(held.velocity), first_of(other.velocity)), limits["velocity"])
    for what, step in (("gradients", min), ("last gradients", max)):
        if what in limits:
            mine, theirs = held.gradients[step(held.gradients)], other.gradients[step(other.gradients)]
            size = _apart(mine, theirs) if precision == "64-true" else _apart_together(mine, theirs)
            yield Difference(what, size, limits[what])
    if "weights" in limits:
        yield Difference("weights", _apart(weights_of(one.run(precision)), weights_of(run)), limits["weights"])


def weights_of(run: Path) -> dict[str, Tensor]:
    """The raw ones of a finished run."""
    return read_weights(run / "stages" / STAGE / "weights.safetensors", "raw")


def first_of(velocity: dict[tuple[int, int], Tensor]) -> dict[tuple[int, int], Tensor]:
    """Slot -> velocity of the first step."""
    return {key: value for key, value in velocity.items() if key[0] == min(velocity)[0]}


def _apart(one: dict, other: dict) -> float:
    assert one.keys() == other.keys()
    return max(relative_error(value, other[key]) for key, value in one.items())


def forward_error(exact: Steps, other: Steps) -> float:
    """Of all velocities of the first step together."""
    return _apart_together(first_of(exact.velocity), first_of(other.velocity))


def _apart_together(one: dict, other: dict) -> float:
    """Of a tensor alone float32 leaves less: some gradients are small differences of large numbers, of which as many
    samples in batches of another size give other last bits, with any strategy."""
    assert one.keys() == other.keys()
    return relative_error(*(torch.cat([held[key].flatten() for key in sorted(one)]) for held in (one, other)))


def compare_all(folder: Path) -> list[str]:
    """Prints a line for each strategy, count and precision; returns those of what is too far from one process."""
    torch.set_num_threads(1)
    one, failed = Alone(folder), []
    for count in dict.fromkeys(each.count for each in EVERY):
        chosen = [(each, precision) for each in EVERY if each.count == count for precision in STEPS]
        for each, precision, found in compare(one, chosen):
            line = f"{each}, {precision}: " + ", ".join(f"{d.what} {d.size:.1e} of {d.limit:.1e}" for d in found)
            print(line, flush=True)
            failed += [line] if any(d.is_too_large for d in found) else []
    return failed
