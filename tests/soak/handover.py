"""What a hand-over does to the loss, with and without a decay of the learning rate before it and a warm-up after it."""

from __future__ import annotations

import csv
import shutil
from collections.abc import Iterator
from pathlib import Path

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


def losses(run: Path, *words: str) -> list[float]:
    """Held-out losses of the stage `long`, every 4 steps."""
    fit(run.parent / "toy.yaml", words, run=run)
    with (run / "metrics.csv").open(newline="") as file:
        rows = [row for row in csv.DictReader(file) if row["stage"] == "long"]
    return [float(row["validation/loss"]) for row in rows if row["validation/loss"]]


def handover(folder: Path) -> Iterator[str]:
    """What was seen, and a sentence that begins with ``failed`` for each thing that is not as docs/model.md says. Clips
    of 4 frames, then of 8, as the stages of t2v_68s grow: its stages before the last keep their rate."""
    folder.mkdir(parents=True)
    (folder / "toy.yaml").write_text(RECIPE)
    found: dict[str, list[float]] = {}
    for decay, warmups in (("constant", (0, 20)), ("cosine", (20,))):
        before = f"stages.short.train.decay={decay}"
        fit(folder / "toy.yaml", [before], run=folder / decay, stage="short")
        for warmup in warmups:
            run = Path(shutil.copytree(folder / decay, folder / f"{decay} {warmup}"))
            found[run.name] = losses(run, before, f"stages.long.train.warmup={warmup}")
            yield f"{run.name}: {[round(value, 4) for value in found[run.name]]}"
    end = {name: sum(values[-4:]) / 4 for name, values in found.items()}
    for name, values in found.items():
        if max(values[:5]) >= 1.15 * values[0]:  # the first one is 4 steps after the hand-over
            yield f"failed: {name} jumps"
    if not (found["constant 20"][0] < found["cosine 20"][0] and end["constant 20"] < end["cosine 20"]):
        yield "failed: decaying before the hand-over does not cost"
    if abs(end["constant 20"] / end["constant 0"] - 1) > 0.15:
        yield "failed: warming up again is not the same as going on at once"
