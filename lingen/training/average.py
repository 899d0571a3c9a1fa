"""Averaged weights (EMA), with which clips are sampled and validation losses computed."""

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from lingen.recipe.sections import PowerAverage


class AveragedWeights:
    """Exponential moving average of named parameters, kept in float32 on each parameter's device.

    The decay of update n is min(decay, (1 + n) / (10 + n)), or by a power function (1 - 1 / (n + 1))^(g + 1), which
    gives weights s steps into a stage of t a share of s^(g + 1) - (s - 1)^(g + 1) in t^(g + 1) (EDM2, arXiv 2312.02696,
    section 3.1). n is counted from 0 at the start of a stage, so that neither the initialisation nor the previous stage
    stays in the average (docs/facts.md, "Averaged weights over a hand-over"). Works on shards too: every operation is
    element-wise.

    Args:
        parameters: name -> parameter; the average starts as a copy of them.
        decay: 0..1, the largest decay; or the width of a power function, of which g follows."""

    def __init__(self, parameters: Mapping[str, Tensor], decay: float | PowerAverage):
        self.decay = decay
        self.updates = 0
        self._parameters = parameters
        self._average = {name: p.detach().to(torch.float32, copy=True) for name, p in parameters.items()}

    @torch.no_grad()
    def update(self) -> None:
        """Moves the average towards the parameters as they are now."""
        self._move(self.share(self.updates))
        self.updates += 1

    @torch.no_grad()
    def move(self, share: Tensor) -> None:
        """`update` by a share on the device, which a graph may read; whoever calls it counts the update."""
        self._move([share] * len(self._average))

    def _move(self, share: Any) -> None:
        live = [p.detach().float() for p in self._parameters.values()]
        torch._foreach_lerp_(list(self._average.values()), live, share)

    def share(self, n: int) -> float:
        """Of the way to the parameters that update n goes."""
        if isinstance(self.decay, PowerAverage):
            return 1 - (n / (n + 1)) ** (power_of_width(self.decay.width) + 1)
        return 1 - min(self.decay, (1 + n) / (10 + n))

    @contextmanager
    def applied(self) -> Iterator[None]:
        """Inside the block the parameters hold the averaged values; afterwards the trained ones again."""
        trained = {name: p.detach().clone() for name, p in self._parameters.items()}
        self._fill(self._average)
        try:
            yield
        finally:
            self._fill(trained)

    @torch.no_grad()
    def _fill(self, values: dict[str, Tensor]) -> None:
        for name, parameter in self._parameters.items():
            parameter.copy_(values[name])

    def weights(self) -> dict[str, Tensor]:
        """name -> averaged float32 tensor."""
        return dict(self._average)


def power_of_width(width: float) -> float:
    """The power g whose average has a relative standard deviation of `width` (EDM2, section 3.1), which is
    sqrt((g + 1) / (g + 3)) / (g + 2) and falls in g. By halving, from g = 0 (width 0.289) on."""
    low, high = 0.0, 1 / width
    for _ in range(60):
        middle = (low + high) / 2
        is_wide = math.sqrt((middle + 1) / (middle + 3)) / (middle + 2) > width
        low, high = (middle, high) if is_wide else (low, middle)
    return low
