"""``lingen bench stock``: MATE's branches without their projections, ours and of stock parts."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from lingen.recipe.registry import MIXERS
from lingen.recipe.sections import Triple

from .build import built
from .place import Place
from .results import Results
from .stock import StockMamba2, StockSwin
from .targets import MA, TESA
from .training import compared, on_cuda_compiled


class Core(nn.Module):
    """A mixer without its two projections, as a function of what the first one gives."""

    def __init__(self, mixer: Any):
        super().__init__()
        self.mixer, self.inner = mixer, mixer.out_proj.in_features
        mixer.in_proj, mixer.out_proj = _Given(), nn.Identity()

    def forward(self, projected: Tensor) -> Tensor:
        """[b t h w in_proj's width] -> [b t h w out_proj's width]."""
        self.mixer.in_proj.projected = projected
        out: Tensor = self.mixer(projected[..., : self.inner])  # only its grid is looked at
        return out


class _Given(nn.Module):
    projected: Tensor

    def forward(self, x: Tensor) -> Tensor:
        return self.projected


def bench_branches(
    mate: dict[str, Any], dim: int, grids: Sequence[Triple], place: Place, results: Results, layer: int = 1
) -> None:
    """Rows of ours (kernel auto) and of stock parts (compiled) for the MA-branch and a shifted TESA, in equal rounds.

    Args:
        mate: the mixer, whose settings are those of its branches.
        layer: an odd one shifts its windows; 1 reads the grid in the order twh.
    """
    for grid in grids:
        torch.compiler.reset()
        for name, branch, other, stock in ((MA, "ma", "te", StockMamba2), (TESA, "te", "ma", StockSwin)):
            results.say(f"{name}, {grid[0]}x{grid[1]}x{grid[2]} tokens")
            ours = getattr(built(partial(MIXERS.build, {**mate, other: None}, dim, layer), place), branch)
            x = torch.randn(1, *grid, ours.in_proj.out_features, device=place.device, dtype=place.dtype)
            runs = {"stock": on_cuda_compiled(stock(ours).core, place), "auto": Core(ours)}
            for kernel, row in compared(runs, [x], ours.parameters(), place).items():
                results.add({"name": name, "mixer": branch, "kernel": kernel, "dim": dim, "layer": layer} | row)
