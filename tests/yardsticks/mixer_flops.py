"""FLOPs of a mixer by part, counted as `lingen.plan.flops` counts those of a whole denoiser."""

from collections.abc import Sequence

import torch
from torch import nn

from lingen.plan.flops import flops_inside
from lingen.recipe.registry import MIXERS
from lingen.recipe.sections import Component, Triple


def mixer_flops(
    component: str | Component, dim: int, layer: int, grid: Triple, sixteen_bit: bool = False, device: str = "cpu"
) -> dict[str, int]:
    """FLOPs of a mixer's forward for one sample by part, see `flops_by_part`."""
    with torch.device("meta"):
        mixer = MIXERS.build(component, dim, layer)
    return flops_by_part(mixer, (1, *grid, dim), sixteen_bit, device)


def flops_by_part(
    module: nn.Module, size: Sequence[int], sixteen_bit: bool = False, device: str = "cpu"
) -> dict[str, int]:
    """FLOPs of a module on the meta device for an input of this size.

    Returns:
        name of a linear layer (``ma.in_proj``), or a module and ``products`` for what it multiplies itself
        (``ma products``), -> FLOPs; the sum is all of them.
    """
    totals = flops_inside(module, lambda dtype: (torch.empty(*size, dtype=dtype),), sixteen_bit, device)
    own = {name: total - _children(name, totals) for name, total in totals.items()}
    leaves = {name for name in totals if isinstance(module.get_submodule(name), nn.Linear)}
    return {
        name if name in leaves else f"{name} products".strip(): total for name, total in sorted(own.items()) if total
    }


def _children(name: str, totals: dict[str, int]) -> int:
    """FLOPs of the modules directly inside of a module."""
    below = [other for other in totals if other != name and (not name or other.startswith(f"{name}."))]
    direct = [one for one in below if not any(one.startswith(f"{other}.") for other in below)]
    return sum(totals[one] for one in direct)
