"""`lingen submit` on a real SLURM of two nodes: preempted, killed, cancelled, requeued, finished; `status` is true."""

from __future__ import annotations

import contextlib
import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.helpers import slurm
from tests.helpers.commands import ROOT, lingen_command

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(slurm.fault() is not None, reason=f"no SLURM here: {slurm.fault()}"),
]
EVENTS = '''
"""Of a job: its script is signalled in its first life, as --signal=B:USR1@600 does, a rank killed in its second."""
import os, subprocess, time
from lingen.ranks import signals
from lingen.training.denoiser import LinGenModule

step = LinGenModule.training_step
life, rank = os.environ.get("SLURM_RESTART_COUNT", "0"), os.environ.get("SLURM_PROCID")

def act(self, batch, batch_idx):
    if self.recipe.stage == "clips" and rank == "1":
        if (life, self.global_step) == ("0", 2):
            subprocess.run(["scancel", "--signal=USR1", "--batch", os.environ["SLURM_JOB_ID"]], check=True)
            while signals.noted() is None:
                time.sleep(0.01)
        if (life, self.global_step) == ("1", 3):
            os.kill(os.getpid(), 9)
    return step(self, batch, batch_idx)

LinGenModule.training_step = act
'''


@pytest.fixture(scope="module")
def cluster() -> Iterator[slurm.Cluster]:
    with slurm.slurm_for_lingen(2) as one:
        yield one


def lingen(cluster: slurm.Cluster, *words: str) -> str:
    done = cluster.run(*lingen_command(*words), timeout=120)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def status(cluster: slurm.Cluster, run: Path) -> dict[str, Any]:
    return json.loads(lingen(cluster, "status", str(run), "--json"))


def state_of(cluster: slurm.Cluster, job: str) -> str:
    """What SLURM says of a job, once it answers."""
    for _ in range(20):
        with contextlib.suppress(StopIteration):
            return cluster.state(job)
        time.sleep(1)
    raise AssertionError("SLURM does not answer")


def seen_until(cluster: slurm.Cluster, run: Path, job: str, *states: str) -> list[dict[str, Any]]:
    """Each status of a run until its job has come to its end, and what SLURM calls that is one of these."""
    seen, end = [status(cluster, run)], time.monotonic() + 240
    while (state := state_of(cluster, job)) in ("PENDING", "RUNNING", "COMPLETING", "REQUEUED"):
        assert time.monotonic() < end, "\n".join(path.read_text() for path in run.glob("submit/*/*.log"))
        seen.append(status(cluster, run))
        time.sleep(1)
    assert state in states, "\n".join(path.read_text() for path in run.glob("submit/*/*.log"))
    return [*seen, status(cluster, run)]


def test_two_nodes_are_preempted_killed_and_finish(
    cluster: slurm.Cluster, tiny_recipe: Path, here: Path, monkeypatch: pytest.MonkeyPatch
):
    (here / "events.py").write_text(EVENTS)
    monkeypatch.setitem(cluster.env, "PYTHONPATH", f"{ROOT}:{here}")
    run = here / "run"
    words = ["submit", "--recipe", str(tiny_recipe), "--run", str(run), "--nodes", "2", "--import", "events"]
    job = lingen(cluster, *words, "sample.prompts=[]", "train.checkpoint_every=1", "--max-requeues", "2")
    seen = seen_until(cluster, run, job, "COMPLETED")

    told, log = seen[-1], next(run.glob("submit/0001/*.log")).read_text()
    assert (told["state"], told["step"], told["eta_seconds"]) == ("finished", 6, 0)
    assert told["checkpoint"] == f"{run}/stages/clips/step-00000006"
    assert [one["reason"] for one in told["restarts"]] == [
        "stopped by SIGUSR1", "killed: exit code 137 (SIGKILL); silent first: rank 1 on n2"
    ]  # fmt: skip
    assert {(one["rank"], one["host"]) for one in told["ranks"]} == {(0, "n1"), (1, "n2")}
    assert all(one["alive"] == (one["state"] == "running") for one in seen)
    assert {"running", "waiting"} <= {one["state"] for one in seen} and "failed" not in {one["state"] for one in seen}
    queued = f"job {job} waits in the queue (BeginTime); stopped by SIGUSR1"
    assert queued in {one["reason"] for one in seen}
    assert "goes into the queue again, 2 of at most 2 times." in log and "Traceback" not in log
    submitted = json.loads((run / "submit" / "0001" / "submitted.json").read_text())
    assert submitted["job"] == job and submitted["versions"]["lingen"] and "PATH" in submitted["environment"]


def test_who_cancels_a_job_does_not_want_it_back(cluster: slurm.Cluster, tiny_recipe: Path, here: Path):
    run = here / "run"
    words = ["--recipe", str(tiny_recipe), "--run", str(run), "stages.clips.train.steps=100000"]
    job = lingen(cluster, "submit", *words)
    end = time.monotonic() + 120
    while status(cluster, run)["stage"] != "clips" and time.monotonic() < end:
        time.sleep(0.3)
    cluster.run("scancel", job)
    told = seen_until(cluster, run, job, "CANCELLED")[-1]
    assert (told["state"], told["reason"]) == ("stopped", "stopped by SIGTERM")
    assert "it is left so" in next(run.glob("submit/0001/*.log")).read_text()


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
