"""FLOPs of a mixer, counted from the matrix products that it executes; a test holds the counts to closed formulas.

Counted are the plain PyTorch twins (the scan in chunks of 64 tokens), because a Triton kernel hides its products from
torch's counter; elementwise work, below 1% at a real width, is left out.
"""

from __future__ import annotations

import json
import math
from functools import lru_cache
from typing import Any

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from lingen.model import mixers_of
from lingen.recipe.registry import MIXERS
from lingen.recipe.sections import LinGenConfig, Triple

Component = str | dict[str, Any]


def counted(component: Component, grid: Triple, dim: int, layer: int = 1) -> dict[str, int]:
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
def _flops(component: str, grid: Triple, dim: int, layer: int) -> int:
    return sum(counted(json.loads(component), grid, dim, layer).values())


def flops(component: Component, grid: Triple, dim: int, layer: int = 1) -> int:
    """All FLOPs of `counted`."""
    return _flops(json.dumps(component), grid, dim, layer % 4)


def model_flops(config: LinGenConfig, grid: Triple, text_tokens: int) -> float:
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
    """The counter's names begin with the root's class: ``MATE.ma.in_proj``."""
    return name.partition(".")[2]
