"""Signals that stop a run: noted when they come, looked at where a run can stop. Imports neither torch nor lightning,
so that the command line listens from its first statement on.

A handler only notes the number: saving inside of one can hang, and what it interrupts need not be in order. A second
Ctrl-C is the exception, and asks for no order: the process ends at once, its children before it."""

import atexit
import contextlib
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

INTERRUPTED, REQUEUE = 130, 75
"""Exit codes of a run that was stopped: by Ctrl-C; by another signal, which wants to go on (EX_TEMPFAIL)."""
TOGETHER = 0.2
"""Seconds within which several SIGINTs count as one: a terminal, `timeout` or `torchrun` may each send it."""
TELLS = b"\nStopping as soon as the step is done and saved; Ctrl-C again stops at once.\n"
"""At the first Ctrl-C."""
LISTENED = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)
SHOW_CURSOR = b"\x1b[?25h"
"""For a terminal on which a progress bar had hidden it."""


class Stopped(BaseException):
    """A signal ends the run here, and nothing is left to be saved. No `Exception`: nothing that goes on after an error
    may go on after this.

    Args:
        number: of the signal."""

    def __init__(self, number: int):
        super().__init__(f"Stopped by {signal.Signals(number).name}")
        self.number = number

    @property
    def code(self) -> int:
        """The exit code that tells it."""
        return INTERRUPTED if self.number == signal.SIGINT else REQUEUE


class Listener:
    """Handlers of SIGINT, SIGTERM and SIGUSR1.

    Args:
        owns_process: a second Ctrl-C ends the process, even one that hangs outside of Python; else it is raised in the
            main thread as `Stopped`, since the process is somebody else's."""

    def __init__(self, owns_process: bool):
        self.owns_process = owns_process
        self.number: int | None = None
        self.is_prompt = False
        """Whether the main thread is where it may be left at any point."""
        self._pid = os.getpid()
        self._interrupted: float | None = None
        self._is_told = False
        self._before: dict[int, Any] = {}

    def start(self) -> None:
        """To be called in the main thread."""
        if self.owns_process:
            atexit.register(self._settle)  # before all others, so it is called after them
            heard, told = os.pipe()
            os.set_blocking(told, False)
            signal.set_wakeup_fd(told, warn_on_full_buffer=False)
            os.register_at_fork(after_in_child=lambda: signal.set_wakeup_fd(-1))
            threading.Thread(target=self._watch, args=(heard,), name="lingen-signals", daemon=True).start()
        self._before = {number: signal.signal(number, self._note) for number in LISTENED}

    def stop(self) -> None:
        """Gives the handlers back that were there before."""
        for number, handler in self._before.items():
            signal.signal(number, handler)

    @staticmethod
    def _settle() -> None:
        """The exit code stands; while the interpreter clears up, handlers would be gone and a signal change it."""
        for number in LISTENED:
            signal.signal(number, signal.SIG_IGN)

    def _note(self, number: int, frame: object) -> None:
        if os.getpid() != self._pid:  # a forked child, before it has handlers of its own
            return
        self.number = self.number or number
        if number == signal.SIGINT and not self.owns_process and self._is_second():
            raise Stopped(number)
        if self.is_prompt:
            self.is_prompt = False
            raise Stopped(number)

    def _watch(self, heard: int) -> None:
        """In a thread: a handler waits until the main thread is back in Python, and where ranks hang that is never."""
        from lingen.ranks.environment import here  # listening comes first

        while numbers := os.read(heard, 1):
            if numbers[0] != signal.SIGINT:
                continue
            if self._is_second():  # ends this process without any of the work of an end, and those that it started
                end_children()
                if os.isatty(2):
                    _write(SHOW_CURSOR)
                os._exit(INTERRUPTED)
            elif not self._is_told and here().rank == 0:
                self._is_told = True
                _write(TELLS)

    def _is_second(self) -> bool:
        """Whether this SIGINT comes after another one."""
        now = time.monotonic()
        if self._interrupted is None:
            self._interrupted = now
        return now - self._interrupted > TOGETHER


_listener: Listener | None = None


def listen() -> None:
    """Listens until the process ends; for the command line."""
    global _listener
    if _listener is None and threading.current_thread() is threading.main_thread():
        _listener = Listener(owns_process=True)
        _listener.start()


@contextlib.contextmanager
def listening() -> Iterator[None]:
    """Listens inside the block, where nobody does yet and the thread is the main one; a signal that came too late to
    stop anything is handed on after it."""
    global _listener
    if _listener is not None or threading.current_thread() is not threading.main_thread():
        yield
        return
    own = _listener = Listener(owns_process=False)
    own.start()
    try:
        yield
    finally:
        own.stop()
        _listener = None
    if own.number is not None:
        signal.raise_signal(own.number)


def noted() -> int | None:
    """The first signal that this process got since it listens."""
    return _listener.number if _listener is not None else None


def agreed() -> int | None:
    """The signal that any rank got, on all ranks: a collective."""
    from lingen.ranks.collectives import largest

    return largest(noted() or 0)[0] or None


def check() -> None:
    """Stopped, on all ranks, where any rank got a signal: a collective."""
    if (number := agreed()) is not None:
        raise Stopped(number)


def promptly(act: Callable[[], None]) -> None:
    """Calls what may be left at any point and takes long; a signal ends it, or keeps it from beginning. Raises nothing
    of its own: `check` is to follow."""
    if _listener is None:
        return act()
    with contextlib.suppress(Stopped):  # `is_prompt` is False by then
        try:
            _listener.is_prompt = True
            if _listener.number is None:
                act()
        finally:
            _listener.is_prompt = False


def by_first_rank(work: Callable[[], Iterator[None]]) -> None:
    """Rank 0 works part by part; after each, all ranks look for a signal, and nobody waits long without looking.

    Raises:
        Stopped: any rank got one, and rank 0 is not done. On all ranks.
        FirstRankError: on the others, where rank 0 raised an error."""
    from lingen.ranks.collectives import FirstRankError, is_first_rank, largest

    over, goes_on, failed = range(3)
    parts, state, error = (work() if is_first_rank() else iter(())), goes_on, None
    while state == goes_on:
        try:
            state = goes_on if next(parts, over) is None else over
        except Exception as found:
            state, error = failed, found
        number, state = largest(noted() or 0, state)
        if number and state == goes_on:
            raise Stopped(number)
    if error is not None:
        raise error
    if state == failed:
        raise FirstRankError("rank 0 could not do its part of the work")


def _write(text: bytes) -> None:
    """To stderr, past whatever the main thread holds."""
    with contextlib.suppress(OSError):
        os.write(2, text)


def end_children() -> None:
    """Kills the other ranks that this process started, its loader processes, and whatever else. What these started ends
    with them (`lingen.data.follow`)."""
    for pid in filter(str.isdecimal, os.listdir("/proc") if os.path.isdir("/proc") else ()):
        with contextlib.suppress(OSError), open(f"/proc/{pid}/stat") as stat:
            if int(stat.read().rpartition(")")[2].split()[1]) == os.getpid():
                os.kill(int(pid), signal.SIGKILL)
