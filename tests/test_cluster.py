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
LONG = ["stages.clips.train.steps=2000", "train.checkpoint_every=500", "sample.prompts=[]"]


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
        assert told["alive"] == (told["state"] == "running") and 0 <= told["step"] <= max(told["steps"], told["step"])
        if holds(told):
            return told
        time.sleep(0.5)
    logs = "\n".join(path.read_text() for path in run.glob("submit/*/*.log"))
    raise AssertionError(f"it did not come: {told}\n{logs}")


def is_amid(told: dict[str, Any]) -> bool:
    return told["state"] == "running" and told["stage"] == "clips" and len(told["ranks"]) == 2 and told["step"] > 2


def test_two_nodes_are_preempted_and_killed_and_finish(cluster: slurm.Cluster, tiny_recipe: Path, here: Path):
    run = here / "run"
    words = ["submit", "--recipe", str(tiny_recipe), "--run", str(run), "--nodes", "2", *LONG, "--max-requeues", "3"]
    job = lingen(cluster, *words)
    assert job.isdecimal()
    told = wait(cluster, run, is_amid)
    assert {one["host"] for one in told["ranks"]} == {"n1", "n2"} and told["restarts"] == []
    cluster.run("scancel", "--signal=USR1", job)  # as a preemption or a time limit does, to the ranks
    told = wait(cluster, run, lambda told: told["state"] == "waiting")
    assert told["reason"] == f"job {job} waits in the queue (BeginTime); stopped by SIGUSR1"
    before = told["step"]
    told = wait(cluster, run, is_amid)
    assert [one["reason"] for one in told["restarts"]] == ["stopped by SIGUSR1"] and told["step"] >= before
    second = next(one for one in told["ranks"] if one["host"] == "n2")
    os.kill(json.loads((run / "ranks" / f"{second['rank']:05d}.json").read_text())["pid"], 9)
    told = wait(cluster, run, lambda told: len(told["restarts"]) == 2 and told["state"] == "running")
    assert told["restarts"][1]["reason"] == "killed: exit code 137 (SIGKILL); silent first: rank 1 on n2"
    told = wait(cluster, run, lambda told: told["state"] == "finished")
    assert (told["step"], told["steps"]) == (2000, 2000) and told["eta_seconds"] == 0
    assert json.loads((run / "submit" / "0001" / "submitted.json").read_text())["job"] == job
    log = next(run.glob("submit/0001/*.log")).read_text()
    assert "goes into the queue again, 2 of at most 3 times." in log and "Traceback" not in log


def test_a_signal_to_the_script_alone_and_an_end_to_requeues(cluster: slurm.Cluster, tiny_recipe: Path, here: Path):
    run = here / "run"
    words = ["submit", "--recipe", str(tiny_recipe), "--run", str(run), "trainer.devices=2", *LONG]
    job = lingen(cluster, *words, "--max-requeues", "0")
    wait(cluster, run, is_amid)
    cluster.run("scancel", "--signal=USR1", "--batch", job)  # what --signal=B:USR1@600 does
    told = wait(cluster, run, lambda told: told["state"] == "stopped")
    assert told["reason"] == "stopped by SIGUSR1"
    log = next(run.glob("submit/0001/*.log"))
    end = time.monotonic() + 60
    while "it ends here" not in log.read_text() and time.monotonic() < end:
        time.sleep(0.2)
    assert "was requeued 0 times, --max-requeues=0; it ends here." in log.read_text()
    again = lingen(cluster, *words)
    wait(cluster, run, is_amid)
    cluster.run("scancel", again)  # whoever cancels a job does not want it back
    told = wait(cluster, run, lambda told: told["state"] == "stopped")
    assert told["reason"] == "stopped by SIGTERM" and len(told["restarts"]) == 1
    assert sorted(path.name for path in (run / "submit").iterdir()) == ["0001", "0002"]
    assert cluster.state(again) == "CANCELLED"


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
