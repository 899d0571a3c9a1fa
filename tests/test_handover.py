"""What a hand-over does to the loss, with and without a decay of the learning rate before it and a warm-up after it."""

from __future__ import annotations

import csv
import shutil
from pathlib import Path

import pytest

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


@pytest.mark.slow
def test_warming_up_again_is_enough_and_decaying_before_it_costs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Clips of 4 frames, then of 8, as the stages of t2v_68s grow: its stages before the last keep their rate."""
    monkeypatch.setenv("LINGEN_CACHE", str(tmp_path / "cache"))
    (tmp_path / "toy.yaml").write_text(RECIPE)
    found: dict[str, list[float]] = {}
    for decay, warmups in (("constant", (0, 20)), ("cosine", (20,))):
        before = f"stages.short.train.decay={decay}"
        fit(tmp_path / "toy.yaml", [before], run=tmp_path / decay, stage="short")
        for warmup in warmups:
            run = Path(shutil.copytree(tmp_path / decay, tmp_path / f"{decay} {warmup}"))
            found[run.name] = losses(run, before, f"stages.long.train.warmup={warmup}")
    print({name: [round(value, 4) for value in values] for name, values in found.items()})
    end = {name: sum(values[-4:]) / 4 for name, values in found.items()}
    for values in found.values():
        assert max(values[:5]) < 1.15 * values[0]  # no jump: the first one is 4 steps after the hand-over
    assert found["constant 20"][0] < found["cosine 20"][0] and end["constant 20"] < end["cosine 20"]
    assert end["constant 20"] == pytest.approx(end["constant 0"], rel=0.15)
