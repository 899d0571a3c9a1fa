"""What the processes of a run, its ranks, tell each other. Each function works with one process, too."""

from collections.abc import Callable
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from lingen.ranks.environment import OtherRankError, here

T = TypeVar("T")


def is_first_rank() -> bool:
    """Whether this process is rank 0, which writes files and reports for all."""
    return dist.get_rank() == 0 if is_connected() else here().rank == 0


def is_connected() -> bool:
    """Whether the ranks can talk to each other; one process alone is not."""
    return dist.is_available() and dist.is_initialized()


def place() -> tuple[int, int]:
    """This rank's number and how many there are."""
    return (dist.get_rank(), dist.get_world_size()) if is_connected() else (0, 1)


def gather_objects(value: Any) -> list[Any]:
    """This rank's plain value -> those of all ranks, in rank order."""
    if not is_connected():
        return [value]
    gathered: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(gathered, value)
    return gathered


def broadcast_object(value: T) -> T:
    """Rank 0's plain value, on all ranks."""
    if not is_connected():
        return value
    held = [value]
    dist.broadcast_object_list(held)
    return held[0]


def largest(*values: int) -> list[int]:
    """The largest of each of these numbers over all ranks: one collective."""
    if not is_connected():
        return list(values)
    on_cpu = "gloo" in str(dist.get_backend_config())
    told = torch.tensor(values, dtype=torch.int64, device="cpu" if on_cpu else "cuda")
    dist.all_reduce(told, dist.ReduceOp.MAX)
    return [int(value) for value in told.tolist()]


class FirstRankError(OtherRankError):
    """Rank 0 could not do something that all ranks need; it says why itself."""


def on_first_rank(act: Callable[[], T]) -> T:
    """What rank 0 gets from `act`, on all ranks. Its error is raised there, and here a `FirstRankError`: no rank waits
    for one that has ended."""
    value, error = _tried(act) if place()[0] == 0 else (None, None)
    told = broadcast_object((value, error and _told(error)))
    if error is not None:
        raise error
    if told[1] is not None:
        raise FirstRankError(told[1])
    return told[0]  # type: ignore[return-value]


def together(act: Callable[[], T]) -> T:
    """What each rank gets from its own `act`, once all have it. Where some fail, the first of them raises its error,
    all others an `OtherRankError`: it is said once, and no rank waits for one that has ended."""
    value, error = _tried(act)
    failed = [(rank, told) for rank, told in enumerate(gather_objects(error and _told(error))) if told]
    if failed and error is not None and failed[0][0] == place()[0]:
        raise error
    if failed:
        raise OtherRankError(f"rank {failed[0][0]}: {failed[0][1]}")
    return value  # type: ignore[return-value]


def _tried(act: Callable[[], T]) -> tuple[T | None, Exception | None]:
    try:
        return act(), None
    except Exception as error:
        return None, error


def _told(error: Exception) -> str:
    return f"{type(error).__name__}: {error}"
