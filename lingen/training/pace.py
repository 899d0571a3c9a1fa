"""How long each rank takes for its own part of a step: whole steps take all as long, as each waits for the slowest."""

from __future__ import annotations

import time
from collections.abc import Iterable, Sequence
from statistics import median_low
from typing import Any, NamedTuple

import torch
from torch import nn

from lingen.ranks.heartbeat import host_name, own_writer

CLEARLY = 1.2
"""Times the median from which a rank is slow [ours]."""
ROWS_SLOW = 3
"""Lines of the log in a row in which a rank is the slowest, until that is said [ours]."""


class RankPace(NamedTuple):
    """Seconds of a step that a rank spends by itself."""

    own: float
    """In the forward pass of the parts that are measured."""
    data: float
    """Waiting for a batch."""
    host: str

    def __str__(self) -> str:
        return f"{self.own:.3g} s of forward pass in a step, {self.data:.3g} s waiting for data"


class Pace:
    """Measures the forward pass of parts of the model, in which no rank waits for another one: on a GPU by events, for
    which nothing waits.

    Args:
        parts: what a strategy does to them, which may wait for other ranks, is done already.
        on_gpu: where they run."""

    def __init__(self, parts: Iterable[nn.Module] = (), on_gpu: bool = False):
        self._on_gpu = on_gpu
        self._begun: dict[nn.Module, Any] = {}
        self._spans: list[tuple[Any, Any]] = []
        self._own, self._steps, self._waited = 0.0, 0, own_writer().waited
        self._slowest = (-1, 0)
        for part in parts:
            part.register_forward_pre_hook(lambda part, _: self._begun.update({part: self.mark()}))
            part.register_forward_hook(lambda part, *_: self._end_of(part))

    def mark(self) -> Any:
        """Now; on a GPU when it comes here."""
        if not self._on_gpu:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def _end_of(self, part: nn.Module) -> None:
        if torch.is_grad_enabled():  # neither validation nor sampling
            self.end(self._begun[part])

    def end(self, begun: Any) -> None:
        """Counts what was between a `mark` and now as the rank's own."""
        self._spans.append((begun, self.mark()))

    def step(self) -> None:
        """The forward pass of a step is over, on the GPU, too."""
        self._steps += 1
        for begin, end in self._spans:
            self._own += begin.elapsed_time(end) / 1000 if self._on_gpu else end - begin
        self._spans = []

    def flush(self) -> RankPace:
        """Means of a step since the last call; a sign of life tells them, too."""
        writer, steps, before = own_writer(), max(self._steps, 1), self._waited
        self._waited = writer.waited
        found = RankPace(self._own / steps, (self._waited - before) / steps, host_name())
        self._own, self._steps = 0.0, 0
        writer.pace = (round(found.own, 4), round(found.data, 4))
        return found

    def slow_ranks(self, ranks: Sequence[RankPace]) -> str | None:
        """A line with the slowest 1% of the ranks, once one of them has been the slowest for a while."""
        lags = [one.own + one.data for one in ranks]
        order = sorted(range(len(ranks)), key=lambda rank: -lags[rank])
        (before, times), first = self._slowest, order[0]
        is_slow = lags[first] > CLEARLY * median_low(lags)
        self._slowest = (first, times * (first == before) + 1) if is_slow else (-1, 0)
        if self._slowest[1] != ROWS_SLOW:
            return None
        told = [f"rank {rank} on {ranks[rank].host} ({ranks[rank]})" for rank in order[: -(-len(ranks) // 100)]]
        return f"slow: {', '.join(told)}; the rank in the middle: {ranks[order[len(order) // 2]]}"


def compared(ranks: Sequence[RankPace]) -> dict[str, float]:
    """For metrics.csv: the median and the largest of both times, and which rank's that is."""
    found: dict[str, float] = {}
    for name, values in {"own": [one.own for one in ranks], "data": [one.data for one in ranks]}.items():
        found |= {f"time/{name}_median": median_low(values), f"time/{name}_max": max(values)}
        found[f"time/{name}_slowest"] = values.index(max(values))
    return found
