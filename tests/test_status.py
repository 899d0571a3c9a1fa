"""`lingen status`: what a run folder tells, from the signs of life of its ranks and the sessions in its record."""

from __future__ import annotations

import json
import os
import shutil
import signal
import threading
import time
from pathlib import Path

import pytest

from lingen.cli import cluster, main
from lingen.launch import status
from lingen.launch.status import status_of
from lingen.ranks import heartbeat
from lingen.ranks.environment import OtherRankError
from lingen.ranks.heartbeat import SILENT, SIZE, heartbeats, read_heartbeats, sign
from lingen.ranks.signals import Stopped
from lingen.run_folder.folder import RunFolder
from lingen.run_folder.sessions import IN_VAIN, read_sessions, session, worth_another_start
from tests.helpers.commands import ROOT, run_python


@pytest.fixture
def run(tiny_run: Path, tmp_path: Path) -> RunFolder:
    """A finished run, a copy of its own."""
    return RunFolder(shutil.copytree(tiny_run, tmp_path / "run"))


FLOP = {"clips": 2.0}


def in_session(run: RunFolder, error: BaseException | None = None, was: str | None = None) -> None:
    """A session that ends so."""
    try:
        with session(run, stage="clips", step=6, ranks=2, was=was, flop=FLOP):
            if error is not None:
                raise error
    except type(error):  # type: ignore[arg-type]
        pass


def killed_session(run: RunFolder, was: str | None = None) -> str:
    """A session that leaves no word; its mark."""
    about = run.about.read_bytes()
    with session(run, stage="clips", step=6, ranks=2, was=was, flop=FLOP) as mark:
        about = run.about.read_bytes()
    run.about.write_bytes(about)
    return mark


# signs of life


def test_a_rank_says_what_it_does_and_since_when(tmp_path: Path):
    with heartbeats(tmp_path / "ranks", 1, 2, "m") as writer:
        sign("data", "clips", 3)
        sign("step", step=4)
        writer.write()
        (beat,) = read_heartbeats(tmp_path / "ranks", "m")
        assert (beat.rank, beat.stage, beat.step, beat.doing) == (1, "clips", 4, "step") and beat.ended is None
        assert 0 <= beat.age_seconds < 5 and beat.doing_seconds >= beat.age_seconds and beat.memory["process"] > 1e6
        told = json.loads(writer.path.read_text())
        assert (told["ranks"], told["pid"]) == (2, os.getpid()) and set(told["spent"]) == {"start", "data"}
        assert read_heartbeats(tmp_path / "ranks", "of another session") == []
        file = writer.path
        os.utime(file, (time.time() - 100,) * 2)
        assert 99 < read_heartbeats(tmp_path / "ranks")[0].age_seconds < 105
    assert read_heartbeats(tmp_path / "ranks")[0].ended == "finished" and file.stat().st_size == SIZE
    sign("step")  # of no rank: nothing happens


def test_a_rank_that_fails_leaves_its_word(tmp_path: Path):
    with pytest.raises(ValueError), heartbeats(tmp_path, 0, 1, "m") as writer:
        writer.sign("step", "s" * 100, 1)
        raise ValueError("no\nway " + "x" * SIZE)
    assert writer.path.stat().st_size == SIZE
    word = json.loads(writer.path.read_text())["ended"]
    assert word.startswith("failed: ValueError: no way xxx") and len(word) <= 500


def test_a_folder_that_takes_nothing_does_no_harm(tmp_path: Path):
    (tmp_path / "file").touch()
    with heartbeats(tmp_path / "file" / "ranks", 0, 1, "m") as writer:
        writer.write()


# sessions


