"""FLOPs of a mixer: counted from the matrix products it executes, and by a closed formula that checks the count.

Both are of the plain PyTorch twins (the scan in chunks of 64 tokens), because a Triton kernel hides its products from
torch's counter; elementwise work, below 1% at a real width, is in neither.
"""

from __future__ import annotations

import json
import math
from functools import lru_cache
from typing import Any

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from lingen.blocks.layers import clamp, head_count
from lingen.blocks.temporal_swin import window_padding
from lingen.model import mixers_of
from lingen.recipe.registry import MIXERS
from lingen.recipe.sections import LinGenConfig
from lingen.recipe.sections import Triple as Grid
from lingen.recipe.signature import check_settings

Component = str | dict[str, Any]

CHUNK, GROUP = 64, 64
"""Tokens in a chunk of the plain scan, and chunks whose states are passed on in one product."""


def counted(component: Component, grid: Grid, dim: int, layer: int = 1) -> dict[str, int]:
    """FLOPs of one forward by part, counted on the meta device: nothing is computed, any size is free.

    Returns:
        name of a linear layer (``ma.in_proj``), or a module and ``products`` for what it multiplies between tokens
        (``ma products``), -> FLOPs.
    """
    with torch.device("meta"):
        mixer, x = MIXERS.build(component, dim, layer), torch.empty(1, *grid, dim)
    # Fused attention hides its products from the counter, and so do products in place, which only run without
    # autograd; the plain forms have the same ones.
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH), torch.enable_grad():
        mixer(x)
    totals = {name: sum(counts.values()) for name, counts in counter.get_flop_counts().items() if name != "Global"}
    own = {name: total - _children(name, totals) for name, total in totals.items()}
    leaves = {name for name in totals if isinstance(mixer.get_submodule(_path(name)), torch.nn.Linear)}
    return {
        _path(name) if name in leaves else f"{_path(name)} products".strip(): total
        for name, total in sorted(own.items())
        if total
    }


@lru_cache(maxsize=256)
def _flops(component: str, grid: Grid, dim: int, layer: int) -> int:
    return sum(counted(json.loads(component), grid, dim, layer).values())


def flops(component: Component, grid: Grid, dim: int, layer: int = 1) -> int:
    """All FLOPs of `counted`."""
    return _flops(json.dumps(component), grid, dim, layer % 4)


def model_flops(config: LinGenConfig, grid: Grid, text_tokens: int) -> float:
    """FLOPs of a denoiser's forward at batch 1: its mixers' counted, the matrix products around them by formula."""
    dim, n = config.dim, math.prod(grid)
    hidden = config.ffn_dim or max(64, 64 * round(2.7 * dim / 64))
    layers = [flops(component, grid, dim, layer) for component, layer in mixers_of(config)]
    # Queries and output, keys and values of the text (one of them is the null token), scores and their use.
    text = 4.0 * n * dim**2 + 4.0 * (text_tokens + 1) * dim**2 + 4.0 * n * (text_tokens + 1) * dim
    edges = 4.0 * n * config.channels * math.prod(config.patch) * dim
    return sum(layers) + config.depth * (text + 6.0 * n * dim * hidden) + edges


def _children(name: str, totals: dict[str, int]) -> int:
    """FLOPs of the modules directly inside of a module."""
    below = [other for other in totals if other.startswith(f"{name}.")]
    direct = [one for one in below if not any(one.startswith(f"{other}.") for other in below)]
    return sum(totals[one] for one in direct)


def _path(name: str) -> str:
    """The counter puts the class of the root in front: ``MATE.ma.in_proj``."""
    return name.partition(".")[2]


def closed_form(component: Component, grid: Grid, dim: int, layer: int = 1) -> float | None:
    """FLOPs of one forward by formula; None for a mixer of someone else. 2 FLOPs per multiplication and addition."""
    settings = {"name": component} if isinstance(component, str) else dict(component)
    name = settings.pop("name")
    if name not in _FORMULAS:
        return None
    filled, _ = check_settings(MIXERS[name], settings)
    return _FORMULAS[name](filled, grid, dim, layer)


def _attention(settings: dict[str, Any], grid: Grid, dim: int, layer: int) -> float:
    n = math.prod(grid)
    return 8.0 * n * dim**2 + 4.0 * n**2 * dim


def _linear_attention(settings: dict[str, Any], grid: Grid, dim: int, layer: int) -> float:
    """k v^T and its use, and the normaliser's dot product."""
    n, width = math.prod(grid), dim // head_count(dim, settings["num_heads"])
    return 8.0 * n * dim**2 + 4.0 * n * dim * width + 2.0 * n * dim


def _temporal_swin(settings: dict[str, Any], grid: Grid, dim: int, layer: int) -> float:
    """Windows are whole: those at the edges multiply their padding, too."""
    window = clamp(settings["window"], grid)
    padding = window_padding(grid, window, layer % 2 == 1)
    padded = math.prod(size + sum(pad) for size, pad in zip(grid, padding, strict=True))
    return 8.0 * math.prod(grid) * dim**2 + 4.0 * padded * math.prod(window) * dim


def _mamba2(settings: dict[str, Any], grid: Grid, dim: int, layer: int) -> float:
    """Projections; inside the chunks C B^T and its product with x; states made, used and passed on (arXiv 2405.21060,
    section 6); the state of the review tokens."""
    n, inner, state = math.prod(grid), settings["expand"] * dim, settings["state_dim"]
    keys, heads = settings["groups"] * state, inner // settings["head_dim"]
    directions = 2 if settings["bidirectional"] else 1
    chunks = -(-n // CHUNK)
    length = -(-n // chunks)
    inside = 2.0 * chunks * length**2 * (keys + inner)
    states = 4.0 * chunks * length * inner * state + _passing(chunks) * inner * state
    review = 0.0
    if settings["review"]:
        pooled = math.prod(-(-size // min(size, part)) for size, part in zip(grid, settings["review"], strict=True))
        review = 2.0 * pooled * inner * state
    projections = 2.0 * n * dim * (3 * inner + 2 * keys + heads)
    return projections + directions * (inside + states + review)


def _passing(chunks: int) -> float:
    """FLOPs per number of a state for handing the states on from chunk to chunk: groups of chunks, then groups of
    groups, so that it stays linear."""
    if chunks <= GROUP:
        return 2.0 * (chunks + 1) ** 2
    groups = -(-chunks // GROUP)
    return 2.0 * groups * GROUP + _passing(groups) + 2.0 * groups * (GROUP + 1) ** 2


def _mate(settings: dict[str, Any], grid: Grid, dim: int, layer: int) -> float:
    total = 0.0
    for branch in ("ma", "te"):
        if settings[branch]:
            own = {"name": settings[branch]} if isinstance(settings[branch], str) else dict(settings[branch])
            known = check_settings(MIXERS[own["name"]], {})[0]
            flat = {key: value for key, value in settings.items() if key in known and key != "kernel"}
            total += closed_form(flat | own, grid, dim, layer) or math.nan
    return total


_FORMULAS = {
    "attention": _attention,
    "linear_attention": _linear_attention,
    "temporal_swin": _temporal_swin,
    "mamba2": _mamba2,
    "mate": _mate,
}
