"""Forecast of a stage: its tokens, parameters and FLOPs, counted, and how long before its end a job has to be told. Its
memory: `lingen.training.dry_run`."""

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from lingen.blocks.recompute import activation_bytes, kept_by_blocks
from lingen.frozen import is_trained, on_meta
from lingen.plan.flops import forward_flops
from lingen.plan.trial import denoiser_on_meta
from lingen.recipe.registry import AUTOENCODERS, TEXT_ENCODERS
from lingen.recipe.sections import KINDS, Recipe, Triple
from lingen.recipe.sizes import grids_of, patch_of, round_of

PEAK_FLOPS = {"H100": 989e12, "H200": 989e12, "B200": 2250e12, "A100": 312e12, "L40S": 362e12, "RTX 4090": 165e12}
"""Dense bfloat16 FLOP/s by the makers' data sheets, for the share of it that training reaches (MFU)."""
DEFAULT_TEXT_TOKENS = 256
"""Tokens of a text encoder that does not say `max_tokens` [ours]."""
SLOWEST_SHARE = 0.25
"""Share of the peak that the slowest training still reaches [ours]."""
CPU_FLOPS = 2e10
"""FLOP/s of a process on a CPU [ours]."""
WRITE_SPEED = 0.5e9
"""Bytes a second at which a checkpoint reaches the disk [ours]."""
SLURM_DELAY = 60
"""Seconds that SLURM may take to send a signal, and a process to leave."""
LEAST, MOST = 120, 65535
"""Seconds before its end at which a job is told, at least and at most; SLURM takes no more."""


@dataclass(frozen=True, kw_only=True)
class Plan:
    """A stage's forecast."""

    stage: str
    grids: dict[str, Triple]
    """Tokens (t, h, w) of one sample of each kind."""
    parameters: dict[str, int]
    """Trained parameters of each part."""
    frozen: int
    """Parameters of the autoencoder and the text encoders that are not trained."""
    held: int
    """Bytes of a trained number."""
    flops: dict[str, float]
    """FLOPs of one forward pass over one sample of each kind, counted on the meta device (`lingen.plan.flops`); a kind
    that cannot be counted, because a mixer does not run there, is left out."""
    training_flops: dict[str, float]
    """FLOPs of forward and backward over one sample of each kind: 3 forwards, and what blocks compute again."""

    @property
    def model_flops(self) -> dict[str, float]:
        """The same without what is computed twice, as model FLOPs utilisation counts it (PaLM, arXiv 2204.02311)."""
        return {kind: 3 * flops for kind, flops in self.flops.items()}

    @property
    def tokens(self) -> dict[str, int]:
        """Tokens of one sample of each kind."""
        return {kind: math.prod(grid) for kind, grid in self.grids.items()}

    @property
    def checkpoint(self) -> int:
        """Bytes of a checkpoint: weights, averaged weights and two moments. While one is written, the memory of the
        machines, not of their GPUs, holds a copy; all ranks share in it."""
        return self.trained * (3 * self.held + 4)

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
    steps = round_of(recipe.data)
    mix = {kind: getattr(steps, kind) for kind in KINDS if getattr(steps, kind)}
    if not mix or any(kind not in forecast.training_flops for kind in mix):
        return 0.0
    flop = sum(times * getattr(recipe.data.batch, kind) * forecast.training_flops[kind] for kind, times in mix.items())
    return recipe.train.accumulate * flop / sum(mix.values())


