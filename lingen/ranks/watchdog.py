"""Ends a run that hangs, with the rank that hangs by name: a thread of each rank looks at the signs of life of all.

Ranks tell each other what they do through the store at which they met, not through the disk, which may be what hangs.
Rank 0 judges, all others watch rank 0, and whoever learns of a verdict ends itself.
"""

from __future__ import annotations

import contextlib
import faulthandler
import json
import logging
import os
import signal
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from lingen.ranks.collectives import gather_objects, is_connected
from lingen.ranks.environment import PARENT, here
from lingen.ranks.heartbeat import FAILED_WORD, LOST_WORD, SILENT_WORD, Heart
from lingen.ranks.signals import end_children

log = logging.getLogger("lingen")

TICK = 4.0
"""Seconds between two looks, at most."""
UNHEARD = 30.0
"""Seconds without a word of a rank's watchdog, which runs beside whatever the rank does, after which it counts as
stopped, or gone with its node."""
SLOW = ("start", "end of the stage", "score")
"""What may take longer between two signs: reading weights, compiling, the first batch."""
SLOW_LIMIT, SLOW_UNHEARD = 1800.0, 120.0
"""The limits meanwhile. A library that reads a large file may keep all threads of its process from running."""
LAST = 10.0
"""Seconds that a rank has to leave its word and its stacks."""

Signs = dict[str, Any]


@contextlib.contextmanager
def watching(heart: Heart, session: str, limit: int) -> Iterator[None]:
    """Inside the block a run that hangs is ended with exit code 1. For all ranks together.

    Args:
        session: its mark.
        limit: the shortest that a stage sets (`heartbeat.begin_stage`); 0: nothing is watched.
    """
    if not limit:
        yield
        return
    dog = _Watchdog(heart, session, min(TICK, limit / 4))
    try:
        yield
    finally:
        dog.stop()


class _Watchdog:
    """Watches the ranks; they are those that are connected.

    Args:
        tick: seconds between two looks.
    """

    def __init__(self, heart: Heart, session: str, tick: float):
        self.heart, self.tick = heart, tick
        self.verdict: Signs | None = None
        """The report of the rank that is to blame, with its `word`."""
        self._over, self._main = threading.Event(), threading.get_ident()
        self._heard: dict[int, tuple[Signs, float]] = {}
        """Of each rank that this one watches its last report and when it came."""
        self._watched = range(here().ranks if here().rank == 0 else 1)
        jobs = [self._watch]
        if is_connected():
            self._store = dist.PrefixStore(f"watchdog-{session}", dist.distributed_c10d._get_default_store().clone())
            self._store.set_timeout(timedelta(seconds=UNHEARD))
            self._store.set(str(here().rank), json.dumps(self._report()))
            for report in gather_objects(self._report()):
                self._hear(report)
            jobs.append(self._talk)
        self._threads = [
            threading.Thread(target=job, name=f"lingen-watchdog{job.__name__}", daemon=True) for job in jobs
        ]
        for thread in self._threads:
            thread.start()

    def stop(self) -> None:
        self._over.set()
        for thread in self._threads:
            thread.join(self.tick)

    # what ranks tell each other

    def _report(self) -> Signs:
        report, frame = self.heart.report(), sys._current_frames()[self._main]
        file = frame.f_code.co_filename
        return report | {
            "told": time.monotonic(),
            "verdict": self.verdict,
            "at": f"{'/'.join(Path(file).parts[-3:])}:{frame.f_lineno} ({frame.f_code.co_name})",
            "waits": "torch/distributed/" in file or file.endswith("torch/autograd/graph.py"),
            "collectives": collectives_begun() if report["silence"] > self.tick else 0,
        }

    def _hear(self, report: Signs) -> None:
        before = self._heard.get(report["rank"])
        if report["rank"] in self._watched and (before is None or before[0]["told"] != report["told"]):
            self._heard[report["rank"]] = report, time.monotonic()

    def _talk(self) -> None:
        """In a thread of its own: where the process that holds the store is stopped, it may hang."""
        while not self._over.wait(self.tick):
            try:
                self._store.set(str(here().rank), json.dumps(self._report()))
                for told in self._store.multi_get([str(rank) for rank in self._watched]):
                    self._hear(json.loads(told))
            except RuntimeError as error:
                if not isinstance(error, dist.DistStoreError):  # that is a delay; else the store is gone
                    return

    def _watch(self) -> None:
        last = time.monotonic()
        while not self._over.wait(self.tick):
            slept, last = time.monotonic() - last, time.monotonic()
            if slept > 4 * self.tick or _is_debugged(sys._current_frames()[self._main]):
                # The process, or all of the job, was stopped and goes on, or somebody looks at it.
                self.heart.pause(slept)
                self._heard = {rank: (report, last) for rank, (report, _) in self._heard.items()}
            verdict = self._judge(last)
            if verdict is not None and not self._over.is_set():
                self._end(verdict)

    def _judge(self, now: float) -> Signs | None:
        if here().rank == 0:
            self._heard[0] = self._report(), now
        elif (told := self._heard[0][0]["verdict"]) is not None:
            return dict(told)
        reports = [
            report | {"age": now - came, "silence": report["silence"] + now - came}
            for report, came in self._heard.values()
        ]
        limit = self.heart.limit
        return (lost(reports, limit) or (hung(reports, limit) if here().rank == 0 else None)) if limit else None

    # the end

    def _end(self, verdict: Signs) -> None:
        """Ends this process, once the others know of the verdict, whatever its main thread is in."""
        self.verdict = verdict
        with open(os.devnull, "w") as nowhere:  # where a thread that hangs keeps this one from running
            faulthandler.dump_traceback_later(3 * LAST + 4 * self.tick, exit=True, file=nowhere)
            last = threading.Thread(target=self._leave_words, args=(verdict,), daemon=True)  # a disk may hang
            last.start()
            last.join(LAST)
            time.sleep((4 if here().rank else 3) * self.tick)  # rank 0 is the first to go: it has the others ended
            end_children()
            if verdict["rank"] == 0 and PARENT in os.environ:  # it does not end by itself
                os.kill(os.getppid(), signal.SIGKILL)
            os._exit(1)

    def _leave_words(self, verdict: Signs) -> None:
        folder, own, first = self.heart.path.parent, here().rank, verdict["rank"]
        if own == 0 or (first == 0 and here().local_rank == min(1, here().node == 0)):
            log.error(
                "Rank %d on %s is %s. The run ends; the same command goes on from its last checkpoint. Stacks of the "
                "ranks lie in %s.", first, verdict["host"], verdict["word"], folder,
            )  # fmt: skip
            self.heart.leave_word_of(first, FAILED_WORD + verdict["word"])
        with (folder / f"{own:05d}.stacks.txt").open("w") as file:
            faulthandler.dump_traceback(file, all_threads=True)
        self.heart.end(FAILED_WORD + verdict["word"] if first == own else LOST_WORD)
        if (trace := flight_record()) is not None:
            (folder / f"nccl_trace_rank_{own}").write_bytes(trace)


