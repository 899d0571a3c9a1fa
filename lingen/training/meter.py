"""Running means and counts between two lines of the log."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor


class Meter:
    """Sums that stay on the device until they are read, so that logging does not make the GPU wait at every step."""

    def __init__(self) -> None:
        self._means: dict[str, tuple[Tensor, int]] = {}
        self._counts: dict[str, float] = {}

    def add(self, name: str, values: Tensor) -> None:
        """Takes a vector of observations into the mean `name`."""
        if len(values) == 0:
            return
        total, count = self._means.get(name, (torch.zeros((), device=values.device), 0))
        self._means[name] = (total + values.detach().float().sum(), count + len(values))

    def count(self, name: str, amount: float) -> None:
        """Adds to the sum `name`."""
        self._counts[name] = self._counts.get(name, 0) + amount

    def flush(self, gather: Callable[[dict[str, Any]], list[dict[str, Any]]] | None = None) -> dict[str, float]:
        """Means and sums since the last flush, and a fresh start.

        Args:
            gather: this rank's raw sums -> those of all ranks; ranks may have seen different names.
        """
        raw = {name: (float(total), count) for name, (total, count) in self._means.items()}
        raw |= {name: (float(amount), 0) for name, amount in self._counts.items()}
        self._means, self._counts = {}, {}
        merged: dict[str, tuple[float, int]] = {}
        for part in gather(raw) if gather else [raw]:
            for name, (total, count) in part.items():
                before = merged.get(name, (0.0, 0))
                merged[name] = (before[0] + total, before[1] + count)
        return {name: total / count if count else total for name, (total, count) in sorted(merged.items())}
