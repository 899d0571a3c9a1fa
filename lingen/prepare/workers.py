"""Work spread over processes, its results in order. A worker that crashes costs one item, not the run."""

import multiprocessing
import os
import signal
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from typing import Generic, TypeVar

from lingen.data.follow import follow_parent

Item = TypeVar("Item")
Result = TypeVar("Result")


def processes_here() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def in_order(
    work: Callable[[Item], Result], items: Iterable[Item], processes: int, crashed: Callable[[Item], Result]
) -> Iterator[tuple[Item, Result]]:
    """Each item with what `work` makes of it, in the order of the items.

    Args:
        work: a function of a module; what it raises is raised here.
        items: taken as they are needed, so there may be many millions.
        processes: how many work at once; 0: in this process.
        crashed: the result of an item that ended a process (a decoder that was killed, say), twice.
    """
    if processes == 0:
        yield from ((item, work(item)) for item in items)
        return
    crew = _Crew(work, processes, crashed)
    waiting: deque[tuple[Item, Future[Result]]] = deque()
    try:
        for item in items:
            waiting.append((item, crew.begin(item)))
            if len(waiting) > 2 * processes:
                yield crew.end(*waiting.popleft())
        while waiting:
            yield crew.end(*waiting.popleft())
    finally:
        crew.stop()


class _Crew(Generic[Item, Result]):
    """A process pool that is started again after a crash."""

    def __init__(self, work: Callable[[Item], Result], processes: int, crashed: Callable[[Item], Result]):
        self.work, self.processes, self.crashed = work, processes, crashed
        self.pool = _pool(processes)

    def begin(self, item: Item) -> Future[Result]:
        try:
            return self.pool.submit(self.work, item)
        except BrokenProcessPool:
            self.stop()
            self.pool = _pool(self.processes)
            return self.pool.submit(self.work, item)

    def end(self, item: Item, future: Future[Result]) -> tuple[Item, Result]:
        try:
            return item, future.result()
        except BrokenProcessPool:
            return item, self._alone(item)

    def _alone(self, item: Item) -> Result:
        """Repeats one by one the items that were in work when a process died, to find the one that killed it."""
        with _pool(1) as pool:
            try:
                return pool.submit(self.work, item).result()
            except BrokenProcessPool:
                return self.crashed(item)

    def stop(self) -> None:
        """Ends the processes at once; the next run repeats their unfinished items."""
        processes = list((self.pool._processes or {}).values())
        for process in processes:
            process.terminate()
        self.pool.shutdown(cancel_futures=True)


def _pool(processes: int) -> ProcessPoolExecutor:
    # Not forked: the parent has threads (a progress bar, OpenMP), whose locks a fork may copy while they are held.
    return ProcessPoolExecutor(processes, multiprocessing.get_context("spawn"), _start)


def _start() -> None:
    """Workers ignore Ctrl-C, because the parent ends them; they also end when the parent is killed."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    follow_parent()
