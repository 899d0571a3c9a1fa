"""Signs of life: each rank keeps a small file in the run folder that says what it does and since when.

A file is overwritten in place and has one size, so that a rank costs a shared file system one small write every
`BEAT` seconds and a full disk does no harm. Imports neither torch nor lightning: `lingen status` reads here."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lingen.ranks.environment import OtherRankError, UnfitError, is_lost_rank
from lingen.ranks.signals import Stopped, noted
from lingen.recipe.errors import RecipeError

BEAT = 20.0
"""Seconds between two writes."""
SILENT = 90.0
"""Seconds without one after which a process counts as gone."""
SIZE = 2048
"""Bytes of a file."""
SAMPLES_TOLD = 3
"""Samples of a batch that are named."""
FAILED_WORD, OTHER_WORD, STOPPED_WORD = "failed: ", "another rank failed: ", "stopped by "
LOST_WORD = "lost another rank"
"""Starts of how something ended: because another rank was gone, which says nothing of why; and above by an error of its
own, which would come again; by another rank's; by a signal."""
UNFIT_WORD = "unfit: "
"""The same where nodes did not pass the preflight; behind it stand their names, ``n2,n7: ...``."""
HUNG = "silent for "
"""After `FAILED_WORD`, where the watchdog ended the run: another start may help."""

Samples = tuple[list[str], list[str]]


@dataclass(frozen=True, kw_only=True)
class Heartbeat:
    """What is known of a rank."""

    rank: int
    host: str
    age_seconds: float
    """Since its file was written: how long the process has been silent."""
    stage: str | None
    step: int
    doing: str
    doing_seconds: float
    """Since it does that: of a rank that hangs this grows, while its process goes on giving signs."""
    data_share: float
    """Share of its time, between the last two writes, in which it waited for data."""
    pace: tuple[float, float] | None
    """Seconds of a step: in its own forward pass, and waiting for data; see `lingen.training.pace`."""
    memory: dict[str, Any]
    """Bytes: ``process``, ``workers`` (each process that it has started), ``gpu`` (the most that was allocated)."""
    ended: str | None
    """Its last word."""


def host_name() -> str:
    """What SLURM calls this node, else this machine's name."""
    return os.environ.get("SLURMD_NODENAME") or socket.gethostname()


class HeartbeatWriter:
    """Keeps the file of this rank.

    Args:
        folder: where the files of all ranks lie.
        rank: of this process, of `ranks`.
        session: mark of the session."""

    def __init__(self, folder: Path, rank: int, ranks: int, session: str):
        self.path = folder / f"{rank:05d}.json"
        self._told: dict[str, Any] = {
            "rank": rank, "ranks": ranks, "host": host_name(), "pid": os.getpid(), "session": session,
            "stage": None, "step": 0, "doing": "start", "ended": None,
        }  # fmt: skip
        self._since = time.monotonic()
        self._spent: Counter[str] = Counter()
        self._samples: Samples = ([], [])
        self._turns = 0
        self.limit = 0
        """Seconds of silence of all ranks that are too long (`lingen.ranks.watchdog`); 0: none are."""
        self._lock, self._file = threading.Lock(), threading.Lock()
        self._over = threading.Event()
        self.pace: tuple[float, float] | None = None
        """See `Heartbeat.pace`."""
        self.waited = 0.0
        """Seconds that it has waited for data."""

    def sign(
        self, doing: str | None, stage: str | None = None, step: int | None = None, samples: Samples | None = None
    ) -> None:
        """A sign of life: from now on this rank does something else, or goes on with the same.

        Args:
            doing: None: the same as before, from any thread.
            stage, step: given at turns that all ranks take alike.
            samples: of its last batch, and those that it waits for."""
        now = time.monotonic()
        with self._lock:
            before = self._told["doing"]
            self._spent[before] += now - self._since  # type: ignore[assignment]
            self.waited += (now - self._since) * (before == "data")
            given = {"doing": doing, "stage": stage, "step": step}
            self._told |= {key: value for key, value in given.items() if value is not None}
            self._since, self._samples = now, samples or self._samples
            self._turns += stage is not None

    def silence(self) -> float:
        """Seconds since the last sign."""
        return time.monotonic() - self._since

    def pause(self, seconds: float) -> None:
        """So much of the time since the last sign does not count: the process did not run."""
        with self._lock:
            self._since = min(time.monotonic(), self._since + seconds)

    def report(self) -> dict[str, Any]:
        """What another rank may want to know of this one."""
        with self._lock:
            last, coming = (names[:SAMPLES_TOLD] for names in self._samples)
            own = {key: self._told[key] for key in ("rank", "host", "stage", "step", "doing")}
            return own | {"silence": self.silence(), "turns": self._turns, "batch": last, "awaits": coming}

    def write(self) -> None:
        """Writes the file; what fails is tried again at the next beat. A disk that hangs holds up no sign."""
        with self._file:
            with self._lock:
                spent = {name: round(seconds, 3) for name, seconds in self._spent.items()}
                self._spent.clear()
                told = self._told | {"since": round(self.silence(), 3), "spent": spent, "pace": self.pace}
            data = json.dumps(told | {"memory": memory_now()}).encode()
            if len(data) >= SIZE:
                data = json.dumps(told | {"memory": {}, "ended": (told["ended"] or "")[:200] or None}).encode()
            with contextlib.suppress(OSError):
                self.path.parent.mkdir(parents=True, exist_ok=True)
                with os.fdopen(os.open(self.path, os.O_CREAT | os.O_WRONLY, 0o644), "wb") as file:
                    file.write(data.ljust(SIZE - 1) + b"\n")

    def beat(self) -> None:
        """Writes every `BEAT` seconds, until the end."""
        self.write()
        while not self._over.wait(BEAT):
            self.write()

    def end(self, word: str) -> None:
        """The last word; the first one stands."""
        self._over.set()
        self._told["ended"] = self._told["ended"] or word
        self.write()


