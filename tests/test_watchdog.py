"""`train.watchdog`: a rank that hangs ends the run by its name; what only takes long does not."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from lingen.launch.status import status_of
from lingen.ranks.heartbeat import Heart
from lingen.ranks.watchdog import SLOW_LIMIT, SLOW_UNHEARD, UNHEARD, hung, lost, watching
from tests.helpers.commands import ROOT, lingen_command

LIMIT = 600


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
    told = hung([signs(0), signs(1), signs(2, **culprit), signs(3)], LIMIT)
    assert told is not None and (told["rank"], told["host"]) == (2, "n2")
    assert told["word"].startswith(f"silent for {told['silence']:.0f} s: it is at {told['at']}")
    assert "step 7 of stage s; last batch a.tar:1" in told["word"]
    assert ("waits for b.tar:2" in told["word"]) == ("awaits" in culprit)


def test_as_long_as_one_gives_signs_nothing_hangs():
    assert hung([signs(0, doing="decoding", silence=LIMIT - 1.0), signs(1)], LIMIT) is None
    slow = [signs(0, doing="start", silence=SLOW_LIMIT - 1), signs(1, silence=SLOW_LIMIT - 1)]
    assert hung(slow, LIMIT) is None and hung([one | {"silence": SLOW_LIMIT + 1} for one in slow], LIMIT) is not None


def test_a_rank_that_is_gone_is_named_within_a_minute():
    assert lost([signs(0), signs(1, age=UNHEARD - 1)], LIMIT) is None
    told = lost([signs(0), signs(1, age=UNHEARD + 1), signs(2, age=UNHEARD + 2)], LIMIT)
    assert told is not None and told["rank"] == 2 and "its process is stopped, or gone with its node" in told["word"]
    assert lost([signs(1, age=SLOW_UNHEARD - 1, doing="start")], LIMIT) is None


def test_off_is_off(tmp_path: Path):
    before = threading.active_count()
    with watching(Heart(tmp_path, 0, 1, "m"), "m", 0):
        assert threading.active_count() == before


# whole runs

EVENTS = '''
"""What goes wrong on one rank in stage clips."""
import os, signal, time
from lingen.data.dataset import Clips
from lingen.training.denoiser import LinGenModule

HOW, rank = os.environ["HOW"], os.environ.get("SLURM_PROCID", os.environ.get("RANK", "0"))
step, get = LinGenModule.training_step, Clips.__getitem__

def act(self, batch, batch_idx):
    if self.recipe.stage == "clips" and self.global_step in (3, 4):
        if HOW == "slow":
            time.sleep(3)
        if rank == HOW[-1] and not os.environ.get("SLURM_RESTART_COUNT"):
            time.sleep(3)  # so that others know where it is
            os.kill(os.getpid(), signal.SIGSTOP)
    return step(self, batch, batch_idx)

def read(self, place):
    if (HOW, rank, self.stream[-1], place.step, self.shuffle) == ("loader", "1", "clips", 4, True):
        print(self.names(place), flush=True)
        time.sleep(600)
    return get(self, place)

LinGenModule.training_step, Clips.__getitem__ = act, read
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
        assert f"Rank 1 on {os.uname().nodename} is silent for" in err and f"waits for {names}" in err, err
        end = time.monotonic() + 20
        while left := living(process.pid):  # loader processes are gone, too
            assert time.monotonic() < end, left
            time.sleep(0.2)
    told = status_of("run")
    assert told.state == "dead" and f"waits for {names}" in str(told.reason) and "rank 1 on" in str(told.reason)
    assert "torch/utils/data/dataloader.py" in Path("run/ranks/00001.stacks.txt").read_text()
    assert "torch/" in Path("run/ranks/00000.stacks.txt").read_text()
