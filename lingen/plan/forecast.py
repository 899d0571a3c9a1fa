"""Forecast of a stage: tokens, parameters and FLOPs are counted, memory is estimated."""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import asdict, dataclass
from typing import Any

from lingen.frozen import on_meta
from lingen.recipe.registry import AUTOENCODERS, TEXT_ENCODERS
from lingen.recipe.sections import Component, LinGenConfig, Recipe, Triple
from lingen.recipe.sizes import grids_of, patch_of

KEPT_BYTES = {
    "cpu": {"mate": 460, "mamba2": 400, "temporal_swin": 170, "attention": 145, "linear_attention": 160},
    "cuda": {"mate": 148, "mamba2": 132, "temporal_swin": 94, "attention": 110},
}
"""What a block of this mixer keeps for the backward pass in float32, in bytes per token and unit of width, by the type
of device: tensors that autograd saved, at width 256, with plain PyTorch on a CPU and the Triton kernels on an H100
[ours]. Other devices count as a CPU, mixers of third parties as the largest entry."""
SIXTEEN_BIT = {"cpu": 0.85, "cuda": 0.65}
"""The factor on it in 16 bits: with plain PyTorch the SSD's sums stay float32, on CUDA the residual stream does."""
INPUT_BYTES = 4
"""Bytes of each number of a recomputed block's input: the residual stream is float32 in training."""
PEAK_FLOPS = {"H100": 989e12, "H200": 989e12, "B200": 2250e12, "A100": 312e12, "L40S": 362e12, "RTX 4090": 165e12}
"""Dense bfloat16 FLOP/s by the makers' data sheets, for the share of it that training reaches (MFU)."""
TEXT_TOKENS = 256
"""Tokens of a text encoder that does not say `max_tokens` [ours]."""


@dataclass(frozen=True, kw_only=True)
class Plan:
    """A stage's forecast for one rank that holds the whole model, not sharded."""

    stage: str
    grids: dict[str, Triple]
    """Tokens (t, h, w) of one sample of each kind."""
    parameters: dict[str, int]
    """Trained parameters of each part."""
    frozen: int
    """Parameters of the autoencoder and the text encoders that are not trained."""
    memory: dict[str, int]
    """Bytes: weights, averaged weights, gradients and optimiser, activations of the largest batch."""
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
    def trained(self) -> int:
        """All trained parameters."""
        return sum(self.parameters.values())

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {**asdict(self), "tokens": self.tokens, "trained": self.trained}


def peak_flops(device_name: str) -> float | None:
    """FLOP/s of a GPU by its name; None where it is not known."""
    return next((peak for name, peak in PEAK_FLOPS.items() if name in device_name), None)


def plan(recipe: Recipe) -> Plan:
    """Forecast of a loaded stage (`load_recipe` with a stage, or of a recipe without stages)."""
    forecast: Plan = recipe.subject.plan(recipe)
    return forecast


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
        if getattr(encoder, "trainable", False):
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
        memory=_memory(recipe, sum(parameters.values()), grids),
        flops=flops,
        training_flops={kind: flops[kind] * (3 + _recomputed_share(recipe, kind, grids[kind])) for kind in flops},
    )


def recomputed_blocks(config: LinGenConfig, tokens: int, sixteen_bit: bool, device: str = "cpu") -> int:
    """How many blocks, from the first on, keep only their input and are computed again in the backward pass.

    `checkpointing` true is all and false none; a number of GiB is the fewest with which the activations fit into it, or
    all but the last, where even that is too much: the last one would be computed again at once, and save nothing.

    Args:
        tokens: of all samples of the batch on this rank.
        sixteen_bit: whether matrix products are done in 16 bits.
        device: type of the device.
    """
    if isinstance(config.checkpointing, bool):
        return config.depth if config.checkpointing else 0
    target = config.checkpointing * 2**30
    fits = (k for k in range(config.depth) if activation_bytes(config, tokens, k, sixteen_bit, device) <= target)
    return next(fits, config.depth - 1)


def activation_bytes(config: LinGenConfig, tokens: int, recomputed: int, sixteen_bit: bool, device: str = "cpu") -> int:
    """What the blocks keep for the backward pass at its peak, where the first `recomputed` of them keep their input.

    The backward pass begins with the last block. By the time that the first ones are computed again, one by one, what
    the others kept is gone; so recomputing the first ones costs nothing on top, and the peak is either the one or the
    other.
    """
    table = KEPT_BYTES.get(device, KEPT_BYTES["cpu"])
    share = SIXTEEN_BIT.get(device, SIXTEEN_BIT["cpu"]) if sixteen_bit else 1
    blocks = [share * table.get(_name(mixer), max(table.values())) for mixer in _layers(config)]
    inside = max(sum(blocks[recomputed:]), *blocks[:recomputed], 0)
    return int(tokens * config.dim * (INPUT_BYTES * recomputed + inside))


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


def _memory(recipe: Recipe, trained: int, grids: dict[str, Triple]) -> dict[str, int]:
    """float32 weights, averaged copy, gradients and two moments; activations in the trainer's precision."""
    held = 2 if str(recipe.trainer.get("precision")).endswith("16-true") else 4
    largest = max(_batch_tokens(recipe, kind, grid) for kind, grid in grids.items())
    recomputed = recomputed_blocks(recipe.model, largest, *_where(recipe))
    return {
        "weights": held * trained,
        "averaged weights": 4 * trained,
        "gradients and optimiser": 3 * held * trained,
        "activations": activation_bytes(recipe.model, largest, recomputed, *_where(recipe)),
    }


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

    text = [component.get("max_tokens") or TEXT_TOKENS for component in recipe.text]
    counted = {kind: forward_flops(recipe.model, grid, text, *_where(recipe)) for kind, grid in grids.items()}
    return {kind: float(count) for kind, count in counted.items() if count is not None}


def _name(component: Component | str) -> str:
    return component if isinstance(component, str) else component["name"]


def _layers(config: LinGenConfig) -> list[Component]:
    """The mixer of each block."""
    mixers = config.mixer if isinstance(config.mixer, list) else [config.mixer]
    return [mixers[layer % len(mixers)] for layer in range(config.depth)]
