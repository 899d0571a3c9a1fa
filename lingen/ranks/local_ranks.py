"""Several ranks on one machine without a launcher: rank 0 decides what there is to do, and then starts the others, each
with the command that it was started with itself."""

import atexit
import logging
import os
import signal
import subprocess
import sys
import threading
import time
from contextlib import suppress

import torch
import torch.distributed as dist

from lingen.ranks import environment, signals
from lingen.ranks.collectives import is_connected
from lingen.ranks.environment import PARENT, Rank
from lingen.ranks.launch import MEETING, agree, connect, disconnect, join
from lingen.recipe.errors import RecipeError

log = logging.getLogger("lingen")

GRACE = 10.0
"""Seconds that the other ranks have to end by themselves."""
SHORT = 3.0
"""The same after an error of this process."""
STOPPED = (0, signals.REQUEUE, signals.INTERRUPTED)
"""Exit codes of a rank that has done its work, or stopped at a signal."""
SAID = (1, 2)
"""Exit codes of a rank that has said itself what is wrong."""


def start_ranks(ranks: int) -> bool:
    """Starts the other ranks of a run on this machine, with the command of this process, and connects to them. Returns
    whether it did: not for one rank, nor where they are there. RecipeError: this process has no command."""
    if ranks == 1 or (is_connected() and dist.get_world_size() > 1):
        return False
    disconnect()  # a strategy for many ranks connects also one
    main = sys.modules["__main__"]
    if not (getattr(main, "__file__", None) or getattr(main, "__spec__", None) or "-c" in sys.orig_argv):
        raise RecipeError(
            f"{ranks} ranks cannot be started from a notebook or a console, since each runs the whole command. Put it "
            "into a file, take `lingen fit`, or set trainer.devices=1."
        )
    store = dist.TCPStore("127.0.0.1", 0, ranks, is_master=True, timeout=MEETING, wait_for_workers=False)
    own = Rank(by="lingen", ranks=ranks, port=store.port)
    environment.take(own)
    atexit.register(end_ranks)
    _others.append(LocalRanks(own))
    connect(own, store)
    _others[0].joined = True
    agree(own)
    return True


def share(parts: int) -> Rank:
    """Connects to the ranks that share so many independent parts of work, and is one of them: those that a launcher has
    started, else one for each GPU of this machine, no more than parts, where this process is the command `lingen`: they
    repeat it. Its GPU is this process's own from then on. RecipeError as by `launch.join` and `start_ranks`."""
    join()
    gpus = torch.cuda.device_count()
    named = getattr(sys.modules["__main__"].__spec__, "name", None)
    if environment.here().ranks == 1 and (named == "lingen.__main__" or os.path.basename(sys.argv[0]) == "lingen"):
        start_ranks(max(1, min(gpus, parts)))
    own = environment.here()
    if gpus:
        torch.cuda.set_device(own.local_rank % gpus)
    return own


class LocalRanks:
    """The other ranks of this machine: processes that end with this one, and this one with them.

    Args:
        own: this process, rank 0."""

    def __init__(self, own: Rank):
        self.joined = False
        self._over = threading.Event()
        self._is_told = False
        command = [sys.executable, *sys.orig_argv[1:]]
        self.processes = {
            rank: subprocess.Popen(command, env=os.environ | _told(own, rank), stdin=subprocess.DEVNULL)
            for rank in range(1, own.ranks)
        }
        threading.Thread(target=self._watch, name="lingen-ranks", daemon=True).start()

    def _watch(self) -> None:
        """Where a rank has ended that cannot be replaced, this process ends: by itself, as soon as it needs that rank
        for anything, else here."""
        while not self._tell_of_fault():
            if self._over.wait(0.1):
                return
        if not self._over.wait(GRACE if self.joined else 0.0):
            self._kill()
            number = signals.noted()  # a signal to all processes of a job may come before a rank listens
            os._exit(1 if number is None else signals.Stopped(number).code)

    def _tell_of_fault(self) -> bool:
        """Whether a rank has ended that should not have; told once, unless it told itself."""
        for rank, process in self.processes.items():
            code = process.poll()
            if code is None or (code in STOPPED and self.joined):
                continue
            if code not in SAID and not self._is_told:
                how = f"was killed by {signal.Signals(-code).name}" if code < 0 else f"ended with code {code}"
                log.error("Rank %d %s, so the run ends; the same command goes on from its last checkpoint.", rank, how)
            self._is_told = True
            return True
        return False

    def end(self, grace: float) -> None:
        """Waits so many seconds for their end, then makes it."""
        self._over.set()
        last = time.monotonic() + grace
        while time.monotonic() < last and any(process.poll() is None for process in self.processes.values()):
            time.sleep(0.02)
        self._tell_of_fault()
        self._kill()

    def _kill(self) -> None:
        for process in self.processes.values():
            process.kill()
        for process in self.processes.values():
            with suppress(subprocess.TimeoutExpired):
                process.wait(1)


def _told(own: Rank, rank: int) -> dict[str, str]:
    values = (rank, own.ranks, rank, own.ranks, own.address, own.port)
    return dict(zip(environment.OF_LAUNCHERS, map(str, values), strict=True)) | {PARENT: str(os.getpid())}


_others: list[LocalRanks] = []


def end_ranks(grace: float = GRACE) -> None:
    """Ends the ranks that this process has started, where they do not end by themselves, and the connection to them:
    this process may train another run."""
    while _others:
        _others.pop().end(grace)
        environment.take(None)
        disconnect()


def give_up(hung: bool = False) -> None:
    """After an error: other ranks may be gone, or wait for this one. Nobody waits for them, at the end either.

    Args:
        hung: a thread of this process waits for them."""
    atexit.unregister(disconnect)
    if hung or is_connected() and "nccl" in str(dist.get_backend_config()):
        atexit.unregister(end_ranks)
        for one in _others:
            one.end(SHORT)
    else:
        end_ranks(SHORT)
