"""Two trainings in one folder: the second is refused, and a dead owner is recognised and replaced by exactly one."""

from __future__ import annotations

import errno
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from lingen.cli import main
from lingen.recipe.errors import RecipeError
from lingen.run import fit
from lingen.run_folder import lock
from lingen.run_folder.folder import RunFolder
from lingen.run_folder.lock import LOCK_NAME, SILENCE, Lock, locked, myself
from lingen.training.denoiser import LinGenModule
from tests.helpers.commands import ROOT, lingen_command, run_command, wait_for

ONE = ["stages.images.train.steps=1", "stages.clips.train.steps=1", "sample.prompts=[]"]
ENDED = "a process that has ended"


def write_lock(folder: Path, age: float = 0.0, **changes: Any) -> dict[str, Any]:
    """A lock of another owner, last touched so many seconds ago."""
    owner = {name: value for name, value in (myself() | changes).items() if value is not ...}
    folder.mkdir(exist_ok=True)
    (folder / LOCK_NAME).write_text(json.dumps(owner))
    os.utime(folder / LOCK_NAME, (time.time() - age,) * 2)
    return owner


def left(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir() if path.name.startswith(LOCK_NAME))


def test_a_second_fit_is_refused_with_owner_and_cure(
    tiny_recipe: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    run = tmp_path / "run"
    with locked(run):
        assert main(["fit", "--recipe", str(tiny_recipe), *ONE, "--run", str(run)]) == 2
        said = capsys.readouterr().err
        assert f"process {os.getpid()} on" in said and "Wait for its end" in said and "Traceback" not in said
        assert left(run) == [LOCK_NAME] == [path.name for path in run.iterdir()]
    assert fit(tiny_recipe, ONE, run=run) == run and left(run) == []


def test_two_commands_at_once_leave_one_run(tiny_recipe: Path, tmp_path: Path):
    run = tmp_path / "run"
    words = ["fit", "--recipe", str(tiny_recipe), *ONE, "train.log_every=1", "stages.clips.train.steps=60"]
    both = [subprocess.Popen(lingen_command(*words, "--run", str(run)), stderr=subprocess.PIPE) for _ in range(2)]
    said = {process.wait(120): process.stderr.read().decode() for process in both if process.stderr}
    assert sorted(said) == [0, 2] and "is in use: process" in said[2] and "Traceback" not in said[2]
    steps = [line.split(",")[:2] for line in (run / "metrics.csv").read_text().splitlines()[1:]]
    assert steps == [["images", "1"], *(["clips", str(step)] for step in range(1, 61))]
    assert len(json.loads((run / "run.json").read_text())["history"]) == 1 and left(run) == []


@pytest.mark.parametrize(
    ("age", "changes", "why"),
    [
        (0, {"pid": ENDED}, "has ended"),
        (0, {"pid": ...}, None),  # by hand
        (0, {"process_started": "long ago"}, "has ended"),  # its number was given again
        (0, {}, None),
        (10 * SILENCE, {}, None),  # asleep, but there
        (SILENCE / 2, {"host": "elsewhere"}, None),
        (2 * SILENCE, {"host": "elsewhere"}, "elsewhere has given no sign for 240 s"),
        (0, {"host": "elsewhere", "job": "7", "restart": None}, "job 7 was requeued"),
        (0, {"host": "elsewhere", "job": "7", "restart": "1"}, None),  # another step of the same job
        (0, {"host": "elsewhere", "job": "8", "restart": None}, None),
    ],
)
def test_who_is_dead(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, age: float, changes: dict[str, Any], why: str | None
):
    if changes.get("pid") == ENDED:
        process = subprocess.Popen([sys.executable, "-c", ""])
        process.wait()
        changes = {"pid": process.pid}
    owner = write_lock(tmp_path, age, **changes)
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
    if why is None:
        with (
            pytest.raises(RecipeError, match=rf"in use: process .* gave its last sign {age:.0f} s ago"),
            locked(tmp_path),
        ):
            pass
        assert json.loads((tmp_path / LOCK_NAME).read_text()) == owner and left(tmp_path) == [LOCK_NAME]
        return
    with locked(tmp_path) as held:
        assert held.was and why in held.was
        assert json.loads((tmp_path / LOCK_NAME).read_text())["mark"] == held.owner["mark"] and left(tmp_path) == [
            LOCK_NAME
        ]
    assert left(tmp_path) == []


def test_a_cut_lock_counts_by_its_age(tmp_path: Path):
    (tmp_path / LOCK_NAME).write_text('{"host": ')
    with pytest.raises(RecipeError, match="in use"), locked(tmp_path):
        pass
    os.utime(tmp_path / LOCK_NAME, (time.time() - 2 * SILENCE,) * 2)
    with locked(tmp_path) as held:
        assert held.was


CLAIMANT = """
import sys, time
from pathlib import Path
from lingen.recipe.errors import RecipeError
from lingen.run_folder.lock import locked
folder, start = Path(sys.argv[1]), float(sys.argv[2])
time.sleep(max(0, start - time.time()))
try:
    with locked(folder):
        print("won", flush=True)
        sys.stdin.read()
except RecipeError as error:
    print("lost" if "is in use" in str(error) else error, flush=True)
    sys.stdin.read()
"""


def test_of_many_claimants_exactly_one_wins(tmp_path: Path):
    """Eight processes find a dead owner at the same time; who wanted its place before them had died on the way."""
    owner = write_lock(tmp_path, process_started="long ago")
    (tmp_path / f"{LOCK_NAME}.{owner['mark']}").write_text(json.dumps(myself() | {"process_started": "long ago"}))
    words = [sys.executable, "-c", CLAIMANT, str(tmp_path), str(time.time() + 3)]
    claimants = [
        subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=ROOT) for _ in range(8)
    ]
    said = [process.stdout.readline().strip() for process in claimants if process.stdout]
    for process in claimants:
        process.communicate("")
    assert sorted(said) == ["lost"] * 7 + ["won"]
    assert left(tmp_path) == []


