"""FLOPs of a mixer by closed formulas: what the counted ones are held to."""

from __future__ import annotations

import math
from typing import Any

from lingen.blocks.layers import clamp, head_count
from lingen.blocks.temporal_swin import window_padding
from lingen.recipe.registry import MIXERS
from lingen.recipe.signature import check_settings

Grid = tuple[int, int, int]
Component = str | dict[str, Any]

CHUNK, GROUP, BLOCK = 64, 64, 256
"""Tokens in a chunk of the plain scan, chunks whose states are passed on in one product, and tokens that linear
attention sums over in one product."""


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
    """k v^T, in blocks of equal length, and its use, and the normaliser's dot product."""
    n, width = math.prod(grid), dim // head_count(dim, settings["num_heads"])
    blocks = -(-n // BLOCK)
    padded = blocks * -(-n // blocks)
    return 8.0 * n * dim**2 + 2.0 * (padded + n) * dim * width + 2.0 * n * dim


def _temporal_swin(settings: dict[str, Any], grid: Grid, dim: int, layer: int) -> float:
    """Windows are whole: those at the edges multiply their padding, too."""
    window = clamp(settings["window"], grid)
    padding = window_padding(grid, window, layer % 2 == 1)
    padded = math.prod(size + sum(pad) for size, pad in zip(grid, padding, strict=True))
    return 8.0 * math.prod(grid) * dim**2 + 4.0 * padded * math.prod(window) * dim


def _mamba2(settings: dict[str, Any], grid: Grid, dim: int, layer: int) -> float:
    """Projections; inside the chunks C B^T and its product with x; states made, used and passed on (arXiv 2405.21060,
    section 6); the state of the review tokens. One chunk alone makes no state, and only uses the review's."""
    n, inner, state = math.prod(grid), settings["expand"] * dim, settings["state_dim"]
    keys = settings["groups"] * state
    directions = 2 if settings["bidirectional"] else 1
    chunks = -(-n // CHUNK)
    length = -(-n // chunks)
    total = chunks * length
    inside = 2.0 * total * length * (keys + inner)
    made = 2.0 * total * inner * state + _passing(chunks) * inner * state if chunks > 1 else 0.0
    used = 2.0 * total * inner * state if chunks > 1 or settings["review"] else 0.0
    review = 2.0 * _pooled(settings, grid) * inner * state
    return _projections(settings, n, dim) + directions * (inside + made + used + review)


def triton_form(settings: dict[str, Any], grid: Grid, dim: int, longest: int = 256) -> float:
    """Of Mamba2 with its Triton kernels, for chunks of at most `longest` tokens: C B^T is shared by the directions,
    and of the four products of halves of a chunk each direction leaves out one."""
    settings = check_settings(MIXERS["mamba2"], settings)[0]
    n, inner, state = math.prod(grid), settings["expand"] * dim, settings["state_dim"]
    directions = 2 if settings["bidirectional"] else 1
    rows, chunk = _whole_chunks(n, longest)
    shared = 2.0 * rows * chunk * settings["groups"] * state
    inside = (2 + directions) * 2.0 * rows * (chunk // 2) * inner / 2
    states = directions * 4.0 * rows * inner * state
    pooled = _pooled(settings, grid)
    review = directions * 2.0 * _whole_chunks(pooled, longest)[0] * inner * state if pooled else 0.0
    return _projections(settings, n, dim) + shared + inside + states + review


def _projections(settings: dict[str, Any], n: int, dim: int) -> float:
    inner, keys = settings["expand"] * dim, settings["groups"] * settings["state_dim"]
    return 2.0 * n * dim * (3 * inner + 2 * keys + inner // settings["head_dim"])


def _pooled(settings: dict[str, Any], grid: Grid) -> int:
    """Review tokens."""
    if not settings["review"]:
        return 0
    return math.prod(-(-size // min(size, part)) for size, part in zip(grid, settings["review"], strict=True))


def _whole_chunks(n: int, longest: int) -> tuple[int, int]:
    """Rows in whole chunks, and the length of a chunk: a power of two from 32 on."""
    chunk = min(longest, max(32, 1 << (n - 1).bit_length()))
    return -(-n // chunk) * chunk, chunk


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
