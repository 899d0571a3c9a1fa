"""FLOPs of a mixer by closed formulas: what the counted ones are held to."""

from __future__ import annotations

import math
from typing import Any

from lingen.bench.flops import Component
from lingen.blocks.layers import clamp, head_count
from lingen.blocks.temporal_swin import window_padding
from lingen.recipe.registry import MIXERS
from lingen.recipe.sections import Triple
from lingen.recipe.signature import check_settings

CHUNK, GROUP = 64, 64
"""Tokens in a chunk of the plain scan, and chunks whose states are passed on in one product."""


def closed_form(component: Component, grid: Triple, dim: int, layer: int = 1) -> float | None:
    """FLOPs of one forward by formula; None for a mixer of someone else. 2 FLOPs per multiplication and addition."""
    settings = {"name": component} if isinstance(component, str) else dict(component)
    name = settings.pop("name")
    if name not in _FORMULAS:
        return None
    filled, _ = check_settings(MIXERS[name], settings)
    return _FORMULAS[name](filled, grid, dim, layer)


def _attention(settings: dict[str, Any], grid: Triple, dim: int, layer: int) -> float:
    n = math.prod(grid)
    return 8.0 * n * dim**2 + 4.0 * n**2 * dim


def _linear_attention(settings: dict[str, Any], grid: Triple, dim: int, layer: int) -> float:
    """k v^T and its use, and the normaliser's dot product."""
    n, width = math.prod(grid), dim // head_count(dim, settings["num_heads"])
    return 8.0 * n * dim**2 + 4.0 * n * dim * width + 2.0 * n * dim


def _temporal_swin(settings: dict[str, Any], grid: Triple, dim: int, layer: int) -> float:
    """Windows are whole: those at the edges multiply their padding, too."""
    window = clamp(settings["window"], grid)
    padding = window_padding(grid, window, layer % 2 == 1)
    padded = math.prod(size + sum(pad) for size, pad in zip(grid, padding, strict=True))
    return 8.0 * math.prod(grid) * dim**2 + 4.0 * padded * math.prod(window) * dim


def _mamba2(settings: dict[str, Any], grid: Triple, dim: int, layer: int) -> float:
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


def _mate(settings: dict[str, Any], grid: Triple, dim: int, layer: int) -> float:
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