def test_each_start_tells_why_the_one_before_ended(run: RunFolder):
    before = json.loads(run.about.read_text())
    first = len(read_sessions(run))
    in_session(run, ValueError("of no\nuse"))
    mark = killed_session(run)
    with heartbeats(run.ranks, 0, 2, mark), heartbeats(run.ranks, 1, 2, mark):
        pass
    for file, age in ((run.ranks / "00000.json", 0), (run.ranks / "00001.json", 300)):
        told = json.loads(file.read_text()) | {"ended": None, "host": "n7"}
        file.write_text(json.dumps(told))
        os.utime(file, (time.time() - age,) * 2)
    in_session(run, was="job 3 was requeued")
    found = [one["how"] for one in read_sessions(run)][first:]
    assert found == [
        "failed: ValueError: of no use",
        "killed: job 3 was requeued; silent first: rank 1 on n7",
        "finished",
    ]
    after = json.loads(run.about.read_text())
    assert {key for key in after if after[key] != before[key]} == {"sessions", "flop_a_step"}
    assert after["flop_a_step"] == before["flop_a_step"] | FLOP


def test_a_killed_run_is_worth_another_start_unless_a_rank_failed_or_it_goes_no_further(run: RunFolder):
    mark = killed_session(run)
    with pytest.raises(OSError), heartbeats(run.ranks, 3, 4, mark):
        raise OSError("the disk is gone")
    again, why = worth_another_start(run, 137)
    assert not again and why.startswith("failed: rank 3 on ") and why.endswith(": OSError: the disk is gone")
    for number in range(IN_VAIN):
        killed_session(run)
        again, why = worth_another_start(run, 137)
        assert again == (number + 1 < IN_VAIN), why
    assert why.startswith("killed: exit code 137 (SIGKILL)") and f"the last {IN_VAIN} starts went no further" in why
    assert [one["how"][:6] for one in read_sessions(run)[-IN_VAIN:]] == ["killed"] * IN_VAIN
    about = json.loads(run.about.read_text())
    about["sessions"][-2]["step"] = 1
    run.about.write_text(json.dumps(about))
    assert worth_another_start(run, 137)[0]
    assert main(["status", str(run.path), "--ended", "137"]) == 75


def test_a_run_that_hangs_is_worth_another_start(run: RunFolder):
    mark = killed_session(run)
    for rank in range(2):
        with heartbeats(run.ranks, rank, 2, mark) as writer:
            writer.end("failed: silent for 600 s: rank 1 on n7 is at a.py:1 (f)")
    how = "killed: silent for 600 s: rank 1 on n7 is at a.py:1 (f)"
    assert worth_another_start(run, 1) == (True, how)
    with pytest.raises(OSError), heartbeats(run.ranks, 1, 2, mark):
        raise OSError("no")
    again, why = worth_another_start(run, 75)  # where the others were silent because of an error
    assert not again and why.startswith("failed: rank 1 on ") and why.endswith(": OSError: no")


@pytest.mark.parametrize(("code", "how"), [(75, "stopped by SIGUSR1"), (137, "killed: exit code 137 (SIGKILL)")])
def test_a_rank_that_was_stopped_tells_what_a_lost_one_does_not_know(run: RunFolder, code: int, how: str):
    mark = killed_session(run)
    with pytest.raises(Stopped), heartbeats(run.ranks, 1, 2, mark):
        raise Stopped(signal.SIGUSR1)
    assert worth_another_start(run, code) == (True, how)
    assert read_sessions(run)[-1]["how"] == how


@pytest.mark.parametrize("state", ["down", "idle"])
def test_a_lost_node_is_told_though_srun_stopped_the_others(run: RunFolder, state: str, tmp_path: Path, monkeypatch):
    """Rank 0 heard srun's SIGTERM, and says so; rank 1 left no word."""
    (tmp_path / "sinfo").write_text(f"#!/bin/bash\necho 'n3|{state}|disk'\n")
    (tmp_path / "sinfo").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    in_session(run, Stopped(signal.SIGTERM))
    mark = read_sessions(run)[-1]["mark"]
    for rank in range(2):
        with pytest.raises(Stopped), heartbeats(run.ranks, rank, 2, mark):
            raise Stopped(signal.SIGTERM)
    file = run.ranks / "00001.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"ended": None, "host": "n3"}))
    again, why = worth_another_start(run, 75)
    assert again and read_sessions(run)[-1]["how"] == why
    if state == "idle":
        assert why == "stopped by SIGTERM"
    else:
        assert why.startswith("killed: exit code 75") and why.endswith("; n3 is down (disk)")


