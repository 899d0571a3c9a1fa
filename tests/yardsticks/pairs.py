"""Two ways to the same thing, measured in pairs: one after the other, in turn the one or the other first.

What is told is the median of the ratios of the pairs, so that a machine that others use too slows down both alike. The
processors' time beside it counts what the processes themselves did, whoever else was there.
"""

from __future__ import annotations

import os
import statistics
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple


class Measured(NamedTuple):
    """One measurement."""

    clips: int
    seconds: float
    cpu_seconds: float
    """Of all processes that took part; 0 where the system does not tell."""


class Comparison(NamedTuple):
    """Two ways to the same batches."""

    what: str
    beside: str
    workers: int
    ours: Callable[[int], Measured]
    """Measures once; takes the number of the pair."""
    theirs: Callable[[int], Measured]
    frames: int
    """In a clip; 0 where frames mean nothing."""


class Watch:
    """Measures from where it is made.

    Args:
        processes: that take part, beside this one.
    """

    def __init__(self, processes: Iterable[int]):
        self.processes = list(processes)
        self.cpu = self._cpu()
        self.begin = time.perf_counter()

    def stop(self, clips: int) -> Measured:
        """So many clips were made since."""
        return Measured(clips, time.perf_counter() - self.begin, self._cpu() - self.cpu)

    def _cpu(self) -> float:
        return sum(map(_cpu_of, self.processes)) + time.process_time()


def _cpu_of(process: int) -> float:
    """Seconds of processor time that a process has used; 0 where there is no /proc."""
    try:
        fields = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return 0.0
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def measure(comparison: Comparison, pairs: int, tell: Callable[[int], None]) -> dict[str, Any]:
    """Measures so many pairs; `tell` is called with the pairs done.

    Returns:
        the medians of both sides, ours first, and the ratio of their speeds: median and each pair's.
    """
    found: list[tuple[Measured, Measured]] = []
    for pair in range(pairs):
        if pair % 2:
            theirs, ours = comparison.theirs(pair), comparison.ours(pair)
        else:
            ours, theirs = comparison.ours(pair), comparison.theirs(pair)
        found.append((ours, theirs))
        tell(pair + 1)
    sides: list[Sequence[Measured]] = list(zip(*found, strict=True))
    speeds = [[one.clips / one.seconds for one in side] for side in sides]
    ratios = [ours / theirs for ours, theirs in zip(*speeds, strict=True)]
    clips = [statistics.median(side) for side in speeds]
    return {
        "what": comparison.what,
        "beside": comparison.beside,
        "workers": comparison.workers,
        "ratio": round(statistics.median(ratios), 3),
        "ratios": [round(ratio, 3) for ratio in ratios],
        "clips_per_second": [round(one, 2) for one in clips],
        "frames_per_second": [round(one * comparison.frames, 1) for one in clips] if comparison.frames else None,
        "cpu_ms_per_clip": [round(1e3 * statistics.median(m.cpu_seconds / m.clips for m in side), 2) for side in sides],
    }
