"""Ranks that lingen or torchrun start: they meet, rank 0 decides, one that dies ends the run, and none is left."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from datetime import timedelta
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from lingen import files
from lingen.cli import main
from lingen.ranks import launch, local_ranks
from lingen.ranks.environment import OF_LAUNCHERS, OtherRankError, Rank
from lingen.ranks.launch import check_layout, ranks_to_start
from lingen.recipe import load_recipe
from lingen.recipe.errors import RecipeError
from lingen.run import fit
from lingen.run_folder.folder import RunFolder
from lingen.training import trainer
from lingen.weights import find_weights, read_weights
from tests.helpers.commands import ROOT

# what a recipe asks for, and what is there


def asked(recipe: Path, *overrides: str) -> list:
    return [load_recipe(recipe, [*overrides], stage=name) for name in ("images", "clips")]


SRUN = Rank(by="srun", ranks=4, nodes=2)


@pytest.mark.parametrize(
    ("own", "overrides", "said"),
    [
        (SRUN, [], "srun has started 4 ranks, 2 on each of 2 nodes, but stage images asks for trainer.devices=1 and "
         "trainer.num_nodes=1. Set trainer.devices=2 trainer.num_nodes=2, or start with srun -N1 --ntasks-per-node=1."),
        (SRUN, ["trainer.devices=2"], "trainer.devices=2 and trainer.num_nodes=1"),
        (SRUN, ["trainer.devices=2", "trainer.num_nodes=2", "stages.clips.trainer.devices=1"], "stage clips asks for"),
        (Rank(by="torchrun", ranks=2), [], "or start with torchrun --nnodes=1 --nproc-per-node=1."),
        (Rank(by="lingen", ranks=2), [], "This process has started 2 ranks for a run before"),
        (Rank(), ["trainer.num_nodes=2"], "runs alone. Start with srun -N2 --ntasks-per-node=1 lingen fit ..."),
        (Rank(), ["stages.clips.trainer.devices=2"], "stage images 1, stage clips 2. Give all stages as many"),
        (Rank(), ["trainer.devices=2", "trainer.strategy=ddp_spawn"], "set trainer.strategy=ddp"),
        (Rank(), ["trainer.devices=99", "trainer.accelerator=gpu"], "asks for 99 GPUs of each machine"),
    ],
)  # fmt: skip
def test_ranks_that_are_not_those_that_are_asked_for(
    tiny_recipe: Path, monkeypatch: pytest.MonkeyPatch, own: Rank, overrides: list[str], said: str
):
    monkeypatch.setattr(launch, "here", lambda: own)
    monkeypatch.delenv("SLURM_JOB_ID", raising=False)
    with pytest.raises(RecipeError) as caught:
        ranks_to_start(asked(tiny_recipe, *overrides))
    assert said in str(caught.value)


def test_how_many_ranks_are_missing(tiny_recipe: Path, monkeypatch: pytest.MonkeyPatch):
    assert ranks_to_start(asked(tiny_recipe)) == 1 and ranks_to_start([]) == 1
    assert ranks_to_start(asked(tiny_recipe, "trainer.devices=3")) == 3
    monkeypatch.setattr(launch, "here", lambda: SRUN)
    assert ranks_to_start(asked(tiny_recipe, "trainer.devices=2", "trainer.num_nodes=2")) == 1


def test_a_batch_script_without_srun_is_told(tiny_recipe: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    with pytest.raises(RecipeError, match="is no task of srun, though it runs in job 7"):
        ranks_to_start(asked(tiny_recipe, "trainer.num_nodes=2"))
    assert ranks_to_start(asked(tiny_recipe)) == 1


def layout(*nodes: int) -> list[Rank]:
    """Ranks on these nodes, in order."""
    local = [nodes[:rank].count(node) for rank, node in enumerate(nodes)]
    return [Rank("srun", rank, len(nodes), local[rank], node, len(set(nodes))) for rank, node in enumerate(nodes)]


def test_how_ranks_may_lie_on_nodes():
    check_layout(layout(0, 0, 1, 1))
    with pytest.raises(RecipeError, match="3 ranks lie on 2 nodes as 2, 1; .* --ntasks-per-node"):
        check_layout(layout(0, 0, 1))
    with pytest.raises(RecipeError, match="--distribution=block"):
        check_layout(layout(0, 1, 0, 1))


def test_a_strategy_that_makes_other_ranks_is_refused(
    tiny_recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """Two ranks of it would each take themselves for the first one."""
    monkeypatch.setattr(trainer, "here", lambda: Rank("srun", ranks=2, nodes=2))
    (stage, _) = asked(tiny_recipe, "trainer.num_nodes=2", "trainer.strategy=single_device")
    with pytest.raises(RecipeError, match="2 ranks train, but trainer.strategy=single_device makes 1 of them"):
        trainer.build_trainer(stage, RunFolder(tmp_path), [])


def test_a_refusal_starts_no_ranks(tiny_recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys):
    monkeypatch.setattr(local_ranks, "LocalRanks", lambda *_: pytest.fail("ranks were started"))
    words = ["fit", "--recipe", str(tiny_recipe), "--run", str(tmp_path / "run"), "trainer.devices=2", "init=/nowhere"]
    assert main(words) == 2
    assert capsys.readouterr().err.count("/nowhere: there is no run folder or weights file.") == 1
    assert not (tmp_path / "run").exists()


def test_a_console_has_no_command_for_other_ranks(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(sys.modules, "__main__", type(sys)("__main__"))
    monkeypatch.setattr(sys, "orig_argv", ["python"])
    with pytest.raises(RecipeError, match="cannot be started from a notebook or a console"):
        local_ranks.start_ranks(2)


def test_a_first_node_without_an_address_is_told_once_a_node(monkeypatch: pytest.MonkeyPatch):
    own = Rank("srun", rank=2, ranks=4, node=1, nodes=2, address="nowhere.invalid", port=2000)
    monkeypatch.setattr(launch, "here", lambda: own)
    monkeypatch.setattr(launch, "_be_quiet", lambda: None)
    with pytest.raises(RecipeError, match="4 ranks cannot meet at nowhere.invalid:2000: this name has no address on"):
        launch.join()
    monkeypatch.setattr(launch, "here", lambda: replace(own, rank=3, local_rank=1))
    with pytest.raises(OtherRankError):
        launch.join()


def test_ranks_that_do_not_come_are_named(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture):
    monkeypatch.setattr(launch, "MEETING", timedelta(seconds=2))
    monkeypatch.setattr(launch, "TELL_AFTER", timedelta(0))
    store = dist.HashStore()
    for rank in (0, 2):
        store.set(f"here/{rank}", "")
    with pytest.raises(RecipeError, match=r"within \d+ s these did not come: rank 1 of node 0, 3 of node 1"):
        launch.meet(SRUN, store)
    assert [one.getMessage() for one in caplog.records] == ["2 ranks are here; waits for rank 1 of node 0, 3 of node 1"]
    with pytest.raises(OtherRankError):
        launch.meet(replace(SRUN, rank=2), store)
    for rank in (1, 3):
        store.set(f"here/{rank}", "")
    launch.meet(SRUN, store)
    launch.meet(replace(SRUN, rank=2), store)


# a slow disk


def test_a_file_that_comes_late_and_one_that_never_comes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    path = tmp_path / "late"
    threading.Timer(0.3, path.touch).start()
    assert files.wait_for(path) == path and path.exists()
    monkeypatch.setattr(files, "SLOW_DISK", 0.3)
    with pytest.raises(FileNotFoundError, match="not seen on .* after 0 s, though rank 0 has it: is it shared"):
        files.wait_for(tmp_path / "never")


# two ranks

SCRIPT = '''
"""`lingen fit` on several ranks, one of which has something happen to it in the second stage."""
import os, signal, sys, time
from pathlib import Path

what, rank = sys.argv.pop(1), int(os.environ.get("RANK", "0"))
Path(f"pid-{rank}").write_text(str(os.getpid()))
if rank and what.startswith("slow"):
    from lingen import files

    asked, late = {}, 1.0 if what == "slow" else 99.0
    exists = Path.exists

    def seen_late(path):
        if "stages" not in path.parts:
            return exists(path)
        with open("asked", "a") as file:
            print(path.name, file=file)
        return time.monotonic() - asked.setdefault(path, time.monotonic()) > late and exists(path)

    Path.exists = seen_late
    Path.is_file = seen_late
    files.SLOW_DISK = 1.5

from lingen.training.denoiser import LinGenModule

step = LinGenModule.training_step

def act(self, batch, batch_idx):
    if self.recipe.stage == "clips" and self.global_step == 2:
        if what == "killed" and rank == 1 or what == "orphan" and rank == 0:
            os.kill(os.getpid(), signal.SIGKILL)
    return step(self, batch, batch_idx)

LinGenModule.training_step = act
from lingen.__main__ import enter
sys.exit(enter())
'''


@pytest.fixture
def two(tiny_recipe: Path, here: Path) -> Callable[..., subprocess.CompletedProcess[str]]:
    """Two ranks of `SCRIPT` to their end."""
    (here / "script.py").write_text(SCRIPT)

    def run(what: str, *launcher: str) -> subprocess.CompletedProcess[str]:
        words = [*(launcher or [sys.executable]), "script.py", what, "fit", "--recipe", str(tiny_recipe), "--run=run"]
        words += ["trainer.devices=2", "data.batch={image: 1, video: 1}", "sample.prompts=[]"]
        words += ["train.checkpoint_every=1"]
        env = os.environ | {"PYTHONPATH": str(ROOT)}
        return subprocess.run(words, capture_output=True, text=True, timeout=200, env=env, cwd=here)

    return run


def is_there(pid: int) -> bool:
    """Whether a process runs; one that nobody has buried yet does not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def wait_for_end(pid: int) -> None:
    last = time.monotonic() + 20
    while is_there(pid):
        assert time.monotonic() < last, f"process {pid} is left"
        time.sleep(0.05)


