"""Spikes of loss and gradient norm: when a step is one, and what is done then; validation losses on fixed noise."""

from __future__ import annotations

import csv
import json
import math
import os
import re
import signal
from pathlib import Path
from typing import Any

import pytest
import torch

from lingen.recipe import load_for_training
from lingen.run import NonFiniteError, Reporter, fit, fit_curriculum
from lingen.training.denoiser import LinGenModule
from lingen.training.folder import RunFolder
from lingen.training.health import ALIKE_LEAST, ALIKE_MOST, LEAST_SPREAD, NORMAL, SPIKE, SpikeWatch, robust_score
from lingen.training.intact import Checkpoint
from lingen.training.meter import Meter
from tests.helpers.spikes import AT, SHORT, STEPS, write_pictures

# when a step is a spike


def test_a_score_counts_median_deviations():
    assert robust_score(7.0, [1.0, 2.0, 3.0, 4.0, 5.0]) == pytest.approx(4 / NORMAL)
    assert robust_score(7.0, [1.0, 2.0, 3.0, 4.0, 5e9]) == pytest.approx(4 / NORMAL), "one outlier moves nothing"
    normal = torch.distributions.Normal(5.0, 2.0).icdf(torch.linspace(0.001, 0.999, 999)).tolist()
    assert robust_score(9.0, normal) == pytest.approx(2.0, rel=1e-3)
    assert robust_score(3.1, [3.0] * 9) == pytest.approx(0.1 / LEAST_SPREAD)


def watched(*norms: float, like: str = "video") -> SpikeWatch:
    watch = SpikeWatch()
    for norm in norms:
        watch.learn(like, 1.0, norm)
    return watch


def test_a_step_is_compared_with_enough_of_its_like():
    limit = math.exp(SPIKE * LEAST_SPREAD)
    assert watched(*[2.0] * (ALIKE_LEAST - 1)).look("video", 1.0, 1e9) is None
    watch = watched(*[2.0] * ALIKE_LEAST)
    assert watch.look("video", 1.0, 2 * limit * 0.999) is None and watch.look("image", 1.0, 1e9) is None
    spike = watch.look("video", 1.0, 2 * limit * 1.001)
    assert spike and spike.scores[0] == 0 and spike.scores[1] == pytest.approx(SPIKE, rel=1e-2) and spike.is_news
    assert watch.look("video", limit * 1.001, 2.0) == watch.look("video", limit * 1.001, 2.0)
    assert watch.look("video", 0.0, 0.0) is None, "small ones are none"


def test_of_several_spikes_in_a_row_one_is_news():
    watch = watched(*[2.0] * ALIKE_LEAST)
    told = [watch.look("video", 1.0, norm) for norm in (1e3, 1e3, 2.0, 1e3)]
    assert [one and one.is_news for one in told] == [True, False, None, True]


def test_a_lasting_change_of_level_becomes_the_usual():
    watch, alarms = watched(*[2.0] * ALIKE_MOST), 0
    for _ in range(ALIKE_MOST):
        alarms += watch.look("video", 1.0, 20.0) is not None
        watch.learn("video", 1.0, 20.0)
    assert alarms <= ALIKE_MOST // 2 + 1


def test_what_is_known_survives_a_checkpoint_bit_for_bit():
    watch, again = watched(*(math.pi * n for n in range(1, 2 * ALIKE_MOST))), SpikeWatch()
    watch.look("video", 1.0, 1e30)
    watch.returns = (8, 2)
    held = watch.state_dict()
    text = json.dumps(held)
    watch.learn("video", 1.0, 5.0)
    assert json.dumps(held) == text, "a checkpoint is written while training goes on"
    again.load_state_dict(json.loads(text))
    again.learn("video", 1.0, 5.0)
    assert again.state_dict() == watch.state_dict()
    again.load_state_dict({})
    assert again.look("video", 1.0, 1e30) is None and again.returns == (-1, 0)


# what is measured


def test_a_step_that_is_thrown_away_is_in_no_mean():
    meter = Meter()
    meter.add("loss", torch.tensor([1.0, 2.0, 9.0]), torch.tensor([True, True, False]))
    meter.add("nothing", torch.ones(2), torch.tensor([False, False]))
    meter.keep()
    meter.add("loss", torch.tensor([math.nan]))
    meter.drop()
    meter.count("steps", 2)
    assert meter.flush() == {"loss": 1.5, "steps": 2}
    assert meter.flush() == {}


# what is done


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_pictures(tmp_path_factory.mktemp("pictures"))


class Told(Reporter):
    def __init__(self) -> None:
        self.lines: list[str] = []

    def say(self, text: str) -> None:
        self.lines.append(text)


def train(recipe: Path, run: Path, *words: str) -> list[str]:
    """What is said of spikes."""
    told = Told()
    fit_curriculum(load_for_training(recipe, [*SHORT, *words], "images"), run=run, stage="images", reporter=told)
    return [line for line in told.lines if line.startswith(("step ", "goes back"))]


def rows_of(run: Path) -> dict[int, dict[str, str]]:
    with RunFolder(run).metrics.open() as file:
        return {int(row["step"]): row for row in csv.DictReader(file)}


def tensors_of(run: Path, step: int) -> dict[str, torch.Tensor]:
    stored = Checkpoint(RunFolder(run).checkpoint("images", step))
    return {name: stored.read(name) for name in stored.tensors}


@pytest.fixture
def keys(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, list[str]]]:
    """Step, counted from 0, and samples of every batch that is trained on."""
    noted: list[tuple[int, list[str]]] = []
    step = LinGenModule.training_step

    def training_step(self: LinGenModule, batch: Any, batch_idx: int) -> torch.Tensor:
        noted.append((batch.step, batch.keys))
        return step(self, batch, batch_idx)

    monkeypatch.setattr(LinGenModule, "training_step", training_step)
    return noted