_writer = HeartbeatWriter(Path(os.devnull), 0, 1, "")


@contextlib.contextmanager
def heartbeats(folder: Path, rank: int, ranks: int, session: str) -> Iterator[HeartbeatWriter]:
    """Inside the block this rank gives signs of life; its file ends with how the block ended."""
    global _writer
    before, writer = _writer, HeartbeatWriter(folder, rank, ranks, session)
    _writer = writer
    threading.Thread(target=writer.beat, name="lingen-heartbeat", daemon=True).start()
    word = "finished"
    try:
        yield writer
    except BaseException as error:
        word = word_of(error)
        raise
    finally:
        _writer = before
        writer.end(word)


def sign(
    doing: str | None = None, stage: str | None = None, step: int | None = None, samples: Samples | None = None
) -> None:
    """A sign of life of this process, see `HeartbeatWriter.sign`."""
    _writer.sign(doing, stage, step, samples)


def own_writer() -> HeartbeatWriter:
    """Of this process; while it is no rank of a run nobody reads it."""
    return _writer


def word_of(error: BaseException) -> str:
    """How something ended, in a line; errors begin with one of the words above."""
    text = " ".join(str(error).split())
    if isinstance(error, OtherRankError):
        return f"{OTHER_WORD}{text}"[:500]
    if isinstance(error, UnfitError):
        start = f"{UNFIT_WORD}{','.join(error.nodes)}" if error.nodes else f"{FAILED_WORD}preflight"
        return f"{start}: {text}"[:500]
    if is_lost_rank(error):  # srun ends the other ranks by SIGTERM, which is not why they end
        return LOST_WORD
    number = error.number if isinstance(error, Stopped) else noted()
    if isinstance(error, KeyboardInterrupt):
        number = signal.SIGINT
    if number is not None and not isinstance(error, RecipeError):  # the signal may have ended what was needed
        return f"{STOPPED_WORD}{signal.Signals(number).name}"
    return f"{FAILED_WORD}{type(error).__name__}: {text}"[:500]


def memory_now() -> dict[str, Any]:
    """Bytes in use: by this process, by each that it has started, and the most that was allocated on its GPU."""
    pids: list[int] = []
    with contextlib.suppress(OSError):
        for task in Path("/proc/self/task").iterdir():
            pids += map(int, (task / "children").read_text().split())
    found: dict[str, Any] = {"process": _resident(os.getpid()), "workers": [_resident(pid) for pid in sorted(pids)]}
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_available() and torch.cuda.is_initialized():
        found["gpu"] = torch.cuda.max_memory_allocated()
    return found


def _resident(pid: int) -> int:
    with contextlib.suppress(OSError, ValueError, IndexError):
        return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    return 0


def read_heartbeats(folder: Path, session: str | None = None) -> list[Heartbeat]:
    """What the ranks of a session have written, in order; without one, whatever lies there. A file that is being
    written for the first time is left out. Ages are by the newest file where this machine's clock is behind."""
    found: list[tuple[dict[str, Any], float]] = []
    for path in folder.glob("*.json"):
        with contextlib.suppress(OSError, ValueError):
            told, written = json.loads(path.read_text(encoding="utf-8")), path.stat().st_mtime
            if isinstance(told, dict) and session in (None, told.get("session")):
                found.append((told, written))
    now = max([time.time(), *(written for _, written in found)])
    beats = []
    for told, written in found:
        with contextlib.suppress(KeyError, TypeError):
            same = {key: told[key] for key in ("rank", "host", "stage", "step", "doing", "memory", "ended")}
            age, spent = now - written, sum(told["spent"].values())
            share = round(told["spent"].get("data", 0.0) / spent, 3) if spent else 0.0
            since = round(told["since"] + age, 1)
            times = {"age_seconds": round(age, 1), "doing_seconds": since, "data_share": share}
            beats.append(Heartbeat(**same, **times, pace=told.get("pace")))
    return sorted(beats, key=lambda one: one.rank)
