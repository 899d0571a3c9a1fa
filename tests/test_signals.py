"""A signal at any moment of a run: the exit code tells it, and the same command goes on as if nothing had been."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from lingen.cli import main
from lingen.ranks import signals
from lingen.run import fit
from lingen.run_folder.folder import RunFolder
from tests.helpers.commands import ROOT, wait_for
from tests.helpers.moments import MOMENTS, NUMBERS, OF_ONE_RANK, WORDS, go_through, number_of, what_came_out


def check_same(run: Path, straight: Path) -> None:
    (told, weights), (expected, as_they_should) = what_came_out(run), what_came_out(straight)
    assert told == expected
    assert weights.keys() == as_they_should.keys()
    assert all(torch.equal(value, as_they_should[name]) for name, value in weights.items())


def test_a_signal_at_any_moment_is_told_and_changes_nothing(tiny_recipe: Path, tmp_path: Path, capsys):
    """Clips that a stopped stage owes are there at the end, too."""
    words = ["fit", "--recipe", str(tiny_recipe), *WORDS]
    before = [signal.getsignal(one) for one in NUMBERS]
    codes = go_through(words, tmp_path / "stopped", dict.fromkeys(MOMENTS, 0), rank=0)
    assert codes == {moment: number_of(moment)[1] for moment in MOMENTS} | {"over": 0}
    told = capsys.readouterr().err
    assert told.count("; the same command goes on from here.") == len(MOMENTS) and "Traceback" not in told
    assert [signal.getsignal(one) for one in NUMBERS] == before
    check_same(tmp_path / "stopped", fit(tiny_recipe, WORDS, run=tmp_path / "straight"))


@pytest.mark.slow
def test_a_signal_to_one_rank_of_two_stops_both(tiny_recipe: Path, tmp_path: Path):
    """And the run goes on as if nothing had been."""
    shared = {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1"}
    words = [sys.executable, "-m", "tests.helpers.moments", str(tiny_recipe), str(tmp_path)]
    ranks = [
        subprocess.Popen(
            words, cwd=ROOT, env=os.environ | shared | {"RANK": str(rank), "LOCAL_RANK": str(rank)}, text=True,
            stdout=subprocess.DEVNULL, stderr=subprocess.PIPE,
        )
        for rank in range(2)
    ]  # fmt: skip
    try:
        told = [rank.communicate(timeout=300)[1] for rank in ranks]
    finally:
        for rank in ranks:
            rank.kill()
    assert [rank.returncode for rank in ranks] == [0, 0], "\n".join(told)
    for rank in range(2):
        codes = json.loads((tmp_path / f"rank-{rank}.json").read_text())
        assert codes == {"straight": 0} | {moment: number_of(moment)[1] for moment in OF_ONE_RANK} | {"over": 0}
    check_same(tmp_path / "stopped", tmp_path / "straight")


AT_AN_IMPORT = """
import os, signal, sys
from lingen.__main__ import enter

class Finder:
    def find_spec(self, name, path=None, target=None):
        if name == "torch":
            sys.meta_path.remove(self)
            os.kill(os.getpid(), signal.SIGTERM)

sys.meta_path.insert(0, Finder())
sys.exit(enter())
"""


@pytest.mark.slow
def test_a_signal_while_torch_is_imported_is_told(tiny_recipe: Path, here: Path):
    (here / "script.py").write_text(AT_AN_IMPORT)
    words = [sys.executable, "script.py", "fit", "--recipe", str(tiny_recipe), "--run", "run"]
    done = subprocess.run(words, capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stderr.splitlines()[-1:]) == (
        75, ["Stopped by SIGTERM; the same command goes on from here."],
    )  # fmt: skip
    assert "Traceback" not in done.stderr and not RunFolder(here / "run").checkpoints("images")


HANGS = """
import ctypes, pathlib, sys
from lingen.__main__ import enter
from lingen.training.denoiser import LinGenModule

