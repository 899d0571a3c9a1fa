"""Helpers for runs of several processes."""

from typing import Any

import torch
from lightning.pytorch.utilities import rank_zero_only


def is_first_rank() -> bool:
    """Whether this process is rank 0, which writes files and reports for all."""
    return int(getattr(rank_zero_only, "rank", 0)) == 0


def gather_objects(value: Any) -> list[Any]:
    """This rank's plain value -> those of all ranks, in rank order."""
    gathered: list[Any] = [None] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(gathered, value)
    return gathered
