"""Optimisers, decays of the learning rate and losses that a recipe names; their contracts: `lingen.recipe.registry`."""

import math
from collections.abc import Callable
from typing import Annotated, Any

import torch
from torch import Tensor, nn

from lingen.recipe.bounds import COURSE, IDENTITY, Above, AtLeast, Between
from lingen.recipe.signature import checked

Groups = list[dict[str, Any]]


@checked
def adamw(
    params: Groups, *, eps: Annotated[float, Above(0), COURSE, "added to the root of the second moment"] = 1e-8
) -> torch.optim.AdamW:
    """Adam with decoupled weight decay (arXiv 1711.05101)."""
    return torch.optim.AdamW(params, eps=eps)


@checked
class Muon(torch.optim.Optimizer):
    """Orthogonal updates (torch.optim.Muon) as large as AdamW's (arXiv 2502.16982), in bfloat16, for the matrices that
    weight decay pulls at; AdamW for all else."""

    def __init__(
        self, params: Groups, *, momentum: Annotated[float, Between(0, 1), COURSE, "what stays of the old one"] = 0.95
    ):
        super().__init__(params, {})
        none = [nn.Parameter(torch.zeros(1, 1))]
        self._muon = torch.optim.Muon(none, momentum=momentum, adjust_lr_fn="match_rms_adamw")
        self._adamw = torch.optim.AdamW(none)

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:  # type: ignore[override]
        """Moves every parameter that has a gradient."""
        with torch.enable_grad():
            loss = closure() if closure is not None else None
        for group in self.param_groups:
            for one in (self._muon, self._adamw):
                own = [p for p in group["params"] if (group["decays"] and p.ndim == 2) == (one is self._muon)]
                one.param_groups, one.state = [{**one.defaults, **group, "params": own}], self.state
                one.step()
        return loss


def constant(step: int, steps: int) -> float:
    """The peak learning rate to the end."""
    return 1.0


def cosine(step: int, steps: int) -> float:
    """Half a cosine, to 0 (arXiv 1608.03983)."""
    return 0.5 * (1 + math.cos(math.pi * step / max(1, steps)))


@checked
def wsd(
    step: int, steps: int, *, share: Annotated[float, Between(0.001, 1), COURSE, "of the steps that decay"] = 0.2
) -> float:
    """The peak learning rate, at the end 1 - sqrt(share of the decay) (arXiv 2405.18392)."""
    length = share * max(1, steps)
    return 1 - math.sqrt(max(0.0, step - max(1, steps) + length) / length)


@checked
class SquaredError(nn.Module):
    """The mean squared error (Movie Gen, arXiv 2410.13720, section 3.1.2), times a weight by time."""

    def __init__(
        self, *, by_time: Annotated[tuple[float, ...] | None, AtLeast(0), IDENTITY,
                                    "weights at times evenly spaced from 0 (noise) to 1 (data)"] = None,
    ):  # fmt: skip
        super().__init__()
        self.by_time = by_time

    def forward(self, velocity: Tensor, target: Tensor, time: Tensor) -> Tensor:
        losses = (velocity - target).square().flatten(1).mean(1)
        if not self.by_time:
            return losses
        weights = torch.tensor([*self.by_time, self.by_time[-1]]).to(time)
        place = time * (len(self.by_time) - 1)
        low = place.long()
        return losses * torch.lerp(weights[low], weights[low + 1], place - low)


@checked
class Huber(nn.Module):
    """The mean of half the squared error where it is below `delta`, from where it grows linearly."""

    def __init__(self, *, delta: Annotated[float, Above(0), IDENTITY, "of an error"] = 1.0):
        super().__init__()
        self.delta = delta

    def forward(self, velocity: Tensor, target: Tensor, time: Tensor) -> Tensor:
        return nn.functional.huber_loss(velocity, target, reduction="none", delta=self.delta).flatten(1).mean(1)
