"""What a hand-over does to the loss, with and without a decay of the learning rate before it and a warm-up after it."""

from __future__ import annotations

import csv
import shutil
from collections.abc import Iterator
from pathlib import Path
from statistics import fmean
from typing import Any

from lingen.run import fit

RECIPE = """
model:
  dim: 48
  depth: 2
  mixer: {name: mate, state_dim: 16, head_dim: 16, window: [4, 3, 3]}
  patch: [2, 8, 8]
  predict: clip
  gate_init: 1.0
  pool_text: true
autoencoder: pixels
text: {name: words, dim: 48}
data:
  synthetic: {name: shapes, clips: 240, images: 24, held_out: 32}
  mix: {image: 0, video: 1}
  batch: {video: 8}
  size: [24, 24]
  fps: 8
  fps_prefix: false
  workers: 0
  cache_mb: 64
train: {lr: 4e-3, warmup: 10, weight_decay: 0.01, ema: 0, checkpoint_every: 1000}    # ema 0: raw weights are judged
trainer: {logger: false, accelerator: cpu, devices: 1}
stages:
  short: {data: {frames: 4}, train: {steps: 120}}
  long: {data: {frames: 8}, train: {steps: 48, lr: 2e-3, validate_every: 4, validation_samples: 16}}
"""


Row = dict[str, Any]


def losses(run: Path, *words: str) -> list[float]:
    """Held-out losses of the stage `long`, every 4 steps."""
    fit(run.parent / "toy.yaml", words, run=run)
    with (run / "metrics.csv").open(newline="") as file:
        rows = [row for row in csv.DictReader(file) if row["stage"] == "long"]
    return [float(row["validation/loss"]) for row in rows if row["validation/loss"]]


def cases(folder: Path, first: int, second: int) -> Iterator[Row]:
    """What the loss does over a hand-over after so many steps on clips of 4 frames to so many on clips of 8, as the
    stages of t2v_68s grow: its stages before the last keep their rate."""
    folder.mkdir(parents=True)
    (folder / "toy.yaml").write_text(RECIPE)
    for decay in ("constant", "cosine"):
        before = (f"stages.short.train.steps={first}", f"stages.short.train.decay={decay}")
        fit(folder / "toy.yaml", before, run=folder / decay, stage="short")
        still = shutil.copytree(folder / decay, folder / f"{decay} still")
        start = losses(still, *before, "stages.long.train.steps=4", "stages.long.train.lr=1e-12")[0]
        for warmup in (0, 20):
            run = shutil.copytree(folder / decay, folder / f"{decay} {warmup}")
            found = losses(run, *before, f"stages.long.train.steps={second}", f"stages.long.train.warmup={warmup}")
            told = {"at the hand-over": start, "highest of 40 steps": max(found[:10]), "last 16": fmean(found[-4:])}
            numbers = {name: round(value, 4) for name, value in told.items()}
            yield {"first stage": decay, "warmup": warmup} | numbers | {"losses": [round(one, 4) for one in found]}


def unlike_the_page(rows: list[Row]) -> Iterator[str]:
    """A sentence for each thing that is not as docs/model.md says."""
    end = {(row["first stage"], row["warmup"]): row["last 16"] for row in rows}
    for row in rows:
        if row["highest of 40 steps"] >= 1.15 * row["at the hand-over"]:
            yield f"{row['first stage']}, warm-up of {row['warmup']}: the loss jumps"
    for warmup in (0, 20):
        if end["constant", warmup] >= end["cosine", warmup]:
            yield f"warm-up of {warmup}: decaying before the hand-over does not cost"
    if abs(end["constant", 20] / end["constant", 0] - 1) > 0.15:
        yield "warming up again is not the same as going on at once"
