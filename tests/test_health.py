"""Spikes of loss and gradient norm: when a step is one, and what is done then; validation losses on fixed noise."""

from __future__ import annotations

import csv
import json
import math
import os
import re
import signal
import time
import weakref
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.plugins.precision import MixedPrecision

import lingen.run
from lingen.cli.cluster import _lines_of
from lingen.launch.status import Status
from lingen.ranks.heartbeat import Heartbeat, heartbeats, read_heartbeats, sign
from lingen.recipe import load_for_training
from lingen.run import NonFiniteError, Reporter, fit, fit_curriculum
from lingen.run_folder.folder import RunFolder
from lingen.run_folder.intact import Checkpoint
from lingen.training.denoiser import LinGenModule
from lingen.training.health import ALIKE_LEAST, ALIKE_MOST, LEAST_SPREAD, NORMAL, SPIKE, SpikeWatch, robust_score
from lingen.training.meter import Meter
from lingen.training.pace import Pace, RankPace, compared
from tests.helpers.ranks import run_ranks
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
    meter.take()
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


def test_a_scale_of_float16_that_is_too_high_is_no_fault(tiny_recipe: Path, tmp_path: Path, monkeypatch):
    """Lightning's scaler halves it, and leaves the step out."""
    build = lingen.run.build_trainer

    def scaled(*args: Any) -> Any:
        trainer = build(*args)
        scaler = torch.amp.GradScaler("cpu", init_scale=2.0**70, backoff_factor=2.0**-8)
        trainer.strategy.precision_plugin = MixedPrecision("16-mixed", "cpu", scaler)
        return trainer

    monkeypatch.setattr(lingen.run, "build_trainer", scaled)
    words = ["stages.images.train.steps=20", "train.max_nonfinite=2", "train.log_every=1", "sample.prompts=[]"]
    fit_curriculum(load_for_training(tiny_recipe, words, "images"), run=tmp_path / "run", stage="images")
    found = rows_of(tmp_path / "run")
    assert sum(float(row["overflows"] or 0) for row in found.values()) > 2
    assert float(found[20]["grad_norm"]) > 0 and "nonfinite_steps" not in found[20]


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
    models, begin = weakref.WeakSet[LinGenModule](), LinGenModule.on_fit_start
    monkeypatch.setattr(LinGenModule, "on_fit_start", lambda self: (models.add(self), begin(self))[1])
    monkeypatch.setattr(LinGenModule, "on_train_start", lambda self, on=LinGenModule.on_train_start: (
        alive.append(len(models)), on(self))[1])  # fmt: skip
    alive: list[int] = []
    spike, back = train(pictures, one, "train.on_spike=rollback")
    assert alive == [1, 1], "the model before is still in memory"
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
    stopping_at({AT - 1, AT, AT + 3}, keys, monkeypatch)
    stops = 0
    while stops < 9:
        try:
            fit(pictures, [*SHORT, "train.on_spike=rollback", "train.keep_checkpoints=1"], run=two, stage="images")
            break
        except SystemExit as stopped:
            stops += stopped.code == 75
    assert stops == 3
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
    monkeypatch.setattr("lingen.training.health.RETURNS", 1)
    said = "went back to step 40 1 times, and the samples after it spike again"
    with pytest.raises(NonFiniteError, match=rf"{said}: step {AT + 4} of stage 'images'.*samples and their losses"):
        train(pictures, tmp_path / "run", "train.on_spike=rollback", "train.checkpoint_every=20")


# which rank is slow


def test_the_slowest_ranks_are_said_once_with_their_hosts():
    pace, usual = Pace(), [RankPace(0.5 + rank % 7 / 1000, 0.01, f"n{rank // 8}") for rank in range(150)]
    slow = [*usual[:77], RankPace(0.7, 0.01, "n9"), *usual[78:149], RankPace(0.5, 0.4, "n18")]
    told = [pace.slow_ranks(ranks) for ranks in (usual, slow, slow, slow, slow, usual, slow)]
    assert [line is not None for line in told] == [False, False, False, True, False, False, False]
    assert told[3] == (
        "slow: rank 149 on n18 (0.5 s of forward pass in a step, 0.4 s waiting for data), "
        "rank 77 on n9 (0.7 s of forward pass in a step, 0.01 s waiting for data); "
        "the rank in the middle: 0.503 s of forward pass in a step, 0.01 s waiting for data"
    )
    values = compared(slow)
    assert (values["time/own_max"], values["time/own_slowest"], values["time/data_slowest"]) == (0.7, 77, 149)
    assert values["time/own_median"] == pytest.approx(0.503) and values["time/data_median"] == 0.01


