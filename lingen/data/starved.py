"""Whether a stage's shards fill its steps: a bucket that cannot shows the same samples several times in one step."""

from collections.abc import Iterator

from lingen.data.datamodule import ClipData
from lingen.recipe.sections import Recipe


def starved(recipe: Recipe, data: ClipData, ranks: int) -> Iterator[str]:
    """A sentence with the cure for each bucket that holds fewer samples than one step takes. `data`: of this stage; its
    indexes are opened."""
    for kind, pool in data.train.pools.items():
        for shape, lane in zip(pool.shapes, pool.lanes, strict=True):
            step = lane.batch * ranks * recipe.train.accumulate
            if lane.samples < step:
                cure = _cure(recipe, kind, str(shape), lane.samples, ranks)
                yield (
                    f"stage {recipe.stage or 'main'} would starve: {lane.samples} {kind}s of {shape} are fewer than "
                    f"the {step} of one step ({lane.batch} a batch, {ranks} ranks, {recipe.train.accumulate} batches "
                    f"accumulated); {cure}."
                )


def _cure(recipe: Recipe, kind: str, shape: str, samples: int, ranks: int) -> str:
    fits = samples // (ranks * recipe.train.accumulate)
    if len(recipe.data.sizes) + len(recipe.data.lengths):
        return f"take {shape} out of data.sizes and data.lengths, or pack more {kind}s of that shape"
    if fits:
        return f"set data.batch.{kind}={fits}, or pack more {kind}s"
    if ranks == 1:
        return f"lower train.accumulate to at most {samples}, or pack more {kind}s"
    return f"train on at most {samples} ranks, or pack more {kind}s"
