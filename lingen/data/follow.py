"""Processes of ours end with the one that started them, whatever killed it."""

import multiprocessing
import os
import threading
from multiprocessing.connection import wait

LOOK_EVERY = 1.0
"""Seconds between looks at whether the parent is still there."""


def follow_parent(worker: int = 0) -> None:
    """For the start of a child process: ends it, without a word, as soon as its parent is gone. By itself it need not
    end: a loader process whose batch nobody takes waits for ever. Its siblings hold the other ends of its pipes, so
    that no pipe tells it; therefore the parent's number is looked at too."""
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    if parent is None:
        return
    above = os.getppid()
    while not wait([parent.sentinel], LOOK_EVERY):
        if os.getppid() != above:
            break
    os._exit(1)