def test_what_ended_before_it_trained_is_told_from_what_the_run_did_before(run: RunFolder, monkeypatch):
    in_session(run, Stopped(signal.SIGUSR1))
    assert worth_another_start(run, 1) == (True, "stopped by SIGUSR1")
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
    assert worth_another_start(run, 1) == (False, "exit code 1, before it trained")
    assert worth_another_start(run, 75) == (True, "exit code 75, before it trained")
    assert worth_another_start(run, 139) == (True, "exit code 139 (SIGSEGV), before it trained")
    assert not worth_another_start(RunFolder(run.path / "nothing"), 1)[0]


def test_a_rank_that_failed_is_no_preemption(run: RunFolder):
    """Where rank 0 heard only the SIGTERM by which srun ended it."""
    with pytest.raises(Stopped), session(run, stage="clips", step=6, ranks=2, was=None, flop=FLOP) as mark:
        with pytest.raises(OSError), heartbeats(run.ranks, 1, 2, mark):
            raise OSError("no")
        raise Stopped(signal.SIGTERM)
    again, why = worth_another_start(run, 75)
    assert not again and why.startswith("failed: rank 1 on ") and why.endswith(": OSError: no")
    assert read_sessions(run)[-1]["how"] == why


def test_ranks_that_only_lost_another_one_are_worth_another_start(run: RunFolder, monkeypatch):
    try:
        with session(run, stage="clips", step=6, ranks=2, was=None, flop=FLOP) as mark:
            with heartbeats(run.ranks, 1, 2, mark) as writer:
                writer.write()
            (told := json.loads(writer.path.read_text()))["ended"] = None
            writer.path.write_text(json.dumps(told | {"host": "n4"}))
            with heartbeats(run.ranks, 0, 2, mark):
                # srun ends the others by SIGTERM; that is not why they end.
                monkeypatch.setattr(heartbeat, "noted", lambda: signal.SIGTERM)
                raise RuntimeError("[gloo/transport] Connection closed by peer")
    except RuntimeError:
        pass
    assert worth_another_start(run, 1) == (True, "killed: exit code 1; silent first: rank 1 on n4")
    in_session(run, OtherRankError("rank 3: TypeError: no"))
    assert worth_another_start(run, 75) == (False, "failed: rank 3: TypeError: no")
    assert main(["status", str(run.path), "--ended", "75"]) == 1
    run.about.write_text("{")
    assert (
        main(["status", str(run.path), "--ended", "75"]) == 75 and main(["status", str(run.path), "--ended", "1"]) == 1
    )


# what is told


