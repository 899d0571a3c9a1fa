"""`train.watchdog`: a rank that hangs ends the run by its name; what only takes long does not."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import threading
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from lingen.launch.status import status_of
from lingen.ranks.heartbeat import HeartbeatWriter
from lingen.ranks.watchdog import SLOW_LIMIT, SLOW_UNHEARD, UNHEARD, hung, lost, watching
from lingen.run import fit as run_fit
from tests.helpers import slurm
from tests.helpers.commands import ROOT, lingen_command, wait_for

LIMIT = 600
GONE = "is stopped, or gone with its node; last sign: "


def signs(rank: int, **more: Any) -> dict[str, Any]:
    """What a rank tells that waits for the others in step 7."""
    usual = {
        "rank": rank, "host": f"n{rank}", "stage": "s", "step": 7, "doing": "step", "silence": LIMIT + 1.0, "age": 1.0,
        "turns": 16, "collectives": 40, "waits": True, "at": "torch/distributed/x.py:1 (f)", "batch": ["a.tar:1"],
        "awaits": [],
    }  # fmt: skip
    return usual | more


# who is to blame


@pytest.mark.parametrize(
    "culprit",
    [
        {"doing": "data", "turns": 15, "awaits": ["b.tar:2"]},
        {"waits": False, "at": "mine.py:3 (step)"},
        {"collectives": 39},
        {"silence": LIMIT + 3.0},
    ],
)
def test_the_one_for_which_the_others_wait_is_named(culprit: dict[str, Any]):
    word = hung([signs(0), signs(1), signs(2, **culprit), signs(3)], LIMIT)
    at = culprit.get("at", "torch/distributed/x.py:1 (f)")
    assert word is not None and f" s: rank 2 on n2 is at {at}" in word and word.startswith("silent for 60")
    assert "step 7 of stage s; last batch a.tar:1" in word and ("waits for b.tar:2" in word) == ("awaits" in culprit)


def test_as_long_as_one_gives_signs_nothing_hangs():
    assert hung([signs(0, doing="decoding", silence=LIMIT - 1.0), signs(1)], LIMIT) is None
    slow = [signs(0, doing="start", silence=SLOW_LIMIT - 1), signs(1, silence=SLOW_LIMIT - 1)]
    assert hung(slow, LIMIT) is None and hung([one | {"silence": SLOW_LIMIT + 1} for one in slow], LIMIT) is not None


def test_a_rank_that_is_gone_is_named_within_a_minute():
    assert lost([signs(0), signs(1, age=UNHEARD - 1)], LIMIT) is None
    word = lost([signs(0), signs(1, age=UNHEARD + 1), signs(2, age=UNHEARD + 2)], LIMIT)
    assert word is not None and "rank 2 on n2 is stopped, or gone with its node" in word
    assert hung([signs(0), signs(1, age=UNHEARD + 1)], LIMIT) == lost([signs(1, age=UNHEARD + 1)], LIMIT)
    assert lost([signs(1, age=SLOW_UNHEARD - 1, doing="start")], LIMIT) is None


def test_off_is_off(tmp_path: Path):
    before = threading.active_count()
    with watching(HeartbeatWriter(tmp_path, 0, 1, "m"), "m", [0, 0]):
        assert threading.active_count() == before


def test_whatever_takes_long_gives_signs(tiny_recipe: Path, here: Path, monkeypatch: pytest.MonkeyPatch):
    seen, sign = Counter[str](), HeartbeatWriter.sign

    def note(self: HeartbeatWriter, doing: str | None, *more: Any) -> None:
        in_main = threading.current_thread() is threading.main_thread()
        seen[doing or ("the same" if in_main else "a checkpoint, meanwhile")] += 1
        sign(self, doing, *more)

    monkeypatch.setattr(HeartbeatWriter, "sign", note)
    run_fit(tiny_recipe, ["train.checkpoint_every=2", "train.watchdog=600"], run=here / "run")
    steps = 2 + 6
    assert seen["step"] + seen["start"] >= steps and seen["data"] == steps
    assert seen["a checkpoint, meanwhile"] == steps  # every second step a header and a piece
    assert seen["sampling"] == 2 * 2 and seen["decoding"] == 2  # steps of the solver; clips
    assert seen["validation"] and seen["end of the stage"] == 2
    assert not any(thread.name == "lingen-watchdog" for thread in threading.enumerate())


# whole runs

EVENTS = '''
"""What goes wrong on one rank in stage clips, or takes long."""
import os, signal, time
from lingen.data.dataset import Clips
from lingen.training.denoiser import LinGenModule

HOW, rank = os.environ["HOW"], os.environ.get("SLURM_PROCID", os.environ.get("RANK", "0"))
step, get = LinGenModule.training_step, Clips.__getitem__

def act(self, batch, batch_idx):
    if self.recipe.stage == "clips" and self.global_step in (3, 4):
        if HOW == "slow" and self.global_step == 4:
            time.sleep(5)
        if rank == HOW[-1]:
            time.sleep(1.2)  # so that others know where it is
            os.kill(os.getpid(), signal.SIGSTOP)
    return step(self, batch, batch_idx)

def read(self, place):
    if (HOW, rank, self.stream[-1], place.step, self.shuffle) == ("loader", "1", "clips", 4, True):
        print(self.names(place), flush=True)
        time.sleep(600)
    return get(self, place)

LinGenModule.training_step, Clips.__getitem__ = act, read
if HOW == "slow":
    from lingen.model import LinGen
    forward = LinGen.forward

    def denoise(self, *args):
        if not self.training:
            open("sampling", "w").close()
            time.sleep(0.5)
        return forward(self, *args)

    LinGen.forward = denoise
'''


@pytest.fixture
def events(here: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (here / "events.py").write_text(EVENTS)
    monkeypatch.setenv("PYTHONPATH", f"{ROOT}:{here}")
    monkeypatch.delenv("MASTER_PORT")
    return here


def living(group: int) -> list[str]:
    """Processes of a group that are not dead."""
    told = subprocess.run(["ps", "-eo", "pgid=,stat=,args="], capture_output=True, text=True, check=True).stdout
    rows = [line.split(None, 2) for line in told.splitlines()]
    return [" ".join(row) for row in rows if row[0] == str(group) and not row[1].startswith("Z")]


@contextlib.contextmanager
def fit(recipe: Path, how: str, *words: str) -> Iterator[subprocess.Popen[str]]:
    """Two ranks that this machine starts, in a process group of their own; none is left at the end."""
    command = lingen_command("fit", "--recipe", str(recipe), "--run", "run", "--import", "events", *words)
    process = subprocess.Popen(
        [*command, "trainer.devices=2", "sample.prompts=[]"], env=os.environ | {"HOW": how}, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, start_new_session=True,
    )  # fmt: skip
    try:
        yield process
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


@pytest.mark.slow
def test_a_loader_that_hangs_is_named_with_its_samples(tiny_recipe: Path, events: Path):
    with fit(tiny_recipe, "loader", "train.watchdog=4", "data.workers=1") as process:
        out, err = process.communicate(timeout=120)
        names = ", ".join(eval(out.strip().splitlines()[-1]))
        assert process.returncode == 1
        assert f"rank 1 on {os.uname().nodename} is at" in err and f"waits for {names}" in err, err
        end = time.monotonic() + 20
        while left := living(process.pid):  # loader processes are gone, too
            assert time.monotonic() < end, left
            time.sleep(0.2)
    told = status_of("run")
    assert told.state == "dead" and f"waits for {names}" in str(told.reason) and "rank 1 on" in str(told.reason)
    assert "torch/utils/data/dataloader.py" in Path("run/ranks/00001.stacks.txt").read_text()
    assert "torch/" in Path("run/ranks/00000.stacks.txt").read_text()


@pytest.mark.slow
def test_what_takes_long_is_no_hang(tiny_recipe: Path, events: Path):
    """Clips that take longer than the limit, during which all ranks are stopped; then a stage that is not watched."""
    words = ["train.watchdog=4", "stages.images.sample.prompts=[a red square]", "stages.images.sample.steps=10"]
    with fit(tiny_recipe, "slow", *words, "stages.clips.train.watchdog=0") as process:
        wait_for(Path("sampling").is_file, process)
        time.sleep(2)
        os.killpg(process.pid, signal.SIGSTOP)
        time.sleep(5)
        os.killpg(process.pid, signal.SIGCONT)
        out, err = process.communicate(timeout=120)
        assert process.returncode == 0, err
    assert status_of("run").state == "finished"


@pytest.mark.slow
def test_rank_0_may_be_the_one_that_is_stopped(tiny_recipe: Path, events: Path):
    """Which holds the store, and started the other rank."""
    with fit(tiny_recipe, "stop 0", "train.watchdog=4") as process:
        _, err = process.communicate(timeout=120)
        assert process.returncode == -signal.SIGKILL
    assert f"rank 0 on {os.uname().nodename} {GONE}" in err, err
    assert "silent for" in str(status_of("run").reason)


@pytest.mark.slow
@pytest.mark.skipif(slurm.fault() is not None, reason=f"no SLURM here: {slurm.fault()}")
def test_a_stopped_rank_of_two_nodes_ends_the_job_and_is_named(tiny_recipe: Path, events: Path):
    words = ["submit", "--recipe", str(tiny_recipe), "--run", str(events / "run"), "--nodes", "2", "--import", "events"]
    words += ["sample.prompts=[]", "train.watchdog=4", "--max-requeues", "0"]
    with slurm.slurm(2) as cluster:
        cluster.env |= {"PYTHONPATH": f"{ROOT}:{events}", "OMP_NUM_THREADS": "1", "HOW": "stop 1"}
        job = cluster.run(*lingen_command(*words)).stdout.strip()
        end = time.monotonic() + 120
        while cluster.state(job) in slurm.UNFINISHED and time.monotonic() < end:
            time.sleep(0.5)
        log = next((events / "run").glob("submit/0001/*.log")).read_text()
        assert cluster.state(job) == "FAILED", log
    told = status_of(events / "run")
    assert told.state == "dead" and f"rank 1 on n2 {GONE}" in str(told.reason), told.reason
    assert f"rank 1 on n2 {GONE}" in log and "was requeued 0 times, --max-requeues=0" in log
