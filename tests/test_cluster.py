"""`lingen submit` on a real SLURM of two nodes: preempted, killed, cancelled, requeued, finished; `status` is true."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.helpers import slurm
from tests.helpers.commands import ROOT, lingen_command

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(slurm.fault() is not None, reason=f"no SLURM here: {slurm.fault()}"),
]
LONG = ["stages.clips.train.steps=100000", "train.checkpoint_every=500", "sample.prompts=[]"]


@pytest.fixture(scope="module")
def cluster() -> Iterator[slurm.Cluster]:
    with slurm.slurm(2) as one:
        one.env |= {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "XDG_CONFIG_HOME": str(one.folder / "config")}
        yield one


def lingen(cluster: slurm.Cluster, *words: str) -> str:
    done = cluster.run(*lingen_command(*words), timeout=120)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def status(cluster: slurm.Cluster, run: Path) -> dict[str, Any]:
    return json.loads(lingen(cluster, "status", str(run), "--json"))


def wait(cluster: slurm.Cluster, run: Path, holds: Callable[[dict[str, Any]], bool]) -> dict[str, Any]:
    """The first status that holds, and every one before it is true as far as that can be told."""
    end = time.monotonic() + 150
    while time.monotonic() < end:
        told = status(cluster, run)
        assert told["alive"] == (told["state"] == "running") and told["step"] <= told["steps"]
        if holds(told):
            return told
        time.sleep(0.5)
    logs = "\n".join(path.read_text() for path in run.glob("submit/*/*.log"))
    raise AssertionError(f"it did not come: {told}\n{logs}")


def is_amid(told: dict[str, Any]) -> bool:
    """It trains its second stage."""
    return told["state"] == "running" and told["stage"] == "clips" and told["step"] > 2


def test_two_nodes_are_preempted_killed_and_finish(cluster: slurm.Cluster, tiny_recipe: Path, here: Path):
    run = here / "run"
    words = ["submit", "--recipe", str(tiny_recipe), "--run", str(run), "--nodes", "2", *LONG]
    job = lingen(cluster, *words, "--max-requeues", "2")
    told = wait(cluster, run, is_amid)
    assert {one["host"] for one in told["ranks"]} == {"n1", "n2"} and told["restarts"] == []

    cluster.run("scancel", "--signal=USR1", job)  # to the ranks, as --signal=USR1@600 does
    told = wait(cluster, run, lambda told: told["state"] == "waiting")
    assert told["reason"] == f"job {job} waits in the queue (BeginTime); stopped by SIGUSR1"
    before = told["step"]
    told = wait(cluster, run, is_amid)
    assert [one["reason"] for one in told["restarts"]] == ["stopped by SIGUSR1"] and told["step"] >= before

    os.kill(json.loads((run / "ranks" / "00001.json").read_text())["pid"], 9)
    told = wait(cluster, run, lambda told: len(told["restarts"]) == 2 and is_amid(told))
    assert told["restarts"][1]["reason"] == "killed: exit code 137 (SIGKILL); silent first: rank 1 on n2"

    cluster.run("scancel", "--signal=USR1", "--batch", job)  # to the script, as --signal=B:USR1@600 does
    told = wait(cluster, run, lambda told: told["state"] == "stopped")
    assert told["reason"] == "stopped by SIGUSR1" and told["checkpoint"].endswith(f"{told['step']:08d}")
    wait(cluster, run, lambda told: cluster.state(job) == "FAILED")
    log = next(run.glob("submit/0001/*.log")).read_text()
    assert f"job {job} was requeued 2 times, --max-requeues=2; it ends here." in log and "Traceback" not in log

    again = lingen(cluster, *words, f"stages.clips.train.steps={told['step'] + 5}")
    last = wait(cluster, run, lambda told: told["state"] == "finished")
    assert last["step"] == last["steps"] == told["step"] + 5 and last["eta_seconds"] == 0
    submitted = [json.loads(path.read_text()) for path in sorted(run.glob("submit/*/submitted.json"))]
    assert [one["job"] for one in submitted] == [job, again] and submitted[0]["versions"]["lingen"]


def test_who_cancels_a_job_does_not_want_it_back(cluster: slurm.Cluster, tiny_recipe: Path, here: Path):
    run = here / "run"
    job = lingen(cluster, "submit", "--recipe", str(tiny_recipe), "--run", str(run), *LONG)
    wait(cluster, run, is_amid)
    cluster.run("scancel", job)
    assert wait(cluster, run, lambda told: told["state"] == "stopped")["reason"] == "stopped by SIGTERM"
    wait(cluster, run, lambda told: not cluster.run("squeue", "--noheader").stdout.strip())
    assert cluster.state(job) == "CANCELLED" and "it is left so" in next(run.glob("submit/0001/*.log")).read_text()


def test_an_array_encodes_in_shares(cluster: slurm.Cluster, tiny_recipe: Path, here: Path):
    out = here / "latents"
    words = ["encode", "--recipe", str(tiny_recipe), "--out", str(out), "--device", "cpu"]
    lingen(cluster, "submit", "--array", "2", "--", *words)
    end = time.monotonic() + 120
    while cluster.run("squeue", "--noheader").stdout.strip() and time.monotonic() < end:
        time.sleep(0.5)
    logs = "\n".join(path.read_text() for path in here.glob("latents-submit/0001/*.log"))
    assert len(list(here.glob("latents-submit/0001/*.log"))) == 2
    assert list(out.glob("*.tar")) and "samples of" in logs, logs
