"""Clocks and meters: milliseconds and GiB of pieces of work, by CUDA events or the CPU's clock. Not
torch.utils.benchmark or triton.testing.do_bench: those measure one piece of work after the other, so that a GPU that
slows down on the way slows the last ones, and neither measures memory."""

import gc
import statistics
import time
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor

from .place import Place
from .results import GIB, Fields

Work = Callable[[], object]
Operation = Callable[..., Tensor]
T = TypeVar("T")

MOST_RUNS = 20
"""The most runs of a measurement: a median of more would hardly change."""

_LEAD_CYCLES = 2_000_000
# About 1 ms on a GPU: while it spins, the CPU launches the work, so that launches are hidden as they are in a model.


class Cost(NamedTuple):
    """What a piece of work takes."""

    ms: float
    """The median of the runs."""
    gib: float | None
    """The most that tensors held on the GPU, all that was there before included; None on a CPU."""
    runs: int

    def fields(self, before: str = "", below: float = 0.0) -> Fields:
        """``ms`` and ``gib`` of a row, with a word before their names; `below` GiB do not count."""
        return {f"{before}ms": self.ms, f"{before}gib": None if self.gib is None else self.gib - below}


def milliseconds(work: Work, device: torch.device) -> float:
    """Milliseconds of one call."""
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


def costs(works: Mapping[str, Work], place: Place, cold: Collection[str] = ()) -> dict[str, Cost]:
    """Several pieces of work, round after round, so that a GPU that slows down slows all of them. One that takes longer
    than the place's budget runs once, a short one `MOST_RUNS` times, the warm-up left out. One that needs more memory
    than there is is left out. `cold`: those that need no warm-up, or are too long for one."""
    device = place.device
    warm = {name: or_none(partial(milliseconds, work, device)) for name, work in works.items() if name not in cold}
    first = {
        name: found
        for name, work in works.items()
        if warm.get(name, 0.0) is not None and (found := or_none(partial(_with_peak, work, device))) is not None
    }
    times = {name: [ms] for name, (ms, _) in first.items()}
    runs = {name: min(MOST_RUNS, int(1e3 * place.budget / max(ms, 1e-3))) for name, (ms, _) in first.items()}
    for done in range(1, max(runs.values(), default=0)):
        for name in first:
            if done < runs[name]:
                times[name].append(milliseconds(works[name], device))
    return {name: Cost(statistics.median(own), first[name][1], len(own)) for name, own in times.items()}


def _with_peak(work: Work, device: torch.device) -> tuple[float, float | None]:
    """Milliseconds of one call, and on CUDA the most GiB that tensors held in it."""
    if device.type != "cuda":
        return milliseconds(work, device), None
    torch.cuda.synchronize(device)
    torch.cuda.reset_peak_memory_stats(device)
    return milliseconds(work, device), torch.cuda.max_memory_allocated(device) / GIB


def both_ways(
    runs: Mapping[str, tuple[Operation, Iterable[Tensor]]],
    inputs: Sequence[Tensor],
    seed: Callable[[], Tensor],
    place: Place,
    cold: tuple[Collection[str], Collection[str]] = ((), ()),
    below: float = 0.0,
) -> dict[str, Fields]:
    """Forward without gradients, and forward and backward: fields of a row for each, as far as the memory goes.

    Args:
        runs: what is run, and the weights whose gradients are computed beside those of the inputs.
        seed: makes the gradient of the output, once the forward alone is measured.
        cold: as in `costs`, of the forward and of both.
        below: GiB that do not count.
    """
    alone = costs({name: forward_work(run, inputs) for name, (run, _) in runs.items()}, place, cold[0])
    wanting, out = [u.detach().requires_grad_(u.is_floating_point()) for u in inputs], seed()
    works = {name: forward_backward(run, wanting, weights, out) for name, (run, weights) in runs.items()}
    both = costs(works, place, cold[1])
    rows: dict[str, Fields] = {name: {} for name in runs}
    for before, found in (("", alone), ("train_", both)):
        for name, cost in found.items():
            rows[name] |= cost.fields(before, below)
    return rows


def forward_work(run: Callable[..., object], inputs: Sequence[Any]) -> Work:
    """One forward without gradients; its output is dropped."""

    @torch.no_grad()
    def work() -> None:
        run(*inputs)

    return work


def forward_backward(run: Operation, inputs: Sequence[Tensor], weights: Iterable[Tensor], seed: Tensor) -> Work:
    """Forward and backward, with the gradients of the inputs and weights that want one, which are dropped at once."""
    wanted = [u for u in (*inputs, *weights) if u.requires_grad]

    def work() -> None:
        torch.autograd.grad(run(*inputs), wanted, seed, allow_unused=True)

    return work


def saved_bytes(run: Operation, inputs: Sequence[Tensor], weights: Iterable[Tensor]) -> int:
    """Bytes that autograd keeps between forward and backward: each storage once, weights left out."""
    left_out = {p.untyped_storage()._cdata for p in weights}
    sizes: dict[int, int] = {}

    def pack(kept: Tensor) -> Tensor:
        storage = kept.untyped_storage()
        if storage._cdata not in left_out:
            sizes[storage._cdata] = storage.nbytes()
        return kept

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda kept: kept):
        output = run(*(u.detach().requires_grad_(u.is_floating_point()) for u in inputs))
    del output
    return sum(sizes.values())


def held(device: torch.device) -> float:
    """GiB that tensors hold on a GPU now; 0 elsewhere."""
    return torch.cuda.memory_allocated(device) / GIB if device.type == "cuda" else 0.0


def free(device: torch.device) -> None:
    """Frees the memory of objects that are no longer used."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


def or_none(work: Callable[[], T]) -> T | None:
    """What it gives, or None where the GPU has not enough memory for it."""
    try:
        return work()
    except torch.OutOfMemoryError:
        torch.cuda.empty_cache()
        return None
