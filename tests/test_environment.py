"""Where a process stands among the ranks of a run: what its environment says, and what does not work."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace

import pytest

from lingen.ranks.environment import Rank, first_host, rank_of
from tests.helpers.commands import ROOT

TASK = {
    "SLURM_JOB_ID": "12", "SLURM_STEP_ID": "3", "SLURM_PROCID": "5", "SLURM_LOCALID": "1", "SLURM_NODEID": "2",
    "SLURM_STEP_NUM_TASKS": "6", "SLURM_STEP_NUM_NODES": "3", "SLURM_STEP_NODELIST": "gpu[07-09]",
}  # fmt: skip
"""What srun says to the last of six tasks on three nodes."""
RANK = {
    "RANK": "5", "WORLD_SIZE": "6", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "gpu07",
    "MASTER_PORT": "29500",
}  # fmt: skip
"""What torchrun says to the same."""


def test_a_task_of_srun():
    place = rank_of(TASK)
    assert place == Rank("srun", 5, 6, 1, 2, 3, "gpu07", place.port) and place.per_node == 2
    assert 10_000 <= place.port < 30_000
    assert rank_of(TASK | {"SLURM_STEP_ID": "4"}).port != place.port != rank_of(TASK | {"SLURM_JOB_ID": "13"}).port
    own = rank_of(TASK | {"MASTER_ADDR": "10.0.0.7", "MASTER_PORT": "2000"})
    assert own == replace(place, address="10.0.0.7", port=2000)
    assert rank_of(TASK | {"SLURM_JOB_NAME": "interactive"}) == place  # whatever the job is called
    on_one_node = {"SLURM_STEP_NUM_NODES": "1", "SLURM_NODEID": "0", "SLURM_LOCALID": "5"}
    assert rank_of(TASK | on_one_node).address == "127.0.0.1"


def test_a_rank_of_torchrun_and_one_of_lingen():
    assert rank_of(RANK) == Rank("torchrun", 5, 6, 1, 2, 3, "gpu07", 29500)
    assert rank_of(RANK | TASK).by == "torchrun"  # srun torchrun ... lingen fit
    assert rank_of(RANK | {"GROUP_RANK": "0"}).node == 0
    assert rank_of(RANK | {"LINGEN_PARENT": "17"}).by == "lingen"


@pytest.mark.parametrize(
    "env",
    [
        {},
        {name: value for name, value in TASK.items() if name != "SLURM_STEP_ID"},  # a batch script
        TASK | {"SLURM_STEP_NUM_TASKS": "1", "SLURM_PROCID": "0", "SLURM_LOCALID": "0"},
        RANK | {"WORLD_SIZE": "1", "RANK": "0", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1"},
        {"RANK": "1", "LOCAL_RANK": "1"},
    ],
)
def test_who_is_nobodys_rank(env: dict[str, str]):
    assert rank_of(env) == Rank()


@pytest.mark.parametrize(
    ("nodes", "first"),
    [
        ("n1", "n1"), ("n1,n2", "n1"), ("n[1-2]", "n1"), ("gpu[007-009,12],cpu1", "gpu007"), ("n[3,5]", "n3"),
        ("rack[1-2]node[03-04].site", "rack1node03.site"), ("n[5]", "n5"), ("", ""),
    ],
)  # fmt: skip
def test_the_first_host(nodes: str, first: str):
    assert first_host(nodes) == first


def test_it_is_told_without_torch():
    code = "import sys, lingen.ranks.environment; print('torch' in sys.modules)"
    told = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert told.stdout.strip() == "False"
