"""`lingen doctor --preflight` and `lingen fit --preflight`: what is looked at, what is named; no trace is left."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path

import pytest

from lingen.launch.checks import NODE_CHECKS, PreflightContext
from lingen.ranks.environment import UnfitError
from lingen.recipe import load_stages
from lingen.weights import read_weights
from tests.helpers.commands import ROOT, lingen_command, run_command
from tests.helpers.ranks import free_port, run_ranks

TWO_RUNS = """
import sys
from lingen.launch.preflight import preflight
from lingen.recipe import load_for_training
from lingen.run import fit_curriculum

curriculum = load_for_training(sys.argv[1], ["trainer.num_nodes=2", "sample.prompts=[]"], "images")
fit_curriculum(curriculum, run="without", stage="images")
fit_curriculum(curriculum, run="with", stage="images", before=lambda *site: preflight(*site).check())
"""


@pytest.mark.slow
def test_training_is_the_same_after_a_preflight(tiny_recipe: Path, here: Path):
    """Two ranks, bit for bit; and nothing else lies in the folder."""
    (here / "two_runs.py").write_text(TWO_RUNS)
    run_ranks([str(here / "two_runs.py"), str(tiny_recipe)], ranks=2, nodes=2)
    runs = [here / "without", here / "with"]
    without, after = (read_weights(run / "stages/images/weights.safetensors", "raw") for run in runs)
    assert without.keys() == after.keys() and all((after[name] == value).all() for name, value in without.items())
    files = [sorted(str(path.relative_to(run)) for path in run.rglob("*")) for run in runs]
    assert files[0] == files[1]


@pytest.mark.slow
def test_the_doctor_writes_nothing(tiny_recipe: Path, here: Path):
    before = sorted(here.rglob("*"))
    done = run_command("doctor", "--preflight", "--recipe", str(tiny_recipe), "--run", "r/new", "--json", cwd=here)
    told = json.loads(done.stdout)
    assert done.returncode == 0 and sorted(here.rglob("*")) == before
    ((node, values),) = told["nodes"].items()
    assert values["ranks"] == 1 and min(values["write"], values["free"], values["memory"]) > 0 and not told["faults"]


QUICK = """
import os, signal, threading, time
import lingen.launch.preflight as preflight

preflight.LAG = 2.0
preflight.NODE_CHECKS = tuple(look._replace(seconds=8.0) for look in preflight.NODE_CHECKS)

def stop():
    while not any(thread.name == "lingen-preflight" for thread in threading.enumerate()):
        time.sleep(0.001)
    os.kill(os.getpid(), signal.SIGSTOP)

if "STOPS" in os.environ:
    threading.Thread(target=stop, daemon=True).start()
"""
"""Shorter patience; and a process that stops in its first look."""


@pytest.mark.slow
@pytest.mark.parametrize("fault", ["a rank that hangs", "shards that one node does not see"])
def test_a_rank_is_named_that_others_wait_for(fault: str, tiny_recipe: Path, tiny_shards: Path, here: Path):
    """The others end soon, and say which: a start without its node may do."""
    hangs = fault == "a rank that hangs"
    if not hangs and os.geteuid():
        pytest.skip("only root can hide a folder from one process")
    (here / "quick.py").write_text(QUICK)
    command = lingen_command("doctor", "--preflight", "--recipe", str(tiny_recipe), "--import", "quick", "--json")
    hidden = ["unshare", "--mount", "bash", "-c", f'mount -t tmpfs none {tiny_shards}; exec "$@"', "x"]
    env = os.environ | {
        "PYTHONPATH": f"{ROOT}:{here}", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": free_port(), "WORLD_SIZE": "2",
        "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1", "OMP_NUM_THREADS": "1",
    }  # fmt: skip
    ranks = [
        subprocess.Popen(
            [*([] if hangs or not rank else hidden), *command, "trainer.num_nodes=2"],
            env=env | {"RANK": str(rank), "SLURMD_NODENAME": f"n{rank}"} | ({"STOPS": ""} if hangs and rank else {}),
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        )
        for rank in range(2)
    ]  # fmt: skip
    try:
        out, err = ranks[0].communicate(timeout=200)
        told = json.loads(out)
        assert ranks[0].returncode == 75 and err == "loading PyTorch ...\n" and told["hung"] == hangs
        ((look, nodes, text),) = (fault.values() for fault in told["faults"])
        assert nodes == ["n1"] and look == ("versions" if hangs else "samples")
        assert ("rank 1 on n1 is not through after 8 s" if hangs else "no file matches") in text
    finally:
        for one in ranks:
            one.kill()
            one.communicate()


def test_a_slow_node_and_a_wrong_clock_are_named(tiny_recipe: Path):
    site = PreflightContext(Path("r"), load_stages(tiny_recipe))
    site.report.nodes = {f"n{number}": {} for number in range(5)}
    speeds = {"n0": 20e9, "n1": 21e9, "n2": 4e9, "n3": 19e9, "n4": 20e9}
    words = [(node, {"all_reduce": 1e9, "network": speed}) for node, speed in speeds.items()]
    judges = {look.name: look.judge for look in NODE_CHECKS}
    judges["network"](site, words)
    clock = {"n0": 0.0, "n1": 0.3, "n2": 0.0, "n3": -90.0, "n4": 0.1}
    disk = {"write": 1e9, "free": 1e9, "seen": True}
    judges["run folder"](site, [(node, disk | {"clock": 1e9 + late}) for node, late in clock.items()])
    assert [(one["check"], one["nodes"]) for one in site.report.faults] == [
        ("network", ["n2"]), ("clock", ["n3"])
    ]  # fmt: skip
    judges["run folder"](site, [(node, disk | {"clock": 1e9, "free": 10.0}) for node in clock])
    assert site.report.faults[-1]["nodes"] == [] and "GB at" in site.report.faults[-1]["told"]
    with pytest.raises(UnfitError) as caught:
        site.report.check()
    assert caught.value.nodes == []  # the disk is full for all
