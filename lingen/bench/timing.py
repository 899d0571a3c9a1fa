"""Clocks and meters: milliseconds and bytes of a piece of work, by CUDA events or the CPU's clock."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

Work = Callable[[], object]

MOST_RUNS = 20
"""A median of more runs would tell nothing new."""

_LEAD_CYCLES = 2_000_000
# About 1 ms on a GPU: while it spins, the CPU launches the work, so that launches are hidden as they are in a model.


def milliseconds(work: Work, device: torch.device) -> float:
    """Of one call."""
    if device.type != "cuda":
        start = time.perf_counter()
        work()
        return 1e3 * (time.perf_counter() - start)
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda._sleep(_LEAD_CYCLES)
    begin.record()
    work()
    end.record()
    end.synchronize()
    return begin.elapsed_time(end)


def interleaved(
    works: Mapping[str, Work],
    device: torch.device,
    budget: float = 0.5,
    cold: Collection[str] = (),
    warm: bool = True,
) -> dict[str, list[float]]:
    """Milliseconds of several pieces of work, round after round, so that a GPU that slows down slows all of them.

    Args:
        budget: seconds for each, warm-up left out; one that takes longer runs once, a short one `MOST_RUNS` times.
        cold: those that are too long for a warm-up: their only run counts.
        warm: false where all of it has run before.
    """
    for name, work in works.items():
        if warm and name not in cold:
            milliseconds(work, device)
    times = {name: [milliseconds(work, device)] for name, work in works.items()}
    runs = {name: _runs(times[name][0], budget) for name in works}
    for done in range(1, max(runs.values(), default=0)):
        for name, work in works.items():
            if done < runs[name] and name not in cold:
                times[name].append(milliseconds(work, device))
    return times


def medians(
    works: Mapping[str, Work], device: torch.device, budget: float = 0.5, cold: Collection[str] = ()
) -> dict[str, float]:
    """The medians of `interleaved`."""
    return {name: statistics.median(times) for name, times in interleaved(works, device, budget, cold).items()}


def _runs(first: float, budget: float) -> int:
    return max(1, min(MOST_RUNS, int(1e3 * budget / max(first, 1e-3))))


def allocated(device: torch.device) -> int:
    """Bytes that tensors hold on a GPU now; 0 elsewhere."""
    return torch.cuda.memory_allocated(device) if device.type == "cuda" else 0


def peak_bytes(work: Work, device: torch.device) -> int:
    """The most bytes that tensors held on the GPU while the work ran, all that was there before included."""
    if device.type != "cuda":
        raise ValueError(f"The peak of allocated memory is known on CUDA only, not on {device}.")
    torch.cuda.synchronize(device)
    torch.cuda.reset_peak_memory_stats(device)
    work()
    torch.cuda.synchronize(device)
    return torch.cuda.max_memory_allocated(device)


def saved_bytes(run: Callable[..., Tensor], inputs: Sequence[Tensor], weights: Iterable[Tensor]) -> int:
    """Bytes that autograd keeps between forward and backward: each storage once, weights left out."""
    left_out = {p.untyped_storage()._cdata for p in weights}
    sizes: dict[int, int] = {}

    def pack(kept: Tensor) -> Tensor:
        storage = kept.untyped_storage()
        if storage._cdata not in left_out:
            sizes[storage._cdata] = storage.nbytes()
        return kept

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda kept: kept):
        output = run(*inputs)
    del output
    return sum(sizes.values())


def forward(run: Callable[..., object], inputs: Sequence[Any]) -> Work:
    """One forward without gradients; its output is dropped."""

    @torch.no_grad()
    def work() -> None:
        run(*inputs)

    return work


def forward_backward(
    run: Callable[..., Tensor], inputs: Sequence[Tensor], weights: Iterable[Tensor], seed: Tensor
) -> Work:
    """Forward and backward, with the gradients of the inputs and weights that want one, which are dropped at once."""
    wanted = [u for u in (*inputs, *weights) if u.requires_grad]

    def work() -> None:
        torch.autograd.grad(run(*inputs), wanted, seed, allow_unused=True)

    return work


def or_none(work: Callable[[], float]) -> float | None:
    """The number, or None where the GPU has not enough memory for it."""
    try:
        return work()
    except torch.OutOfMemoryError:
        torch.cuda.empty_cache()
        return None
