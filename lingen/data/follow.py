"""Processes of ours end with the one that started them, whatever killed it."""

import multiprocessing
import os
import threading
import time

LOOK_EVERY = 0.5
"""Seconds between looks at whether the parent is still there."""


def follow_parent(worker: int = 0) -> None:
    """For the start of a child process of multiprocessing: `end_with` its parent. By itself it need not end: a loader
    process whose batch nobody takes waits for ever."""
    parent = multiprocessing.parent_process()
    if parent is not None and parent.pid is not None:
        end_with(parent.pid)


def end_with(parent: int) -> None:
    """Ends this process, without a word, as soon as the process that started it is gone. Its siblings hold the other
    ends of its pipes, so that no pipe tells it; therefore the parent's number is looked at."""
    threading.Thread(target=_end_with, args=(parent,), name="lingen-parent", daemon=True).start()


def _end_with(parent: int) -> None:
    while os.getppid() == parent:
        time.sleep(LOOK_EVERY)
    os._exit(1)