@pytest.mark.slow
def test_a_rank_that_dies_ends_the_run(two):
    ended = two("killed")
    assert ended.returncode == 1, ended.stderr
    assert ended.stderr.count("Rank 1 was killed by SIGKILL, so the run ends") == 1
    assert "Traceback" not in ended.stderr and "closed by peer" not in ended.stderr
    assert not is_there(int(Path("pid-1").read_text()))
    assert not Path("run/lock.json").exists() and find_checkpoints("run")


@pytest.mark.slow
def test_ranks_end_with_the_process_that_started_them(two):
    ended = two("orphan")
    assert ended.returncode == -signal.SIGKILL, ended.stderr
    wait_for_end(int(Path("pid-1").read_text()))
    assert "Traceback" not in ended.stderr and "Another rank" not in ended.stderr


def find_checkpoints(run: str) -> list[Path]:
    return list(Path(run).glob("stages/clips/step-*"))


@pytest.mark.slow
def test_a_file_that_one_rank_never_sees_is_told_by_that_rank(two):
    ended = two("slow-never")
    assert ended.returncode == 1, ended.stderr
    (told,) = [line for line in ended.stderr.splitlines() if "not seen on" in line]
    assert told.startswith("rank 1 on ") and "images/weights.safetensors" in told
    assert "Traceback" not in ended.stderr
    assert not is_there(int(Path("pid-1").read_text()))