def disk_of(recipe: Recipe, forecast: Plan, there: int = 0) -> int:
    """Bytes that a stage adds to the run folder until its end: checkpoints that stay, but for those that are there
    already, one that is being written, and the weights."""
    settings = recipe.train
    kept = settings.keep_checkpoints + (settings.steps // settings.keep_every if settings.keep_every else 0)
    return (max(0, kept - there) + 1) * forecast.checkpoint + forecast.trained * (forecast.held + 4)


def text_tokens(recipe: Recipe) -> list[int]:
    """Tokens that each text encoder makes of a caption, at most."""
    return [component.get("max_tokens") or DEFAULT_TEXT_TOKENS for component in recipe.text]


def stage_grids(recipe: Recipe) -> dict[str, Triple]:
    """Tokens (t, h, w) of one sample of each kind."""
    return grids_of(recipe.data, tuple(on_meta(AUTOENCODERS, recipe.autoencoder).strides), patch_of(recipe))


def largest_batch(recipe: Recipe) -> tuple[str, Triple]:
    """Kind and grid of the samples of a rank's largest batch, tokens of their captions included. Batches of other
    shapes have no more tokens."""
    grids = stage_grids(recipe)
    text = sum(text_tokens(recipe)) if recipe.subject.encoded else 0
    return max(grids.items(), key=lambda one: getattr(recipe.data.batch, one[0]) * (math.prod(one[1]) + text))


def plan_denoiser(recipe: Recipe) -> Plan:
    """Forecast of a stage that trains its denoiser."""
    autoencoder = on_meta(AUTOENCODERS, recipe.autoencoder)
    parameters: Counter[str] = Counter()
    for name, parameter in denoiser_on_meta(recipe).named_parameters():  # those of the blocks summed over the blocks
        keys = name.split(".")
        parameters[f"{keys[0]}.{keys[2]}" if len(keys) > 2 and keys[1].isdigit() else keys[0]] += parameter.numel()
    frozen = _count(autoencoder) if isinstance(autoencoder, nn.Module) else 0
    for encoder in (on_meta(TEXT_ENCODERS, component) for component in recipe.text):
        if is_trained(encoder):
            parameters["text encoders"] += _count(encoder)
        elif isinstance(encoder, nn.Module):
            frozen += _count(encoder)
    grids, text = stage_grids(recipe), text_tokens(recipe)
    counted = {kind: forward_flops(recipe.model, grid, text, *_where(recipe)) for kind, grid in grids.items()}
    flops = {kind: float(count) for kind, count in counted.items() if count is not None}
    training = {}
    for kind, grid in ((kind, grids[kind]) for kind in flops):
        levels = Counter(kept_by_blocks(recipe.model, _batch_tokens(recipe, kind, grid), *_where(recipe)))
        again = [
            n * (forward_flops(recipe.model, grid, text, *_where(recipe), level) or 0) for level, n in levels.items()
        ]
        training[kind] = 3 * flops[kind] + sum(again) / recipe.model.depth
    return Plan(
        stage=recipe.stage or "main", grids=grids, parameters=dict(parameters), frozen=frozen,
        held=bytes_of_a_number(recipe), flops=flops, training_flops=training,
    )  # fmt: skip


def plan_autoencoder(recipe: Recipe) -> Plan:
    """Forecast of a stage that trains its autoencoder; what the losses and their networks take is not in it."""
    autoencoder = on_meta(AUTOENCODERS, recipe.autoencoder)
    grids, flops = stage_grids(recipe), {}
    for kind in grids:
        frames = 1 if kind == "image" else recipe.data.frames
        clip = torch.empty(1, 3, frames, *recipe.data.size, device="meta")
        with FlopCounterMode(display=False) as counter:
            autoencoder.reconstruct(autoencoder.posterior(clip)[0])
        flops[kind] = float(counter.get_total_flops())
    sizes = {name: _count(part) for name, part in autoencoder.named_children()}
    return Plan(
        stage=recipe.stage or "main", grids=grids, parameters={name: size for name, size in sizes.items() if size},
        frozen=0, held=bytes_of_a_number(recipe), flops=flops,
        training_flops={kind: 3 * count for kind, count in flops.items()},
    )  # fmt: skip


def _count(module: Any) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def bytes_of_a_number(recipe: Recipe) -> int:
    """Of what is trained, in the trainer's precision."""
    return {"16-true": 2, "64-true": 8}.get(str(recipe.trainer.get("precision")).removeprefix("bf"), 4)


def _batch_tokens(recipe: Recipe, kind: str, grid: Triple) -> int:
    return int(getattr(recipe.data.batch, kind)) * math.prod(grid)


def _where(recipe: Recipe) -> tuple[bool, str]:
    """Whether products are done in 16 bits, and the type of the device: a GPU, unless the trainer says CPU."""
    device = "cpu" if recipe.trainer.get("accelerator") == "cpu" else "cuda"
    return "16" in str(recipe.trainer.get("precision")), device


def rough_memory(recipe: Recipe, forecast: Plan) -> int:
    """Bytes that training a denoiser takes in one process, by a rule of thumb: weights, gradients, moments and average
    in float32, and what blocks keep of the largest batch. `lingen plan` counts them."""
    tokens = max(_batch_tokens(recipe, kind, grid) for kind, grid in forecast.grids.items())
    levels = kept_by_blocks(recipe.model, tokens, *_where(recipe))
    return 20 * forecast.trained + activation_bytes(recipe.model, tokens, levels, *_where(recipe))


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
    return min(MOST, max(LEAST, 60 * math.ceil((2 * act + checkpoint + SLURM_DELAY) / 60)))


def _longest_flop(recipe: Recipe, forecast: Plan) -> float:
    """Of the longest optimiser step of a rank, or of a clip that training samples: each solver step is a forward with
    and without the text, twice for Heun."""
    asked = [kind for kind in KINDS if getattr(recipe.data.mix, kind)]
    flop = [getattr(recipe.data.batch, kind) * forecast.training_flops.get(kind, 0.0) for kind in asked]
    passes = 2 * recipe.sample.steps * (2 if recipe.sample.solver == "heun" else 1) if recipe.sample.prompts else 0
    return max(recipe.train.accumulate * max(flop), passes * max(forecast.flops.values(), default=0.0))
