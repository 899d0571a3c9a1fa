"""Averaged weights (EMA), with which clips are sampled and validation losses computed."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor


class AveragedWeights:
    """Exponential moving average of named parameters, kept in float32 on each parameter's device.

    The decay of update n is min(decay, (1 + n) / (10 + n)), n counted from the start of a stage, so that neither the
    initialisation nor the previous stage stays in the average (docs/facts.md, "Averaged weights over a hand-over").
    Works on shards too: every operation is element-wise.

    Args:
        parameters: name -> parameter; the average starts as a copy of them.
        decay: 0..1, the largest decay.
    """

    def __init__(self, parameters: Mapping[str, Tensor], decay: float):
        self.decay = decay
        self.updates = 0
        self._parameters = parameters
        self._average = {name: p.detach().to(torch.float32, copy=True) for name, p in parameters.items()}

    @torch.no_grad()
    def update(self) -> None:
        """Moves the average towards the parameters as they are now."""
        decay = min(self.decay, (1 + self.updates) / (10 + self.updates))
        self.updates += 1
        live = [p.detach().float() for p in self._parameters.values()]
        torch._foreach_lerp_(list(self._average.values()), live, 1 - decay)

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
