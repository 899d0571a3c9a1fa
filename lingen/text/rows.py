"""Rows of ids, one for each text: cut, counted, and stacked."""

import logging

import torch
from torch import Tensor

log = logging.getLogger("lingen")


class Cut:
    """Cuts sequences at `limit`, counts those that were longer, and says so the first time."""

    def __init__(self, unit: str, limit: int):
        self.unit, self.limit, self.count = unit, limit, 0

    def __call__(self, rows: list[list[int]]) -> list[list[int]]:
        long = [len(row) for row in rows if len(row) > self.limit]
        if long and not self.count:
            log.warning(
                "A text of %d %s was cut to %d (text.max_tokens); others may be, too, and are not named.",
                long[0], self.unit, self.limit,
            )  # fmt: skip
        self.count += len(long)
        return [row[: self.limit] for row in rows]


def padded(
    rows: list[list[int]], device: torch.device | str = "cpu", few_up_to: int | None = None
) -> tuple[Tensor, Tensor]:
    """ids [b n] with zeros behind the real ones, mask [b n]; n is at least 1.

    Args:
        few_up_to: n is a multiple of 16 or this number: so there are few shapes.
    """
    n = max([1, *map(len, rows)])
    n = n if few_up_to is None else min(-(-n // 16) * 16, few_up_to)
    ids = torch.tensor([row + [0] * (n - len(row)) for row in rows], dtype=torch.long).view(len(rows), n)
    mask = torch.tensor([[i < len(row) for i in range(n)] for row in rows], dtype=torch.bool).view(len(rows), n)
    return ids.to(device), mask.to(device)
