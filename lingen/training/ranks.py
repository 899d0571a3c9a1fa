"""Several processes, one run."""

from __future__ import annotations

from typing import Any

import torch
from lightning.pytorch.utilities import rank_zero_only


def is_first_rank() -> bool:
    """Is this the process that writes and speaks for all ranks?"""
    return int(getattr(rank_zero_only, "rank", 0)) == 0


def gather_objects(value: Any) -> list[Any]:
    """This rank's plain value -> those of all ranks, in rank order."""
    gathered: list[Any] = [None] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(gathered, value)
    return gathered
