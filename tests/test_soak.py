"""A short part of the long trials, with fixed seeds, and that the fuzz finds what it looks for."""

from __future__ import annotations

from pathlib import Path
from random import Random

import pytest

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
