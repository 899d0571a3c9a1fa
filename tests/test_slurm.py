"""Real SLURM, two nodes on this machine: steps, refusals, and the script of docs/cluster.md with its requeue."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from lingen.run import fit
from lingen.weights import find_weights, read_weights
from tests.helpers import slurm
from tests.helpers.commands import ROOT, lingen_command
from tests.helpers.slurm import Cluster, script_of_docs
from tests.helpers.tiny import write_recipe

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(slurm.fault() is not None, reason=str(slurm.fault())),
]
WORDS = [
    "trainer.precision=64-true", "data.batch={image: 1, video: 1}", "sample.prompts=[]", "train.checkpoint_every=3",
]  # fmt: skip
TASK = '''
"""A task of `lingen fit`: the last rank has SLURM signal the job in its first life."""
import os, subprocess, sys, time
from lingen.ranks import signals
from lingen.training.denoiser import LinGenModule

step = LinGenModule.training_step

def act(self, batch, batch_idx):
    last = os.environ["SLURM_PROCID"] == "1" and "SLURM_RESTART_COUNT" not in os.environ
    if last and self.recipe.stage == "clips" and self.global_step == 2:
        subprocess.run(["scancel", "--signal=USR1", os.environ["SLURM_JOB_ID"]], check=False)  # gets it too
        while signals.noted() is None:
            time.sleep(0.01)
    return step(self, batch, batch_idx)

LinGenModule.training_step = act
from lingen.__main__ import enter
sys.exit(enter())
'''


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    with slurm.slurm(nodes=2) as running:
        running.env |= {"PYTHONPATH": str(ROOT)}
        yield running


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory, tiny_shards: Path) -> Path:
    return write_recipe(tmp_path_factory.mktemp("slurm") / "tiny.yaml", tiny_shards)


@pytest.fixture(scope="module")
def of_two_nodes(cluster: Cluster, recipe: Path) -> tuple[Path, str]:
    """A run of two nodes, and what it said; started without a number of tasks for each node, and called
    ``interactive``."""
    run = recipe.parent / "two"
    fit = lingen_command("fit", "--recipe", str(recipe), "--run", str(run), *WORDS, "trainer.num_nodes=2")
    ended = cluster.run("srun", "-N2", "-n2", "--job-name=interactive", *fit)
    assert ended.returncode == 0, ended.stderr
    return run, ended.stderr


def weights(run: Path) -> dict[str, torch.Tensor]:
    path = find_weights(run)
    return read_weights(path, "raw") | {f"a.{name}": value for name, value in read_weights(path, "averaged").items()}


def test_two_nodes_equal_one_process(of_two_nodes: tuple[Path, str], recipe: Path, tmp_path: Path):
    run, said = of_two_nodes
    fit(recipe, [*WORDS, "data.batch={image: 2, video: 2}"], run=tmp_path / "one")
    torch.testing.assert_close(weights(run), weights(tmp_path / "one"), rtol=1e-9, atol=1e-9)
    assert said.count("stage 1/2 images") == 1 and "srun" not in said


def test_ranks_that_do_not_fit_are_refused_once(cluster: Cluster, recipe: Path, tmp_path: Path):
    words = lingen_command("fit", "--recipe", str(recipe), "--run", str(tmp_path / "run"), "train.steps=1")
    ended = cluster.run("srun", "-N2", "-n2", *words)
    assert ended.returncode == 2
    own = [line for line in ended.stderr.splitlines() if not line.startswith(("srun: ", "loading PyTorch"))]
    assert len(own) == 1 and own[0].startswith("srun has started 2 ranks, 1 on each of 2 nodes, but stage images asks")
    assert not (tmp_path / "run").exists()


def test_the_script_of_the_docs_is_requeued_and_changes_nothing(
    cluster: Cluster, of_two_nodes: tuple[Path, str], recipe: Path, tmp_path: Path
):
    (tmp_path / "task.py").write_text(TASK)
    run, log = tmp_path / "run", tmp_path / "job.log"
    words = ["fit", "--recipe", str(recipe), "--run", str(run), *WORDS, "trainer.num_nodes=2"]
    fit = shlex.join([sys.executable, str(tmp_path / "task.py"), *words])
    (tmp_path / "job.sh").write_text(script_of_docs(fit, log))
    state = cluster.finish(tmp_path / "job.sh", log, seconds=150)
    said = log.read_text()
    assert state == "COMPLETED", said
    assert said.count("Stopped by SIGUSR1; the same command goes on from here.") == 1
    assert said.count("going on from step 3") == 1 and "Traceback" not in said
    for name, value in weights(of_two_nodes[0]).items():
        assert torch.equal(value, weights(run)[name]), name
