"""A short part of the long trials, with fixed seeds, and that the fuzz finds what it looks for."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path
from random import Random

import pytest

from tests.helpers.commands import ROOT
from tests.soak.fuzz import TARGETS, Case, Trial, fuzz, run_case
from tests.soak.kill import kill


@pytest.mark.slow
def test_damaged_files_are_named_and_never_a_traceback() -> None:
    report = fuzz(seed=11, seconds=30)
    assert not report.failures, "\n".join(map(str, report.failures))
    assert len(report.counts) == len(TARGETS)


def test_a_case_is_what_its_seed_says(tmp_path: Path) -> None:
    for name in sorted(TARGETS):
        made = []
        for folder in (tmp_path / name / "one", tmp_path / name / "other"):
            folder.mkdir(parents=True)
            words = TARGETS[name](folder, Random(5)).words
            made.append((words, [path.name for path in sorted(folder.rglob("*"))]))
        assert made[0] == made[1], name


def test_what_gets_through_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    def unnamed(folder: Path, rng: Random) -> Trial:
        return Trial(["show", "--recipe", "nowhere"], ("the name of another file",))

    def broken(folder: Path, rng: Random) -> Trial:
        monkeypatch.setattr("lingen.cli.main", lambda words: 1 // 0)
        return Trial([], ())

    monkeypatch.setitem(TARGETS, "unnamed", unnamed)
    failure = run_case(Case(1, 1, "unnamed"))
    assert failure is not None and "exit code 2 without the file's name" in failure.reason
    monkeypatch.setitem(TARGETS, "broken", broken)
    failure = run_case(Case(1, 1, "broken"))
    assert failure is not None and "ZeroDivisionError" in failure.reason


@pytest.mark.slow
def test_what_is_killed_goes_on_to_the_same_weights_and_samples(tmp_path: Path) -> None:
    report = kill(tmp_path / "kill", seed=3, times=3)
    assert not report.failures, "\n".join(report.failures)
    assert report.kills.total() == 3 and report.finished >= 1


def test_a_release_runs_every_part_and_tells_which_failed(tmp_path: Path) -> None:
    stub = tmp_path / "python"
    stub.write_text('#!/bin/sh\necho "$@"\ncase "$*" in *"soak gpu "*|*"bench tae"*) exit 3;; esac\n')
    stub.chmod(0o755)
    words = ["bash", str(ROOT / "tests" / "tools" / "release.sh"), str(tmp_path / "out")]
    done = subprocess.run(words, capture_output=True, text=True, env=os.environ | {"PYTHON": str(stub)}, check=False)
    codes = {line.partition(":")[0]: line.split()[3] for line in done.stdout.splitlines()}
    assert done.returncode == 1 and codes == {"suite": "0", "gpu": "3", "gpus": "0", "fit": "0", "bench": "1"}
    asked = (tmp_path / "out" / "bench.log").read_text().splitlines()
    assert len(asked) == 5 and asked[2].startswith("-m lingen bench stock --grid 34x32x32 --grid 136x32x32 --out")
    assert subprocess.run([*words, "nothing"], capture_output=True, check=False).returncode == 2