def lost(reports: Sequence[Signs], limit: float) -> Signs | None:
    """The rank whose watchdog is silent, and was first, with its `word`; None where none is.

    Args:
        reports: of ranks; with `age`, how old each is, and `silence` until now.
        limit: seconds.
    """
    silent = [one for one in reports if one["age"] > min(limit, SLOW_UNHEARD if one["doing"] in SLOW else UNHEARD)]
    if not silent:
        return None
    return _blamed(max(silent, key=lambda one: one["age"]), "its process is stopped, or gone with its node")


def hung(reports: Sequence[Signs], limit: float) -> Signs | None:
    """The rank for which all others wait, with its `word`, where all ranks are silent; None where one is not: whatever
    the others do, it goes on. Arguments as of `lost`."""
    if any(one["silence"] < (max(limit, SLOW_LIMIT) if one["doing"] in SLOW else limit) for one in reports):
        return None
    # It is behind the others, or is elsewhere.
    first = min(reports, key=lambda one: (one["turns"], one["collectives"], one["waits"], -one["silence"]))
    all_wait = ", where it waits for other ranks, as all do" if first["waits"] and len(reports) > 1 else ""
    return _blamed(first, f"it is at {first['at']}{all_wait}")


def _blamed(report: Signs, why: str) -> Signs:
    place = f"{report['doing']}, step {report['step']} of stage {report['stage']}"
    named = {"last batch": report["batch"], "waits for": report["awaits"]}
    samples = "".join(f"; {what} {', '.join(names)}" for what, names in named.items() if names)
    return report | {"word": f"{SILENT_WORD}{report['silence']:.0f} s: {why}; last sign: {place}{samples}"}


def _is_debugged(frame: Any) -> bool:
    """Whether a debugger of Python holds the thread."""
    while frame is not None:
        if os.path.basename(frame.f_code.co_filename) == "bdb.py" or "pydevd" in frame.f_code.co_filename:
            return True
        frame = frame.f_back
    return False


def collectives_begun() -> int:
    """How many collectives this rank has begun, of all groups, where torch counts them."""
    count = 0
    for name in ("_dump_fr_trace_json", "_dump_nccl_trace_json"):  # of gloo, of NCCL
        dump = getattr(torch._C._distributed_c10d, name, None)
        if dump is not None:
            groups = json.loads(dump(includeCollectives=False)).get("pg_status", {}).values()
            count += sum(int(one["last_enqueued_collective"]) for one in groups)
    return count


def flight_record() -> bytes | None:
    """What torch's flight recorder has of this rank, for ``torchfrtrace``; None where NCCL is not used."""
    dump = getattr(torch._C._distributed_c10d, "_dump_nccl_trace", None)
    return bytes(dump()) if dump is not None and is_connected() and "nccl" in str(dist.get_backend_config()) else None
