"""Ends a run that hangs, with the rank that hangs by name: a thread of each rank looks at the signs of life of all.

Ranks tell each other what they do through the store at which they met, not through the disk, which may be what hangs.
Rank 0 judges, the others watch rank 0, and whoever learns of a verdict ends itself."""

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
from traceback import walk_stack
from typing import Any

import torch
import torch.distributed as dist

from lingen.ranks.collectives import gather_objects, is_connected
from lingen.ranks.environment import PARENT, here
from lingen.ranks.heartbeat import FAILED_WORD, HUNG, HeartbeatWriter
from lingen.ranks.signals import end_children

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
"""Seconds that a rank has to leave its word and its stacks: the disk may hang."""

Signs = dict[str, Any]
"""What a rank tells: `HeartbeatWriter.report` and where its main thread is."""


@contextlib.contextmanager
def watching(writer: HeartbeatWriter, session: str, limits: Sequence[int]) -> Iterator[None]:
    """Inside the block a run that hangs is ended with exit code 1. For all ranks together.

    Args:
        session: its mark.
        limits: of the stages, see `HeartbeatWriter.limit`; where all are 0, nothing is watched."""
    shortest = min(filter(None, limits), default=None)
    writer.limit = limits[-1]
    dog = _Watchdog(writer, session, min(TICK, shortest / 4)) if shortest else None
    try:
        yield
    finally:
        if dog is not None:
            dog.over.set()
            for thread in dog.threads:
                thread.join(dog.tick)


class _Watchdog:
    """Watches the ranks that are connected, every `tick` seconds."""

    def __init__(self, writer: HeartbeatWriter, session: str, tick: float):
        self.writer, self.tick = writer, tick
        self.over, self._main = threading.Event(), threading.get_ident()
        self._verdict: str | None = None
        self._heard: dict[int, tuple[Signs, float]] = {}
        """Of each rank that this one watches its last report, and when it came."""
        self._watched = range(here().ranks if here().rank == 0 else 1)
        jobs = [self._watch]
        if is_connected():
            self._store = dist.PrefixStore(f"watchdog-{session}", dist.distributed_c10d._get_default_store().clone())
            self._store.set_timeout(timedelta(seconds=UNHEARD))
            self._store.set(str(here().rank), json.dumps(self._report()))
            for report in gather_objects(self._report()):
                self._hear(report)
            jobs.append(self._talk)
        self.threads = [threading.Thread(target=job, name="lingen-watchdog", daemon=True) for job in jobs]
        for thread in self.threads:
            thread.start()

    def _report(self) -> Signs:
        report, frame = self.writer.report(), sys._current_frames()[self._main]
        file = frame.f_code.co_filename
        return report | {
            "told": time.monotonic(), "verdict": self._verdict,
            "at": f"{'/'.join(Path(file).parts[-3:])}:{frame.f_lineno} ({frame.f_code.co_name})",
            "waits": "torch/distributed/" in file or file.endswith("torch/autograd/graph.py"),
            "collectives": collectives_begun() if report["silence"] > self.tick else 0,
        }  # fmt: skip

    def _hear(self, report: Signs) -> None:
        before = self._heard.get(report["rank"])
        if report["rank"] in self._watched and (before is None or before[0]["told"] != report["told"]):
            self._heard[report["rank"]] = report, time.monotonic()

    def _talk(self) -> None:
        """In a thread of its own: where the process that holds the store is stopped, it hangs."""
        while not self.over.wait(self.tick):
            try:
                self._store.set(str(here().rank), json.dumps(self._report()))
                for told in self._store.multi_get([str(rank) for rank in self._watched]):
                    self._hear(json.loads(told))
            except dist.DistStoreError:  # it is late
                continue
            except RuntimeError:  # the store is gone
                return

    def _watch(self) -> None:
        last = time.monotonic()
        while not self.over.wait(self.tick):
            slept, last = time.monotonic() - last, time.monotonic()
            files = (frame.f_code.co_filename for frame, _ in walk_stack(sys._current_frames()[self._main]))
            if slept > 4 * self.tick or any(file.endswith("bdb.py") or "pydevd" in file for file in files):
                # The process, or all of the job, was stopped and goes on, or a debugger holds it.
                self.writer.pause(slept)
                self._heard = {rank: (report, last) for rank, (report, _) in self._heard.items()}
            if (verdict := self._judge(last)) is not None and not self.over.is_set():
                self._end(verdict)

    def _judge(self, now: float) -> str | None:
        first, limit = here().rank == 0, self.writer.limit
        if first:
            self._heard[0] = self._report(), now
        heard = [(report, now - came) for report, came in self._heard.values()]
        reports = [report | {"age": age, "silence": report["silence"] + age} for report, age in heard]
        found = lost(reports, limit) or (hung(reports, limit) if first else None) if limit else None
        return self._heard[0][0]["verdict"] or found

    def _end(self, verdict: str) -> None:
        """Ends this process, once the others know of the verdict, whatever its main thread is in."""
        self._verdict, own = verdict, here()
        with open(os.devnull, "w") as nowhere:  # where a thread that hangs keeps this one from running
            faulthandler.dump_traceback_later(3 * LAST + 4 * self.tick, exit=True, file=nowhere)
            last = threading.Thread(target=self._leave_words, args=(verdict,), daemon=True)
            last.start()
            last.join(LAST)
            time.sleep((4 if own.rank else 3) * self.tick)  # rank 0 goes first, and has the others ended
            end_children()
            if os.environ.get(PARENT) == str(os.getppid()):  # rank 0 of this machine, which may be stopped
                os.kill(os.getppid(), signal.SIGKILL)
            os._exit(1)

    def _leave_words(self, verdict: str) -> None:
        own, folder = here(), self.writer.path.parent
        if own.rank == 0 or (self._heard[0][0]["verdict"] is None and own.local_rank == (own.node == 0)):
            told = "The run is ended, %s (train.watchdog). The same command goes on from its checkpoint. Stacks: %s"
            logging.getLogger("lingen").error(told, verdict, folder)
        with (folder / f"{own.rank:05d}.stacks.txt").open("w") as file:
            faulthandler.dump_traceback(file, all_threads=True)
        self.writer.end(FAILED_WORD + verdict)
        dump = getattr(torch._C._distributed_c10d, "_dump_nccl_trace", None)
        if dump is not None and is_connected() and "nccl" in str(dist.get_backend_config()):
            (folder / f"nccl_trace_rank_{own.rank}").write_bytes(dump())


