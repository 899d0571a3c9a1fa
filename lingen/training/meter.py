"""Running means and counts between two lines of the log."""

import torch
from torch import Tensor

from lingen.ranks.collectives import gather_objects


class Meter:
    """Sums that stay on the device until they are read, so that logging does not make the GPU wait at every step."""

    def __init__(self) -> None:
        self._sums: dict[str, Tensor] = {}
        """Name -> sum and number of its observations."""
        self._open: list[tuple[str, Tensor]] = []
        """The same of a step that may yet be thrown away."""
        self._counts: dict[str, float] = {}

    def add(self, name: str, values: Tensor, where: Tensor | None = None) -> None:
        """Takes a vector of observations into the mean `name`; of them those that the vector `where` picks."""
        values = values.detach().float()
        picked = torch.ones_like(values, dtype=torch.bool) if where is None else where
        self._open.append((name, torch.stack([values.where(picked, 0).sum(), picked.float().sum()])))

    def count(self, name: str, amount: float) -> None:
        """Adds to the sum `name`."""
        self._counts[name] = self._counts.get(name, 0) + amount

    def take(self) -> list[tuple[str, Tensor]]:
        """Gives away what was added to means since the last call, each a sum and a number [2]: for `give`, or to be
        forgotten with a step that is thrown away."""
        taken, self._open = self._open, []
        return taken

    def give(self, names: list[str], sums: Tensor) -> None:
        """Takes sums [n 2] of a step as `take` gave them, under their names."""
        self._open += zip(names, sums, strict=True)

    def keep(self) -> None:
        """What was added to means since the last call counts."""
        for name, sums in self._open:
            self._sums[name] = self._sums[name] + sums if name in self._sums else sums
        self._open = []

    def flush(self) -> dict[str, float]:
        """Means and sums of all ranks since the last flush, and a fresh start; ranks may have seen different names."""
        self.keep()
        means = {name: sums.tolist() for name, sums in self._sums.items()}
        raw = {name: (total, number) for name, (total, number) in means.items() if number}
        raw |= {name: (float(amount), 0) for name, amount in self._counts.items()}
        self._sums, self._counts = {}, {}
        merged: dict[str, tuple[float, float]] = {}
        for part in gather_objects(raw):
            for name, (total, count) in part.items():
                before = merged.get(name, (0.0, 0.0))
                merged[name] = (before[0] + total, before[1] + count)
        return {name: total / count if count else total for name, (total, count) in sorted(merged.items())}