def test_a_rank_measures_its_parts_in_training_and_its_wait_for_data(tmp_path: Path):
    part = torch.nn.Linear(2, 2)
    part.register_forward_pre_hook(lambda *_: time.sleep(0.05))  # as a strategy that waits for other ranks
    with heartbeats(tmp_path, 0, 1, "m") as writer:
        pace = Pace([part])
        part.register_forward_pre_hook(lambda *_: time.sleep(0.1))
        for _ in range(2):
            sign("data")
            time.sleep(0.02)
            sign("step")
            part(torch.ones(2, 2))
            with torch.no_grad():
                part(torch.ones(2, 2))
            pace.step()
        sign("validation")
        time.sleep(0.1)
        found = pace.flush()
        assert 0.1 <= found.own < 0.145 and 0.02 <= found.data < 0.1
        writer.write()
        assert read_heartbeats(tmp_path)[0].pace == pytest.approx(found[:2], abs=1e-4)
        assert pace.flush()[:2] == (0.0, 0.0)


def test_status_sorts_by_what_others_wait_for():
    def one(rank: int, pace: tuple[float, float] | None, **more: Any) -> Heartbeat:
        usual = {"age_seconds": 3.0, "doing": "step", "doing_seconds": 1.0, "data_share": 0.0, "host": "n1", "step": 5}
        return Heartbeat(rank=rank, pace=pace, stage="a", memory={}, ended=None, **usual | more)

    ranks = [one(0, (0.5, 0.0)), one(1, None), one(2, (0.5, 0.4)), one(3, (0.7, 0.0)), one(4, (0.5, 0.0))]
    ranks += [one(5, (0.5, 0.0), doing="data", doing_seconds=40.0), one(6, (0.5, 0.0), age_seconds=80.0)]
    told = Status(
        run="r", state="running", reason=None, alive=True, stage="a", step=5, steps=9, stages={"a": {}}, loss=None,
        tokens_per_second=None, eta_seconds=None, eta_run_seconds=None, checkpoint=None, restarts=[], ranks=ranks * 60,
    )  # fmt: skip
    assert len(told.slowest()) == 5, "1% of 420"
    assert [each.rank for each in replace(told, ranks=ranks).slowest()] == [6, 5, 2]
    lines = list(_lines_of(replace(told, ranks=ranks[2:4])))
    assert "  ranks: 2 on 1 host; " in lines[-3] and lines[-2].endswith(", 0.5 s of forward pass in a step")


# several ranks

RANKS = """
import sys
from lingen.recipe import load_for_training
from lingen.run import Reporter, fit, fit_curriculum

class Told(Reporter):
    def say(self, text):
        print("said", text, flush=True)

recipe, run, tiny, other, *words = sys.argv[1:]
fit_curriculum(load_for_training(recipe, words, "images"), run=run, stage="images", reporter=Told())
fit(tiny, [*VALIDATION, "data.batch.video=1", *words[-2:]], run=other, stage="clips")
"""
VALIDATION = [
    "train.lr=0", "train.validation_samples=5", "stages.clips.data.mix.image=0", "stages.clips.train.steps=1",
    "sample.prompts=[]",
]  # fmt: skip


@pytest.mark.slow
def test_ranks_agree_on_a_spike_of_one_and_on_what_they_validate(
    pictures: Path, tiny_recipe: Path, tmp_path: Path, tiny_shards: Path
):
    """Five held-out clips and two ranks: one clip comes again."""
    one, two = tmp_path / "one", tmp_path / "two"
    (tmp_path / "ranks.py").write_text(f"VALIDATION = {VALIDATION}\n{RANKS}")
    same = ["train.on_spike=rollback", "train.lr=1e-4", "train.log_every=4"]
    words = [*SHORT, *same, "data.batch.image=1", "trainer.devices=2", "trainer.strategy=fsdp"]
    said = run_ranks([str(tmp_path / "ranks.py"), *map(str, (pictures, two, tiny_recipe, tmp_path / "v2")), *words], 2)
    told = [line.removeprefix("said ") for line in said[0].splitlines() if line.startswith("said ")]
    (spike,) = (line for line in told if " spikes: " in line)
    assert re.search(r"losses: \S+ \(rank 1\) \S+e\+07, \S+ \(rank 0\) [0-9.]+$", spike)
    assert f"goes back to step {BACK}, and past the samples up to step {AT}" in told and "said" not in said[1]
    train(pictures, one, *same)
    losses = [[float(row["loss"]) for row in rows_of(run).values()] for run in (one, two)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-4) and len(losses[0]) == STEPS // 4
    states = [Checkpoint(RunFolder(run).checkpoint("images", STEPS)).state for run in (one, two)]
    assert states[0]["data"] == states[1]["data"] and states[0]["spikes"]["returns"] == states[1]["spikes"]["returns"]
    assert {float(row["time/own_slowest"]) for row in rows_of(two).values()} <= {0.0, 1.0}

    fit(tiny_recipe, [*VALIDATION, "data.batch.video=2"], run=tmp_path / "v1", stage="clips")
    found = [
        {name: float(text) for name, text in rows_of(tmp_path / run)[1].items() if name.startswith("validation/")}
        for run in ("v1", "v2")
    ]
    assert found[0] == pytest.approx(found[1], rel=1e-6) and len(found[0]) > 3
