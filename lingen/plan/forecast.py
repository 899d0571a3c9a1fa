"""Forecast of a stage: tokens, parameters and FLOPs are counted, memory is estimated."""

import math
from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from lingen.blocks.recompute import activation_bytes, recomputed_blocks
from lingen.frozen import is_trained, on_meta
from lingen.kernels.choice import memory_here
from lingen.recipe.registry import AUTOENCODERS, TEXT_ENCODERS
from lingen.recipe.sections import KINDS, Recipe, Triple
from lingen.recipe.sizes import grids_of, patch_of, ranks_of

PEAK_FLOPS = {"H100": 989e12, "H200": 989e12, "B200": 2250e12, "A100": 312e12, "L40S": 362e12, "RTX 4090": 165e12}
"""Dense bfloat16 FLOP/s by the makers' data sheets, for the share of it that training reaches (MFU)."""
DEFAULT_TEXT_TOKENS = 256
"""Tokens of a text encoder that does not say `max_tokens` [ours]."""


@dataclass(frozen=True, kw_only=True)
class Plan:
    """A stage's forecast for one rank."""

    stage: str
    grids: dict[str, Triple]
    """Tokens (t, h, w) of one sample of each kind."""
    parameters: dict[str, int]
    """Trained parameters of each part."""
    frozen: int
    """Parameters of the autoencoder and the text encoders that are not trained."""
    memory: dict[str, int]
    """Bytes of a rank: weights, averaged weights, gradients and optimiser, of which a strategy that shards leaves it a
    part; what is gathered then; activations of the largest batch."""
    shards: int = 1
    """Ranks that share one copy of what is trained."""
    flops: dict[str, float]
    """FLOPs of one forward pass over one sample of each kind, counted on the meta device (`lingen.plan.flops`); a kind
    that cannot be counted, because a mixer does not run there, is left out."""
    training_flops: dict[str, float]
    """FLOPs of forward and backward over one sample of each kind: 3 forwards, and one more of each recomputed block."""

    @property
    def tokens(self) -> dict[str, int]:
        """Tokens of one sample of each kind."""
        return {kind: math.prod(grid) for kind, grid in self.grids.items()}

    @property
    def checkpoint(self) -> int:
        """Bytes of a checkpoint: weights, averaged weights and two moments. While one is written, the memory of the
        machines, not of their GPUs, holds a copy; all ranks share in it."""
        held = self.memory["weights"] + self.memory["averaged weights"]
        return self.shards * (held + 2 * self.memory["gradients and optimiser"] // 3)

    @property
    def trained(self) -> int:
        """All trained parameters."""
        return sum(self.parameters.values())

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {**asdict(self), "tokens": self.tokens, "trained": self.trained, "checkpoint": self.checkpoint}


def peak_flops(device_name: str) -> float | None:
    """FLOP/s of a GPU by its name; None where it is not known."""
    return next((peak for name, peak in PEAK_FLOPS.items() if name in device_name), None)


def plan(recipe: Recipe) -> Plan:
    """Forecast of a loaded stage (`load_recipe` with a stage, or of a recipe without stages)."""
    forecast: Plan = recipe.subject.plan(recipe)
    return forecast


def flop_a_step(recipe: Recipe, forecast: Plan) -> float:
    """FLOPs of a rank in the mean of all optimiser steps, by the mix; 0 where a kind cannot be counted."""
    mix = {kind: getattr(recipe.data.mix, kind) for kind in KINDS if getattr(recipe.data.mix, kind)}
    if not mix or any(kind not in forecast.training_flops for kind in mix):
        return 0.0
    flop = sum(times * getattr(recipe.data.batch, kind) * forecast.training_flops[kind] for kind, times in mix.items())
    return recipe.train.accumulate * flop / sum(mix.values())


def too_large(forecast: Plan, recipe: Recipe) -> str | None:
    """A sentence where training takes more memory than the device here has, with the settings that help; None where it
    fits, by estimate. A GPU is looked at unless the trainer names the CPU or there is none."""
    import torch

    cuda = torch.cuda.is_available() and recipe.trainer.get("accelerator", "auto") in ("auto", "gpu", "cuda")
    there = memory_here(torch.device("cuda", 0) if cuda else None)
    needed = sum(forecast.memory.values())
    if needed <= there:
        return None
    batch = recipe.data.batch
    helps = [f"lower data.batch ({batch.image} images, {batch.video} videos) and raise train.accumulate instead"]
    if recipe.subject.section == "model" and recipe.model.checkpointing is not True:
        helps.append("set model.checkpointing=true")
    return (
        f"stage {forecast.stage}: training takes about {needed / 2**30:.3g} GiB (activations of a batch: "
        f"{forecast.memory.get('activations', 0) / 2**30:.3g}), more than the {there / 2**30:.3g} GiB of "
        f"{'the GPU' if cuda else 'this machine'}; {', or '.join(helps)}."
    )


def plan_denoiser(recipe: Recipe) -> Plan:
    """Forecast of a stage that trains its denoiser."""
    from torch import nn

    from lingen.plan.trial import denoiser_on_meta

    model = denoiser_on_meta(recipe)
    autoencoder = on_meta(AUTOENCODERS, recipe.autoencoder)
    encoders = [on_meta(TEXT_ENCODERS, component) for component in recipe.text]
    parameters = _by_part(model)
    frozen = _count(autoencoder) if isinstance(autoencoder, nn.Module) else 0
    for encoder in encoders:
        if is_trained(encoder):
            parameters["text encoders"] += _count(encoder)
        elif isinstance(encoder, nn.Module):
            frozen += _count(encoder)
    grids = grids_of(recipe.data, tuple(autoencoder.strides), patch_of(recipe))
    flops = _flops(recipe, grids)
    return Plan(
        stage=recipe.stage or "main",
        grids=grids,
        parameters=dict(parameters),
        frozen=frozen,
        memory=_memory(recipe, parameters, grids),
        shards=shards_of(recipe),
        flops=flops,
        training_flops={kind: flops[kind] * (3 + _recomputed_share(recipe, kind, grids[kind])) for kind in flops},
    )


def _count(module: Any) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def _by_part(model: Any) -> Counter[str]:
    """Parameters of each child of the model, those of the blocks summed over the blocks."""
    parts: Counter[str] = Counter()
    for name, parameter in model.named_parameters():
        keys = name.split(".")
        in_list = len(keys) > 2 and keys[1].isdigit()
        parts[f"{keys[0]}.{keys[2]}" if in_list else keys[0]] += parameter.numel()
    return parts


def shards_of(recipe: Recipe) -> int:
    """Ranks that share one copy of what is trained, by the strategy; 1 where each holds all of it."""
    import torch

    strategy = str(recipe.trainer.get("strategy", "auto")).lower()
    if strategy not in ("fsdp", "hsdp"):
        return 1
    ranks = ranks_of(recipe, torch.cuda.device_count())
    return ranks // int(recipe.trainer.get("num_nodes", 1)) if strategy == "hsdp" else ranks


def _memory(recipe: Recipe, parameters: Mapping[str, int], grids: dict[str, Triple]) -> dict[str, int]:
    """float32 weights, averaged copy, gradients and two moments, in shards; activations in the trainer's precision."""
    shards, trained = shards_of(recipe), sum(parameters.values())
    trained = -(-trained // shards)
    held = 2 if str(recipe.trainer.get("precision")).endswith("16-true") else 4
    largest = max(_batch_tokens(recipe, kind, grid) for kind, grid in grids.items())
    recomputed = recomputed_blocks(recipe.model, largest, *_where(recipe))
    return {
        "weights": held * trained,
        "averaged weights": 4 * trained,
        "gradients and optimiser": 3 * held * trained,
        **({"gathered": _gathered(recipe, parameters)} if shards > 1 else {}),
        "activations": activation_bytes(recipe.model, largest, recomputed, *_where(recipe)),
    }


def _gathered(recipe: Recipe, parameters: Mapping[str, int]) -> int:
    """Bytes of what a rank of shards holds whole at once: a block that runs, the next one, and a block's gradient, in
    the precision of products; the rest of the model in float32, with its gradient [ours]."""
    blocks = sum(count for part, count in parameters.items() if part.startswith("blocks."))
    low = 2 if "16" in str(recipe.trainer.get("precision")) else 4
    return 3 * low * blocks // recipe.model.depth + 8 * (sum(parameters.values()) - blocks)


def _batch_tokens(recipe: Recipe, kind: str, grid: Triple) -> int:
    return int(getattr(recipe.data.batch, kind)) * math.prod(grid)


def _where(recipe: Recipe) -> tuple[bool, str]:
    """Whether products are done in 16 bits, and the type of the device: a GPU, unless the trainer says CPU."""
    device = "cpu" if recipe.trainer.get("accelerator") == "cpu" else "cuda"
    return "16" in str(recipe.trainer.get("precision")), device


def _recomputed_share(recipe: Recipe, kind: str, grid: Triple) -> float:
    """Share of the blocks that training with batches of this kind computes twice."""
    tokens = _batch_tokens(recipe, kind, grid)
    return recomputed_blocks(recipe.model, tokens, *_where(recipe)) / recipe.model.depth


def _flops(recipe: Recipe, grids: dict[str, Triple]) -> dict[str, float]:
    """Of a forward over one sample of each kind; without those that cannot be counted."""
    from lingen.plan.flops import forward_flops

    text = [component.get("max_tokens") or DEFAULT_TEXT_TOKENS for component in recipe.text]
    counted = {kind: forward_flops(recipe.model, grid, text, *_where(recipe)) for kind, grid in grids.items()}
    return {kind: float(count) for kind, count in counted.items() if count is not None}