def test_a_spike_is_said_with_its_samples_and_kept(pictures: Path, tmp_path: Path, keys: list[Any]):
    (said,) = train(pictures, tmp_path / "run")
    rows = rows_of(tmp_path / "run")
    culprit = keys[AT - 1][1]
    assert said.startswith(f"step {AT} of stage 'images' spikes: loss ") and "train.on_spike=keep" in said
    assert re.search(rf"samples and their losses: {culprit[1]} \S+e\+07, {culprit[0]} [0-9.]+$", said)
    assert [step for step, row in rows.items() if row["spikes"]] == [AT] and float(rows[AT]["loss"]) > 1e6
    assert {len(row) for row in rows.values()} == {len(rows[1])} and len(rows) == STEPS


def test_a_skipped_step_leaves_everything_as_it_was(pictures: Path, tmp_path: Path):
    run = tmp_path / "run"
    (said,) = train(pictures, run, "train.on_spike=skip", "train.keep_checkpoints=99", "train.checkpoint_every=1")
    assert f"step {AT} of" in said
    before, after, later = (tensors_of(run, step) for step in (AT - 1, AT, AT + 1))
    assert before.keys() == after.keys() and all(torch.equal(before[name], after[name]) for name in before)
    assert not any(torch.equal(after[name], later[name]) for name in after if name.startswith("exp_avg."))
    row = rows_of(run)[AT]
    assert float(row["skipped_steps"]) == 1 and row["loss"] == ""
    assert Checkpoint(RunFolder(run).checkpoint("images", STEPS)).state["bad_steps"] == 0


def test_spikes_in_a_row_end_the_run(pictures: Path, tmp_path: Path):
    with pytest.raises(NonFiniteError, match=rf"gradient spiked in 1 steps in a row, up to step {AT} of .*e\+07"):
        train(pictures, tmp_path / "run", "train.on_spike=skip", "train.max_nonfinite=1")


def stopping_at(batches: set[int], keys: list[Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """SIGTERM in the batches of these numbers, counted over all starts."""
    step = LinGenModule.training_step

    def training_step(self: LinGenModule, batch: Any, batch_idx: int) -> torch.Tensor:
        if len(keys) + 1 in batches:
            os.kill(os.getpid(), signal.SIGTERM)
        return step(self, batch, batch_idx)

    monkeypatch.setattr(LinGenModule, "training_step", training_step)


BACK = AT - AT % 8
"""The step of the checkpoint before the poisoned picture."""


def test_a_stage_goes_back_and_past_the_samples_since_however_often_it_is_stopped(
    pictures: Path, tmp_path: Path, keys: list[Any], monkeypatch: pytest.MonkeyPatch
):
    one, two = tmp_path / "one", tmp_path / "two"
    spike, back = train(pictures, one, "train.on_spike=rollback")
    assert f"step {AT} of" in spike and back == f"goes back to step {BACK}, and past the samples up to step {AT}"
    first, second = keys[:AT], keys[AT:]
    assert [step for step, _ in second] == list(range(BACK, STEPS))
    used = [key for _, batch in [*first[:BACK], *second] for key in batch]
    passed = [key for _, batch in first[BACK:] for key in batch]
    assert len({*used, *passed}) == len(used) + len(passed) == 2 * (STEPS + AT - BACK), "one was repeated"
    ledger = json.loads(RunFolder(one).ledger.read_text())
    assert (ledger["used"], ledger["passed"]) == (2 * STEPS, len(passed))
    rows = rows_of(one)
    assert len(rows) == STEPS and [n for n, row in rows.items() if float(row["rollbacks"] or 0)] == [BACK + 1]

    keys.clear()
    stopping_at({AT - 3, AT - 1, AT, AT + 3, AT + 8}, keys, monkeypatch)
    stops = 0
    while stops < 9:
        try:
            fit(pictures, [*SHORT, "train.on_spike=rollback", "train.keep_checkpoints=1"], run=two, stage="images")
            break
        except SystemExit as stopped:
            stops += stopped.code == 75
    assert stops == 5
    trained = [step + 1 for step, _ in keys]
    assert trained == [*range(1, AT + 1), AT, *range(BACK + 1, STEPS + 1)], (
        "the spike was met twice: in a signal's step"
    )
    assert all(
        torch.equal(*pair) for pair in zip(*(tensors_of(run, STEPS).values() for run in (one, two)), strict=True)
    )
    states = [Checkpoint(RunFolder(run).checkpoint("images", STEPS)).state for run in (one, two)]
    assert all(states[0][name] == states[1][name] for name in ("spikes", "data", "callbacks", "average_updates"))
    assert states[0]["spikes"]["returns"] == [BACK, 1]


def test_where_the_way_back_does_not_help_the_run_ends(pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    losses = LinGenModule.losses

    def spiking(self: LinGenModule, batch: Any, purpose: str) -> tuple[torch.Tensor, torch.Tensor]:
        values, times = losses(self, batch, purpose)
        return values * (1e6 if purpose == "images" and batch.step == AT + 3 else 1), times

    monkeypatch.setattr(LinGenModule, "losses", spiking)
    monkeypatch.setattr("lingen.training.health.RETURNS", 2)
    said = "went back to step 40 2 times, and the samples after it spike again"
    with pytest.raises(NonFiniteError, match=rf"{said}: step {AT + 4} of stage 'images'.*samples and their losses"):
        train(pictures, tmp_path / "run", "train.on_spike=rollback", "train.checkpoint_every=20")