def hang(*_):
    mutex = ctypes.create_string_buffer(64)
    ctypes.CDLL(None).pthread_mutex_lock(mutex)
    pathlib.Path("hangs").touch()
    ctypes.CDLL(None).pthread_mutex_lock(mutex)

LinGenModule.training_step = hang
sys.exit(enter())
"""


@pytest.mark.slow
def test_a_second_interrupt_ends_all_even_outside_of_python(tiny_recipe: Path, here: Path):
    (here / "script.py").write_text(HANGS)
    words = [sys.executable, "script.py", "fit", "--recipe", str(tiny_recipe), "--run", "run", "data.workers=2"]
    process = subprocess.Popen(words, stderr=subprocess.PIPE, text=True, start_new_session=True)
    try:
        wait_for((here / "hangs").exists, process)
        os.killpg(process.pid, signal.SIGINT)
        os.killpg(process.pid, signal.SIGINT)  # the same one, told twice
        with pytest.raises(subprocess.TimeoutExpired):
            process.wait(2 * signals.TOGETHER)
        os.killpg(process.pid, signal.SIGINT)
        assert process.wait(5) == 130
        told = process.communicate()[1]  # its end is that of all processes that could write there
        assert "Traceback" not in told and told.count("Ctrl-C again stops at once") == 1
    finally:
        process.kill()


def test_who_is_called_from_python_gets_the_handlers_back():
    def noted(number: int, frame: object) -> None:
        late.append(number)

    late: list[int] = []
    before = signal.signal(signal.SIGTERM, noted)
    try:
        with signals.listening():
            assert signals.noted() is None
            signal.raise_signal(signal.SIGTERM)
            assert signals.noted() == signals.agreed() == signal.SIGTERM and not late
            with signals.listening():  # a run inside of the command line
                assert signals.noted() == signal.SIGTERM
            with pytest.raises(signals.Stopped):
                signals.check()
        assert late == [signal.SIGTERM]  # it came too late to stop anything, and is not lost
        assert signal.getsignal(signal.SIGTERM) is noted and signals.noted() is None
    finally:
        signal.signal(signal.SIGTERM, before)


def test_a_second_interrupt_is_raised_where_the_process_is_somebody_elses(monkeypatch: pytest.MonkeyPatch):
    with pytest.raises(signals.Stopped), signals.listening():
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGINT)  # the same one, told twice
        monkeypatch.setattr(signals, "TOGETHER", 0.0)
        time.sleep(0.001)
        signal.raise_signal(signal.SIGINT)


def test_what_takes_long_is_left_at_once():
    done = []

    def work() -> None:
        signal.raise_signal(signal.SIGTERM)
        done.append("more")

    with pytest.raises(signals.Stopped), signals.listening():
        signals.promptly(work)
        signals.promptly(work)
        signal.raise_signal(signal.SIGTERM)  # outside of it nothing is raised
        assert not done
        signals.check()


def test_a_run_in_another_thread_leaves_signals_alone(tiny_recipe: Path, tmp_path: Path):
    before = [signal.getsignal(one) for one in NUMBERS]
    thread = threading.Thread(target=fit, args=(tiny_recipe,), kwargs={"run": tmp_path / "run"}, daemon=True)
    thread.start()
    thread.join(60)
    assert RunFolder(tmp_path / "run").finished(["images", "clips"]) == ["images", "clips"]
    assert [signal.getsignal(one) for one in NUMBERS] == before


def test_an_error_after_a_signal_asks_for_another_start(tiny_recipe: Path, tmp_path: Path, monkeypatch, capsys):
    """A signal to all processes of a job ends a compiler, too: that is no fault of the run."""

    def fail(*_: Any) -> None:
        signal.raise_signal(signal.SIGTERM)
        raise OSError("the compiler was killed")

    monkeypatch.setattr("lingen.training.denoiser.LinGenModule.training_step", fail)
    assert main(["fit", "--recipe", str(tiny_recipe), "--run", str(tmp_path / "run")]) == 75
    assert "the compiler was killed" in capsys.readouterr().err