def lost(reports: Sequence[Signs], limit: float) -> str | None:
    """Which rank's watchdog is silent, and was first, in words; None where none is.

    Args:
        reports: of ranks; with `age`, how old each is, and `silence` until now.
        limit: seconds."""
    silent = [one for one in reports if one["age"] > min(limit, SLOW_UNHEARD if one["doing"] in SLOW else UNHEARD)]
    return _words(max(silent, key=lambda one: one["age"]), "is stopped, or gone with its node") if silent else None


def hung(reports: Sequence[Signs], limit: float) -> str | None:
    """The rank for which all others wait, in words, where all ranks are silent; None where one is not: the others may
    wait for what it does. Arguments as of `lost`."""
    if any(one["silence"] < (max(limit, SLOW_LIMIT) if one["doing"] in SLOW else limit) for one in reports):
        return None
    # It is behind the others, or is elsewhere.
    first = min(reports, key=lambda one: (one["turns"], one["collectives"], one["waits"], -one["silence"]))
    as_all = ", where it waits for other ranks, as all do" if first["waits"] and len(reports) > 1 else ""
    return lost(reports, limit / 2) or _words(first, f"is at {first['at']}{as_all}")


def _words(one: Signs, why: str) -> str:
    place = f"{one['doing']}, step {one['step']} of stage {one['stage']}"
    named = {"last batch": one["batch"], "waits for": one["awaits"]}
    samples = "".join(f"; {what} {', '.join(names)}" for what, names in named.items() if names)
    return f"{HUNG}{one['silence']:.0f} s: rank {one['rank']} on {one['host']} {why}; last sign: {place}{samples}"


def collectives_begun() -> int:
    """How many collectives this rank has begun, of all groups, where torch counts them."""
    dumps = (getattr(torch._C._distributed_c10d, f"_dump_{name}_trace_json", None) for name in ("fr", "nccl"))
    groups = [json.loads(dump(includeCollectives=False)).get("pg_status", {}) for dump in dumps if dump is not None]
    return sum(int(one["last_enqueued_collective"]) for of in groups for one in of.values())