@pytest.mark.slow
def test_a_slow_disk_is_waited_for_under_torchrun(two, tiny_recipe: Path):
    """Rank 1 sees what rank 0 writes a second later, and asks for nothing but the weights of the stage before."""
    port = f"--master-port={os.environ['MASTER_PORT']}"
    ended = two("slow", sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2", port, "--")
    assert ended.returncode == 0, ended.stderr
    assert ended.stderr.count("stage clips starts from run/stages/images/weights.safetensors") == 1
    assert ended.stdout.count("lingen sample --run") == 1
    assert set(Path("asked").read_text().split()) == {"weights.safetensors"}
    alone = fit(tiny_recipe, ["sample.prompts=[]"], run="alone")
    one, both = (read_weights(find_weights(run), "raw") for run in (alone, "run"))
    torch.testing.assert_close(both, one, rtol=1e-3, atol=1e-3)


def test_only_rank_0_tells_of_wrong_words(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    """Of `fit`, which all ranks are given alike; tasks of other commands have words of their own."""
    for name, value in zip(OF_LAUNCHERS, ("1", "2", "1", "2", "127.0.0.1", "2000"), strict=True):
        monkeypatch.setenv(name, value)
    assert main(["fit", "--bogus"]) == 2
    assert capsys.readouterr() == ("", "")
    assert main(["encode", "--bogus"]) == 2
    assert "lingen encode: the following arguments are required: --out." in capsys.readouterr().err