def test_a_late_claimant_does_not_replace_the_winner(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Both saw the dead owner; the second one comes to act after the first has replaced it and let its claim go."""
    write_lock(tmp_path, process_started="long ago")
    claimed = Lock._claimed
    winner = Lock(tmp_path / LOCK_NAME)

    def late(self: Lock, owner: Any) -> Any:
        if self is not winner and not winner._is_mine() and self.path.name == LOCK_NAME:
            winner.take()
        return claimed(self, owner)

    monkeypatch.setattr(Lock, "_claimed", late)
    with pytest.raises(RecipeError, match="is in use"), locked(tmp_path):
        pass
    assert winner._is_mine()
    winner.release()
    assert left(tmp_path) == []


@pytest.mark.parametrize("heartbeat", [0.01, 20.0])
def test_a_run_that_was_taken_over_stops(
    tiny_recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, heartbeat: float
):
    """It was suspended for so long that another machine took its lock: it saves nothing, before a heartbeat, too."""
    monkeypatch.setattr(lock, "HEARTBEAT", heartbeat)
    step = LinGenModule.training_step

    def taken(self: LinGenModule, batch: Any, batch_idx: int) -> Any:
        write_lock(tmp_path / "run", host="elsewhere")
        time.sleep(0.1)
        return step(self, batch, batch_idx)

    monkeypatch.setattr(LinGenModule, "training_step", taken)
    with pytest.raises(RecipeError, match="on elsewhere has taken this run over"):
        fit(tiny_recipe, ONE, run=tmp_path / "run")
    assert json.loads((tmp_path / "run" / LOCK_NAME).read_text())["host"] == "elsewhere"
    assert not RunFolder(tmp_path / "run").checkpoints("images")
    lock.check_held()  # nothing is held any more


def test_the_heart_beats(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(lock, "HEARTBEAT", 0.01)
    with locked(tmp_path):
        os.utime(tmp_path / LOCK_NAME, (0, 0))
        end = time.monotonic() + 20
        while (tmp_path / LOCK_NAME).stat().st_mtime == 0:
            assert time.monotonic() < end
            time.sleep(0.005)
        lock.check_held()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_a_signal_leaves_the_folder_free(tiny_recipe: Path, tmp_path: Path, number: int):
    run = tmp_path / "run"
    words = ["fit", "--recipe", str(tiny_recipe), "sample.prompts=[]", "train.checkpoint_every=2", "--run", str(run)]
    process = subprocess.Popen(lingen_command(*words, "stages.clips.train.steps=100000"), stderr=subprocess.DEVNULL)
    wait_for(lambda: RunFolder(run).checkpoints("clips"), process)
    process.send_signal(number)
    process.wait(60)
    assert left(run) == ([LOCK_NAME] if number == signal.SIGKILL else [])
    again = run_command(*words, f"stages.clips.train.steps={RunFolder(run).last_step('clips') + 1}")
    assert again.returncode == 0, again.stderr
    assert ("has ended" in again.stderr) == (number == signal.SIGKILL) and left(run) == []


def test_an_error_leaves_the_folder_free(tiny_recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(LinGenModule, "training_step", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        fit(tiny_recipe, ONE, run=tmp_path / "run")
    assert left(tmp_path / "run") == []


@pytest.mark.parametrize("code", [errno.EPERM, errno.ENOTSUP])
def test_a_file_system_without_links(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int):
    def link(*_: object) -> None:
        raise OSError(code, "no links here")

    monkeypatch.setattr(os, "link", link)
    write_lock(tmp_path, process_started="long ago")
    with locked(tmp_path):
        with pytest.raises(RecipeError, match="is in use"), locked(tmp_path):
            pass
        assert left(tmp_path) == [LOCK_NAME]
    assert left(tmp_path) == []


@pytest.mark.parametrize("code", [errno.EROFS, errno.ENOSPC, errno.EACCES])
def test_a_place_where_nothing_can_be_written(
    tiny_recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int
):
    def refused(*_: object, **__: object) -> None:
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(Path, "write_text", refused)
    with pytest.raises(RecipeError, match=f"Nothing can be written into .*{os.strerror(code)}"):
        fit(tiny_recipe, ONE, run=tmp_path / "run")


def test_reading_needs_no_lock(tiny_run: Path, tmp_path: Path):
    with locked(tmp_path / "run"):
        (tmp_path / "run" / "run.json").write_bytes((tiny_run / "run.json").read_bytes())
        stages = tmp_path / "run" / "stages" / "clips"
        stages.mkdir(parents=True)
        (stages / "weights.safetensors").write_bytes(RunFolder(tiny_run).weights("clips").read_bytes())
        out = tmp_path / "clip.mp4"
        assert main(["sample", "--run", str(tmp_path / "run"), "--prompt", "a red square", "--out", str(out)]) == 0
        assert out.is_file()
