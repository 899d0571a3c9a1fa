"""Optimisers, decays of the learning rate and losses that a recipe names; their contracts: `lingen.recipe.registry`."""

import math
from collections import defaultdict
from collections.abc import Callable
from typing import Annotated, Any, cast

import torch
from jaxtyping import Float
from torch import Tensor, nn

from lingen.recipe.bounds import COURSE, IDENTITY, Above, AtLeast, Between
from lingen.recipe.signature import checked

Groups = list[dict[str, Any]]
MOVED_TOGETHER = 2**26
"""Numbers of matrices that Muon moves together; those of the largest models in several turns [ours]."""


@checked
def adamw(
    params: Groups, *, eps: Annotated[float, Above(0), COURSE, "added to the root of the second moment"] = 1e-8
) -> torch.optim.AdamW:
    """Adam with decoupled weight decay (arXiv 1711.05101)."""
    return torch.optim.AdamW(params, eps=eps)


@checked
class Muon(torch.optim.Optimizer):
    """Orthogonal updates (Jordan et al. 2024, kellerjordan.github.io/posts/muon; as torch.optim.Muon), as large as
    AdamW's (arXiv 2502.16982), for the matrices that weight decay pulls at; AdamW for all else. Matrices of one shape
    move together, and a step may be part of a CUDA graph."""

    def __init__(
        self, params: Groups, *, momentum: Annotated[float, Between(0, 1), COURSE, "what stays of the old one"] = 0.95
    ):
        super().__init__(params, {})
        self.momentum = momentum
        self._adamw = torch.optim.AdamW([nn.Parameter(torch.zeros(1))])

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:  # type: ignore[override]
        """Moves every parameter that has a gradient; none where somebody has set `found_inf` (float32 []) to 1, as
        torch's GradScaler does."""
        with torch.enable_grad():
            loss = closure() if closure is not None else None
        if (bad := getattr(self, "found_inf", None)) is not None:
            self._adamw.found_inf = bad  # type: ignore[attr-defined]
        for group in self.param_groups:
            alike: dict[torch.Size, list[Tensor]] = defaultdict(list)
            others: list[Tensor] = []
            for one in group["params"]:
                own = alike[one.shape] if group["decays"] and one.ndim == 2 else others
                own += [one] if one.grad is not None else []
            self._adamw.state, defaults = self.state, self._adamw.defaults
            self._adamw.param_groups = [{**defaults, **group, "params": others}]
            self._adamw.step()
            for shape, matrices in alike.items():
                few = max(1, MOVED_TOGETHER // shape.numel())
                for at in range(0, len(matrices), few):
                    self._move(matrices[at : at + few], group["lr"], group["weight_decay"], bad)
        self._adamw.__dict__.pop("found_inf", None)
        return loss

    def _move(self, matrices: list[Tensor], rate: Tensor | float, decay: float, bad: Tensor | None) -> None:
        """Moves matrices of one shape. The rate is a tensor always, so that a graph rounds as everything else does."""
        shape, keep = matrices[0].shape, self.momentum
        held = [self.state[one].setdefault("momentum_buffer", torch.zeros_like(one)) for one in matrices]
        old, new = torch.stack(held), torch.stack([cast(Tensor, one.grad) for one in matrices])
        rate = rate.clone() if isinstance(rate, Tensor) else torch.full((), rate, device=old.device)
        if bad is not None:
            rate, new = rate * (1 - bad), torch.where(bad > 0, old, new)
        old = old.lerp(new, 1 - keep)
        torch._foreach_copy_(held, old.unbind())
        update = orthogonal(new.lerp(old, keep)).to(old) * (rate * 0.2 * max(shape) ** 0.5)
        torch._foreach_mul_(matrices, 1 - rate * decay)
        torch._foreach_sub_(matrices, update.unbind())


def orthogonal(matrices: Float[Tensor, "n a b"]) -> Float[Tensor, "n a b"]:
    """The nearest orthogonal matrix of each, roughly (singular values of 0.5 to 1.5): five steps of Newton and Schulz
    with Muon's factors (Jordan et al. 2024). In bfloat16, and on a CPU in float32: one without instructions for
    bfloat16 takes 20 times as long."""
    is_tall = matrices.shape[1] > matrices.shape[2]
    now = (matrices.mT if is_tall else matrices).to(torch.float32 if matrices.is_cpu else torch.bfloat16)
    now = now / now.norm(dim=(1, 2), keepdim=True).clamp(min=1e-7)
    for _ in range(5):
        gram = now @ now.mT
        now = torch.baddbmm(now, torch.baddbmm(gram, gram, gram, beta=-4.775, alpha=2.0315), now, beta=3.4445)
    return now.mT if is_tall else now


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
