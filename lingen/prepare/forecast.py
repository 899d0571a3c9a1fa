"""How each stage of a recipe would use its shards: samples by bucket and rank, epochs, what is left out."""

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

from lingen.data.datamodule import ClipData
from lingen.data.ledger import DataError
from lingen.data.locations import Location, expand
from lingen.data.order import count_before
from lingen.data.remote import is_remote
from lingen.recipe.errors import RecipeError
from lingen.recipe.sections import KINDS, Recipe


class Bucket(NamedTuple):
    """A bucket of a stage."""

    stage: str
    kind: str
    shape: str
    samples: int
    per_rank: float
    """Samples that a rank sees in an epoch."""
    batch: int
    """Samples in one rank's batch."""
    step: int
    """Samples in an optimiser step, of all ranks."""
    steps: float
    """Steps of this bucket in an epoch."""


class Forecast(NamedTuple):
    """The forecast of all stages."""

    buckets: list[Bucket]
    epochs: dict[str, dict[str, float]]
    """Stage -> kind -> how often each sample comes up in the whole stage, on average."""
    left_out: dict[str, int]
    """``stage: kind: reason: example`` -> samples."""
    problems: list[str]
    """A sentence for each stage that has too few samples, with the cure."""


def forecast(stages: Sequence[Recipe], ranks: int | None = None) -> Forecast:
    """Works out all stages from the manifests alone; nothing is decoded.

    Args:
        ranks: None: those of the recipe's trainer.
    """
    whole = Forecast([], {}, {}, [])
    for recipe in stages:
        name = recipe.stage or "main"
        data = ClipData(recipe)
        try:
            data.check()
            data.setup()
        except (DataError, RecipeError) as error:
            whole.problems.append(f"stage {name}: {error}")
            continue
        _add(whole, recipe, data, ranks or ranks_of(recipe))
    return whole


def ranks_of(recipe: Recipe) -> int:
    """Devices times nodes of the recipe's trainer, where it names numbers; else 1."""
    devices, nodes = (recipe.trainer.get(key, 1) for key in ("devices", "num_nodes"))
    count = len(devices) if isinstance(devices, list) else devices if isinstance(devices, int) else 1
    return max(1, count) * (nodes if isinstance(nodes, int) else 1)


def _add(whole: Forecast, recipe: Recipe, data: ClipData, ranks: int) -> None:
    name = recipe.stage or "main"
    whole.epochs[name] = {}
    for kind, pool in data.train.pools.items():
        own = [
            Bucket(name, kind, str(shape), lane.samples, lane.samples / ranks, lane.batch, step, lane.samples / step)
            for shape, lane in zip(pool.shapes, pool.lanes, strict=True)
            for step in [lane.batch * ranks * recipe.train.accumulate]
        ]
        whole.buckets.extend(own)
        whole.problems.extend(_starved(own, recipe, ranks))
        taken = count_before(kind, recipe.train.steps, recipe.data.mix)
        whole.epochs[name][kind] = taken / sum(bucket.steps for bucket in own)
        for reason, out in pool.left_out.items():
            whole.left_out[f"{name}: {kind}: {reason}, such as {out.example}"] = out.number


def _starved(buckets: Iterable[Bucket], recipe: Recipe, ranks: int) -> Iterable[str]:
    """A bucket that cannot fill a step would show the same samples several times in one step."""
    for bucket in buckets:
        if bucket.samples >= bucket.step:
            continue
        fits = bucket.samples // (ranks * recipe.train.accumulate)
        if len(recipe.data.sizes) + len(recipe.data.lengths):
            cure = f"take {bucket.shape} out of data.sizes and data.lengths, or pack more {bucket.kind}s of that shape"
        elif fits:
            cure = f"set data.batch.{bucket.kind}={fits}, or pack more {bucket.kind}s"
        else:
            cure = f"train on at most {bucket.samples} ranks, or pack more {bucket.kind}s"
        yield (
            f"stage {bucket.stage} would starve: {bucket.samples} {bucket.kind}s of {bucket.shape} are fewer than the "
            f"{bucket.step} of one step ({bucket.batch} a batch, {ranks} ranks, {recipe.train.accumulate} batches "
            f"accumulated); {cure}."
        )


def local_folders(stages: Sequence[Recipe]) -> tuple[list[Path], list[str]]:
    """The local folders of all shards that the stages name, held-out ones included, and the remote folders."""
    named: dict[str, None] = {}
    for recipe in stages:
        for setting in ("shards", "validation"):
            for kind in KINDS:
                shards = getattr(getattr(recipe.data, setting), kind)
                found = expand(shards, f"data.{setting}.{kind}", recipe.data.remote.timeout)
                named.update(dict.fromkeys(Location.of(one).folder for one in found))
    return [Path(one) for one in named if not is_remote(one)], [one for one in named if is_remote(one)]
