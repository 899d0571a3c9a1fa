"""Nodes of a real SLURM that fail: the preflight names one and its job goes on without it; one is drained, one down."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.helpers import slurm
from tests.helpers.commands import ROOT, lingen_command
from tests.test_cluster import lingen, seen_until

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(slurm.fault() is not None, reason=f"no SLURM here: {slurm.fault()}"),
]
ONE_NODE = """#!/bin/bash
if [ "$SLURMD_NODENAME" = n2 ]; then {there}; fi
exec "$@"
"""
"""Before a rank: what is otherwise on node 2."""
EVENTS = '''
"""In a job's first life its second node is drained, and it is signalled; in its second one that node is down."""
import os, subprocess, time
from lingen.training.denoiser import LinGenModule

step = LinGenModule.training_step
life, rank = os.environ.get("SLURM_RESTART_COUNT", "0"), os.environ.get("SLURM_PROCID")

def scontrol(node, state):
    subprocess.run(["scontrol", "update", f"NodeName={node}", f"State={state}", "Reason=disk"], check=True)

def act(self, batch, batch_idx):
    if (self.recipe.stage, rank, self.global_step) == ("clips", "1", 1 + int(life)) and life < "2":
        if life == "0":
            scontrol(os.environ["SLURMD_NODENAME"], "DRAIN")
            subprocess.run(["scancel", "--signal=USR1", os.environ["SLURM_JOB_ID"]], check=True)
        else:
            scontrol("n2", "RESUME")
            scontrol(os.environ["SLURMD_NODENAME"], "DOWN")
            time.sleep(600)
        time.sleep(5)
    return step(self, batch, batch_idx)

LinGenModule.training_step = act
'''


@pytest.fixture(scope="module")
def cluster() -> Iterator[slurm.Cluster]:
    with slurm.slurm_for_lingen(3) as one:
        yield one


def test_a_node_with_other_versions_is_left_out(cluster: slurm.Cluster, tiny_recipe: Path, here: Path):
    """The job goes into the queue again and is trained by the other nodes; `status` says why."""
    (here / "other" / "webdataset-9.9.dist-info").mkdir(parents=True)
    (here / "other" / "webdataset-9.9.dist-info" / "METADATA").write_text("Name: webdataset\nVersion: 9.9\n")
    (here / "wrap").write_text(ONE_NODE.format(there=f"export PYTHONPATH={here}/other:$PYTHONPATH"))
    (here / "wrap").chmod(0o755)
    settings = cluster.folder / "config" / "lingen" / "slurm.yaml"
    settings.parent.mkdir(parents=True)
    settings.write_text(f"srun: [{here}/wrap]\n")
    run = here / "run"
    words = ["--recipe", str(tiny_recipe), "--run", str(run), "--nodes", "2", "--stage", "images", "sample.prompts=[]"]
    job = lingen(cluster, "submit", *words)
    settings.unlink()
    told = seen_until(cluster, run, job, "COMPLETED")[-1]
    log = next(run.glob("submit/0001/*.log")).read_text()
    fault = "unfit: n2: versions: webdataset is 9.9 there"
    assert [one["reason"].startswith(fault) for one in told["restarts"]] == [True]
    assert {one["host"] for one in told["ranks"]} == {"n1", "n3"} and "Traceback" not in log
    assert fault in log and "lingen: it goes on without n2" in log


def test_a_drained_node_and_one_that_is_down(cluster: slurm.Cluster, tiny_recipe: Path, here: Path):
    (here / "events.py").write_text(EVENTS)
    run = here / "run"
    words = ["--recipe", str(tiny_recipe), "--run", str(run), "--nodes", "2", "--import", "events", "--no-preflight"]
    cluster.env["PYTHONPATH"] = f"{ROOT}:{here}"
    job = lingen(cluster, "submit", *words, "sample.prompts=[]", "train.checkpoint_every=1")
    seen = seen_until(cluster, run, job, "COMPLETED")
    assert [one["reason"].split(";")[0] for one in seen[-1]["restarts"]][0] == "stopped by SIGUSR1"
    assert seen[-1]["restarts"][1]["reason"].startswith("killed: ")
    assert seen[-1]["restarts"][1]["reason"].endswith("; n3 is down (disk)")
    assert {one["host"] for one in seen[-1]["ranks"]} == {"n1", "n2"}
    assert {one["state"] for one in seen} <= {"new", "running", "waiting", "stopped", "dead", "finished"}


def test_a_node_is_named_with_all_that_it_lacks(cluster: slurm.Cluster, tiny_recipe: Path, here: Path):
    """Another disk under the run folder, a small /dev/shm; and what the scheduler's settings would cost."""
    run = here / "run"
    run.mkdir()
    (here / "quick.py").write_text("import lingen.files\nlingen.files.SLOW_DISK = 2.0\n")
    mounts = f"mount -t tmpfs none {run}; mount -t tmpfs -o size=4k none /dev/shm"
    (here / "wrap").write_text(ONE_NODE.format(there=f'exec unshare --mount bash -c \'{mounts}; exec "$@"\' x "$@"'))
    (here / "wrap").chmod(0o755)
    words = ["doctor", "--preflight", "--recipe", str(tiny_recipe), "--run", str(run), "--import", "quick", "--json"]
    words += ["trainer.num_nodes=2", "data.workers=1"]
    script = here / "job"
    command = " ".join([f"{here}/wrap", *lingen_command(*words)])
    script.write_text(
        f"#!/bin/bash\n#SBATCH --nodes=2 --ntasks-per-node=1 --no-requeue --time=10\n"
        f"#SBATCH --chdir={here} --output={here}/log\n"
        f"srun {command} > {here}/told; echo $? > {here}/code\n"
    )
    cluster.env["PYTHONPATH"] = f"{ROOT}:{here}"
    cluster.finish(script, here / "log", 120)
    told = json.loads((here / "told").read_text())
    assert (here / "code").read_text() == "75\n" and [list(told["nodes"]), told["hung"]] == [["n1", "n2"], False]
    assert [(one["check"], one["nodes"]) for one in told["faults"]] == [("run folder", ["n2"]), ("/dev/shm", ["n2"])]
    assert told["nodes"]["n2"]["shm"] == 4096 and told["nodes"]["n1"]["network"] > 0
    assert [note.rpartition(" ")[2] for note in told["notes"]] == [
        "--requeue", "--signal=USR1@120", "--kill-on-bad-exit=1"
    ]  # fmt: skip
    assert not list(here.rglob(".lingen-preflight-*"))
