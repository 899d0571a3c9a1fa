"""Work spread over processes, its results in order. A worker that crashes costs one item, not the run."""

import multiprocessing
import os
import signal
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from typing import TypeVar

from lingen.data.follow import follow_parent

Item = TypeVar("Item")
Result = TypeVar("Result")


def in_order(
    work: Callable[[Item], Result], items: Iterable[Item], processes: int | None, crashed: Callable[[Item], Result]
) -> Iterator[tuple[Item, Result]]:
    """Each item with what `work` makes of it, in the order of the items.

    Args:
        work: a function of a module; what it raises is raised here.
        items: taken as they are needed, so there may be many millions.
        processes: how many work at once; 0: in this process; None: one for each core that this process may use.
        crashed: the result of an item that ended a process (a decoder that was killed, say), twice."""
    if processes is None:
        processes = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    if processes == 0:
        yield from ((item, work(item)) for item in items)
        return
    pool, waiting = _pool(processes), deque[tuple[Item, Future[Result]]]()

    def settled(item: Item, future: Future[Result]) -> tuple[Item, Result]:
        try:
            return item, future.result()
        except BrokenProcessPool:  # all that were in work are repeated one by one, to find the one that killed it
            with _pool(1) as alone:
                try:
                    return item, alone.submit(work, item).result()
                except BrokenProcessPool:
                    return item, crashed(item)

    try:
        for item in items:
            try:
                waiting.append((item, pool.submit(work, item)))
            except BrokenProcessPool:
                _stop(pool)
                pool = _pool(processes)
                waiting.append((item, pool.submit(work, item)))
            if len(waiting) > 2 * processes:
                yield settled(*waiting.popleft())
        while waiting:
            yield settled(*waiting.popleft())
    finally:
        _stop(pool)


def _stop(pool: ProcessPoolExecutor) -> None:
    """Ends the processes at once; the next run repeats their unfinished items."""
    for process in list((pool._processes or {}).values()):
        process.terminate()
    pool.shutdown(cancel_futures=True)


def _pool(processes: int) -> ProcessPoolExecutor:
    # Not forked: the parent has threads (a progress bar, OpenMP), whose locks a fork may copy while they are held.
    return ProcessPoolExecutor(processes, multiprocessing.get_context("spawn"), _start)


def _start() -> None:
    """Workers ignore Ctrl-C, because the parent ends them; they also end when the parent is killed."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    follow_parent()