def test_a_finished_run(tiny_run: Path, capsys):
    assert main(["status", str(tiny_run), "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    wanted = {"state": "finished", "stage": "clips", "step": 6, "steps": 6, "eta_seconds": 0.0, "alive": False}
    assert wanted.items() <= told.items() and told["restarts"] == []
    assert told["loss"] > 0 and told["tokens_per_second"] > 0
    assert told["checkpoint"] == str(RunFolder(tiny_run).checkpoints("clips")[-1])
    assert main(["status", str(tiny_run), str(tiny_run)]) == 0
    assert capsys.readouterr().out.count(": finished\n") == 2


def test_a_run_is_watched_to_its_end(run: RunFolder, monkeypatch: pytest.MonkeyPatch, capsys):
    weights = run.weights("clips").rename(run.path / "weights")
    killed_session(run)
    monkeypatch.setattr(cluster, "WATCH", 0.01)
    threading.Timer(0.3, lambda: weights.rename(run.weights("clips"))).start()
    assert main(["status", str(run.path), "--watch"]) == 0
    out = capsys.readouterr().out
    assert out.count(f"{run.path}: dead (it left no word)\n") > 1 and out.count(f"{run.path}: finished\n") == 1


def test_no_torch_is_needed_to_look(tiny_run: Path):
    code = f"import sys\nfrom lingen.cli import cluster, main\nassert main(['status', {str(tiny_run)!r}]) == 0\n"
    run_python("-c", code + "assert not {'torch', 'lightning', 'numpy'} & set(sys.modules)", cwd=ROOT)


def test_speed_is_a_mean_over_rows():
    """Also of fewer than are looked at: 8 rows of one step a second and a slow one."""
    rows = [{"step": str(number), "steps_per_second": "1.0"} for number in range(1, 10)]
    speed = status._steps_per_second([*rows, {"step": "10", "steps_per_second": "0.1"}])
    assert speed == pytest.approx(9 / 18)


def test_a_run_amid_a_stage(run: RunFolder):
    run.weights("clips").unlink()
    for path in run.checkpoints("clips"):
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    rows = run.metrics.read_text().splitlines()
    run.metrics.write_text("\n".join(row for row in rows if not row.startswith("clips,6")) + "\nclips,")
    killed_session(run)
    told = status_of(run.path)
    assert (told.state, told.reason, told.stage, told.step, told.steps) == (
        "dead", "it left no word", "clips", 4, 6
    )  # fmt: skip
    assert told.eta_seconds == told.eta_run_seconds and told.eta_seconds is not None and told.eta_seconds > 0
    assert told.checkpoint == str(run.checkpoints("images")[-1])
    in_session(run, KeyboardInterrupt())
    told = status_of(run.path)
    assert (told.state, told.reason) == ("stopped", "stopped by SIGINT")
    assert [one["reason"] for one in told.restarts][-1] == "killed: it left no word"


def test_a_silent_rank_is_named(run: RunFolder, monkeypatch: pytest.MonkeyPatch, capsys):
    from lingen.run_folder import lock

    mark = killed_session(run)
    with lock.locked(run.path), heartbeats(run.ranks, 0, 2, mark) as writer:
        writer.sign("step", "clips", 5)
        writer.write()
        (beat,) = status_of(run.path).ranks
        assert (beat.step, beat.doing, status_of(run.path).state, status_of(run.path).alive) == (
            5, "step", "running", True
        )  # fmt: skip
        other = run.ranks / "00001.json"
        other.write_text(json.dumps(json.loads(writer.path.read_text()) | {"rank": 1, "host": "n9"}))
        os.utime(other, (time.time() - SILENT - 10,) * 2)
        told = status_of(run.path)
        assert not told.alive and (told.state, told.reason) == ("dead", "rank 1 on n9 has given no sign for 100 s")
        assert told.slowest()[0].rank == 1
        assert main(["status", str(run.path)]) == 0
        assert "rank 1 on n9: last sign 100 s ago at step 5" in capsys.readouterr().out


def test_a_run_that_waits_in_the_queue(tmp_path: Path, capsys):
    assert main(["status", str(tmp_path)]) == 2
    assert "is no run folder" in capsys.readouterr().err
    (tmp_path / "submit" / "0001").mkdir(parents=True)
    (tmp_path / "submit" / "0001" / "submitted.json").write_text('{"job": "12"}')
    assert main(["status", str(tmp_path), "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert (told["state"], told["reason"], told["alive"]) == ("new", "job 12 has not begun to train", False)
    log = tmp_path / "submit" / "0001" / "12.log"
    log.write_text("The ranks cannot meet")  # the job has ended before anything was trained
    assert status_of(tmp_path).reason == f"job 12 has not begun to train; what it printed: {log}"


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"course": 3}', '{"stages": ["a"], "course": {"a": {}}}'])
def test_a_damaged_record_is_one_line(run: RunFolder, text: str, capsys):
    run.about.write_text(text)
    assert main(["status", str(run.path)]) == 2
    assert len(capsys.readouterr().err.splitlines()) == 1
