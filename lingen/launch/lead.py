"""How long before its end a job has to be told: its longest act has to end, and a checkpoint to be written."""

import math
from collections.abc import Sequence

from lingen.plan.forecast import PEAK_FLOPS, Plan
from lingen.recipe.sections import KINDS, Recipe

SLOWEST_SHARE = 0.25
"""Share of the peak that the slowest training still reaches [ours]."""
CPU_FLOPS = 2e10
"""FLOP/s of a process on a CPU [ours]."""
WRITE_SPEED = 0.5e9
"""Bytes a second at which a checkpoint reaches the disk [ours]."""
SLURM_DELAY = 60
"""Seconds that SLURM may take to send a signal, and a process to leave."""
LEAST, MOST = 120, 65535
"""Seconds; SLURM takes no more."""


def signal_seconds(stages: Sequence[Recipe], plans: Sequence[Plan]) -> int:
    """Seconds between the signal and the end of a job, by the forecast of its stages: twice the longest act that no
    signal ends, which is an optimiser step or a sampled clip, and a checkpoint. Of a GPU that is not known here the
    slowest known is taken."""
    speeds = {True: CPU_FLOPS, False: SLOWEST_SHARE * min(PEAK_FLOPS.values())}
    act = max(
        _longest_flop(one, forecast) / speeds[one.trainer.get("accelerator") == "cpu"]
        for one, forecast in zip(stages, plans, strict=True)
    )
    checkpoint = max(forecast.checkpoint for forecast in plans) / WRITE_SPEED
    needed = 2 * act + checkpoint + SLURM_DELAY
    return min(MOST, max(LEAST, 60 * math.ceil(needed / 60)))


def _longest_flop(recipe: Recipe, forecast: Plan) -> float:
    """Of the longest optimiser step of a rank, or of a clip that training samples: each solver step is a forward with
    and without the text, twice for Heun."""
    asked = [kind for kind in KINDS if getattr(recipe.data.mix, kind)]
    flop = [getattr(recipe.data.batch, kind) * forecast.training_flops.get(kind, 0.0) for kind in asked]
    passes = 2 * recipe.sample.steps * (2 if recipe.sample.solver == "heun" else 1) if recipe.sample.prompts else 0
    return max(recipe.train.accumulate * max(flop), passes * max(forecast.flops.values(), default=0.0))
