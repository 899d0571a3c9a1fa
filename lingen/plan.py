"""What a stage will take, before it runs: tokens and parameters (exact), memory and FLOPs (estimates)."""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import asdict, dataclass
from typing import Any

from lingen.config import Component, LinGenConfig, Recipe
from lingen.recipe import grids_of
from lingen.registry import AUTOENCODERS, TEXT_ENCODERS

Grid = tuple[int, int, int]

KEPT_BYTES = {"mate": 460, "mamba2": 400, "temporal_swin": 170, "attention": 145}
"""What a block of this mixer keeps for the backward pass in float32, in bytes per token and unit of width: tensors that
autograd saved, at width 256 with plain PyTorch kernels [ours]. A mixer of someone else is taken for the largest."""
SIXTEEN_BIT = 0.85
"""Share of it in 16 bits: the SSD's sums stay in float32."""
CHUNK = 64
"""Length of the chunks of the SSD's matmul form (arXiv 2405.21060, section 6), in tokens [ours]."""
PEAK_FLOPS = {"H100": 989e12, "H200": 989e12, "B200": 2250e12, "A100": 312e12, "L40S": 362e12, "RTX 4090": 165e12}
"""Dense bfloat16 FLOP/s by the makers' data sheets, for the share of it that training reaches (MFU)."""
TEXT_TOKENS = 256
"""Tokens of a text encoder that does not say `max_tokens` [ours]."""


@dataclass(frozen=True, kw_only=True)
class Plan:
    """A stage's forecast for one rank that holds the whole model, not sharded."""

    stage: str
    grids: dict[str, Grid]
    """Tokens (t, h, w) of one sample of each kind."""
    parameters: dict[str, int]
    """Trained parameters of each part."""
    frozen: int
    """Parameters of the autoencoder and the text encoders that are not trained."""
    memory: dict[str, int]
    """Bytes: weights, averaged weights, gradients and optimiser, activations of the largest batch."""
    flops: dict[str, float]
    """Of one forward pass over one sample of each kind; training takes about 3 times this, 4 with checkpointing."""

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
    import torch
    from torch import nn

    from lingen.model import LinGen

    with torch.device("meta"):
        model = LinGen(recipe.model)
        autoencoder = AUTOENCODERS.build(recipe.autoencoder)
        encoders = [TEXT_ENCODERS.build(component) for component in recipe.text]
    parameters = _by_part(model)
    frozen = _count(autoencoder) if isinstance(autoencoder, nn.Module) else 0
    for encoder in encoders:
        if getattr(encoder, "trainable", False):
            parameters["text encoders"] += _count(encoder)
        elif isinstance(encoder, nn.Module):
            frozen += _count(encoder)
    grids = grids_of(recipe.data, tuple(autoencoder.strides), recipe.model.patch)
    per_token = parameters["blocks.mixer"] + parameters["blocks.ffn"]
    return Plan(
        stage=recipe.stage or "main",
        grids=grids,
        parameters=dict(parameters),
        frozen=frozen,
        memory=_memory(recipe, sum(parameters.values()), grids),
        flops={kind: _flops(recipe, per_token, grid) for kind, grid in grids.items()},
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


def _memory(recipe: Recipe, trained: int, grids: dict[str, Grid]) -> dict[str, int]:
    """float32 weights, averaged copy, gradients and two moments; activations in the trainer's precision."""
    precision = str(recipe.trainer.get("precision", "32-true"))
    width = 2 if "16" in precision else 4
    held = width if precision.endswith("16-true") else 4
    values = recipe.model.dim * max(math.prod(grid) * getattr(recipe.data.batch, kind) for kind, grid in grids.items())
    blocks = [KEPT_BYTES.get(mixer["name"], max(KEPT_BYTES.values())) for mixer in _layers(recipe.model)]
    share = SIXTEEN_BIT if width == 2 else 1
    # With checkpointing, the input of every block and the inside of one.
    kept = max(blocks) * share + 4 * len(blocks) if recipe.model.checkpointing else sum(blocks) * share
    return {
        "weights": held * trained,
        "averaged weights": 4 * trained,
        "gradients and optimiser": 3 * held * trained,
        "activations": int(values * kept),
    }


def _flops(recipe: Recipe, per_token: int, grid: Grid) -> float:
    """2 FLOPs per weight and token (arXiv 2001.08361, section 2.1), plus what the mixers do between tokens."""
    config, tokens = recipe.model, math.prod(grid)
    between = sum(_between_tokens(component, config, grid) for component in _layers(config))
    text = sum(component.get("max_tokens") or TEXT_TOKENS for component in recipe.text)
    # Queries, output and the scores; keys and values of the text are few.
    cross = config.depth * (4 * config.dim**2 + 4 * text * config.dim)
    edges = 4 * config.channels * math.prod(config.patch) * config.dim
    return float(tokens) * (2 * per_token + between + cross + edges)


def _layers(config: LinGenConfig) -> list[Component]:
    """The mixer of each block."""
    mixers = config.mixer if isinstance(config.mixer, list) else [config.mixer]
    return [mixers[layer % len(mixers)] for layer in range(config.depth)]


def _between_tokens(component: Component, config: LinGenConfig, grid: Grid) -> float:
    """FLOPs per token of mixing tokens, beyond the projections; 0 for a mixer of someone else."""
    name = component["name"]
    if name == "mate":
        branches = [component.get(branch) for branch in ("ma", "te")]
        parts = [{"name": branch} if isinstance(branch, str) else branch for branch in branches if branch]
        return sum(_between_tokens({**component, **part}, config, grid) for part in parts)
    if name == "attention":
        return 4.0 * math.prod(grid) * config.dim
    if name == "temporal_swin":
        return 4.0 * math.prod(map(min, component["window"], grid)) * config.dim
    if name == "mamba2":
        inner, state = component["expand"] * config.dim, component["state_dim"]
        review = 1 + (1 / math.prod(component["review"]) if component["review"] else 0)
        directions = 2 if component["bidirectional"] else 1
        return directions * review * (2 * CHUNK * (component["groups"] * state + inner) + 4 * state * inner)
    return 0.0
