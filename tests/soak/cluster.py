"""`lingen submit` of the six shrunken stages on a real SLURM of two nodes, disturbed at moments of chance until it is
through: the ranks or the script signalled, a rank killed. What `lingen status` says has to be true throughout.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import time
from collections import Counter
from pathlib import Path
from random import Random
from typing import Any

from tests.helpers import slurm
from tests.helpers.commands import ROOT, lingen_command
from tests.helpers.small_t2v import write_small_t2v

DISTURBANCES = ("the ranks signalled", "the script signalled", "a rank killed")
LIVES = ("PENDING", "RUNNING", "COMPLETING", "REQUEUED")
PAUSE = 15.0
"""Seconds between two disturbances, at most."""


def disturb(folder: Path, seed: int, times: int, minutes: float) -> tuple[Counter[str], list[str]]:
    """How often each disturbance came, and what was wrong.

    Args:
        folder: recipe, shards and run lie there.
        times: disturbances, unless the run is through before.
        minutes: after which it counts as one that does not end.
    """
    random, counts = Random(seed), Counter[str]()
    folder.mkdir(parents=True, exist_ok=True)
    recipe, run = write_small_t2v(folder), folder / "run"
    with slurm.slurm(2) as cluster, contextlib.chdir(folder):
        cluster.env |= {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
        words = ["submit", "--recipe", str(recipe), "--run", str(run), "--nodes", "2", "--max-requeues", str(2 * times)]
        done = cluster.run("env", f"--chdir={folder}", *lingen_command(*words))
        if done.returncode:
            return counts, [f"submit: {done.stderr}"]
        job, wrong = done.stdout.strip(), list[str]()
        end, next_one = time.monotonic() + 60 * minutes, time.monotonic() + random.uniform(3, PAUSE)
        while (state := cluster.state(job)) in LIVES and time.monotonic() < end:
            wrong += _untrue(_status(cluster, run))
            if counts.total() < times and time.monotonic() > next_one and state == "RUNNING":
                what = random.choice(DISTURBANCES)
                counts[what] += _act(cluster, run, job, what)
                next_one = time.monotonic() + random.uniform(3, PAUSE)
            time.sleep(1)
        told = _status(cluster, run)
        if (state, told["state"]) != ("COMPLETED", "finished"):
            wrong.append(f"job {job} is {state}, the run {told['state']} ({told['reason']})")
        if times and not counts.total():
            wrong.append("the run was through before anything disturbed it: nothing was tried")
    return counts, list(dict.fromkeys(wrong))


def _act(cluster: slurm.Cluster, run: Path, job: str, what: str) -> bool:
    """Whether there was something to disturb."""
    if what == DISTURBANCES[2]:
        beats = sorted((run / "ranks").glob("*.json"))
        with contextlib.suppress(OSError, ValueError, IndexError):
            os.kill(json.loads(beats[-1].read_text())["pid"], signal.SIGKILL)
            return True
        return False
    batch = ["--batch"] if what == DISTURBANCES[1] else []
    return cluster.run("scancel", "--signal=USR1", *batch, job).returncode == 0


def _status(cluster: slurm.Cluster, run: Path) -> dict[str, Any]:
    return dict(json.loads(cluster.run(*lingen_command("status", str(run), "--json")).stdout))


def _untrue(told: dict[str, Any]) -> list[str]:
    """What cannot be so."""
    wrong = []
    if told["alive"] != (told["state"] == "running"):
        wrong.append(f"alive is {told['alive']} of a run that is {told['state']}")
    if told["state"] == "failed":
        wrong.append(f"the run failed: {told['reason']}")
    return wrong + [f"a restart without a reason: {one}" for one in told["restarts"] if "no word" in one["reason"]]
