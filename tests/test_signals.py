"""A signal at any moment of a run: the exit code tells it, and the same command goes on as if nothing had been."""

from __future__ import annotations

import csv
import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from lingen import run as runs
from lingen.cli import main
from lingen.data import datamodule
from lingen.training.callbacks import StepEdge
from lingen.training.denoiser import LinGenModule
from lingen.weights import find_weights, read_weights

MOMENTS: dict[str, tuple[Any, str, Callable[..., bool]]] = {
    "indexes are made": (datamodule, "open_index", lambda *_: True),
    "a stage is set up": (LinGenModule, "configure_optimizers", lambda module: module.recipe.stage == "clips"),
    "a stage is handed its weights": (runs, "load_into", lambda *_: True),
    "the first batch": (LinGenModule, "training_step", lambda module, *_: module.global_step == 0),
    "a step": (LinGenModule, "training_step", lambda module, *_: module.global_step == 2),
    "a checkpoint is written": (StepEdge, "save", lambda edge, trainer, step: step == 4),
}
"""Name -> a function of lingen, and which of its calls the signal comes in."""
WORDS = ["stages.images.train.steps=1", "stages.clips.train.steps=5", "train.checkpoint_every=4", "train.log_every=1"]


def send_at(monkeypatch: pytest.MonkeyPatch, moment: str, number: int) -> list[int]:
    """Sends this process a signal, once, at a moment of `MOMENTS`; returns what was sent."""
    owner, name, is_then = MOMENTS[moment]
    whole, sent = getattr(owner, name), []

    def call(*args: Any, **settings: Any) -> Any:
        if not sent and is_then(*args):
            sent.append(number)
            os.kill(os.getpid(), number)
        return whole(*args, **settings)

    monkeypatch.setattr(owner, name, call)
    return sent


def what_came_out(run: Path) -> tuple[list[tuple[str, ...]], dict[str, torch.Tensor]]:
    """Losses of both stages, and all weights."""
    with (run / "metrics.csv").open(newline="") as file:
        rows = [(row["stage"], row["step"], row["loss"], row["validation/loss"]) for row in csv.DictReader(file)]
    path = find_weights(run)
    return rows, read_weights(path, "raw") | {f"a.{k}": v for k, v in read_weights(path, "averaged").items()}


@pytest.fixture(scope="session")
def undisturbed(tmp_path_factory: pytest.TempPathFactory, tiny_shards: Path):
    from tests.helpers.tiny import write_recipe

    folder = tmp_path_factory.mktemp("undisturbed")
    return what_came_out(runs.fit(write_recipe(folder / "tiny.yaml", tiny_shards), WORDS, run=folder / "run"))


@pytest.mark.parametrize("moment", MOMENTS)
def test_a_signal_at_any_moment_is_told_and_changes_nothing(
    moment: str, tiny_recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, undisturbed, capsys
):
    number, code = ((signal.SIGTERM, 75), (signal.SIGUSR1, 75), (signal.SIGINT, 130))[list(MOMENTS).index(moment) % 3]
    words = ["fit", "--recipe", str(tiny_recipe), "--run", str(tmp_path / "run"), *WORDS]
    before = [signal.getsignal(one) for one in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)]
    with monkeypatch.context() as patched:
        sent = send_at(patched, moment, number)
        assert main(words) == code
        assert sent
    told = capsys.readouterr().err
    assert told.count(f"Stopped by {number.name}; the same command goes on from here.") == 1
    assert "Traceback" not in told
    assert [signal.getsignal(one) for one in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)] == before
    assert main(words) == 0
    rows, weights = what_came_out(tmp_path / "run")
    assert rows == undisturbed[0]
    assert weights.keys() == undisturbed[1].keys()
    assert all(torch.equal(value, undisturbed[1][name]) for name, value in weights.items())
