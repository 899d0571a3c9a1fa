"""What a stage starts from: rank 0 finds it in the run folder, and every rank reads the files that it names."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

from lingen.files import wait_for
from lingen.recipe.errors import RecipeError
from lingen.recipe.sections import Recipe
from lingen.run_folder.folder import RunFolder, step_of
from lingen.run_folder.intact import newest_intact, wait_for_files
from lingen.training.base import Trained
from lingen.training.rows import horizons
from lingen.training.weights import load_into
from lingen.weights import find_weights, read_weights


class StageStart(NamedTuple):
    """What a stage that is not finished starts from."""

    stage: str
    step: int
    """Of the checkpoint; 0: none."""
    checkpoint: Path | None
    weights: Path | None
    """Of a fresh stage; None: those that its module begins with."""
    optimizer: Path | None
    """The checkpoint whose moments of AdamW a fresh stage goes on with."""


def start_of(
    folder: RunFolder, stages: Sequence[Recipe], index: int, say: Callable[[str], None], every: int = 1
) -> StageStart | None:
    """For rank 0: what a stage starts from; None where it is finished. It goes on from its newest checkpoint that is
    whole; a fresh stage takes its own `init`, else the weights of the last finished stage, else the recipe's `init`.
    RecipeError where `init` or moments to keep are not there.

    Args:
        every: only checkpoints of multiples of this step count."""
    recipe, name = stages[index], str(stages[index].stage)
    if folder.finished_steps(name) >= recipe.train.steps:
        return None
    checkpoint, passed_over = newest_intact(folder, name, every)
    for line in passed_over:
        say(line)
    if checkpoint is not None:
        return StageStart(name, step_of(checkpoint), checkpoint, None, None)
    before = folder.finished([str(one.stage) for one in stages[:index]])
    own_init = recipe.init if index == 0 or recipe.init != stages[0].init or not before else None
    if own_init is not None:
        return StageStart(name, 0, None, find_weights(own_init), None)
    if not before:
        return StageStart(name, 0, None, None, None)
    optimizer, lines = newest_intact(folder, before[-1]) if recipe.train.keep_optimizer else (None, [])
    if recipe.train.keep_optimizer and optimizer is None:
        raise RecipeError(
            f"stage {name}: train.keep_optimizer takes AdamW's moments from a checkpoint of stage {before[-1]}, and "
            f"{folder.path} holds none that is whole{''.join(f'; {line}' for line in lines[:-1])}. Bring one back, or "
            "start a run with train.keep_optimizer=false."
        )
    return StageStart(name, 0, None, folder.weights(before[-1]), optimizer)


def hand_over(module: Trained, start: StageStart, say: Callable[[str], None]) -> None:
    """Gives a fresh stage its weights, and the moments that it keeps."""
    if start.weights is None:
        say(f"stage {module.recipe.stage} starts from {module.begin()}")
        if reach := [f"{float(tokens):.0f}" for tokens in horizons(module).values()]:
            say(f"its scans remember over so many tokens, layer by layer: {', '.join(reach)}")
        return
    source = wait_for(start.weights)
    load_into(module, read_weights(source, "raw") or read_weights(source, "averaged"), source)  # `lingen export`
    say(f"stage {module.recipe.stage} starts from {source}")
    if start.optimizer is not None:
        module.moments_from = wait_for_files(start.optimizer)
