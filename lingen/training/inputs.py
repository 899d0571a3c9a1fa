"""Whether what the stages of a run read is there: weights of frozen parts, shards, `init`; before anything is built."""

from collections.abc import Sequence

from lingen.data.datamodule import ClipData
from lingen.data.ledger import DataError
from lingen.data.starved import starved
from lingen.frozen import Missing, missing_of, refuse
from lingen.ranks import launch
from lingen.recipe.errors import RecipeError
from lingen.recipe.sections import Recipe
from lingen.run_folder.folder import RunFolder
from lingen.weights import find_weights


def check_inputs(stages: Sequence[Recipe], folder: RunFolder) -> None:
    """RecipeError where weights of a frozen part, shards or `init` are not there, before anything is built, or shards
    hold too few samples that fit the stage for a step. Shards are opened, nothing is decoded; clips that lingen draws
    itself fit."""
    for recipe in stages:
        data = ClipData(recipe)
        data.check()
        if recipe.data.shards.image or recipe.data.shards.video:
            try:
                data.setup()
            except DataError as error:
                raise RecipeError(f"stage {recipe.stage}: {error}") from error
            if problems := list(starved(recipe, data, launch.ranks_here(recipe))):
                raise RecipeError(*problems)
        refuse(missing_parts(recipe, begun=bool(folder.checkpoints(str(recipe.stage)))))
        if recipe.init is not None:
            find_weights(recipe.init)


def missing_parts(recipe: Recipe, *, begun: bool = False) -> list[Missing]:
    """What the frozen parts of a stage lack. Shards are opened only where something is missing: with encoded
    shards, text encoders and autoencoder are needed for sampled clips alone.

    Args:
        begun: there is a checkpoint of the stage, so it needs no weights to start from."""
    lacks = missing_of(recipe.subject.frozen_parts(recipe, begun=begun))
    named = recipe.data.shards.image or recipe.data.shards.video
    if not (lacks and recipe.subject.encoded and named and ClipData(recipe).needs_no_encoders):
        return lacks
    if not (recipe.sample.prompts or recipe.score.clips or recipe.train.evaluate_every):
        return []
    without = "sample.prompts=[] score.clips=0 train.evaluate_every=0"
    reason = f"needed for clips alone, since the shards are encoded: {without} trains without"
    return [one._replace(cure=f"{one.cure.rstrip('.')} ({reason}).") for one in lacks]
