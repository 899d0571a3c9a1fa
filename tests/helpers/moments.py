"""One run that a signal stops at one moment after another, and what it leaves behind. As a script: one rank of two, of
such a run and an undisturbed one: ``python -m tests.helpers.moments RECIPE FOLDER``."""

from __future__ import annotations

import csv
import json
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from signal import SIGINT, SIGTERM, SIGUSR1, Signals
from typing import Any

import pytest
import torch

from lingen import run as runs
from lingen.cli import main
from lingen.data import datamodule
from lingen.ranks import signals
from lingen.sampling import clips, samples
from lingen.training import begin
from lingen.training.callbacks import StageEnd, StepEdge
from lingen.training.denoiser import LinGenModule
from lingen.weights import find_weights, read_weights

Moment = tuple[Any, str, Callable[..., bool]]
"""A function of lingen, by its owner and name, and which of its calls the signal comes in."""


def _at(step: int) -> Callable[..., bool]:
    return lambda module, *_: module.recipe.stage == "clips" and module.global_step == step


MOMENTS: dict[str, Moment] = {
    "indexes are made": (datamodule, "open_index", lambda *_: True),
    "the last step of a stage": (LinGenModule, "training_step", lambda *_: True),
    "the end of a stage": (StageEnd, "on_train_end", lambda *_: True),
    "weights are written": (runs, "save_weights", lambda *_: True),
    "a stage is handed its weights": (begin, "load_into", lambda *_: True),
    "a stage is set up": (LinGenModule, "configure_optimizers", _at(0)),
    "the first batch": (LinGenModule, "training_step", _at(0)),
    "a step after which clips are due": (LinGenModule, "training_step", _at(1)),
    "a clip": (clips, "sample_latents", _at(2)),
    "a clip is decoded": (samples, "decoded", _at(2)),
    "validation": (LinGenModule, "validation_step", _at(3)),
    "a checkpoint is written": (StepEdge, "save", lambda edge, trainer, step, **_: step == 5),
    "the last validation": (LinGenModule, "validation_step", _at(9)),
    "a clip at the end of a stage": (clips, "sample_latents", _at(9)),
    "scoring": (signals, "by_first_rank", lambda *_: True),
}
"""In the order in which a run that goes on comes to them."""
OF_ONE_RANK = {
    "the last step of a stage": 1, "a stage is set up": 1, "the first batch": 0, "a step after which clips are due": 1,
    "a clip": 1, "a clip is decoded": 0, "the last validation": 1, "a clip at the end of a stage": 1, "scoring": 1,
}  # fmt: skip
"""Moments that are tried with two ranks, and the one that gets the signal."""
NUMBERS = {SIGTERM: 75, SIGUSR1: 75, SIGINT: 130}
"""Signal -> exit code."""
WORDS = [
    "stages.images.train.steps=1", "stages.clips.train.steps=9", "train.checkpoint_every=5", "train.log_every=1",
    "train.sample_every=2", "train.validate_every=3", "sample.prompts=[a red square, a blue circle]",
    "data.synthetic=shapes", "score.clips=2",
]  # fmt: skip


def number_of(moment: str) -> tuple[Signals, int]:
    """The signal that comes at a moment, and the exit code that tells it: each of them at some."""
    return list(NUMBERS.items())[list(MOMENTS).index(moment) % len(NUMBERS)]


def send_at(patched: pytest.MonkeyPatch, moment: str) -> list[Signals]:
    """Sends this process the signal of a moment, once; returns what was sent."""
    owner, name, is_then = MOMENTS[moment]
    whole, sent = getattr(owner, name), []

    def call(*args: Any, **settings: Any) -> Any:
        if not sent and is_then(*args):
            sent.append(number_of(moment)[0])
            os.kill(os.getpid(), sent[0])
        return whole(*args, **settings)

    patched.setattr(owner, name, call)
    return sent


def what_came_out(run: Path) -> tuple[Any, dict[str, torch.Tensor]]:
    """Losses of both stages, the clips that there are, and the score; all weights."""
    with (run / "metrics.csv").open(newline="") as file:
        rows = [(row["stage"], row["step"], row["loss"], row["validation/loss"]) for row in csv.DictReader(file)]
    made = sorted(path.relative_to(run).as_posix() for path in run.glob("samples/*/*"))
    path = find_weights(run)
    told = {"rows": rows, "clips": made, "score": json.loads((run / "score.json").read_text())}
    return told, read_weights(path, "raw") | {f"a.{k}": v for k, v in read_weights(path, "averaged").items()}


def go_through(words: Sequence[str], run: Path, moments: Mapping[str, int], rank: int) -> dict[str, int]:
    """Starts a run again and again, each time to be stopped at the next moment.

    Args:
        words: of `lingen fit`.
        moments: each with the rank that gets the signal.
        rank: this one.
    Returns:
        moment -> exit code; "over" -> that of the last start, which nothing stops.
    """
    codes = {}
    for moment, signalled in moments.items():
        with pytest.MonkeyPatch.context() as patched:
            sent = send_at(patched, moment) if rank == signalled else [number_of(moment)[0]]
            codes[moment] = main([*words, "--run", str(run)])
        assert sent, f"the run did not come to: {moment}"
    return codes | {"over": main([*words, "--run", str(run)])}


def of_two(recipe: str, folder: Path, rank: int) -> dict[str, int]:
    """`go_through` for two ranks, after an undisturbed run beside it."""
    words = ["fit", "--recipe", recipe, *WORDS, "trainer.devices=2", "trainer.strategy=ddp"]
    straight = go_through(words, folder / "straight", {}, rank)
    return {"straight": straight["over"], **go_through(words, folder / "stopped", OF_ONE_RANK, rank)}


if __name__ == "__main__":
    torch.set_num_threads(1)
    target, number = Path(sys.argv[2]), int(os.environ["RANK"])
    (target / f"rank-{number}.json").write_text(json.dumps(of_two(sys.argv[1], target, number)))
