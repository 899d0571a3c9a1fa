"""What every stage of a run will take of a cluster, and which switch makes a stage fit that does not."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

from lingen.data.order import steps_of
from lingen.plan import GPUS
from lingen.plan.forecast import PEAK_FLOPS, Plan, disk_of, flop_a_step, largest_batch, plan, text_tokens
from lingen.recipe.errors import RecipeError
from lingen.recipe.sections import Recipe
from lingen.recipe.sizes import patch_of, ranks_of
from lingen.training.dry_run import Memory, step_memory

USABLE = 0.84
"""Share of a GPU that tensors may take; the rest is for CUDA's context and gaps of the allocator, which held 18% more
than was in use at 17 seconds on an H200 [measured: docs/plan.md]."""
HALF = 2
"""Bytes of a number in encoded shards."""
NODE = 8
"""GPUs of a node, where the recipe says no number."""
LAUNCHES = 0.05
"""Seconds of a step: one that needs fewer for its FLOP waits for launches and data [measured: docs/plan.md]."""
MOST_RANKS = 512
"""Of what is tried."""


class Cluster(NamedTuple):
    """Ranks, and the GPU that each has."""

    nodes: int
    each: int
    """Ranks of a node."""
    gpu: str

    @property
    def ranks(self) -> int:
        return self.nodes * self.each

    @property
    def room(self) -> int:
        """Bytes of a GPU that training may take."""
        return int(USABLE * GPUS[self.gpu][1] * 2**30)


def cluster_of(recipe: Recipe, gpus: int | None, gpu: str) -> Cluster:
    """So many GPUs of `GPUS`, by default those that the recipe asks for. RecipeError: they do not fill nodes."""
    nodes = int(recipe.trainer.get("num_nodes", 1))
    asked = ranks_of(recipe, NODE if nodes > 1 else 1) // nodes
    if gpus is None:
        return Cluster(nodes, asked, gpu)
    each = min(gpus, asked if nodes > 1 or asked > 1 else NODE)
    if gpus % each:
        raise RecipeError(f"--gpus: {gpus} GPUs do not fill nodes of {each} (trainer.devices).")
    return Cluster(gpus // each, each, gpu)


def resource_rows(stages: Sequence[Recipe], gpus: int | None, gpu: str, mfu: float) -> Iterator[dict[str, Any]]:
    """A row for each stage, for rank 0, whose shards are the largest; errors as `cluster_of`.

    Args:
        mfu: share of the GPU's bfloat16 FLOP/s that training reaches."""
    for recipe in stages:
        cluster = cluster_of(recipe, gpus, gpu)
        forecast, memory = plan(recipe), step_memory(recipe, cluster.nodes, cluster.each)
        flop = recipe.train.steps * flop_a_step(recipe, forecast) * cluster.ranks
        seconds = flop / (PEAK_FLOPS[GPUS[gpu][0]] * mfu)
        fits = memory.peak <= cluster.room
        yield {
            "stage": forecast.stage, "ranks": cluster.ranks, "steps": steps_of(recipe), "room": cluster.room,
            **data_of(recipe, forecast, cluster.ranks),
            "tokens": max(getattr(recipe.data.batch, kind) * count for kind, count in forecast.tokens.items()),
            "parameters": forecast.trained, "flop": flop, "memory": dataclasses.asdict(memory),
            "gpu_hours": seconds / 3600, "small": seconds < LAUNCHES * recipe.train.steps * cluster.ranks,
            "disk": disk_of(recipe, forecast), "fits": fits,
            "advice": None if fits else what_fits(recipe, cluster, memory),
        }  # fmt: skip


def data_of(recipe: Recipe, forecast: Plan, ranks: int) -> dict[str, Any]:
    """`samples` of each kind that a stage is shown; bytes in encoded shards: `latents` of a sample, `text` at most."""
    a_rank = {kind: steps * getattr(recipe.data.batch, kind) for kind, steps in steps_of(recipe).items()}
    shown = {kind: ranks * recipe.train.accumulate * samples for kind, samples in a_rank.items()}
    a_token = HALF * recipe.model.channels * math.prod(patch_of(recipe))
    text = HALF * sum(map(math.prod, zip(recipe.model.text_dims, text_tokens(recipe), strict=False)))
    return {"samples": shown, "latents": {kind: a_token * forecast.tokens[kind] for kind in shown}, "text": text}


def what_fits(recipe: Recipe, cluster: Cluster, now: Memory) -> str:
    """The first switch with which a stage fits, else a smaller batch, each in a dry run; and the smallest GPU that has
    the room as it is (`now`)."""
    others = sorted((size, gpu) for gpu, (_, size) in GPUS.items() if cluster._replace(gpu=gpu).room >= now.peak)
    larger = f"; or take --gpu {others[0][1]}" if others else ""
    least = now.peak
    for words, changed, other in _switches(recipe, cluster):
        memory = step_memory(changed, other.nodes, other.each)
        if memory.peak <= cluster.room:
            return f"with {words} it does: {memory.peak / 2**30:.1f} GiB of a rank{larger}"
        least = min(memory.peak, least)
        if other.ranks > cluster.ranks and memory.activations > cluster.room:
            break  # which no further rank takes a part of
    kind = largest_batch(recipe)[0]
    batch, rest = getattr(recipe.data.batch, kind), cluster.room - now.peak + now.activations
    if batch == 1:
        return f"no switch makes it fit, the least is {least / 2**30:.1f} GiB of a rank{larger}"
    less = min(batch - 1, max(1, int(batch * rest / max(1, now.activations))))
    data = dataclasses.replace(recipe.data, batch=dataclasses.replace(recipe.data.batch, **{kind: less}))
    smaller = dataclasses.replace(recipe, data=data)
    memory, words = step_memory(smaller, cluster.nodes, cluster.each), f"data.batch.{kind}={less}"
    if memory.peak <= cluster.room:
        return f"with {words} it does: {memory.peak / 2**30:.1f} GiB of a rank{larger}"
    return f"lower the batch, {words}, and {what_fits(smaller, cluster, memory)}"


def _switches(recipe: Recipe, cluster: Cluster) -> Iterator[tuple[str, Recipe, Cluster]]:
    """What to set, the cheapest first and each with those before, and the stage with it."""
    if not recipe.subject.encoded:  # an autoencoder is whole on every rank
        return
    words = []
    if recipe.model.checkpointing is not True:
        words.append("model.checkpointing=true")
        recipe = dataclasses.replace(recipe, model=dataclasses.replace(recipe.model, checkpointing=True))
        yield words[0], recipe, cluster
    strategy = str(recipe.trainer.get("strategy", "auto")).lower()
    for name, helps in (("hsdp", cluster.nodes > 1 and cluster.each > 1), ("fsdp", True)):
        if helps and strategy not in (name, "fsdp"):
            recipe = dataclasses.replace(recipe, trainer=recipe.trainer | {"strategy": name})
            if cluster.ranks > 1:
                yield " ".join([*words, f"trainer.strategy={name}"]), recipe, cluster
    words = words if strategy == "fsdp" else [*words, "trainer.strategy=fsdp"]
    while 2 * cluster.ranks <= MOST_RANKS:
        wider = cluster.nodes == 1 and cluster.each < NODE
        cluster = cluster._replace(each=2 * cluster.each) if wider else cluster._replace(nodes=2 * cluster.nodes)
        yield " ".join([*words, f"--gpus {cluster.ranks}"]), recipe, cluster
