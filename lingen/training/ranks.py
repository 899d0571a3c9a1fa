"""Helpers for runs of several processes."""

import os
from typing import Any

import torch
from lightning.pytorch.utilities import rank_zero_only


def is_first_rank() -> bool:
    """Whether this process is rank 0, which writes files and reports for all. Before a Trainer has counted the ranks,
    the first process of another node (NODE_RANK, of Lightning's own launcher) is none."""
    node = os.environ.get("NODE_RANK") or os.environ.get("GROUP_RANK") or "0"
    return int(getattr(rank_zero_only, "rank", 0)) == 0 and node == "0"


def gather_objects(value: Any) -> list[Any]:
    """This rank's plain value -> those of all ranks, in rank order."""
    gathered: list[Any] = [None] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(gathered, value)
    return gathered
