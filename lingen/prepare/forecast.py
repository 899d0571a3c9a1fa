"""How each stage of a recipe would use its shards: samples by bucket and rank, epochs, what is left out."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

from lingen.data import manifest
from lingen.data.datamodule import ClipData
from lingen.data.ledger import DataError
from lingen.data.locations import Location, expand
from lingen.data.manifest import ManifestError
from lingen.data.order import steps_of
from lingen.data.remote import is_remote
from lingen.data.starved import starved
from lingen.recipe.errors import RecipeError
from lingen.recipe.sections import KINDS, Recipe, Shards
from lingen.recipe.sizes import ranks_of


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
    """Works out all stages from the manifests alone; decodes nothing. `ranks`: by default those of the trainer."""
    whole = Forecast([], {}, {}, [])
    for recipe in stages:
        name = recipe.stage or "main"
        data = ClipData(recipe)
        try:
            data.check()
            data.setup()
        except (DataError, RecipeError, ManifestError) as error:
            whole.problems.append(f"stage {name}: {error}")
            continue
        here = ranks or ranks_of(recipe)
        whole.epochs[name] = {}
        whole.problems.extend(starved(recipe, data, here))
        for kind, pool in data.train.pools.items():
            own = [
                Bucket(name, kind, str(shape), lane.samples, lane.samples / here, lane.batch, step, lane.samples / step)
                for shape, lane in zip(pool.shapes, pool.lanes, strict=True)
                for step in [lane.batch * here * recipe.train.accumulate]
            ]
            whole.buckets.extend(own)
            whole.epochs[name][kind] = steps_of(recipe)[kind] / sum(bucket.steps for bucket in own)
            for reason, out in pool.left_out.items():
                whole.left_out[f"{name}: {kind}: {reason}, such as {out.example}"] = out.number
    return whole


def stages_on(stages: Sequence[Recipe], folders: Sequence[Path]) -> list[Recipe]:
    """The stages with the shards of these folders in the place of the recipe's own. A kind that none holds keeps the
    recipe's own. A folder without a manifest stays, so that the forecast asks for one."""
    held: dict[str, list[str]] = {kind: [] for kind in KINDS}
    for folder in folders:
        file, kinds = folder / manifest.NAME, set(KINDS)
        if file.is_file():
            columns = ((batch["kind"], batch["frames"]) for batch in manifest.batches(file))
            rows = {row for kind, frames in columns for row in zip(kind.to_pylist(), frames.to_pylist(), strict=True)}
            kinds &= {kind if kind != "latents" else "image" if frames == 1 else "video" for kind, frames in rows}
        for kind in kinds:
            held[kind].append(str(folder))
    named = {kind: found for kind, found in held.items() if found}
    data = [replace(one.data, shards=replace(one.data.shards, **named), validation=Shards()) for one in stages]
    return [replace(one, data=own) for one, own in zip(stages, data, strict=True)]


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
